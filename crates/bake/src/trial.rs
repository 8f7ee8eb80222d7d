//! Tests: on throwaway machines that start from the finished image.
//!
//! Tests with the same user data share one machine. It runs those of the first
//! boot in their order, and, where some want that, reboots and runs those of the
//! second one. All of them run, whatever fails; a machine that is lost fails the
//! test that lost it and those that were still to come.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kiln_model::base::{Base, BaseDisk};
use kiln_model::checkpoint::Hold;
use kiln_model::event::{Event, Phase};
use kiln_model::guest::{Command, GuestExt as _};
use kiln_model::history::Record;
use kiln_model::image::Config;
use kiln_model::machine::{Context, Machine, Start};
use kiln_model::provision::{Case, Outcome};
use kiln_model::trial::{Results, Tested, Trial};
use kiln_model::{Code, Digest, Error, Key, Result};

use crate::bake::Stores;
use crate::plan::{Plan, all_tests, test_keys};
use crate::resume::Found;
use crate::since_1970;
use crate::step;
use crate::template::{Boot, StepSpec, Template};

/// How long a reboot may take.
const REBOOT: Duration = Duration::from_secs(600);

/// How many failures an error shows.
const SHOWN: usize = 20;

/// The disk of an image as something to start machines from, as long as the
/// hold lives.
pub type Unpacked = Pin<Box<dyn Future<Output = Result<(Base, Hold)>> + Send>>;

/// Unpacks the disk of an image of the store.
pub type Unpack<'a> = &'a (dyn Fn(Digest, Context) -> Unpacked + Send + Sync);

/// What tests need beside a template.
#[derive(Clone, Copy)]
pub struct Testing<'a> {
    /// What earlier tests have found.
    pub results: &'a Arc<dyn Results>,
    /// See [`Unpack`].
    pub unpack: Unpack<'a>,
    /// Is told of every trial when it has ended, however it did.
    pub told: &'a (dyn Fn(&Trial) + Send + Sync),
}

/// An image of the store to be tested.
#[derive(Debug, Clone)]
pub struct Tried {
    /// Digest of its manifest.
    pub image: Digest,
    /// What results are kept by ([`Record::tested_disk`]).
    pub disk: Digest,
    /// Its config.
    pub config: Config,
}

impl Tried {
    /// The image of a record; `None` where nothing stands for its disk.
    pub(crate) fn of(record: &Record, config: Config) -> Option<Self> {
        Some(Self { image: record.image, disk: record.tested_disk()?, config })
    }
}

/// Runs the tests of `template` on an image of the store: those that its disk
/// has not passed yet, or all of them `again`.
///
/// # Errors
/// When they cannot be carried out. That some fail is no error.
pub async fn test(template: &Template, image: &Tried, again: bool, testing: &Testing<'_>, context: &Context) -> Result<Trial> {
    let began = Instant::now();
    let keys = test_keys(&template.tests)?;
    let mut found = BTreeMap::new();
    for (at, key) in keys.iter().enumerate().filter(|_| !again) {
        if let Some(tested) = testing.results.passed(&image.disk, key)? {
            let name = template.tests.get(at).map_or(tested.name, |spec| spec.common.name.clone());
            let tested = Tested { name, cached: true, ..tested };
            let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(tested.finished)).ok();
            context.reports.cached(Phase::Test, &tested.name, age);
            context.reports.event(Event::Tested(tested.clone()));
            found.insert(at, tested);
        }
    }
    let left: Vec<usize> = (0..keys.len()).filter(|at| !found.contains_key(at)).collect();
    if !left.is_empty() {
        for spec in left.iter().filter_map(|at| template.tests.get(*at)) {
            step::ready(std::slice::from_ref(spec)).await?;
        }
        let label = format!("{} {}", image.config.name, image.config.version);
        let (base, _hold): (Base, Hold) = if template.builder.at_cloud() && !image.config.cloud.is_empty() {
            let Config { cloud, firmware, architecture, credentials, .. } = image.config.clone();
            (Base { label, disk: BaseDisk::Cloud(cloud), firmware, architecture, credentials: credentials.then_some(true) }, Arc::new(()))
        } else {
            let (base, hold) = (testing.unpack)(image.image, context.clone()).await?;
            (Base { label, ..base }, hold)
        };
        let new = run(template, &keys, &left, &base, context).await?;
        for tested in new.values() {
            testing.results.keep(&image.disk, tested)?;
        }
        found.extend(new);
    }
    let trial = trial(template, &keys, found, began);
    (testing.told)(&trial);
    Ok(trial)
}

/// Runs all tests of `template`, where that is wanted, on a disk whose digest
/// nobody knows yet.
pub(crate) async fn test_new(template: &Template, wanted: bool, disk: BaseDisk, base: &Base, context: &Context) -> Result<Option<Trial>> {
    if !wanted || template.tests.is_empty() {
        return Ok(None);
    }
    let began = Instant::now();
    let keys = test_keys(&template.tests)?;
    let image = Base { label: format!("{} {}", template.name, template.version), disk, ..base.clone() };
    let all: Vec<usize> = (0..keys.len()).collect();
    let found = run(template, &keys, &all, &image, context).await?;
    Ok(Some(trial(template, &keys, found, began)))
}

/// Runs those tests that the image of an earlier bake has not passed yet.
pub(crate) async fn test_found(
    template: &Template,
    reasons: &[String],
    found: &Found,
    wanted: bool,
    stores: &Stores<'_>,
    context: &Context,
) -> Result<Option<Trial>> {
    let Some(testing) = stores.testing.as_ref().filter(|_| wanted && !template.tests.is_empty()) else { return Ok(None) };
    let config = (stores.image)(&found.record)?;
    let Some(tried) = config.and_then(|config| Tried::of(&found.record, config)) else { return Ok(None) };
    for reason in reasons.iter().filter(|_| !found.tested) {
        context.reports.note(reason.clone());
    }
    test(template, &tried, false, testing, context).await.map(Some)
}

/// The record of an image that was there, with what its tests have come to.
pub(crate) fn tested(template: &Template, plan: &Plan, record: &Record, trial: Option<&Trial>, stores: &Stores<'_>) -> Result<Record> {
    let ran = trial.filter(|trial| trial.tests.iter().any(|test| !test.cached));
    let Some(trial) = ran else { return Ok(record.clone()) };
    let tests = plan.tests.filter(|_| !trial.failed());
    let record = Record { name: template.name.clone(), tests, test_seconds: trial.seconds, ..record.clone() };
    stores.history.add(&record)?;
    Ok(record)
}

/// The error for an image that is in the store and whose tests failed.
pub(crate) fn refuse_failed(template: &Template, record: &Record, trial: Option<&Trial>, context: &Context) -> Result<()> {
    let Some(trial) = trial.filter(|trial| trial.failed()) else { return Ok(()) };
    let (name, version, digest) = (template.name.clone(), template.version.clone(), record.image);
    let next = format!(
        "the image is in the store, marked as failed: `kiln run {name}@{digest}` boots it; a mended test is tried by the same bake, \
         which then bakes nothing"
    );
    let error = failure(&format!("{name}:{version}"), trial, next);
    context.reports.event(Event::Failed { name, version, digest, disk_digest: record.disk });
    Err(error)
}

fn trial(template: &Template, keys: &[Key], found: BTreeMap<usize, Tested>, began: Instant) -> Trial {
    let tests = found.into_values().collect();
    Trial { suite: template.name.clone(), key: all_tests(keys), tests, seconds: began.elapsed().as_secs_f64() }
}

/// The error of an image whose tests failed; `next` says what to do.
pub fn failure(title: &str, trial: &Trial, next: impl Into<String>) -> Error {
    let failed: Vec<&Tested> = trial.tests.iter().filter(|test| test.failed()).collect();
    let cases = failed.iter().flat_map(|test| test.failures().map(|(case, why)| (test.full_name(case), why)));
    let cases: Vec<(String, &str)> = cases.collect();
    let what = match (&failed[..], &cases[..]) {
        ([test], [(_, why)]) => format!("{title} failed its test `{}`: {}", test.name, first_line(why)),
        ([test], _) => format!("{title} failed its test `{}`: {} things are wrong", test.name, cases.len()),
        _ => {
            let names: Vec<String> = failed.iter().map(|test| format!("`{}`", test.name)).collect();
            format!("{title} failed {} of its {} tests: {}", failed.len(), trial.tests.len(), names.join(", "))
        }
    };
    let mut error = Error::new(Code::Test, what).next(next);
    if let Some(first) = failed.first() {
        error = error.step(&first.name);
    }
    let mut shown: Vec<String> = cases.iter().take(SHOWN).map(|(name, why)| format!("{name}: {why}")).collect();
    if cases.len() > SHOWN {
        shown.push(format!("and {} more", cases.len() - SHOWN));
    }
    error.detail(shown.join("\n"))
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Runs some of the tests, on one machine for each user data.
async fn run(template: &Template, keys: &[Key], which: &[usize], base: &Base, context: &Context) -> Result<BTreeMap<usize, Tested>> {
    let mut machines: Vec<(&Option<Vec<u8>>, Room<'_>)> = Vec::new();
    for (at, (spec, key)) in template.tests.iter().zip(keys).enumerate().filter(|(at, _)| which.contains(at)) {
        let one = One { at, spec, key: *key, cases: Vec::new(), seconds: 0.0 };
        match machines.iter_mut().find(|(user_data, _)| *user_data == &spec.user_data) {
            Some((_, room)) => room.tests.push(one),
            None => machines.push((&spec.user_data, Room { template, context, tests: vec![one], lost: None })),
        }
    }
    let mut found = BTreeMap::new();
    for (user_data, mut room) in machines {
        room.run(user_data.clone(), base).await?;
        found.extend(room.tests.into_iter().map(|test| (test.at, test.finish(context))));
    }
    Ok(found)
}

/// A test that is being carried out.
struct One<'a> {
    at: usize,
    spec: &'a StepSpec,
    key: Key,
    cases: Vec<Case>,
    seconds: f64,
}

impl One<'_> {
    fn finish(self, context: &Context) -> Tested {
        let clean = |text: String| context.reports.redactor().clean(&text);
        let cases = self.cases.into_iter().map(|case| {
            let outcome = match case.outcome {
                Outcome::Passed => Outcome::Passed,
                Outcome::Skipped(why) => Outcome::Skipped(clean(why)),
                Outcome::Failed(why) => Outcome::Failed(clean(why)),
            };
            Case { name: clean(case.name), outcome, ..case }
        });
        let tested = Tested {
            name: self.spec.common.name.clone(),
            kind: self.spec.provisioner.kind().to_owned(),
            key: self.key,
            cases: cases.collect(),
            seconds: self.seconds,
            finished: since_1970(SystemTime::now()),
            cached: false,
        };
        context.reports.event(Event::Tested(tested.clone()));
        tested
    }
}

/// The tests of one machine.
struct Room<'a> {
    template: &'a Template,
    context: &'a Context,
    tests: Vec<One<'a>>,
    /// Why there is no machine any more.
    lost: Option<String>,
}

impl Room<'_> {
    async fn run(&mut self, user_data: Option<Vec<u8>>, base: &Base) -> Result<()> {
        let start = Start { user_data, ..Start::default() };
        let span = self.context.reports.begin(Phase::Boot, "boot");
        let machine = match self.template.builder.start(base, &start, self.context).await {
            Ok(machine) => Some(machine),
            Err(error) => {
                self.lose(error, "the image did not start")?;
                None
            }
        };
        let _ = span.end(false);
        let done = self.boots(machine.as_deref()).await;
        if let Some(machine) = machine {
            machine.kill().await;
        }
        done
    }

    /// Takes note that the machine is gone, where `error` says so; passes on
    /// what no image can be blamed for.
    fn lose(&mut self, error: Error, what: &str) -> Result<()> {
        if !matches!(error.kind(), Code::Unreachable | Code::MachineEnded | Code::Timeout) {
            return Err(error);
        }
        let details: String = error.details().iter().map(|detail| format!("\n{detail}")).collect();
        self.lost.get_or_insert(format!("{what}: {}{details}", error.chain()));
        Ok(())
    }

    async fn boots(&mut self, machine: Option<&dyn Machine>) -> Result<()> {
        if let Some(machine) = machine
            && let Err(error) = crate::settle(&*machine.guest()).await
        {
            self.lose(error, "the image did not come up")?;
        }
        self.tests(machine, Boot::is_first, "").await?;
        if self.tests.iter().any(|test| test.spec.boot.is_again()) {
            if let Some(machine) = machine.filter(|_| self.lost.is_none())
                && let Err(error) = reboot(machine, self.context).await
            {
                self.lose(error, "the image did not reboot")?;
            }
            self.tests(machine, Boot::is_again, " after a reboot").await?;
        }
        Ok(())
    }

    /// Runs the tests of one boot.
    async fn tests(&mut self, machine: Option<&dyn Machine>, now: fn(Boot) -> bool, when: &str) -> Result<()> {
        for at in 0..self.tests.len() {
            let (template, context) = (self.template, self.context);
            let Some(spec) = self.tests.get(at).map(|test| test.spec).filter(|spec| now(spec.boot)) else { continue };
            let began = Instant::now();
            let mut cases = Vec::new();
            if let Some(machine) = machine.filter(|_| self.lost.is_none()) {
                let span = context.reports.begin(Phase::Test, &spec.common.name);
                match step::test(machine, spec, &template.secrets, context).await {
                    Ok(found) => cases = found,
                    Err(error) => {
                        let error = machine.explain(error).await;
                        self.lose(error, "the machine was lost")?;
                    }
                }
                if !cases.iter().any(|case| case.outcome.failed()) && self.lost.is_none() {
                    let _ = span.end(false);
                }
            }
            if let (Some(lost), true) = (&self.lost, cases.is_empty()) {
                cases.push(Case { name: spec.common.name.clone(), seconds: 0.0, outcome: Outcome::Failed(lost.clone()) });
            }
            let cases = cases.into_iter().map(|case| Case { name: format!("{}{when}", case.name), ..case });
            if let Some(test) = self.tests.get_mut(at) {
                test.cases.extend(cases);
                test.seconds += began.elapsed().as_secs_f64();
            }
        }
        Ok(())
    }
}

/// Starts the guest anew, and waits until it has started what it starts.
async fn reboot(machine: &dyn Machine, context: &Context) -> Result<()> {
    let guest = machine.guest();
    let span = context.reports.begin(Phase::Boot, "reboot");
    let before = guest.boot_id().await?;
    let command = Command::new("systemctl reboot || reboot");
    let back = guest.wait_for_new_boot(&before, REBOOT);
    tokio::pin!(back);
    tokio::select! {
        error = machine.ended() => return Err(error),
        back = &mut back => back?,
        // Whether the command still answers nobody knows: what counts is the
        // new boot id.
        _ = async {
            let _ = guest.output(&command).await;
            std::future::pending::<()>().await;
        } => {}
    }
    crate::settle(&*guest).await?;
    let _ = span.end(false);
    Ok(())
}

#[cfg(test)]
#[path = "trial_tests.rs"]
mod tests;
