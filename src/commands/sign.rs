//! `kiln sign`: an image is what the owner of a key says it is.

use kiln_evidence::Subject;
use kiln_model::reference::{Pointer, Reference, is_version};
use kiln_model::{Digest, Result};
use kiln_store::Place;
use kiln_store::place::images_of;

use super::App;
use crate::cli::Sign;
use crate::{evidence, signing};

pub(super) async fn run(app: &App, arguments: &Sign) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let reports = app.output.reports();
    let place = app.place(&reference)?;
    let image = place.resolve(&reference).await?;
    let name = signed_name(&*place, &reference, &image).await?;
    let key = signing::key_to_sign(arguments.key.as_deref(), &arguments.password, &reports)?;
    let there = evidence::find(&*place, &Subject::new(image), std::slice::from_ref(key.public())).await?;
    let made = evidence::sign(&*place, &image, &name, &key, &there).await?;
    let value = serde_json::json!({ "reference": name, "digest": image, "key": key.id(), "attached": made });
    app.output.result(&value, || match made.is_empty() {
        true => format!("{name} ({image}) was signed by {} already", key.id()),
        false => format!("signed {name} ({image}) with {}", key.id()),
    });
    Ok(0)
}

/// What the signature calls the image: its name and version, whatever tag,
/// channel or digest it was reached by, since all of those but a version move.
async fn signed_name(place: &dyn Place, reference: &Reference, image: &Digest) -> Result<String> {
    let images = images_of(place, image).await?;
    let tag = match &reference.pointer {
        Pointer::Tag(Some(tag)) if is_version(tag) => Some(tag.clone()),
        _ => images.into_iter().next().map(|held| held.config.version),
    };
    Ok(Reference { pointer: Pointer::Tag(tag), ..reference.clone() }.to_string())
}
