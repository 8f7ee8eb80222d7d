//! Channels: where their records are kept, in a store and in a registry.
//!
//! The form of a record and of the chain is `kiln_model::channel`; what each
//! place guarantees is told in `docs/channels.md`.

mod files;
mod tags;

use kiln_model::error::{Code, Error, Result};

pub(crate) use tags::may_tag;

/// There is no such channel; says which there are.
pub(crate) fn unknown(name: &str, channel: &str, others: &[String]) -> Error {
    let error = Error::new(Code::NotFound, format!("{name} has no channel `{channel}`"));
    if others.is_empty() {
        error.next(format!("`kiln promote {name}:TAG --to {channel}` makes it; write {name}:TAG for a version"))
    } else {
        error.next(format!("it has {}; write {name}:TAG for a version", others.join(", ")))
    }
}

/// Refuses tags that kiln and cosign keep for what belongs to images and
/// channels.
pub(crate) fn not_reserved(tag: &str) -> Result<()> {
    let digest = tag.strip_prefix("sha256-").and_then(|rest| rest.get(..64));
    if tag.starts_with("kiln.") || digest.is_some_and(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit())) {
        let what = format!("the tag `{tag}` is kept for what belongs to images and channels");
        return Err(Error::new(Code::Usage, what).next("choose another one"));
    }
    Ok(())
}

/// A tag cannot have the name of a channel that is there.
pub(crate) fn is_a_channel(name: &str, channel: &str) -> Error {
    Error::new(Code::Usage, format!("`{channel}` is a channel of {name}, which no tag can move"))
        .next(format!("`kiln promote REF --to {channel}` moves it; choose another name for a tag"))
}

/// A channel cannot have the name of a tag that is there.
pub(crate) fn is_a_tag(name: &str, channel: &str) -> Error {
    Error::new(Code::Refused, format!("{name} has a tag `{channel}` already, so it cannot have a channel of that name"))
        .next(format!("choose another name, or remove the tag: `kiln untag {name}:{channel}`"))
}
