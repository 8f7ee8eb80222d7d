//! The bake, from top to bottom in one function; and the first half of it, for
//! who wants the machine and no image.
//!
//! ```text
//!  ground ──► decided ──► run ──────────► capture
//!  base, keys  what is     machine, steps, disk, tests,
//!              reused      seal            image
//! ```

mod capture;
mod decided;
mod ground;
mod run;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use kiln_model::account::Witness;
use kiln_model::base::BaseDisk;
use kiln_model::block::ImageSink;
use kiln_model::checkpoint::CheckpointCache;
use kiln_model::event::{Baked, Event, Phase, StepReport};
use kiln_model::guest::SshAccess;
use kiln_model::history::{History, Record};
use kiln_model::image::{self, Config};
use kiln_model::machine::Context;
use kiln_model::{Code, Error, Key, Result};

use self::capture::{Captured, artifacts, capture, config, publish};
use self::decided::{Decided, age_of, decide, decide_with, unusable};
use self::ground::Ground;
use self::run::{Run, give_up, prepare_seal, provisioned, stop_and_check};
use crate::account::Teller;
use crate::plan::Plan;
use crate::resume::Reuse;
use crate::template::Template;
use crate::trial::{self, Testing};
use crate::{keep, resume, since_1970, step};

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
    if options.test {
        step::ready(&template.tests).await?;
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

fn known(key: Option<Key>) -> Result<Key> {
    key.ok_or_else(|| Error::new(Code::Failed, "a key is not known before the base is"))
}
