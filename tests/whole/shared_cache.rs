//! Checkpoints that machines share through a registry.

use std::os::unix::fs::FileExt as _;

use kiln_testing::Registry;
use serde_json::Value;

use crate::context::{Kiln, Ran, Template, new_word, tool, with_base};

const PASSWORD: &str = "of the cache";

/// A key pair; gives the paths of both.
fn keygen(kiln: &Kiln, name: &str) -> (String, String) {
    let path = |file: &str| kiln.home.join(file).to_str().unwrap().to_owned();
    let private = path(&format!("{name}.key"));
    let made = kiln.command(&["keygen", "--output", &private]).env("KILN_KEY_PASSWORD", PASSWORD).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    (private, path(&format!("{name}.pub")))
}

/// A step that takes long, and one that says `last`.
fn template(word: &str, trusted: &str, last: &str) -> Template {
    Template::debian(
        "shared",
        &format!(
            "[disk]\nsize = \"3GiB\"\n[cache]\ntrusted = [\"{trusted}\"]\n\
             [[provision]]\nname = \"slow\"\nshell = 'sleep 6; echo {word} >/etc/word'\n\
             [[provision]]\nname = \"last\"\ncheckpoint = false\nshell = 'echo {last} >/etc/last; cat /etc/word'\n"
        ),
    )
}

fn bake(kiln: &Kiln, arguments: &[&str]) -> Ran {
    let arguments = [&["bake", "--json"], arguments].concat();
    let ran = Ran::of(kiln.command(&arguments).env("KILN_KEY_PASSWORD", PASSWORD).output().unwrap(), &arguments);
    assert_eq!(ran.status, 0, "{ran}");
    ran
}

fn event<'a>(events: &'a [Value], kind: &str) -> &'a Value {
    events.iter().find(|event| event["event"] == kind).unwrap_or_else(|| panic!("no {kind}: {events:?}"))
}

/// The steps, and whether each was cached.
fn steps(ran: &Ran) -> Vec<(String, bool)> {
    let events = ran.events();
    let steps = event(&events, "baked")["steps"].as_array().unwrap().clone();
    steps.iter().map(|step| (step["name"].as_str().unwrap().to_owned(), step["cached"] == true)).collect()
}

fn says(ran: &Ran, kind: &str, text: &str) -> bool {
    ran.events().iter().any(|event| event["event"] == kind && event["message"].as_str().unwrap().contains(text))
}

/// A cache at a registry, with the checkpoint of the slow step in it.
struct Shared {
    registry: Registry,
    cache: String,
    first: Kiln,
    word: String,
    private: String,
    public: String,
}

impl Shared {
    fn new() -> Self {
        let registry = Registry::builder().start().unwrap();
        let cache = format!("{}/shop/cache", registry.address());
        let (first, word) = (with_base(), new_word());
        let (private, public) = keygen(&first, "ci");
        let one = bake(&first, &[template(&word, &public, "one").path(), "--cache-to", &cache, "--sign-key", &private]);
        assert!(says(&one, "note", "left 1 checkpoint"), "{one}");
        Self { registry, cache, first, word, private, public }
    }

    /// The manifest of that checkpoint, and its tag.
    fn manifest(&self) -> (Value, String) {
        let tags = tool("skopeo", &["list-tags", "--tls-verify=false", &format!("docker://{}", self.cache)]);
        let tags: Value = serde_json::from_str(&tags).unwrap();
        let step = tags["Tags"].as_array().unwrap().iter().filter_map(Value::as_str).find(|tag| tag.starts_with("step-")).unwrap();
        let manifest = tool("skopeo", &["inspect", "--raw", "--tls-verify=false", &format!("docker://{}:{step}", self.cache)]);
        (serde_json::from_str(&manifest).unwrap(), step.to_owned())
    }
}

#[test]
fn a_machine_that_starts_with_nothing_goes_on_from_what_it_trusts() {
    let shared = Shared::new();
    let Shared { cache, first, word, private, public, .. } = &shared;
    // What is there is not sent again.
    let again = bake(first, &[template(word, public, "again").path(), "--cache-to", cache, "--sign-key", private]);
    assert!(says(&again, "note", "left 0 checkpoints"), "{again}");

    // No memory is among it, and it is signed.
    let (manifest, step) = shared.manifest();
    let title = |layer: &Value| layer["annotations"]["org.opencontainers.image.title"].as_str().unwrap().to_owned();
    let files: Vec<String> = manifest["layers"].as_array().unwrap().iter().map(title).collect();
    assert_eq!(files, ["layer-0.qcow2", "layer-1.qcow2", "traces.json"]);
    first.ok(&["verify", &format!("{cache}:{step}"), "--key", public]);

    // Another machine has the base and nothing else: the step is not run.
    let second = with_base();
    let two = bake(&second, &[template(word, public, "two").path(), "--cache-from", cache]);
    assert_eq!(steps(&two), [("slow".into(), true), ("last".into(), false)], "{two}");
    assert!(says(&two, "note", "took the checkpoint of step"), "{two}");
    assert!(two.events().iter().any(|event| event["event"] == "output" && event["line"] == word.as_str()), "{two}");
    assert_eq!(second.leftovers(), Vec::<std::path::PathBuf>::new());
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn what_nobody_trusts_or_is_damaged_is_not_taken() {
    let shared = Shared::new();
    let Shared { registry, cache, first, word, public, .. } = &shared;
    let (_, stranger) = keygen(first, "stranger");
    let (manifest, _) = shared.manifest();

    // What another key has signed is nobody's.
    let third = with_base();
    let three = bake(&third, &[template(word, &stranger, "three").path(), "--cache-from", cache]);
    assert_eq!(steps(&three), [("slow".into(), false), ("last".into(), false)], "{three}");
    assert!(says(&three, "warning", "no key that the template names has signed it"), "{three}");

    // Nor is what is not what was signed.
    let layer = manifest["layers"][1]["digest"].as_str().unwrap().trim_start_matches("sha256:");
    let file = std::fs::File::options().read(true).write(true).open(registry.blob(layer)).unwrap();
    let (mut byte, at) = ([0], file.metadata().unwrap().len() / 2);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let fourth = with_base();
    let four = bake(&fourth, &[template(word, public, "four").path(), "--cache-from", cache]);
    assert_eq!(steps(&four), [("slow".into(), false), ("last".into(), false)], "{four}");
    assert!(says(&four, "warning", "is not taken from"), "{four}");
}

#[test]
fn sharing_needs_a_key_on_either_side() {
    let kiln = Kiln::fresh();
    let plain = Template::debian("shared-plain", "");
    kiln.run(&["bake", plain.path(), "--cache-from", "127.0.0.1:1/shop/cache"]).fails(2, &["trusts no key", "[cache] trusted"]);
    kiln.run(&["bake", plain.path(), "--cache-to", "127.0.0.1:1/shop/cache"]).fails(2, &["no key to sign with"]);
    kiln.run(&["bake", plain.path(), "--cache-to", "shop/cache:1"]).fails(2, &["names no repository", "HOST/NAMESPACE/NAME"]);
}
