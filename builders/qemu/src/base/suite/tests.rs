use super::*;
use crate::base::testing::context;
use kiln_model::settings::{Entry, Place, Table, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Default)]
struct Fake {
    made: Arc<AtomicUsize>,
    recipe: &'static str,
}

#[async_trait]
impl Maker for Fake {
    fn recipe(&self) -> String {
        self.recipe.into()
    }

    async fn make(&self, suite: &str, out: &Path, _: &Context) -> Result<()> {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let n = self.made.fetch_add(1, Ordering::SeqCst);
        std::fs::write(out, format!("{suite} {n}")).trying(|| "write".into())
    }
}

fn source(home: &Path, made: &Arc<AtomicUsize>, recipe: &'static str) -> DebianSource {
    DebianSource::new(home, &SUITES[0], None, Box::new(Fake { made: made.clone(), recipe }))
}

#[tokio::test]
async fn two_bakes_build_once_and_the_second_says_that_it_waits() {
    let home = tempfile::tempdir().unwrap();
    let made = Arc::default();
    let (a, b) = (source(home.path(), &made, ""), source(home.path(), &made, ""));
    let ((one, heard_one), (two, heard_two)) = (context(home.path(), "one"), context(home.path(), "two"));
    let (first, second) = tokio::join!(a.fetch(false, &one), b.fetch(false, &two));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(made.load(Ordering::SeqCst), 1);
    assert_eq!(first.disk, second.disk);
    assert_eq!((first.label.as_str(), first.firmware, first.credentials), ("debian bookworm", Firmware::BiosUefi, Some(true)));
    assert_eq!(heard_one.notes().len(), 0);
    assert!(heard_two.notes()[0].contains("waiting"), "{:?}", heard_two.notes());
    assert!(heard_two.notes()[1].contains("was built 0 seconds ago"));
}

#[tokio::test]
async fn it_is_kept_until_fresh_or_another_recipe() {
    let home = tempfile::tempdir().unwrap();
    let made = Arc::default();
    let (one, heard) = context(home.path(), "one");
    let a = source(home.path(), &made, "");
    let old = a.fetch(false, &one).await.unwrap();
    assert_eq!(a.fetch(false, &one).await.unwrap().disk, old.disk);
    assert!(heard.notes()[0].contains("--fresh"));
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    let new = source(home.path(), &made, "").fetch(true, &one).await.unwrap();
    assert_eq!(std::fs::read_to_string(&new.file().unwrap().path).unwrap(), "bookworm 1");
    assert_eq!(std::fs::read_to_string(&old.file().unwrap().path).unwrap(), "bookworm 0", "`a` still uses it");
    assert_eq!(source(home.path(), &made, "").fetch(false, &one).await.unwrap().disk, new.disk);
    source(home.path(), &made, "another").fetch(false, &one).await.unwrap();
    assert_eq!(made.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn an_interrupted_build_leaves_nothing_and_blocks_nobody() {
    let home = tempfile::tempdir().unwrap();
    let made = Arc::default();
    let a = source(home.path(), &made, "");
    let (one, _) = context(home.path(), "one");
    let slow = std::time::Duration::from_millis(50);
    assert!(tokio::time::timeout(slow, a.fetch(false, &one)).await.is_err());
    assert!(one.scope.unwind().await.is_empty());
    assert!(std::fs::read_dir(a.shelf.folder().unwrap()).unwrap().all(|e| e.unwrap().path().is_file()));
    let (two, heard) = context(home.path(), "two");
    a.fetch(false, &two).await.unwrap();
    assert_eq!(heard.notes().len(), 0);
}

#[test]
fn suites_that_are_not_there() {
    for (name, help) in [
        ("bokworm", "did you mean `bookworm`?"),
        ("Trixie", "did you mean `trixie`?"),
        ("12", "debian = \"bookworm\""),
        ("12.7", "debian = \"bookworm\""),
        ("stable", "next year"),
        ("noble", "known suites"),
    ] {
        let place = Place::default();
        let node = |value| Node { value, place };
        let entry = Entry { name: "debian".into(), place, node: node(Value::String(name.into())) };
        let table = node(Value::Table(Table { entries: vec![entry] }));
        let mut problems = Problems::default();
        let kind = DebianKind::new("/x".into(), Site::default());
        assert!(kind.read(&table, Path::new("/"), &mut problems).is_none());
        assert!(problems.0[0].help.as_ref().unwrap().contains(help), "{name}: {problems:?}");
    }
}
