//! Template, plan, keys, and the bake from top to bottom.
//!
//! [`template`] reads `kiln.toml` and finds every mistake in it; [`plan`] gives
//! each step its key; [`resume`] decides what of earlier bakes is used, and
//! [`explain`] says why the rest runs; [`bake()`] does the work through the
//! traits of `kiln-model` alone, so that it knows neither QEMU nor the store.

mod account;
mod bake;
pub mod explain;
pub mod graph;
mod keep;
pub mod plan;
pub mod resume;
mod seal;
mod step;
pub mod template;
#[cfg(test)]
mod testing;
pub mod trial;

pub use bake::{FindImage, OnFailure, OpenShell, Options, Stores, bake, shell};

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_model::guest::{Command, Guest, GuestExt as _};
use kiln_model::{Result, ResultExt as _};

/// Runs what would block a task for long on a thread of its own.
async fn blocking<T: Send + 'static>(what: &str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.trying(|| what.to_owned())?
}

/// Seconds since 1970.
fn since_1970(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Waits until the guest has started what it starts at boot: a guest answers
/// before that. One without systemd counts as started.
///
/// # Errors
/// When the guest cannot be reached.
pub async fn settle(guest: &dyn Guest) -> Result<()> {
    // The status tells of failed units too; whether they matter is the test's to say.
    let wait = Command::new("command -v systemctl >/dev/null && systemctl is-system-running --wait").timeout(Duration::from_secs(600));
    guest.output(&wait).await.map(|_| ())
}
