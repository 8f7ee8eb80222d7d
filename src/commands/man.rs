//! `kiln man`: made from the command line's definition.

use clap::CommandFactory as _;
use kiln_model::{Result, ResultExt as _};

use crate::cli::{Cli, Man};

pub(super) fn run(arguments: &Man) -> Result<u8> {
    let folder = &arguments.folder;
    std::fs::create_dir_all(folder).trying(|| format!("make the folder {}", folder.display()))?;
    clap_mangen::generate_to(Cli::command(), folder).trying(|| format!("write the man pages to {}", folder.display()))?;
    Ok(0)
}
