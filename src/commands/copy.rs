//! `kiln copy`: an image from wherever it is to wherever it shall be.

use kiln_model::event::Reports;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Error, Result};
use kiln_store::transfer::{self, Known, Remote, Sending, Source};
use kiln_store::{Place as _, RemotePlace};
use serde_json::json;

use super::App;
use super::push::{as_json, destination, push, summary};
use crate::cli::Copy;
use crate::network;
use crate::output::bytes;
use crate::session::with_context;

/// What stands before the reference of a containerDisk.
const CONTAINER_DISK: &str = "containerdisk://";

pub(super) async fn run(app: &App, arguments: &Copy) -> Result<u8> {
    let from: Reference = arguments.from.parse()?;
    if let Some(to) = arguments.to.strip_prefix(CONTAINER_DISK) {
        return container_disk(app, &from, &destination(to)?).await;
    }
    let to: Reference = arguments.to.parse()?;
    let reports = app.output.reports();
    match (&from.registry, &to.registry) {
        (None, None) => Err(Error::new(Code::Usage, "both are in the store").next("`kiln tag` gives an image another name")),
        (_, Some(_)) => {
            let to = destination(&arguments.to)?;
            let (sent, to) = with_context(&app.home, &reports, |context| {
                let (from, to) = (&from, &to);
                async move { to_registry(app, from, to, &context.reports).await }
            })
            .await?;
            app.output.result(&as_json(&sent, &to), || summary(&sent, &to));
            Ok(0)
        }
        (Some(_), None) => {
            let Pointer::Tag(_) = &to.pointer else {
                return Err(Error::new(Code::Usage, format!("nothing can be copied to `{to}`")).next("write NAME, or NAME:TAG"));
            };
            let store = app.store()?;
            let (digest, moved) = with_context(&app.home, &reports, |context| {
                let (store, from, to) = (&store, &from, &to);
                async move {
                    let digest = network::bring(&app.home, store, from, None, &context.reports).await?;
                    let tag = match &to.pointer {
                        Pointer::Tag(Some(tag)) => tag.clone(),
                        _ => store.image(&digest)?.config.version,
                    };
                    let image = Reference { registry: None, name: to.name.clone(), pointer: Pointer::Digest(digest) };
                    Ok((digest, store.tag(&image, &Reference { pointer: Pointer::Tag(Some(tag)), ..to.clone() })?))
                }
            })
            .await?;
            let value = json!({ "reference": to.to_string(), "digest": digest, "moved_from": moved.as_ref().map(|moved| moved.from) });
            app.output.result(&value, || moved.map_or_else(|| format!("{to} is {digest}"), |moved| moved.to_string()));
            Ok(0)
        }
    }
}

/// To a registry, from the store or another repository.
async fn to_registry(app: &App, from: &Reference, to: &Reference, reports: &Reports) -> Result<(transfer::Sent, Reference)> {
    let client = network::client(reports)?;
    if from.registry.is_none() {
        let store = app.store()?;
        let digest = store.resolve(from)?;
        return push(&app.home, &client, &store, &digest, to, reports).await;
    }
    let (source, repository) = (network::repository(&client, from)?, network::repository(&client, to)?);
    let digest = RemotePlace::new(source.clone()).resolve(from).await?;
    // As it is called there, else by its version.
    let tag = match (&to.pointer, &from.pointer) {
        (Pointer::Tag(Some(tag)), _) | (_, Pointer::Tag(Some(tag))) => tag.clone(),
        _ => Remote::open(&source, &digest).await?.config().version.clone(),
    };
    let known: Known = network::known(&app.home);
    let sent = transfer::copy(&source, &digest, &Sending { repository: &repository, tag: Some(&tag), known: &known, reports }).await?;
    Ok((sent, Reference { pointer: Pointer::Tag(Some(tag)), ..to.clone() }))
}

async fn container_disk(app: &App, from: &Reference, to: &Reference) -> Result<u8> {
    let store = app.store()?;
    let (made, to) = with_context(&app.home, &app.output.reports(), |context| {
        let store = &store;
        async move {
            let client = network::client(&context.reports)?;
            let repository = network::repository(&client, to)?;
            let (digest, remote) = match &from.registry {
                None => (store.resolve(from)?, None),
                Some(_) => {
                    let remote = network::open(&client, from).await?;
                    (remote.digest(), Some(remote))
                }
            };
            let version = match &remote {
                Some(remote) => remote.config().version.clone(),
                None => store.image(&digest)?.config.version,
            };
            let tag = match &to.pointer {
                Pointer::Tag(Some(tag)) => tag.clone(),
                _ => version,
            };
            let source = remote.as_ref().map_or(Source::Store(&digest), Source::Remote);
            let known = network::known(&app.home);
            let sending = Sending { repository: &repository, tag: Some(&tag), known: &known, reports: &context.reports };
            let made = transfer::containerdisk(store, &source, &sending).await?;
            Ok((made, Reference { pointer: Pointer::Tag(Some(tag)), ..to.clone() }))
        }
    })
    .await?;
    let mut value = json!(made);
    if let Some(object) = value.as_object_mut() {
        object.insert("reference".into(), json!(to.to_string()));
    }
    app.output.result(&value, || {
        let how = if made.existed { "was there".to_owned() } else { format!("{} sent", bytes(made.bytes_sent)) };
        format!("{to} is {}, a containerDisk of {} ({how})", made.digest, made.image)
    });
    Ok(0)
}
