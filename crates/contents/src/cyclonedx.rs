//! CycloneDX 1.6, JSON; and 1.5, of which it uses nothing that differs.

use std::collections::HashSet;

use kiln_model::Digest;
use serde_json::{Value, json};

use crate::packages::{Distribution, Package};
use crate::{HOME, ImageFacts, Inventory, TOOL, TOOL_VERSION, license, purl};

/// A UUID that is made of a digest (version 8: "custom").
fn uuid(digest: &Digest) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.as_bytes()[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = kiln_model::digest::hex(&bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn property(name: &str, value: impl Into<Value>) -> Value {
    json!({ "name": format!("kiln:{name}"), "value": value.into() })
}

pub(crate) fn document(inventory: &Inventory, image: &ImageFacts, version: &str) -> Value {
    let main = main_component(image);
    let main_reference = main["bom-ref"].clone();
    let mut components = Vec::new();
    if !inventory.distribution.id.is_empty() {
        components.push(distribution(&inventory.distribution));
    }
    let mut taken = HashSet::new();
    for package in &inventory.packages {
        components.push(component(package, &purl::of(package, &inventory.distribution), &mut taken));
    }
    let references: Vec<Value> = components.iter().map(|component| component["bom-ref"].clone()).collect();
    let aggregate = if inventory.notes.is_empty() { "unknown" } else { "incomplete" };
    let mut metadata = json!({
        "timestamp": image.time(),
        "lifecycles": [{ "phase": "post-build" }],
        "tools": { "components": [{
            "type": "application",
            "name": TOOL,
            "version": TOOL_VERSION,
            "externalReferences": [{ "type": "website", "url": HOME }],
        }] },
        "component": main,
    });
    if !inventory.notes.is_empty() {
        metadata["properties"] = inventory.notes.iter().map(|note| property("incomplete", note.as_str())).collect();
    }
    json!({
        "$schema": format!("http://cyclonedx.org/schema/bom-{version}.schema.json"),
        "bomFormat": "CycloneDX",
        "specVersion": version,
        "serialNumber": format!("urn:uuid:{}", uuid(&image.identity(&format!("cyclonedx-{version}")))),
        "version": 1,
        "metadata": metadata,
        "components": components,
        "dependencies": [{ "ref": main_reference, "dependsOn": references }],
        "compositions": [{ "aggregate": aggregate, "assemblies": [main_reference] }],
    })
}

fn main_component(image: &ImageFacts) -> Value {
    let config = &image.config;
    let purl = image.purl();
    // "A packaging format that isolates through virtualization": their words.
    let mut value = json!({
        "type": "container",
        "bom-ref": purl.clone().unwrap_or_else(|| format!("image:{}:{}", config.name, config.version)),
        "name": config.name,
        "version": config.version,
    });
    if let Some(purl) = purl {
        value["purl"] = purl.into();
    }
    let mut properties = vec![property("architecture", config.architecture.as_str())];
    properties.extend(image.digest.map(|digest| property("digest", digest.to_string())));
    properties.extend(config.disks.iter().map(|disk| property(&format!("disk:{}", disk.name), disk.digest.to_string())));
    properties.extend(config.base.map(|base| property("base", base.to_string())));
    properties.extend(config.commit.as_ref().map(|commit| property("commit", commit.as_str())));
    value["properties"] = properties.into();
    value
}

fn distribution(distribution: &Distribution) -> Value {
    let label = distribution.label();
    let mut value = json!({ "type": "operating-system", "bom-ref": format!("os:{label}"), "name": distribution.id });
    let version = if distribution.version.is_empty() { &distribution.codename } else { &distribution.version };
    if !version.is_empty() {
        value["version"] = version.clone().into();
    }
    if !distribution.name.is_empty() {
        value["description"] = distribution.name.clone().into();
    }
    value
}

fn component(package: &Package, purl: &str, taken: &mut HashSet<String>) -> Value {
    let mut value = json!({ "type": "library", "bom-ref": crate::unique(taken, purl) });
    if let Some(maintainer) = &package.maintainer {
        value["publisher"] = crate::text::line(maintainer).into();
    }
    value["name"] = package.name.clone().into();
    value["version"] = package.version.clone().into();
    if let Some(summary) = &package.summary {
        value["description"] = summary.clone().into();
    }
    if let Some(declared) = &package.license {
        value["licenses"] = if license::is_expression(declared) {
            json!([{ "expression": declared }])
        } else {
            json!([{ "license": { "name": declared } }])
        };
    }
    value["purl"] = purl.into();
    if let Some(page) = package.link() {
        value["externalReferences"] = json!([{ "type": "website", "url": page }]);
    }
    let mut properties = Vec::new();
    if !package.arch.is_empty() {
        properties.push(property("architecture", package.arch.as_str()));
    }
    if let Some((name, version)) = &package.source {
        properties.push(property("source", format!("{name} {version}").trim_end()));
    }
    properties.extend(package.size.map(|size| property("installed-bytes", size.to_string())));
    if !properties.is_empty() {
        value["properties"] = properties.into();
    }
    value
}
