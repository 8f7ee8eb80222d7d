//! `kiln sbom`: the packages in an image, as a document for other programs.

use std::collections::BTreeMap;

use kiln_contents::{Document, Format, ImageFacts};
use kiln_disk::files::{DiskFiles, Pool};
use kiln_model::reference::Reference;
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::{Artifact, Image, Layer, Store};
use serde_json::json;

use super::{App, would_overwrite, write_result};
use crate::cli::Sbom;
use crate::output::print;

pub(super) async fn run(app: &App, arguments: &Sbom) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let format: Format = arguments.format.parse()?;
    if let Some(path) = arguments.output.as_ref().filter(|path| path.exists() && !arguments.force) {
        return Err(would_overwrite(path));
    }
    let store = app.store()?;
    let image = in_store(app, &store, &reference).await?;
    let document = document(&store, &image, format)?;
    let reports = app.output.reports();
    for note in &document.notes {
        reports.warn(note.clone());
    }
    let mut done = Vec::new();
    if let Some(path) = &arguments.output {
        write_result(path, &document.bytes, arguments.force)?;
        done.push(format!("wrote {} ({format}, {} packages)", path.display(), document.packages));
    }
    let mut attached = None;
    if arguments.attach {
        let place = app.place(&reference)?;
        attached = Some(place.attach(&image.digest, &artifact(&document)).await?);
        done.push(format!("attached to {reference} in {} ({format}, {} packages)", place.label(), document.packages));
    }
    if done.is_empty() {
        // The document is the result, and JSON either way.
        print(&String::from_utf8_lossy(&document.bytes));
        return Ok(0);
    }
    let value = json!({
        "image": image.digest, "format": arguments.format, "media_type": format.media_type(), "packages": document.packages,
        "digest": Digest::of(&document.bytes), "file": arguments.output, "attached": attached, "notes": document.notes,
    });
    app.output.result(&value, || done.join("\n"));
    Ok(0)
}

/// The image that a reference means, wherever that points to; its disk is read
/// from the store.
pub(super) async fn in_store(app: &App, store: &Store, reference: &Reference) -> Result<Image> {
    let digest = app.place(reference)?.resolve(reference).await?;
    store.image(&digest).map_err(|error| match (error.kind(), &reference.registry) {
        (Code::NotFound, Some(_)) => {
            let what = format!("{reference} is {digest}, which is not in the store, and disks are read from there");
            Error::new(Code::NotFound, what).next(format!("`kiln pull {reference}` brings it"))
        }
        _ => error,
    })
}

/// The bill of materials of an image of the store.
fn document(store: &Store, image: &Image, format: Format) -> Result<Document> {
    let files = files(store, &image.digest, &Pool::default())?.ok_or_else(|| {
        let what = format!(
            "the file system of image {} cannot be read: it is none of ext2, ext3 and ext4, or inside of LVM or encryption",
            image.digest
        );
        Error::new(Code::Failed, what).next("make the document in the guest, and attach it with the tools of your registry")
    })?;
    kiln_contents::sbom(&files, &facts(image), format)
}

/// A document as something to attach to its image.
fn artifact(document: &Document) -> Artifact {
    let kind = document.format.media_type();
    let layer = Layer::new(kind, document.bytes.clone());
    Artifact { artifact_type: kind.to_owned(), layers: vec![layer], annotations: BTreeMap::new(), tag: None }
}

/// Attaches the bill of materials (SPDX) of an image of the store to it, unless
/// there is one of any form already. `None` when there is, or when the image
/// has no file system that can be read.
///
/// # Errors
/// When the disk or a package database is damaged, or it cannot be written.
pub(crate) fn attach_once(store: &Store, digest: &Digest, pool: &Pool) -> Result<Option<Digest>> {
    let kinds = [Format::Spdx, Format::CycloneDx].map(Format::media_type);
    if store.attached(digest)?.iter().any(|attached| kinds.contains(&attached.artifact_type.as_str())) {
        return Ok(None);
    }
    let image = store.image(digest)?;
    if image.disk_digest().is_none() {
        return Ok(None);
    }
    let Some(files) = files(store, digest, pool)? else { return Ok(None) };
    let document = kiln_contents::sbom(&files, &facts(&image), Format::Spdx)?;
    store.attach(digest, &artifact(&document)).map(Some)
}

/// What is known of an image beside its files.
pub(super) fn facts(image: &Image) -> ImageFacts {
    ImageFacts { config: image.config.clone(), digest: Some(image.digest), created: image.created().map(Into::into) }
}

/// The files of an image's root disk; `None` when its file system cannot be read.
pub(super) fn files(store: &Store, digest: &Digest, pool: &Pool) -> Result<Option<DiskFiles>> {
    let record = store.record(digest)?;
    DiskFiles::of_image(store.disk_source(&record)?, record.map, pool)
}
