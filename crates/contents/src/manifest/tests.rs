use super::*;

pub(crate) fn file(text: &str) -> Node {
    Node {
        kind: NodeKind::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        size: text.len() as u64,
        digest: Some(Digest::of(text)),
        target: Vec::new(),
        attributes: Some(Vec::new()),
    }
}

pub(crate) fn link(target: &str) -> Node {
    Node { kind: NodeKind::Link, mode: 0o777, size: 0, digest: None, target: target.as_bytes().to_vec(), ..file("") }
}

pub(crate) fn folder() -> Node {
    Node { kind: NodeKind::Directory, mode: 0o755, digest: None, ..file("") }
}

fn sample() -> Manifest {
    let mut nodes = BTreeMap::new();
    let mut add = |path: &[u8], node: Node| drop(nodes.insert(path.to_vec(), node));
    add(b"/etc", folder());
    add(b"/etc/passwd", Node { mode: 0o4755, uid: 7, gid: 70000, ..file("root") });
    add(b"/etc/two\nlines\t\\x41\xff", Node { attributes: None, ..file("x") });
    add(b"/usr/lib/large", Node { attributes: Some(vec![(b"security.capability".to_vec(), vec![1, 0, 2])]), ..file("y") });
    add(b"/usr/share/doc/a", file(""));
    add(b"/usr/bin/sh", link("da\tsh"));
    add(b"/usr/lib/systemd/system/nginx.service", file("unit"));
    add(b"/usr/lib/systemd/system/ssh.service", file("unit"));
    add(b"/usr/lib/systemd/system/cron.service", file("unit"));
    add(b"/etc/systemd/system/multi-user.target.wants", folder());
    add(b"/etc/systemd/system/multi-user.target.wants/nginx.service", link("/lib/systemd/system/nginx.service"));
    add(b"/etc/systemd/system/cron.service", link("/dev/null"));
    add(b"/etc/systemd/system/ssh.service.d/own.conf", file("drop-in"));
    add(b"/var/lib/dpkg/status", file("status"));
    add(b"/var/spool", folder());
    add(b"/boot/vmlinuz", file("kernel"));
    let units = units::read(&nodes);
    let installed =
        |name: &str, version: &str| Installed { kind: Kind::Deb, name: name.into(), arch: "amd64".into(), version: version.into() };
    Manifest { nodes, packages: vec![installed("dash", "0.5"), installed("nginx", "1:1.22~rc1")], units }
}

#[test]
fn a_manifest_is_the_same_after_a_way_through_its_layers() {
    let sample = sample();
    let parts = sample.parts().unwrap();
    let names: Vec<_> = parts.iter().filter_map(|part| part.name).collect();
    assert_eq!(names, ["etc", "rest", "usr", "usr-lib", "usr-share", "var", "var-lib"]);
    assert_eq!(parts, sample.parts().unwrap(), "the same bytes");
    let again = Manifest::of_parts(parts.iter().map(|part| (part.media_type, part.bytes.as_slice()))).unwrap();
    assert_eq!(again, sample);
}

#[test]
fn one_changed_file_changes_one_layer() {
    let (one, mut other) = (sample(), sample());
    other.nodes.insert(b"/etc/passwd".to_vec(), file("other"));
    let differ = one.parts().unwrap().into_iter().zip(other.parts().unwrap()).filter(|(a, b)| a != b);
    assert_eq!(differ.map(|(part, _)| part.name).collect::<Vec<_>>(), [Some("etc")]);
}

#[test]
fn damage_is_told() {
    let pack = |text: &[u8]| zstd::bulk::compress(text, 1).unwrap();
    let read = |media_type: &str, bytes: &[u8]| Manifest::of_parts([(media_type, bytes)].into_iter()).map(|_| ()).unwrap_err().kind();
    for text in [
        b"".as_slice(),
        b"f\t644\t0\t0\t1\t\t\n",
        b"x\t644\t0\t0\t1\t\t\t/a\n",
        b"f\t99\t0\t0\t1\t\t\t/a\n",
        b"f\t644\t0\t0\t1\tabc\t\t/a\n",
        b"f\t644\t0\t0\t1\t\t\ta\n",
        b"f\t644\t0\t0\t1\t\t\t/a\\x0\n",
        b"f\t644\t0\t0\t1\t\tzz\t/a\n",
    ] {
        assert_eq!(read(FILES, &pack(text)), Code::Corrupt, "{}", text.escape_ascii());
    }
    assert!(Manifest::of_parts([(FILES, b"no zstd".as_slice())].into_iter()).is_err());
    assert_eq!(read(PACKAGES, &pack(b"pip\ta\tb\tc\n")), Code::Corrupt);
    assert_eq!(read(UNITS, &pack(b"a.service\tperhaps\t\t\n")), Code::Corrupt);
}

#[test]
fn units_are_what_the_files_say() {
    let units = sample().units;
    let words: Vec<_> = units.iter().map(|(name, unit)| (name.as_str(), unit.words())).collect();
    assert_eq!(
        words,
        [
            ("cron.service", "masked".to_owned()),
            ("nginx.service", "enabled by multi-user.target".to_owned()),
            ("ssh.service", "present, with own.conf".to_owned()),
        ]
    );
}

#[test]
fn what_is_volatile_is_below_it() {
    for (path, expected) in
        [("/tmp", false), ("/tmp/x", true), ("/tmpx/y", false), ("/var/tmp/a", true), ("/var/tmpa", false), ("/dev/null", true)]
    {
        assert_eq!(is_volatile(path.as_bytes()), expected, "{path}");
    }
}
