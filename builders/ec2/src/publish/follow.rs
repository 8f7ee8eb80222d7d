//! Parameters that follow a channel.
//!
//! The channel is the truth; a parameter is a copy of it for whoever starts
//! instances. Nothing is kept of a fan-out that was begun: whoever is asked
//! again compares every parameter with the channel and sets those that differ.

use kiln_model::{Digest, Result};

use super::Region;
use crate::api::Find;
use crate::api::error::CallExt as _;
use crate::api::images::ImageState;
use crate::tags;

/// The AMI of an image in a region; of several the newest.
///
/// # Errors
/// When the region cannot be asked.
pub async fn ami_of(region: &Region, image: &Digest) -> Result<Option<String>> {
    let find = Find::own().with(&format!("tag:{}", tags::DIGEST), &image.to_string());
    let found = region.calls.make(|| region.images.images(&find)).await;
    let mut found = found.trying_to(|| format!("look for the AMI of {image} in {}", region.name))?;
    let wanted = image.to_string();
    found.retain(|ami| ami.state == ImageState::Available && ami.tags.get(tags::DIGEST) == Some(&wanted));
    found.sort_by_key(|ami| ami.created);
    Ok(found.pop().map(|ami| ami.id))
}

/// Makes a parameter say `ami`; gives whether it said something else.
///
/// # Errors
/// When it cannot be read or written.
pub async fn point(region: &Region, parameter: &str, ami: &str) -> Result<bool> {
    let what = |verb: &str| format!("{verb} the parameter {parameter} in {}", region.name);
    let there = region.calls.make(|| region.parameters.get(parameter)).await.trying_to(|| what("read"))?;
    if there.is_some_and(|there| there.value == ami) {
        return Ok(false);
    }
    region.calls.make(|| region.parameters.put_image(parameter, ami)).await.trying_to(|| what("set"))?;
    Ok(true)
}
