//! in-toto statements: what is claimed of an image.
//!
//! Sources: in-toto attestation framework 1.0 (`spec/v1/statement.md`,
//! `predicates/test-result.md`).

use std::collections::BTreeMap;

use jiff::Timestamp;
use kiln_model::Digest;
use kiln_model::account::{Account, Hygiene};
use kiln_model::provision::Outcome;
use kiln_model::trial::Trial;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::failure::Failure;

/// `_type` of a statement.
pub const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// Media type, and DSSE payload type, of a statement.
pub const IN_TOTO: &str = "application/vnd.in-toto+json";
/// Predicate type of provenance.
pub const PROVENANCE: &str = "https://slsa.dev/provenance/v1";
/// Predicate type of results of tests.
pub const TEST_RESULT: &str = "https://in-toto.io/attestation/test-result/v0.1";
/// Predicate type of kiln's hygiene report; described in `docs/evidence.md`.
pub const HYGIENE: &str = "https://github.com/kiln-images/kiln/attestation/hygiene/v1";
/// Predicate type of kiln's proof that one run of a tool was enough; described
/// in `docs/evidence.md`.
pub const CONVERGENCE: &str = "https://github.com/kiln-images/kiln/attestation/convergence/v1";
/// Predicate type of a signature in a sigstore bundle: nothing is claimed but
/// that the key's owner means this image.
pub const SIGNATURE: &str = "https://sigstore.dev/cosign/sign/v1";

/// Key of a digest set under which a disk digest stands. It is made of SHA-256,
/// but is not the SHA-256 of any file.
pub const DISK_DIGEST: &str = "kilnDiskV1";
/// Key of a digest set under which stands what takes the place of a digest for
/// an image that a cloud keeps (`kiln_model::image::CloudImage::identity`).
pub const CLOUD_IMAGE: &str = "kilnCloudImageV1";
/// Field of a test result that is kiln's own: when it was come to, RFC 3339.
pub const FINISHED: &str = "finishedOn";
/// Key of a digest set under which a step's key stands.
pub const STEP_KEY: &str = "kilnKeyV1";

/// What somebody claims of something.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    /// [`STATEMENT`].
    #[serde(rename = "_type")]
    pub kind: String,
    /// What it is about.
    pub subject: Vec<Subject>,
    /// What kind of claim it is.
    pub predicate_type: String,
    /// The claim.
    #[serde(default)]
    pub predicate: Value,
}

/// What a statement is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Its name, `web:1.4.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its digests by algorithm, in hex.
    pub digest: BTreeMap<String, String>,
}

impl Statement {
    /// A claim about an image.
    pub fn new(image: &Digest, name: Option<String>, predicate_type: &str, predicate: Value) -> Self {
        let digest = BTreeMap::from([("sha256".to_owned(), image.hex())]);
        Self { kind: STATEMENT.into(), subject: vec![Subject { name, digest }], predicate_type: predicate_type.into(), predicate }
    }

    /// Reads a statement.
    ///
    /// # Errors
    /// [`Failure::Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        let statement: Self =
            serde_json::from_slice(bytes).map_err(|error| Failure::malformed(format!("it is no in-toto statement ({error})")))?;
        match statement.kind.as_str() {
            STATEMENT | "https://in-toto.io/Statement/v0.1" => Ok(statement),
            other => Err(Failure::malformed(format!("it is a statement of the type `{other}`"))),
        }
    }

    /// The statement in JSON.
    ///
    /// # Errors
    /// [`Failure::Malformed`] never, unless kiln itself is broken.
    pub fn to_json(&self) -> Result<Vec<u8>, Failure> {
        serde_json::to_vec(self).map_err(|error| Failure::malformed(error.to_string()))
    }

    /// Whether it is about `image`; gives the name it has for it.
    ///
    /// # Errors
    /// [`Failure::Digest`].
    pub fn about(&self, image: &Digest) -> Result<Option<&str>, Failure> {
        let hex = image.hex();
        match self.subject.iter().find(|subject| subject.digest.get("sha256") == Some(&hex)) {
            Some(subject) => Ok(subject.name.as_deref().filter(|name| !name.is_empty())),
            None => {
                let says = self.subject.first().and_then(|subject| subject.digest.iter().next());
                let says = says.map_or_else(|| "one without a digest".to_owned(), |(algorithm, hex)| format!("{algorithm}:{hex}"));
                Err(Failure::Digest { says, wanted: *image })
            }
        }
    }
}

/// The statements that follow from an account: provenance, and what is known of
/// tests and hygiene.
pub fn of(account: &Account) -> Vec<Statement> {
    let about = |kind, predicate| Statement::new(&account.image, Some(format!("{}:{}", account.name, account.version)), kind, predicate);
    let mut statements = vec![about(PROVENANCE, crate::provenance::predicate(account))];
    statements.extend(account.tests.as_ref().map(|trial| about(TEST_RESULT, test_result(trial, account.finished))));
    statements.extend(account.hygiene.as_ref().map(|hygiene| about(HYGIENE, hygiene_report(hygiene, account))));
    statements.extend(convergence(account).map(|proof| about(CONVERGENCE, proof)));
    statements
}

/// Which steps were run twice, the second time to see that nothing is left to
/// change. A bake in which something was left stores no image.
fn convergence(account: &Account) -> Option<Value> {
    let converged = account.steps.iter().filter(|step| step.converged);
    let steps: Vec<Value> =
        converged.map(|step| json!({ "name": step.name, "provisioner": step.kind, "digest": { STEP_KEY: step.key.hex() } })).collect();
    let others: Vec<&str> = account.steps.iter().filter(|step| !step.converged).map(|step| step.name.as_str()).collect();
    (!steps.is_empty()).then(|| json!({ "result": "CONVERGED", "steps": steps, "notTried": others }))
}

/// What a trial has found, as of `finished` (seconds since 1970).
pub fn of_trial(image: &Digest, name: String, trial: &Trial, finished: u64) -> Statement {
    Statement::new(image, Some(name), TEST_RESULT, test_result(trial, finished))
}

/// The newest one counts, so it says when it was made.
fn test_result(trial: &Trial, finished: u64) -> Value {
    let finished = i64::try_from(finished).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    json!({
        "result": trial.verdict().name(),
        "configuration": [{ "name": trial.suite, "digest": { STEP_KEY: trial.key.hex() } }],
        FINISHED: finished.map(|time| time.to_string()),
        "passedTests": trial.names(|outcome| *outcome == Outcome::Passed),
        "warnedTests": trial.names(|outcome| matches!(outcome, Outcome::Skipped(_))),
        "failedTests": trial.names(Outcome::failed),
    })
}

fn hygiene_report(hygiene: &Hygiene, account: &Account) -> Value {
    let mut report = json!({
        "result": if hygiene.checked { "CLEAN" } else { "UNCHECKED" },
        "sealVersion": hygiene.seal_version,
        "rules": hygiene.rules,
        "kept": hygiene.kept,
    });
    if let (Some(disk), Some(object)) = (account.disk, report.as_object_mut()) {
        object.insert("disk".into(), json!({ "name": "root", "digest": { DISK_DIGEST: disk.hex() } }));
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provenance::tests::account;

    #[test]
    fn tests_and_hygiene_field_by_field() {
        let account = account();
        let [_, tests, hygiene, convergence] = <[Statement; 4]>::try_from(of(&account)).unwrap();
        for statement in [&tests, &hygiene, &convergence] {
            assert_eq!(statement.kind, "https://in-toto.io/Statement/v1");
            assert_eq!(statement.about(&account.image), Ok(Some("web:1.4.0")));
            let other = Digest::of("other");
            let says = format!("sha256:{}", account.image.hex());
            assert_eq!(statement.about(&other), Err(Failure::Digest { says, wanted: other }));
            assert_eq!(Statement::parse(&statement.to_json().unwrap()).as_ref(), Ok(statement));
        }
        assert_eq!(tests.predicate_type, "https://in-toto.io/attestation/test-result/v0.1");
        let key = account.tests.as_ref().unwrap().key.hex();
        assert_eq!(
            tests.predicate,
            json!({
                "result": "PASSED",
                "configuration": [{ "name": "web", "digest": { "kilnKeyV1": key } }],
                "finishedOn": "2023-11-15T22:13:40Z",
                "passedTests": ["page", "port"], "warnedTests": [], "failedTests": [],
            })
        );
        assert_eq!(hygiene.predicate_type, "https://github.com/kiln-images/kiln/attestation/hygiene/v1");
        assert_eq!(
            hygiene.predicate,
            json!({
                "result": "CLEAN",
                "disk": { "name": "root", "digest": { "kilnDiskV1": account.disk.unwrap().hex() } },
                "sealVersion": "1", "rules": ["SSH host keys", "machine-id"], "kept": ["/etc/hostname"],
            })
        );
    }

    #[test]
    fn convergence_field_by_field() {
        let account = account();
        let statement = of(&account).pop().unwrap();
        assert_eq!(statement.predicate_type, "https://github.com/kiln-images/kiln/attestation/convergence/v1");
        let key = account.steps[0].key.hex();
        assert_eq!(
            statement.predicate,
            json!({
                "result": "CONVERGED",
                "steps": [{ "name": "packages", "provisioner": "shell", "digest": { "kilnKeyV1": key } }],
                "notTried": ["site"],
            })
        );
    }

    #[test]
    fn what_is_not_known_is_not_claimed() {
        let mut account = Account { tests: None, hygiene: None, ..account() };
        account.steps[0].converged = false;
        let kinds: Vec<String> = of(&account).into_iter().map(|statement| statement.predicate_type).collect();
        assert_eq!(kinds, [PROVENANCE]);
    }

    #[test]
    fn other_things_are_no_statements() {
        for text in ["", "{}", r#"{"_type":"x","subject":[],"predicateType":"y","predicate":{}}"#] {
            assert!(matches!(Statement::parse(text.as_bytes()), Err(Failure::Malformed(_))), "{text}");
        }
    }
}
