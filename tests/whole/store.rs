//! The store as people use it.

use crate::context::{Kiln, tool};

/// A raw disk with an MBR and some content.
pub fn disk(kiln: &Kiln, content: u8) -> std::path::PathBuf {
    let path = kiln.home.join(format!("disk-{content}"));
    let mut bytes = vec![0; 4 << 20];
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0]);
    bytes[1 << 20..2 << 20].fill(content);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn import_tag_inspect_untag_prune() {
    let kiln = Kiln::fresh();
    assert!(kiln.ok(&["images"]).stdout.contains("no images yet"));
    let (one, two) = (disk(&kiln, 1), disk(&kiln, 2));
    kiln.ok(&["import", one.to_str().unwrap(), "web:1", "--label", "team=shop"]);
    kiln.ok(&["import", two.to_str().unwrap(), "web:2"]);
    kiln.ok(&["tag", "web:1", "web:stable"]);

    let images = kiln.ok(&["images", "--json"]).json();
    assert_eq!(images.as_array().unwrap().len(), 2);
    let (first, stable) = (kiln.ok(&["inspect", "--json", "web:1"]).json(), kiln.ok(&["inspect", "--json", "web:stable"]).json());
    assert_eq!(first["digest"], stable["digest"]);
    assert_eq!(first["labels"]["team"], "shop");
    assert_eq!(kiln.ok(&["inspect", "--json", "web"]).json()["version"], "2", "a bare name is the newest");
    kiln.run(&["inspect", "web:3"]).fails(1, &["no version `3`"]);
    kiln.run(&["inspect", "wob"]).fails(1, &["did you mean `web`?"]);
    kiln.run(&["tag", "web:1", "web@production"]).fails(2, &[]);

    // A moved version says so.
    kiln.ok(&["import", two.to_str().unwrap(), "web:1"]);
    assert!(kiln.ok(&["tag", "web:2", "web:stable"]).stdout.contains("was sha256:"));

    kiln.ok(&["untag", "web:1"]);
    kiln.ok(&["untag", "web:2"]);
    kiln.ok(&["untag", "web:stable"]);
    let freed = kiln.ok(&["prune", "--json"]).json();
    assert!(freed["blobs"].as_u64().unwrap() >= 4, "{freed}");
    assert_eq!(std::fs::read_dir(kiln.store().join("blobs/sha256")).unwrap().count(), 0);
}

#[test]
fn prune_evicts_over_the_budget_and_with_cache_all_that_nobody_uses() {
    use kiln_model::checkpoint::{CheckpointCache as _, KeptFile, Written};
    use kiln_model::{home::Home, key::KeyHasher};

    let kiln = Kiln::fresh();
    let cache = kiln_cache::Checkpoints::open(&Home::open(Some(kiln.home.clone())).unwrap(), Some(1 << 40)).unwrap();
    let [idle, used] = ["idle", "used"].map(|name| {
        let key = KeyHasher::new(name).finish();
        let slot = cache.slot(&key, None, 1 << 20).unwrap().unwrap();
        std::fs::write(slot.folder.join("disk"), vec![1; 1 << 20]).unwrap();
        let file = KeptFile { name: "disk".into(), length: 0, digest: String::new() };
        cache.commit(slot, &Written { files: vec![file], ..Written::default() }, std::time::Duration::from_secs(42)).unwrap();
        key
    });
    std::fs::create_dir_all(kiln.home.join("cache/downloads")).unwrap();
    std::fs::write(kiln.home.join("cache/downloads/sha256-ab.cd.part"), vec![1; 5000]).unwrap();
    let freed = |arguments: &[&str]| {
        let value = kiln.ok(&[&["prune", "--json"], arguments].concat()).json();
        (value["cache"]["checkpoints"]["count"].as_u64().unwrap(), value["cache"]["downloads"].as_u64().unwrap() > 0, value)
    };

    assert_eq!(freed(&["--dry-run"]).0, 0, "the budget has room");
    let config = kiln.home.join("config");
    std::fs::create_dir_all(config.join("kiln")).unwrap();
    std::fs::write(config.join("kiln/config.toml"), "[cache]\nbudget = \"1500KiB\"\n").unwrap();
    let small = kiln.command(&["prune", "--dry-run"]).env("XDG_CONFIG_HOME", &config).output().unwrap();
    assert!(String::from_utf8_lossy(&small.stdout).contains("1  checkpoints"), "{small:?}");

    let in_use = cache.find(&used, None, &|warning| panic!("{warning}")).unwrap().unwrap();
    let (count, parts, all) = freed(&["--cache", "--dry-run"]);
    assert_eq!((count, parts), (1, true), "{all}");
    let listed = all["checkpoints"].as_array().unwrap();
    assert_eq!((listed.len(), &listed[0]["in_use"], &listed[1]["in_use"]), (2, &true.into(), &false.into()), "{all}");
    assert_eq!((&listed[1]["step"], &listed[1]["worth_seconds"]), (&idle.to_string().into(), &42.0.into()), "{all}");
    assert!(listed[1]["frees"].as_u64().unwrap() >= 1 << 20, "{all}");
    let text = kiln.ok(&["prune", "--cache", "--dry-run"]).stdout;
    assert!(text.contains("CHECKPOINT") && text.contains(&idle.short()) && text.contains("would free 1.0 MiB"), "{text}");

    let (count, parts, all) = freed(&["--cache"]);
    assert_eq!((count, parts, &all["checkpoints"]), (1, true, &serde_json::Value::Null), "{all}");
    assert!(cache.peek(&idle).unwrap().is_none() && cache.peek(&used).unwrap().is_some());
    drop(in_use);
    assert_eq!(freed(&["--cache"]).0, 1);
    assert_eq!(freed(&["--cache"]).0, 0);
}

#[test]
fn verify_names_a_flipped_byte_and_the_images_it_breaks() {
    let kiln = Kiln::fresh();
    kiln.ok(&["import", disk(&kiln, 7).to_str().unwrap(), "web:1"]);
    kiln.ok(&["verify"]);
    let digest = kiln.ok(&["inspect", "--json", "web:1"]).json()["digest"].as_str().unwrap().replace("sha256:", "");
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(kiln.store().join("blobs/sha256").join(digest)).unwrap()).unwrap();
    let pack = manifest["layers"][1]["digest"].as_str().unwrap();
    let path = kiln.store().join("blobs/sha256").join(pack.replace("sha256:", ""));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    kiln.run(&["verify"]).fails(1, &[pack, "web:1"]);
    let out = kiln.home.join("out.raw");
    kiln.run(&["export", "web:1", "-f", "raw", "-o", out.to_str().unwrap()]).fails(1, &[]);
    assert!(!out.exists(), "a damaged export stays");
}

#[test]
fn a_full_disk_is_said_and_leaves_the_store_whole() {
    let kiln = Kiln::fresh();
    kiln.ok(&["import", disk(&kiln, 1).to_str().unwrap(), "small:1"]);
    let big = kiln.home.join("big");
    tool(
        "sh",
        &[
            "-c",
            &format!(
                "head -c 64M /dev/urandom > {0}; printf '\\125\\252' | dd of={0} bs=1 seek=510 conv=notrunc status=none; printf '\\200\\0\\2\\0\\203\\0\\0\\0\\1\\0\\0\\0\\0\\20\\0\\0' | dd of={0} bs=1 seek=446 conv=notrunc status=none",
                big.display()
            ),
        ],
    );
    // A file system of 24 MiB in a mount namespace, which any user may have.
    let script = format!(
        "set -e; mount -t tmpfs -o size=24m none /mnt; cp -a {home}/store /mnt/store; \
         KILN_HOME=/mnt {kiln} import {big} big:1 && exit 90; status=$?; \
         KILN_HOME=/mnt {kiln} verify && KILN_HOME=/mnt {kiln} images; exit $status",
        home = kiln.home.display(),
        kiln = env!("CARGO_BIN_EXE_kiln"),
        big = big.display()
    );
    let output = std::process::Command::new("unshare").args(["-rm", "sh", "-c", &script]).env("NO_COLOR", "1").output().unwrap();
    let ran = crate::context::Ran::of(output, &["import (full disk)"]);
    ran.fails(75, &["next:", "free some space"]);
    assert!(ran.stdout.contains("all sound") && ran.stdout.contains("small") && !ran.stdout.contains("big"), "{ran}");
}
