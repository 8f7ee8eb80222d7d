//! `kiln`: arguments, terminal, exit status.

mod actor;
mod archive;
mod cli;
mod commands;
mod ec2;
mod ec2_bake;
mod evidence;
mod facts;
mod followers;
mod image_base;
mod manifest;
mod network;
mod output;
mod rebake;
mod registry;
mod session;
mod shared_cache;
mod signing;
mod site;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let arguments = cli::Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output::fatal(&format!("cannot start: {error}")),
    };
    let status = runtime.block_on(commands::run(arguments));
    // A thread that still reads a disk must not hold up the end.
    runtime.shutdown_background();
    ExitCode::from(status)
}
