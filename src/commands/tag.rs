//! `kiln tag` and `kiln untag`.

use kiln_model::Result;
use kiln_model::reference::Reference;

use super::App;
use crate::cli::{Tag, Untag};

pub(super) fn tag(app: &App, arguments: &Tag) -> Result<u8> {
    let (image, new): (Reference, Reference) = (arguments.reference.parse()?, arguments.new.parse()?);
    let store = app.store()?;
    let moved = store.tag(&image, &new)?;
    let digest = store.resolve(&new)?;
    app.output.result(&serde_json::json!({ "tag": new.to_string(), "digest": digest, "was": moved.as_ref().map(|m| m.from) }), || {
        match &moved {
            Some(moved) => moved.to_string(),
            None => format!("{new} is {digest}"),
        }
    });
    Ok(0)
}

pub(super) fn untag(app: &App, arguments: &Untag) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let digest = app.store()?.untag(&reference, false)?;
    app.output.result(&serde_json::json!({ "untagged": reference.to_string(), "digest": digest }), || format!("{reference} was {digest}"));
    Ok(0)
}
