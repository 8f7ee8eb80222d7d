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
    /// Push each image: HOST/NAMESPACE/NAME[:TAG], or HOST/NAMESPACE/ for its own name and version
    #[arg(long, value_name = "REF")]
    pub push: Option<String>,
    /// Take disk checkpoints from this repository that a key has signed which the template trusts
    #[arg(long, value_name = "HOST/NAMESPACE/NAME")]
    pub cache_from: Option<String>,
    /// Leave this bake's disk checkpoints, signed, in this repository
    #[arg(long, value_name = "HOST/NAMESPACE/NAME")]
    pub cache_to: Option<String>,
    /// Do not run the template's tests
    #[arg(long)]
    pub no_test: bool,
    /// Read back the disk of an image that is captured at a cloud, so that the store has it
    #[arg(long)]
    pub fetch: bool,
    /// Start from a base even if it, or one that it was baked from, was revoked
    #[arg(long)]
    pub allow_revoked: bool,
    /// Sign image, provenance and results with this private key [default: the site's]
    #[arg(long, value_name = "FILE")]
    pub sign_key: Option<PathBuf>,
    #[command(flatten)]
    pub password: Password,
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
    /// Even if the image, or one that it was baked from, was revoked
    #[arg(long)]
    pub allow_revoked: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Shell {
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Before which step, by name or number [default: after all of them, before the seal]
    #[arg(long, value_name = "STEP")]
    pub before: Option<String>,
    /// Start from a base even if it, or one that it was baked from, was revoked
    #[arg(long)]
    pub allow_revoked: bool,
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
pub(crate) struct Push {
    /// Image of the store [default: the one that DEST names], and where to: HOST/NAMESPACE/NAME[:TAG]
    #[arg(value_names = ["REF", "DEST"], num_args = 1..=2, required = true)]
    pub references: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Publish {
    /// Image: NAME, NAME:TAG, NAME@CHANNEL or NAME@sha256:…, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Where to: ec2:REGION; the blocks go to the first, and AWS copies to the others
    #[arg(long, value_name = "ec2:REGION", required = true)]
    pub to: Vec<String>,
    /// Let this account use it: its number
    #[arg(long = "share-account", value_name = "ACCOUNT")]
    pub accounts: Vec<String>,
    /// Let this organisation, or unit of one, use it: its ARN
    #[arg(long = "share-organization", value_name = "ARN")]
    pub organizations: Vec<String>,
    /// Let everybody use it
    #[arg(long)]
    pub public: bool,
    /// Encrypt it with this KMS key, one for each region: its ARN
    #[arg(long = "kms-key", value_name = "ARN")]
    pub keys: Vec<String>,
    /// Tag the AMI and its snapshots
    #[arg(long = "tag", value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub tags: Vec<(String, String)>,
    /// Show it to others for so long (90d), then as deprecated
    #[arg(long, value_name = "AGE")]
    pub deprecate_after: Option<String>,
    /// Type of the volumes that instances get
    #[arg(long, default_value = "gp3", value_name = "TYPE")]
    pub volume_type: String,
    /// Even if the image, or one that it was baked from, was revoked
    #[arg(long)]
    pub allow_revoked: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// Image: HOST/NAMESPACE/NAME:TAG, …@CHANNEL or …@sha256:…
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Write its disk to this file instead of storing it; `.qcow2`, or raw
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,
    /// Format of that file [default: as its name says]
    #[arg(long, short, value_parser = ["qcow2", "raw"], requires = "to", value_name = "FORMAT")]
    pub format: Option<String>,
    /// Overwrite a file that is there
    #[arg(long, requires = "to")]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// Image, of the store or a registry
    #[arg(value_name = "FROM")]
    pub from: String,
    /// HOST/NAMESPACE/NAME[:TAG], containerdisk://HOST/NAMESPACE/NAME[:TAG], or a short name: into the store
    #[arg(value_name = "TO")]
    pub to: String,
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// Images of the store
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<String>,
    /// The archive
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Overwrite a file that is there
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Load {
    /// The archive
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Promote {
    /// Image: NAME, NAME:TAG, NAME@CHANNEL or NAME@sha256:…, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "REF")]
    pub reference: String,
    /// CHANNEL, or NAME@CHANNEL or HOST/NAMESPACE/NAME@CHANNEL for one elsewhere, to which the image is copied
    #[arg(long, value_name = "CHANNEL")]
    pub to: String,
    /// Why; kept in the channel's history
    #[arg(long, short, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Only if the channel is at this digest now (`none`: only if there is no such channel)
    #[arg(long, value_name = "DIGEST")]
    pub expect: Option<String>,
    /// Sign the record with this private key [default: the site's]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    #[command(flatten)]
    pub password: Password,
    #[command(flatten)]
    pub require: Conditions,
    /// Only if the channel's policy is signed with one of these public keys
    #[arg(long = "policy-key", value_name = "FILE")]
    pub policy_keys: Vec<PathBuf>,
    /// Even if the image, or one that it was baked from, was revoked
    #[arg(long)]
    pub allow_revoked: bool,
}

/// Conditions beside those of a channel's policy.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Conditions, beside those of the channel's policy")]
pub(crate) struct Conditions {
    /// Only if it is signed with one of these public keys, whose statements alone then count
    #[arg(long = "require-signature", value_name = "FILE")]
    pub signature: Vec<PathBuf>,
    /// Only if its tests have passed
    #[arg(long = "require-tests")]
    pub tests: bool,
    /// Only if the check of its disk found nothing
    #[arg(long = "require-hygiene")]
    pub hygiene: bool,
    /// Only if it was baked from one of these source repositories
    #[arg(long = "require-source", value_name = "URL")]
    pub source: Vec<String>,
    /// Only if it was baked not longer ago (30d, 12h)
    #[arg(long = "require-age", value_name = "AGE")]
    pub age: Option<String>,
    /// Only if its base is the newest there is
    #[arg(long = "require-current-base")]
    pub current_base: bool,
    /// Only if this channel was at it before
    #[arg(long = "require-channel", value_name = "CHANNEL")]
    pub channels: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Rollback {
    /// NAME@CHANNEL, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "NAME@CHANNEL")]
    pub channel: String,
    /// Where to, of all that the channel was at: an image, or the number of a record [default: the state before, over revoked ones]
    #[arg(long, value_name = "REF")]
    pub to: Option<String>,
    /// Why; kept in the channel's history
    #[arg(long, short, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Only if the channel is at this digest now
    #[arg(long, value_name = "DIGEST")]
    pub expect: Option<String>,
    /// Sign the record with this private key [default: the site's]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    #[command(flatten)]
    pub password: Password,
    /// Even to an image that was revoked
    #[arg(long)]
    pub allow_revoked: bool,
}

#[derive(Debug, Args)]
pub(crate) struct History {
    /// NAME@CHANNEL, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "NAME@CHANNEL")]
    pub channel: String,
    /// Fail unless every record is signed with one of these public keys
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Policy {
    /// Show a channel's policy and who has signed it
    Show(PolicyShow),
    /// Sign a policy and put it beside a channel
    Set(PolicySet),
    /// Check an image against the policy of a channel, without moving anything
    Check(PolicyCheck),
}

#[derive(Debug, Args)]
pub(crate) struct PolicyShow {
    /// NAME@CHANNEL, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "NAME@CHANNEL")]
    pub channel: String,
    /// Only if it is signed with one of these public keys
    #[arg(long = "policy-key", value_name = "FILE")]
    pub policy_keys: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct PolicySet {
    /// NAME@CHANNEL, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "NAME@CHANNEL")]
    pub channel: String,
    /// The policy, in TOML
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Sign it with this private key [default: the site's]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    #[command(flatten)]
    pub password: Password,
    /// Even if the policy that is there was signed with another key
    #[arg(long)]
    pub replace_key: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PolicyCheck {
    /// The channel, whose image is checked: NAME@CHANNEL, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "NAME@CHANNEL")]
    pub channel: String,
    /// Check this image instead, as if it were to be promoted
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    #[command(flatten)]
    pub require: Conditions,
    /// Only if the channel's policy is signed with one of these public keys
    #[arg(long = "policy-key", value_name = "FILE")]
    pub policy_keys: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// Image: NAME:TAG, NAME@CHANNEL or NAME@sha256:…, with HOST/NAMESPACE/ for a registry
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Why; whoever wants to use the image is told
    #[arg(long, value_name = "TEXT")]
    pub why: String,
    /// Mark what was baked from it in this repository too (HOST/NAMESPACE/NAME)
    #[arg(long, value_name = "REPOSITORY")]
    pub also: Vec<String>,
    /// Sign the revocation with this private key [default: the site's]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    #[command(flatten)]
    pub password: Password,
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

#[derive(Debug, Clone, Args)]
pub(crate) struct Password {
    /// File whose first line is the private key's passphrase [default: $KILN_KEY_PASSWORD, or it is asked for]
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Keygen {
    /// File for the private key; the public one goes beside it, as .pub
    #[arg(long, short, default_value = "kiln.key", value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    pub password: Password,
}

#[derive(Debug, Args)]
pub(crate) struct Sign {
    /// Image: NAME, NAME:TAG, NAME@CHANNEL, NAME@sha256:… or HOST/NAMESPACE/NAME:TAG
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Private key [default: the site's]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    #[command(flatten)]
    pub password: Password,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Image: NAME, NAME:TAG, NAME@CHANNEL, NAME@sha256:… or HOST/NAMESPACE/NAME:TAG; or an AMI,
    /// whose snapshots are read back: ec2:AMI or ec2:REGION:AMI
    #[arg(value_name = "REF")]
    pub reference: Option<String>,
    /// Public key that has to have signed it; with several, any of them
    #[arg(long = "key", value_name = "FILE", requires = "reference")]
    pub keys: Vec<PathBuf>,
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
