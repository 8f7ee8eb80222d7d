//! Images on their way to registries, archives and clouds, and back.

use std::path::PathBuf;

use clap::Args;

use super::baking::name_and_value;

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
