//! What a bake tells of how an image came to be, for provenance, test results
//! and the hygiene report.
//!
//! Data flows one way: the bake hands over an [`Account`] when its image is in
//! the store, and hears only whether what had to be attached was attached. It
//! knows of neither keys nor formats. An account holds no value of a secret.

use std::collections::BTreeMap;

use async_trait::async_trait;

use crate::Digest;
use crate::error::Result;
use crate::image::CloudImage;
use crate::key::Key;
use crate::trial::Trial;

/// How an image came to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Account {
    /// Bake id (ULID) of the bake that made it.
    pub bake: String,
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Image name.
    pub name: String,
    /// Image version.
    pub version: String,
    /// Architecture in OCI's words.
    pub architecture: String,
    /// Disk digest of the root disk; none where it is at a cloud alone.
    pub disk: Option<Digest>,
    /// What it was captured as at a cloud.
    pub cloud: Vec<CloudImage>,
    /// `[disk] size` in bytes, where the template says one.
    pub disk_size: Option<u64>,
    /// What the template calls the base.
    pub base: String,
    /// Disk digest of the base; what stands for it, where it is at a cloud.
    pub base_disk: Digest,
    /// Whether the base is at a cloud, so that nobody here has read its disk.
    pub base_at_cloud: bool,
    /// The template itself, and then every file that it includes.
    pub templates: Vec<Input>,
    /// Where the template comes from, when that is a git repository.
    pub source: Option<Source>,
    /// The template's variables. Without a value: it was fetched from the
    /// environment, a file or a command. Sensitive ones are left out.
    pub variables: BTreeMap<String, Option<String>>,
    /// The builder's name in the template.
    pub builder: String,
    /// The steps, in order.
    pub steps: Vec<StepAccount>,
    /// Key of the seal.
    pub seal: Key,
    /// What its tests have found. None: none were run.
    pub tests: Option<Trial>,
    /// What the check of the stopped disk came to. None: not known any more.
    pub hygiene: Option<Hygiene>,
    /// Seconds since 1970 at the bake's beginning.
    pub started: u64,
    /// Seconds since 1970 at its end.
    pub finished: u64,
}

/// A file that went into a bake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Its path, relative to the template's folder or to what the step names.
    pub name: String,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// A commit of a git repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// URL of the repository, without credentials, where it has a remote.
    pub repository: Option<String>,
    /// The commit that is checked out.
    pub commit: String,
    /// The template's folder in it; empty for its root.
    pub folder: String,
    /// Whether tracked files differ from the commit.
    pub dirty: bool,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepAccount {
    /// Its unique name.
    pub name: String,
    /// Its provisioner's kind.
    pub kind: String,
    /// Its key, everything before it included.
    pub key: Key,
    /// The local files that it brought to the guest.
    pub inputs: Vec<Input>,
    /// Whether an earlier bake ran it.
    pub cached: bool,
    /// When it had run, in seconds since 1970.
    pub made: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// Whether a second run was tried on the same guest, and changed nothing.
    pub converged: bool,
}

/// What the check of the stopped disk came to; a bake whose disk was found
/// unclean makes no image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hygiene {
    /// Whether kiln could read the disk at all.
    pub checked: bool,
    /// Version of the seal.
    pub seal_version: String,
    /// What was looked for.
    pub rules: Vec<String>,
    /// Paths that the template keeps.
    pub kept: Vec<String>,
}

/// Attaches what follows from an account to its image.
#[async_trait]
pub trait Witness: Send + Sync {
    /// Attaches what is not attached yet. Told the same twice, it does nothing.
    ///
    /// # Errors
    /// When something cannot be signed or attached.
    async fn attest(&self, account: &Account) -> Result<()>;
}
