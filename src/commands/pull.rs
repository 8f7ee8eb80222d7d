//! `kiln pull`: an image from a registry into the store, or into a disk file.

use std::path::Path;

use kiln_model::base::DiskFormat;
use kiln_model::reference::Reference;
use kiln_model::{Result, ResultExt as _};
use kiln_store::transfer::{self, Fetch};
use serde_json::json;

use super::{App, would_overwrite};
use crate::cli::Pull;
use crate::network;
use crate::output::bytes;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Pull) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    match &arguments.to {
        Some(file) => to_file(app, arguments, &reference, file).await,
        None => to_store(app, &reference).await,
    }
}

async fn to_store(app: &App, reference: &Reference) -> Result<u8> {
    let store = app.store()?;
    let pulled = with_context(&app.home, &app.output.reports(), |context| {
        let store = &store;
        async move {
            let image = network::open(&network::client(&context.reports)?, reference).await?;
            let names = network::names(reference);
            let pulled = transfer::pull(&image, store, &names, &network::known(&app.home), &context.reports).await?;
            pulled.moved.iter().for_each(|moved| context.reports.note(moved.to_string()));
            Ok(pulled)
        }
    })
    .await?;
    let names = store.image(&pulled.digest)?.names;
    let mut value = json!(pulled);
    if let Some(object) = value.as_object_mut() {
        object.insert("reference".into(), json!(reference.to_string()));
        object.insert("tags".into(), json!(names));
    }
    app.output.result(&value, || {
        let mut how = vec![format!("{} fetched", bytes(pulled.bytes_fetched))];
        for (count, what) in [
            (pulled.bytes_resumed, "were left by an earlier pull"),
            (pulled.bytes_reused, "taken from other images"),
            (pulled.bytes_skipped, "were there"),
        ] {
            if count > 0 {
                how.push(format!("{} {what}", bytes(count)));
            }
        }
        let name = names.first().map_or_else(|| pulled.digest.to_string(), Clone::clone);
        format!("{name} is {} ({})", pulled.digest, how.join(", "))
    });
    Ok(0)
}

async fn to_file(app: &App, arguments: &Pull, reference: &Reference, file: &Path) -> Result<u8> {
    let named = file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
    let format = match arguments.format.as_deref() {
        Some("qcow2") => DiskFormat::Qcow2,
        None if named => DiskFormat::Qcow2,
        _ => DiskFormat::Raw,
    };
    let file = std::path::absolute(file).trying(|| format!("write {}", file.display()))?;
    if file.exists() && !arguments.force {
        return Err(would_overwrite(&file));
    }
    let store = app.store()?;
    let written = with_context(&app.home, &app.output.reports(), |context| {
        let (store, file) = (&store, &file);
        async move {
            let image = network::open(&network::client(&context.reports)?, reference).await?;
            let reports = &context.reports;
            transfer::fetch(&Fetch { image: &image, store: Some(store), to: file, format, replace: arguments.force, reports }).await
        }
    })
    .await?;
    let mut value = json!(written);
    if let Some(object) = value.as_object_mut() {
        object.insert("reference".into(), json!(reference.to_string()));
        object.insert("file".into(), json!(file));
        object.insert("format".into(), json!(format.name()));
    }
    app.output.result(&value, || {
        let fetched = bytes(written.bytes_fetched);
        format!("wrote {} ({}, {} on disk, {fetched} fetched)", file.display(), format.name(), bytes(written.bytes_used))
    });
    Ok(0)
}
