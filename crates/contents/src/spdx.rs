//! SPDX 2.3, JSON.
//!
//! The image is a package that the document describes; it contains a package
//! for the distribution and one for each package of it. Files are not listed
//! (`filesAnalyzed` is false): `kiln diff` is for those.

use std::collections::{BTreeMap, HashSet};

use kiln_model::Digest;
use serde_json::{Value, json};

use crate::packages::{Distribution, Kind, Package};
use crate::{HOME, ImageFacts, Inventory, TOOL, TOOL_VERSION, license, purl};

const IMAGE: &str = "SPDXRef-image";
const OS: &str = "SPDXRef-distribution";

/// An element's id: letters, digits, `.` and `-`; what it stands for is told
/// apart by the digest at its end.
fn id(kind: Kind, name: &str, purl: &str) -> String {
    let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '-' }).take(80).collect();
    format!("SPDXRef-{kind}-{name}-{}", Digest::of(purl).short())
}

/// What names an agent: `Organization: NAME (ADDRESS)`. Which maintainers are
/// persons cannot be known.
fn agent(maintainer: &str) -> String {
    let maintainer = crate::text::line(maintainer);
    match maintainer.split_once('<') {
        Some((name, address)) if !name.trim().is_empty() => {
            format!("Organization: {} ({})", name.trim(), address.trim().trim_end_matches('>'))
        }
        _ => format!("Organization: {}", maintainer.trim()),
    }
}

fn purl_reference(purl: &str) -> Value {
    json!({ "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl })
}

pub(crate) fn document(inventory: &Inventory, image: &ImageFacts) -> Value {
    let config = &image.config;
    let identity = image.identity("spdx-2.3");
    let mut packages = vec![image_package(image)];
    let mut relationships = vec![related("SPDXRef-DOCUMENT", "DESCRIBES", IMAGE)];
    if !inventory.distribution.id.is_empty() {
        packages.push(distribution(&inventory.distribution));
        relationships.push(related(IMAGE, "CONTAINS", OS));
    }
    let mut extracted = BTreeMap::new();
    let mut taken = HashSet::new();
    for package in &inventory.packages {
        let purl = purl::of(package, &inventory.distribution);
        let id = crate::unique(&mut taken, &id(package.kind, &package.name, &purl));
        relationships.push(related(IMAGE, "CONTAINS", &id));
        packages.push(one(package, &id, &purl, &mut extracted));
    }
    let mut document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": format!("{}-{}", config.name, config.version),
        "documentNamespace": format!("{HOME}/spdx/{}/{}", config.name, identity.hex()),
        "creationInfo": { "created": image.time(), "creators": [format!("Tool: {TOOL}-{TOOL_VERSION}")] },
        "packages": packages,
        "relationships": relationships,
    });
    if !extracted.is_empty() {
        let infos: Vec<Value> =
            extracted.into_iter().map(|(id, text)| json!({ "licenseId": id, "extractedText": text, "name": text })).collect();
        document["hasExtractedLicensingInfos"] = infos.into();
    }
    if !inventory.notes.is_empty() {
        document["comment"] = format!("Incomplete: {}", inventory.notes.join("; ")).into();
    }
    document
}

fn related(from: &str, how: &str, to: &str) -> Value {
    json!({ "spdxElementId": from, "relationshipType": how, "relatedSpdxElement": to })
}

fn image_package(image: &ImageFacts) -> Value {
    let config = &image.config;
    let mut references: Vec<Value> = image.purl().iter().map(|purl| purl_reference(purl)).collect();
    for disk in &config.disks {
        let kind = format!("{HOME}/blob/main/docs/image-format.md#blocks-and-the-disk-digest");
        let comment = format!("disk digest of the disk `{}`", disk.name);
        let digest = disk.digest.to_string();
        references.push(json!({ "referenceCategory": "OTHER", "referenceType": kind, "referenceLocator": digest, "comment": comment }));
    }
    json!({
        "SPDXID": IMAGE,
        "name": config.name,
        "versionInfo": config.version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
        "comment": format!("A machine image for {}.", config.architecture),
        "externalRefs": references,
    })
}

fn distribution(distribution: &Distribution) -> Value {
    let version = if distribution.version.is_empty() { &distribution.codename } else { &distribution.version };
    let mut value = json!({ "SPDXID": OS, "name": distribution.id });
    if !version.is_empty() {
        value["versionInfo"] = version.clone().into();
    }
    for (name, text) in common() {
        value[name] = text;
    }
    value["primaryPackagePurpose"] = "OPERATING-SYSTEM".into();
    if !distribution.name.is_empty() {
        value["summary"] = distribution.name.clone().into();
    }
    value
}

/// What is said of every package because nobody knows.
fn common() -> [(&'static str, Value); 5] {
    [
        ("downloadLocation", "NOASSERTION".into()),
        ("filesAnalyzed", false.into()),
        ("licenseConcluded", "NOASSERTION".into()),
        ("licenseDeclared", "NOASSERTION".into()),
        ("copyrightText", "NOASSERTION".into()),
    ]
}

fn one(package: &Package, id: &str, purl: &str, extracted: &mut BTreeMap<String, String>) -> Value {
    let mut value = json!({ "SPDXID": id, "name": package.name, "versionInfo": package.version });
    value["supplier"] = package.maintainer.as_deref().map_or_else(|| "NOASSERTION".to_owned(), agent).into();
    for (name, text) in common() {
        value[name] = text;
    }
    if let Some(declared) = &package.license {
        value["licenseDeclared"] = if license::is_expression(declared) {
            declared.clone()
        } else {
            let id = format!("LicenseRef-{}-{}", package.kind, Digest::of(declared).short());
            extracted.insert(id.clone(), declared.clone());
            id
        }
        .into();
    }
    if let Some(page) = package.link() {
        value["homepage"] = page.into();
    }
    if let Some((name, version)) = &package.source {
        value["sourceInfo"] = format!("built from the source package {name} {version}").trim_end().into();
    }
    if let Some(summary) = &package.summary {
        value["summary"] = summary.clone().into();
    }
    value["externalRefs"] = vec![purl_reference(purl)].into();
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cyclonedx;
    use crate::packages::read;
    use crate::testing::{Tree, facts};

    fn tree() -> Tree {
        Tree::of(&[
            ("/etc/os-release", "ID=debian\nVERSION_ID=12\nPRETTY_NAME=\"Debian <12>\"\n"),
            (
                "/var/lib/dpkg/status",
                "Package: a<b>\u{1b}&c\nStatus: install ok installed\nVersion: 1:2\nArchitecture: amd64\nMaintainer: Eve <eve@example.org>\n\
                 Homepage: javascript:alert(1)\nDescription: \"quoted\" </script>\n\n\
                 Package: a-b--c\nStatus: install ok installed\nVersion: 1:2\nArchitecture: amd64\nSource: src (3)\nHomepage: https://example.org/x\n",
            ),
            ("/lib/apk/db/installed", "P:x\nV:1-r0\nA:x86\nL:MIT AND ISC\n\nP:y\nV:1-r0\nA:x86\nL:custom, see <file>\n"),
            ("/var/lib/rpm/Packages", "old"),
        ])
    }

    /// Every field that the specification requires, in its form.
    #[test]
    fn what_spdx_requires_is_there() {
        let inventory = read(&tree()).unwrap();
        let value = document(&inventory, &facts());
        for field in ["spdxVersion", "dataLicense", "SPDXID", "name", "documentNamespace"] {
            assert!(value[field].is_string(), "{field}");
        }
        let namespace = value["documentNamespace"].as_str().unwrap();
        assert!(namespace.starts_with("https://") && !namespace.contains('#'), "{namespace}");
        assert_eq!(value["creationInfo"]["created"], "2026-11-21T10:00:00Z");
        assert!(value["creationInfo"]["creators"][0].as_str().unwrap().starts_with("Tool: kiln-"));
        assert!(value["comment"].as_str().unwrap().contains("Berkeley"));

        let mut ids = HashSet::from(["SPDXRef-DOCUMENT".to_owned()]);
        for package in value["packages"].as_array().unwrap() {
            for field in ["SPDXID", "name", "downloadLocation", "licenseConcluded", "licenseDeclared", "copyrightText"] {
                assert!(package[field].as_str().is_some_and(|text| !text.is_empty()), "{field} of {package}");
            }
            assert_eq!(package["filesAnalyzed"], false);
            let id = package["SPDXID"].as_str().unwrap();
            let rest = id.strip_prefix("SPDXRef-").unwrap();
            assert!(rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '.' || c == '-'), "{id}");
            assert!(ids.insert(id.to_owned()), "{id} twice");
            for reference in package["externalRefs"].as_array().into_iter().flatten() {
                assert!(!reference["referenceLocator"].as_str().unwrap().contains(char::is_whitespace));
            }
        }
        let relationships = value["relationships"].as_array().unwrap();
        assert_eq!(relationships.len(), ids.len() - 1);
        for relationship in relationships {
            for end in ["spdxElementId", "relatedSpdxElement"] {
                assert!(ids.contains(relationship[end].as_str().unwrap()), "{relationship}");
            }
        }
        let by_name = |name: &str| value["packages"].as_array().unwrap().iter().find(|p| p["name"] == name).unwrap().clone();
        assert_eq!(by_name("x")["licenseDeclared"], "MIT AND ISC");
        let reference = by_name("y")["licenseDeclared"].clone();
        assert_eq!(value["hasExtractedLicensingInfos"][0]["licenseId"], reference);
        assert_eq!(value["hasExtractedLicensingInfos"][0]["extractedText"], "custom, see <file>");
        assert!(by_name("a<b>\u{1b}&c").get("homepage").is_none());
        assert_eq!(by_name("a<b>\u{1b}&c")["supplier"], "Organization: Eve (eve@example.org)");
        assert_eq!(by_name("a-b--c")["homepage"], "https://example.org/x");
    }

    #[test]
    fn what_cyclonedx_requires_is_there() {
        let inventory = read(&tree()).unwrap();
        let value = cyclonedx::document(&inventory, &facts(), "1.6");
        assert_eq!((&value["bomFormat"], &value["specVersion"], &value["version"]), (&json!("CycloneDX"), &json!("1.6"), &json!(1)));
        let serial = value["serialNumber"].as_str().unwrap().strip_prefix("urn:uuid:").unwrap();
        let lengths: Vec<usize> = serial.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert!(serial.chars().all(|c| c == '-' || matches!(c, '0'..='9' | 'a'..='f')));
        let mut references = HashSet::from([value["metadata"]["component"]["bom-ref"].as_str().unwrap().to_owned()]);
        for component in value["components"].as_array().unwrap() {
            assert!(["library", "operating-system"].contains(&component["type"].as_str().unwrap()));
            assert!(component["name"].is_string());
            assert!(references.insert(component["bom-ref"].as_str().unwrap().to_owned()), "{component}");
        }
        let dependencies = value["dependencies"].as_array().unwrap();
        assert!(dependencies.iter().all(|d| references.contains(d["ref"].as_str().unwrap())));
        assert_eq!(value["compositions"][0]["aggregate"], "incomplete");
    }

    #[test]
    fn the_same_image_gives_the_same_document_and_another_one_another() {
        let inventory = read(&tree()).unwrap();
        for format in [crate::Format::Spdx, crate::Format::CycloneDx, crate::Format::CycloneDx15] {
            let one = crate::document(&inventory, &facts(), format).bytes;
            assert_eq!(one, crate::document(&read(&tree()).unwrap(), &facts(), format).bytes);
            let mut other = facts();
            other.digest = Some(Digest::of("other"));
            assert_ne!(one, crate::document(&inventory, &other, format).bytes);
        }
    }
}
