//! SLSA provenance: what an image was made of, how, when and by what.
//!
//! Source: SLSA 1.0, `spec/v1.0/provenance.md`. What `buildDefinition` holds is
//! what the bake was told and read, without a time or an id: two bakes of the
//! same have the same. What happened is in `runDetails`.

use jiff::Timestamp;
use kiln_model::Digest;
use kiln_model::account::{Account, StepAccount};
use serde_json::{Map, Value, json};

use crate::recipe::{self, Recipe};
use crate::statement::{CLOUD_IMAGE, DISK_DIGEST, STEP_KEY};

/// `buildType` of a bake; described in `docs/evidence.md`.
pub const BUILD_TYPE: &str = "https://github.com/kiln-images/kiln/bake/v1";
/// `builder.id`: kiln, wherever it runs. Who ran it is told by the key that
/// signed.
pub const BUILDER: &str = "https://github.com/kiln-images/kiln";

/// The predicate that follows from an account.
pub(crate) fn predicate(account: &Account) -> Value {
    let mut external = Map::new();
    external.insert("image".into(), json!({ "name": account.name, "version": account.version, "architecture": account.architecture }));
    if let Some(template) = account.templates.first() {
        external.insert("template".into(), json!(template.name));
    }
    if let Some(source) = &account.source {
        external.insert("source".into(), json!({ "repository": source.repository, "folder": source.folder }));
    }
    external.insert("base".into(), json!(account.base));
    external.insert("builder".into(), json!(account.builder));
    external.insert("variables".into(), json!(account.variables));

    let steps: Vec<Value> =
        account.steps.iter().map(|step| json!({ "name": step.name, "provisioner": step.kind, "key": step.key.to_string() })).collect();
    json!({
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": external,
            "internalParameters": { "diskSize": account.disk_size, "steps": steps, "seal": account.seal.to_string() },
            "resolvedDependencies": dependencies(account),
        },
        "runDetails": {
            "builder": { "id": BUILDER, "version": { "kiln": env!("CARGO_PKG_VERSION") } },
            "metadata": { "invocationId": account.bake, "startedOn": time(account.started), "finishedOn": time(account.finished) },
            "byproducts": byproducts(account),
        },
    })
}

/// Everything that was read: templates, the commit they come from, the base,
/// and the files that steps bring.
fn dependencies(account: &Account) -> Vec<Value> {
    let file = |name: &str, digest: &Digest, annotations: Value| json!({ "name": name, "digest": { "sha256": digest.hex() }, "annotations": annotations });
    let mut all: Vec<Value> =
        account.templates.iter().map(|input| file(&input.name, &input.digest, json!({ "kind": "template" }))).collect();
    if let Some(source) = &account.source {
        let mut commit = json!({
            "name": "source", "digest": { "gitCommit": source.commit }, "annotations": { "kind": "source", "dirty": source.dirty },
        });
        if let (Some(repository), Some(object)) = (&source.repository, commit.as_object_mut()) {
            object.insert("uri".into(), json!(format!("git+{repository}@{}", source.commit)));
        }
        all.push(commit);
    }
    let kind = if account.base_at_cloud { CLOUD_IMAGE } else { DISK_DIGEST };
    all.push(json!({ "name": account.base, "digest": { kind: account.base_disk.hex() }, "annotations": { "kind": "base" } }));
    for step in &account.steps {
        let of_step = |input: &kiln_model::account::Input| file(&input.name, &input.digest, json!({ "kind": "input", "step": step.name }));
        all.extend(step.inputs.iter().map(of_step));
    }
    all
}

/// The disk, and each step with its time.
fn byproducts(account: &Account) -> Vec<Value> {
    let mut all = Vec::new();
    if let Some(disk) = account.disk {
        all.push(json!({ "name": "root", "digest": { DISK_DIGEST: disk.hex() }, "annotations": { "kind": "disk" } }));
    }
    all.extend(account.cloud.iter().map(|image| {
        json!({
            "name": image.id,
            "digest": { CLOUD_IMAGE: image.identity().hex() },
            "annotations": { "kind": "cloud-image", "builder": image.builder, "region": image.region, "snapshots": image.snapshots },
        })
    }));
    all.extend(account.steps.iter().map(|step| {
        json!({
            "name": step.name,
            "digest": { STEP_KEY: step.key.hex() },
            "annotations": {
                "kind": "step", "cached": step.cached,
                "startedOn": time(began(step)), "finishedOn": time(step.made), "seconds": step.seconds,
            },
        })
    }));
    all
}

/// When a step began, in seconds since 1970.
fn began(step: &StepAccount) -> u64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let took = step.seconds.max(0.0).round() as u64;
    step.made.saturating_sub(took)
}

/// A time in RFC 3339, UTC.
fn time(since_1970: u64) -> String {
    i64::try_from(since_1970).ok().and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or_default().to_string()
}

/// What a policy asks of provenance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// What kind of build it says it is of.
    pub build_type: String,
    /// URL of the repository that the template comes from.
    pub repository: Option<String>,
    /// The commit.
    pub commit: Option<String>,
    /// Whether the working tree differed from the commit.
    pub dirty: bool,
    /// Disk digest of the base.
    pub base: Option<Digest>,
    /// Id of the bake.
    pub invocation: Option<String>,
    /// When the bake ended.
    pub finished: Option<Timestamp>,
    /// Digest of everything that went into the bake: the same for two bakes of
    /// the same.
    pub definition: Digest,
    /// How to bake it again.
    pub recipe: Recipe,
}

impl Provenance {
    /// Reads a predicate. What it does not say is `None`.
    pub fn read(predicate: &Value) -> Self {
        let text = |path: &str| predicate.pointer(path).and_then(Value::as_str).map(ToOwned::to_owned);
        let dependencies = predicate.pointer("/buildDefinition/resolvedDependencies").and_then(Value::as_array);
        let of_kind = |kind: &str| {
            let mut all = dependencies.into_iter().flatten();
            all.find(|dependency| dependency.pointer("/annotations/kind").and_then(Value::as_str) == Some(kind))
        };
        let source = of_kind("source");
        let definition = predicate.get("buildDefinition").map(sorted).unwrap_or_default();
        Self {
            build_type: text("/buildDefinition/buildType").unwrap_or_default(),
            repository: text("/buildDefinition/externalParameters/source/repository"),
            commit: source.and_then(|source| source.pointer("/digest/gitCommit")).and_then(Value::as_str).map(ToOwned::to_owned),
            dirty: source.and_then(|source| source.pointer("/annotations/dirty")).and_then(Value::as_bool) != Some(false),
            base: of_kind("base").and_then(recipe::base_disk),
            invocation: text("/runDetails/metadata/invocationId"),
            finished: text("/runDetails/metadata/finishedOn").and_then(|time| time.parse().ok()),
            definition: Digest::of(definition.to_string()),
            recipe: Recipe::read(predicate),
        }
    }
}

/// The same value with the keys of every object in order, so that the order in
/// which somebody wrote them means nothing.
pub(crate) fn sorted(value: &Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        Value::Object(object) => {
            let mut entries: Vec<_> = object.iter().collect();
            entries.sort_unstable_by_key(|(name, _)| *name);
            Value::Object(entries.into_iter().map(|(name, value)| (name.clone(), sorted(value))).collect())
        }
        other => other.clone(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use kiln_model::Key;
    use kiln_model::account::{Hygiene, Input, Source};
    use kiln_model::key::KeyHasher;
    use kiln_model::provision::{Case, Outcome};
    use kiln_model::trial::{Tested, Trial};

    use super::*;
    use crate::statement::{self, PROVENANCE};

    fn key(name: &str) -> Key {
        KeyHasher::new(name).finish()
    }

    /// Tests of one case each, and whether they passed.
    pub(crate) fn trial(suite: &str, tests: &[(&str, bool)]) -> Trial {
        let tested = |(name, passed): &(&str, bool)| {
            let outcome = if *passed { Outcome::Passed } else { Outcome::Failed("expected 1, found 2".into()) };
            let cases = vec![Case { name: (*name).into(), seconds: 0.5, outcome }];
            Tested {
                name: (*name).into(),
                kind: "shell".into(),
                key: key(name),
                cases,
                seconds: 1.0,
                finished: 1_700_086_400,
                cached: false,
            }
        };
        Trial { suite: suite.into(), key: key("tests"), tests: tests.iter().map(tested).collect(), seconds: 40.0 }
    }

    /// An account of a bake.
    pub(crate) fn account() -> Account {
        let input = |name: &str| Input { name: name.into(), digest: Digest::of(name) };
        Account {
            bake: "01JD6YH2V0M5SXN1T4F5Z1Y0QG".into(),
            image: Digest::of("image"),
            name: "web".into(),
            version: "1.4.0".into(),
            architecture: "amd64".into(),
            disk: Some(Digest::of("disk")),
            cloud: Vec::new(),
            disk_size: Some(4 << 30),
            base: "debian bookworm".into(),
            base_disk: Digest::of("base"),
            base_at_cloud: false,
            templates: vec![input("kiln.toml"), input("../common/hardening.toml")],
            source: Some(Source {
                repository: Some("https://github.com/acme/shop".into()),
                commit: "0123456789abcdef0123456789abcdef01234567".into(),
                folder: "images/web".into(),
                dirty: false,
            }),
            variables: BTreeMap::from([("greeting".into(), Some("hello".into())), ("user".into(), None)]),
            builder: "qemu".into(),
            steps: vec![
                StepAccount {
                    name: "packages".into(),
                    kind: "shell".into(),
                    key: key("packages"),
                    inputs: vec![input("script")],
                    cached: true,
                    made: 1_700_000_000,
                    seconds: 12.25,
                    converged: true,
                },
                StepAccount {
                    name: "site".into(),
                    kind: "file".into(),
                    key: key("site"),
                    inputs: vec![input("site/index.html")],
                    cached: false,
                    made: 1_700_086_400,
                    seconds: 0.4,
                    converged: false,
                },
            ],
            seal: key("seal"),
            tests: Some(trial("web", &[("page", true), ("port", true)])),
            hygiene: Some(Hygiene {
                checked: true,
                seal_version: "1".into(),
                rules: vec!["SSH host keys".into(), "machine-id".into()],
                kept: vec!["/etc/hostname".into()],
            }),
            started: 1_700_086_390,
            finished: 1_700_086_420,
        }
    }

    #[test]
    fn provenance_field_by_field() {
        let account = account();
        let statement = statement::of(&account).swap_remove(0);
        let hex = |text: &str| Digest::of(text).hex();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let expected = json!({
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{ "name": "web:1.4.0", "digest": { "sha256": hex("image") } }],
            "predicateType": "https://slsa.dev/provenance/v1",
            "predicate": {
                "buildDefinition": {
                    "buildType": "https://github.com/kiln-images/kiln/bake/v1",
                    "externalParameters": {
                        "image": { "name": "web", "version": "1.4.0", "architecture": "amd64" },
                        "template": "kiln.toml",
                        "source": { "repository": "https://github.com/acme/shop", "folder": "images/web" },
                        "base": "debian bookworm",
                        "builder": "qemu",
                        "variables": { "greeting": "hello", "user": null },
                    },
                    "internalParameters": {
                        "diskSize": 4_294_967_296_u64,
                        "steps": [
                            { "name": "packages", "provisioner": "shell", "key": key("packages").to_string() },
                            { "name": "site", "provisioner": "file", "key": key("site").to_string() },
                        ],
                        "seal": key("seal").to_string(),
                    },
                    "resolvedDependencies": [
                        { "name": "kiln.toml", "digest": { "sha256": hex("kiln.toml") }, "annotations": { "kind": "template" } },
                        {
                            "name": "../common/hardening.toml", "digest": { "sha256": hex("../common/hardening.toml") },
                            "annotations": { "kind": "template" },
                        },
                        {
                            "name": "source", "uri": format!("git+https://github.com/acme/shop@{commit}"),
                            "digest": { "gitCommit": commit }, "annotations": { "kind": "source", "dirty": false },
                        },
                        { "name": "debian bookworm", "digest": { "kilnDiskV1": hex("base") }, "annotations": { "kind": "base" } },
                        { "name": "script", "digest": { "sha256": hex("script") }, "annotations": { "kind": "input", "step": "packages" } },
                        {
                            "name": "site/index.html", "digest": { "sha256": hex("site/index.html") },
                            "annotations": { "kind": "input", "step": "site" },
                        },
                    ],
                },
                "runDetails": {
                    "builder": { "id": "https://github.com/kiln-images/kiln", "version": { "kiln": env!("CARGO_PKG_VERSION") } },
                    "metadata": {
                        "invocationId": "01JD6YH2V0M5SXN1T4F5Z1Y0QG",
                        "startedOn": "2023-11-15T22:13:10Z", "finishedOn": "2023-11-15T22:13:40Z",
                    },
                    "byproducts": [
                        { "name": "root", "digest": { "kilnDiskV1": hex("disk") }, "annotations": { "kind": "disk" } },
                        {
                            "name": "packages", "digest": { "kilnKeyV1": key("packages").hex() },
                            "annotations": {
                                "kind": "step", "cached": true,
                                "startedOn": "2023-11-14T22:13:08Z", "finishedOn": "2023-11-14T22:13:20Z", "seconds": 12.25,
                            },
                        },
                        {
                            "name": "site", "digest": { "kilnKeyV1": key("site").hex() },
                            "annotations": {
                                "kind": "step", "cached": false,
                                "startedOn": "2023-11-15T22:13:20Z", "finishedOn": "2023-11-15T22:13:20Z", "seconds": 0.4,
                            },
                        },
                    ],
                },
            },
        });
        assert_eq!(serde_json::to_value(&statement).unwrap(), expected);
        assert_eq!(statement.predicate_type, PROVENANCE);
    }

    #[test]
    fn what_is_written_is_read() {
        let account = account();
        let read = Provenance::read(&predicate(&account));
        let source = account.source.as_ref().unwrap();
        assert_eq!(read.build_type, BUILD_TYPE);
        assert_eq!((read.repository.as_ref(), read.commit.as_ref()), (source.repository.as_ref(), Some(&source.commit)));
        assert_eq!((read.dirty, read.base, read.invocation), (false, Some(account.base_disk), Some(account.bake.clone())));
        assert_eq!(read.finished.map(Timestamp::as_second), Some(1_700_086_420));
        let dirty = Account { source: Some(Source { dirty: true, ..source.clone() }), ..account.clone() };
        assert!(Provenance::read(&predicate(&dirty)).dirty);
        // What does not say that it is clean is not.
        let nothing = Provenance::read(&json!({}));
        assert_eq!((nothing.repository, nothing.dirty, nothing.finished), (None, true, None));
    }

    #[test]
    fn two_bakes_of_the_same_have_the_same_definition() {
        let definition = |account: &Account| Provenance::read(&predicate(account)).definition;
        let first = account();
        let mut later = Account { bake: "other".into(), started: 1_800_000_000, finished: 1_800_000_001, ..first.clone() };
        later.steps[1].cached = true;
        later.steps[0].made += 7;
        assert_eq!(definition(&first), definition(&later));
        let mut other = first.clone();
        other.templates[0].digest = Digest::of("changed");
        assert_ne!(definition(&first), definition(&other));
        let mut other = first.clone();
        other.variables.insert("greeting".into(), Some("good day".into()));
        assert_ne!(definition(&first), definition(&other));
        // However it is written.
        let mut text = predicate(&first).to_string();
        text = text.replace("\"name\":\"web\",\"version\":\"1.4.0\"", "\"version\":\"1.4.0\",\"name\":\"web\"");
        assert_eq!(Provenance::read(&serde_json::from_str(&text).unwrap()).definition, definition(&first));
    }
}
