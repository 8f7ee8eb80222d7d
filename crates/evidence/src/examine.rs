//! What is attached to an image, examined: what each piece is, who signed it,
//! and why it does not count if it does not.
//!
//! What a piece claims is told even when its signature does not count, so that
//! people see what was found; whoever decides on it asks
//! [`Examined::is_signed_by`] first.

use std::fmt;

use kiln_model::Digest;
use kiln_model::reference::{Pointer, Reference, is_version};
use serde_json::Value;

use crate::attachment::Found;
use crate::bundle::{self, Bundle, Held};
use crate::cosign::{self, Payload};
use crate::failure::Failure;
use crate::keys::PublicKey;
use crate::provenance::Provenance;
use crate::statement::{self, IN_TOTO, Statement};
use crate::verdict::Verdict;

/// The image that evidence is wanted for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Digest of its manifest.
    pub digest: Digest,
    /// The version tag by which it was asked for. A signature that names
    /// another version is not for it.
    pub version: Option<String>,
}

impl Subject {
    /// An image, whatever it is called.
    pub fn new(digest: Digest) -> Self {
        Self { digest, version: None }
    }

    /// An image as it was asked for. Tags that do not look like versions, and
    /// channels, move from one version to another, and say nothing of it.
    pub fn asked(digest: Digest, reference: &Reference) -> Self {
        let version = match &reference.pointer {
            Pointer::Tag(Some(tag)) if is_version(tag) => Some(tag.clone()),
            _ => None,
        };
        Self { digest, version }
    }

    /// Whether something that is signed under the name `says` is for it. The
    /// repository may be another: images are copied.
    fn fits(&self, says: &str) -> Result<(), Failure> {
        let said: Option<Reference> = says.parse().ok();
        match (&self.version, said.map(|said| said.pointer)) {
            (Some(wanted), Some(Pointer::Tag(Some(tag)))) if is_version(&tag) && tag != *wanted => {
                Err(Failure::Tag { says: tag, wanted: wanted.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// What a piece of evidence is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A signature of the image.
    Signature(Form),
    /// Where the image comes from.
    Provenance(Box<Provenance>),
    /// How its tests ended.
    Tests(Verdict),
    /// What the check of its disk came to: `CLEAN`, `UNCHECKED`.
    Hygiene(String),
    /// Whether one run of the tools that configured it was enough: `CONVERGED`.
    Convergence(String),
    /// What is in it.
    Sbom(&'static str),
    /// Every path, package and unit of it, to compare machines with.
    Manifest,
    /// A statement of a kind that kiln does not use.
    Statement(String),
    /// Something that kiln does not use, by its artifact type.
    Other(String),
}

/// The form of a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// At the tag `sha256-<hex>.sig`.
    Tag,
    /// A sigstore bundle.
    Bundle,
}

impl What {
    /// What it is, in one word for programs.
    pub fn name(&self) -> &str {
        match self {
            Self::Signature(_) => "signature",
            Self::Provenance(_) => "provenance",
            Self::Tests(_) => "test-result",
            Self::Hygiene(_) => "hygiene",
            Self::Convergence(_) => "convergence",
            Self::Sbom(_) => "sbom",
            Self::Manifest => "manifest",
            Self::Statement(_) => "statement",
            Self::Other(_) => "other",
        }
    }

    /// What a statement is, whoever makes it.
    pub fn of(statement: &Statement) -> Self {
        let result = || statement.predicate.get("result").and_then(Value::as_str).unwrap_or("UNKNOWN").to_owned();
        match statement.predicate_type.as_str() {
            statement::SIGNATURE => Self::Signature(Form::Bundle),
            statement::PROVENANCE => Self::Provenance(Box::new(Provenance::read(&statement.predicate))),
            statement::TEST_RESULT => Self::Tests(Verdict::read(&statement.predicate)),
            statement::HYGIENE => Self::Hygiene(result()),
            statement::CONVERGENCE => Self::Convergence(result()),
            kind if kind.starts_with("https://spdx.dev/Document") => Self::Sbom("SPDX"),
            kind if kind.starts_with("https://cyclonedx.org/") => Self::Sbom("CycloneDX"),
            other => Self::Statement(other.to_owned()),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signature(Form::Tag) => f.write_str("signature (cosign tag)"),
            Self::Signature(Form::Bundle) => f.write_str("signature (bundle)"),
            Self::Provenance(_) => f.write_str("provenance"),
            Self::Tests(verdict) => write!(f, "tests {}", verdict.result.to_lowercase()),
            Self::Hygiene(result) => write!(f, "hygiene {}", result.to_lowercase()),
            Self::Convergence(result) => write!(f, "convergence {}", result.to_lowercase()),
            Self::Sbom(format) => write!(f, "SBOM ({format})"),
            Self::Manifest => f.write_str("manifest"),
            Self::Statement(kind) => write!(f, "statement {kind}"),
            Self::Other(kind) => f.write_str(kind),
        }
    }
}

/// A piece of evidence, examined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examined {
    /// Digest of the manifest that holds it.
    pub digest: Digest,
    /// What it is. Not to be believed when there are failures.
    pub what: What,
    /// What it calls the image.
    pub name: Option<String>,
    /// Ids of the given keys that have signed it.
    pub signers: Vec<Digest>,
    /// Whether it is signed at all, by whomever.
    pub signed: bool,
    /// Digest of what it claims, however and by whomever it is signed: the same
    /// claim made twice has the same.
    pub claim: Digest,
    /// Why it does not count.
    pub failures: Vec<Failure>,
}

impl Examined {
    /// Whether nothing is wrong with it. What nobody has signed is sound, but
    /// anybody may have attached it.
    pub fn is_sound(&self) -> bool {
        self.failures.is_empty()
    }

    /// Whether it is sound, and signed by one of these keys.
    pub fn is_signed_by(&self, keys: &[Digest]) -> bool {
        self.is_sound() && self.signers.iter().any(|signer| keys.contains(signer))
    }
}

/// Examines everything that was found attached to an image.
pub fn examine(subject: &Subject, found: &[Found], keys: &[PublicKey]) -> Vec<Examined> {
    found.iter().flat_map(|found| one(subject, found, keys)).collect()
}

fn one(subject: &Subject, found: &Found, keys: &[PublicKey]) -> Vec<Examined> {
    let attachment = &found.attachment;
    let is_payload = |media_type: &str| media_type == cosign::PAYLOAD;
    if attachment.layers.iter().any(|layer| is_payload(&layer.media_type)) {
        return attachment
            .layers
            .iter()
            .filter(|layer| is_payload(&layer.media_type))
            .map(|layer| payload(subject, found, layer, keys))
            .collect();
    }
    let kind = attachment.artifact_type.as_str();
    vec![match (kind, attachment.layers.first()) {
        (bundle::BUNDLE, Some(layer)) => in_bundle(subject, found, &layer.bytes, keys),
        (IN_TOTO, Some(layer)) => bare(subject, found, &layer.bytes),
        ("application/spdx+json", _) => unsigned(found, What::Sbom("SPDX")),
        ("application/vnd.cyclonedx+json", _) => unsigned(found, What::Sbom("CycloneDX")),
        ("application/vnd.kiln.manifest.v1", _) => unsigned(found, What::Manifest),
        _ => unsigned(found, What::Other(kind.to_owned())),
    }]
}

/// Something without a signature of its own.
fn unsigned(found: &Found, what: What) -> Examined {
    let claim = found.attachment.layers.first().map_or(found.digest, |layer| Digest::of(&layer.bytes));
    Examined { digest: found.digest, what, name: None, signers: Vec::new(), signed: false, claim, failures: Vec::new() }
}

fn payload(subject: &Subject, found: &Found, layer: &crate::attachment::Layer, keys: &[PublicKey]) -> Examined {
    let mut examined = Examined { signed: true, claim: Digest::of(&layer.bytes), ..unsigned(found, What::Signature(Form::Tag)) };
    let failures = &mut examined.failures;
    // A manifest that was moved to the tag of another image.
    if let Some(says) = found.attachment.tag.as_ref().filter(|tag| **tag != cosign::tag(&subject.digest)) {
        failures.push(Failure::Tag { says: says.clone(), wanted: cosign::tag(&subject.digest) });
    }
    match layer.annotations.get(cosign::SIGNATURE) {
        None => failures.push(Failure::malformed("it has no signature")),
        Some(made) => match cosign::verify(&layer.bytes, made, layer.annotations.get(cosign::KEY).map(String::as_str), keys) {
            Ok(id) => examined.signers.push(id),
            Err(why) => failures.push(why),
        },
    }
    match Payload::parse(&layer.bytes) {
        Ok(payload) => {
            failures.extend(payload.about(&subject.digest).err());
            failures.extend(subject.fits(payload.reference()).err());
            examined.name = Some(payload.reference().to_owned());
        }
        Err(why) => failures.push(why),
    }
    examined
}

fn in_bundle(subject: &Subject, found: &Found, bytes: &[u8], keys: &[PublicKey]) -> Examined {
    let said = found.attachment.annotations.get(bundle::PREDICATE_TYPE).cloned();
    let what = What::Statement(said.clone().unwrap_or_else(|| "of an unknown kind".to_owned()));
    let mut examined = Examined { signed: true, ..unsigned(found, what) };
    let bundle = match Bundle::parse(bytes) {
        Ok(bundle) => bundle,
        Err(why) => {
            examined.failures.push(why);
            return examined;
        }
    };
    match bundle.verify(&subject.digest, keys) {
        Ok(signers) => examined.signers = signers,
        Err(why) => examined.failures.push(why),
    }
    match bundle.held() {
        Ok(Held::Subject) => {
            examined.what = What::Signature(Form::Bundle);
            examined.claim = subject.digest;
        }
        Ok(Held::Payload { kind, bytes }) if kind == IN_TOTO => claim(subject, &bytes, &mut examined),
        Ok(Held::Payload { kind, .. }) => examined.what = What::Other(kind),
        Err(why) => examined.failures.push(why),
    }
    examined
}

fn bare(subject: &Subject, found: &Found, bytes: &[u8]) -> Examined {
    let mut examined = unsigned(found, What::Other(IN_TOTO.to_owned()));
    claim(subject, bytes, &mut examined);
    examined
}

/// Reads what a statement claims.
fn claim(subject: &Subject, bytes: &[u8], examined: &mut Examined) {
    let statement = match Statement::parse(bytes) {
        Ok(statement) => statement,
        Err(why) => return examined.failures.push(why),
    };
    examined.what = What::of(&statement);
    examined.claim = claim_of(&statement);
    match statement.about(&subject.digest) {
        Ok(name) => {
            examined.name = name.map(ToOwned::to_owned);
            // Other statements are about the content, whatever it is called.
            if let (What::Signature(_), Some(name)) = (&examined.what, name) {
                examined.failures.extend(subject.fits(name).err());
            }
        }
        Err(why) => examined.failures.push(why),
    }
}

/// Digest of what a statement claims, without the time at which it does: of
/// provenance that is everything that went into the bake.
pub fn claim_of(statement: &Statement) -> Digest {
    let predicate = match What::of(statement) {
        What::Provenance(provenance) => Value::String(provenance.definition.to_string()),
        What::Signature(_) => serde_json::json!([statement.subject]),
        What::Tests(_) => {
            let mut predicate = statement.predicate.clone();
            predicate.as_object_mut().map(|object| object.remove(statement::FINISHED));
            crate::provenance::sorted(&predicate)
        }
        _ => crate::provenance::sorted(&statement.predicate),
    };
    Digest::of(format!("{} {predicate}", statement.predicate_type))
}

#[cfg(test)]
mod tests {
    use kiln_model::account::Account;

    use super::*;
    use crate::attachment::{self, Attachment};
    use crate::keys::PrivateKey;
    use crate::keys::tests::key;
    use crate::provenance::tests::account;

    fn found(attachment: Attachment) -> Found {
        Found { digest: Digest::of(format!("{attachment:?}")), attachment }
    }

    /// Everything that a signed bake attaches.
    fn all(account: &Account, key: &PrivateKey) -> Vec<Found> {
        let name = format!("{}:{}", account.name, account.version);
        let mut all = vec![
            attachment::signature_at_tag(&name, &account.image, key).unwrap(),
            attachment::signature_bundle(&name, &account.image, key).unwrap(),
        ];
        all.extend(statement::of(account).iter().map(|statement| attachment::statement(statement, Some(key)).unwrap()));
        all.into_iter().map(found).collect()
    }

    fn one_of(subject: &Subject, found: &Found, keys: &[PublicKey]) -> Examined {
        examine(subject, std::slice::from_ref(found), keys).remove(0)
    }

    #[test]
    fn all_that_a_bake_attaches_is_found_sound() {
        let account = account();
        let examined = examine(&Subject::new(account.image), &all(&account, &key(1)), &[key(1).public().clone()]);
        let what: Vec<String> = examined.iter().map(|examined| examined.what.to_string()).collect();
        assert_eq!(
            what,
            ["signature (cosign tag)", "signature (bundle)", "provenance", "tests passed", "hygiene clean", "convergence converged"]
        );
        for examined in &examined {
            assert!(examined.is_signed_by(&[key(1).id()]) && !examined.is_signed_by(&[key(2).id()]), "{examined:?}");
            assert_eq!(examined.name.as_deref(), Some("web:1.4.0"));
        }
    }

    #[test]
    fn without_the_key_it_is_told_what_is_claimed_and_that_it_does_not_count() {
        let account = account();
        for keys in [&[key(2).public().clone()][..], &[]] {
            for examined in examine(&Subject::new(account.image), &all(&account, &key(1)), keys) {
                assert_eq!(examined.failures, [Failure::Key { says: key(1).id().to_string() }], "{examined:?}");
                assert!(examined.signed && examined.signers.is_empty());
            }
        }
    }

    #[test]
    fn evidence_of_another_image_is_refused() {
        let account = account();
        let other = Subject::new(Digest::of("other"));
        for found in all(&account, &key(1)) {
            let examined = one_of(&other, &found, &[key(1).public().clone()]);
            assert!(examined.failures.iter().any(|failure| failure.name() == "digest"), "{examined:?}");
            let moved = found.attachment.tag.is_some();
            assert_eq!(examined.failures.iter().any(|failure| failure.name() == "tag"), moved, "{examined:?}");
        }
    }

    #[test]
    fn a_signature_is_for_the_version_it_names() {
        let image = Digest::of("image");
        let key = key(1);
        let at_tag = |name: &str| found(attachment::signature_at_tag(name, &image, &key).unwrap());
        let bundle = |name: &str| found(attachment::signature_bundle(name, &image, &key).unwrap());
        for (signed, asked, good) in [
            ("web:1.4.0", "web:1.4.0", true),
            ("web:1.4.0", "registry.example/shop/web:1.4.0", true),
            ("web:1.4.0", "web:1.5.0", false),
            ("web:v1", "web:v2", false),
            ("web:1.4.0", "web:stable", true),
            ("web:1.4.0", "web@production", true),
            ("web:1.4.0", "web", true),
            ("registry.example/shop/web", "web:1.4.0", true),
            ("web:stable", "web:1.4.0", true),
        ] {
            let subject = Subject::asked(image, &asked.parse().unwrap());
            for found in [at_tag(signed), bundle(signed)] {
                let examined = one_of(&subject, &found, &[key.public().clone()]);
                assert_eq!(examined.is_sound(), good, "{signed} as {asked}: {examined:?}");
                assert!(good || examined.failures[0].name() == "tag");
            }
        }
    }

    #[test]
    fn each_signature_at_a_tag_stands_for_itself() {
        let image = Digest::of("image");
        let mut both = attachment::signature_at_tag("web:1", &image, &key(1)).unwrap();
        let second = attachment::signature_at_tag("web:1", &image, &key(2)).unwrap();
        assert_eq!(both, attachment::signature_at_tag("web:1", &image, &key(1)).unwrap(), "the same is the same");
        both.layers.extend(second.layers);
        let examined = examine(&Subject::new(image), &[found(both)], &[key(1).public().clone()]);
        assert!(examined[0].is_signed_by(&[key(1).id()]));
        assert_eq!(examined[1].failures, [Failure::Key { says: key(2).id().to_string() }]);
    }

    #[test]
    fn what_is_unsigned_is_told_apart() {
        let account = account();
        let bare = |statement: &Statement| found(attachment::statement(statement, None).unwrap());
        for statement in statement::of(&account) {
            let examined = one_of(&Subject::new(account.image), &bare(&statement), &[key(1).public().clone()]);
            assert!(examined.is_sound() && !examined.signed && !examined.is_signed_by(&[key(1).id()]));
            // The same claim, signed.
            let signed = found(attachment::statement(&statement, Some(&key(1))).unwrap());
            let signed = one_of(&Subject::new(account.image), &signed, &[key(1).public().clone()]);
            assert_eq!((&signed.what, signed.claim), (&examined.what, examined.claim));
            assert_eq!(claim_of(&statement), examined.claim);
        }
    }

    #[test]
    fn the_same_bake_later_claims_nothing_new() {
        let claims = |account: &Account| statement::of(account).iter().map(claim_of).collect::<Vec<_>>();
        let first = account();
        let later = Account { bake: "other".into(), started: 1_800_000_000, finished: 1_800_000_001, ..first.clone() };
        assert_eq!(claims(&first), claims(&later));
        let other = Account { base_disk: Digest::of("other"), ..first.clone() };
        assert_ne!(claims(&first)[0], claims(&other)[0]);
        assert_eq!(claims(&first)[1..], claims(&other)[1..]);
    }

    #[test]
    fn what_is_not_evidence_is_left_alone() {
        let layer = attachment::Layer { media_type: "x".into(), bytes: b"x".to_vec(), annotations: Default::default() };
        let of =
            |kind: &str| Attachment { artifact_type: kind.into(), layers: vec![layer.clone()], annotations: Default::default(), tag: None };
        let examined = |kind| one_of(&Subject::new(Digest::of("image")), &found(of(kind)), &[]);
        assert_eq!(examined("application/x").what, What::Other("application/x".into()));
        assert_eq!(examined("application/spdx+json").what, What::Sbom("SPDX"));
        assert_eq!(examined("application/vnd.kiln.manifest.v1").what, What::Manifest);
        for kind in [bundle::BUNDLE, IN_TOTO] {
            assert!(matches!(examined(kind).failures[..], [Failure::Malformed(_)]), "{kind}");
        }
    }
}
