//! Images of the store, and what is kept with them.

use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use kiln_disk::qemu_img::Target;

use super::baking::name_and_value;

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
pub(crate) struct Diff {
    /// Image: NAME, NAME:TAG or NAME@sha256:…
    #[arg(value_name = "A")]
    pub from: String,
    /// The image to compare it with
    #[arg(value_name = "B")]
    pub to: String,
    /// List every file, also those that change in every bake
    #[arg(long)]
    pub files: bool,
    /// Write a page for a browser to this file as well: one file, without scripts
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Overwrite a file that is there
    #[arg(long, requires = "html")]
    pub force: bool,
    /// Exit with status 3 when anything differs
    #[arg(long)]
    pub exit_code: bool,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("machine").args(["host", "disk"]).required(true)))]
pub(crate) struct Drift {
    /// Image that it was started from: NAME, NAME:TAG, NAME@CHANNEL or NAME@sha256:…, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Machine, as ssh knows it; as root, or a user who may use sudo without a password
    #[arg(long, value_name = "[USER@]HOST[:PORT]")]
    pub host: Option<String>,
    /// Copy of a machine's disk instead, raw or qcow2
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// Private key for ssh [default: as ssh's own settings say]
    #[arg(long, short, value_name = "FILE", requires = "host")]
    pub identity: Option<PathBuf>,
    /// The host keys that ssh trusts [default: as ssh's own settings say]
    #[arg(long, value_name = "FILE", requires = "host")]
    pub known_hosts: Option<PathBuf>,
    /// Go through this machine
    #[arg(long, value_name = "[USER@]HOST[:PORT]", requires = "host")]
    pub jump: Option<String>,
    /// Read only files that were touched since the bake, by the times of their inodes
    #[arg(long, requires = "host")]
    pub quick: bool,
    /// This path may change too, with all below it; `*` stands for any characters within a name
    #[arg(long, value_name = "PATH")]
    pub mutable: Vec<String>,
    /// List every path, also those that are part of a package or folder that is listed
    #[arg(long)]
    pub all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Sbom {
    /// Image: NAME, NAME:TAG or NAME@sha256:…
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Form of the document
    #[arg(long, short, default_value = "spdx", value_parser = PossibleValuesParser::new(kiln_contents::Format::NAMES))]
    pub format: String,
    /// Write it to this file [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Overwrite a file that is there
    #[arg(long, requires = "output")]
    pub force: bool,
    /// Attach it to the image, where the reference points to
    #[arg(long)]
    pub attach: bool,
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
    /// Format of the file [default: what its content says]; raw takes any content
    #[arg(long, short, value_parser = ["qcow2", "raw"], value_name = "FORMAT")]
    pub format: Option<String>,
    /// NAME:VERSION
    #[arg(value_name = "NAME:VERSION")]
    pub reference: String,
    /// Add a label
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Remove the AMIs of this region that nobody needs, instead: ec2:REGION
    #[arg(value_name = "ec2:REGION")]
    pub place: Option<String>,
    /// Of which repository the channels count, beside those of the store (HOST/NAMESPACE/NAME)
    #[arg(long = "channels-of", value_name = "REPOSITORY", requires = "place")]
    pub repositories: Vec<String>,
    /// Only AMIs that are older
    #[arg(long, value_name = "AGE", default_value = "7d", requires = "place")]
    pub older_than: String,
    /// AMIs that others may use, too
    #[arg(long, requires = "place")]
    pub shared: bool,
    /// Say what would go, and remove nothing; with --cache, list the checkpoints
    #[arg(long)]
    pub dry_run: bool,
    /// All checkpoints, built bases and downloads too: they can be made again
    #[arg(long, conflicts_with = "place")]
    pub cache: bool,
    /// Keep the images of so many states of each channel
    #[arg(long, value_name = "N", default_value_t = kiln_store::HISTORY)]
    pub history: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Reap {
    /// Look for what bakes have left in this region too, by its tags: their ledgers may be on other machines
    #[arg(long, value_name = "REGION")]
    pub ec2: Option<String>,
    /// Leave bakes alone that began within this time: they may be running elsewhere
    #[arg(long, value_name = "AGE", default_value = "6h", requires = "ec2")]
    pub older_than: String,
    /// What this bake has left, whatever its age
    #[arg(long, value_name = "ID", requires = "ec2")]
    pub bake: Option<String>,
    /// Say what would go, and remove nothing
    #[arg(long, requires = "ec2")]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Tell about this repository instead, which writes and removes a small artifact there
    #[arg(value_name = "HOST/NAMESPACE/NAME")]
    pub repository: Option<String>,
}
