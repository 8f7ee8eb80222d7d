//! `kiln push`: an image to a registry.

use kiln_model::event::Reports;
use kiln_model::home::Home;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Result};
use kiln_registry::Client;
use kiln_store::Store;
use kiln_store::transfer::{self, Sending, Sent};
use serde_json::{Value, json};

use super::App;
use crate::cli::Push;
use crate::network;
use crate::output::bytes;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Push) -> Result<u8> {
    let store = app.store()?;
    let (image, to) = match &*arguments.references {
        [image, to] => (image.parse()?, destination(to)?),
        [to] => {
            let to = destination(to)?;
            (namesake(&store, &to)?, to)
        }
        _ => return Err(Error::new(Code::Usage, "write kiln push [REF] DEST")),
    };
    let digest = store.resolve(&image)?;
    let (sent, to) = with_context(&app.home, &app.output.reports(), |context| {
        let (store, to) = (&store, &to);
        async move { push(&app.home, &network::client(&context.reports)?, store, &digest, to, &context.reports).await }
    })
    .await?;
    app.output.result(&as_json(&sent, &to), || summary(&sent, &to));
    Ok(0)
}

/// Pushes an image, and fixes the version that it has here. Without a tag the
/// image's version is its tag; gives the full reference.
pub(super) async fn push(
    home: &Home,
    client: &Client,
    store: &Store,
    digest: &Digest,
    to: &Reference,
    reports: &Reports,
) -> Result<(Sent, Reference)> {
    let config = store.image(digest)?.config;
    let tag = match &to.pointer {
        Pointer::Tag(tag) => tag.clone().unwrap_or_else(|| config.version.clone()),
        _ => return Err(no_destination(to)),
    };
    let (repository, known) = (network::repository(client, to)?, network::known(home));
    let sent = transfer::push(store, digest, &Sending { repository: &repository, tag: Some(&tag), known: &known, reports }).await?;
    let version = Reference { registry: None, name: config.name.clone(), pointer: Pointer::Tag(Some(config.version.clone())) };
    // Another image may have that version here by now.
    if store.resolve(&version).is_ok_and(|at| at == *digest) {
        store.fix(&version, "pushed")?;
    }
    Ok((sent, Reference { pointer: Pointer::Tag(Some(tag)), ..to.clone() }))
}

/// Where something can be sent to.
pub(super) fn destination(text: &str) -> Result<Reference> {
    let reference: Reference = text.parse()?;
    match (&reference.registry, &reference.pointer) {
        (Some(_), Pointer::Tag(_)) => Ok(reference),
        _ => Err(no_destination(&reference)),
    }
}

fn no_destination(reference: &Reference) -> Error {
    Error::new(Code::Usage, format!("nothing can be sent to `{reference}`")).next("write HOST/NAMESPACE/NAME, or HOST/NAMESPACE/NAME:TAG")
}

/// The image of the store that is named as where it goes to: `shop/web:1`, or
/// `web:1`.
fn namesake(store: &Store, to: &Reference) -> Result<Reference> {
    let here = |name: &str| Reference { registry: None, name: name.to_owned(), pointer: to.pointer.clone() };
    let (full, last) = (here(&to.name), here(to.name.rsplit('/').next().unwrap_or(&to.name)));
    if store.resolve(&full).is_ok() {
        return Ok(full);
    }
    store.resolve(&last).map(|_| last)
}

pub(super) fn as_json(sent: &Sent, to: &Reference) -> Value {
    let mut value = json!(sent);
    if let Some(object) = value.as_object_mut() {
        object.insert("reference".into(), json!(to.to_string()));
    }
    value
}

pub(super) fn summary(sent: &Sent, to: &Reference) -> String {
    let mut how = vec![format!("{} sent", bytes(sent.bytes_sent))];
    if sent.mounted > 0 {
        how.push(format!("{} mounted", bytes(sent.bytes_mounted)));
    }
    if sent.skipped > 0 {
        how.push(format!("{} were there", bytes(sent.bytes_skipped)));
    }
    format!("{to} is {} ({})", sent.digest, how.join(", "))
}
