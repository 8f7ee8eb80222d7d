//! What results of tests come to: of several of one suite, the newest counts.

use std::fmt;

use jiff::Timestamp;
use serde_json::Value;

use crate::examine::{Examined, What};
use crate::failure::Failure;
use crate::statement::FINISHED;

/// What a result of tests says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// `PASSED`, `WARNED`, `FAILED`.
    pub result: String,
    /// Which tests: of kiln's the name of the template's image.
    pub suite: String,
    /// When it was come to. None: it does not say, and is older than any that
    /// does.
    pub finished: Option<Timestamp>,
    /// What failed.
    pub failed: Vec<String>,
}

impl Verdict {
    /// Of a statement's predicate.
    pub(crate) fn read(predicate: &Value) -> Self {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(ToOwned::to_owned);
        let failed = predicate.get("failedTests").and_then(Value::as_array).into_iter().flatten();
        Self {
            result: text(predicate.get("result")).unwrap_or_else(|| "UNKNOWN".to_owned()),
            suite: text(predicate.pointer("/configuration/0/name")).unwrap_or_default(),
            finished: text(predicate.get(FINISHED)).and_then(|time| time.parse().ok()),
            failed: failed.filter_map(|name| text(Some(name))).collect(),
        }
    }

    /// Whether the tests have passed.
    pub fn passed(&self) -> bool {
        self.result == "PASSED"
    }

    /// Whether they have failed.
    pub fn has_failed(&self) -> bool {
        self.result == "FAILED"
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.result.to_lowercase())?;
        match self.failed.as_slice() {
            [] => Ok(()),
            [only] => write!(f, " ({only})"),
            [first, others @ ..] => write!(f, " ({first} and {} more)", others.len()),
        }
    }
}

/// The newest of each suite; of two of the same time the worse.
pub fn newest<'a>(all: impl IntoIterator<Item = &'a Verdict>) -> Vec<&'a Verdict> {
    let mut newest: Vec<&Verdict> = Vec::new();
    let rank = |verdict: &Verdict| (verdict.finished, !verdict.passed(), verdict.has_failed());
    for verdict in all {
        match newest.iter_mut().find(|other| other.suite == verdict.suite) {
            Some(other) if rank(other) >= rank(verdict) => {}
            Some(other) => *other = verdict,
            None => newest.push(verdict),
        }
    }
    newest
}

/// The mark of an image whose tests have failed: the newest result of some
/// suite says so, whoever says it. A signature by a key that is not known
/// counts as well, since nothing else is claimed than that something is wrong,
/// or by now is right; whose word is believed is for a policy to say.
pub fn mark(evidence: &[Examined]) -> Option<&Verdict> {
    let sound = |examined: &&Examined| examined.failures.iter().all(|failure| matches!(failure, Failure::Key { .. }));
    let verdicts = evidence.iter().filter(sound).filter_map(|examined| match &examined.what {
        What::Tests(verdict) => Some(verdict),
        _ => None,
    });
    newest(verdicts).into_iter().find(|verdict| verdict.has_failed())
}

#[cfg(test)]
mod tests {
    use kiln_model::Digest;

    use super::*;
    use crate::attachment::{self, Found};
    use crate::examine::{Subject, examine};
    use crate::keys::tests::key;
    use crate::provenance::tests::trial;
    use crate::statement::of_trial;

    #[test]
    fn the_newest_result_marks_an_image_or_takes_the_mark_away() {
        let image = Digest::of("image");
        let result = |suite: &str, good: bool, at: u64, signer: Option<u8>| {
            let statement = of_trial(&image, "web:1".into(), &trial(suite, &[("port", true), ("page", good)]), at);
            let signer = signer.map(key);
            Found { digest: Digest::of("x"), attachment: attachment::statement(&statement, signer.as_ref()).unwrap() }
        };
        let marked = |found: &[Found]| {
            let examined = examine(&Subject::new(image), found, &[]);
            mark(&examined).map(|verdict| format!("{}: {verdict}", verdict.suite))
        };
        let failed = result("web", false, 10, Some(1));
        assert_eq!(marked(&[]), None);
        assert_eq!(marked(std::slice::from_ref(&failed)).as_deref(), Some("web: failed (page)"));
        assert_eq!(marked(&[result("web", true, 9, None), failed.clone()]).as_deref(), Some("web: failed (page)"));
        assert_eq!(marked(&[result("web", true, 11, Some(2)), failed.clone()]), None);
        // Another suite proves nothing of this one.
        assert!(marked(&[result("smoke", true, 11, None), failed.clone()]).is_some());
        // What is about another image is none of its results.
        let statement = of_trial(&Digest::of("other"), "web:1".into(), &trial("web", &[("page", true)]), 12);
        let other = Found { digest: Digest::of("x"), attachment: attachment::statement(&statement, None).unwrap() };
        assert!(marked(&[failed, other]).is_some());
    }

    #[test]
    fn what_others_write_is_read_as_far_as_it_goes() {
        let verdict = Verdict::read(&serde_json::json!({ "result": "PASSED" }));
        assert_eq!(verdict, Verdict { result: "PASSED".into(), suite: String::new(), finished: None, failed: Vec::new() });
        assert_eq!(Verdict::read(&Value::Null).to_string(), "unknown");
    }
}
