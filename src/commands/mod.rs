//! One file per command.

mod age;
mod bake;
mod completions;
mod copy;
mod diff;
mod doctor;
mod drift;
mod export;
mod history;
mod images;
mod import;
mod init;
mod inspect;
mod keygen;
mod load;
mod man;
mod plan;
mod policy;
mod promote;
mod prune;
mod publish;
mod pull;
mod push;
mod reap;
pub(crate) mod rebake;
mod revoke;
mod rollback;
mod run;
mod save;
pub(crate) mod sbom;
mod shell;
mod sign;
mod tag;
mod test;
mod validate;
mod verify;

use std::sync::{Arc, OnceLock};

use kiln_cache::{Checkpoints, HistoryFiles};
use kiln_model::event::Failure;
use kiln_model::history::History;
use kiln_model::home::Home;
use kiln_model::reference::Reference;
use kiln_model::{Error, Result, ResultExt as _};
use kiln_registry::Client;
use kiln_store::{Place, RemotePlace, Store};

use crate::cli::{Cli, Command};
use crate::output::{Output, print_json, show_error};

/// What every command works with.
pub(crate) struct App {
    pub home: Home,
    pub output: Output,
    registry: OnceLock<Client>,
}

impl App {
    /// The store, made if it is not there.
    pub(crate) fn store(&self) -> Result<Store> {
        Store::open(&self.home.store())
    }

    /// What talks to registries: one for the command, since what a host bears
    /// is shared by all that it does.
    pub(crate) fn registry(&self) -> Result<Client> {
        if let Some(client) = self.registry.get() {
            return Ok(client.clone());
        }
        let client = crate::network::client(&self.output.reports())?;
        Ok(self.registry.get_or_init(|| client).clone())
    }

    /// Where a reference points into: the store, or a repository of a registry.
    pub(crate) fn place(&self, reference: &Reference) -> Result<Box<dyn Place>> {
        Ok(match reference.registry {
            Some(_) => Box::new(self.remote(reference)?),
            None => Box::new(self.store()?),
        })
    }

    /// The repository of a reference to a registry.
    pub(crate) fn remote(&self, reference: &Reference) -> Result<RemotePlace> {
        let host = reference.registry.as_deref().unwrap_or_default();
        Ok(RemotePlace::new(self.registry()?.repository(host, &reference.name)?))
    }

    /// The checkpoints.
    pub(crate) fn checkpoints(&self) -> Result<Checkpoints> {
        Checkpoints::open(&self.home, crate::site::load()?.cache_budget)
    }

    /// The records of earlier bakes.
    pub(crate) fn history(&self) -> Result<Arc<dyn History>> {
        Ok(Arc::new(HistoryFiles::open(&self.home)?))
    }
}

/// Runs what was asked for; gives the exit status.
pub(crate) async fn run(cli: Cli) -> u8 {
    let output = Output::new(cli.global.json, cli.global.quiet);
    if cli.global.plain_http {
        crate::site::allow_plain_http();
    }
    let is_run = matches!(cli.command, Command::Run(_));
    let streams_events = matches!(cli.command, Command::Bake(_));
    let done = match Home::open(cli.global.home) {
        Ok(home) => dispatch(&App { home, output: output.clone(), registry: OnceLock::new() }, cli.command).await,
        Err(error) => Err(error),
    };
    match done {
        Ok(status) => status,
        Err(error) => {
            show_error(&error);
            // A bake's last event has said it already.
            if output.is_json() && !streams_events {
                print_json(&serde_json::json!({ "ok": false, "error": Failure::from(&error) }));
            }
            // `run` carries the command's own status, so kiln's own failures need another.
            if is_run { 125 } else { error.kind().exit_status() }
        }
    }
}

async fn dispatch(app: &App, command: Command) -> Result<u8> {
    match command {
        Command::Init(arguments) => init::run(app, &arguments),
        Command::Validate(arguments) => validate::run(app, &arguments),
        Command::Plan(arguments) => plan::run(app, &arguments),
        Command::Bake(arguments) => bake::run(app, &arguments).await,
        Command::Test(arguments) => test::run(app, &arguments).await,
        Command::Run(arguments) => run::run(app, &arguments).await,
        Command::Shell(arguments) => shell::run(app, &arguments).await,
        Command::Images(arguments) => images::run(app, &arguments).await,
        Command::Inspect(arguments) => inspect::run(app, &arguments).await,
        Command::Diff(arguments) => diff::run(app, &arguments).await,
        Command::Drift(arguments) => drift::run(app, &arguments).await,
        Command::Tag(arguments) => tag::tag(app, &arguments),
        Command::Untag(arguments) => tag::untag(app, &arguments),
        Command::Push(arguments) => push::run(app, &arguments).await,
        Command::Publish(arguments) => publish::run(app, &arguments).await,
        Command::Pull(arguments) => pull::run(app, &arguments).await,
        Command::Copy(arguments) => copy::run(app, &arguments).await,
        Command::Save(arguments) => save::run(app, &arguments).await,
        Command::Load(arguments) => load::run(app, &arguments).await,
        Command::Promote(arguments) => promote::run(app, &arguments).await,
        Command::Rollback(arguments) => rollback::run(app, &arguments).await,
        Command::History(arguments) => history::run(app, &arguments).await,
        Command::Policy(arguments) => policy::run(app, &arguments).await,
        Command::Revoke(arguments) => revoke::run(app, &arguments).await,
        Command::Sbom(arguments) => sbom::run(app, &arguments).await,
        Command::Export(arguments) => export::run(app, &arguments).await,
        Command::Import(arguments) => import::run(app, &arguments).await,
        Command::Keygen(arguments) => keygen::run(app, &arguments),
        Command::Sign(arguments) => sign::run(app, &arguments).await,
        Command::Verify(arguments) => verify::run(app, &arguments).await,
        Command::Rebake(arguments) => rebake::run(app, &arguments).await,
        Command::Age(arguments) => age::run(app, &arguments).await,
        Command::Prune(arguments) => prune::run(app, &arguments).await,
        Command::Reap(arguments) => reap::run(app, &arguments).await,
        Command::Doctor(arguments) => doctor::run(app, &arguments).await,
        Command::Completions(arguments) => completions::run(&arguments),
        Command::Man(arguments) => man::run(&arguments),
    }
}

/// The error for a file that is there already.
pub(crate) fn would_overwrite(path: &std::path::Path) -> Error {
    Error::new(kiln_model::Code::Usage, format!("{} is there already", path.display())).next("name another file, or add --force")
}

/// Writes a result to a file, in one piece.
pub(crate) fn write_result(path: &std::path::Path, bytes: &[u8], force: bool) -> Result<()> {
    if path.exists() && !force {
        return Err(would_overwrite(path));
    }
    let what = || format!("write {}", path.display());
    let part = path.with_file_name(format!(".{}.{}", path.file_name().unwrap_or_default().to_string_lossy(), ulid::Ulid::generate()));
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        drop(std::fs::remove_file(&part));
    }
    written.trying(what)
}
