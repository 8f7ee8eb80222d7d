//! Keys, signatures and what is attached to images, as people use them. What
//! kiln signs, openssl checks.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::context::{Kiln, Ran, tool};

const PASSWORD: &str = "correct horse battery";

fn with_password(kiln: &Kiln, arguments: &[&str], password: &str) -> Ran {
    Ran::of(kiln.command(arguments).env("KILN_KEY_PASSWORD", password).output().unwrap(), arguments)
}

/// A pair of keys: paths of the private and the public one.
fn keygen(kiln: &Kiln, name: &str) -> (String, String) {
    let path = |extension: &str| kiln.home.join(format!("{name}.{extension}")).to_str().unwrap().to_owned();
    let made = with_password(kiln, &["keygen", "--output", &path("key"), "--json"], PASSWORD);
    assert_eq!(made.status, 0, "{made}");
    (path("key"), path("pub"))
}

/// An image of a disk with this content.
fn import(kiln: &Kiln, content: u8, reference: &str) {
    let path = kiln.home.join(format!("disk-{content}"));
    let mut bytes = vec![0; 4 << 20];
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0]);
    bytes[1 << 20..2 << 20].fill(content);
    std::fs::write(&path, bytes).unwrap();
    kiln.ok(&["import", path.to_str().unwrap(), reference]);
}

fn signed(kiln: &Kiln, reference: &str, key: &str) {
    let ran = with_password(kiln, &["sign", reference, "--key", key], PASSWORD);
    assert_eq!(ran.status, 0, "{ran}");
}

fn blob(kiln: &Kiln, digest: &str) -> PathBuf {
    kiln.store().join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn index(kiln: &Kiln) -> Value {
    json(&kiln.store().join("index.json"))
}

/// What is wrong, in one word.
fn failed(kiln: &Kiln, reference: &str, public: &str) -> String {
    let ran = kiln.run(&["verify", reference, "--key", public, "--json"]);
    assert_eq!(ran.status, 4, "{ran}");
    assert_eq!(ran.json()["ok"], false, "{ran}");
    ran.json()["failed"]["what"].as_str().unwrap().to_owned()
}

#[test]
fn a_private_key_is_encrypted_and_its_owners_alone() {
    let kiln = Kiln::fresh();
    let (private, public) = keygen(&kiln, "kiln");
    let mode = |path: &str| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&private), 0o600);
    assert_eq!(mode(&public) & 0o133, 0, "no more than to be read by everybody");
    let pass = format!("pass:{PASSWORD}");
    assert_eq!(tool("openssl", &["pkey", "-in", &private, "-passin", &pass, "-pubout"]), std::fs::read_to_string(&public).unwrap());
    let wrong = Command::new("openssl").args(["pkey", "-in", &private, "-passin", "pass:wrong", "-noout"]).output().unwrap();
    assert!(!wrong.status.success());

    // Never over another one, and never without a passphrase.
    with_password(&kiln, &["keygen", "--output", &private], PASSWORD).fails(2, &["is there already", "never overwritten"]);
    let other = kiln.home.join("other.key");
    with_password(&kiln, &["keygen", "--output", other.to_str().unwrap()], "").fails(2, &["the passphrase is empty"]);
    // Without a terminal to ask at: setsid leaves it behind.
    let mut asked = Command::new("setsid");
    asked.args(["-w", env!("CARGO_BIN_EXE_kiln"), "keygen", "--output", other.to_str().unwrap()]).env("KILN_HOME", &kiln.home);
    Ran::of(asked.env_remove("KILN_KEY_PASSWORD").output().unwrap(), &["keygen"]).fails(2, &["no terminal to ask at", "KILN_KEY_PASSWORD"]);
    assert!(!other.exists());

    import(&kiln, 1, "web:1");
    with_password(&kiln, &["sign", "web:1", "--key", &private], "wrong").fails(4, &["the passphrase of the private key is wrong"]);
    let file = kiln.home.join("password");
    std::fs::write(&file, format!("{PASSWORD}\n")).unwrap();
    kiln.ok(&["sign", "web:1", "--key", &private, "--password-file", file.to_str().unwrap()]);
}

#[test]
fn a_passphrase_is_asked_for_and_not_shown() {
    let kiln = Kiln::fresh();
    let key = kiln.home.join("kiln.key");
    // `script` is a terminal; what it shows goes to its standard output.
    let ask = |answers: &[(&str, &str)]| {
        use std::io::{Read as _, Write as _};
        let line = format!("{} keygen --output {}", env!("CARGO_BIN_EXE_kiln"), key.display());
        let mut script = Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("KILN_HOME", &kiln.home)
            .env_remove("KILN_KEY_PASSWORD")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (mut input, mut output) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
        let mut shown = Vec::new();
        for (question, answer) in answers {
            while !String::from_utf8_lossy(&shown).contains(question) {
                let mut byte = [0];
                assert_eq!(output.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&shown));
                shown.extend(byte);
            }
            input.write_all(format!("{answer}\r").as_bytes()).unwrap();
        }
        output.read_to_end(&mut shown).unwrap();
        (script.wait().unwrap().code(), String::from_utf8_lossy(&shown).into_owned())
    };
    let (status, shown) = ask(&[("Passphrase for", "hunter22"), ("The same again", "hunter23")]);
    assert_eq!(status, Some(2), "{shown}");
    assert!(shown.contains("the two passphrases differ") && !key.exists(), "{shown}");
    let (status, shown) = ask(&[("Passphrase for", "hunter22"), ("The same again", "hunter22")]);
    assert_eq!(status, Some(0), "{shown}");
    assert!(shown.contains("Passphrase for") && !shown.contains("hunter"), "{shown}");
    tool("openssl", &["pkey", "-in", key.to_str().unwrap(), "-passin", "pass:hunter22", "-noout"]);
}

#[test]
fn openssl_accepts_the_signature_over_the_stored_payload() {
    let kiln = Kiln::fresh();
    let (private, public) = keygen(&kiln, "kiln");
    import(&kiln, 1, "web:1");
    signed(&kiln, "web:1", &private);
    let image = kiln.ok(&["inspect", "--json", "web:1"]).json()["digest"].as_str().unwrap().to_owned();

    // As somebody would who has only the specification of the layout.
    let tag = format!("{}.sig", image.replace(':', "-"));
    let index = index(&kiln);
    let entry = index["manifests"].as_array().unwrap().iter().find(|entry| entry["annotations"]["vnd.kiln.tag"] == tag.as_str()).unwrap();
    let manifest = json(&blob(&kiln, entry["digest"].as_str().unwrap()));
    let layer = &manifest["layers"][0];
    assert_eq!(layer["mediaType"], "application/vnd.dev.cosign.simplesigning.v1+json");
    let payload = blob(&kiln, layer["digest"].as_str().unwrap());
    assert_eq!(
        std::fs::read_to_string(&payload).unwrap(),
        format!(
            "{{\"critical\":{{\"identity\":{{\"docker-reference\":\"web:1\"}},\"image\":{{\"docker-manifest-digest\":\"{image}\"}},\
             \"type\":\"cosign container image signature\"}},\"optional\":null}}"
        )
    );
    let at = |name: &str| kiln.home.join(name).to_str().unwrap().to_owned();
    std::fs::write(at("signature.b64"), layer["annotations"]["dev.cosignproject.cosign/signature"].as_str().unwrap()).unwrap();
    tool("openssl", &["base64", "-d", "-A", "-in", &at("signature.b64"), "-out", &at("signature")]);
    let verify = |payload: &str| {
        let arguments = ["dgst", "-sha256", "-verify", &public, "-signature", &at("signature"), payload];
        Command::new("openssl").args(arguments).output().unwrap().status.success()
    };
    assert!(verify(payload.to_str().unwrap()));
    std::fs::write(at("changed"), std::fs::read_to_string(&payload).unwrap().replace("web:1", "web:2")).unwrap();
    assert!(!verify(&at("changed")));

    let found = kiln.ok(&["verify", "web:1", "--key", &public, "--json"]).json();
    assert_eq!((&found["ok"], &found["digest"]), (&Value::Bool(true), &Value::String(image)));
    let kinds: Vec<&str> = found["evidence"].as_array().unwrap().iter().map(|piece| piece["what"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["signature (cosign tag)", "signature (bundle)"]);
    // Without an image it is the store that is verified, as ever.
    assert!(kiln.ok(&["verify"]).stdout.contains("all sound"));
    // Signed again: nothing is added.
    let again = with_password(&kiln, &["sign", "web:1", "--key", &private, "--json"], PASSWORD);
    assert_eq!(again.json()["attached"], serde_json::json!([]), "{again}");
}

#[test]
fn another_key_tag_digest_or_payload_is_refused_and_named() {
    let kiln = Kiln::fresh();
    let (private, public) = keygen(&kiln, "kiln");
    let (_, stranger) = keygen(&kiln, "stranger");
    import(&kiln, 1, "web:1");
    import(&kiln, 2, "web:2");
    assert_eq!(failed(&kiln, "web:1", &public), "unsigned");
    signed(&kiln, "web:1", &private);
    kiln.ok(&["verify", "web:1", "--key", &stranger, "--key", &public]);

    assert_eq!(failed(&kiln, "web:1", &stranger), "key");
    kiln.run(&["verify", "web:1", "--key", &stranger]).fails(4, &["signed by another key"]);
    // A tag that was moved to something else.
    kiln.ok(&["tag", "web:2", "web:1"]);
    assert_eq!(failed(&kiln, "web:1", &public), "unsigned");
    // The old image under a newer version.
    let old = kiln.ok(&["images", "--json"]).json();
    let old = old.as_array().unwrap().iter().find(|image| image["version"] == "1").unwrap()["digest"].as_str().unwrap().to_owned();
    kiln.ok(&["tag", &format!("web@{old}"), "web:3"]);
    assert_eq!(failed(&kiln, "web:3", &public), "tag");
    // Under a name that moves it is what it is.
    kiln.ok(&["tag", &format!("web@{old}"), "web:stable"]);
    kiln.ok(&["verify", "web:stable", "--key", &public]);

    // The signatures of one image put to another, by hand.
    let path = kiln.store().join("index.json");
    let good = std::fs::read(&path).unwrap();
    let other = kiln.ok(&["inspect", "--json", "web:2"]).json()["digest"].as_str().unwrap().to_owned();
    let mut moved = index(&kiln);
    for entry in moved["manifests"].as_array_mut().unwrap() {
        if entry["annotations"]["vnd.kiln.subject"] == old.as_str() {
            entry["annotations"]["vnd.kiln.subject"] = other.clone().into();
        }
    }
    std::fs::write(&path, moved.to_string()).unwrap();
    assert_eq!(failed(&kiln, "web:2", &public), "digest");
    std::fs::write(&path, &good).unwrap();

    // A payload that was changed, with a manifest and an entry that fit it.
    let put = |bytes: &[u8]| {
        let path = kiln.home.join("put");
        std::fs::write(&path, bytes).unwrap();
        let digest = format!("sha256:{}", tool("sha256sum", &[path.to_str().unwrap()]).split(' ').next().unwrap());
        std::fs::copy(path, blob(&kiln, &digest)).unwrap();
        digest
    };
    let mut changed = index(&kiln);
    for entry in changed["manifests"].as_array_mut().unwrap() {
        if entry["annotations"]["vnd.kiln.tag"].is_null() {
            continue;
        }
        let mut manifest = json(&blob(&kiln, entry["digest"].as_str().unwrap()));
        let payload = std::fs::read_to_string(blob(&kiln, manifest["layers"][0]["digest"].as_str().unwrap())).unwrap();
        manifest["layers"][0]["digest"] = put(payload.replace("web:1", "web:3").as_bytes()).into();
        let bytes = manifest.to_string();
        entry["digest"] = put(bytes.as_bytes()).into();
        entry["size"] = bytes.len().into();
    }
    std::fs::write(&path, changed.to_string()).unwrap();
    assert_eq!(failed(&kiln, "web:stable", &public), "payload");
    // Bytes that were changed where they are are not even read.
    std::fs::write(&path, &good).unwrap();
    let entry = index(&kiln)["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| !entry["annotations"]["vnd.kiln.tag"].is_null())
        .cloned()
        .unwrap();
    let manifest = json(&blob(&kiln, entry["digest"].as_str().unwrap()));
    let payload = blob(&kiln, manifest["layers"][0]["digest"].as_str().unwrap());
    let text = std::fs::read_to_string(&payload).unwrap();
    std::fs::write(&payload, text.replace("web:1", "web:3")).unwrap();
    kiln.run(&["verify", "web:stable", "--key", &public]).fails(1, &["its bytes have another digest"]);
}

/// The statement that is attached to an image, of this predicate type, out of
/// its bundle.
fn statement(kiln: &Kiln, image: &str, predicate_type: &str, at: &Path) -> Value {
    let entries = index(kiln)["manifests"].clone();
    let of = |entry: &&Value| {
        entry["annotations"]["vnd.kiln.subject"] == image && entry["annotations"]["dev.sigstore.bundle.predicateType"] == predicate_type
    };
    let entry = entries.as_array().unwrap().iter().find(of).unwrap_or_else(|| panic!("no {predicate_type} in {entries:#}")).clone();
    let manifest = json(&blob(kiln, entry["digest"].as_str().unwrap()));
    assert_eq!(manifest["subject"]["digest"], image);
    let bundle = json(&blob(kiln, manifest["layers"][0]["digest"].as_str().unwrap()));
    std::fs::write(at, bundle["dsseEnvelope"]["payload"].as_str().unwrap()).unwrap();
    let text = tool("openssl", &["base64", "-d", "-A", "-in", at.to_str().unwrap()]);
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_bake_accounts_for_its_image() {
    use crate::context::{Template, new_word};

    let kiln = Kiln::shared();
    let folder = tempfile::tempdir().unwrap();
    let keys = Kiln::fresh();
    let (private, public) = keygen(&keys, "bake");
    let word = new_word();
    let secret = format!("secret-{word}");
    let template = Template::debian(
        "evidence",
        "[variables]\nword = 'x'\ntoken = { env = 'EVIDENCE_TOKEN', sensitive = true }\n\
             [[provision]]\nname = 'write'\nenv = { WORD = '{{ var.word }}' }\nsecrets = ['token']\nshell = 'echo $WORD >/etc/word'\n\
             [[provision]]\nname = 'site'\nfile = { source = 'site/', destination = '/srv/site' }\n\
             [[test]]\nname = 'word'\nshell = 'test -s /etc/word'\n",
    );
    template.write("site/index.html", "hello\n");
    let git =
        |arguments: &[&str]| tool("git", &[&["-C", template.path(), "-c", "user.name=x", "-c", "user.email=x@x"], arguments].concat());
    git(&["init", "-q"]);
    git(&["remote", "add", "origin", "https://eve:hunter22@git.example/acme/shop.git"]);
    git(&["add", "."]);
    git(&["commit", "-qm", "x"]);
    let commit = git(&["rev-parse", "HEAD"]).trim().to_owned();

    let var = format!("word={word}");
    let arguments = ["bake", template.path(), "--var", &var, "--sign-key", &private, "--json"];
    let bake = || {
        let mut command = kiln.command(&arguments);
        let ran = Ran::of(command.env("KILN_KEY_PASSWORD", PASSWORD).env("EVIDENCE_TOKEN", &secret).output().unwrap(), &arguments);
        assert_eq!(ran.status, 0, "{ran}");
        ran
    };
    let first = bake();
    let baked = first.events().into_iter().find(|event| event["event"] == "baked").unwrap();
    let image = baked["digest"].as_str().unwrap();
    let found = kiln.ok(&["verify", "evidence:1", "--key", &public, "--json"]).json();
    let what = |found: &Value| -> Vec<String> {
        found["evidence"].as_array().unwrap().iter().map(|piece| piece["what"].as_str().unwrap().to_owned()).collect()
    };
    let all = ["provenance", "tests passed", "hygiene clean", "signature (cosign tag)", "signature (bundle)", "SBOM (SPDX)", "manifest"];
    assert_eq!(what(&found), all);
    assert!(found["evidence"].as_array().unwrap().iter().all(|piece| piece["ok"] == true), "{found:#}");

    let provenance = statement(&kiln, image, "https://slsa.dev/provenance/v1", &folder.path().join("payload"));
    let text = provenance.to_string();
    for hidden in [secret.as_str(), "hunter22", PASSWORD, template.path()] {
        assert!(!text.contains(hidden), "{hidden} in {text}");
    }
    assert_eq!(provenance["subject"][0]["digest"]["sha256"], image.replace("sha256:", ""));
    let definition = &provenance["predicate"]["buildDefinition"];
    assert_eq!(definition["externalParameters"]["source"]["repository"], "https://git.example/acme/shop.git");
    assert_eq!(definition["externalParameters"]["variables"]["word"], word.as_str());
    let sum = |name: &str| tool("sha256sum", &[&format!("{}/{name}", template.path())]).split(' ').next().unwrap().to_owned();
    let digest_of = |name: &str, algorithm: &str| {
        let all = definition["resolvedDependencies"].as_array().unwrap();
        all.iter().find(|input| input["name"] == name).unwrap()["digest"][algorithm].as_str().unwrap().to_owned()
    };
    assert_eq!(digest_of("kiln.toml", "sha256"), sum("kiln.toml"));
    assert_eq!(digest_of("site/index.html", "sha256"), sum("site/index.html"));
    assert_eq!(digest_of("source", "gitCommit"), commit);
    let inspected = kiln.ok(&["inspect", "--json", "evidence:1"]).json();
    assert_eq!(format!("sha256:{}", digest_of("debian bookworm", "kilnDiskV1")), inspected["base_digest"].as_str().unwrap());
    assert_eq!(definition["internalParameters"]["steps"][0]["key"], inspected["steps"][0]["key"]);

    // The same again: the same image, and nothing new is attached.
    let again = bake();
    let baked = again.events().into_iter().find(|event| event["event"] == "baked").unwrap();
    assert_eq!(baked["digest"], image);
    assert_eq!(what(&kiln.ok(&["verify", "evidence:1", "--key", &public, "--json"]).json()), all);
}
