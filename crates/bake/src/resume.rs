//! What of earlier bakes may be used again: decisions without I/O of their
//! own, so that `kiln plan` foretells exactly what `kiln bake` does.
//!
//! The most that can be used is the image of an earlier bake with the same seal
//! key and config; then nothing runs but tests that its disk has not passed yet.
//! Otherwise a bake goes on from
//! the deepest [`Point`] that is kept: the machine after some step, or the
//! booted base. Nothing is said of a step that has never been kept beyond that
//! it runs; [`crate::explain`] says why.
//!
//! What the options mean, and why they differ:
//!
//! | Option | Base | Booted base | Steps, image |
//! |---|---|---|---|
//! | `--from STEP` | as it is | used | STEP and all after it run anew |
//! | `--no-cache` | as it is | used | all run anew |
//! | `--fresh` | got anew | not used | all run anew |
//!
//! Who doubts a step's result asks for `--no-cache`. A booted base holds
//! nothing of any step, and starting it again gives the same machine, only
//! later; so it is used. Who wants this week's packages asks for `--fresh`.
//!
//! **Age.** Each step has its own limit, and what counts is when *it* ran,
//! which may be long before the checkpoint that holds it was made: a bake goes
//! on from a checkpoint of last week, and makes another one today. When it ran
//! is known from the records of bakes and from the checkpoints of the steps
//! themselves; where neither knows, the checkpoint's own age has to do. The
//! booted base has no limit: a base stays until `--fresh`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_model::checkpoint::{CheckpointCache, Peek};
use kiln_model::history::Record;
use kiln_model::image::Config;
use kiln_model::settings::nearest;
use kiln_model::{Code, Digest, Error, Key, Result};

use crate::plan::Plan;
use crate::template::{Cache, Template};

/// What the user wants done anew.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Every step, on the booted base.
    pub no_cache: bool,
    /// The base, and with it everything.
    pub fresh: bool,
    /// This step, and all after it.
    pub from: Option<String>,
    /// The machine itself is wanted: no image will do in its place.
    pub machine: bool,
}

impl Options {
    /// Which step `from` names.
    ///
    /// # Errors
    /// When there is no such step.
    pub fn first(&self, template: &Template) -> Result<Option<usize>> {
        self.from.as_ref().map(|wanted| find_step(template, "--from", wanted)).transpose()
    }
}

/// Which step `wanted`, given with `option`, names.
///
/// # Errors
/// When there is no such step.
pub fn find_step(template: &Template, option: &str, wanted: &str) -> Result<usize> {
    let names = || template.steps.iter().map(|step| step.common.name.as_str());
    if let Some(step) = names().position(|name| name == wanted) {
        return Ok(step);
    }
    let list = names().collect::<Vec<_>>().join(", ");
    let error = Error::new(Code::Usage, format!("`{option} {wanted}`: the template has no step of that name"));
    Err(match nearest(wanted, names()) {
        Some(near) => error.next(format!("did you mean `{near}`? The steps are: {list}")),
        None if list.is_empty() => error.next("it has no steps at all"),
        None => error.next(format!("the steps are: {list}")),
    })
}

/// What is known of earlier bakes.
#[derive(Clone, Copy)]
pub struct Earlier<'a> {
    /// The checkpoints.
    pub cache: &'a dyn CheckpointCache,
    /// The records of bakes of this image name, oldest first.
    pub records: &'a [Record],
    /// The config of a record's image, as long as the store has it.
    pub image: &'a dyn Fn(&Record) -> Result<Option<Config>>,
    /// Whether a disk has passed the test of this own key.
    pub passed: &'a dyn Fn(&Digest, &Key) -> Result<bool>,
    /// The time from which ages count.
    pub now: SystemTime,
}

/// What a bake uses again.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The most that it may use.
    pub reuse: Reuse,
    /// For each step, why the bake may not go on right after it. `None`: it may,
    /// or need not, since an image is used.
    pub refused: Vec<Option<Refusal>>,
    /// An image that all steps and the seal would make again, and that will not
    /// do: its config is not that of the template.
    pub unfit: Option<Box<Found>>,
}

impl Decision {
    /// Whether anything is kept at all, so that the base need not be booted.
    pub fn starts(&self) -> bool {
        match &self.reuse {
            Reuse::Image(_) => true,
            Reuse::Points(points) => !points.is_empty(),
        }
    }
}

/// The most that a bake may use of earlier ones.
#[derive(Debug, Clone, PartialEq)]
pub enum Reuse {
    /// An image: no machine is started for steps or seal.
    Image(Box<Found>),
    /// Where to go on, the most work saved first. When none of them can be
    /// used after all, the base is booted.
    Points(Vec<Point>),
}

/// An image of an earlier bake.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// What that bake was made of.
    pub record: Record,
    /// Whether its disk has passed the very tests of the template, or there
    /// are none.
    pub tested: bool,
    /// Whether its config is what this bake would write. Otherwise labels or
    /// names of steps have changed, which are not on the disk.
    pub same_config: bool,
}

/// Where a bake may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// How many steps are done there; none on the booted base.
    pub done: usize,
    /// What to ask the cache for.
    pub key: Key,
    /// And how old that may be: the shortest of the limits of all its steps.
    pub max_age: Option<Duration>,
    /// What was seen there.
    pub peek: Peek,
}

/// Why a bake may not go on right after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `--fresh`.
    Fresh,
    /// `--no-cache`.
    NoCache,
    /// `--from` names this step: the refused one, or one before it.
    From(usize),
    /// `cache = false` on this step, likewise.
    Never(usize),
    /// This step, likewise, ran too long ago.
    TooOld {
        /// Which step.
        step: usize,
        /// How long ago it ran.
        age: Duration,
        /// How long ago it may have run.
        limit: Duration,
    },
    /// The base is not known yet, and so are no keys.
    NoBase,
    /// There is no checkpoint.
    NotKept,
}

/// Decides what a bake of `plan`, made of `template`, uses of `earlier` ones.
///
/// Quick and without side effects: after waiting for another bake, decide
/// again.
///
/// # Errors
/// When the cache or the store cannot be read, or `options` names a step that
/// is not there.
pub fn decide(template: &Template, plan: &Plan, options: &Options, earlier: &Earlier<'_>) -> Result<Decision> {
    let first = options.first(template)?;
    let mut unfit = None;
    let anew = options.fresh || options.no_cache || options.machine || first.is_some();
    if !anew && let Some(found) = find_image(template, plan, earlier)? {
        let fits = found.same_config;
        if fits {
            return Ok(Decision { reuse: Reuse::Image(Box::new(found)), refused: vec![None; template.steps.len()], unfit: None });
        }
        unfit = Some(Box::new(found));
    }
    let made = Made::of(plan, earlier)?;
    let mut points = Vec::new();
    let mut refused = Vec::with_capacity(template.steps.len());
    for (step, planned) in plan.steps.iter().enumerate() {
        let peek = made.peeks.get(step).copied().flatten();
        let refusal = match (options, planned.key, peek) {
            (Options { fresh: true, .. }, ..) => Some(Refusal::Fresh),
            (Options { no_cache: true, .. }, ..) => Some(Refusal::NoCache),
            (_, None, _) => Some(Refusal::NoBase),
            (_, Some(key), peek) => {
                let refusal = forbidden(template, first, step).or_else(|| too_old(template, &made, step, earlier.now));
                match (refusal, peek) {
                    (None, Some(peek)) => {
                        points.push(Point { done: step + 1, key, max_age: shortest(template, step), peek });
                        None
                    }
                    (None, None) => Some(Refusal::NotKept),
                    (refusal, _) => refusal,
                }
            }
        };
        refused.push(refusal);
    }
    points.reverse();
    if !options.fresh
        && let Some(key) = plan.start
        && let Some(peek) = earlier.cache.peek(&key)?
    {
        points.push(Point { done: 0, key, max_age: None, peek });
    }
    Ok(Decision { reuse: Reuse::Points(points), refused, unfit })
}

/// The image of an earlier bake that this one would make again: with the same
/// config if there is one, tested if there is one, and then the newest.
fn find_image(template: &Template, plan: &Plan, earlier: &Earlier<'_>) -> Result<Option<Found>> {
    let Some(seal) = plan.seal else { return Ok(None) };
    let young = |record: &Record| {
        let limits = template.steps.iter().map(|step| step.cache);
        record.steps.iter().zip(limits).all(|(step, limit)| limit.allows(step.age(earlier.now)))
    };
    let mut best: Option<Found> = None;
    for record in earlier.records.iter().rev().filter(|record| record.seal == seal && young(record)) {
        let Some(config) = (earlier.image)(record)? else { continue };
        let found =
            Found { record: record.clone(), tested: has_passed(record, plan, earlier)?, same_config: same_config(template, &config) };
        if best.as_ref().is_none_or(|best| (found.same_config, found.tested) > (best.same_config, best.tested)) {
            best = Some(found);
        }
    }
    Ok(best)
}

/// Whether the image of a record has passed every test of the plan.
fn has_passed(record: &Record, plan: &Plan, earlier: &Earlier<'_>) -> Result<bool> {
    let Some(disk) = record.tested_disk() else { return Ok(plan.each_test.is_empty()) };
    for test in &plan.each_test {
        if !(earlier.passed)(&disk, test)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether what is in a config but in no key is the same.
fn same_config(template: &Template, config: &Config) -> bool {
    let names = template.steps.iter().map(|step| &step.common.name);
    config.labels == template.labels && config.steps.iter().map(|step| &step.name).eq(names)
}

/// Whether a step up to `last` runs in any case, and which is the first.
fn forbidden(template: &Template, first: Option<usize>, last: usize) -> Option<Refusal> {
    let never = template.steps.iter().take(last + 1).position(|step| step.cache == Cache::Never);
    let first = first.filter(|first| *first <= last);
    match (first, never) {
        (Some(first), Some(never)) if never < first => Some(Refusal::Never(never)),
        (Some(first), _) => Some(Refusal::From(first)),
        (None, never) => never.map(Refusal::Never),
    }
}

/// Whether a step up to `last`, as it is in the checkpoint after `last`, is too
/// old, and which is the first.
fn too_old(template: &Template, made: &Made<'_>, last: usize, now: SystemTime) -> Option<Refusal> {
    template.steps.iter().take(last + 1).enumerate().find_map(|(step, spec)| {
        let age = made.age(step, last, now)?;
        match spec.cache {
            Cache::For(limit) if age > limit => Some(Refusal::TooOld { step, age, limit }),
            _ => None,
        }
    })
}

/// The shortest limit of the steps up to `last`.
fn shortest(template: &Template, last: usize) -> Option<Duration> {
    let limits = template.steps.iter().take(last + 1).filter_map(|step| match step.cache {
        Cache::For(limit) => Some(limit),
        Cache::Never | Cache::Forever => None,
    });
    limits.min()
}

/// When steps really ran, as far as that is known.
pub(crate) struct Made<'a> {
    plan: &'a Plan,
    records: &'a [Record],
    peeks: Vec<Option<Peek>>,
}

impl<'a> Made<'a> {
    pub(crate) fn of(plan: &'a Plan, earlier: &Earlier<'a>) -> Result<Self> {
        let peek = |step: &crate::plan::PlannedStep| step.key.map_or(Ok(None), |key| earlier.cache.peek(&key));
        Ok(Self { plan, records: earlier.records, peeks: plan.steps.iter().map(peek).collect::<Result<_>>()? })
    }

    /// Whether a checkpoint is kept after `step`.
    pub(crate) fn is_kept(&self, step: usize) -> bool {
        self.peeks.get(step).copied().flatten().is_some()
    }

    /// How long ago `step` ran, as it is in the checkpoint after `last`; or, if
    /// there is none, when it last ran at all. None: nobody knows.
    pub(crate) fn age(&self, step: usize, last: usize, now: SystemTime) -> Option<Duration> {
        let key = self.plan.steps.get(step)?.key?;
        let peek = |step: usize| self.peeks.get(step).copied().flatten().map(|peek| peek.made);
        let held = peek(last);
        // What ran after the checkpoint was made is not in it.
        let end = held.unwrap_or(now);
        let recorded = self.records.iter().flat_map(|record| &record.steps).filter(|step| step.key == key);
        let made = recorded.map(|step| UNIX_EPOCH + Duration::from_secs(step.made)).chain(peek(step)).filter(|made| *made <= end).max();
        made.or(held).map(|made| now.duration_since(made).unwrap_or_default())
    }
}

#[cfg(test)]
#[path = "resume_tests.rs"]
mod tests;
