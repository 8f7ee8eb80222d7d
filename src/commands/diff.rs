//! `kiln diff`: what changed from one image to another.
//!
//! The status is 0 when the comparison worked, whatever it found: most who ask
//! want to read the answer, and a pipeline that keeps the page must not fail
//! because there is something on it. `--exit-code` makes it 3 when anything
//! differs, as `git diff` has it.

use kiln_contents::diff::{Difference, GroupName, Side, diff, table};
use kiln_disk::files::{DiskFiles, Pool};
use kiln_evidence::{Examined, Subject, What};
use kiln_model::machine::Files;
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::{Image, Listing, Store};
use serde_json::{Value, json};

use super::images::heads;
use super::sbom::{facts, files, in_store};
use super::{App, would_overwrite, write_result};
use crate::cli::Diff;
use crate::evidence;

pub(super) async fn run(app: &App, arguments: &Diff) -> Result<u8> {
    if let Some(path) = arguments.html.as_ref().filter(|path| path.exists() && !arguments.force) {
        return Err(would_overwrite(path));
    }
    let (store, pool) = (app.store()?, Pool::default());
    let (listing, heads) = (store.images(true)?, heads(&store));
    let mut sides = Vec::new();
    for text in [&arguments.from, &arguments.to] {
        let image = in_store(app, &store, &text.parse()?).await?;
        let mut side = side(&store, &listing, &image, text)?;
        side.channels = heads.get(&image.digest).cloned().unwrap_or_default();
        side.provenance = provenance(&store, &image.digest).await?;
        sides.push((side, files(&store, &image.digest, &pool)?));
    }
    let [(a, old), (b, new)] = sides.as_slice() else { return Err(Error::new(Code::Failed, "two images are compared")) };
    let mut found = diff((a, some_files(old.as_ref())), (b, some_files(new.as_ref())))?;
    if let Some(path) = &arguments.html {
        write_result(path, kiln_contents::page(&found).as_bytes(), arguments.force)?;
        app.output.reports().note(format!("wrote {}", path.display()));
    }
    let status = if arguments.exit_code && found.differs { Code::Test.exit_status() } else { 0 };
    if app.output.is_json() && !arguments.files {
        without_noise(&mut found);
    }
    app.output.result(&found, || table(&found, arguments.files));
    Ok(status)
}

pub(super) fn some_files(files: Option<&DiskFiles>) -> Option<&dyn Files> {
    files.map(|files| files as &dyn Files)
}

/// What an image was made of, as the newest sound provenance that is attached
/// to it says; who signed that is for `kiln verify` to tell.
async fn provenance(store: &Store, digest: &Digest) -> Result<Option<Value>> {
    let attached = evidence::find(store, &Subject::new(*digest), &[]).await?;
    let definition = |examined: &Examined| match &examined.what {
        What::Provenance(provenance) if examined.is_sound() => Some(json!({ "buildDefinition": provenance.definition })),
        _ => None,
    };
    Ok(attached.iter().rev().find_map(definition))
}

/// Of groups that change in every bake only the counts.
fn without_noise(found: &mut Difference) {
    for group in found.files.iter_mut().filter(|group| group.group != GroupName::Other) {
        group.files.clear();
    }
}

pub(super) fn side(store: &Store, listing: &Listing, image: &Image, reference: &str) -> Result<Side> {
    let mut used = 0;
    for disk in &image.config.disks {
        used += store.disk(image, &disk.name)?.used;
    }
    Ok(Side {
        reference: reference.to_owned(),
        facts: facts(image),
        used,
        stored: image.size,
        base: image.config.base.and_then(|base| base_name(listing, &base)),
        predecessor: predecessor(listing, image),
        channels: Vec::new(),
        provenance: None,
    })
}

/// What people call an image: one of its names, or what it calls itself.
fn name(image: &Image) -> String {
    let named = image.names.iter().find(|name| name.contains(':')).cloned();
    named.unwrap_or_else(|| format!("{}@sha256:{}", image.config.name, image.digest.short()))
}

/// What the image with this root disk is called: rather one that was baked
/// than one that is only kept to start from.
fn base_name(listing: &Listing, disk: &Digest) -> Option<String> {
    let mut there: Vec<&Image> = listing.images.iter().filter(|image| image.disk_digest() == Some(*disk)).collect();
    there.sort_by_key(|image| image.base);
    let image = there.first()?;
    Some(image.config.labels.get("label").filter(|_| image.base).cloned().unwrap_or_else(|| name(image)))
}

/// The newest image of the same name that is older.
fn predecessor(listing: &Listing, image: &Image) -> Option<String> {
    let created = image.created()?;
    let older = listing.images.iter().filter(|other| !other.base && other.config.name == image.config.name);
    let older = older.filter(|other| other.created().is_some_and(|other| other < created));
    older.max_by_key(|other| other.created().map(ToOwned::to_owned)).map(name)
}
