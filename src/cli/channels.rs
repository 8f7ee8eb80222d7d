//! Channels, and what they require.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Password;

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
    /// Only if one run of the tools that configured it was proved to be enough
    #[arg(long = "require-converged")]
    pub converged: bool,
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
