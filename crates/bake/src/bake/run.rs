//! A machine on its way through the steps: from its start or a checkpoint until
//! it is sealed and has stopped.

use std::time::{Instant, SystemTime};

use kiln_model::base::Base;
use kiln_model::checkpoint::{Checkpoint, Hold};
use kiln_model::event::{Phase, StepReport};
use kiln_model::history::StepRecord;
use kiln_model::machine::{Context, Machine, Start, Stopped};
use kiln_model::{Code, Error, Result};

use super::decided::{Decided, age_of, take_turn};
use super::ground::Ground;
use super::{OnFailure, Options, Stores, known};
use crate::keep::{self, Keeper};
use crate::plan::Plan;
use crate::resume::{Point, Reuse};
use crate::seal::{self, Seal, Traces};
use crate::template::Template;
use crate::{since_1970, step};

/// A machine on its way through the steps.
pub(super) struct Run<'a> {
    pub(super) machine: Box<dyn Machine>,
    pub(super) keeper: Keeper<'a>,
    traces: Traces,
    /// The steps that are done.
    pub(super) steps: Vec<Done>,
    /// The right to run the next step.
    turn: Option<Hold>,
}

/// A step that is done, now or before.
pub(super) struct Done {
    pub(super) report: StepReport,
    pub(super) record: StepRecord,
}

/// A machine on which all steps are done.
pub(super) async fn provisioned<'a>(
    template: &'a Template,
    ground: &'a Ground,
    decided: Decided,
    options: &Options<'_>,
    stores: &Stores<'a>,
    context: &'a Context,
) -> Result<Run<'a>> {
    step::ready(template.steps.get(decided.decision.done()..).unwrap_or_default()).await?;
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
pub(super) async fn prepare_seal(template: &Template, run: &Run<'_>, context: &Context) -> Result<()> {
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
pub(super) async fn give_up(mut run: Run<'_>, error: Error, options: &Options<'_>, context: &Context) -> Error {
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

pub(super) async fn stop_and_check(machine: Box<dyn Machine>, keep: &[String], context: &Context) -> Result<(Box<dyn Stopped>, bool)> {
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
