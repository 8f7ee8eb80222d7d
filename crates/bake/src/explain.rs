//! Why a bake does what it does: for each step whether it is cached, how old,
//! how long it takes, and what makes it run.
//!
//! The plan is compared with the records of earlier bakes of the same image
//! name. A step whose key is in none of them has changed, or something before
//! it has; it is compared with the *reference*: the record that has the longest
//! beginning in common with the plan, the newest of several. So someone who
//! goes back and forth between two branches reads what differs from the
//! nearest bake, not from the last one. A step whose key is known runs because
//! of its age, an option, or because nothing is kept after it
//! ([`crate::resume`]).
//!
//! All of it is data, which the binary draws; a [`Reason`] knows its own words.

use std::fmt::{self, Write as _};
use std::time::{Duration, UNIX_EPOCH};

use kiln_model::history::{Record, StepRecord};
use kiln_model::key::Part;
use kiln_model::{Digest, Key, Result};
use serde::{Serialize, Serializer};

use crate::plan::{Plan, PlannedStep, start_key};
use crate::resume::{Decision, Earlier, Made, Options, Point, Refusal, Reuse};
use crate::template::{Cache, Template};

/// Seconds to go on from kept memory, with the connection to the guest.
const RESUME: f64 = 1.0;

/// A step that takes less is not worth a checkpoint.
pub const CHEAP: Duration = Duration::from_secs(1);

/// How many parts are named before the others are only counted.
const NAMED: usize = 3;

/// What a bake would do, and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// Image name.
    pub name: String,
    /// Image version.
    pub version: String,
    /// The base.
    pub base: BaseLine,
    /// How the machine starts.
    pub start: Start,
    /// The steps, in order.
    pub steps: Vec<StepLine>,
    /// The seal: what must not be cloned goes, the machine stops, its disk is
    /// checked and stored.
    pub seal: Line,
    /// The tests, if there are any.
    pub tests: Option<Line>,
    /// The image of an earlier bake that is used again.
    pub image: Option<Digest>,
    /// Seconds that are known of, and whether that is all.
    #[serde(rename = "estimate_seconds")]
    pub estimate: Estimate,
}

/// The base.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BaseLine {
    /// What the template calls it.
    pub label: String,
    /// Digest of its disk; none as long as it was not fetched.
    pub digest: Option<Digest>,
}

/// How the machine starts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Start {
    /// Key of the machine before its first step.
    pub key: Option<Key>,
    /// What it starts from.
    pub from: Origin,
    /// How many steps are done there.
    pub done: usize,
    /// Seconds since that was kept.
    pub age_seconds: Option<u64>,
    /// Seconds until its guest answers.
    pub estimate_seconds: Option<f64>,
}

/// What a machine starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Nothing is provisioned: the image is there.
    Image,
    /// The checkpoint after a step.
    Checkpoint,
    /// The checkpoint of the booted base.
    BootedBase,
    /// The base's disk.
    Base,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepLine {
    /// Its name.
    pub name: String,
    /// Its provisioner's kind.
    pub kind: &'static str,
    /// What becomes of it.
    #[serde(flatten)]
    pub line: Line,
}

/// What becomes of a step, the seal or the tests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Its key; none while the base is not known.
    pub key: Option<Key>,
    /// Whether it is cached; otherwise it runs.
    pub cached: bool,
    /// Seconds since it ran, when it is cached.
    pub age_seconds: Option<u64>,
    /// Seconds it will take; none when that is not known. Nothing for what is
    /// cached.
    pub estimate_seconds: Option<f64>,
    /// Why it runs.
    pub reason: Option<Reason>,
}

impl Line {
    fn cached(key: Option<Key>, age: Option<Duration>) -> Self {
        Self { key, cached: true, age_seconds: age.map(|age| age.as_secs()), estimate_seconds: Some(0.0), reason: None }
    }

    fn runs(key: Option<Key>, estimate: Option<f64>, reason: Reason) -> Self {
        Self { key, cached: false, age_seconds: None, estimate_seconds: estimate, reason: Some(reason) }
    }
}

/// How long something takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Seconds of everything that is known.
    pub seconds: f64,
    /// Whether everything is known.
    pub complete: bool,
}

impl Serialize for Estimate {
    /// A number, or null: a part of the whole would be taken for the whole.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.complete.then_some(self.seconds).serialize(serializer)
    }
}

/// Why something runs. Shown and serialised as a sentence without its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What it is; seldom more than one thing.
    pub causes: Vec<Cause>,
    /// The bake with which it was compared.
    pub since: Option<Since>,
}

/// An earlier bake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Since {
    /// Its id.
    pub bake: String,
    /// How long ago it ended.
    pub ago: Duration,
}

/// One cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// `--no-cache`.
    NoCache,
    /// `--fresh`.
    Fresh,
    /// `--from` names this step.
    From,
    /// `cache = false`.
    Never,
    /// Something before it runs.
    After {
        /// Number of the step that is the cause, from 1.
        step: usize,
    },
    /// It runs because the seal does.
    AfterSeal,
    /// No bake of this image is known.
    NotBaked {
        /// Image name.
        name: String,
    },
    /// The base is not known, so nothing else is.
    NoBase,
    /// Another base, or another state of it.
    Base {
        /// What it was called.
        was: String,
        /// What it is called.
        is: String,
    },
    /// `[disk] size`.
    DiskSize,
    /// Another builder, whose machines are elsewhere.
    Builder,
    /// Some of what it is made of.
    Parts(Changes),
    /// Another provisioner.
    Kind {
        /// Which it was.
        was: String,
        /// Which it is.
        is: &'static str,
    },
    /// It was not there.
    New,
    /// It stood elsewhere.
    Moved {
        /// Its number then, from 1.
        was: usize,
    },
    /// These steps stood before it.
    Removed {
        /// Their names.
        names: Vec<String>,
    },
    /// It ran too long ago.
    TooOld {
        /// How long ago.
        age: Duration,
        /// How long it may be.
        limit: Duration,
        /// Whether the limit is the step's own `cache`.
        own: bool,
    },
    /// `checkpoint = false`.
    CheckpointOff,
    /// No checkpoint, since the step is quick.
    Cheap,
    /// No checkpoint, for whatever reason.
    NotKept,
    /// These steps have never been sealed.
    NotSealed,
    /// The image has left the store.
    ImageGone,
    /// The image is there, but some step in it is too old.
    ImageOld,
    /// What is on no disk, but in the image's config: labels, names of steps.
    Config,
    /// Other tests than those that the image has passed.
    Tests,
    /// The image has not passed them.
    NotTested,
}

/// What has changed among the parts of something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Parts that are something else.
    pub changed: Vec<String>,
    /// Parts that were not there.
    pub added: Vec<String>,
    /// Parts that are no longer there.
    pub removed: Vec<String>,
}

impl Changes {
    /// What makes `new` differ from `old`.
    fn between(old: &[Part], new: &[Part]) -> Self {
        // A name may come more than once: then all of that name is one part.
        let of = |parts: &[Part], name: &str| -> Vec<String> {
            parts.iter().filter(|part| part.name == name).map(|part| part.digest.clone()).collect()
        };
        let mut changes = Self::default();
        for part in new {
            let (was, is) = (of(old, &part.name), of(new, &part.name));
            let list = if was.is_empty() { &mut changes.added } else { &mut changes.changed };
            if was != is && !list.contains(&part.name) {
                list.push(part.name.clone());
            }
        }
        for part in old {
            if of(new, &part.name).is_empty() && !changes.removed.contains(&part.name) {
                changes.removed.push(part.name.clone());
            }
        }
        changes
    }

    fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.added.is_empty() && self.removed.is_empty()
    }
}

/// Explains what a bake of `plan` does after `decision`.
///
/// # Errors
/// When the cache or the store cannot be read, or `options` names a step that
/// is not there.
pub fn explain(template: &Template, plan: &Plan, options: &Options, earlier: &Earlier<'_>, decision: &Decision) -> Result<Explanation> {
    let times = Times(earlier.records);
    let view = View {
        template,
        plan,
        options,
        earlier,
        decision,
        made: Made::of(plan, earlier)?,
        reference: reference(plan, earlier.records),
        first_runs: decision.done(),
    };
    let start = view.start(&times);
    let steps: Vec<StepLine> = (0..plan.steps.len()).map(|step| view.step(step, &times)).collect();
    let seal = view.seal(&times)?;
    let tests = (!template.tests.is_empty()).then(|| view.tests(&seal, &times));
    let mut seconds: Vec<Option<f64>> = vec![start.estimate_seconds, seal.estimate_seconds];
    seconds.extend(steps.iter().map(|step| step.line.estimate_seconds));
    seconds.extend(tests.iter().map(|tests| tests.estimate_seconds));
    // How long it takes to get a base is written down nowhere.
    let complete = plan.base.is_some() && seconds.iter().all(Option::is_some);
    Ok(Explanation {
        name: template.name.clone(),
        version: template.version.clone(),
        base: BaseLine { label: template.base.label(), digest: plan.base },
        start,
        steps,
        seal,
        tests,
        image: match &decision.reuse {
            Reuse::Image(found) => Some(found.record.image),
            Reuse::Points(_) => None,
        },
        estimate: Estimate { seconds: seconds.into_iter().flatten().sum(), complete },
    })
}

/// One line for each step that runs, as a bake says it; where no step runs,
/// for the seal, or else the tests.
pub fn reasons(explanation: &Explanation) -> Vec<String> {
    let line = |what: String, line: &Line| line.reason.as_ref().map(|reason| format!("{what}: {reason}"));
    let steps = explanation.steps.iter().enumerate();
    let steps: Vec<String> = steps.filter_map(|(number, step)| line(format!("step {} `{}`", number + 1, step.name), &step.line)).collect();
    if !steps.is_empty() {
        return steps;
    }
    let seal = line("seal".to_owned(), &explanation.seal);
    seal.or_else(|| explanation.tests.as_ref().and_then(|tests| line("tests".to_owned(), tests))).into_iter().collect()
}

/// A length of time in one unit: `40 s`, `2 min`, `47 h`, `6 d`.
pub fn span(time: Duration) -> String {
    match time.as_secs() {
        secs @ 0..60 => format!("{secs} s"),
        secs @ 60..3_600 => format!("{} min", secs / 60),
        secs @ 3_600..172_800 => format!("{} h", secs / 3_600),
        secs => format!("{} d", secs / 86_400),
    }
}

/// A length of time as somebody has written it, nothing left out: `90 s`, `7 d`.
fn limit_span(time: Duration) -> String {
    match time.as_secs() {
        secs if secs >= 172_800 && secs.is_multiple_of(86_400) => format!("{} d", secs / 86_400),
        secs if secs >= 3_600 && secs.is_multiple_of(3_600) => format!("{} h", secs / 3_600),
        secs if secs >= 60 && secs.is_multiple_of(60) => format!("{} min", secs / 60),
        secs => format!("{secs} s"),
    }
}

/// The record that has the longest beginning in common with the plan; of
/// several the newest.
fn reference<'a>(plan: &Plan, records: &'a [Record]) -> Option<&'a Record> {
    let common = |record: &&Record| {
        let steps = plan.steps.iter().zip(&record.steps).take_while(|(planned, step)| planned.key == Some(step.key));
        if plan.start == Some(record.start) { 1 + steps.count() } else { 0 }
    };
    // The last of several that are equal is given, and that is the newest.
    records.iter().max_by_key(common)
}

/// How long things took in earlier bakes.
struct Times<'a>(&'a [Record]);

impl Times<'_> {
    fn newest<T>(&self, find: impl Fn(&Record) -> Option<T>) -> Option<T> {
        self.0.iter().rev().find_map(find)
    }

    /// Of this very step, or else of one of that name.
    fn step(&self, step: &PlannedStep) -> Option<f64> {
        let of = |matches: &dyn Fn(&StepRecord) -> bool| {
            self.newest(|record| record.steps.iter().find(|step| matches(step)).map(|step| step.seconds))
        };
        of(&|other| Some(other.key) == step.key).or_else(|| of(&|other| other.name == step.name))
    }

    fn boot(&self) -> Option<f64> {
        self.newest(|record| record.boot)
    }

    fn seal(&self) -> Option<f64> {
        self.newest(|record| Some(record.seal_seconds))
    }

    fn tests(&self) -> Option<f64> {
        self.newest(|record| record.tests.map(|_| record.test_seconds))
    }
}

impl Decision {
    /// How many steps are done where the bake goes on.
    pub fn done(&self) -> usize {
        match &self.reuse {
            Reuse::Image(_) => self.refused.len(),
            Reuse::Points(points) => points.first().map_or(0, |point| point.done),
        }
    }
}

/// Everything that a reason is found in.
struct View<'a> {
    template: &'a Template,
    plan: &'a Plan,
    options: &'a Options,
    earlier: &'a Earlier<'a>,
    decision: &'a Decision,
    made: Made<'a>,
    reference: Option<&'a Record>,
    /// Index of the first step that runs.
    first_runs: usize,
}

impl View<'_> {
    fn start(&self, times: &Times<'_>) -> Start {
        let point: Option<&Point> = match &self.decision.reuse {
            Reuse::Image(_) => {
                return Start {
                    key: self.plan.start,
                    from: Origin::Image,
                    done: self.first_runs,
                    age_seconds: None,
                    estimate_seconds: Some(0.0),
                };
            }
            Reuse::Points(points) => points.first(),
        };
        let age = |point: &Point| self.earlier.now.duration_since(point.peek.made).unwrap_or_default().as_secs();
        let resumes = point.is_some_and(|point| point.peek.memory.is_some());
        Start {
            key: self.plan.start,
            from: match point {
                None => Origin::Base,
                Some(Point { done: 0, .. }) => Origin::BootedBase,
                Some(_) => Origin::Checkpoint,
            },
            done: self.first_runs,
            age_seconds: point.map(age),
            estimate_seconds: if resumes { Some(RESUME) } else { times.boot() },
        }
    }

    fn step(&self, step: usize, times: &Times<'_>) -> StepLine {
        let planned = &self.plan.steps[step];
        let line = if step < self.first_runs {
            let age = match &self.decision.reuse {
                Reuse::Image(found) => found.record.steps.get(step).map(|step| step.age(self.earlier.now)),
                Reuse::Points(_) => self.made.age(step, self.first_runs - 1, self.earlier.now),
            };
            Line::cached(planned.key, age)
        } else {
            Line::runs(planned.key, times.step(planned), self.why(step))
        };
        StepLine { name: planned.name.clone(), kind: planned.kind, line }
    }

    /// Why a step runs: an option or policy that names it; age, or that nothing
    /// is kept, when it ran before as it is; otherwise what has changed.
    fn why(&self, step: usize) -> Reason {
        let refused = self.decision.refused.get(step).copied().flatten();
        let own = |cause| Reason { causes: vec![cause], since: None };
        match refused {
            Some(Refusal::Fresh) => return own(Cause::Fresh),
            Some(Refusal::NoCache) => return own(Cause::NoCache),
            Some(Refusal::From(from)) if from == step => return own(Cause::From),
            _ => {}
        }
        let (spec, ran_before) = (self.template.steps.get(step), self.ran_before(step));
        if !ran_before && self.reference.is_none() {
            return own(Cause::NotBaked { name: self.template.name.clone() });
        }
        if spec.is_some_and(|spec| spec.cache == Cache::Never) {
            return own(Cause::Never);
        }
        if !ran_before && let Some(reference) = self.reference {
            return self.change(step, reference);
        }
        own(match refused {
            Some(Refusal::From(before) | Refusal::Never(before)) => Cause::After { step: before + 1 },
            Some(Refusal::TooOld { step: before, .. }) if before < step => Cause::After { step: before + 1 },
            Some(Refusal::TooOld { age, limit, .. }) => {
                let own = spec.is_some_and(|spec| spec.cache != self.template.max_age);
                Cause::TooOld { age, limit, own }
            }
            _ => self.not_kept(step),
        })
    }

    /// Whether the very same step after the very same steps is known to have
    /// run.
    fn ran_before(&self, step: usize) -> bool {
        let key = self.plan.steps[step].key;
        let recorded = || self.earlier.records.iter().flat_map(|record| &record.steps).any(|step| Some(step.key) == key);
        self.made.is_kept(step) || key.is_some() && recorded()
    }

    fn not_kept(&self, step: usize) -> Cause {
        let took = Times(self.earlier.records).step(&self.plan.steps[step]);
        if self.template.steps.get(step).is_some_and(|spec| !spec.checkpoint) {
            Cause::CheckpointOff
        } else if took.is_some_and(|seconds| seconds < CHEAP.as_secs_f64()) {
            Cause::Cheap
        } else {
            Cause::NotKept
        }
    }

    /// What makes a step's key another one than in `reference`.
    fn change(&self, step: usize, reference: &Record) -> Reason {
        let mut causes = Vec::new();
        if step == 0 && self.plan.base.is_some() {
            causes.extend(self.start_change(reference));
        }
        causes.extend(self.own_change(step, reference));
        if causes.is_empty() && self.plan.base.is_none() {
            return Reason { causes: vec![Cause::NoBase], since: None };
        }
        // The first step that was never run as it is; all after it follow.
        let first = (0..step).find(|before| !self.ran_before(*before));
        if causes.is_empty() {
            match first {
                Some(first) => return Reason { causes: vec![Cause::After { step: first + 1 }], since: None },
                None => causes.push(self.place_change(step, reference)),
            }
        }
        self.since(causes, reference)
    }

    fn since(&self, causes: Vec<Cause>, reference: &Record) -> Reason {
        let finished = UNIX_EPOCH + Duration::from_secs(reference.finished);
        let ago = self.earlier.now.duration_since(finished).unwrap_or_default();
        Reason { causes, since: Some(Since { bake: reference.bake.clone(), ago }) }
    }

    /// What makes the machine before its first step another one.
    fn start_change(&self, reference: &Record) -> Option<Cause> {
        match (self.plan.base, self.plan.start) {
            (Some(base), _) if base != reference.base => {
                Some(Cause::Base { was: reference.base_label.clone(), is: self.template.base.label() })
            }
            (Some(base), Some(start)) if start != reference.start => {
                // With the other's place, would it be the same?
                let cloud = reference.cloud.first().map(|image| image.builder.as_str());
                let (there, _) = start_key(&base, self.plan.disk_size, cloud);
                Some(if there == reference.start { Cause::Builder } else { Cause::DiskSize })
            }
            (Some(_), _) => None,
            (None, _) => Some(Cause::NoBase),
        }
    }

    /// What has changed in a step itself.
    fn own_change(&self, step: usize, reference: &Record) -> Option<Cause> {
        let planned = &self.plan.steps[step];
        if reference.steps.iter().any(|other| same(planned, other)) {
            return None;
        }
        // A default name may by now be that of another step: `shell-2`.
        let moved = |other: &StepRecord| self.plan.steps.iter().any(|planned| same(planned, other));
        let Some(was) = reference.steps.iter().find(|other| other.name == planned.name && !moved(other)) else {
            return Some(Cause::New);
        };
        if was.kind != planned.kind {
            return Some(Cause::Kind { was: was.kind.clone(), is: planned.kind });
        }
        Some(Cause::Parts(Changes::between(&was.parts, &planned.parts)))
    }

    /// Where a step stood that is itself unchanged, and what stood before it.
    fn place_change(&self, step: usize, reference: &Record) -> Cause {
        let planned = &self.plan.steps[step];
        let after = reference.steps.iter().enumerate().skip(step + 1);
        let Some(was) = after.filter(|(_, other)| same(planned, other)).map(|(at, _)| at).next() else { return Cause::New };
        let stays = |other: &StepRecord| self.plan.steps.iter().any(|planned| same(planned, other) || planned.name == other.name);
        let gone = reference.steps[step..was].iter().filter(|other| !stays(other));
        let names: Vec<String> = gone.map(|other| other.name.clone()).collect();
        if names.is_empty() { Cause::Moved { was: was + 1 } } else { Cause::Removed { names } }
    }

    fn seal(&self, times: &Times<'_>) -> Result<Line> {
        let key = self.plan.seal;
        if let Reuse::Image(found) = &self.decision.reuse {
            let finished = UNIX_EPOCH + Duration::from_secs(found.record.finished);
            return Ok(Line::cached(key, self.earlier.now.duration_since(finished).ok()));
        }
        let own = |cause| Reason { causes: vec![cause], since: None };
        let reason = if self.first_runs < self.plan.steps.len() {
            own(Cause::After { step: self.first_runs + 1 })
        } else if self.options.fresh {
            own(Cause::Fresh)
        } else if self.options.no_cache {
            own(Cause::NoCache)
        } else if let Some(found) = &self.decision.unfit {
            self.since(vec![Cause::Config], &found.record)
        } else if let Some(record) = self.earlier.records.iter().rev().find(|record| Some(record.seal) == key) {
            own(if (self.earlier.image)(record)?.is_some() { Cause::ImageOld } else { Cause::ImageGone })
        } else if let Some(reference) = self.reference {
            let mut causes: Vec<Cause> = self.start_change(reference).into_iter().collect();
            let changes = Changes::between(&reference.seal_parts, &self.plan.seal_parts);
            if !changes.is_empty() {
                causes.push(Cause::Parts(changes));
            }
            if causes.is_empty() { own(Cause::NotSealed) } else { self.since(causes, reference) }
        } else {
            own(Cause::NotBaked { name: self.template.name.clone() })
        };
        Ok(Line::runs(key, times.seal(), reason))
    }

    fn tests(&self, seal: &Line, times: &Times<'_>) -> Line {
        let key = self.plan.tests;
        match &self.decision.reuse {
            Reuse::Image(found) if found.tested => Line::cached(key, seal.age_seconds.map(Duration::from_secs)),
            Reuse::Image(found) => {
                let reason = match found.record.tests {
                    Some(tests) if Some(tests) != key => self.since(vec![Cause::Tests], &found.record),
                    _ => Reason { causes: vec![Cause::NotTested], since: None },
                };
                Line::runs(key, times.tests(), reason)
            }
            Reuse::Points(_) => Line::runs(key, times.tests(), Reason { causes: vec![Cause::AfterSeal], since: None }),
        }
    }
}

/// Whether a step is made of what another one was.
fn same(planned: &PlannedStep, other: &StepRecord) -> bool {
    planned.kind == other.kind && planned.parts == other.parts
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, cause) in self.causes.iter().enumerate() {
            write!(f, "{}{cause}", if number == 0 { "" } else { "; " })?;
        }
        match &self.since {
            Some(since) => write!(f, " since bake {} ({} ago)", since.bake, span(since.ago)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCache => write!(f, "--no-cache"),
            Self::Fresh => write!(f, "--fresh"),
            Self::From => write!(f, "--from names it"),
            Self::Never => write!(f, "`cache = false`"),
            Self::After { step } => write!(f, "after step {step}, which runs"),
            Self::AfterSeal => write!(f, "after the seal, which runs"),
            Self::NotBaked { name } => write!(f, "no bake of `{name}` is known"),
            Self::NoBase => write!(f, "the base is fetched first"),
            Self::Base { was, is } if was == is => write!(f, "the base changed"),
            Self::Base { was, is } => write!(f, "the base changed from {was} to {is}"),
            Self::DiskSize => write!(f, "`[disk] size` changed"),
            Self::Builder => write!(f, "it was baked elsewhere, by another builder"),
            Self::Parts(changes) => fmt::Display::fmt(changes, f),
            Self::Kind { was, is } => write!(f, "it changed from `{was}` to `{is}`"),
            Self::New => write!(f, "it is new"),
            Self::Moved { was } => write!(f, "the order changed (it was step {was})"),
            Self::Removed { names } => {
                let were = if names.len() == 1 { "was" } else { "were" };
                write!(f, "{}, before it, {were} removed", list(names.iter().take(NAMED), names.len().saturating_sub(NAMED)))
            }
            Self::TooOld { age, limit, own } => {
                let (age, limit) = (span(*age), limit_span(*limit));
                let more = if age == limit { "more than " } else { "" };
                write!(f, "ran {more}{age} ago, and {} is {limit}", if *own { "its `cache`" } else { "max_age" })
            }
            Self::CheckpointOff => write!(f, "no checkpoint is kept after it: `checkpoint = false`"),
            Self::Cheap => write!(f, "no checkpoint is kept after it: it takes less time to run than to keep"),
            Self::NotKept => write!(f, "no checkpoint is kept after it: there was no room, or it was pruned"),
            Self::NotSealed => write!(f, "these steps were never sealed"),
            Self::ImageGone => write!(f, "its image is no longer in the store"),
            Self::ImageOld => write!(f, "a step in its image ran too long ago"),
            Self::Config => write!(f, "the disk is the same, and labels or names of steps changed"),
            Self::Tests => write!(f, "the tests changed"),
            Self::NotTested => write!(f, "the image has not passed them"),
        }
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [(&self.changed, ""), (&self.added, " added"), (&self.removed, " removed")];
        let total: usize = kinds.iter().map(|(names, _)| names.len()).sum();
        let alone = kinds.iter().filter(|(names, _)| !names.is_empty()).count() == 1;
        let (mut room, mut said) = (NAMED, String::new());
        for (names, what) in kinds {
            let named = names.len().min(room);
            room -= named;
            if named == 0 {
                continue;
            }
            let more = if alone { total - named } else { 0 };
            let verb = match (what, named + more) {
                ("", _) => " changed",
                (_, 1) => " was",
                _ => " were",
            };
            let comma = if said.is_empty() { "" } else { ", " };
            write!(said, "{comma}{}{verb}{what}", list(names.iter().take(named), more))?;
        }
        f.write_str(&said)?;
        if !alone && total > NAMED {
            write!(f, ", and {} more", total - NAMED)?;
        }
        Ok(())
    }
}

/// Names in a sentence: `a`, `b` and `c`; or `a`, `b`, `c` and 4 more.
fn list<'a>(names: impl Iterator<Item = &'a String>, more: usize) -> String {
    let mut names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    if more > 0 {
        names.push(format!("{more} more"));
    }
    match names.split_last() {
        Some((last, before)) if !before.is_empty() => format!("{} and {last}", before.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
#[path = "explain_tests.rs"]
mod tests;
