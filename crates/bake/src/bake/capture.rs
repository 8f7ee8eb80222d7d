//! What becomes of a machine that has stopped: its disk in the store or its
//! images at a cloud, tested, and published under their digest.

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_model::base::{Base, BaseDisk};
use kiln_model::block::{ImageSink, Published};
use kiln_model::cleanup::Ticket;
use kiln_model::event::Phase;
use kiln_model::image::{CloudImage, Config, DiskConfig, DiskRecord, StepConfig};
use kiln_model::machine::{Context, Naming, Stopped};
use kiln_model::trial::Trial;
use kiln_model::{Code, Digest, Error, Result};

use super::Options;
use super::run::Done;
use crate::template::Template;
use crate::trial;

/// What a stopped machine has become.
pub(super) struct Captured {
    /// Its disk in the store.
    pub(super) record: Option<DiskRecord>,
    /// Its images at a cloud.
    pub(super) cloud: Vec<CloudImage>,
    /// What its tests found; none were run, or could not be carried out.
    pub(super) trial: Result<Option<Trial>>,
}

/// Captures a stopped machine where its disk is, and tests what was captured.
pub(super) async fn capture(
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

pub(super) fn config(
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

pub(super) async fn publish(
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

/// Images at a cloud as the `baked` event tells of them.
pub(super) fn artifacts(cloud: &[CloudImage]) -> Vec<serde_json::Value> {
    cloud
        .iter()
        .map(|image| {
            serde_json::json!({
                "kind": image.builder, "region": image.region, "id": image.id, "snapshots": image.snapshots,
            })
        })
        .collect()
}
