//! What tests found on an image.
//!
//! A *case* is one thing that was looked at; a *test* is a `[[test]]` of a
//! template with its cases; a *trial* is all the tests of a template on one
//! image.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::provision::{Case, Outcome};
use crate::{Digest, Key};

/// A test that was carried out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tested {
    /// Its name in the template.
    pub name: String,
    /// Its kind, as the template names it.
    pub kind: String,
    /// Its own key, without the image.
    pub key: Key,
    /// What it looked at, in order.
    pub cases: Vec<Case>,
    /// Seconds it took.
    pub seconds: f64,
    /// When it ended, in seconds since 1970.
    pub finished: u64,
    /// Whether that was in an earlier trial of the same disk.
    #[serde(default)]
    pub cached: bool,
}

impl Tested {
    /// The cases that failed.
    pub fn failures(&self) -> impl Iterator<Item = (&Case, &str)> {
        self.cases.iter().filter_map(|case| match &case.outcome {
            Outcome::Failed(why) => Some((case, why.as_str())),
            Outcome::Passed | Outcome::Skipped(_) => None,
        })
    }

    /// Whether one of its cases failed.
    pub fn failed(&self) -> bool {
        self.failures().next().is_some()
    }

    /// What a case is called among those of all tests.
    pub fn full_name(&self, case: &Case) -> String {
        // A test that is one case is called as the test is, perhaps with when.
        let rest = case.name.strip_prefix(&self.name);
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' ')) {
            return case.name.clone();
        }
        format!("{}: {}", self.name, case.name)
    }
}

/// How a trial ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Something was looked at, and nothing was wrong.
    Passed,
    /// Nothing was wrong, since nothing was looked at.
    Warned,
    /// Something was wrong.
    Failed,
}

impl Verdict {
    /// As attestations have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed => "PASSED",
            Self::Warned => "WARNED",
            Self::Failed => "FAILED",
        }
    }
}

/// All the tests of a template on one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// Name of the template's image. A later trial of the same name stands in
    /// the place of an earlier one.
    pub suite: String,
    /// What all the tests are made of, without the image.
    pub key: Key,
    /// The tests, in order.
    pub tests: Vec<Tested>,
    /// Seconds that all of it took, the boots included.
    pub seconds: f64,
}

impl Trial {
    /// How it ended.
    pub fn verdict(&self) -> Verdict {
        let mut cases = self.tests.iter().flat_map(|test| &test.cases);
        if self.failed() {
            Verdict::Failed
        } else if cases.any(|case| case.outcome == Outcome::Passed) {
            Verdict::Passed
        } else {
            Verdict::Warned
        }
    }

    /// Whether one of its tests failed.
    pub fn failed(&self) -> bool {
        self.tests.iter().any(Tested::failed)
    }

    /// The full names of the cases whose outcome is `wanted`.
    pub fn names(&self, wanted: impl Fn(&Outcome) -> bool) -> Vec<String> {
        let cases = self.tests.iter().flat_map(|test| test.cases.iter().map(move |case| (test, case)));
        cases.filter(|(_, case)| wanted(&case.outcome)).map(|(test, case)| test.full_name(case)).collect()
    }
}

/// Keeps what tests have found, by the disk and the test.
pub trait Results: Send + Sync {
    /// What this test found on this disk, if it passed there. What failed is
    /// tried again: the cause may have passed.
    ///
    /// # Errors
    /// When it cannot be read.
    fn passed(&self, disk: &Digest, test: &Key) -> Result<Option<Tested>>;

    /// Keeps what a test has found.
    ///
    /// # Errors
    /// When it cannot be written.
    fn keep(&self, disk: &Digest, tested: &Tested) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyHasher;

    fn trial(outcomes: &[Outcome]) -> Trial {
        let key = KeyHasher::new("test").finish();
        let case = |outcome: &Outcome| Case { name: "page".into(), seconds: 0.5, outcome: outcome.clone() };
        let cases = outcomes.iter().map(case).collect();
        let test = Tested { name: "web".into(), kind: "shell".into(), key, cases, seconds: 1.0, finished: 7, cached: false };
        Trial { suite: "web".into(), key, tests: vec![test], seconds: 2.0 }
    }

    #[test]
    fn one_failure_outweighs_all() {
        let (passed, skipped, failed) = (Outcome::Passed, Outcome::Skipped("no".into()), Outcome::Failed("why".into()));
        assert_eq!(trial(&[passed.clone(), failed.clone(), skipped.clone()]).verdict(), Verdict::Failed);
        assert_eq!(trial(&[passed.clone(), skipped.clone()]).verdict(), Verdict::Passed);
        assert_eq!(trial(&[skipped]).verdict(), Verdict::Warned);
        assert_eq!(trial(&[]).verdict(), Verdict::Warned);
        assert_eq!(trial(&[passed, failed]).names(Outcome::failed), ["web: page"]);
    }

    #[test]
    fn cases_are_written_flat_and_read_again() {
        let trial = trial(&[Outcome::Passed, Outcome::Failed("expected 1, found 2".into())]);
        let test = &trial.tests[0];
        let json = serde_json::to_value(test).unwrap();
        assert_eq!(json["cases"][0], serde_json::json!({ "name": "page", "seconds": 0.5, "outcome": "passed" }));
        assert_eq!(json["cases"][1]["message"], "expected 1, found 2");
        assert_eq!(serde_json::from_value::<Tested>(json).unwrap(), *test);
    }
}
