//! Keeping the machine after a step, where that pays.
//!
//! A checkpoint costs the time to write it, during which the guest stands
//! still, and room in the cache; it saves the next bake whatever came before
//! it. So one is made when what has run since the last one took clearly longer
//! than keeping it takes. The booted base is always kept.
//!
//! A machine that received a secret is tainted until it has rebooted: its
//! memory may hold the secret, and is not kept. Its disk is, where the steps
//! since the last checkpoint took longer than the boot that going on from a
//! disk alone needs.
//!
//! Digests are made and files are moved in the background, while the next step
//! runs.

use std::sync::Arc;
use std::time::Duration;

use kiln_model::base::Base;
use kiln_model::checkpoint::{CheckpointCache, Hold, KeptFile};
use kiln_model::event::Phase;
use kiln_model::machine::{Context, Machine};
use kiln_model::{Code, Error, Key, Result, ResultExt as _};
use tokio::task::JoinHandle;

use crate::explain::CHEAP;
use crate::seal::Traces;
use crate::template::{Cache, Template};

/// How fast a checkpoint is written, about, in bytes per second.
const RATE: f64 = 600e6;

/// How long bringing the guest to rest and waking it takes, about.
const REST: f64 = 0.2;

/// How long a boot takes where none was seen, in seconds.
const BOOT: f64 = 20.0;

/// What the traces are called in a checkpoint's folder.
pub(crate) const TRACES: &str = "traces.json";

/// Keeps the machine of one bake.
pub(crate) struct Keeper<'a> {
    pub(crate) cache: &'a Arc<dyn CheckpointCache>,
    pub(crate) template: &'a Template,
    pub(crate) base: &'a Base,
    pub(crate) context: &'a Context,
    /// Seconds of boot and steps that are in the machine.
    pub(crate) worth: f64,
    /// Seconds of them since the last checkpoint.
    pub(crate) unsaved: f64,
    /// Seconds that the boot took, where it was seen.
    pub(crate) boot: Option<f64>,
    /// Whether a secret may be in its memory.
    pub(crate) tainted: bool,
    /// Whether it was said that there is no room.
    pub(crate) told: bool,
    pub(crate) pending: Vec<JoinHandle<Result<()>>>,
}

impl<'a> Keeper<'a> {
    /// For a machine that nothing was done to yet.
    pub(crate) fn new(cache: &'a Arc<dyn CheckpointCache>, template: &'a Template, base: &'a Base, context: &'a Context) -> Self {
        Self { cache, template, base, context, worth: 0.0, unsaved: 0.0, boot: None, tainted: false, told: false, pending: Vec::new() }
    }

    /// Keeps the booted base.
    pub(crate) async fn booted(
        &mut self,
        key: Key,
        seconds: f64,
        machine: &mut dyn Machine,
        traces: &Traces,
        turn: Option<Hold>,
    ) -> Result<()> {
        self.boot = Some(seconds);
        self.worth += seconds;
        self.keep(key, machine, traces, turn).await
    }

    /// Keeps the machine after step `index`, which took `seconds`, if that pays.
    /// `turn` is the right to make this checkpoint, given back when it is there.
    pub(crate) async fn ran(
        &mut self,
        index: usize,
        (key, seconds): (Key, f64),
        machine: &mut dyn Machine,
        traces: &Traces,
        turn: Option<Hold>,
    ) -> Result<()> {
        let Some(spec) = self.template.steps.get(index) else { return Ok(()) };
        self.worth += seconds;
        self.unsaved += seconds;
        self.tainted |= !spec.common.secrets.is_empty();
        if spec.provisioner.reboots() {
            self.tainted = false;
        }
        let never = self.template.steps.iter().take(index + 1).any(|step| step.cache == Cache::Never);
        let cost = REST + machine.checkpoint_size().unwrap_or_default() as f64 / RATE;
        let memory = self.memory_key(&key).await;
        let least = if memory.is_some() { CHEAP.as_secs_f64().max(2.0 * cost) } else { self.boot.unwrap_or(BOOT) };
        if spec.checkpoint && !never && self.unsaved > least {
            self.keep(key, machine, traces, turn).await?;
        }
        Ok(())
    }

    /// The key of its memory, where that may be kept.
    async fn memory_key(&self, step: &Key) -> Option<Key> {
        if self.tainted {
            return None;
        }
        self.template.builder.memory_key(step, self.base, self.context).await.ok().flatten()
    }

    /// A checkpoint that cannot be made costs the next bake time, and this one
    /// nothing: it is said, and the bake goes on. Only a machine that did not
    /// survive it ends the bake.
    async fn keep(&mut self, key: Key, machine: &mut dyn Machine, traces: &Traces, turn: Option<Hold>) -> Result<()> {
        match self.try_to_keep(key, machine, traces, turn).await {
            Err(error) if error.kind() == Code::MachineEnded => return Err(error),
            Err(error) => self.context.reports.warn(format!("no checkpoint was kept: {}", error.chain())),
            Ok(()) => {}
        }
        Ok(())
    }

    async fn try_to_keep(&mut self, key: Key, machine: &mut dyn Machine, traces: &Traces, turn: Option<Hold>) -> Result<()> {
        let Some(bytes) = machine.checkpoint_size() else { return Ok(()) };
        let memory = self.memory_key(&key).await;
        let cache = self.cache.clone();
        let slot = crate::blocking("make room for a checkpoint", move || cache.slot(&key, memory.as_ref(), bytes)).await?;
        let Some(slot) = slot else {
            if !std::mem::replace(&mut self.told, true) {
                let size = bytes.div_ceil(1 << 20);
                self.context.reports.warn(format!(
                    "no room for a checkpoint of {size} MiB: the next bake runs these steps again; free some of the disk, or `kiln prune --cache`"
                ));
            }
            return Ok(());
        };
        let span = self.context.reports.begin(Phase::Checkpoint, "checkpoint");
        let Some(mut written) = machine.checkpoint(&slot).await? else { return Ok(()) };
        let _ = span.end(false);
        let path = slot.folder.join(TRACES);
        let text = serde_json::to_vec(traces).trying(|| "describe the checkpoint".into())?;
        std::fs::write(&path, text).trying(|| format!("write {}", path.display()))?;
        written.files.push(KeptFile { name: TRACES.into(), length: 0, digest: String::new() });
        self.unsaved = 0.0;
        let (cache, worth) = (self.cache.clone(), Duration::from_secs_f64(self.worth));
        self.pending.push(tokio::task::spawn_blocking(move || {
            let committed = cache.commit(slot, &written, worth);
            drop(turn);
            committed
        }));
        Ok(())
    }

    /// Waits until everything that was kept is there.
    pub(crate) async fn finish(&mut self) {
        for pending in self.pending.drain(..) {
            let done = pending.await.trying(|| "keep a checkpoint".into()).and_then(|done| done);
            if let Err(error) = done {
                self.context.reports.warn(format!("no checkpoint was kept: {}", error.chain()));
            }
        }
    }
}

/// Waits for the right to make what `key` names. Tells whether another had it.
pub(crate) async fn claim(cache: &Arc<dyn CheckpointCache>, key: &Key, what: &str, context: &Context) -> Result<(Hold, bool)> {
    /// How long to wait before asking again: the lock of another process tells
    /// nobody when it goes.
    const PAUSE: Duration = Duration::from_millis(100);
    let mut waited = false;
    loop {
        if let Some(hold) = cache.claim(key)? {
            return Ok((hold, waited));
        }
        if !waited {
            context.reports.note(format!("another bake is making {what}: waiting for it"));
            waited = true;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The traces that a checkpoint holds.
pub(crate) fn traces(folder: &std::path::Path) -> Result<Traces> {
    let path = folder.join(TRACES);
    let text = std::fs::read(&path).trying(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).map_err(|error| Error::new(Code::DigestMismatch, format!("{} is damaged", path.display())).because(error))
}
