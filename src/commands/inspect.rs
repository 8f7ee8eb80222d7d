//! `kiln inspect`: what an image is made of.

use kiln_evidence::attachment::UNSIGNED_PREDICATE_TYPE;
use kiln_evidence::bundle::PREDICATE_TYPE;
use kiln_model::Result;
use kiln_model::image::{BLOCK_MAP, PACK};
use kiln_model::reference::Reference;
use serde_json::json;

use super::App;
use super::images::{as_json, heads, mark};
use crate::cli::Inspect;
use crate::output::{bytes, table};

pub(super) async fn run(app: &App, arguments: &Inspect) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let store = app.store()?;
    let image = store.image(&store.resolve(&reference)?)?;
    let config = &image.config;
    let packs: Vec<_> = image.manifest.layers.iter().filter(|layer| layer.media_type == PACK).collect();
    let packed: u64 = packs.iter().map(|pack| pack.size).sum();

    let heads = heads(&store);
    let failed = mark(&store, &image).await?;
    let mut value = as_json(&image, &heads, failed.as_ref());
    if let Some(object) = value.as_object_mut() {
        object.insert("firmware".into(), json!(config.firmware));
        object.insert("disks".into(), json!(config.disks));
        object.insert("cloud".into(), json!(config.cloud));
        object.insert("base_digest".into(), json!(config.base));
        object.insert("steps".into(), json!(config.steps));
        object.insert("commit".into(), json!(config.commit));
        object.insert("labels".into(), json!(config.labels));
        object.insert("packs".into(), json!({ "count": packs.len(), "bytes": packed }));
        object.insert("annotations".into(), json!(image.manifest.annotations));
        let attached = |attached: &kiln_store::Attached| json!({ "digest": attached.digest, "type": attached.artifact_type, "annotations": attached.annotations });
        object.insert("attached".into(), image.attached.iter().map(attached).collect());
    }
    app.output.result(&value, || {
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
        row("name", config.name.clone());
        row("version", config.version.clone());
        row("digest", image.digest.to_string());
        row("tags", image.names.join(", "));
        if let Some(channels) = heads.get(&image.digest) {
            row("channels", channels.join(", "));
        }
        if image.is_revoked() {
            row("revoked", "yes".to_owned());
        }
        if let Some(why) = &failed {
            row("failed", why.clone());
        }
        row("created", image.created().unwrap_or("-").to_owned());
        row("architecture", config.architecture.clone());
        for disk in &config.disks {
            row(&format!("disk {}", disk.name), format!("{}  {}", disk.digest, bytes(disk.size)));
        }
        for image in &config.cloud {
            row(&format!("{} image", image.builder), format!("{}  {}  {}", image.id, image.region, bytes(image.size)));
        }
        if let Some(base) = config.base {
            row("base", base.to_string());
        }
        if let Some(commit) = &config.commit {
            row("commit", commit.clone());
        }
        for (name, value) in &config.labels {
            row("label", format!("{name}={value}"));
        }
        for (number, step) in config.steps.iter().enumerate() {
            row(&format!("step {}", number + 1), format!("{}  key {}", step.name, step.key.short()));
        }
        for attached in &image.attached {
            // What a statement is about is said beside its form.
            let about = [PREDICATE_TYPE, UNSIGNED_PREDICATE_TYPE].iter().find_map(|key| attached.annotations.get(*key));
            let about = about.map(|about| format!("  {about}")).unwrap_or_default();
            row("attached", format!("{}  {}{about}", attached.digest, attached.artifact_type));
        }
        let maps = image.manifest.layers.iter().filter(|layer| layer.media_type == BLOCK_MAP).count();
        row("stored as", format!("{} packs, {}; {maps} block map{}", packs.len(), bytes(packed), if maps == 1 { "" } else { "s" }));
        table(&rows)
    });
    Ok(0)
}
