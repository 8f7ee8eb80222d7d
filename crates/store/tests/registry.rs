//! A registry as a place for images and channels: docker-registry, with a
//! proxy before it that can keep tags from being moved.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kiln_model::channel::{Action, Actor, Appended, Chain, ChannelBackend as _, Entry, Identity, Record, Signed, VERSION};
use kiln_model::{Code, Digest, Error, Result};
use kiln_registry::{BlobSource, Client, FileSource, Options, Repository};
use kiln_store::{Artifact, Layer, Place as _, RemotePlace};
use kiln_testing::{Immutable, Proxy, Registry};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const NAME: &str = "shop/web";

struct Context {
    _registry: Registry,
    proxy: Proxy,
    folder: tempfile::TempDir,
}

impl Context {
    fn new() -> Self {
        let registry = Registry::builder().start().unwrap();
        let proxy = Proxy::before(registry.address()).unwrap();
        Self { _registry: registry, proxy, folder: tempfile::tempdir().unwrap() }
    }

    fn enforced() -> Self {
        let context = Self::new();
        context.proxy.immutable(Immutable::Precondition, |tag| tag.starts_with("kiln."));
        context
    }

    fn place(&self) -> RemotePlace {
        place(self.proxy.address())
    }
}

fn place(address: &str) -> RemotePlace {
    let client = Client::new(Options::default()).unwrap();
    RemotePlace::new(client.repository(address, NAME).unwrap())
}

/// Sends a blob.
async fn blob(repository: &Repository, folder: &Path, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let path = folder.join(digest.hex());
    std::fs::write(&path, bytes).unwrap();
    let source: &dyn BlobSource = &FileSource(path);
    repository.upload(&digest, bytes.len() as u64, source, &|_| ()).await.unwrap();
    digest
}

/// An image without disks, at the tag of its version.
async fn image(place: &RemotePlace, folder: &Path, version: &str) -> Digest {
    let config = serde_json::json!({
        "name": "web", "version": version, "architecture": "amd64", "firmware": "bios", "disks": [], "steps": [], "labels": {},
    });
    let config = serde_json::to_vec(&config).unwrap();
    let digest = blob(place.repository(), folder, &config).await;
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.kiln.image.v1+json",
        "config": { "mediaType": "application/vnd.kiln.config.v1+json", "digest": digest, "size": config.len() }, "layers": [],
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    place.repository().put_manifest(version, MANIFEST, &manifest).await.unwrap().digest
}

fn next(chain: &Chain, image: Digest, from: &str) -> Result<Option<Entry>> {
    if chain.head().is_some_and(|head| head.record().image == image) {
        return Ok(None);
    }
    let (seq, previous) = chain.next();
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let mut entry = Entry::new(Record {
        v: VERSION,
        name: NAME.into(),
        channel: "production".into(),
        seq,
        previous,
        image,
        from: from.into(),
        action: Action::Promote,
        time: format!("{time}"),
        actor: Actor { name: format!("process {}", std::process::id()), identity: Identity::Unproven },
        reason: None,
        evidence: vec![],
        policy: None,
    })?;
    entry.signature = Some(serde_json::json!({ "payload": from }));
    Ok(Some(entry))
}

async fn promote(place: &RemotePlace, image: Digest, from: &str) -> Result<Option<Appended>> {
    place.append(NAME, "production", &|chain: &Chain| next(chain, image, from)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_moves_and_is_read() {
    for context in [Context::new(), Context::enforced()] {
        let place = context.place();
        let images = [image(&place, context.folder.path(), "1").await, image(&place, context.folder.path(), "2").await];
        let reference = format!("{}/{NAME}@production", context.proxy.address()).parse().unwrap();
        assert_eq!(place.resolve(&reference).await.unwrap_err().kind(), Code::NotFound);
        assert_eq!(place.head(NAME, "production").await.unwrap(), None);
        for round in 0..3 {
            for (number, image) in images.iter().enumerate() {
                let appended = promote(&place, *image, &format!("web:{number}")).await.unwrap().unwrap();
                assert_eq!(appended.entry.record().seq, round * 2 + number as u64 + 1);
                assert_eq!(appended.notes, Vec::<String>::new());
                assert_eq!(place.resolve(&reference).await.unwrap(), *image);
                assert_eq!(place.repository().resolve("production").await.unwrap(), Some(*image), "the copy follows");
                assert!(promote(&place, *image, "web").await.unwrap().is_none());
            }
        }
        let chain = place.history(NAME, "production").await.unwrap();
        assert_eq!((chain.entries.len(), chain.lost.len()), (6, 0));
        assert_eq!(chain.entries[0].signature, Some(serde_json::json!({ "payload": "web:0" })));
        assert_eq!(place.list(NAME).await.unwrap(), ["production"]);
        assert_eq!(place.head(NAME, "production").await.unwrap().as_ref(), chain.head());
        // What kiln keeps at tags is no image.
        let held = place.images().await.unwrap();
        assert_eq!(held.len(), 2, "{held:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_tag_moves_the_copy_stays_and_that_is_said() {
    let context = Context::new();
    context.proxy.immutable(Immutable::BadRequest, |_| true);
    let place = context.place();
    for version in ["1", "2", "3"] {
        let image = image(&place, context.folder.path(), version).await;
        let appended = promote(&place, image, version).await.unwrap().unwrap();
        assert_eq!(appended.notes.len(), usize::from(version != "1"), "{:?}", appended.notes);
    }
    assert_eq!(place.history(NAME, "production").await.unwrap().entries.len(), 3);
    assert!(place.tags_never_move().await.unwrap());
    assert!(!Context::new().place().tags_never_move().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_does_not_take_the_place_of_a_tag() {
    let context = Context::new();
    let place = context.place();
    let digest = image(&place, context.folder.path(), "production").await;
    let error = promote(&place, digest, "web").await.unwrap_err();
    assert!(error.kind() == Code::Refused && error.to_string().contains("has a tag `production`"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_or_removed_record_is_found() {
    let context = Context::new();
    let place = context.place();
    let mut images = Vec::new();
    for version in ["1", "2", "3"] {
        images.push(image(&place, context.folder.path(), version).await);
        promote(&place, images[images.len() - 1], version).await.unwrap();
    }
    let tag = |seq: u32| format!("kiln.production.{seq:06}");
    let fetch = async |seq| place.repository().manifest(&tag(seq)).await.unwrap().unwrap();
    let second = fetch(2).await;
    let broken = async |said: &str| {
        let error = place.history(NAME, "production").await.unwrap_err();
        assert!(error.kind() == Code::Corrupt && error.to_string().contains(said), "{error}");
        let error = promote(&place, images[0], "1").await.unwrap_err();
        assert_eq!(error.kind(), Code::Corrupt);
    };
    // Another record in its place.
    place.repository().put_manifest(&tag(2), MANIFEST, &fetch(1).await.bytes).await.unwrap();
    broken("record 2 is missing").await;
    assert!(place.head(NAME, "production").await.is_err(), "the newest does not follow it");
    // One that says something else.
    let manifest: serde_json::Value = serde_json::from_slice(&second.bytes).unwrap();
    let text = place.blob(&manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap(), 1 << 20).await.unwrap();
    let text = String::from_utf8(text).unwrap().replace("\"from\":\"2\"", "\"from\":\"9\"");
    let digest = blob(place.repository(), context.folder.path(), text.as_bytes()).await;
    let mut changed = manifest.clone();
    changed["layers"][0] = serde_json::json!({ "mediaType": manifest["layers"][0]["mediaType"], "digest": digest, "size": text.len() });
    place.repository().put_manifest(&tag(2), MANIFEST, &serde_json::to_vec(&changed).unwrap()).await.unwrap();
    broken("record 3 does not follow").await;
    // Data that is not what its digest says is not believed.
    let mut lied = manifest.clone();
    lied["layers"][0]["data"] = "e30=".into();
    place.repository().put_manifest(&tag(2), MANIFEST, &serde_json::to_vec(&lied).unwrap()).await.unwrap();
    assert_eq!(place.history(NAME, "production").await.unwrap().entries.len(), 3);
    // None at all.
    place.repository().delete_manifest(&Digest::of(serde_json::to_vec(&lied).unwrap())).await.unwrap();
    broken("record 2 is missing").await;
    place.repository().put_manifest(&tag(2), MANIFEST, &second.bytes).await.unwrap();
    assert_eq!(place.history(NAME, "production").await.unwrap().entries.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_was_overwritten_is_told_as_lost() {
    let (context, other) = (Context::new(), Context::new());
    let (here, there) = (context.place(), other.place());
    let images = [image(&here, context.folder.path(), "1").await, image(&here, context.folder.path(), "2").await];
    image(&there, other.folder.path(), "2").await;
    let lost = promote(&here, images[0], "1").await.unwrap().unwrap().entry;
    // What somebody else wrote at the same time, and later.
    let winner = promote(&there, images[1], "2").await.unwrap().unwrap().entry;
    let record = there.repository().manifest("kiln.production.000001").await.unwrap().unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&record.bytes).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        let bytes = there.blob(&layer["digest"].as_str().unwrap().parse().unwrap(), 1 << 20).await.unwrap();
        blob(here.repository(), context.folder.path(), &bytes).await;
    }
    here.repository().put_manifest("kiln.production.000001", MANIFEST, &record.bytes).await.unwrap();

    let chain = here.history(NAME, "production").await.unwrap();
    assert_eq!((chain.entries.len(), chain.lost.len()), (1, 1));
    assert_eq!((chain.lost[0].entry.digest(), chain.lost[0].to), (lost.digest(), winner.digest()));
    // It is told for ever.
    promote(&here, images[0], "1").await.unwrap().unwrap();
    assert_eq!(here.history(NAME, "production").await.unwrap().lost.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_numbered() {
    for context in [Context::new(), Context::enforced()] {
        let place = context.place();
        assert_eq!(place.policy(NAME, "production").await.unwrap(), None);
        for text in ["one = 1\n", "two = 2\n"] {
            let policy = Signed { text: text.into(), signature: serde_json::json!({ "payload": text }) };
            place.set_policy(NAME, "production", &policy).await.unwrap();
            assert_eq!(place.policy(NAME, "production").await.unwrap(), Some(policy));
        }
        assert!(place.list(NAME).await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_attached_is_found() {
    let context = Context::new();
    let place = context.place();
    let image = image(&place, context.folder.path(), "1").await;
    assert!(place.attached(&image).await.unwrap().is_empty());
    let annotations = BTreeMap::from([("note".to_owned(), "x".to_owned())]);
    let layers = vec![Layer::new("application/spdx+json", "packages")];
    let artifact =
        Artifact { artifact_type: "application/spdx+json".into(), layers: layers.clone(), annotations: annotations.clone(), tag: None };
    let digest = place.attach(&image, &artifact).await.unwrap();
    assert_eq!(place.attach(&image, &artifact).await.unwrap(), digest);
    let tag = format!("sha256-{}.sig", image.hex());
    for text in ["one", "two", "one"] {
        let layer = Layer::new("application/vnd.dev.cosign.simplesigning.v1+json", text);
        let artifact = Artifact { artifact_type: String::new(), layers: vec![layer], annotations: BTreeMap::new(), tag: Some(tag.clone()) };
        place.attach(&image, &artifact).await.unwrap();
    }
    let attached = place.attached(&image).await.unwrap();
    assert_eq!(attached.len(), 2, "{attached:?}");
    assert_eq!((attached[0].digest, attached[0].artifact_type.as_str()), (digest, "application/spdx+json"));
    assert_eq!(attached[0].annotations, annotations);
    assert_eq!(kiln_store::place::read_attached(&place, &attached[0]).await.unwrap().layers, layers);
    assert_eq!(attached[1].tag.as_ref(), Some(&tag));
    assert_eq!(kiln_store::place::read_attached(&place, &attached[1]).await.unwrap().layers.len(), 2);
}

/// One of those who promote at once, in a process of its own; does nothing
/// when it runs as an ordinary test.
#[tokio::test]
async fn promoter() {
    let (Ok(address), Ok(number)) = (std::env::var("KILN_TEST_REGISTRY"), std::env::var("KILN_TEST_NUMBER")) else { return };
    let folder = std::path::PathBuf::from(std::env::var_os("KILN_TEST_FOLDER").unwrap());
    let alone = std::env::var_os("KILN_TEST_FIRST").is_some();
    let digest: Digest = std::env::var("KILN_TEST_IMAGE").unwrap().parse().unwrap();
    let place = place(&address).patience(Duration::from_millis(std::env::var("KILN_TEST_PATIENCE").unwrap().parse().unwrap()));
    std::fs::write(folder.join(format!("ready.{number}")), "").unwrap();
    while !folder.join("go").exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let next = |chain: &Chain| {
        if alone && chain.head().is_some() {
            return Err(Error::new(Code::Refused, "the channel was to be new"));
        }
        next(chain, digest, &format!("web:{number}"))
    };
    let told = match place.append(NAME, "production", &next).await {
        Ok(Some(appended)) => format!("won {} {}", appended.entry.record().seq, appended.entry.digest()),
        Ok(None) => "there".to_owned(),
        Err(error) if error.kind() == Code::Refused => format!("refused {error}"),
        Err(error) => format!("failed {error:?}"),
    };
    std::fs::write(folder.join(format!("told.{number}")), told).unwrap();
}

struct Crowd<'a> {
    context: &'a Context,
    images: Vec<Digest>,
    first: bool,
    patience: Duration,
}

impl Crowd<'_> {
    fn spawn(&self, number: usize) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "promoter"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.env("KILN_TEST_REGISTRY", self.context.proxy.address()).env("KILN_TEST_NUMBER", number.to_string());
        command
            .env("KILN_TEST_FOLDER", self.context.folder.path())
            .env("KILN_TEST_IMAGE", self.images[number % self.images.len()].to_string());
        command.env("KILN_TEST_PATIENCE", self.patience.as_millis().to_string());
        if self.first {
            command.env("KILN_TEST_FIRST", "1");
        }
        command.spawn().unwrap()
    }

    fn told(&self, number: usize) -> Option<String> {
        std::fs::read_to_string(self.context.folder.path().join(format!("told.{number}"))).ok()
    }

    /// Lets `count` promote at once, and checks what they were told.
    async fn race(&self, count: usize) {
        let mut children: Vec<_> = (0..count).map(|number| self.spawn(number)).collect();
        let ready = |number: &usize| self.context.folder.path().join(format!("ready.{number}")).exists();
        while !(0..count).all(|number| ready(&number)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        std::fs::write(self.context.folder.path().join("go"), "").unwrap();
        for child in &mut children {
            while child.try_wait().unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        let chain = self.context.place().history(NAME, "production").await.unwrap();
        assert_eq!(chain.lost, []);
        let mut won = BTreeSet::new();
        for number in 0..count {
            let told = self.told(number).unwrap();
            match told.split(' ').collect::<Vec<_>>()[..] {
                ["won", seq, digest] => {
                    let seq: usize = seq.parse().unwrap();
                    assert_eq!(chain.entries[seq - 1].digest().to_string(), digest, "{told}");
                    assert!(won.insert(seq), "two won {seq}");
                }
                ["refused", ..] => {}
                _ => panic!("{told}"),
            }
        }
        assert_eq!(won.len(), chain.entries.len(), "a record that nobody was told of");
        assert!(!won.is_empty() && (!self.first || won.len() == 1), "{won:?}");
    }
}

async fn crowd(context: &Context, first: bool, patience: Duration, images: usize) -> Crowd<'_> {
    let place = context.place();
    let mut all = Vec::new();
    for number in 0..images {
        all.push(image(&place, context.folder.path(), &number.to_string()).await);
    }
    Crowd { context, images: all, first, patience }
}

async fn races(count: usize) {
    for enforced in [true, false] {
        for first in [true, false] {
            let context = if enforced { Context::enforced() } else { Context::new() };
            crowd(&context, first, Duration::from_secs(60), count).await.race(count).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_promote_at_once_each_is_told_the_truth() {
    races(8).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; ci/prove runs it"]
async fn of_sixty_four_who_promote_at_once_each_is_told_the_truth() {
    races(64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_killed_holds_nobody_up_for_long() {
    let context = Context::new();
    let crowd = crowd(&context, false, Duration::from_millis(300), 13).await;
    std::fs::write(context.folder.path().join("go"), "").unwrap();
    let place = context.place().patience(Duration::from_millis(300));
    for number in 0..12 {
        let mut child = crowd.spawn(number);
        while !context.folder.path().join(format!("ready.{number}")).exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(number as u64 * 4)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        // Refused when what the dead one had begun was finished for it.
        for attempt in 0.. {
            match promote(&place, crowd.images[12], "web").await {
                Ok(_) => break,
                Err(error) => assert!(error.kind() == Code::Refused && attempt < 2, "{error:?}"),
            }
        }
        let chain = place.history(NAME, "production").await.unwrap();
        assert_eq!(chain.head().unwrap().record().image, crowd.images[12]);
        assert_eq!(chain.lost, []);
        if let Some(told) = crowd.told(number)
            && let Some(digest) = told.strip_prefix("won ").and_then(|won| won.split(' ').nth(1))
        {
            assert!(chain.entries.iter().any(|entry| entry.digest().to_string() == digest), "{told}");
        }
    }
}
