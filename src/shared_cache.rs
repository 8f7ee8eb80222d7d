//! Disk checkpoints that machines share through a registry (`--cache-from`,
//! `--cache-to`): for runners that start with nothing.
//!
//! **Taken** is what this machine does not have itself, and what one of the keys
//! has signed that the template names: whoever may write to the registry could
//! otherwise put anything into every image. The signature is over the
//! manifest's digest, on which all bytes hang, and the step's key is among
//! them; its age is, too, so that an old one cannot be passed off as new.
//!
//! It stays marked with that key in this machine's cache, and so does what is
//! made of it: a template that trusts other keys sees none of it.
//!
//! **Left** is what this machine has of the steps of its bake, but nothing from
//! a step on that was given a secret: such a disk may hold what a later step
//! removes. A checkpoint counts as old as the oldest of its steps that may age:
//! the next machine does not know when each of them ran.
//!
//! What goes wrong here costs time and no image: it is said, and the bake goes
//! on without.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_bake::template::{Cache, Template};
use kiln_cache::Checkpoints;
use kiln_evidence::{PrivateKey, PublicKey, Subject, What};
use kiln_model::checkpoint::{Checkpoint, CheckpointCache, Hold, Peek, Slot, Written};
use kiln_model::event::Reports;
use kiln_model::history::Record;
use kiln_model::machine::Context;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Key, Result, ResultExt as _};
use kiln_store::kept::{self, Kept, Offered, Packed};
use kiln_store::{Place as _, RemotePlace};

use crate::evidence;

/// The repository that `--cache-from` or `--cache-to` names.
///
/// # Errors
/// When it names none, or a tag in it.
pub(crate) fn repository(option: &str, text: &str) -> Result<Reference> {
    let reference: Reference = text.parse()?;
    match (&reference.registry, &reference.pointer) {
        (Some(_), Pointer::Tag(None)) => Ok(reference),
        _ => Err(Error::new(Code::Usage, format!("`{option} {text}` names no repository"))
            .next("write HOST/NAMESPACE/NAME, without a tag: each checkpoint has its own")),
    }
}

/// The checkpoints of this machine, and behind them those of a registry.
pub(crate) struct SharedCache {
    local: Arc<Checkpoints>,
    place: RemotePlace,
    keys: Vec<PublicKey>,
    reports: Reports,
    /// What the registry has said of each step.
    asked: Mutex<HashMap<Key, Option<Signed>>>,
    /// Whether it could not be asked: then it is not asked again.
    silent: AtomicBool,
}

impl SharedCache {
    /// Takes from `place` what one of `keys` has signed.
    pub(crate) fn new(local: Arc<Checkpoints>, place: RemotePlace, keys: Vec<PublicKey>, reports: Reports) -> Self {
        Self { local, place, keys, reports, asked: Mutex::default(), silent: AtomicBool::new(false) }
    }

    /// The checkpoint of a step that may be taken.
    fn ask(&self, step: &Key) -> Option<Signed> {
        let asked = || self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if self.silent.load(Ordering::Relaxed) {
            return None;
        }
        if let Some(known) = asked().get(step) {
            return known.clone();
        }
        let found = waiting(trusted(&self.place, step, &self.keys)).unwrap_or_else(|error| {
            // What is wrong with one says nothing of the others.
            if !matches!(error.kind(), Code::Corrupt | Code::DigestMismatch) {
                self.silent.store(true, Ordering::Relaxed);
            }
            self.reports.warn(format!("no checkpoints are taken from {}: {}", self.place.label(), error.chain()));
            None
        });
        let found = match found {
            Some(Found::Trusted(signed)) => Some(*signed),
            Some(Found::Unsigned) => {
                let (step, place) = (step.short(), self.place.label());
                self.reports
                    .warn(format!("the checkpoint of step {step} at {place} is not taken: no key that the template names has signed it"));
                None
            }
            None => None,
        };
        asked().insert(*step, found.clone());
        found
    }

    /// Brings a checkpoint into this machine's cache; false when it has no room.
    fn take(&self, Signed { offered, by }: &Signed) -> Result<bool> {
        let kept = &offered.kept;
        let Some(slot) = self.local.slot(&kept.step, None, kept.size())? else { return Ok(false) };
        waiting(kept::fetch(&self.place, offered, &slot.folder))?;
        let written = Written { memory: false, files: kept.files.clone(), note: kept.note.clone() };
        let worth = Duration::try_from_secs_f64(kept.worth).unwrap_or_default();
        self.local.commit_signed(&slot, &written, worth, made(kept), &by.to_string())?;
        Ok(true)
    }
}

fn made(kept: &Kept) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(kept.made)
}

/// Waits where nothing may be awaited: the cache is asked by code that knows no
/// network.
fn waiting<T>(work: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
}

/// A checkpoint, and which of the keys has signed it.
#[derive(Debug, Clone)]
struct Signed {
    offered: Offered,
    by: Digest,
}

/// What a registry has of a step.
enum Found {
    /// Signed by one of the keys.
    Trusted(Box<Signed>),
    /// By none of them.
    Unsigned,
}

async fn trusted(place: &RemotePlace, step: &Key, keys: &[PublicKey]) -> Result<Option<Found>> {
    let Some(offered) = kept::offered(place, step).await? else { return Ok(None) };
    let attached = evidence::find(place, &Subject::new(offered.digest), keys).await?;
    let signed = |by: &Digest| attached.iter().any(|examined| matches!(examined.what, What::Signature(_)) && examined.is_signed_by(&[*by]));
    let by = keys.iter().map(PublicKey::id).find(signed);
    Ok(Some(by.map_or(Found::Unsigned, |by| Found::Trusted(Box::new(Signed { offered, by })))))
}

impl CheckpointCache for SharedCache {
    fn peek(&self, step: &Key) -> Result<Option<Peek>> {
        if let Some(peek) = self.local.peek(step)? {
            return Ok(Some(peek));
        }
        Ok(self.ask(step).map(|signed| Peek { made: made(&signed.offered.kept), memory: None }))
    }

    fn find(&self, step: &Key, max_age: Option<Duration>, warn: &dyn Fn(String)) -> Result<Option<Checkpoint>> {
        if let Some(checkpoint) = self.local.find(step, max_age, warn)? {
            return Ok(Some(checkpoint));
        }
        let Some(signed) = self.ask(step) else { return Ok(None) };
        let age = SystemTime::now().duration_since(made(&signed.offered.kept)).unwrap_or_default();
        if max_age.is_some_and(|limit| age > limit) {
            return Ok(None);
        }
        match self.take(&signed) {
            Ok(true) => {
                self.reports.note(format!("took the checkpoint of step {} from {}", step.short(), self.place.label()));
                self.local.find(step, max_age, warn)
            }
            Ok(false) => Ok(None),
            Err(error) => {
                warn(format!("the checkpoint of step {} is not taken from {}: {}", step.short(), self.place.label(), error.chain()));
                Ok(None)
            }
        }
    }

    fn drop_damaged(&self, checkpoint: Checkpoint) -> Result<()> {
        // Not to be taken a second time.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(checkpoint.step, None);
        self.local.drop_damaged(checkpoint)
    }

    fn slot(&self, step: &Key, memory: Option<&Key>, bytes: u64) -> Result<Option<Slot>> {
        self.local.slot(step, memory, bytes)
    }

    fn commit(&self, slot: Slot, written: &Written, worth: Duration) -> Result<()> {
        self.local.commit(slot, written, worth)
    }

    fn claim(&self, key: &Key) -> Result<Option<Hold>> {
        self.local.claim(key)
    }
}

/// Sends to `place`, signed with `key`, what this machine has kept of the steps
/// of `record`, a bake of `template`; gives how many checkpoints that were. What
/// is there already, and is not older, stays.
///
/// # Errors
/// When a checkpoint cannot be read or sent.
pub(crate) async fn leave(
    local: &Arc<Checkpoints>,
    place: &RemotePlace,
    key: &PrivateKey,
    (template, record): (&Template, &Record),
    context: &Context,
) -> Result<usize> {
    let own = [key.public().clone()];
    let (mut packed, mut sent) = (Packed::default(), 0);
    for (index, step) in record.steps.iter().enumerate() {
        if template.steps.get(index).is_none_or(|spec| !spec.common.secrets.is_empty()) {
            break;
        }
        let (cache, of, reports) = (local.clone(), step.key, context.reports.clone());
        let find = move || cache.find(&of, None, &|warning| reports.warn(warning));
        let found = tokio::task::spawn_blocking(find).await.trying(|| "look for a checkpoint".into())??;
        let Some(checkpoint) = found else { continue };
        let Some(portable) = template.builder.portable(&checkpoint) else { continue };
        let made = counts_from(template, record, index, &checkpoint);
        let there = trusted(place, &step.key, &own).await?;
        if matches!(&there, Some(Found::Trusted(signed)) if signed.offered.kept.made >= made) {
            continue;
        }
        let mut files = checkpoint.files.clone();
        files.retain(|file| portable.files.contains(&file.name));
        let kept = Kept::new(step.key, made, checkpoint.worth.as_secs_f64(), portable.note, files);
        let digest = kept::send(place, &kept, &checkpoint.folder, &context.work, &mut packed).await?;
        let name = format!("{}:{}", place.label(), kept::tag(&step.key));
        evidence::sign(place, &digest, &name, key, &[]).await?;
        // Last: whoever finds it finds it signed.
        kept::point(place, &step.key, &digest).await?;
        sent += 1;
    }
    Ok(sent)
}

/// From when a checkpoint's age counts, in seconds since 1970: when the oldest
/// of its steps ran, those left out that may be of any age.
fn counts_from(template: &Template, record: &Record, last: usize, checkpoint: &Checkpoint) -> u64 {
    let kept = checkpoint.made.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let steps = template.steps.iter().zip(&record.steps).take(last + 1);
    let ageing = steps.filter(|(spec, _)| spec.cache != Cache::Forever).map(|(_, step)| step.made);
    ageing.min().map_or(kept, |oldest| oldest.min(kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_named_without_a_tag() {
        let named = repository("--cache-to", "r.example/shop/cache").unwrap();
        assert_eq!((named.registry.as_deref(), named.name.as_str()), (Some("r.example"), "shop/cache"));
        for wrong in ["cache", "r.example/shop/cache:1", "r.example/shop/cache@production"] {
            assert_eq!(repository("--cache-to", wrong).unwrap_err().kind(), Code::Usage, "{wrong}");
        }
    }
}
