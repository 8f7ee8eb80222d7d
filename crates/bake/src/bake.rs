//! The bake, from top to bottom in one function; and the first half of it, for
//! who wants the machine and no image.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kiln_model::account::Witness;
use kiln_model::base::{Base, BaseDisk};
use kiln_model::block::{ImageSink, Published};
use kiln_model::checkpoint::{Checkpoint, CheckpointCache, Hold};
use kiln_model::cleanup::Ticket;
use kiln_model::event::{Baked, Event, Phase, StepReport};
use kiln_model::guest::SshAccess;
use kiln_model::history::{History, Record, StepRecord};
use kiln_model::image::{self, CloudImage, Config, DiskConfig, DiskRecord, StepConfig};
use kiln_model::machine::{Context, Machine, Naming, Start, Stopped};
use kiln_model::trial::Trial;
use kiln_model::{Code, Digest, Error, Key, Result};

use crate::account::Teller;
use crate::keep::{self, Keeper};
use crate::plan::Plan;
use crate::resume::{Decision, Earlier, Point, Reuse};
use crate::seal::{self, Seal, Traces};
use crate::template::Template;
use crate::trial::{self, Testing};
use crate::{explain, resume, step};

/// What to do with the machine when a step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// Remove it.
    #[default]
    Clean,
    /// Keep its disk and say how to boot it.
    Keep,
    /// Open a shell on it as it is, then remove it.
    Shell,
}

/// Opens a shell on a guest for a person, and returns when it is closed.
pub type OpenShell<'a> = &'a (dyn Fn(SshAccess) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> + Send + Sync);

/// How to bake.
pub struct Options<'a> {
    /// What to do anew.
    pub resume: resume::Options,
    /// Run the template's tests.
    pub test: bool,
    /// Read back the disk of an image that is captured at a cloud.
    pub fetch: bool,
    /// What to do with the machine when a step fails.
    pub on_failure: OnFailure,
    /// For [`OnFailure::Shell`].
    pub open_shell: OpenShell<'a>,
}

/// Gives the config of a record's image, as long as the store has it whole.
pub type FindImage<'a> = &'a (dyn Fn(&Record) -> Result<Option<Config>> + Send + Sync);

/// Where a bake keeps what it makes, and finds what earlier ones have made.
pub struct Stores<'a> {
    /// Images.
    pub sink: &'a Arc<dyn ImageSink>,
    /// Machines after steps.
    pub cache: &'a Arc<dyn CheckpointCache>,
    /// What earlier bakes were made of.
    pub history: &'a Arc<dyn History>,
    /// See [`FindImage`].
    pub image: FindImage<'a>,
    /// Told of every image that was baked, or found to be there.
    pub witness: Option<&'a Arc<dyn Witness>>,
    /// What tests need. None: none are run.
    pub testing: Option<Testing<'a>>,
}

/// Bakes `template` into the stores.
///
/// Everything made on the way is registered in the context's scope; the caller
/// unwinds it however this ends, also when this future is dropped.
///
/// # Errors
/// The first one, naming the step; the store then holds no trace of the bake.
/// With [`Code::Test`] it holds the image, without a name and marked as failed.
pub async fn bake(template: &Template, options: &Options<'_>, stores: &Stores<'_>, context: &Context) -> Result<Baked> {
    let began = Instant::now();
    context.reports.event(Event::Started {
        bake: context.bake.clone(),
        name: template.name.clone(),
        version: template.version.clone(),
        steps: template.steps.len(),
    });

    let teller = Teller::begin(template, stores.witness).await?;
    let ground = Ground::get(template, options, stores, context).await?;
    let Ground { base, digest: base_digest, record: base_record, plan, .. } = &ground;

    // One bake makes an image; others of the same key take what it made.
    let seal_key = known(plan.seal)?;
    let (_image_turn, _) = keep::claim(stores.cache, &seal_key, "this very image", context).await?;
    let mut decided = decide(template, plan, options, stores)?;
    if let Reuse::Image(found) = &decided.decision.reuse
        && let Some(why) = unusable(template, options, &found.record, context).await?
    {
        context.reports.note(why);
        let machine = resume::Options { machine: true, ..options.resume.clone() };
        decided = decide_with(template, plan, &machine, options, stores)?;
        // They would be those of an image that is not there.
        decided.reasons.clear();
    }
    if let Reuse::Image(found) = &decided.decision.reuse {
        let trial = trial::test_found(template, &decided.reasons, found, options.test, stores, context).await?;
        let record = trial::tested(template, plan, &found.record, trial.as_ref(), stores)?;
        teller.tell(template, plan, &record, trial.as_ref(), context).await?;
        trial::refuse_failed(template, &record, trial.as_ref(), context)?;
        let baked = reuse_image(template, plan, &decided, &record, stores, context, began)?;
        context.reports.event(Event::Baked(baked.clone()));
        return Ok(baked);
    }
    let run = provisioned(template, &ground, decided, options, stores, context).await?;
    if let Err(error) = prepare_seal(template, &run, context).await {
        return Err(give_up(run, error, options, context).await);
    }
    let Run { machine, mut keeper, steps, .. } = run;
    let sealing = Instant::now();
    let (mut stopped, checked) = stop_and_check(machine, &template.keep, context).await?;

    let captured = capture(template, options, &mut *stopped, base, base_record.as_ref(), stores.sink, context).await?;
    let Captured { record, cloud, trial } = captured;
    let test_seconds = trial.as_ref().ok().and_then(Option::as_ref).map_or(0.0, |trial| trial.seconds);
    let seal_seconds = sealing.elapsed().as_secs_f64() - test_seconds;

    let config = config(template, &steps, base, *base_digest, record.as_ref(), &cloud);
    let annotations = BTreeMap::from([
        (image::CREATED.to_owned(), jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        (image::BAKE.to_owned(), context.bake.clone()),
    ]);
    let disk_digest = record.as_ref().map(|record| record.digest);
    let mut tickets = Vec::new();
    if let Some(at_cloud) = stopped.at_cloud() {
        at_cloud.finish().await?;
        tickets = at_cloud.tickets();
    }
    // What failed, or nobody could test, gets no name.
    let passed = trial.as_ref().is_ok_and(|trial| trial.as_ref().is_none_or(|trial| !trial.failed()));
    let digest = publish(stores.sink, config, record, annotations, tickets, passed, context).await?;
    if let Some(at_cloud) = stopped.at_cloud() {
        at_cloud.recorded(&digest).await;
    }
    keeper.finish().await;
    let ran = matches!(&trial, Ok(Some(_)));
    let record = Record {
        bake: context.bake.clone(),
        name: template.name.clone(),
        version: template.version.clone(),
        finished: since_1970(SystemTime::now()),
        base_label: base.label.clone(),
        base: *base_digest,
        start: known(plan.start)?,
        boot: keeper.boot,
        steps: steps.iter().map(|step| step.record.clone()).collect(),
        seal: seal_key,
        seal_parts: plan.seal_parts.clone(),
        seal_seconds,
        checked: Some(checked),
        tests: plan.tests.filter(|_| ran && passed),
        test_seconds,
        image: digest,
        disk: disk_digest,
        cloud: cloud.clone(),
        base_at_cloud: matches!(base.disk, BaseDisk::Cloud(_)),
    };
    stores.history.add(&record)?;
    let (trial, error) = match trial {
        Ok(trial) => (trial, None),
        Err(error) => (None, Some(error)),
    };
    if let (Some(trial), Some(testing), Some(disk)) = (&trial, &stores.testing, record.tested_disk()) {
        trial.tests.iter().try_for_each(|tested| testing.results.keep(&disk, tested))?;
        (testing.told)(trial);
    }
    teller.tell(template, plan, &record, trial.as_ref(), context).await?;
    if let Some(error) = error {
        return Err(error.next(format!("the image is in the store, untested: {}@{digest}; the same bake again tests it", template.name)));
    }
    trial::refuse_failed(template, &record, trial.as_ref(), context)?;

    let baked = Baked {
        name: template.name.clone(),
        version: template.version.clone(),
        arch: base.architecture.clone(),
        digest,
        disk_digest,
        steps: steps.into_iter().map(|step| step.report).collect(),
        artifacts: artifacts(&cloud),
        seconds: began.elapsed().as_secs_f64(),
    };
    context.reports.event(Event::Baked(baked.clone()));
    Ok(baked)
}

/// Opens a shell on the machine as it is after all steps of `template`, and
/// ends it with the shell. Goes on from where earlier bakes came to, and keeps
/// checkpoints as a bake does; no image is made. Who wants the machine before
/// some step leaves that one and all after it out of the template.
///
/// # Errors
/// When the machine does not get there, or no shell can be opened.
pub async fn shell(template: &Template, options: &Options<'_>, stores: &Stores<'_>, context: &Context) -> Result<()> {
    let ground = Ground::get(template, options, stores, context).await?;
    let decided = decide(template, &ground.plan, options, stores)?;
    let Run { machine, mut keeper, .. } = provisioned(template, &ground, decided, options, stores, context).await?;
    keeper.finish().await;
    let Some(access) = machine.guest().ssh_access() else {
        machine.kill().await;
        return Err(Error::new(Code::Unreachable, "this machine cannot be reached by SSH"));
    };
    let names: Vec<String> = template.steps.iter().map(|step| format!("`{}`", step.common.name)).collect();
    let holds = match names.len() {
        0 => format!("the machine is {} before any step", ground.base.label),
        1 => format!("the machine holds {} and the step {}", ground.base.label, names.concat()),
        _ => format!("the machine holds {} and the steps {}", ground.base.label, names.join(", ")),
    };
    context.reports.note(format!("{holds}; nothing that is done in this shell is kept"));
    let mut shell = (options.open_shell)(access);
    tokio::select! {
        closed = &mut shell => {
            machine.kill().await;
            closed
        }
        error = machine.ended() => {
            context.reports.warn(error.chain());
            machine.kill().await;
            // It sees that its connection is gone, and gives the terminal back.
            shell.await
        }
    }
}

/// What a machine is made of: the base, and every step with its key.
struct Ground {
    base: Base,
    /// Its disk digest, or what stands for it where it is at a cloud.
    digest: Digest,
    /// The base's blocks in the store; none where they are at a cloud.
    record: Option<DiskRecord>,
    disk_size: u64,
    plan: Plan,
}

impl Ground {
    async fn get(template: &Template, options: &Options<'_>, stores: &Stores<'_>, context: &Context) -> Result<Self> {
        let (base, digest, record) = get_base(template, options.resume.fresh, stores.sink, context).await?;
        let disk_size = disk_size(template, &base)?;
        let plan = Plan::new(template, Some(digest))?;
        Ok(Self { base, digest, record, disk_size, plan })
    }
}

/// A machine on its way through the steps.
struct Run<'a> {
    machine: Box<dyn Machine>,
    keeper: Keeper<'a>,
    traces: Traces,
    /// The steps that are done.
    steps: Vec<Done>,
    /// The right to run the next step.
    turn: Option<Hold>,
}

/// A step that is done, now or before.
struct Done {
    report: StepReport,
    record: StepRecord,
}

/// What is used of earlier bakes, and why the rest runs.
struct Decided {
    decision: Decision,
    reasons: Vec<String>,
    records: Vec<Record>,
}

fn decide(template: &Template, plan: &Plan, options: &Options<'_>, stores: &Stores<'_>) -> Result<Decided> {
    decide_with(template, plan, &options.resume, options, stores)
}

/// As [`decide`], with other wishes than the user's for what is done anew.
fn decide_with(template: &Template, plan: &Plan, anew: &resume::Options, options: &Options<'_>, stores: &Stores<'_>) -> Result<Decided> {
    let records = stores.history.records(&template.name)?;
    let passed = |disk: &Digest, test: &Key| match &stores.testing {
        Some(testing) => Ok(testing.results.passed(disk, test)?.is_some()),
        None => Ok(false),
    };
    let now = SystemTime::now();
    let earlier = Earlier { cache: &**stores.cache, records: &records, image: &stores.image, passed: &passed, now };
    let decision = resume::decide(template, plan, anew, &earlier)?;
    // Without a step that runs they would be those of the seal.
    let reasons = if options.resume.machine && decision.done() == plan.steps.len() {
        Vec::new()
    } else {
        explain::reasons(&explain::explain(template, plan, &options.resume, &earlier, &decision)?)
    };
    Ok(Decided { decision, reasons, records })
}

/// Why the image of an earlier bake will not do after all, where it is at a
/// cloud: that is for the cloud to say, so deciding leaves it out.
async fn unusable(template: &Template, options: &Options<'_>, record: &Record, context: &Context) -> Result<Option<String>> {
    if record.cloud.is_empty() {
        return Ok(None);
    }
    let title = format!("{}:{}", record.name, record.version);
    if options.fetch && record.disk.is_none() {
        return Ok(Some(format!("{title} was baked without --fetch, and its disk is wanted: baked again")));
    }
    if template.builder.still_there(&record.cloud, context).await? {
        return Ok(None);
    }
    Ok(Some(format!("{title} is not at its cloud any more as it should be: baked again")))
}

/// Images at a cloud as the `baked` event tells of them.
fn artifacts(cloud: &[CloudImage]) -> Vec<serde_json::Value> {
    cloud
        .iter()
        .map(|image| {
            serde_json::json!({
                "kind": image.builder, "region": image.region, "id": image.id, "snapshots": image.snapshots,
            })
        })
        .collect()
}

/// The image that an earlier bake made of exactly this.
fn reuse_image(
    template: &Template,
    plan: &Plan,
    decided: &Decided,
    record: &Record,
    stores: &Stores<'_>,
    context: &Context,
    began: Instant,
) -> Result<Baked> {
    let mut steps = Vec::with_capacity(plan.steps.len());
    for (spec, planned) in template.steps.iter().zip(&plan.steps) {
        context.reports.cached(Phase::Step, &spec.common.name, age_of(&decided.records, planned.key));
        steps.push(StepReport { name: spec.common.name.clone(), key: planned.known_key()?, cached: true, seconds: 0.0 });
    }
    if let Some(was) = stores.sink.name_again(&template.name, &template.version, &record.image)? {
        context.reports.note(format!("{}:{} was {was}, now {}", template.name, template.version, record.image));
    }
    Ok(Baked {
        name: template.name.clone(),
        version: template.version.clone(),
        arch: template.architecture.clone(),
        digest: record.image,
        disk_digest: record.disk,
        steps,
        artifacts: artifacts(&record.cloud),
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Takes the right to do what is to be done first, and decides again when
/// another bake had it: it may have left a checkpoint.
async fn take_turn(
    template: &Template,
    plan: &Plan,
    options: &Options<'_>,
    stores: &Stores<'_>,
    context: &Context,
    mut decided: Decided,
) -> Result<(Option<Hold>, Decided)> {
    loop {
        let next = match &decided.decision.reuse {
            Reuse::Points(points) => match points.first() {
                None => plan.start.map(|key| (key, "the same base ready".to_owned())),
                Some(point) => plan.steps.get(point.done).and_then(|step| step.key.map(|key| (key, format!("step `{}`", step.name)))),
            },
            Reuse::Image(_) => None,
        };
        let Some((key, what)) = next else { return Ok((None, decided)) };
        let (turn, waited) = keep::claim(stores.cache, &key, &what, context).await?;
        if !waited {
            return Ok((Some(turn), decided));
        }
        let again = decide(template, plan, options, stores)?;
        if again.decision.done() == decided.decision.done() && again.decision.starts() == decided.decision.starts() {
            return Ok((Some(turn), again));
        }
        decided = again;
    }
}

/// A machine on which all steps are done.
async fn provisioned<'a>(
    template: &'a Template,
    ground: &'a Ground,
    decided: Decided,
    options: &Options<'_>,
    stores: &Stores<'a>,
    context: &'a Context,
) -> Result<Run<'a>> {
    let (turn, decided) = take_turn(template, &ground.plan, options, stores, context, decided).await?;
    for reason in &decided.reasons {
        context.reports.note(reason.clone());
    }
    let mut run = get_machine(template, ground, &decided, turn, stores, context).await?;
    match provision(template, &ground.plan, &mut run, context).await {
        Ok(()) => Ok(run),
        Err(error) => Err(give_up(run, error, options, context).await),
    }
}

/// A machine as far as earlier bakes have brought it: from the deepest
/// checkpoint that can be used, or booted from the base.
async fn get_machine<'a>(
    template: &'a Template,
    ground: &'a Ground,
    decided: &Decided,
    turn: Option<Hold>,
    stores: &Stores<'a>,
    context: &'a Context,
) -> Result<Run<'a>> {
    let Ground { base, plan, disk_size, .. } = ground;
    let start = Start {
        disk_size: Some(*disk_size),
        checkpoints: true,
        disk_digest: ground.record.as_ref().map(|record| record.digest),
        ..Start::default()
    };
    let mut keeper = Keeper::new(stores.cache, template, base, context);
    let points: &[Point] = match &decided.decision.reuse {
        Reuse::Points(points) => points,
        Reuse::Image(_) => &[],
    };
    for point in points {
        let Some(checkpoint) = find(stores, point, context).await? else { continue };
        let Some((machine, traces)) = go_on(template, base, &checkpoint, &start, stores, context).await? else { continue };
        let mut steps = Vec::new();
        for (spec, planned) in template.steps.iter().zip(&plan.steps).take(point.done) {
            let key = planned.known_key()?;
            let age = age_of(&decided.records, Some(key));
            context.reports.cached(Phase::Step, &spec.common.name, age);
            let record = decided.records.iter().rev().flat_map(|record| &record.steps).find(|step| step.key == key);
            let record = record.cloned().unwrap_or_else(|| planned.record(key, since_1970(checkpoint.made), 0.0));
            let report = StepReport { name: spec.common.name.clone(), key, cached: true, seconds: 0.0 };
            steps.push(Done { report, record: StepRecord { name: spec.common.name.clone(), ..record } });
        }
        keeper.worth = checkpoint.worth.as_secs_f64();
        return Ok(Run { machine, keeper, traces, steps, turn });
    }
    let began = Instant::now();
    let mut machine = boot(template, base, start, context).await?;
    let seconds = began.elapsed().as_secs_f64();
    let span = context.reports.begin(Phase::Boot, "first command");
    let traces = Traces::begin(&*machine.guest()).await?;
    let _ = span.end(false);
    keeper.booted(known(plan.start)?, seconds, &mut *machine, &traces, turn).await?;
    Ok(Run { machine, keeper, traces, steps: Vec::new(), turn: None })
}

/// The checkpoint of a point, verified and held.
async fn find(stores: &Stores<'_>, point: &Point, context: &Context) -> Result<Option<Checkpoint>> {
    let (cache, point, reports) = (stores.cache.clone(), *point, context.reports.clone());
    crate::blocking("look for a checkpoint", move || cache.find(&point.key, point.max_age, &|warning| reports.warn(warning))).await
}

/// Goes on from a checkpoint; `None` when it cannot be used. Whatever is wrong
/// with it, the bake then does the work again.
async fn go_on(
    template: &Template,
    base: &Base,
    checkpoint: &Checkpoint,
    start: &Start,
    stores: &Stores<'_>,
    context: &Context,
) -> Result<Option<(Box<dyn Machine>, Traces)>> {
    let span = context.reports.begin(Phase::Boot, "resume");
    let resumed = match keep::traces(&checkpoint.folder) {
        Ok(traces) => {
            template.builder.resume(base, checkpoint, start, context).await.map(|machine| machine.map(|machine| (machine, traces)))
        }
        Err(error) => Err(error),
    };
    match resumed {
        Ok(Some(resumed)) => {
            let _ = span.end(true);
            Ok(Some(resumed))
        }
        Ok(None) => Ok(None),
        Err(error) if matches!(error.kind(), Code::DiskFull | Code::Missing | Code::Usage) => Err(error),
        Err(error) => {
            context.reports.warn(format!("a checkpoint cannot be used, and is dropped: {}", error.chain()));
            stores.cache.drop_damaged(checkpoint.clone())?;
            Ok(None)
        }
    }
}

fn known(key: Option<Key>) -> Result<Key> {
    key.ok_or_else(|| Error::new(Code::Failed, "a key is not known before the base is"))
}

pub(crate) fn since_1970(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// How long ago a step really ran, if a record tells.
fn age_of(records: &[Record], key: Option<Key>) -> Option<Duration> {
    let key = key?;
    let steps = records.iter().flat_map(|record| &record.steps);
    steps.filter(|step| step.key == key).max_by_key(|step| step.made).map(|step| step.age(SystemTime::now()))
}

/// The base, what stands for it in keys, and its blocks in the store.
async fn get_base(
    template: &Template,
    fresh: bool,
    sink: &Arc<dyn ImageSink>,
    context: &Context,
) -> Result<(Base, Digest, Option<DiskRecord>)> {
    let label = template.base.label();
    let span = context.reports.begin(Phase::Base, &label);
    let base = template.base.fetch(fresh, context).await?;
    if let BaseDisk::Cloud(images) = &base.disk {
        if !template.builder.at_cloud() {
            // Says what to do instead.
            base.file()?;
        }
        let identity = images.first().map(CloudImage::identity);
        let identity = identity.ok_or_else(|| Error::new(Code::Failed, format!("the base {label} is at no region of its cloud")))?;
        let _ = span.end(false);
        return Ok((base, identity, None));
    }
    let stored = match template.base.known()? {
        Some(digest) => sink.base(&digest)?,
        None => None,
    };
    let cached = stored.is_some();
    let record = match stored {
        Some(record) => record,
        None => {
            let (sink, adopted, label, reports) = (sink.clone(), base.clone(), label.clone(), context.reports.clone());
            let record = crate::blocking("store the base", move || {
                sink.adopt(&adopted, &label, &mut |done, total| reports.progress(&label, done, Some(total)))
            })
            .await?;
            template.base.remember(&base, &record.digest)?;
            record
        }
    };
    let _ = span.end(cached);
    Ok((base, record.digest, Some(record)))
}

/// The size of the disk to bake on: what the template says, never less than
/// the base.
fn disk_size(template: &Template, base: &Base) -> Result<u64> {
    match template.disk_size {
        None => Ok(base.size()),
        Some(size) if size >= base.size() => Ok(size),
        Some(size) => Err(Error::new(
            Code::Usage,
            format!(
                "`[disk] size` is {size} bytes, but the base {} has {} bytes, and a disk cannot be made smaller",
                base.label,
                base.size()
            ),
        )
        .next(format!("set `[disk] size` to at least \"{}MiB\"", base.size().div_ceil(1 << 20)))),
    }
}

async fn boot(template: &Template, base: &Base, start: Start, context: &Context) -> Result<Box<dyn Machine>> {
    let span = context.reports.begin(Phase::Boot, "boot");
    let machine = template.builder.start(base, &start, context).await?;
    let _ = span.end(false);
    Ok(machine)
}

/// Runs every step that is left, in order.
async fn provision(template: &Template, plan: &Plan, run: &mut Run<'_>, context: &Context) -> Result<()> {
    let steps = template.steps.iter().zip(&plan.steps).enumerate();
    for (index, (spec, planned)) in steps.skip(run.steps.len()) {
        let key = planned.known_key()?;
        // Others that want the same step wait, where they can.
        let turn = match run.turn.take() {
            Some(turn) => Some(turn),
            None => run.keeper.cache.claim(&key)?,
        };
        let guest = run.machine.guest();
        let span = context.reports.begin(Phase::Step, &spec.common.name);
        step::run(&*run.machine, spec, &template.secrets, context).await?;
        run.traces.after(&spec.common.name, &*guest).await?;
        let seconds = span.end(false);
        let report = StepReport { name: spec.common.name.clone(), key, cached: false, seconds };
        run.steps.push(Done { report, record: planned.record(key, since_1970(SystemTime::now()), seconds) });
        run.keeper.ran(index, (key, seconds), &mut *run.machine, &run.traces, turn).await?;
    }
    Ok(())
}

/// Makes the guest ready for its last stop.
async fn prepare_seal(template: &Template, run: &Run<'_>, context: &Context) -> Result<()> {
    let span = context.reports.begin(Phase::Seal, "seal");
    let seal = Seal { name: &template.name, version: &template.version, commit: template.commit.as_deref(), keep: &template.keep };
    tokio::select! {
        done = seal::prepare(&*run.machine, &seal, &run.traces) => done?,
        error = run.machine.ended() => return Err(error.step("seal")),
    }
    let _ = span.end(false);
    Ok(())
}

/// Ends a run in which something failed.
async fn give_up(mut run: Run<'_>, error: Error, options: &Options<'_>, context: &Context) -> Error {
    run.keeper.finish().await;
    rescue(run.machine, error, options, context).await
}

/// What is left to do with a machine on which something failed.
async fn rescue(machine: Box<dyn Machine>, error: Error, options: &Options<'_>, context: &Context) -> Error {
    // The guest's console explains what the guest itself could not say.
    let silent = matches!(error.kind(), Code::Unreachable | Code::MachineEnded | Code::Timeout);
    let error = if silent { machine.explain(error).await } else { error };
    let gone = error.kind() == Code::MachineEnded;
    match options.on_failure {
        OnFailure::Clean => machine.kill().await,
        OnFailure::Keep => match machine.keep().await {
            Ok(how) => context.reports.note(how),
            Err(failed) => context.reports.warn(format!("the disk could not be kept: {}", failed.chain())),
        },
        OnFailure::Shell => {
            match machine.guest().ssh_access() {
                Some(access) if !gone => {
                    context.reports.warn(format!("{}: a shell opens on the machine as it is; leave it to clean up", error.chain()));
                    if let Err(failed) = (options.open_shell)(access).await {
                        context.reports.warn(failed.chain());
                    }
                }
                _ => context.reports.warn("no shell can be opened: the machine has ended"),
            }
            machine.kill().await;
        }
    }
    error
}

async fn stop_and_check(machine: Box<dyn Machine>, keep: &[String], context: &Context) -> Result<(Box<dyn Stopped>, bool)> {
    let span = context.reports.begin(Phase::Seal, "stop");
    let stopped = machine.stop(seal::STOP).await.map_err(|error| error.step("seal"))?;
    let checked = seal::check(&*stopped, keep).await.map_err(|error| error.step("seal"))?;
    if !checked {
        let why = match stopped.disk() {
            Some(_) => "kiln reads ext4 only, and its root file system is another one",
            None => "it is at a cloud",
        };
        context.reports.warn(format!("the sealed disk was not checked: {why}"));
    }
    let _ = span.end(false);
    Ok((stopped, checked))
}

/// What a stopped machine has become.
struct Captured {
    /// Its disk in the store.
    record: Option<DiskRecord>,
    /// Its images at a cloud.
    cloud: Vec<CloudImage>,
    /// What its tests found; none were run, or could not be carried out.
    trial: Result<Option<Trial>>,
}

/// Captures a stopped machine where its disk is, and tests what was captured.
async fn capture(
    template: &Template,
    options: &Options<'_>,
    stopped: &mut dyn Stopped,
    base: &Base,
    base_record: Option<&DiskRecord>,
    sink: &Arc<dyn ImageSink>,
    context: &Context,
) -> Result<Captured> {
    if let Some(disk) = stopped.disk() {
        // Both only read the stopped disk, so they need not wait for each other.
        let (record, trial) = tokio::join!(
            snapshot(template, &*stopped, base_record, sink, context),
            trial::test_new(template, options.test, disk.into(), base, context)
        );
        return Ok(Captured { record: Some(record?), cloud: Vec::new(), trial });
    }
    let naming = Naming {
        name: template.name.clone(),
        version: template.version.clone(),
        commit: template.commit.clone(),
        labels: template.labels.clone(),
    };
    let nowhere = || Error::new(Code::Failed, "the builder gives neither a disk nor an image of its machine");
    let span = context.reports.begin(Phase::Snapshot, "capture");
    let image = stopped.at_cloud().ok_or_else(nowhere)?.capture(&naming).await?;
    let _ = span.end(false);
    let trial = trial::test_new(template, options.test, BaseDisk::Cloud(vec![image]), base, context).await?;
    // What fails its tests goes nowhere else, and costs nothing any more.
    if let Some(trial) = trial.as_ref().filter(|trial| trial.failed()) {
        let next = "the image was removed from its cloud; mend the step or the test, or bake with --no-test";
        return Err(trial::failure(&format!("{}:{}", template.name, template.version), trial, next));
    }
    let cloud = stopped.at_cloud().ok_or_else(nowhere)?.spread().await?;
    let record = if options.fetch { Some(snapshot(template, &*stopped, base_record, sink, context).await?) } else { None };
    Ok(Captured { record, cloud, trial: Ok(trial) })
}

async fn snapshot(
    template: &Template,
    stopped: &dyn Stopped,
    base: Option<&DiskRecord>,
    sink: &Arc<dyn ImageSink>,
    context: &Context,
) -> Result<DiskRecord> {
    let span = context.reports.begin(Phase::Snapshot, "snapshot");
    let mut source = stopped.blocks().await?;
    let backing = base.map(|base| base.map.clone());
    let mut parents: Vec<DiskRecord> = base.cloned().into_iter().collect();
    parents.extend(sink.predecessor(&template.name)?);
    let (sink, reports) = (sink.clone(), context.reports.clone());
    let record = crate::blocking("store the disk", move || {
        let backing = backing.as_ref();
        sink.write_disk("root", &mut *source, backing, &parents, &mut |done, total| reports.progress("snapshot", done, Some(total)))
    })
    .await?;
    let _ = span.end(false);
    Ok(record)
}

fn config(
    template: &Template,
    steps: &[Done],
    base: &Base,
    base_digest: Digest,
    record: Option<&DiskRecord>,
    cloud: &[CloudImage],
) -> Config {
    let disk = |record: &DiskRecord| DiskConfig { name: record.name.clone(), size: record.map.size, digest: record.digest, root: true };
    Config {
        name: template.name.clone(),
        version: template.version.clone(),
        architecture: base.architecture.clone(),
        firmware: base.firmware,
        credentials: base.credentials == Some(true),
        disks: record.map(disk).into_iter().collect(),
        base: Some(base_digest),
        steps: steps.iter().map(|step| StepConfig { name: step.report.name.clone(), key: step.report.key }).collect(),
        commit: template.commit.clone(),
        labels: template.labels.clone(),
        cloud: cloud.to_vec(),
        mutable: template.mutable.clone(),
    }
}

async fn publish(
    sink: &Arc<dyn ImageSink>,
    config: Config,
    record: Option<DiskRecord>,
    annotations: BTreeMap<String, String>,
    tickets: Vec<Ticket>,
    named: bool,
    context: &Context,
) -> Result<Digest> {
    let (sink, scope) = (sink.clone(), context.scope.clone());
    let title = format!("{}:{}", config.name, config.version);
    let published = crate::blocking("store the image", move || {
        // This goes on when the bake is interrupted now: what the store records
        // is not undone, and what is being undone is not recorded.
        let undone = || Error::new(Code::Interrupted, "interrupted before the image was stored");
        let stays = scope.withhold(&tickets).ok_or_else(undone)?;
        let published = if named {
            sink.publish(&config, record.as_slice(), &annotations)
        } else {
            let digest = sink.publish_unnamed(&config, record.as_slice(), &annotations);
            digest.map(|digest| Published { digest, moved_from: None })
        };
        match published {
            Ok(published) => scope.stays(stays).map(|()| published),
            Err(error) => {
                scope.give_back(stays);
                Err(error)
            }
        }
    })
    .await?;
    if let Some(was) = published.moved_from {
        context.reports.note(format!("{title} was {was}, now {}", published.digest));
    }
    Ok(published.digest)
}
