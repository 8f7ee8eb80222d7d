//! Channels as people use them, in the store.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::context::{Kiln, Template, tool};
use crate::store::disk;

/// A home with web:1, web:2, … of different content.
fn with_versions(count: u8) -> Kiln {
    let kiln = Kiln::fresh();
    for number in 1..=count {
        kiln.ok(&["import", disk(&kiln, number).to_str().unwrap(), &format!("web:{number}")]);
    }
    kiln
}

fn version_at(kiln: &Kiln, reference: &str) -> String {
    kiln.ok(&["inspect", "--json", reference]).json()["version"].as_str().unwrap().to_owned()
}

fn digest(kiln: &Kiln, reference: &str) -> String {
    kiln.ok(&["inspect", "--json", reference]).json()["digest"].as_str().unwrap().to_owned()
}

/// A pair of keys without a passphrase.
fn keys(folder: &Path, name: &str) -> (String, String) {
    let path = |end: &str| folder.join(format!("{name}.{end}")).display().to_string();
    tool("openssl", &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", &path("key")]);
    tool("openssl", &["pkey", "-in", &path("key"), "-pubout", "-out", &path("pub")]);
    (path("key"), path("pub"))
}

#[test]
fn promote_and_roll_back() {
    let kiln = with_versions(4);
    kiln.run(&["inspect", "web@production"]).fails(1, &["web has no channel `production`", "kiln promote"]);
    let first = kiln.ok(&["promote", "web:1", "--to", "production", "--reason", "the first one", "--json"]).json();
    assert_eq!((first["changed"].as_bool(), first["record"]["seq"].as_u64(), &first["was"]), (Some(true), Some(1), &Value::Null));
    assert_eq!(first["record"]["actor"]["identity"]["kind"], "unproven");
    assert_eq!(kiln.ok(&["promote", "web:1", "--to", "web@production", "--json"]).json()["changed"], false);
    for version in ["web:2", "web:3"] {
        let text = kiln.ok(&["promote", version, "--to", "production"]).stdout;
        assert!(text.contains(&format!("web@production is {version} now")) && text.contains("(unproven)"), "{text}");
    }
    // A promoted version stays what it is.
    kiln.run(&["import", disk(&kiln, 9).to_str().unwrap(), "web:3"]).fails(4, &["web:3 was promoted"]);

    // Twice is two back.
    kiln.ok(&["rollback", "web@production", "--reason", "3 is slow"]);
    assert_eq!(version_at(&kiln, "web@production"), "2");
    kiln.ok(&["rollback", "web@production"]);
    assert_eq!(version_at(&kiln, "web@production"), "1");
    kiln.run(&["rollback", "web@production"]).fails(1, &["no state before this one"]);
    kiln.ok(&["promote", "web:4", "--to", "production"]);
    kiln.ok(&["rollback", "web@production", "--json"]);
    assert_eq!(version_at(&kiln, "web@production"), "1");
    kiln.ok(&["rollback", "web@production", "--to", "web:3"]);
    kiln.ok(&["rollback", "web@production", "--to", "2"]);
    assert_eq!(version_at(&kiln, "web@production"), "2");
    let other = disk(&kiln, 5);
    kiln.ok(&["import", other.to_str().unwrap(), "web:5"]);
    kiln.run(&["rollback", "web@production", "--to", "web:5"]).fails(2, &["web@production was never at web:5", "kiln promote"]);

    let history = kiln.ok(&["history", "web@production", "--json"]).json();
    let records = history["records"].as_array().unwrap();
    let told: Vec<_> =
        records.iter().rev().map(|record| format!("{} {}", record["action"].as_str().unwrap(), record["from"].as_str().unwrap())).collect();
    assert_eq!(
        told,
        [
            "promote web:1",
            "promote web:2",
            "promote web:3",
            "rollback web:2",
            "rollback web:1",
            "promote web:4",
            "rollback web:1",
            "rollback web:3",
            "rollback web:2",
        ]
    );
    for pair in records.windows(2) {
        assert_eq!(pair[0]["previous"], pair[1]["digest"]);
    }
    let text = kiln.ok(&["history", "web@production"]).stdout;
    assert!(text.contains("the first one") && text.contains("3 is slow") && text.lines().nth(1).unwrap().starts_with("now"), "{text}");
    assert!(kiln.ok(&["images"]).stdout.contains("web@production"));
}

#[test]
fn what_was_expected_is_compared_and_names_are_kept_apart() {
    let kiln = with_versions(2);
    let (one, two) = (digest(&kiln, "web:1"), digest(&kiln, "web:2"));
    kiln.run(&["promote", "web:1", "--to", "production", "--expect", &one]).fails(4, &["there is no channel web@production yet"]);
    kiln.ok(&["promote", "web:1", "--to", "production", "--expect", "none"]);
    kiln.run(&["promote", "web:2", "--to", "production", "--expect", "none"]).fails(4, &[&one, "record 1"]);
    kiln.run(&["promote", "web:2", "--to", "production", "--expect", &two]).fails(4, &[&one, &two]);
    assert_eq!(version_at(&kiln, "web@production"), "1");
    kiln.ok(&["promote", "web:2", "--to", "production", "--expect", &one]);
    kiln.run(&["rollback", "web@production", "--expect", &one]).fails(4, &[&two]);
    kiln.run(&["tag", "web:1", "web:production"]).fails(2, &["`production` is a channel of web"]);
    kiln.run(&["tag", "web:1", "web:kiln.production.000001"]).fails(2, &["is kept for"]);
    kiln.run(&["promote", "web:1", "--to", "v2"]).fails(2, &["cannot look like a version"]);
    kiln.run(&["promote", "web:1", "--to", "web:production"]).fails(2, &["is no channel"]);
    kiln.ok(&["promote", "web@production", "--to", "staging"]);
    assert_eq!(version_at(&kiln, "web@staging"), "2");
    // Out of what is promoted nothing is pruned.
    kiln.ok(&["prune"]);
    kiln.ok(&["verify"]);
}

#[test]
fn a_changed_history_is_refused_everywhere() {
    let kiln = with_versions(2);
    for version in ["web:1", "web:2"] {
        kiln.ok(&["promote", version, "--to", "production"]);
    }
    let path = kiln.store().join("channels/web/production.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("web:1", "web:9", 1)).unwrap();
    for arguments in [
        &["history", "web@production"][..],
        &["inspect", "web@production"],
        &["promote", "web:1", "--to", "production"],
        &["rollback", "web@production"],
        &["prune"],
    ] {
        kiln.run(arguments).fails(1, &["the history of web@production is broken", "record 2 does not follow"]);
    }
}

#[test]
fn revoked_images_are_refused_with_what_was_baked_from_them() {
    let kiln = with_versions(4);
    for version in ["web:1", "web:2", "web:3"] {
        kiln.ok(&["promote", version, "--to", "production"]);
    }
    kiln.run(&["revoke", "web:2", "--why", " "]).fails(2, &["needs a reason"]);
    assert_eq!(kiln.ok(&["revoke", "web:2", "--why", "CVE-2026-1", "--json"]).json()["marked"].as_array().unwrap().len(), 1);
    assert!(kiln.ok(&["revoke", "web:2", "--why", "CVE-2026-1"]).stdout.contains("already"));
    assert!(kiln.ok(&["images"]).stdout.contains("revoked"));
    // Over what was revoked.
    let back = kiln.ok(&["rollback", "web@production"]);
    assert!(back.stderr.contains("web:2 is passed over: it was revoked: CVE-2026-1"), "{back}");
    assert_eq!(version_at(&kiln, "web@production"), "1");
    kiln.run(&["rollback", "web@production", "--to", "web:2"]).fails(4, &["CVE-2026-1", "--allow-revoked"]);
    kiln.run(&["promote", "web:2", "--to", "staging"]).fails(4, &["web:2 was revoked: CVE-2026-1", "--allow-revoked"]);
    kiln.ok(&["promote", "web:2", "--to", "staging", "--allow-revoked"]);
    kiln.run(&["run", "web:2", "--exec", "true"]).fails(125, &["web:2 was revoked: CVE-2026-1"]);
    let ran = kiln.ok(&["revoke", "web:1", "--why", "too"]);
    assert!(ran.stderr.contains("web@production is at it"), "{ran}");
    assert!(kiln.ok(&["history", "web@production"]).stdout.contains("revoked"));

    let template = Template::new("[image]\nname = \"child\"\nversion = \"1\"\n[base]\nimage = \"web:2\"\n");
    kiln.run(&["bake", template.path()]).fails(4, &["web:2 was revoked: CVE-2026-1"]);
    kiln.ok(&["prune"]);
    kiln.ok(&["verify"]);
}

#[test]
fn policies_refuse_and_name_every_condition() {
    let kiln = with_versions(2);
    let (key, public) = keys(&kiln.home, "release");
    let (other_key, other_public) = keys(&kiln.home, "other");
    kiln.run(&[
        "promote",
        "web:1",
        "--to",
        "production",
        "--require-tests",
        "--require-signature",
        &public,
        "--require-channel",
        "staging",
    ])
    .fails(4, &["3 conditions do not hold", "signed_by", "tests_passed", "came_through: it never was in staging"]);
    kiln.run(&["promote", "web:1", "--to", "production", "--policy-key", &public]).fails(4, &["has no policy"]);

    let policy = kiln.home.join("policy.toml");
    std::fs::write(&policy, "channel = \"web@production\"\n[require]\ncame_through = [\"staging\"]\nmax_age = \"1h\"\n").unwrap();
    let policy = policy.to_str().unwrap();
    kiln.run(&["policy", "show", "web@production"]).fails(1, &["has no policy"]);
    kiln.run(&["policy", "set", "web@staging", policy, "--key", &key]).fails(2, &["is for web@production"]);
    kiln.ok(&["policy", "set", "web@production", policy, "--key", &key]);
    assert!(kiln.ok(&["policy", "show", "web@production", "--policy-key", &public]).stdout.contains("came_through"));
    kiln.run(&["policy", "show", "web@production", "--policy-key", &other_public]).fails(4, &["was signed by another key"]);
    kiln.run(&["policy", "set", "web@production", policy, "--key", &other_key]).fails(4, &["--replace-key"]);

    kiln.run(&["promote", "web:1", "--to", "production"]).fails(4, &["one condition does not hold", "it never was in staging"]);
    kiln.ok(&["promote", "web:1", "--to", "staging"]);
    kiln.run(&["policy", "check", "web@production", "--image", "web:2"]).fails(4, &["it never was in staging"]);
    kiln.ok(&["policy", "check", "web@production", "--image", "web:1", "--policy-key", &public]);
    let promoted = kiln.ok(&["promote", "web:1", "--to", "production", "--key", &key, "--policy-key", &public, "--json"]).json();
    let shown = kiln.ok(&["policy", "show", "web@production", "--json"]).json();
    assert_eq!(promoted["record"]["policy"], shown["digest"]);
    assert_eq!(promoted["record"]["actor"]["identity"]["kind"], "key");
    kiln.ok(&["policy", "check", "web@production"]);

    // Every record has to be signed with the key that is asked for.
    kiln.ok(&["history", "web@production", "--key", &public]);
    kiln.run(&["history", "web@production", "--key", &other_public]).fails(4, &["record 1", "another key"]);
    kiln.run(&["history", "web@staging", "--key", &public]).fails(4, &["it is not signed"]);

    // Changed without being signed.
    let path = kiln.store().join("channels/web/production.policy.toml");
    std::fs::write(&path, "[require]\ncame_through = [\"elsewhere\"]\n").unwrap();
    kiln.run(&["promote", "web:2", "--to", "production"]).fails(4, &["it is not what was signed"]);
}

/// A registry, and the name `shop/web` in it.
fn registry() -> (kiln_testing::Registry, String) {
    let registry = kiln_testing::Registry::builder().start().unwrap();
    let name = format!("{}/shop/web", registry.address());
    (registry, name)
}

#[test]
fn a_channel_of_a_registry() {
    let kiln = with_versions(3);
    let (_registry, there) = registry();
    let at = |rest: &str| format!("{there}{rest}");
    // Image and evidence are copied first.
    let (key, public) = keys(&kiln.home, "release");
    kiln.ok(&["sign", "web:1", "--key", &key]);
    let first = kiln.ok(&["promote", "web:1", "--to", &at("@production"), "--require-signature", &public, "--json"]).json();
    assert_eq!((first["record"]["seq"].as_u64(), first["record"]["name"].as_str()), (Some(1), Some("shop/web")));
    assert_eq!(first["record"]["evidence"].as_array().unwrap().len(), 2, "{first}");
    kiln.ok(&["verify", &at(":1"), "--key", &public]);
    kiln.run(&["promote", "web:2", "--to", &at("@production"), "--require-signature", &public]).fails(4, &["signed_by"]);
    kiln.run(&["import", disk(&kiln, 9).to_str().unwrap(), "web:1"]).fails(4, &["web:1 was promoted"]);
    kiln.ok(&["promote", "web:2", "--to", &at("@production")]);
    // What is there already is promoted there.
    kiln.ok(&["promote", &at(":1"), "--to", "staging", "--key", &key]);
    kiln.ok(&["promote", &at("@staging"), "--to", &at("@production")]);
    kiln.run(&["history", &at("@prodution")]).fails(1, &["it has production, staging"]);
    kiln.run(&["promote", &at(":1"), "--to", "production", "--expect", "none"]).fails(4, &["record 3"]);

    kiln.ok(&["rollback", &at("@production"), "--reason", "slow"]);
    let history = kiln.ok(&["history", &at("@production"), "--json"]).json();
    let told: Vec<_> =
        history["records"].as_array().unwrap().iter().rev().map(|record| record["from"].as_str().unwrap().to_owned()).collect();
    assert_eq!(told, ["web:1".to_owned(), "web:2".to_owned(), at("@staging"), "web:2".to_owned()]);
    kiln.ok(&["history", &at("@staging"), "--key", &public]);
    kiln.run(&["history", &at("@production"), "--key", &public]).fails(4, &["record 1"]);

    // No push moves what is a channel's.
    kiln.run(&["push", "web:3", &at(":production")]).fails(2, &["`production` is a channel of"]);
    kiln.run(&["push", "web:3", &at(":kiln.production.000009")]).fails(2, &["is kept for"]);

    // On another machine: by the channel, whatever its tag says.
    let other = Kiln::fresh();
    other.ok(&["pull", &at("@production")]);
    assert_eq!(other.ok(&["images", "--json"]).json()[0]["version"], "2");
    let told = kiln.ok(&["doctor", &there, "--json"]).json();
    assert_eq!(told["tags_enforced"], false, "{told}");

    // Back into the store, with its evidence.
    other.ok(&["promote", &at(":1"), "--to", "web@local", "--require-signature", &public]);
    assert_eq!(version_at(&other, "web@local"), "1");
}

#[test]
fn policies_and_revocations_of_a_registry() {
    let kiln = with_versions(2);
    let (_registry, there) = registry();
    let at = |rest: &str| format!("{there}{rest}");
    let (key, public) = keys(&kiln.home, "release");
    let policy = kiln.home.join("policy.toml");
    std::fs::write(&policy, "channel = \"shop/web@production\"\n[require]\ncame_through = [\"staging\"]\n").unwrap();
    kiln.ok(&["policy", "set", &at("@production"), policy.to_str().unwrap(), "--key", &key]);
    kiln.run(&["promote", "web:1", "--to", &at("@production")]).fails(4, &["it never was in staging"]);
    kiln.ok(&["promote", "web:1", "--to", &at("@staging")]);
    kiln.ok(&["promote", &at(":1"), "--to", "production", "--policy-key", &public]);
    kiln.ok(&["policy", "check", &at("@production"), "--policy-key", &public]);

    let revoked = kiln.ok(&["revoke", &at(":1"), "--why", "CVE-2026-2", "--json"]).json();
    assert_eq!(revoked["channels"].as_array().unwrap().len(), 2, "{revoked}");
    kiln.run(&["promote", &at(":1"), "--to", "other"]).fails(4, &["was revoked: CVE-2026-2"]);
    kiln.run(&["run", &at("@production"), "--exec", "true"]).fails(125, &["was revoked: CVE-2026-2"]);
    kiln.run(&["rollback", &at("@production")]).fails(1, &["no state before this one"]);
    // It travels with the image.
    let other = Kiln::fresh();
    other.run(&["pull", &at(":1")]);
    other.run(&["promote", "web:1", "--to", "production"]).fails(4, &["was revoked: CVE-2026-2"]);
}

#[test]
fn sixty_four_promotions_at_once() {
    let kiln = with_versions(8);
    let children: Vec<_> = (0..64)
        .map(|number| {
            let version = format!("web:{}", number % 8 + 1);
            let reason = format!("promotion {number}");
            kiln.command(&["promote", &version, "--to", "production", "--reason", &reason, "--json"])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut changed = 0;
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        changed += usize::from(told["changed"] == true);
    }
    let history = kiln.ok(&["history", "web@production", "--json"]).json();
    let records = history["records"].as_array().unwrap();
    assert_eq!(records.len(), changed, "one record for each change");
    for (number, record) in records.iter().rev().enumerate() {
        assert_eq!(record["seq"].as_u64(), Some(number as u64 + 1));
    }
    for pair in records.windows(2) {
        assert_eq!(pair[0]["previous"], pair[1]["digest"]);
        assert_ne!(pair[0]["image"], pair[1]["image"], "a record without a change");
    }
}

/// A thousand versions and as many records; release builds answer within half
/// a second, others within five.
#[test]
fn a_thousand_versions() {
    let kiln = Kiln::fresh();
    kiln.ok(&["import", disk(&kiln, 1).to_str().unwrap(), "web:0"]);
    multiply(&kiln, 1000);
    let limit = if cfg!(debug_assertions) { Duration::from_secs(5) } else { Duration::from_millis(500) };
    for arguments in [
        &["images"][..],
        &["promote", "web:7", "--to", "production", "--json"],
        &["history", "web@production"],
        &["rollback", "web@production"],
        &["inspect", "web@production"],
    ] {
        let since = Instant::now();
        let ran = kiln.ok(arguments);
        let took = since.elapsed();
        eprintln!("{arguments:?}: {took:?}");
        assert!(took < limit, "{arguments:?} took {took:?}");
        assert!(!ran.stdout.is_empty());
    }
    assert_eq!(kiln.ok(&["images", "--json"]).json().as_array().unwrap().len(), 1001);
}

/// Makes `count` more versions of web:0, and a channel that has been at each.
/// As files: publishing syncs each of them, which is not what is measured.
fn multiply(kiln: &Kiln, count: usize) {
    use kiln_model::Digest;
    use kiln_model::channel::{Action, Actor, Chain, Entry, Identity, Record, VERSION};

    let read = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let blob = |digest: &str| kiln.store().join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let write = |value: &Value| {
        let bytes = serde_json::to_vec(value).unwrap();
        let digest = Digest::of(&bytes);
        std::fs::write(blob(&digest.to_string()), &bytes).unwrap();
        (digest, bytes.len())
    };
    let path = kiln.store().join("index.json");
    let mut index = read(&path);
    let entry = index["manifests"][0].clone();
    let manifest = read(&blob(entry["digest"].as_str().unwrap()));
    let config = read(&blob(manifest["config"]["digest"].as_str().unwrap()));
    let (mut chain, mut lines) = (Chain::default(), String::new());
    for number in 1..=count {
        let (mut entry, mut manifest, mut config) = (entry.clone(), manifest.clone(), config.clone());
        config["version"] = number.to_string().into();
        let (digest, size) = write(&config);
        manifest["config"]["digest"] = digest.to_string().into();
        manifest["config"]["size"] = size.into();
        entry["annotations"]["vnd.kiln.config"] = digest.to_string().into();
        let (digest, size) = write(&manifest);
        entry["digest"] = digest.to_string().into();
        entry["size"] = size.into();
        entry["annotations"]["org.opencontainers.image.ref.name"] = format!("web:{number}").into();
        index["manifests"].as_array_mut().unwrap().push(entry);
        let (seq, previous) = chain.next();
        let record = Entry::new(Record {
            v: VERSION,
            name: "web".into(),
            channel: "production".into(),
            seq,
            previous,
            image: digest,
            from: format!("web:{number}"),
            action: Action::Promote,
            time: "2026-01-02T03:04:05Z".into(),
            actor: Actor { name: "ann".into(), identity: Identity::Unproven },
            reason: None,
            evidence: vec![],
            policy: None,
        })
        .unwrap();
        lines.push_str(&serde_json::json!({ "record": record.text(), "signature": null }).to_string());
        lines.push('\n');
        chain.entries.push(record);
    }
    std::fs::write(&path, serde_json::to_vec(&index).unwrap()).unwrap();
    std::fs::create_dir_all(kiln.store().join("channels/web")).unwrap();
    std::fs::write(kiln.store().join("channels/web/production.jsonl"), lines).unwrap();
}
