//! The main job: an image that was baked, and what it has to stand.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::context::{Kiln, Template, tool, wait_until};

/// The independent script of docs/image-format.md.
const DISK_DIGEST: &str = r#"
import hashlib, os, sys
path, block = sys.argv[1], 524288
size = os.path.getsize(path)
whole = hashlib.sha256(b"kiln-disk-v1 %d %d\n" % (size, block))
with open(path, "rb") as disk:
    while data := disk.read(block):
        whole.update(hashlib.sha256(data.ljust(block, b"\0")).digest())
print("sha256:" + whole.hexdigest())
"#;

#[test]
fn the_disk_digest_is_what_an_independent_script_computes() {
    let kiln = Kiln::with_nginx();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let raw = folder.path().join("disk.raw");
    kiln.ok(&["export", "debian-nginx", "--format", "raw", "-o", raw.to_str().unwrap()]);
    let inspected = kiln.ok(&["inspect", "--json", "debian-nginx"]).json();
    let computed = tool("python3", &["-c", DISK_DIGEST, raw.to_str().unwrap()]);
    assert_eq!(inspected["disk_digest"], computed.trim());

    // Every other format holds the same bytes.
    for format in ["qcow2", "vmdk", "vhdx", "vdi"] {
        let file = folder.path().join(format);
        kiln.ok(&["export", "debian-nginx", "--format", format, "-o", file.to_str().unwrap()]);
        tool("qemu-img", &["compare", "-f", "raw", "-F", format, raw.to_str().unwrap(), file.to_str().unwrap()]);
        std::fs::remove_file(file).unwrap();
    }
    kiln.run(&["export", "debian-nginx", "-f", "raw", "-o", raw.to_str().unwrap()]).fails(2, &["is there already", "--force"]);

    // The sealed file system was left clean.
    let root = folder.path().join("root.ext4");
    let table: serde_json::Value = serde_json::from_str(&tool("sfdisk", &["--json", raw.to_str().unwrap()])).unwrap();
    let start = table["partitiontable"]["partitions"].as_array().unwrap().last().unwrap()["start"].as_u64().unwrap();
    let (from, to, skip) = (format!("if={}", raw.display()), format!("of={}", root.display()), format!("skip={}", start * 512));
    tool("dd", &[&from, &to, &skip, "iflag=skip_bytes", "bs=1M", "conv=sparse", "status=none"]);
    let features = tool("dumpe2fs", &["-h", root.to_str().unwrap()]);
    assert!(!features.contains("needs_recovery"), "{features}");
}

#[test]
fn run_boots_it_and_carries_the_exit_status() {
    let kiln = Kiln::with_nginx();
    let command = "curl -fsS http://localhost && echo out; echo err >&2; cat /etc/kiln-release; exit 7";
    let run = kiln.run(&["run", "debian-nginx", "--exec", command]);
    assert_eq!(run.status, 7, "{run}");
    assert!(run.stdout.contains("Hello from a golden image") && run.stdout.contains("out\n"), "{run}");
    assert!(run.stdout.contains("NAME=\"debian-nginx\"\nVERSION=\"1.0.0\"\n"), "{run}");
    assert!(run.stderr.contains("err"), "{run}");
    kiln.run(&["run", "no-such-image", "--exec", "true"]).fails(125, &["no image `no-such-image`"]);
    kiln.run(&["run", "debian-nginx", "--accelerator", "warp", "--exec", "true"]).fails(125, &["accelerator"]);
}

#[test]
fn skopeo_takes_it_from_the_store_as_it_stands() {
    let kiln = Kiln::with_nginx();
    let digest = kiln.ok(&["inspect", "--json", "debian-nginx"]).json()["digest"].as_str().unwrap().to_owned();
    for name in ["debian-nginx", "debian-nginx:1.0.0"] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let target = format!("dir:{}", folder.path().display());
        tool("skopeo", &["copy", "-q", &format!("oci:{}:{name}", kiln.store().display()), &target]);
        let manifest = tool("sha256sum", &[folder.path().join("manifest.json").to_str().unwrap()]);
        assert_eq!(format!("sha256:{}", &manifest[..64]), digest);
    }
    kiln.ok(&["verify"]);
}

/// A plain QEMU, without kiln.
struct Plain {
    child: Child,
    port: u16,
}

impl Plain {
    fn start(disk: &Path, uefi: bool, folder: &Path) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ssh = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1024", "-display", "none", "-snapshot"]);
        command.arg("-drive").arg(format!("file={},if=virtio,format=qcow2", disk.display()));
        command.arg("-nic").arg(format!("user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{port}-:80,hostfwd=tcp:127.0.0.1:{ssh}-:22"));
        command.arg("-serial").arg(format!("file:{}", folder.join("serial").display()));
        if uefi {
            let vars = folder.join("vars.fd");
            std::fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", &vars).unwrap();
            command.args(["-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"]);
            command.arg("-drive").arg(format!("if=pflash,format=raw,file={}", vars.display()));
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let plain = Self { child, port };
        plain.wait();
        plain.host_keys(ssh, folder);
        plain
    }

    fn page(&self) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let lines: Vec<String> = BufReader::new(stream).lines().map_while(Result::ok).collect();
        Some(lines.join("\n"))
    }

    fn wait(&self) {
        wait_until(Duration::from_secs(400), || self.page().is_some_and(|page| page.contains("Hello from a golden image")));
    }

    fn host_keys(&self, ssh: u16, folder: &Path) {
        let port = ssh.to_string();
        let scan = || Command::new("ssh-keyscan").args(["-T", "20", "-t", "ed25519", "-p", &port, "127.0.0.1"]).output().unwrap().stdout;
        wait_until(Duration::from_secs(200), || !scan().is_empty());
        std::fs::write(folder.join("host-key"), scan()).unwrap();
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn the_exported_qcow2_boots_under_plain_qemu_and_clones_differ() {
    let kiln = Kiln::with_nginx();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = folder.path().join("disk.qcow2");
    kiln.ok(&["export", "debian-nginx", "-o", disk.to_str().unwrap()]);
    let mut keys = Vec::new();
    for (name, uefi) in [("seabios", false), ("ovmf", true)] {
        let folder = folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        drop(Plain::start(&disk, uefi, &folder));
        let key = std::fs::read_to_string(folder.join("host-key")).unwrap();
        keys.push(key.split_whitespace().last().unwrap().to_owned());
    }
    // Without a cloud-init datasource, each clone made host keys of its own.
    assert_ne!(keys[0], keys[1]);
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn clones_with_a_datasource_differ_in_machine_id_and_host_keys() {
    let kiln = Kiln::with_nginx();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let user_data = folder.path().join("user-data");
    std::fs::write(&user_data, "#cloud-config\nhostname: clone\nwrite_files:\n- path: /etc/from-user-data\n  content: yes it is\n")
        .unwrap();
    let look = "cloud-init status --wait >/dev/null; cat /etc/machine-id /etc/from-user-data; echo; cat /etc/ssh/ssh_host_ed25519_key.pub";
    let clone = || {
        let run = kiln.ok(&["run", "debian-nginx", "--user-data", user_data.to_str().unwrap(), "--exec", look]);
        let lines: Vec<String> = run.stdout.lines().map(Into::into).collect();
        assert_eq!(lines[0].len(), 32, "{run}");
        assert!(run.stdout.contains("yes it is") && run.stdout.contains("ssh-ed25519 "), "{run}");
        lines
    };
    let (one, two) = (clone(), clone());
    assert_ne!(one[0], two[0], "machine-id");
    assert_ne!(one.last(), two.last(), "host key");
}

#[test]
fn a_bake_on_a_bake_stores_only_what_differs() {
    let kiln = Kiln::with_nginx();
    let template = Template::new(
        "[image]\nname = \"on-top\"\nversion = \"1\"\n[base]\nimage = \"debian-nginx:1.0.0\"\n\
         [[provision]]\nshell = 'echo on top > /var/www/html/top.txt; cat /etc/kiln-release'\n",
    );
    let baked = kiln.ok(&["bake", template.path(), "--no-cache", "--json"]);
    let events = baked.events();
    let done = events.last().unwrap();
    assert_eq!((&done["event"], &done["ok"], &done["v"]), (&"done".into(), &true.into(), &1.into()), "{baked}");
    let image = events.iter().find(|event| event["event"] == "baked").unwrap();
    for key in ["name", "version", "arch", "digest", "disk_digest", "steps", "artifacts", "seconds"] {
        assert!(!image[key].is_null(), "{key}: {image}");
    }
    let (own, base) = (kiln.ok(&["inspect", "--json", "on-top"]).json(), kiln.ok(&["inspect", "--json", "debian-nginx"]).json());
    assert_eq!(own["base_digest"], base["disk_digest"]);
    // The packs of the base are listed again, not stored again.
    let layers = |name: &str| -> Vec<String> {
        let digest = kiln.ok(&["inspect", "--json", name]).json()["digest"].as_str().unwrap().replace("sha256:", "");
        let manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(kiln.store().join("blobs/sha256").join(digest)).unwrap()).unwrap();
        manifest["layers"].as_array().unwrap().iter().skip(1).map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
    };
    let (own, base) = (layers("on-top"), layers("debian-nginx"));
    assert!(own.iter().filter(|layer| base.contains(layer)).count() >= 2, "{own:?} {base:?}");
    let new = own.iter().filter(|layer| !base.contains(layer)).count();
    assert!(new <= 2, "{new} new packs for one small file");
}
