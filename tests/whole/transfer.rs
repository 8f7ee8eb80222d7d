//! Images to a registry and back, as people move them.

use kiln_testing::{Proxy, Registry};

use crate::context::{Kiln, Template, new_word, tool};
use crate::store::disk;

#[test]
fn push_pull_copy_save_load() {
    let registry = Registry::builder().start().unwrap();
    let proxy = Proxy::before(registry.address()).unwrap();
    let (kiln, other) = (Kiln::fresh(), Kiln::fresh());
    kiln.ok(&["import", disk(&kiln, 1).to_str().unwrap(), "web:1.4.0"]);
    let image = kiln.ok(&["inspect", "--json", "web:1.4.0"]).json();
    let at = |name: &str| format!("{}/{name}", proxy.address());

    // Without a tag, the version is it; without an image, the one of that name.
    let pushed = kiln.ok(&["push", "--json", "web", &at("shop/web")]).json();
    assert_eq!((&pushed["digest"], &pushed["reference"]), (&image["digest"], &at("shop/web:1.4.0").into()));
    assert!(pushed["bytes_sent"].as_u64().unwrap() > 0);
    let again = kiln.ok(&["push", "--json", &at("shop/web:1.4.0")]).json();
    assert_eq!((again["existed"].as_bool(), again["sent"].as_u64()), (Some(true), Some(0)));
    // It was pushed, so it never changes, here and there.
    let changed = disk(&kiln, 2);
    kiln.run(&["import", changed.to_str().unwrap(), "web:1.4.0"]).fails(4, &["web:1.4.0 was pushed as sha256:"]);
    kiln.ok(&["import", changed.to_str().unwrap(), "web:1.5.0"]);
    kiln.run(&["push", "web:1.5.0", &at("shop/web:1.4.0")]).fails(4, &["never changes"]);
    kiln.run(&["push", "web:1.5.0", "shop/web"]).fails(2, &["nothing can be sent to `shop/web`"]);

    let pulled = other.ok(&["pull", "--json", &at("shop/web:1.4.0")]).json();
    assert_eq!(pulled["digest"], image["digest"]);
    assert_eq!(other.ok(&["inspect", "--json", "web:1.4.0"]).json()["disk_digest"], image["disk_digest"]);
    other.run(&["pull", &at("shop/web:9")]).fails(1, &["has no tag `9`", "it has 1.4.0"]);

    // Straight into files.
    for (name, format) in [("disk.raw", "raw"), ("disk.qcow2", "qcow2")] {
        let file = other.home.join(name);
        let wrote = other.ok(&["pull", "--json", &at("shop/web:1.4.0"), "--to", file.to_str().unwrap()]).json();
        assert_eq!((&wrote["disk_digest"], wrote["format"].as_str()), (&image["disk_digest"], Some(format)));
        let original = kiln.home.join("disk-1");
        tool("qemu-img", &["compare", "-f", format, "-F", "raw", file.to_str().unwrap(), original.to_str().unwrap()]);
        other.run(&["pull", &at("shop/web:1.4.0"), "--to", file.to_str().unwrap()]).fails(2, &["is there already"]);
    }

    // From registry to registry, and for KubeVirt.
    let second = Registry::builder().start().unwrap();
    let far = format!("{}/mirror/web:1.4.0", second.address());
    let copied = other.ok(&["copy", "--json", &at("shop/web:1.4.0"), &far]).json();
    assert_eq!(copied["digest"], image["digest"]);
    let there = format!("containerdisk://{}/shop/web-disk", proxy.address());
    let made = other.ok(&["copy", "--json", "web:1.4.0", &there]).json();
    assert_eq!((&made["image"], &made["reference"]), (&image["digest"], &at("shop/web-disk:1.4.0").into()));
    other.run(&["copy", "web:1.4.0", "web:2"]).fails(2, &["both are in the store"]);

    // In a file, for a machine without a network.
    let file = kiln.home.join("web.tar");
    kiln.ok(&["save", "web:1.4.0", "web:1.5.0", "-o", file.to_str().unwrap()]);
    let third = Kiln::fresh();
    let loaded = third.ok(&["load", "--json", file.to_str().unwrap()]).json();
    assert_eq!(loaded["images"].as_array().unwrap().len(), 2);
    assert_eq!(loaded["images"][0]["digest"], image["digest"]);
    third.run(&["load", disk(&third, 3).to_str().unwrap()]).fails(1, &["cannot be loaded"]);
    for kiln in [&kiln, &other, &third] {
        kiln.ok(&["verify"]);
        assert!(kiln.leftovers().is_empty(), "{:?}", kiln.leftovers());
    }
}

/// A registry with a proxy before it that counts, and the nginx template under
/// a name of its own.
struct Delta {
    proxy: Proxy,
    _registry: Registry,
    kiln: Kiln,
    template: Template,
    name: String,
}

impl Delta {
    fn new(name: &str) -> Self {
        let registry = Registry::builder().start().unwrap();
        let proxy = Proxy::before(registry.address()).unwrap();
        let nginx = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/templates/debian-nginx/kiln.toml")).unwrap();
        let name = format!("{name}-{}", new_word());
        let template = Template::new(&nginx.replace("name = \"debian-nginx\"", &format!("name = \"{name}\"")));
        let delta = Self { proxy, _registry: registry, kiln: Kiln::with_nginx(), template, name };
        delta.site("0");
        delta
    }

    /// Changes the page.
    fn site(&self, word: &str) {
        self.template.write("site/index.html", format!("<!doctype html><title>{word}</title><p>@GREETING@\n"));
    }

    /// Bakes it as `version`.
    fn bake(&self, version: &str, more: &[&str]) {
        let path = self.template.0.path().join("kiln.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<String> = text
            .lines()
            .map(|line| if line.starts_with("version = ") { format!("version = \"{version}\"") } else { line.to_owned() })
            .collect();
        std::fs::write(path, lines.join("\n")).unwrap();
        self.kiln.ok(&[&["bake", self.template.path()], more].concat());
    }

    /// Pushes a version; gives the bytes that reached the registry.
    fn push(&self, version: &str) -> f64 {
        self.proxy.forget();
        self.kiln.ok(&["push", &format!("{}:{version}", self.name), &format!("{}/shop/delta", self.proxy.address())]);
        self.proxy.total().sent as f64
    }

    /// Pulls a version; gives the bytes that the registry has sent.
    fn pull(&self, kiln: &Kiln, version: &str) -> f64 {
        self.proxy.forget();
        kiln.ok(&["pull", &format!("{}/shop/delta:{version}", self.proxy.address())]);
        self.proxy.total().received as f64
    }

    /// The base of what was baked, as an archive.
    fn base(&self, file: &std::path::Path) {
        let baked = self.kiln.ok(&["inspect", "--json", &self.name]).json();
        let images = self.kiln.ok(&["images", "--all", "--json"]).json();
        let is_base = |image: &&serde_json::Value| image["base"] == true && image["disk_digest"] == baked["base_digest"];
        let base = images.as_array().unwrap().iter().find(is_base).unwrap();
        self.kiln.ok(&["save", base["tags"][0].as_str().unwrap(), "-o", file.to_str().unwrap()]);
    }
}

/// The nginx image, then one with a file changed, then the same steps anew: what
/// moves, and what a machine fetches that has the base. `crates/store` shows the
/// same in seconds, with disks that are made up.
#[test]
#[ignore = "takes minutes; ci/prove runs it"]
fn an_image_moves_what_changed() {
    let delta = Delta::new("delta");
    delta.bake("1.0.0", &[]);
    delta.site("1");
    delta.bake("1.0.1", &[]);
    delta.bake("1.0.2", &["--no-cache"]);
    let (first, second, anew) = (delta.push("1.0.0"), delta.push("1.0.1"), delta.push("1.0.2"));
    eprintln!("pushed {first}; a file changed: {:.4} of that; without the cache: {:.4}", second / first, anew / first);
    assert!(second <= 0.04 * first, "{second} of {first}");
    assert!(anew <= 0.12 * first, "{anew} of {first}");

    let (empty, other) = (Kiln::fresh(), Kiln::fresh());
    let archive = other.home.join("base.tar");
    delta.base(&archive);
    other.ok(&["load", archive.to_str().unwrap()]);
    let (full, rest) = (delta.pull(&empty, "1.0.1"), delta.pull(&other, "1.0.1"));
    eprintln!("pulled {full}; with the base there: {:.4} of that", rest / full);
    assert!(rest <= 0.4 * full, "{rest} of {full}");
}
