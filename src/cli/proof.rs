//! Keys, signatures, and whether an image is what it says.

use std::path::PathBuf;

use clap::Args;

use super::Variables;

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
pub(crate) struct Rebake {
    /// Image of the store: NAME, NAME:TAG, NAME@CHANNEL or NAME@sha256:…
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Its template, or the folder of its kiln.toml [default: the commit that its provenance names,
    /// where the repository around the current folder has it, or else the current folder]
    #[arg(long, value_name = "TEMPLATE")]
    pub template: Option<PathBuf>,
    #[command(flatten)]
    pub variables: Variables,
    /// Public key that has to have signed its provenance; with several, any of them
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,
    /// Bake even if files of the template are not those that it was baked from
    #[arg(long)]
    pub allow_changed: bool,
    /// Boot the base anew instead of going on from the booted base that is cached
    #[arg(long)]
    pub boot: bool,
    /// Keep the image that comes out, as rebake/NAME:VERSION
    #[arg(long)]
    pub keep: bool,
    /// Write a page for a browser to this file as well
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Overwrite a file that is there
    #[arg(long, requires = "html")]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Age {
    /// Images of the store [default: all that have a name]
    #[arg(value_name = "REF")]
    pub references: Vec<String>,
    /// Exit with status 3 when an image or its base is older than so many days
    #[arg(long, value_name = "DAYS")]
    pub max: Option<u32>,
    /// Exit with status 3 when anything is out of date
    #[arg(long)]
    pub exit_code: bool,
    /// Ask no network: what was fetched before has to do
    #[arg(long)]
    pub offline: bool,
    /// Name every package that is out of date
    #[arg(long)]
    pub packages: bool,
}
