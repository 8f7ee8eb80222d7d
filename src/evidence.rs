//! What is attached to images: found at a place, examined, and attached there.

use std::path::PathBuf;

use async_trait::async_trait;
use kiln_contents::manifest::MANIFEST;
use kiln_disk::files::Pool;
use kiln_evidence::attachment::{self, Attachment};
use kiln_evidence::bundle::PREDICATE_TYPE;
use kiln_evidence::examine::claim_of;
use kiln_evidence::statement::{Statement, TEST_RESULT};
use kiln_evidence::{Examined, Found, Layer, PrivateKey, PublicKey, Subject, What, examine, statement, verdict};
use kiln_model::account::{Account, Witness};
use kiln_model::home::Home;
use kiln_model::trial::Trial;
use kiln_model::{Digest, Result, ResultExt as _};
use kiln_store::place::read_attached;
use kiln_store::{Artifact, Attached, Place, Store};

use crate::commands::sbom;
use crate::manifest;

/// Everything that is attached to an image, examined with `keys`.
///
/// # Errors
/// When something that is attached cannot be read, or its bytes are not those
/// that its digest names.
pub(crate) async fn find(place: &dyn Place, subject: &Subject, keys: &[PublicKey]) -> Result<Vec<Examined>> {
    let mut found = Vec::new();
    for attached in place.attached(&subject.digest).await? {
        // Large, and no evidence of anything.
        if attached.artifact_type == MANIFEST {
            let artifact_type = attached.artifact_type;
            let attachment = Attachment { artifact_type, layers: Vec::new(), annotations: attached.annotations, tag: None };
            found.push(Found { digest: attached.digest, attachment });
            continue;
        }
        let artifact = read_attached(place, &attached).await.trying(|| format!("read what is attached to {}", subject.digest))?;
        found.push(Found { digest: attached.digest, attachment: from_artifact(artifact) });
    }
    Ok(examine(subject, &found, keys))
}

/// Signs an image under the name `reference`, in both forms; gives what was
/// attached that was not there yet.
pub(crate) async fn sign(place: &dyn Place, image: &Digest, reference: &str, key: &PrivateKey, there: &[Examined]) -> Result<Vec<Digest>> {
    let mut made = Vec::new();
    let at_tag = attachment::signature_at_tag(reference, image, key)?;
    let bundle = attachment::signature_bundle(reference, image, key)?;
    for attachment in [at_tag, bundle] {
        let tag = attachment.tag.is_some();
        let same = |examined: &&Examined| {
            matches!(&examined.what, What::Signature(form) if tag == (*form == kiln_evidence::examine::Form::Tag))
                && examined.is_signed_by(&[key.id()])
                && examined.name.as_deref() == Some(reference)
        };
        if there.iter().find(same).is_none() {
            made.push(place.attach(image, &to_artifact(attachment)).await?);
        }
    }
    Ok(made)
}

/// Attaches to the images of the store what bakes tell of them.
pub(crate) struct Attester {
    store: Store,
    key: Option<PrivateKey>,
    files: Option<PathBuf>,
}

impl Attester {
    /// Signs with `key`, if there is one.
    pub(crate) fn new(store: Store, key: Option<PrivateKey>) -> Self {
        Self { store, key, files: None }
    }

    /// Remembers the digests of files that were read.
    #[must_use]
    pub(crate) fn remembering(self, home: &Home) -> Self {
        Self { files: Some(manifest::cache(home)), ..self }
    }
}

#[async_trait]
impl Witness for Attester {
    async fn attest(&self, account: &Account) -> Result<()> {
        let place: &dyn Place = &self.store;
        let what = || format!("attach its provenance to {}:{}", account.name, account.version);
        let key = self.key.as_ref();
        let keys: Vec<PublicKey> = key.iter().map(|key| key.public().clone()).collect();
        let there = find(place, &Subject::new(account.image), &keys).await.trying(what)?;
        for statement in statement::of(account) {
            attach_once(place, &account.image, &statement, key, &there).await.trying(what)?;
        }
        if let Some(key) = key {
            let name = format!("{}:{}", account.name, account.version);
            sign(place, &account.image, &name, key, &there).await.trying(what)?;
        }
        // Last: a package database that cannot be read takes nothing else away.
        let (store, image) = (self.store.clone(), account.image);
        let what = || format!("attach its bill of materials to {}:{}", account.name, account.version);
        // Both read the same blocks of the disk.
        let (pool, files) = (Pool::default(), self.files.clone());
        let shared = pool.clone();
        tokio::task::spawn_blocking(move || sbom::attach_once(&store, &image, &shared)).await.trying(what)?.trying(what)?;
        let store = self.store.clone();
        let what = || format!("attach its manifest to {}:{}", account.name, account.version);
        let attach = move || manifest::attach_once(&store, &image, &pool, files.as_deref());
        tokio::task::spawn_blocking(attach).await.trying(what)?.trying(what)?;
        Ok(())
    }
}

/// Attaches a statement, unless what is attached claims the same already; gives
/// the digest of what is new. Of results of tests the newest counts, so only
/// that can claim the same.
async fn attach_once(
    place: &dyn Place,
    image: &Digest,
    statement: &Statement,
    key: Option<&PrivateKey>,
    there: &[Examined],
) -> Result<Option<Digest>> {
    let (claim, about) = (claim_of(statement), What::of(statement));
    // Without a key there is nothing to add to a claim that is there, whoever
    // made it.
    let by_us = |examined: &&Examined| key.is_none_or(|key| examined.is_signed_by(&[key.id()]));
    let suite = |what: &What| if let What::Tests(verdict) = what { Some((verdict.suite.clone(), verdict.finished)) } else { None };
    let newest = match suite(&about) {
        Some((own, _)) => there.iter().filter_map(|one| suite(&one.what).filter(|(suite, _)| *suite == own)).map(|(_, at)| at).max(),
        None => None,
    };
    let newest = |examined: &&Examined| newest.is_none() || suite(&examined.what).map(|(_, at)| at) == newest;
    if there.iter().filter(by_us).filter(newest).any(|examined| examined.claim == claim) {
        return Ok(None);
    }
    place.attach(image, &to_artifact(attachment::statement(statement, key)?)).await.map(Some)
}

/// Attaches what a trial of the image `title` has found, as of that many seconds
/// since 1970; gives the digest of what is new.
///
/// # Errors
/// When it cannot be signed or attached.
pub(crate) async fn attest_trial(
    place: &dyn Place,
    image: &Digest,
    title: &str,
    (trial, at): (&Trial, u64),
    key: Option<&PrivateKey>,
) -> Result<Option<Digest>> {
    let what = || format!("attach the result of its tests to {title}");
    let keys: Vec<PublicKey> = key.iter().map(|key| key.public().clone()).collect();
    let there = results(place, image, &keys).await.trying(what)?;
    let statement = statement::of_trial(image, title.to_owned(), trial, at);
    attach_once(place, image, &statement, key, &there).await.trying(what)
}

/// The results of tests that are attached to an image, examined with `keys`.
/// Nothing else is read.
///
/// # Errors
/// As [`find`].
pub(crate) async fn results(place: &dyn Place, image: &Digest, keys: &[PublicKey]) -> Result<Vec<Examined>> {
    let mut found = Vec::new();
    for attached in place.attached(image).await? {
        if is_result(&attached) {
            let artifact = read_attached(place, &attached).await.trying(|| format!("read what is attached to {image}"))?;
            found.push(Found { digest: attached.digest, attachment: from_artifact(artifact) });
        }
    }
    Ok(examine(&Subject::new(*image), &found, keys))
}

/// Whether something that is attached says that it is a result of tests.
pub(crate) fn is_result(attached: &Attached) -> bool {
    let said = [attachment::UNSIGNED_PREDICATE_TYPE, PREDICATE_TYPE].into_iter().find_map(|name| attached.annotations.get(name));
    said.is_some_and(|kind| kind == TEST_RESULT)
}

/// Why an image is marked as failed: the newest result of its tests says so.
///
/// # Errors
/// As [`find`].
pub(crate) async fn mark(place: &dyn Place, image: &Digest) -> Result<Option<String>> {
    let results = results(place, image, &[]).await?;
    Ok(verdict::mark(&results).map(|verdict| format!("the tests of `{}` say {verdict}", verdict.suite)))
}

fn to_artifact(attachment: Attachment) -> Artifact {
    let layer = |layer: Layer| kiln_store::Layer { media_type: layer.media_type, bytes: layer.bytes, annotations: layer.annotations };
    Artifact {
        artifact_type: attachment.artifact_type,
        layers: attachment.layers.into_iter().map(layer).collect(),
        annotations: attachment.annotations,
        tag: attachment.tag,
    }
}

fn from_artifact(artifact: Artifact) -> Attachment {
    let layer = |layer: kiln_store::Layer| Layer { media_type: layer.media_type, bytes: layer.bytes, annotations: layer.annotations };
    Attachment {
        artifact_type: artifact.artifact_type,
        layers: artifact.layers.into_iter().map(layer).collect(),
        annotations: artifact.annotations,
        tag: artifact.tag,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kiln_evidence::What;
    use kiln_model::account::{Hygiene, Input, Source, StepAccount};
    use kiln_model::image::{Config, Firmware};
    use kiln_model::key::KeyHasher;
    use kiln_model::provision::{Case, Outcome};
    use kiln_model::trial::Tested;
    use kiln_store::Publish;

    use super::*;

    fn trial(passed: bool) -> Trial {
        let key = KeyHasher::new("tests").finish();
        let outcome = if passed { Outcome::Passed } else { Outcome::Failed("no".into()) };
        let cases = vec![Case { name: "page".into(), seconds: 0.1, outcome }];
        let test = Tested { name: "page".into(), kind: "shell".into(), key, cases, seconds: 1.0, finished: 1, cached: false };
        Trial { suite: "web".into(), key, tests: vec![test], seconds: 2.0 }
    }

    #[tokio::test]
    async fn the_newest_result_marks_the_image() {
        let (_folder, store, account) = baked();
        let image = account.image;
        let attest = async |passed, at, key: Option<&PrivateKey>| {
            attest_trial(&store, &image, "web:1", (&trial(passed), at), key).await.unwrap().is_some()
        };
        let marked = async || mark(&store, &image).await.unwrap();
        assert_eq!(marked().await, None);
        assert!(attest(false, 10, None).await && !attest(false, 20, None).await, "the same is attached once");
        assert_eq!(marked().await.as_deref(), Some("the tests of `web` say failed (page)"));
        // It passes, fails again and passes again: each is the newest in turn.
        assert!(attest(true, 30, None).await && marked().await.is_none());
        assert!(attest(false, 40, None).await && marked().await.is_some());
        assert!(attest(true, 50, None).await && marked().await.is_none());
        assert!(!attest(true, 60, None).await);
        // A signature by a key that nobody names here marks as well.
        let key = PrivateKey::generate().unwrap();
        assert!(attest(false, 70, Some(&key)).await && marked().await.is_some());
        assert!(!attest(false, 80, Some(&key)).await);
        assert!(attest(true, 90, Some(&key)).await && marked().await.is_none());
    }

    /// A store with an image without disks, and an account of it.
    fn baked() -> (tempfile::TempDir, Store, Account) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let config = Config::new("web", "1", "amd64", Firmware::Bios);
        let named = store.publish_as(&Publish { config: &config, disks: &[], annotations: &BTreeMap::new(), tags: &[] }).unwrap();
        let key = |kind| KeyHasher::new(kind).finish();
        let input = |name: &str| Input { name: name.into(), digest: Digest::of(name) };
        let account = Account {
            bake: "01J1".into(),
            image: named.digest,
            name: "web".into(),
            version: "1".into(),
            architecture: "amd64".into(),
            disk: Some(Digest::of("disk")),
            cloud: Vec::new(),
            disk_size: None,
            base: "debian bookworm".into(),
            base_disk: Digest::of("base"),
            base_at_cloud: false,
            templates: vec![input("kiln.toml")],
            source: Some(Source { repository: None, commit: "c".into(), folder: String::new(), dirty: false }),
            variables: BTreeMap::new(),
            builder: "qemu".into(),
            steps: vec![StepAccount {
                name: "one".into(),
                kind: "shell".into(),
                key: key("one"),
                inputs: vec![input("script")],
                cached: false,
                made: 1_700_000_000,
                seconds: 1.0,
                converged: true,
            }],
            seal: key("seal"),
            tests: Some(trial(true)),
            hygiene: Some(Hygiene { checked: true, seal_version: "1".into(), rules: Vec::new(), kept: Vec::new() }),
            started: 1_700_000_000,
            finished: 1_700_000_010,
        };
        (folder, store, account)
    }

    async fn attached(store: &Store, account: &Account, key: &PrivateKey) -> Vec<Examined> {
        find(store, &Subject::new(account.image), std::slice::from_ref(key.public())).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_told_twice_is_attached_once() {
        let (_folder, store, account) = baked();
        let key = PrivateKey::generate().unwrap();
        let unsigned = Attester::new(store.clone(), None);
        unsigned.attest(&account).await.unwrap();
        let first = attached(&store, &account, &key).await;
        assert_eq!(
            first.iter().map(|examined| examined.what.name()).collect::<Vec<_>>(),
            ["provenance", "test-result", "hygiene", "convergence"]
        );
        assert!(first.iter().all(|examined| examined.is_sound() && !examined.signed));

        // The same bake again, later: nothing new is claimed.
        let again = Account { bake: "01J2".into(), started: 1_800_000_000, finished: 1_800_000_001, ..account.clone() };
        unsigned.attest(&again).await.unwrap();
        assert_eq!(attached(&store, &account, &key).await, first);

        // Now with a key: signed as well, once.
        let signed = Attester::new(store.clone(), Some(key.clone()));
        signed.attest(&account).await.unwrap();
        signed.attest(&again).await.unwrap();
        let all = attached(&store, &account, &key).await;
        let by_us: Vec<_> =
            all.iter().filter(|examined| examined.is_signed_by(&[key.id()])).map(|examined| examined.what.to_string()).collect();
        assert_eq!(
            by_us,
            ["provenance", "tests passed", "hygiene clean", "convergence converged", "signature (cosign tag)", "signature (bundle)"]
        );
        assert_eq!(all.len(), first.len() + by_us.len());

        // Other inputs that gave the same image are another provenance, and
        // nothing else is new.
        let other = Account { templates: vec![Input { name: "kiln.toml".into(), digest: Digest::of("x") }], ..account.clone() };
        signed.attest(&other).await.unwrap();
        let more = attached(&store, &account, &key).await;
        assert_eq!(more.len(), all.len() + 1);
        assert!(matches!(more.last().unwrap().what, What::Provenance(_)));
    }

    #[tokio::test]
    async fn several_keys_sign_beside_each_other() {
        let (_folder, store, account) = baked();
        let keys = [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()];
        for key in keys.iter().chain(&keys) {
            let there = attached(&store, &account, key).await;
            sign(&store, &account.image, "web:1", key, &there).await.unwrap();
        }
        for key in &keys {
            let all = attached(&store, &account, key).await;
            assert_eq!(all.len(), 4, "{all:#?}");
            assert_eq!(all.iter().filter(|examined| examined.is_signed_by(&[key.id()])).count(), 2);
        }
    }
}
