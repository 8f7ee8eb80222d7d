//! The bake, from top to bottom in one function.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use kiln_model::base::Base;
use kiln_model::block::ImageSink;
use kiln_model::event::{Baked, Event, Phase, StepReport};
use kiln_model::guest::SshAccess;
use kiln_model::image::{self, Config, DiskConfig, DiskRecord, StepConfig};
use kiln_model::machine::{Context, Machine, Start, Stopped};
use kiln_model::{Code, Error, Result};

use crate::plan::Plan;
use crate::resume;
use crate::seal::{self, Seal, Traces};
use crate::step;
use crate::template::Template;

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
    /// What to do with the machine when a step fails.
    pub on_failure: OnFailure,
    /// For [`OnFailure::Shell`].
    pub open_shell: OpenShell<'a>,
}

/// Bakes `template` into `sink`.
///
/// Everything made on the way is registered in the context's scope; the caller
/// unwinds it however this ends, also when this future is dropped.
///
/// # Errors
/// The first one, naming the step; the store then holds no trace of the bake.
pub async fn bake(template: &Template, options: &Options<'_>, sink: &Arc<dyn ImageSink>, context: &Context) -> Result<Baked> {
    let began = Instant::now();
    context.reports.event(Event::Started {
        bake: context.bake.clone(),
        name: template.name.clone(),
        version: template.version.clone(),
        steps: template.steps.len(),
    });

    let (base, base_record) = get_base(template, options.resume.fresh, sink, context).await?;
    let disk_size = disk_size(template, &base)?;
    let plan = Plan::new(template, Some(base_record.digest))?;

    let mut machine = boot(template, &base, Start { disk_size: Some(disk_size), ..Start::default() }, context).await?;
    let steps = match provision_and_seal(template, &plan, &mut *machine, context).await {
        Ok(steps) => steps,
        Err(error) => return Err(rescue(machine, error, options, context).await),
    };
    let stopped = stop_and_check(machine, &template.keep, context).await?;

    // Both only read the stopped disk, so they need not wait for each other.
    let (record, ()) = tokio::try_join!(
        snapshot(template, &*stopped, &base_record, sink, context),
        test(template, options.test, &*stopped, &base, context)
    )?;

    let config = config(template, &steps, &base, &base_record, &record);
    let annotations = BTreeMap::from([
        (image::CREATED.to_owned(), jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        (image::BAKE.to_owned(), context.bake.clone()),
    ]);
    let disk_digest = record.digest;
    let digest = publish(sink, config, record, annotations, context).await?;

    let baked = Baked {
        name: template.name.clone(),
        version: template.version.clone(),
        arch: base.architecture.clone(),
        digest,
        disk_digest,
        steps,
        artifacts: Vec::new(),
        seconds: began.elapsed().as_secs_f64(),
    };
    context.reports.event(Event::Baked(baked.clone()));
    Ok(baked)
}

/// The base, and its blocks in the store.
async fn get_base(template: &Template, fresh: bool, sink: &Arc<dyn ImageSink>, context: &Context) -> Result<(Base, DiskRecord)> {
    let label = template.base.label();
    let span = context.reports.begin(Phase::Base, &label);
    let base = template.base.fetch(fresh, context).await?;
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
    Ok((base, record))
}

/// The size of the disk to bake on: what the template says, never less than
/// the base.
fn disk_size(template: &Template, base: &Base) -> Result<u64> {
    match template.disk_size {
        None => Ok(base.disk.size),
        Some(size) if size >= base.disk.size => Ok(size),
        Some(size) => Err(Error::new(
            Code::Usage,
            format!(
                "`[disk] size` is {size} bytes, but the base {} has {} bytes, and a disk cannot be made smaller",
                base.label, base.disk.size
            ),
        )
        .next(format!("set `[disk] size` to at least \"{}MiB\"", base.disk.size.div_ceil(1 << 20)))),
    }
}

async fn boot(template: &Template, base: &Base, start: Start, context: &Context) -> Result<Box<dyn Machine>> {
    let span = context.reports.begin(Phase::Boot, "boot");
    let machine = template.builder.start(base, &start, context).await?;
    let _ = span.end(false);
    Ok(machine)
}

/// Runs every step in order, then makes the guest ready for its last stop.
async fn provision_and_seal(template: &Template, plan: &Plan, machine: &mut dyn Machine, context: &Context) -> Result<Vec<StepReport>> {
    let guest = machine.guest();
    let mut traces = Traces::begin(&*guest).await?;
    let mut reports = Vec::with_capacity(template.steps.len());
    for (spec, planned) in template.steps.iter().zip(&plan.steps) {
        let span = context.reports.begin(Phase::Step, &spec.common.name);
        step::run(machine, spec, &template.secrets, context).await?;
        traces.after(&spec.common.name, &*guest).await?;
        let seconds = span.end(false);
        reports.push(StepReport { name: spec.common.name.clone(), key: planned.known_key()?, cached: false, seconds });
    }
    let seal = Seal { name: &template.name, version: &template.version, commit: template.commit.as_deref(), keep: &template.keep };
    tokio::select! {
        done = seal::prepare(machine, &seal, &traces) => done?,
        error = machine.ended() => return Err(error.step("seal")),
    }
    Ok(reports)
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

async fn stop_and_check(machine: Box<dyn Machine>, keep: &[String], context: &Context) -> Result<Box<dyn Stopped>> {
    let span = context.reports.begin(Phase::Seal, "seal");
    let stopped = machine.stop(seal::STOP).await.map_err(|error| error.step("seal"))?;
    if !seal::check(&*stopped, keep).await.map_err(|error| error.step("seal"))? {
        context.reports.warn("the sealed disk was not checked: kiln reads ext4 only, and its root file system is another one");
    }
    let _ = span.end(false);
    Ok(stopped)
}

async fn snapshot(
    template: &Template,
    stopped: &dyn Stopped,
    base: &DiskRecord,
    sink: &Arc<dyn ImageSink>,
    context: &Context,
) -> Result<DiskRecord> {
    let span = context.reports.begin(Phase::Snapshot, "snapshot");
    let mut source = stopped.blocks().await?;
    let mut parents = vec![base.clone()];
    parents.extend(sink.predecessor(&template.name)?);
    let (sink, reports) = (sink.clone(), context.reports.clone());
    let record = crate::blocking("store the disk", move || {
        let backing = parents.first().map(|base| &base.map);
        sink.write_disk("root", &mut *source, backing, &parents, &mut |done, total| reports.progress("snapshot", done, Some(total)))
    })
    .await?;
    let _ = span.end(false);
    Ok(record)
}

/// Runs the template's tests on a throwaway overlay of the stopped disk.
async fn test(template: &Template, wanted: bool, stopped: &dyn Stopped, base: &Base, context: &Context) -> Result<()> {
    if !wanted || template.tests.is_empty() {
        return Ok(());
    }
    let image = Base { label: format!("{} {}", template.name, template.version), disk: stopped.disk(), ..base.clone() };
    let machine = boot(template, &image, Start::default(), context).await?;
    crate::settle(&*machine.guest()).await?;
    for spec in &template.tests {
        let span = context.reports.begin(Phase::Test, &spec.common.name);
        if let Err(error) = step::run(&*machine, spec, &template.secrets, context).await {
            machine.kill().await;
            let code = if error.kind() == Code::Step { Code::Test } else { error.kind() };
            return Err(error.code(code).next("the image was not stored; mend the step or the test, or bake with --no-test"));
        }
        let _ = span.end(false);
    }
    machine.kill().await;
    Ok(())
}

fn config(template: &Template, steps: &[StepReport], base: &Base, base_record: &DiskRecord, record: &DiskRecord) -> Config {
    Config {
        name: template.name.clone(),
        version: template.version.clone(),
        architecture: base.architecture.clone(),
        firmware: base.firmware,
        credentials: base.credentials == Some(true),
        disks: vec![DiskConfig { name: record.name.clone(), size: record.map.size, digest: record.digest, root: true }],
        base: Some(base_record.digest),
        steps: steps.iter().map(|step| StepConfig { name: step.name.clone(), key: step.key }).collect(),
        commit: template.commit.clone(),
        labels: template.labels.clone(),
    }
}

async fn publish(
    sink: &Arc<dyn ImageSink>,
    config: Config,
    record: DiskRecord,
    annotations: BTreeMap<String, String>,
    context: &Context,
) -> Result<kiln_model::Digest> {
    let sink = sink.clone();
    let title = format!("{}:{}", config.name, config.version);
    let published = crate::blocking("store the image", move || sink.publish(&config, &[record], &annotations)).await?;
    if let Some(was) = published.moved_from {
        context.reports.note(format!("{title} was {was}, now {}", published.digest));
    }
    Ok(published.digest)
}
