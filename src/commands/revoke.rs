//! `kiln revoke`: an image must not be used any more, nor what was baked from it.

use std::collections::HashSet;

use kiln_model::channel::ChannelBackend as _;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::place::{Held, Place, images_of};
use kiln_store::revoke::{REVOCATION, Revocation, descendants};
use serde_json::json;

use super::App;
use crate::actor::{Signer, now};
use crate::cli::Revoke;

pub(super) async fn run(app: &App, arguments: &Revoke) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    if arguments.why.trim().is_empty() {
        return Err(Error::new(Code::Usage, "a revocation needs a reason").next("--why says it to whoever wants to use the image"));
    }
    let signer = Signer::open(arguments.key.as_deref(), &arguments.password, &app.output.reports())?;
    let place = app.place(&reference)?;
    let digest = place.resolve(&reference).await?;
    let images = images_of(&*place, &digest).await?;
    let own: Vec<Digest> = images.iter().map(|image| image.digest).collect();
    let disks: Vec<Digest> = images.iter().filter_map(|image| image.config.as_base()).collect();

    let mut marked = Vec::new();
    // An index and each of its images: either may be what is used.
    let mut itself = own.clone();
    if !itself.contains(&digest) {
        itself.push(digest);
    }
    for image in &itself {
        let disk = images.iter().find(|held| held.digest == *image).and_then(|image| image.config.as_base());
        if mark(&*place, &signer, arguments, *image, disk, None).await? {
            marked.push((*image, reference.to_string(), place.label(), false));
        }
    }
    let mut places = vec![place];
    for other in &arguments.also {
        let other: Reference = other.parse()?;
        places.push(app.place(&other)?);
    }
    // Bases of bases may be in one place and what was baked from them in another.
    let mut all = Vec::new();
    for (number, place) in places.iter().enumerate() {
        all.extend(place.images().await?.into_iter().map(|image| (number, image)));
    }
    let held: Vec<Held> = all.iter().map(|(_, image)| image.clone()).collect();
    let found: HashSet<Digest> = descendants(&disks, &held).into_iter().map(|image| image.digest).collect();
    for (number, image) in all.iter().filter(|(_, image)| found.contains(&image.digest) && !itself.contains(&image.digest)) {
        let Some(place) = places.get(*number) else { continue };
        if mark(&**place, &signer, arguments, image.digest, image.config.as_base(), Some(digest)).await? {
            let name = image.names.first().cloned().unwrap_or_else(|| image.digest.to_string());
            marked.push((image.digest, name, place.label(), true));
        }
    }

    let at = channels_at(app, &reference, &found, &itself).await?;
    let reports = app.output.reports();
    for channel in &at {
        reports.warn(format!("{channel} is at it; `kiln rollback {channel}` goes back to an image that is not revoked"));
    }
    let value = json!({
        "revoked": digest, "why": arguments.why, "channels": at,
        "marked": marked.iter().map(|(digest, name, place, descendant)| json!({ "digest": digest, "name": name, "place": place, "descendant": descendant })).collect::<Vec<_>>(),
    });
    app.output.result(&value, || {
        if marked.is_empty() {
            return format!("{reference} was revoked already, and all that was baked from it\n  digest  {digest}");
        }
        let line = |(digest, name, _, descendant): &(Digest, String, String, bool)| {
            format!("revoked {name} {digest}{}", if *descendant { ", which was baked from it" } else { "" })
        };
        marked.iter().map(line).collect::<Vec<_>>().join("\n")
    });
    Ok(0)
}

/// Attaches a revocation, unless there is one; tells whether there was none.
async fn mark(
    place: &dyn Place,
    signer: &Signer,
    arguments: &Revoke,
    image: Digest,
    disk: Option<Digest>,
    because: Option<Digest>,
) -> Result<bool> {
    if place.attached(&image).await?.iter().any(|attached| attached.artifact_type == REVOCATION) {
        return Ok(false);
    }
    let revocation = Revocation { v: 1, image, disk, why: arguments.why.clone(), time: now(), actor: signer.actor(), because };
    let signature = signer.sign(REVOCATION, &revocation.bytes()?)?;
    place.attach(&image, &revocation.artifact(signature.as_ref())?).await?;
    Ok(true)
}

/// Channels of the place that are at one of these images.
async fn channels_at(app: &App, reference: &Reference, found: &HashSet<Digest>, itself: &[Digest]) -> Result<Vec<String>> {
    let is = |digest: &Digest| found.contains(digest) || itself.contains(digest);
    if reference.registry.is_none() {
        let heads = app.store()?.heads()?;
        return Ok(heads.into_iter().filter(|(digest, _)| is(digest)).flat_map(|(_, channels)| channels).collect());
    }
    let place = app.remote(reference)?;
    let mut at = Vec::new();
    for channel in place.list(&reference.name).await? {
        if place.head(&reference.name, &channel).await?.is_some_and(|head| is(&head.record().image)) {
            at.push(Reference { pointer: Pointer::Channel(channel), ..reference.clone() }.to_string());
        }
    }
    Ok(at)
}
