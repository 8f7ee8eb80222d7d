//! One file per command.

mod bake;
mod completions;
mod doctor;
mod export;
mod images;
mod import;
mod init;
mod inspect;
mod man;
mod plan;
mod prune;
mod reap;
mod run;
mod shell;
mod tag;
mod validate;
mod verify;

use std::sync::Arc;

use kiln_cache::{Checkpoints, HistoryFiles};
use kiln_model::event::Failure;
use kiln_model::history::History;
use kiln_model::home::Home;
use kiln_model::{Error, Result};
use kiln_store::Store;

use crate::cli::{Cli, Command};
use crate::output::{Output, print_json, show_error};

/// What every command works with.
pub(crate) struct App {
    pub home: Home,
    pub output: Output,
}

impl App {
    /// The store, made if it is not there.
    pub(crate) fn store(&self) -> Result<Store> {
        Store::open(&self.home.store())
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
    let is_run = matches!(cli.command, Command::Run(_));
    let streams_events = matches!(cli.command, Command::Bake(_));
    let done = match Home::open(cli.global.home) {
        Ok(home) => dispatch(&App { home, output: output.clone() }, cli.command).await,
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
        Command::Run(arguments) => run::run(app, &arguments).await,
        Command::Shell(arguments) => shell::run(app, &arguments).await,
        Command::Images(arguments) => images::run(app, &arguments),
        Command::Inspect(arguments) => inspect::run(app, &arguments),
        Command::Tag(arguments) => tag::tag(app, &arguments),
        Command::Untag(arguments) => tag::untag(app, &arguments),
        Command::Export(arguments) => export::run(app, &arguments).await,
        Command::Import(arguments) => import::run(app, &arguments).await,
        Command::Verify => verify::run(app),
        Command::Prune(arguments) => prune::run(app, &arguments),
        Command::Reap => reap::run(app).await,
        Command::Doctor => doctor::run(app).await,
        Command::Completions(arguments) => completions::run(&arguments),
        Command::Man(arguments) => man::run(&arguments),
    }
}

/// The error for a file that is there already.
pub(crate) fn would_overwrite(path: &std::path::Path) -> Error {
    Error::new(kiln_model::Code::Usage, format!("{} is there already", path.display())).next("name another file, or add --force")
}
