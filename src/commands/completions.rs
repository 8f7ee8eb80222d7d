//! `kiln completions`: made from the command line's definition.

use clap::CommandFactory as _;
use kiln_model::Result;

use crate::cli::{Cli, Completions};
use crate::output::print;

pub(super) fn run(arguments: &Completions) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "kiln", &mut script);
    print(&String::from_utf8_lossy(&script));
    Ok(0)
}
