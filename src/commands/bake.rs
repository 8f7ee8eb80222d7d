//! `kiln bake`: from a template to an image.

use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::Arc;

use kiln_bake::{Options, Stores, bake};
use kiln_model::block::ImageSink;
use kiln_model::checkpoint::CheckpointCache;
use kiln_model::event::{Baked, Event, Failure};
use kiln_model::guest::SshAccess;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Error, Result, ResultExt as _};

use super::App;
use super::plan::{again, config};
use super::validate::load_or_explain;
use crate::cli::{Bake, OnFailure};
use crate::output::{print, seconds};
use crate::registry::Registry;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Bake) -> Result<u8> {
    let reports = app.output.events();
    let done = bake_one(app, arguments, &reports).await;
    let event =
        Event::Done { v: 1, ok: done.is_ok(), images: done.iter().cloned().collect(), error: done.as_ref().err().map(Failure::from) };
    reports.event(event.clone());
    if let Some(path) = &arguments.result {
        write_result(path, &event)?;
    }
    let baked = done?;
    if !app.output.is_json() {
        print(&summary(&baked));
    }
    Ok(0)
}

async fn bake_one(app: &App, arguments: &Bake, reports: &kiln_model::event::Reports) -> Result<Baked> {
    for tag in &arguments.tags {
        kiln_model::reference::check_tag(tag).map_err(|why| Error::new(Code::Usage, format!("`--tag {tag}`: {why}")))?;
    }
    let registry = Registry::new(&app.home, &crate::site::load()?.bases);
    let template = load_or_explain(&arguments.template.template, &arguments.template.variables, &registry)?;
    for secret in template.secrets.values() {
        reports.redactor().add(secret);
    }
    let store = Arc::new(app.store()?);
    let sink: Arc<dyn ImageSink> = store.clone();
    let options = Options {
        resume: again(&arguments.anew, &template)?,
        test: !arguments.no_test,
        on_failure: match arguments.on_failure {
            OnFailure::Clean => kiln_bake::OnFailure::Clean,
            OnFailure::Keep => kiln_bake::OnFailure::Keep,
            OnFailure::Shell => kiln_bake::OnFailure::Shell,
        },
        open_shell: &|access| Box::pin(open_shell(access)),
    };
    let cache: Arc<dyn CheckpointCache> = Arc::new(app.checkpoints()?);
    let history = app.history()?;
    let stores = Stores { sink: &sink, cache: &cache, history: &history, image: &|record| config(&store, record) };
    let baked = with_context(&app.home, reports, |context| {
        let (template, options, stores) = (&template, &options, &stores);
        async move { bake(template, options, stores, &context).await }
    })
    .await?;
    for tag in &arguments.tags {
        let new = Reference { registry: None, name: baked.name.clone(), pointer: Pointer::Tag(Some(tag.clone())) };
        let image = Reference { pointer: Pointer::Digest(baked.digest), ..new.clone() };
        if let Some(moved) = store.tag(&image, &new)? {
            reports.note(moved.to_string());
        }
    }
    Ok(baked)
}

/// An interactive `ssh` on the terminal of this process; what comes through a
/// pipe it reads as it is.
pub(super) async fn open_shell(access: SshAccess) -> Result<()> {
    let piped = !std::io::stdin().is_terminal();
    tokio::process::Command::new("ssh")
        .args(piped.then_some("-T"))
        .args(access.ssh_arguments())
        .status()
        .await
        .map(|_| ())
        .map_err(|error| Error::new(Code::Missing, "cannot run `ssh`").because(error).next("apt-get install openssh-client"))
}

fn write_result(path: &Path, event: &Event) -> Result<()> {
    let text = serde_json::to_string(event).trying(|| "write the result".into())?;
    std::fs::write(path, text + "\n").trying(|| format!("write {}", path.display()))
}

fn summary(image: &Baked) -> String {
    format!(
        "{name}:{version}\n  digest       {digest}\n  disk digest  {disk}\n  took         {took}\n  try it       kiln run {name}:{version}\n",
        name = image.name,
        version = image.version,
        digest = image.digest,
        disk = image.disk_digest,
        took = seconds(image.seconds)
    )
}
