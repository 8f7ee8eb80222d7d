//! The command line, defined once: help, man pages and completions are made
//! from it.

mod baking;
mod channels;
mod images;
mod proof;
mod transfer;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use baking::*;
pub(crate) use channels::*;
pub(crate) use images::*;
pub(crate) use proof::*;
pub(crate) use transfer::*;

/// Bakes immutable machine images: boots a base, provisions it once, seals it,
/// and keeps it as a golden image named by its content.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, about, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "Exit status: 0 done; 1 the work failed; 2 the command or template is wrong; 3 a test failed; \
    4 refused; 75 the infrastructure failed, try again; 130, 143 interrupted.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Where images, cache and ledger are kept [default: kiln in the platform's data directory]
    #[arg(long, global = true, env = "KILN_HOME", value_name = "DIR", hide_env_values = true)]
    pub home: Option<PathBuf>,
    /// Answer with JSON on standard output; bake: one event per line
    #[arg(long, global = true)]
    pub json: bool,
    /// Show errors and results only
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Speak plain http with registries that have no https (loopback is always allowed to)
    #[arg(long, global = true)]
    pub plain_http: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a commented template that bakes as it stands
    Init(Init),
    /// Check a template; reports every mistake at once
    Validate(TemplateArgs),
    /// Say what a bake would do, step by step, and why
    Plan(Plan),
    /// Bake templates into images
    Bake(Bake),
    /// Run a template's tests on an image, and mark it with the result
    Test(Test),
    /// Boot an image on a throwaway copy
    Run(Run),
    /// Open a shell on a template's machine before a step, or after all of them
    Shell(Shell),
    /// List the images of the store
    Images(Images),
    /// Show what an image is made of
    Inspect(Inspect),
    /// Compare two images: packages, files, config, provenance
    Diff(Diff),
    /// Compare a running machine, or a copy of its disk, with its image
    Drift(Drift),
    /// Give an image another tag
    Tag(Tag),
    /// Remove a tag; `prune` then frees what nothing else needs
    Untag(Untag),
    /// Send an image to a registry; only what is missing there moves
    Push(Push),
    /// Make an AMI of an image: its blocks become a snapshot, and only those that differ from an earlier one are sent
    Publish(Publish),
    /// Bring an image from a registry into the store, or straight into a disk file
    Pull(Pull),
    /// Copy an image between registries, or make a KubeVirt containerDisk of it
    Copy(Copy),
    /// Write images to an OCI archive
    Save(Save),
    /// Bring the images of an OCI archive into the store
    Load(Load),
    /// Move a channel on to an image
    Promote(Promote),
    /// Take a channel back to where it was
    Rollback(Rollback),
    /// Show where a channel was, when, by whom and why
    History(History),
    /// Show, set or check what a channel requires of an image
    #[command(subcommand)]
    Policy(Policy),
    /// Mark an image, and all that was baked from it, as not to be used
    Revoke(Revoke),
    /// Write an image's bill of materials: the packages in it
    Sbom(Sbom),
    /// Write an image's disk to a file
    Export(Export),
    /// Make an image of a disk file
    Import(Import),
    /// Make a pair of keys to sign with
    Keygen(Keygen),
    /// Sign an image
    Sign(Sign),
    /// Check who signed an image; without one, read every blob of the store again
    Verify(Verify),
    /// Bake an image again from its provenance, and show what comes out different, and of which step
    Rebake(Rebake),
    /// List images whose base or packages are out of date
    Age(Age),
    /// Remove what no image needs, and checkpoints over the budget
    Prune(Prune),
    /// Remove what killed bakes have left behind
    Reap(Reap),
    /// Tell what is missing on this machine, and how to install it; or what a registry guarantees
    Doctor(Doctor),
    /// Print the completions of a shell
    Completions(Completions),
    /// Write the man pages
    Man(Man),
}

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// Which shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct Man {
    /// Folder for the pages
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}
