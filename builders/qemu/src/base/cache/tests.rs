use super::*;
use crate::base::testing::context;

fn card(disk: &Path) -> Card {
    let length = std::fs::metadata(disk).unwrap().len();
    let disk = DiskFile { path: disk.into(), format: DiskFormat::Raw, size: length };
    Card::new("x", &disk, length, Firmware::BiosUefi, None)
}

async fn make(shelf: &Shelf, context: &Context, content: &str) -> Made {
    let _making = shelf.making("x", context).await.unwrap();
    let draft = shelf.draft(context).unwrap();
    std::fs::write(draft.disk(), content).unwrap();
    let card = card(&draft.disk());
    shelf.commit(draft, card, context).await.unwrap().unwrap()
}

fn folders(shelf: &Shelf) -> usize {
    std::fs::read_dir(&shelf.folder).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count()
}

#[tokio::test]
async fn an_old_base_stays_while_it_is_used() {
    let home = tempfile::tempdir().unwrap();
    let (mine, other) = (Shelf::new(home.path(), "x"), Shelf::new(home.path(), "x"));
    let (one, _) = context(home.path(), "one");
    assert!(mine.take().unwrap().is_none());
    let old = make(&mine, &one, "old").await;
    let new = make(&other, &one, "newer").await;
    assert_ne!(old.folder, new.folder);
    assert_eq!(std::fs::read(old.disk()).unwrap(), b"old", "still used by `mine`");
    assert_eq!(other.current().unwrap().unwrap().card, new.card);
    drop(mine);
    // Names are told apart by their millisecond.
    tokio::time::sleep(Duration::from_millis(2)).await;
    make(&other, &one, "newest").await;
    assert!(!old.folder.exists());
    assert_eq!(folders(&other), 2, "`newer` is still used by `other`");
    assert!(one.scope.unwind().await.is_empty());
    assert_eq!(std::fs::read(other.take().unwrap().unwrap().disk()).unwrap(), b"newest");
}

#[tokio::test]
async fn what_was_not_finished_is_not_there() {
    let home = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(home.path(), "x");
    let (one, _) = context(home.path(), "one");
    let draft = shelf.draft(&one).unwrap();
    std::fs::write(draft.disk(), "half").unwrap();
    assert!(shelf.take().unwrap().is_none());
    // Killed here. The next one tidies up.
    let (two, _) = context(home.path(), "two");
    make(&shelf, &two, "whole").await;
    assert_eq!(folders(&shelf), 1);
    // And the scope of the first one, had it lived on, does too.
    let draft = shelf.draft(&one).unwrap();
    assert!(one.scope.unwind().await.is_empty());
    assert!(!draft.folder.exists());
}

#[tokio::test]
async fn a_damaged_base_counts_as_none() {
    let home = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(home.path(), "x");
    let (one, _) = context(home.path(), "one");
    let made = make(&shelf, &one, "whole").await;
    for damage in ["truncated", "card", "pointer", "pointer outside"] {
        let made = if shelf.current().unwrap().is_some() { made.clone() } else { make(&shelf, &one, "whole").await };
        match damage {
            "truncated" => std::fs::write(made.disk(), "who").unwrap(),
            "card" => std::fs::write(made.folder.join(CARD), "{").unwrap(),
            "pointer" => std::fs::write(shelf.folder.join("current"), "gone").unwrap(),
            _ => std::fs::write(shelf.folder.join("current"), "../x").unwrap(),
        }
        assert!(shelf.take().unwrap().is_none(), "{damage}");
    }
}

#[tokio::test]
async fn what_is_remembered_is_given_back() {
    let home = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(home.path(), "x");
    let (one, _) = context(home.path(), "one");
    let made = make(&shelf, &one, "whole").await;
    assert_eq!(shelf.take().unwrap().unwrap().card.disk, None);
    let digest = Digest::of("disk");
    shelf.remember(&made.disk(), &digest).unwrap();
    shelf.remember(Path::new("/elsewhere/disk"), &Digest::of("other")).unwrap();
    assert_eq!(shelf.take().unwrap().unwrap().card.disk, Some(digest));
}

#[tokio::test]
async fn the_part_of_a_download_goes_unless_somebody_goes_on_with_it() {
    let home = tempfile::tempdir().unwrap();
    let (busy, idle) = (part(home.path(), "sha256-aa", "http://a"), part(home.path(), "sha256-bb", "http://b"));
    assert_ne!(busy, part(home.path(), "sha256-aa", "http://b"));
    assert_eq!(prune_downloads(home.path(), false).unwrap(), 0);
    std::fs::create_dir_all(busy.parent().unwrap()).unwrap();
    for path in [&busy, &idle, &idle.with_extension("part.json")] {
        std::fs::write(path, vec![1; 5000]).unwrap();
    }
    let (context, _) = context(home.path(), "one");
    let _making = Shelf::new(home.path(), "sha256-aa").making("x", &context).await.unwrap();
    drop(Shelf::new(home.path(), "sha256-bb").making("x", &context).await.unwrap());
    assert_eq!(prune_downloads(home.path(), true).unwrap(), 2 * size_on_disk(&idle));
    assert!(idle.exists());
    assert!(prune_downloads(home.path(), false).unwrap() >= 10_000);
    assert_eq!((busy.exists(), idle.exists()), (true, false));
}

#[test]
fn ages() {
    for (seconds, expected) in [(1, "1 second"), (100, "1 minute"), (7200, "2 hours"), (300_000, "3 days")] {
        assert_eq!(age(now() - seconds * 1000), expected);
    }
    assert_eq!(age(u64::MAX), "0 seconds");
}
