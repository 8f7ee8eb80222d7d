//! The command line, defined once: help, man pages and completions are made
//! from it.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_disk::qemu_img::Target;

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
    /// Boot an image on a throwaway copy
    Run(Run),
    /// Open a shell on a template's machine before a step, or after all of them
    Shell(Shell),
    /// List the images of the store
    Images(Images),
    /// Show what an image is made of
    Inspect(Inspect),
    /// Give an image another tag
    Tag(Tag),
    /// Remove a tag; `prune` then frees what nothing else needs
    Untag(Untag),
    /// Write an image's disk to a file
    Export(Export),
    /// Make an image of a disk file
    Import(Import),
    /// Read every blob and block again and compare the digests
    Verify,
    /// Remove what no image needs, and checkpoints over the budget
    Prune(Prune),
    /// Remove what killed bakes have left behind
    Reap,
    /// Tell what is missing on this machine, and how to install it
    Doctor,
    /// Print the completions of a shell
    Completions(Completions),
    /// Write the man pages
    Man(Man),
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Folder for the template
    #[arg(default_value = ".", value_name = "DIR")]
    pub folder: PathBuf,
    /// Overwrite a template that is there
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct TemplateArgs {
    /// Template, or the folder of a kiln.toml
    #[arg(default_value = ".", value_name = "TEMPLATE")]
    pub template: PathBuf,
    #[command(flatten)]
    pub variables: Variables,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Variables {
    /// Set a variable (not a sensitive one: the command line can be seen by others)
    #[arg(long = "var", value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub vars: Vec<(String, String)>,
    /// Set variables from a TOML file
    #[arg(long = "var-file", value_name = "FILE")]
    pub var_files: Vec<PathBuf>,
    /// Use this builder of the template
    #[arg(long, value_name = "NAME")]
    pub builder: Option<String>,
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

/// What to do anew although it was done before.
#[derive(Debug, Clone, Args)]
pub(crate) struct Anew {
    /// Run every step anew, on the base as it is
    #[arg(long)]
    pub no_cache: bool,
    /// Get the base anew, and run every step
    #[arg(long)]
    pub fresh: bool,
    /// Run this step anew, and all after it
    #[arg(long, value_name = "STEP", conflicts_with_all = ["no_cache", "fresh"])]
    pub from: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub template: TemplateArgs,
    #[command(flatten)]
    pub anew: Anew,
}

#[derive(Debug, Args)]
pub(crate) struct Bake {
    /// Templates, or the folders of their kiln.toml; those that another one starts from come first
    #[arg(default_value = ".", value_name = "TEMPLATE")]
    pub templates: Vec<PathBuf>,
    #[command(flatten)]
    pub variables: Variables,
    /// Give each image this tag as well
    #[arg(long = "tag", short, value_name = "TAG")]
    pub tags: Vec<String>,
    #[command(flatten)]
    pub anew: Anew,
    /// Do not run the template's tests
    #[arg(long)]
    pub no_test: bool,
    /// What to do with the machine when a step fails
    #[arg(long, value_enum, default_value_t = OnFailure::Clean, value_name = "WHAT")]
    pub on_failure: OnFailure,
    /// Write the last event (images and error) to this file
    #[arg(long, value_name = "FILE")]
    pub result: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum OnFailure {
    /// Remove it
    Clean,
    /// Keep its disk and say how to boot it
    Keep,
    /// Open a shell on it as it is
    Shell,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Image: NAME, NAME:TAG or NAME@sha256:…
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Run one command and exit with its status (125: kiln itself failed)
    #[arg(long, value_name = "COMMAND")]
    pub exec: Option<String>,
    /// Lead a port of this machine (on loopback) to a port of the guest
    #[arg(long = "port", short, value_name = "HOST:GUEST", value_parser = port)]
    pub ports: Vec<(u16, u16)>,
    /// Give the guest user data, as a deployment would
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Memory of the machine
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    pub memory: String,
    /// Processors of the machine
    #[arg(long, value_name = "N")]
    pub cpus: Option<u16>,
    /// auto, kvm or tcg
    #[arg(long, default_value = "auto", value_name = "NAME")]
    pub accelerator: String,
    /// bios or uefi [default: what the image starts with]
    #[arg(long, value_name = "NAME")]
    pub firmware: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Shell {
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Before which step, by name or number [default: after all of them, before the seal]
    #[arg(long, value_name = "STEP")]
    pub before: Option<String>,
}

fn port(text: &str) -> Result<(u16, u16), String> {
    let parse = |part: &str| part.parse::<u16>().ok().filter(|port| *port > 0);
    text.split_once(':')
        .and_then(|(host, guest)| Some((parse(host)?, parse(guest)?)))
        .ok_or_else(|| "write HOST:GUEST, such as 8080:80".to_owned())
}

#[derive(Debug, Args)]
pub(crate) struct Images {
    /// Only images of this name
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Bases too
    #[arg(long, short)]
    pub all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Image: NAME, NAME:TAG or NAME@sha256:…
    #[arg(value_name = "REF")]
    pub reference: String,
}

#[derive(Debug, Args)]
pub(crate) struct Tag {
    /// Image: NAME, NAME:TAG or NAME@sha256:…
    #[arg(value_name = "REF")]
    pub reference: String,
    /// NAME:TAG
    #[arg(value_name = "NEW")]
    pub new: String,
}

#[derive(Debug, Args)]
pub(crate) struct Untag {
    /// NAME:TAG
    #[arg(value_name = "NAME:TAG")]
    pub reference: String,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Image: NAME, NAME:TAG or NAME@sha256:…
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Format of the file
    #[arg(long, short, default_value = "qcow2", value_parser = PossibleValuesParser::new(Target::NAMES))]
    pub format: String,
    /// The file
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Overwrite a file that is there
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// Disk file, raw or qcow2
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// NAME:VERSION
    #[arg(value_name = "NAME:VERSION")]
    pub reference: String,
    /// Add a label
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Say what would go, and remove nothing; with --cache, list the checkpoints
    #[arg(long)]
    pub dry_run: bool,
    /// All checkpoints, built bases and downloads too: they can be made again
    #[arg(long)]
    pub cache: bool,
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
