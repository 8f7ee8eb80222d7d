//! `kiln shell`: a shell on the machine as a bake has it before some step.

use std::sync::Arc;

use kiln_bake::resume::{self, find_step};
use kiln_bake::template::Template;
use kiln_bake::{Options, Stores, shell};
use kiln_model::Result;
use kiln_model::block::ImageSink;
use kiln_model::checkpoint::CheckpointCache;

use super::App;
use super::bake::open_shell;
use super::plan::config;
use super::validate::load_or_explain;
use crate::cli::Shell;
use crate::network;
use crate::registry::Registry;
use crate::session::with_context;
use crate::signing;

pub(super) async fn run(app: &App, arguments: &Shell) -> Result<u8> {
    let registry = Registry::new(&app.home, &crate::site::load()?.bases);
    let mut template = load_or_explain(&arguments.template.template, &arguments.template.variables, &registry)?;
    if let Some(wanted) = &arguments.before {
        let before = step(&template, wanted)?;
        template.steps.truncate(before);
    }
    let reports = app.output.reports();
    for secret in template.secrets.values() {
        reports.redactor().add(secret);
    }
    let store = Arc::new(app.store()?);
    if let Some(reference) = template.base.image() {
        network::refuse_revoked_base(&store, reference, None, arguments.allow_revoked, &reports).await?;
    }
    let sink: Arc<dyn ImageSink> = store.clone();
    let cache: Arc<dyn CheckpointCache> = Arc::new(app.checkpoints()?.trusting(signing::trusted(&template.trusted)?.1));
    let history = app.history()?;
    let image = |record: &_| config(&store, record);
    let stores = Stores { sink: &sink, cache: &cache, history: &history, image: &image, witness: None, testing: None };
    let options = Options {
        resume: resume::Options { machine: true, ..resume::Options::default() },
        test: false,
        fetch: false,
        on_failure: kiln_bake::OnFailure::Clean,
        open_shell: &|access| Box::pin(open_shell(access)),
    };
    with_context(&app.home, &reports, |context| {
        let (template, options, stores) = (&template, &options, &stores);
        async move { shell(template, options, stores, &context).await }
    })
    .await?;
    Ok(0)
}

/// The step that `wanted` names, or else its number, counted from one.
fn step(template: &Template, wanted: &str) -> Result<usize> {
    let numbered = || wanted.parse::<usize>().ok()?.checked_sub(1).filter(|step| *step < template.steps.len());
    find_step(template, "--before", wanted).or_else(|error| numbered().ok_or(error))
}
