//! Publishing against AWS in memory.

use std::path::Path;
use std::time::Duration;

use kiln_model::block::BLOCK;
use kiln_model::image::{Block, Place, zero_block};

use super::*;
use crate::api::images::Use;
use crate::testing::{Fake, Fault, quick};

const REGION: &str = "eu-central-1";
const OTHER: &str = "us-east-1";

/// A block of one letter.
fn block(letter: char) -> Vec<u8> {
    vec![letter as u8; usize::try_from(BLOCK).unwrap()]
}

/// The digest of such a block, each computed once.
fn digest(letter: char) -> Digest {
    static KNOWN: std::sync::Mutex<BTreeMap<char, Digest>> = std::sync::Mutex::new(BTreeMap::new());
    *KNOWN.lock().unwrap().entry(letter).or_insert_with(|| Digest::of(block(letter)))
}

/// A disk of one letter per block, `.` being zeros. Blocks of the letter `damaged`
/// are stored as something else.
struct Letters {
    text: String,
    damaged: Option<char>,
}

impl Blocks for Arc<Letters> {
    fn reader(&self) -> Result<Box<dyn BlockReader>> {
        Ok(Box::new(Reader(self.clone())))
    }
}

struct Reader(Arc<Letters>);

impl BlockReader for Reader {
    fn read(&mut self, index: usize) -> Result<Vec<u8>> {
        let letter = self.0.text.chars().nth(index).unwrap();
        assert_ne!(letter, '.', "a block of zeros is read");
        Ok(block(if self.0.damaged == Some(letter) { '!' } else { letter }))
    }

    fn check(&mut self, index: usize) -> Result<()> {
        match self.0.damaged {
            Some(damaged) if self.0.text.chars().nth(index) == Some(damaged) => Err(Error::new(Code::Corrupt, "pack is damaged")),
            _ => Ok(()),
        }
    }
}

fn map(text: &str) -> BlockMap {
    let block = |letter: char| match letter {
        '.' => Block { digest: zero_block(), place: Place::Zero },
        letter => Block { digest: digest(letter), place: Place::Pack { pack: 0, offset: 0, length: 1 } },
    };
    // Not a whole number of blocks.
    BlockMap { size: text.len() as u64 * BLOCK - 512, packs: Vec::new(), blocks: text.chars().map(block).collect() }
}

fn disk(text: &str, damaged: Option<char>) -> Disk {
    let letters = Arc::new(Letters { text: text.to_owned(), damaged });
    let map = map(text);
    Disk { name: "root".into(), digest: map.disk_digest(), map: Arc::new(map), blocks: Arc::new(letters) }
}

fn subject(version: &str, text: &str) -> Subject {
    Subject {
        name: "web".into(),
        version: version.into(),
        architecture: "amd64".into(),
        firmware: Firmware::BiosUefi,
        digest: Digest::of(format!("{version} {text}")),
        commit: Some("c0ffee".into()),
        bake: Some("01BAKE".into()),
        disks: vec![disk(text, None)],
    }
}

/// The maps of these disks are known.
struct Known(Vec<BlockMap>);

#[async_trait]
impl Maps for Known {
    async fn map(&self, disk: &Digest, _: Option<&Digest>) -> Result<Option<BlockMap>> {
        Ok(self.0.iter().find(|map| map.disk_digest() == *disk).cloned())
    }
}

fn wish(regions: &[&str]) -> Wish {
    Wish { regions: regions.iter().map(ToString::to_string).collect(), volume_type: "gp3".into(), ..Wish::default() }
}

async fn publish(fake: &Fake, folder: &Path, subject: &Subject, wish: &Wish, known: &[&str]) -> Result<Published> {
    let maps = Known(known.iter().map(|text| map(text)).collect());
    let publisher = Publisher { cloud: fake, pace: quick(), maps: &maps, folder: folder.to_owned(), reports: Reports::silent() };
    publisher.publish(subject, wish).await
}

/// What a snapshot in `region` holds, as letters.
fn contents(fake: &Fake, region: &str, snapshot: &str) -> String {
    let state = fake.state();
    let there = &state.regions[region].snapshots[snapshot];
    let last = there.blocks.keys().next_back().map_or(0, |last| *last + 1);
    let letter = |index| there.blocks.get(&index).map_or('.', |data| if data[0] == 0 { '.' } else { data[0] as char });
    (0..last).map(letter).collect::<String>().trim_end_matches('.').to_owned()
}

/// How many AMIs and snapshots there are in a region.
fn there(fake: &Fake, region: &str) -> (usize, usize) {
    let state = fake.state();
    state.regions.get(region).map_or((0, 0), |region| (region.images.len(), region.snapshots.len()))
}

fn region(fake: &Fake, name: &str) -> Region {
    Region::new(fake, name, quick()).unwrap()
}

#[tokio::test]
async fn an_image_becomes_an_ami_and_is_read_back() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let web = subject("1", "ab.c..d");
    let published = publish(&fake, folder.path(), &web, &wish(&[REGION]), &[]).await.unwrap();
    assert_eq!((published.blocks_written, published.blocks_sent), (4, 4));
    let ami = &published.amis[0];
    assert_eq!(contents(&fake, REGION, &ami.snapshots[0]), "ab.c..d");
    {
        let state = fake.state();
        let image = &state.regions[REGION].images[&ami.ami].image;
        assert_eq!((image.architecture.as_str(), image.boot_mode.as_deref()), ("x86_64", Some("uefi-preferred")));
        assert_eq!(image.tags[tags::DIGEST], web.digest.to_string());
        let snapshot = &state.regions[REGION].snapshots[&ami.snapshots[0]];
        assert_eq!(snapshot.tags[tags::DISK_SIZE], web.disks[0].map.size.to_string());
        assert_eq!(snapshot.tags[tags::BAKE], "01BAKE");
    }
    let expected = |_: &Digest| Ok(Some(vec![web.disks[0].digest]));
    let verified = verify::verify(&region(&fake, REGION), &ami.ami, &expected, &Known(vec![]), &Reports::silent()).await.unwrap();
    assert!(verified.disks[0].is_sound() && verified.disks[0].blocks == 4, "{verified:?}");
    assert_eq!(verified.reference.as_deref(), Some("web:1"));
    // The same again makes nothing.
    fake.again();
    let again = publish(&fake, folder.path(), &web, &wish(&[REGION]), &[]).await.unwrap();
    assert!(again.amis[0].existed && again.amis[0].ami == ami.ami && again.blocks_sent == 0);
    for made in ["StartSnapshot", "PutSnapshotBlock", "RegisterImage", "CreateTags"] {
        assert_eq!(fake.count(made), 0, "{made}");
    }
}

#[tokio::test]
async fn only_what_differs_is_sent_and_zeros_where_data_was() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    publish(&fake, folder.path(), &subject("0", "xyxyxyxy"), &wish(&[REGION]), &[]).await.unwrap();
    let first = publish(&fake, folder.path(), &subject("1", "abcdefgh"), &wish(&[REGION]), &[]).await.unwrap();
    fake.again();
    let known = ["xyxyxyxy", "abcdefgh"];
    let second = publish(&fake, folder.path(), &subject("2", "abcd.Fgh.i"), &wish(&[REGION]), &known).await.unwrap();
    assert_eq!(second.parents, first.amis[0].snapshots);
    assert_eq!((second.blocks_written, fake.count("PutSnapshotBlock")), (3, 3));
    assert_eq!(contents(&fake, REGION, &second.amis[0].snapshots[0]), "abcd.Fgh.i");
    // Smaller than its parent: what is after the end has to be zeros.
    let third = publish(&fake, folder.path(), &subject("3", "abcd"), &wish(&[REGION]), &["abcd.Fgh.i"]).await.unwrap();
    assert_eq!(contents(&fake, REGION, &third.amis[0].snapshots[0]), "abcd");
    // Without the map of an earlier one, everything is sent.
    let fourth = publish(&fake, folder.path(), &subject("4", "abcz"), &wish(&[REGION]), &[]).await.unwrap();
    assert_eq!((fourth.blocks_written, fourth.parents.len()), (4, 0));
    // The same disk as another image: the snapshot is there.
    fake.again();
    let fifth = publish(&fake, folder.path(), &subject("5", "abcd"), &wish(&[REGION]), &[]).await.unwrap();
    assert_eq!((fifth.blocks_sent, fake.count("StartSnapshot")), (0, 0));
    assert_eq!(fifth.amis[0].snapshots, third.amis[0].snapshots);
    assert_ne!(fifth.amis[0].ami, third.amis[0].ami);
}

#[tokio::test]
async fn throttling_and_lag_are_borne_without_a_storm() {
    let fake = Fake::with(|state| {
        (state.throttle, state.lag, state.making) = (30, Duration::from_millis(20), Duration::from_millis(20));
    });
    let folder = tempfile::tempdir().unwrap();
    let text: String = ('a'..='z').chain('A'..='Z').collect();
    let mut all = wish(&[REGION, OTHER]);
    all.audience = vec![Audience::Account("111122223333".into())];
    let published = publish(&fake, folder.path(), &subject("1", &text), &all, &[]).await.unwrap();
    for ami in &published.amis {
        assert_eq!(contents(&fake, &ami.region, &ami.snapshots[0]), text);
    }
    let puts = fake.count("PutSnapshotBlock");
    // 52 blocks, three calls in ten in vain, some before the snapshot is known.
    assert!((52..52 * 4).contains(&puts), "{puts}");
}

/// How many calls a publish to two regions takes.
async fn calls() -> usize {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    publish(&fake, folder.path(), &subject("1", "ab.c"), &everything(), &[]).await.unwrap();
    fake.state().calls.len()
}

fn everything() -> Wish {
    Wish {
        audience: vec![Audience::Account("111122223333".into())],
        deprecate: Some("2030-01-01T00:00:00Z".parse().unwrap()),
        tags: Tags::from([("team".into(), "shop".into())]),
        ..wish(&[REGION, OTHER])
    }
}

fn check_everything(fake: &Fake, published: &Published) {
    assert_eq!(published.amis.iter().map(|ami| ami.region.as_str()).collect::<Vec<_>>(), [REGION, OTHER]);
    for ami in &published.amis {
        assert_eq!(there(fake, &ami.region), (1, 1), "{}", ami.region);
        assert_eq!(contents(fake, &ami.region, &ami.snapshots[0]), "ab.c");
        let state = fake.state();
        let there = &state.regions[&ami.region];
        let (image, snapshot) = (&there.images[&ami.ami], &there.snapshots[&ami.snapshots[0]]);
        assert_eq!(image.audience, [Audience::Account("111122223333".into())]);
        assert_eq!(image.image.tags["team"], "shop");
        assert!(image.image.deprecated.is_some());
        assert_eq!(snapshot.accounts, ["111122223333"]);
        assert!(snapshot.tags.contains_key(tags::DISK_DIGEST));
    }
}

#[tokio::test]
async fn a_failure_of_any_call_is_borne_and_nothing_is_made_twice() {
    for fault in [Fault::Failed, Fault::Lost] {
        for number in 0..calls().await {
            let (fake, folder) = (Fake::with(|state| state.fault = Some((number, fault))), tempfile::tempdir().unwrap());
            let published = publish(&fake, folder.path(), &subject("1", "ab.c"), &everything(), &[]).await;
            let published = published.unwrap_or_else(|error| panic!("{fault:?} {number} {:?}: {error:?}", fake.state().calls));
            check_everything(&fake, &published);
        }
    }
}

#[tokio::test]
async fn a_killed_process_is_gone_on_with() {
    for number in 0..calls().await {
        let (fake, folder) = (Fake::with(|state| state.fault = Some((number, Fault::Dead))), tempfile::tempdir().unwrap());
        publish(&fake, folder.path(), &subject("1", "ab.c"), &everything(), &[]).await.unwrap_err();
        fake.again();
        let published = publish(&fake, folder.path(), &subject("1", "ab.c"), &everything(), &[]).await;
        let published = published.unwrap_or_else(|error| panic!("{number}: {error:?}"));
        check_everything(&fake, &published);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().filter(|file| !is_lock(file)).count(), 0, "{number}");
    }
}

fn is_lock(file: &std::io::Result<std::fs::DirEntry>) -> bool {
    file.as_ref().unwrap().path().extension().is_some_and(|extension| extension == "lock")
}

#[tokio::test]
async fn what_was_sent_before_is_not_sent_again() {
    let text: String = ('a'..='z').collect();
    // Look for the AMI, for snapshots, begin, twelve blocks.
    let (fake, folder) = (Fake::with(|state| state.fault = Some((15, Fault::Dead))), tempfile::tempdir().unwrap());
    publish(&fake, folder.path(), &subject("1", &text), &wish(&[REGION]), &[]).await.unwrap_err();
    fake.again();
    let published = publish(&fake, folder.path(), &subject("1", &text), &wish(&[REGION]), &[]).await.unwrap();
    assert_eq!(published.blocks_written, 26);
    assert!(published.blocks_sent <= 16 && fake.count("PutSnapshotBlock") <= 16, "{published:?}");
    assert_eq!(contents(&fake, REGION, &published.amis[0].snapshots[0]), text);
}

#[tokio::test]
async fn notes_that_are_wrong_cost_time_and_no_block() {
    let text: String = ('a'..='z').collect();
    let (fake, folder) = (Fake::with(|state| state.fault = Some((15, Fault::Dead))), tempfile::tempdir().unwrap());
    publish(&fake, folder.path(), &subject("1", &text), &wish(&[REGION]), &[]).await.unwrap_err();
    // Says that AWS has taken blocks which it never saw.
    let done = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path());
    let done = done.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "done")).unwrap();
    let all: Vec<u8> = (0..26_u32).flat_map(|index| [index.to_le_bytes(), (!index).to_le_bytes()].concat()).collect();
    std::fs::write(done, all).unwrap();
    fake.again();
    let published = publish(&fake, folder.path(), &subject("1", &text), &wish(&[REGION]), &[]).await.unwrap();
    assert_eq!(contents(&fake, REGION, &published.amis[0].snapshots[0]), text);
}

#[tokio::test]
async fn a_snapshot_that_is_gone_is_begun_anew() {
    let (fake, folder) = (Fake::with(|state| state.fault = Some((4, Fault::Dead))), tempfile::tempdir().unwrap());
    publish(&fake, folder.path(), &subject("1", "abcd"), &wish(&[REGION]), &[]).await.unwrap_err();
    fake.again();
    fake.state().regions.get_mut(REGION).unwrap().snapshots.clear();
    let published = publish(&fake, folder.path(), &subject("1", "abcd"), &wish(&[REGION]), &[]).await.unwrap();
    assert_eq!(contents(&fake, REGION, &published.amis[0].snapshots[0]), "abcd");
}

#[tokio::test]
async fn damage_in_the_store_is_told_from_damage_on_the_way() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let mut web = subject("1", "abcd");
    web.disks = vec![disk("abcd", Some('c'))];
    let error = publish(&fake, folder.path(), &web, &wish(&[REGION]), &[]).await.unwrap_err();
    assert_eq!(error.kind(), Code::Corrupt, "{error:?}");
    assert_eq!(there(&fake, REGION).0, 0);
}

#[tokio::test]
async fn a_key_is_used_and_only_what_has_it_is_built_on() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    publish(&fake, folder.path(), &subject("1", "abcd"), &wish(&[REGION]), &[]).await.unwrap();
    let key = |region: &str| format!("arn:aws:kms:{region}:111122223333:key/1");
    let mut encrypted = wish(&[REGION, OTHER]);
    encrypted.keys = [REGION, OTHER].map(|region| (region.to_owned(), key(region))).into();
    let first = publish(&fake, folder.path(), &subject("2", "abce"), &encrypted, &["abcd"]).await.unwrap();
    assert_eq!((first.parents.len(), first.blocks_sent), (0, 4));
    let second = publish(&fake, folder.path(), &subject("3", "abcf"), &encrypted, &["abcd", "abce"]).await.unwrap();
    assert_eq!((second.parents.clone(), second.blocks_sent), (first.amis[0].snapshots.clone(), 1));
    for ami in first.amis.iter().chain(&second.amis) {
        let state = fake.state();
        assert_eq!(state.regions[&ami.region].snapshots[&ami.snapshots[0]].key, Some(key(&ami.region)));
    }
    let mut missing = encrypted.clone();
    missing.keys.remove(OTHER);
    let error = publish(&fake, folder.path(), &subject("4", "abcg"), &missing, &[]).await.unwrap_err();
    assert_eq!(error.kind(), Code::Usage);
}

#[tokio::test]
async fn a_name_that_is_taken_by_another_image_is_refused() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let web = subject("1", "abcd");
    let ami = publish(&fake, folder.path(), &web, &wish(&[REGION]), &[]).await.unwrap().amis.remove(0);
    let other = Digest::of("another").to_string();
    fake.state().regions.get_mut(REGION).unwrap().images.get_mut(&ami.ami).unwrap().image.tags.insert(tags::DIGEST.into(), other);
    let error = publish(&fake, folder.path(), &web, &wish(&[REGION]), &[]).await.unwrap_err();
    assert_eq!(error.kind(), Code::Refused);
}

#[tokio::test]
async fn a_copy_that_was_removed_is_made_again() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let web = subject("1", "abcd");
    let first = publish(&fake, folder.path(), &web, &wish(&[REGION, OTHER]), &[]).await.unwrap();
    let gone = &first.amis[1];
    let images = region(&fake, OTHER).images;
    images.deregister(&gone.ami).await.unwrap();
    images.delete_snapshot(&gone.snapshots[0]).await.unwrap();
    let second = publish(&fake, folder.path(), &web, &wish(&[REGION, OTHER]), &[]).await.unwrap();
    assert_ne!(second.amis[1].ami, gone.ami);
    assert_eq!(contents(&fake, OTHER, &second.amis[1].snapshots[0]), "abcd");
}

#[tokio::test]
async fn what_fails_in_one_region_does_not_keep_it_from_others() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let web = subject("1", "abcd");
    // A foreign image has the name in one region.
    let taken = publish(&fake, folder.path(), &web, &wish(&[OTHER]), &[]).await.unwrap().amis.remove(0);
    let other = Digest::of("another").to_string();
    fake.state().regions.get_mut(OTHER).unwrap().images.get_mut(&taken.ami).unwrap().image.tags.insert(tags::DIGEST.into(), other);
    let error = publish(&fake, folder.path(), &web, &wish(&[REGION, OTHER, "eu-west-1"]), &[]).await.unwrap_err();
    assert!(error.kind() == Code::Refused && error.to_string().contains(OTHER), "{error:?}");
    assert_eq!((there(&fake, REGION), there(&fake, "eu-west-1")), ((1, 1), (1, 1)));
}

#[tokio::test]
async fn what_is_not_as_it_should_be_is_found_when_read_back() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let web = subject("1", "abcd");
    let ami = publish(&fake, folder.path(), &web, &wish(&[REGION]), &[]).await.unwrap().amis.remove(0);
    let change = |index: u32, letter: char| {
        let mut state = fake.state();
        let snapshot = state.regions.get_mut(REGION).unwrap().snapshots.get_mut(&ami.snapshots[0]).unwrap();
        snapshot.blocks.insert(index, block(letter).into());
    };
    let expected = |_: &Digest| Ok(None);
    let verified = || async {
        let maps = Known(vec![map("abcd")]);
        verify::verify(&region(&fake, REGION), &ami.ami, &expected, &maps, &Reports::silent()).await.unwrap().disks.remove(0)
    };
    assert!(verified().await.is_sound());
    change(2, 'X');
    let disk = verified().await;
    assert!(!disk.is_sound() && disk.different == [2], "{disk:?}");
    change(2, 'c');
    change(9, 'X');
    let disk = verified().await;
    assert!(!disk.is_sound() && disk.after_end == Some(9), "{disk:?}");
    assert_eq!(disk.expected, Some(disk.disk_digest));
}

#[tokio::test]
async fn parameters_follow_and_are_only_set_when_they_differ() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let web = subject("1", "ab");
    let ami = publish(&fake, folder.path(), &web, &wish(&[REGION]), &[]).await.unwrap().amis.remove(0);
    let here = region(&fake, REGION);
    assert_eq!(follow::ami_of(&here, &web.digest).await.unwrap().as_ref(), Some(&ami.ami));
    assert_eq!(follow::ami_of(&here, &Digest::of("other")).await.unwrap(), None);
    assert!(follow::point(&here, "/images/web", &ami.ami).await.unwrap());
    assert!(!follow::point(&here, "/images/web", &ami.ami).await.unwrap());
    assert_eq!(fake.count("PutParameter"), 1);
}

#[tokio::test]
async fn what_nobody_needs_is_pruned_with_its_snapshots() {
    let (fake, folder) = (Fake::default(), tempfile::tempdir().unwrap());
    let mut all = Vec::new();
    for (version, text) in [("1", "a"), ("2", "b"), ("3", "c"), ("4", "d"), ("5", "e")] {
        let web = subject(version, text);
        let mut wish = wish(&[REGION]);
        if version == "4" {
            wish.audience = vec![Audience::Account("111122223333".into())];
        }
        all.push((web.digest, publish(&fake, folder.path(), &web, &wish, &[]).await.unwrap().amis.remove(0)));
    }
    let by = |number: usize| all[number].1.ami.clone();
    {
        let mut state = fake.state();
        let here = state.regions.get_mut(REGION).unwrap();
        // Started from a parameter by a launch template.
        let says = crate::api::parameters::Parameter { value: by(2), version: 1 };
        here.parameters.insert("/images/web".into(), says);
        here.uses = vec![Use { image: "resolve:ssm:/images/web:1".into(), by: "lt-1 version 1".into() }];
    }
    let mut keep = prune::Keep {
        needed: BTreeMap::from([(all[1].0, "web@production".to_owned())]),
        known: std::collections::BTreeSet::from(["web".to_owned()]),
        younger: Duration::ZERO,
        shared: true,
        now: Timestamp::now() + Duration::from_secs(60),
        dry_run: true,
    };
    let here = region(&fake, REGION);
    let would = prune::prune(&here, &keep, &Reports::silent()).await.unwrap();
    assert_eq!(there(&fake, REGION), (5, 5));
    keep.dry_run = false;
    let pruned = prune::prune(&here, &keep, &Reports::silent()).await.unwrap();
    assert_eq!((&would.amis, &would.snapshots), (&pruned.amis, &pruned.snapshots));
    let gone: Vec<&str> = pruned.amis.iter().filter(|verdict| verdict.kept.is_none()).map(|verdict| verdict.ami.as_str()).collect();
    assert_eq!(gone, [by(0)]);
    assert_eq!(pruned.snapshots, all[0].1.snapshots);
    assert_eq!(there(&fake, REGION), (4, 4));
    // What others may use goes only when it is said.
    keep.shared = false;
    let pruned = prune::prune(&here, &keep, &Reports::silent()).await.unwrap();
    assert_eq!(pruned.snapshots, all[3].1.snapshots);
    // Nothing is left that anything more could be decided of.
    let pruned = prune::prune(&here, &keep, &Reports::silent()).await.unwrap();
    assert!(pruned.snapshots.is_empty() && pruned.amis.iter().all(|verdict| verdict.kept.is_some()));
}
