//! What provenance says of how to bake an image again.
//!
//! Everything that a bake was told and read is in its provenance, but the
//! values of secrets and of variables that were fetched from elsewhere: of
//! these only the names are, so that whoever bakes again can be asked for them.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kiln_model::{Digest, Key};
use serde_json::Value;

use crate::statement::DISK_DIGEST;

/// How an image was baked, as far as it can be told again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recipe {
    /// Name and version that it was given.
    pub image: (String, String),
    /// The architecture, in OCI's words.
    pub architecture: String,
    /// File of the template, from the template's folder.
    pub template: String,
    /// The template's folder in its repository; empty for the root.
    pub folder: String,
    /// What the template calls the base.
    pub base: String,
    /// The builder's name in the template.
    pub builder: String,
    /// The variables; without a value those that were fetched from elsewhere.
    pub variables: BTreeMap<String, Option<String>>,
    /// Every file that was read: the templates, and what steps bring.
    pub files: Vec<RecipeFile>,
    /// The steps with their keys.
    pub steps: Vec<RecipeStep>,
    /// Key of the seal.
    pub seal: Option<Key>,
    /// When the bake began.
    pub started: Option<Timestamp>,
}

/// A file that went into a bake.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecipeFile {
    /// The step that brings it; none for a template.
    pub step: Option<String>,
    /// Its path, relative to the template's folder or to what the step names.
    pub name: String,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// A step of a bake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeStep {
    /// Its name.
    pub name: String,
    /// Its provisioner's kind.
    pub kind: String,
    /// Its key, where it can be read.
    pub key: Option<Key>,
}

/// A file that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OtherFile {
    /// The step that brings it; none for a template.
    pub step: Option<String>,
    /// Its path.
    pub name: String,
    /// What it was; none: it is new.
    pub was: Option<Digest>,
    /// What it is; none: it is missing.
    pub is: Option<Digest>,
}

impl Recipe {
    /// Reads a predicate of provenance. What it does not say is empty.
    pub(crate) fn read(predicate: &Value) -> Self {
        let text = |path: &str| predicate.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let list = |path: &str| predicate.pointer(path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let external = |name: &str| text(&format!("/buildDefinition/externalParameters/{name}"));
        let variables = predicate.pointer("/buildDefinition/externalParameters/variables").and_then(Value::as_object);
        let variables = variables.into_iter().flatten().map(|(name, value)| (name.clone(), value.as_str().map(ToOwned::to_owned)));
        let said = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Self {
            image: (external("image/name"), external("image/version")),
            architecture: external("image/architecture"),
            template: external("template"),
            folder: external("source/folder"),
            base: external("base"),
            builder: external("builder"),
            variables: variables.collect(),
            files: list("/buildDefinition/resolvedDependencies").iter().filter_map(file).collect(),
            steps: list("/buildDefinition/internalParameters/steps")
                .iter()
                .map(|step| RecipeStep { name: said(step, "name"), kind: said(step, "provisioner"), key: said(step, "key").parse().ok() })
                .collect(),
            seal: text("/buildDefinition/internalParameters/seal").parse().ok(),
            started: text("/runDetails/metadata/startedOn").parse().ok(),
        }
    }

    /// Which of `files`, those that would go into a bake now, are not what they
    /// were: changed, new, or missing. Sorted.
    pub fn others(&self, files: &[RecipeFile]) -> Vec<OtherFile> {
        type Id<'a> = (Option<&'a str>, &'a str);
        fn by_id(files: &[RecipeFile]) -> BTreeMap<Id<'_>, BTreeSet<Digest>> {
            let mut all: BTreeMap<Id<'_>, BTreeSet<Digest>> = BTreeMap::new();
            for file in files {
                all.entry((file.step.as_deref(), &file.name)).or_default().insert(file.digest);
            }
            all
        }
        let (were, are) = (by_id(&self.files), by_id(files));
        let ids: BTreeSet<&Id<'_>> = were.keys().chain(are.keys()).collect();
        let mut others = Vec::new();
        for id in ids {
            let (was, is) = (were.get(id), are.get(id));
            if was != is {
                let first = |digests: Option<&BTreeSet<Digest>>| digests.and_then(|digests| digests.iter().next().copied());
                others.push(OtherFile { step: id.0.map(ToOwned::to_owned), name: id.1.to_owned(), was: first(was), is: first(is) });
            }
        }
        others
    }
}

/// A dependency that is a file.
fn file(dependency: &Value) -> Option<RecipeFile> {
    let text = |path: &str| dependency.pointer(path).and_then(Value::as_str).map(ToOwned::to_owned);
    let step = match text("/annotations/kind")?.as_str() {
        "template" => None,
        "input" => Some(text("/annotations/step")?),
        _ => return None,
    };
    Some(RecipeFile { step, name: text("/name")?, digest: format!("sha256:{}", text("/digest/sha256")?).parse().ok()? })
}

/// Disk digest of a base; none for one that is at a cloud.
pub(crate) fn base_disk(dependency: &Value) -> Option<Digest> {
    let hex = dependency.pointer(&format!("/digest/{DISK_DIGEST}"))?.as_str()?;
    format!("sha256:{hex}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provenance::tests::account;
    use crate::statement;

    fn recipe() -> Recipe {
        Recipe::read(&statement::of(&account()).swap_remove(0).predicate)
    }

    fn file(step: Option<&str>, name: &str, content: &str) -> RecipeFile {
        RecipeFile { step: step.map(Into::into), name: name.into(), digest: Digest::of(content) }
    }

    #[test]
    fn what_a_bake_writes_can_be_read_again() {
        let (account, recipe) = (account(), recipe());
        assert_eq!(recipe.image, ("web".into(), "1.4.0".into()));
        assert_eq!((recipe.template.as_str(), recipe.folder.as_str()), ("kiln.toml", "images/web"));
        assert_eq!((recipe.base.as_str(), recipe.builder.as_str(), recipe.architecture.as_str()), ("debian bookworm", "qemu", "amd64"));
        assert_eq!(recipe.variables, account.variables);
        assert_eq!(
            recipe.files,
            [
                file(None, "kiln.toml", "kiln.toml"),
                file(None, "../common/hardening.toml", "../common/hardening.toml"),
                file(Some("packages"), "script", "script"),
                file(Some("site"), "site/index.html", "site/index.html"),
            ]
        );
        let steps: Vec<_> = recipe.steps.iter().map(|step| (step.name.as_str(), step.kind.as_str(), step.key)).collect();
        let keys: Vec<_> = account.steps.iter().map(|step| (step.name.as_str(), step.kind.as_str(), Some(step.key))).collect();
        assert_eq!(steps, keys);
        assert_eq!(recipe.seal, Some(account.seal));
        assert_eq!(recipe.started, Some("2023-11-15T22:13:10Z".parse().unwrap()));
    }

    #[test]
    fn files_that_are_not_what_they_were_are_named() {
        let recipe = recipe();
        assert_eq!(recipe.others(&recipe.files), []);
        let mut reversed = recipe.files.clone();
        reversed.reverse();
        assert_eq!(recipe.others(&reversed), []);

        let mut now = recipe.files.clone();
        now[0] = file(None, "kiln.toml", "other");
        now[3] = file(Some("site"), "site/new.html", "new");
        let other = |step: Option<&str>, name: &str, was: Option<&str>, is: Option<&str>| OtherFile {
            step: step.map(Into::into),
            name: name.into(),
            was: was.map(Digest::of),
            is: is.map(Digest::of),
        };
        assert_eq!(
            recipe.others(&now),
            [
                other(None, "kiln.toml", Some("kiln.toml"), Some("other")),
                other(Some("site"), "site/index.html", Some("site/index.html"), None),
                other(Some("site"), "site/new.html", None, Some("new")),
            ]
        );
        // The same file at another step is another one.
        let mut moved = recipe.files.clone();
        moved[2].step = Some("site".into());
        assert_eq!(recipe.others(&moved).len(), 2);
    }

    #[test]
    fn provenance_of_another_kind_of_build_gives_nothing() {
        for predicate in [Value::Null, serde_json::json!({ "buildDefinition": { "resolvedDependencies": [1, { "annotations": 3 }] } })] {
            assert_eq!(Recipe::read(&predicate), Recipe::default());
        }
    }
}
