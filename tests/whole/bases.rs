//! Bases that cannot be used, and bases from elsewhere.

use crate::context::{Kiln, Ran, Template, tool};

fn bake_file(kiln: &Kiln, make: impl FnOnce(&std::path::Path)) -> Ran {
    let template = Template::new("[image]\nname = \"x\"\nversion = \"1\"\n[base]\nfile = \"disk\"\n[[provision]]\nshell = 'true'\n");
    make(&template.0.path().join("disk"));
    let ran = kiln.run(&["bake", template.path(), "--no-cache"]);
    assert!(kiln.leftovers().is_empty(), "{:?}", kiln.leftovers());
    assert_eq!(kiln.ok(&["images", "--json", "--all"]).json().as_array().unwrap().len(), 0);
    ran
}

#[test]
fn what_is_no_disk_is_refused_with_its_reason() {
    let kiln = Kiln::fresh();
    bake_file(&kiln, |path| std::fs::write(path, "<html>404</html>").unwrap()).fails(1, &["not a disk"]);
    bake_file(&kiln, |path| std::fs::write(path, "").unwrap()).fails(1, &["disk"]);
    bake_file(&kiln, |path| std::fs::write(path, b"\xfd7zXZ\0rest of it").unwrap()).fails(1, &["xz"]);

    let qcow2 = |path: &std::path::Path| {
        let raw = path.with_extension("raw");
        std::fs::write(&raw, vec![7; 4 << 20]).unwrap();
        tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]);
    };
    bake_file(&kiln, |path| {
        qcow2(path);
        let length = std::fs::metadata(path).unwrap().len();
        std::fs::File::options().write(true).open(path).unwrap().set_len(length / 2).unwrap();
    })
    .fails(1, &["next:"]);
    bake_file(&kiln, |path| {
        qcow2(path);
        // The first entry of the L1 table, which the header's bytes 40 to 47 point to.
        let mut bytes = std::fs::read(path).unwrap();
        let table = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
        bytes[table + 5] ^= 0x55;
        std::fs::write(path, bytes).unwrap();
    })
    .fails(1, &["damaged"]);
}

#[test]
fn a_qcow2_that_reads_other_files_is_refused() {
    let kiln = Kiln::fresh();
    bake_file(&kiln, |path| {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", path.to_str().unwrap(), "1G"]);
    })
    .fails(1, &["backing file"]);
    bake_file(&kiln, |path| {
        let data = path.with_extension("data");
        let option = format!("data_file={}", data.display());
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, path.to_str().unwrap(), "1M"]);
    })
    .fails(1, &["data file"]);
}

#[test]
fn a_download_that_is_not_what_its_checksum_says_keeps_nothing() {
    let kiln = Kiln::fresh();
    let template = Template::new("");
    let disk = template.write("disk.img", vec![3; 1 << 20]);
    let actual = &tool("sha256sum", &[disk.to_str().unwrap()])[..64];
    let wrong = "ab".repeat(32);
    template.write(
        "kiln.toml",
        format!(
            "[image]\nname = \"x\"\nversion = \"1\"\n[base]\nurl = \"file://{}\"\nchecksum = \"sha256:{wrong}\"\n[[provision]]\nshell = 'true'\n",
            disk.display()
        ),
    );
    kiln.run(&["bake", template.path()]).fails(1, &[actual, &wrong]);
    let kept: Vec<_> =
        tool("find", &[kiln.home.join("cache").to_str().unwrap(), "-type", "f", "-size", "+100k"]).lines().map(String::from).collect();
    assert!(kept.is_empty(), "{kept:?}");
    assert!(kiln.leftovers().is_empty());
}

#[test]
fn a_disk_that_does_not_boot_shows_its_console_and_a_screenshot() {
    let kiln = Kiln::fresh();
    let template = Template::new(
        "[image]\nname = \"x\"\nversion = \"1\"\n[base]\nfile = \"disk\"\n[builder.qemu]\nboot_timeout = \"25s\"\naccelerator = \"tcg\"\n\
         [[provision]]\nshell = 'true'\n",
    );
    let mut bytes = vec![0; 4 << 20];
    // A boot sector that writes to the serial port and stops.
    let code: &[u8] =
        &[0xba, 0xf8, 0x03, 0xb0, b'O', 0xee, 0xb0, b'O', 0xee, 0xb0, b'P', 0xee, 0xb0, b'S', 0xee, 0xb0, b'\n', 0xee, 0xf4, 0xeb, 0xfd];
    bytes[..code.len()].copy_from_slice(code);
    bytes[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0]);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    template.write("disk", bytes);
    let ran = kiln.run(&["bake", template.path(), "--no-cache"]);
    ran.fails(1, &["OOPS", ".png"]);
    let at = ran.stderr.find(".png").unwrap() + 4;
    let path = ran.stderr[..at].rsplit([' ', '\n']).next().unwrap();
    assert_eq!(&std::fs::read(path).unwrap()[1..4], b"PNG");
    assert!(kiln.leftovers().is_empty() && kiln.processes().is_empty());
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn a_disk_from_elsewhere_is_reached_through_its_cloud_init() {
    // The exported image is, without kiln's knowledge of it, any cloud image.
    let kiln = Kiln::with_nginx();
    let template = Template::new(
        "[image]\nname = \"from-file\"\nversion = \"1\"\n[base]\nfile = \"disk.qcow2\"\n[disk]\nsize = \"5GiB\"\n\
         [[provision]]\nshell = 'systemctl is-system-running --wait; df -B1 --output=size / | tail -1 | (read size; test \"$size\" -gt 4800000000)'\n",
    );
    kiln.ok(&["export", "debian-nginx", "-o", template.0.path().join("disk.qcow2").to_str().unwrap()]);
    kiln.ok(&["bake", template.path(), "--no-cache"]);
    kiln.ok(&["untag", "from-file:1"]);
}
