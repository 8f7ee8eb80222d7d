//! Provisioners: steps run once on the guest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::error::{Code, Result};
use crate::event::Reports;
use crate::guest::Guest;
use crate::key::KeyHasher;
use crate::secret::Secret;

/// What a step has beside its provisioner: the common keys of `[[provision]]`
/// and `[[test]]`, resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Common {
    /// Its unique name.
    pub name: String,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Names of the secrets it gets, as `/run/kiln/secrets/NAME`. They are
    /// there (tmpfs, 0600) while the step runs; the bake sees to that.
    pub secrets: Vec<String>,
    /// Run as this user, through sudo. None: root.
    pub user: Option<String>,
    /// How long one attempt may take.
    pub timeout: Option<Duration>,
    /// How often to try again after a failure.
    pub retries: u32,
}

/// What a provisioner works with.
pub struct Step<'a> {
    /// The guest.
    pub guest: Arc<dyn Guest>,
    /// The common keys.
    pub common: &'a Common,
    /// Where output goes.
    pub reports: &'a Reports,
    /// The secrets of [`Common::secrets`] by their names, for what runs here
    /// and not on the guest.
    pub secrets: &'a BTreeMap<String, Secret>,
    /// A folder here that is this bake's alone, and is removed at its end.
    pub work: &'a Path,
}

/// One thing that a test looked at, and what it found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// What it is called.
    pub name: String,
    /// Seconds it took.
    pub seconds: f64,
    /// What was found.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What a test found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "message", rename_all = "snake_case")]
pub enum Outcome {
    /// What was to be found.
    Passed,
    /// Nothing: it did not apply, and says why.
    Skipped(String),
    /// Something else, in words.
    Failed(String),
}

impl Outcome {
    /// Whether it is a failure.
    pub fn failed(&self) -> bool {
        matches!(self, Self::Failed(_))
    }
}

/// One step, resolved and checked: no variable left, every input found.
#[async_trait]
pub trait Provisioner: Send + Sync {
    /// Its kind, as the template names it (`shell`).
    fn kind(&self) -> &'static str;

    /// Adds everything that makes this step what it is: resolved settings, and
    /// path, mode and bytes of every input file. No side effects. The common
    /// keys and the kind are added by the plan.
    ///
    /// # Errors
    /// When an input cannot be read.
    fn key(&self, hasher: &mut KeyHasher) -> Result<()>;

    /// Whether the guest has booted anew after it.
    fn reboots(&self) -> bool {
        false
    }

    /// Whether it brings something out of the guest: then what it did cannot be
    /// taken from a cache, and it runs in every bake.
    fn takes_out(&self) -> bool {
        false
    }

    /// Whether a second run on the same guest was to change nothing, so that a
    /// run that succeeded is the proof of it (`converge = "once"`).
    fn converges(&self) -> bool {
        false
    }

    /// The secrets that its settings name: each has to be among
    /// [`Common::secrets`].
    fn secrets(&self) -> Vec<&str> {
        Vec::new()
    }

    /// Whether what it needs of this machine is there. It is asked before a
    /// machine is started for it.
    ///
    /// # Errors
    /// [`Code::Missing`] with what is not there, and where to get it.
    async fn ready(&self) -> Result<()> {
        Ok(())
    }

    /// Does it, once. Retries are the bake's; the limit in time is passed on to
    /// every command, so that what took too long is killed in the guest.
    ///
    /// # Errors
    /// [`crate::Code::Step`] with what failed.
    async fn run(&self, step: &Step<'_>) -> Result<()>;

    /// Does it as a test, and tells case by case what was found. By itself it
    /// is one case: whether it works.
    ///
    /// # Errors
    /// When the test could not be carried out; what it found to be wrong is no
    /// error.
    async fn test(&self, step: &Step<'_>) -> Result<Vec<Case>> {
        let began = Instant::now();
        let outcome = match self.run(step).await {
            Ok(()) => Outcome::Passed,
            Err(error) if matches!(error.kind(), Code::Step | Code::Timeout) => {
                let details = error.details().iter().map(|detail| format!("\n{detail}"));
                Outcome::Failed(std::iter::once(error.chain()).chain(details).collect())
            }
            Err(error) => return Err(error),
        };
        Ok(vec![Case { name: step.common.name.clone(), seconds: began.elapsed().as_secs_f64(), outcome }])
    }
}
