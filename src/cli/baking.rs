//! Templates: checking, planning, baking, and trying what came out.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Password;

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

pub(super) fn name_and_value(text: &str) -> Result<(String, String), String> {
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
    /// Write what the tests found to this file, as JUnit XML
    #[arg(long, value_name = "FILE", conflicts_with = "no_test")]
    pub junit: Option<PathBuf>,
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
pub(crate) struct Test {
    /// Template or the folder of its kiln.toml: the image that was baked of it; or an image: NAME, NAME:TAG or NAME@sha256:…
    #[arg(default_value = ".", value_name = "TEMPLATE|REF")]
    pub subject: String,
    /// The template whose tests an image is to pass [default: the kiln.toml here, if it is that image's]
    #[arg(long, short = 'f', value_name = "TEMPLATE")]
    pub template: Option<PathBuf>,
    #[command(flatten)]
    pub variables: Variables,
    /// Run all tests, those that the image has passed too
    #[arg(long)]
    pub again: bool,
    /// Write what the tests found to this file, as JUnit XML
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Sign the result with this private key [default: the site's]
    #[arg(long, value_name = "FILE")]
    pub sign_key: Option<PathBuf>,
    #[command(flatten)]
    pub password: Password,
    /// Even if the image, or one that it was baked from, was revoked
    #[arg(long)]
    pub allow_revoked: bool,
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
