//! What is attached to images: found at a place, examined, and attached there.

use async_trait::async_trait;
use kiln_evidence::attachment::{self, Attachment};
use kiln_evidence::examine::claim_of;
use kiln_evidence::{Examined, Found, Layer, PrivateKey, PublicKey, Subject, What, examine, statement};
use kiln_model::account::{Account, Witness};
use kiln_model::{Digest, Result, ResultExt as _};
use kiln_store::place::read_attached;
use kiln_store::{Artifact, Place, Store};

use crate::commands::sbom;

/// Everything that is attached to an image, examined with `keys`.
///
/// # Errors
/// When something that is attached cannot be read, or its bytes are not those
/// that its digest names.
pub(crate) async fn find(place: &dyn Place, subject: &Subject, keys: &[PublicKey]) -> Result<Vec<Examined>> {
    let mut found = Vec::new();
    for attached in place.attached(&subject.digest).await? {
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
}

impl Attester {
    /// Signs with `key`, if there is one.
    pub(crate) fn new(store: Store, key: Option<PrivateKey>) -> Self {
        Self { store, key }
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
            let claim = claim_of(&statement);
            // Without a key there is nothing to add to a claim that is there,
            // whoever made it.
            let known = |examined: &Examined| examined.claim == claim && key.is_none_or(|key| examined.is_signed_by(&[key.id()]));
            if !there.iter().any(known) {
                place.attach(&account.image, &to_artifact(attachment::statement(&statement, key)?)).await.trying(what)?;
            }
        }
        if let Some(key) = key {
            let name = format!("{}:{}", account.name, account.version);
            sign(place, &account.image, &name, key, &there).await.trying(what)?;
        }
        // Last: a package database that cannot be read takes nothing else away.
        let (store, image) = (self.store.clone(), account.image);
        let what = || format!("attach its bill of materials to {}:{}", account.name, account.version);
        tokio::task::spawn_blocking(move || sbom::attach_once(&store, &image)).await.trying(what)?.trying(what)?;
        Ok(())
    }
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
    use kiln_model::account::{Hygiene, Input, Source, StepAccount, Tests};
    use kiln_model::image::{Config, Firmware};
    use kiln_model::key::KeyHasher;
    use kiln_store::Publish;

    use super::*;

    /// A store with an image without disks, and an account of it.
    fn baked() -> (tempfile::TempDir, Store, Account) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let config = Config {
            name: "web".into(),
            version: "1".into(),
            architecture: "amd64".into(),
            firmware: Firmware::Bios,
            credentials: false,
            disks: Vec::new(),
            base: None,
            steps: Vec::new(),
            commit: None,
            labels: BTreeMap::new(),
            cloud: Vec::new(),
        };
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
            }],
            seal: key("seal"),
            tests: Some(Tests { key: key("tests"), names: vec!["page".into()] }),
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
        assert_eq!(first.iter().map(|examined| examined.what.name()).collect::<Vec<_>>(), ["provenance", "test-result", "hygiene"]);
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
        assert_eq!(by_us, ["provenance", "tests passed", "hygiene clean", "signature (cosign tag)", "signature (bundle)"]);
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
