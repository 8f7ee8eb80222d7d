//! Decides what is used of earlier bakes, and waits for those that are at it.

use std::time::{Duration, SystemTime};

use kiln_model::checkpoint::Hold;
use kiln_model::history::Record;
use kiln_model::machine::Context;
use kiln_model::{Digest, Key, Result};

use super::{Options, Stores};
use crate::plan::Plan;
use crate::resume::{Decision, Earlier, Reuse};
use crate::template::Template;
use crate::{explain, keep, resume};

/// What is used of earlier bakes, and why the rest runs.
pub(super) struct Decided {
    pub(super) decision: Decision,
    pub(super) reasons: Vec<String>,
    pub(super) records: Vec<Record>,
}

pub(super) fn decide(template: &Template, plan: &Plan, options: &Options<'_>, stores: &Stores<'_>) -> Result<Decided> {
    decide_with(template, plan, &options.resume, options, stores)
}

/// As [`decide`], with other wishes than the user's for what is done anew.
pub(super) fn decide_with(
    template: &Template,
    plan: &Plan,
    anew: &resume::Options,
    options: &Options<'_>,
    stores: &Stores<'_>,
) -> Result<Decided> {
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
pub(super) async fn unusable(template: &Template, options: &Options<'_>, record: &Record, context: &Context) -> Result<Option<String>> {
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

/// Takes the right to do what is to be done first, and decides again when
/// another bake had it: it may have left a checkpoint.
pub(super) async fn take_turn(
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

/// How long ago a step really ran, if a record tells.
pub(super) fn age_of(records: &[Record], key: Option<Key>) -> Option<Duration> {
    let key = key?;
    let steps = records.iter().flat_map(|record| &record.steps);
    steps.filter(|step| step.key == key).max_by_key(|step| step.made).map(|step| step.age(SystemTime::now()))
}
