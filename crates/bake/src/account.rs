//! What a bake tells of its image, to be attached to it as evidence.
//!
//! An image that was made before is accounted for as well: what is not attached
//! to it yet can then be attached without baking it again. The account is then
//! of the bake that found it, with every step taken from the cache.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use kiln_model::Result;
use kiln_model::account::{Account, Hygiene, Input, Source, StepAccount, Witness};
use kiln_model::history::Record;
use kiln_model::machine::Context;
use kiln_model::trial::Trial;

use crate::plan::{Plan, SEAL_VERSION};
use crate::seal;
use crate::since_1970;
use crate::template::{self, Template};

/// Gathers what is told when the image is there.
pub(crate) struct Teller<'a> {
    witness: Option<&'a Arc<dyn Witness>>,
    started: u64,
    source: Option<Source>,
}

impl<'a> Teller<'a> {
    /// Looks at the repository now: by the end of the bake somebody may have
    /// changed it.
    pub(crate) async fn begin(template: &Template, witness: Option<&'a Arc<dyn Witness>>) -> Result<Self> {
        let started = since_1970(SystemTime::now());
        let (folder, commit) = (template.folder.clone(), template.commit.clone());
        let source = match (witness, commit) {
            (Some(_), Some(commit)) => crate::blocking("ask git", move || Ok(template::repository(&folder, commit))).await?,
            _ => None,
        };
        Ok(Self { witness, started, source })
    }

    /// Tells how the image of `record` came to be, or that this bake would have
    /// made it.
    pub(crate) async fn tell(
        self,
        template: &Template,
        plan: &Plan,
        record: &Record,
        trial: Option<&Trial>,
        context: &Context,
    ) -> Result<()> {
        let Some(witness) = self.witness else { return Ok(()) };
        let account = Account { tests: trial.cloned(), ..self.account(template, plan, record, context) };
        witness.attest(&account).await.map_err(|error| {
            error.next(format!(
                "{}:{} itself is in the store; the same bake again attaches what is missing",
                template.name, template.version
            ))
        })
    }

    fn account(self, template: &Template, plan: &Plan, record: &Record, context: &Context) -> Account {
        let clean = |text: &str| context.reports.redactor().clean(text);
        let inputs = |at: usize| plan.steps.get(at).map(|step| step.inputs.clone()).unwrap_or_default();
        let steps = record.steps.iter().enumerate().map(|(at, step)| StepAccount {
            name: step.name.clone(),
            kind: step.kind.clone(),
            key: step.key,
            inputs: inputs(at).into_iter().map(|input| Input { name: clean(&input.name), ..input }).collect(),
            cached: record.bake != context.bake || step.made < self.started,
            made: step.made,
            seconds: step.seconds,
            // Also of a step from the cache: the setting is part of its key.
            converged: plan.steps.get(at).is_some_and(|planned| planned.converges),
        });
        let rules: BTreeSet<&str> = seal::rules().collect();
        Account {
            bake: context.bake.clone(),
            image: record.image,
            name: template.name.clone(),
            version: template.version.clone(),
            architecture: template.architecture.clone(),
            disk: record.disk,
            cloud: record.cloud.clone(),
            disk_size: template.disk_size,
            base: clean(&record.base_label),
            base_disk: record.base,
            base_at_cloud: record.base_at_cloud,
            templates: template.files.clone(),
            source: self.source,
            variables: template.variables.iter().map(|(name, value)| (name.clone(), value.as_deref().map(clean))).collect(),
            builder: template.builder_name.clone(),
            steps: steps.collect(),
            seal: record.seal,
            tests: None,
            hygiene: record.checked.map(|checked| Hygiene {
                checked,
                seal_version: SEAL_VERSION.to_owned(),
                rules: rules.into_iter().map(ToOwned::to_owned).collect(),
                kept: template.keep.clone(),
            }),
            started: self.started,
            finished: since_1970(SystemTime::now()),
        }
    }
}
