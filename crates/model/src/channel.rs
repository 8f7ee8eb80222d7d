//! Channels: named pointers with a history.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::error::Result;

/// One move of a channel. Records form a chain by digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// 1, 2, 3, …
    pub seq: u64,
    /// Digest of the record before; none for the first.
    pub previous: Option<Digest>,
    /// Manifest digest the channel points to from here on.
    pub image: Digest,
    /// `promote` or `rollback`.
    pub action: String,
    /// RFC 3339 time.
    pub time: String,
    /// Who.
    pub actor: String,
    /// Why.
    pub reason: Option<String>,
}

/// Keeps the records of channels: exact in a store, as good as it can be in a
/// registry, which has no compare-and-swap.
#[async_trait]
pub trait ChannelBackend: Send + Sync {
    /// All records of `name@channel`, oldest first.
    ///
    /// # Errors
    /// When they cannot be read, or the chain is broken.
    async fn history(&self, name: &str, channel: &str) -> Result<Vec<Record>>;

    /// Appends a record whose `seq` and `previous` follow the newest one.
    ///
    /// # Errors
    /// [`crate::Code::Refused`] when another record came first.
    async fn append(&self, name: &str, channel: &str, record: &Record) -> Result<()>;
}
