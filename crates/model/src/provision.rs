//! Provisioners: steps run once on the guest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::event::Reports;
use crate::guest::Guest;
use crate::key::KeyHasher;

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

    /// Does it, once. Retries are the bake's; the limit in time is passed on to
    /// every command, so that what took too long is killed in the guest.
    ///
    /// # Errors
    /// [`crate::Code::Step`] with what failed.
    async fn run(&self, step: &Step<'_>) -> Result<()>;
}
