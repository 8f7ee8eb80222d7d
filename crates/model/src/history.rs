//! What earlier bakes were made of and how long they took: what lets a plan say
//! why something runs and how long it will take, and lets a bake that would
//! give the same image give it back.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::image::CloudImage;
use crate::key::Part;
use crate::{Digest, Key};

/// One bake that ended well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Bake id (ULID).
    pub bake: String,
    /// Image name.
    pub name: String,
    /// Image version.
    pub version: String,
    /// Seconds since 1970 at its end.
    pub finished: u64,
    /// What the template called the base.
    pub base_label: String,
    /// Disk digest of the base, or what stands for it.
    pub base: Digest,
    /// Key of the machine before its first step.
    pub start: Key,
    /// Seconds from the start of a machine to a guest that answers, where one
    /// was booted.
    pub boot: Option<f64>,
    /// The steps, in order.
    pub steps: Vec<StepRecord>,
    /// Key of the seal.
    pub seal: Key,
    /// What the seal's key is made of.
    pub seal_parts: Vec<Part>,
    /// Seconds that sealing, stopping, checking and the snapshot took.
    pub seal_seconds: f64,
    /// Whether kiln could read the sealed disk and found it clean. None: the
    /// record is of a kiln that did not say.
    #[serde(default)]
    pub checked: Option<bool>,
    /// Key of the tests that the image has passed; none where none were run.
    pub tests: Option<Key>,
    /// Seconds that the tests took.
    pub test_seconds: f64,
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Digest of its root disk; none where that is at a cloud alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Digest>,
    /// What it was captured as at a cloud.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cloud: Vec<CloudImage>,
    /// Whether the base is at a cloud.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub base_at_cloud: bool,
}

/// One step of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Its unique name.
    pub name: String,
    /// Its provisioner's kind.
    pub kind: String,
    /// Its key, everything before it included.
    pub key: Key,
    /// What it is made of itself.
    pub parts: Vec<Part>,
    /// When it really ran, in seconds since 1970: maybe in an earlier bake.
    pub made: u64,
    /// Seconds it then took.
    pub seconds: f64,
}

impl Record {
    /// What results of tests are kept by: the digest of its root disk, or what
    /// stands for it.
    pub fn tested_disk(&self) -> Option<Digest> {
        self.disk.or_else(|| self.cloud.first().map(CloudImage::identity))
    }
}

impl StepRecord {
    /// How long ago it really ran.
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(UNIX_EPOCH + Duration::from_secs(self.made)).unwrap_or_default()
    }
}

/// Keeps the records.
pub trait History: Send + Sync {
    /// Those of the image `name`, oldest first. A line that cannot be read is
    /// left out.
    ///
    /// # Errors
    /// When they cannot be read.
    fn records(&self, name: &str) -> Result<Vec<Record>>;

    /// Adds one; the oldest of that name go when there are many.
    ///
    /// # Errors
    /// When it cannot be written.
    fn add(&self, record: &Record) -> Result<()>;
}
