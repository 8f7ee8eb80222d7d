//! `kiln images`: what is in the store.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use kiln_model::{Code, Digest, Error, Result};
use kiln_store::{Image, Store};
use serde_json::json;

use super::App;
use crate::cli::Images;
use crate::evidence;
use crate::output::{ago, bytes, show_error, table};

/// Which channels each image is at.
pub(super) type Heads = BTreeMap<Digest, Vec<String>>;

/// Why images are marked as failed.
type Marks = BTreeMap<Digest, String>;

/// Why an image is marked as failed. Nothing is read of one that was never
/// tested.
pub(super) async fn mark(store: &Store, image: &Image) -> Result<Option<String>> {
    if image.attached.iter().any(evidence::is_result) { evidence::mark(store, &image.digest).await } else { Ok(None) }
}

/// Which channels each image is at. A channel that is damaged is told, and
/// hides no image.
pub(super) fn heads(store: &Store) -> Heads {
    store.heads().unwrap_or_else(|error| {
        show_error(&error);
        Heads::new()
    })
}

pub(super) async fn run(app: &App, arguments: &Images) -> Result<u8> {
    let store = app.store()?;
    let listing = store.images(arguments.all)?;
    let heads = heads(&store);
    let wanted = |image: &&Image| arguments.name.as_ref().is_none_or(|name| image.config.name == *name);
    let images: Vec<&Image> = listing.images.iter().filter(wanted).collect();
    if let (true, Some(name)) = (images.is_empty(), &arguments.name) {
        return Err(Error::new(Code::NotFound, format!("no image `{name}` is in the store")).next("`kiln images` lists them all"));
    }
    for (digest, error) in &listing.damaged {
        show_error(
            &Error::new(Code::Corrupt, format!("image {digest} is damaged: {}", error.chain())).next("`kiln verify` says what is missing"),
        );
    }
    let mut marks = Marks::new();
    for image in &images {
        marks.extend(mark(&store, image).await?.map(|why| (image.digest, why)));
    }
    let value: Vec<_> = images.iter().map(|image| as_json(image, &heads, marks.get(&image.digest))).collect();
    app.output.result(&value, || {
        if images.is_empty() {
            return "no images yet; `kiln init` writes a template, `kiln bake` bakes it".to_owned();
        }
        let mut rows = vec![["NAME", "VERSION", "DIGEST", "CREATED", "DISK", "SIZE"].map(String::from).to_vec()];
        rows.extend(images.iter().map(|image| row(image, &heads, marks.contains_key(&image.digest))));
        table(&rows)
    });
    Ok(if listing.damaged.is_empty() { 0 } else { Code::Corrupt.exit_status() })
}

fn row(image: &Image, heads: &Heads, failed: bool) -> Vec<String> {
    // Every tag that points to it; one that was moved away has none.
    let mut tags: Vec<&str> = image.names.iter().filter_map(|name| name.split_once(':').map(|(_, tag)| tag)).collect();
    tags.sort_by_key(|tag| *tag != image.config.version);
    let mut names: Vec<String> = tags.into_iter().map(ToOwned::to_owned).collect();
    names.extend(heads.get(&image.digest).into_iter().flatten().cloned());
    let mut tags = if names.is_empty() { "-".to_owned() } else { names.join(", ") };
    if image.is_revoked() {
        tags.push_str(" (revoked)");
    }
    if failed {
        tags.push_str(" (failed)");
    }
    let disk: u64 = image.config.disks.iter().map(|disk| disk.size).sum();
    let created = image.created().and_then(|text| text.parse::<jiff::Timestamp>().ok());
    let age = created.and_then(|time| SystemTime::now().duration_since(time.into()).ok()).map_or_else(|| "-".to_owned(), ago_or_now);
    vec![image.config.name.clone(), tags, format!("sha256:{}", image.digest.short()), age, bytes(disk), bytes(image.size)]
}

fn ago_or_now(age: Duration) -> String {
    if age.as_secs() == 0 { "now".to_owned() } else { ago(age) }
}

/// An image as `images` and `inspect` tell it to programs.
pub(super) fn as_json(image: &Image, heads: &Heads, failed: Option<&String>) -> serde_json::Value {
    json!({
        "name": image.config.name, "version": image.config.version, "arch": image.config.architecture,
        "digest": image.digest, "disk_digest": image.disk_digest(), "created": image.created(),
        "tags": image.names, "fixed": image.fixed, "base": image.base, "size": image.size,
        "channels": heads.get(&image.digest).map(Vec::as_slice).unwrap_or_default(), "revoked": image.is_revoked(),
        "failed": failed,
    })
}
