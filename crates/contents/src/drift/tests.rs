use super::*;
use crate::manifest::tests::{file, folder, link};
use crate::manifest::{Unit, units};

fn manifest(nodes: &[(&str, Node)], packages: &[(&str, &str)]) -> Manifest {
    let nodes: BTreeMap<Vec<u8>, Node> = nodes.iter().map(|(path, node)| (path.as_bytes().to_vec(), node.clone())).collect();
    let installed = |(name, version): &(&str, &str)| Installed {
        kind: Kind::Deb,
        name: (*name).into(),
        arch: "amd64".into(),
        version: (*version).into(),
    };
    let units: BTreeMap<String, Unit> = units::read(&nodes);
    Manifest { nodes, packages: packages.iter().map(installed).collect(), units }
}

fn base() -> Vec<(&'static str, Node)> {
    vec![
        ("/bin", link("usr/bin")),
        ("/etc", folder()),
        ("/etc/machine-id", file("")),
        ("/etc/passwd", file("root")),
        ("/etc/motd", file("hello")),
        ("/etc/link", link("a")),
        ("/root", Node { mode: 0o700, ..folder() }),
        ("/srv", folder()),
        ("/usr/bin/sh", Node { attributes: Some(vec![(b"security.capability".to_vec(), vec![1])]), ..file("shell") }),
        ("/usr/lib/systemd/system/cron.service", file("unit")),
        ("/var/lib/app", folder()),
        ("/var/lib/app/data", file("data")),
        ("/var/lib/dpkg/status", file("status")),
        ("/var/log", folder()),
    ]
}

fn host(nodes: &[(&str, Node)], packages: &[(&str, &str)]) -> Host {
    Host { manifest: manifest(nodes, packages), root: true, attributes: true, ..Host::default() }
}

fn set(nodes: &mut Vec<(&'static str, Node)>, path: &'static str, node: Option<Node>) {
    nodes.retain(|(there, _)| *there != path);
    nodes.extend(node.map(|node| (path, node)));
}

fn found(drift: &Drift) -> Vec<(&str, Change, &[What])> {
    drift.files.iter().map(|file| (file.path.as_str(), file.change, file.what.as_slice())).collect()
}

#[test]
fn an_untouched_machine_has_not_drifted() {
    let image = manifest(&base(), &[("dash", "1")]);
    let mut nodes = base();
    // What a machine does by itself.
    set(&mut nodes, "/etc/machine-id", Some(file("0123")));
    set(&mut nodes, "/etc/hostname", Some(file("web-1")));
    set(&mut nodes, "/etc/ssh/ssh_host_ed25519_key", Some(Node { mode: 0o600, ..file("key") }));
    set(&mut nodes, "/root/.ssh", Some(Node { mode: 0o700, ..folder() }));
    set(&mut nodes, "/var/log/syslog", Some(file("line")));
    set(&mut nodes, "/etc/own", Some(file("ours")));
    let known = [("/etc/own", Digest::of("ours"))];
    let rules = Rules { known: &known, ..Rules::default() };
    let drift = compare(&image, &host(&nodes, &[("dash", "1")]), &rules);
    assert!(!drift.differs && drift.files.is_empty() && drift.own == 6, "{drift:#?}");
    assert_eq!(table(&drift, false), "nothing has changed since the bake\n");

    // With other bytes it is another file.
    set(&mut nodes, "/etc/own", Some(file("theirs")));
    // A key is no folder for keys, and the id's mode is none of its own.
    set(&mut nodes, "/root/.ssh/authorized_keys", Some(file("key")));
    set(&mut nodes, "/etc/machine-id", Some(Node { mode: 0o666, ..file("0123") }));
    let drift = compare(&image, &host(&nodes, &[("dash", "1")]), &rules);
    let expected: [(&str, Change, &[What]); 3] = [
        ("/etc/machine-id", Change::Changed, &[What::Mode]),
        ("/etc/own", Change::Added, &[]),
        ("/root/.ssh/authorized_keys", Change::Added, &[]),
    ];
    assert_eq!(found(&drift), expected);
}

#[test]
fn every_kind_of_difference() {
    let image = manifest(&base(), &[("dash", "1")]);
    let mut nodes = base();
    set(&mut nodes, "/etc/passwd", Some(file("evil")));
    set(&mut nodes, "/etc/motd", None);
    set(&mut nodes, "/etc/link", Some(link("b")));
    set(&mut nodes, "/usr/lib/systemd/system/cron.service", Some(link("/nowhere")));
    set(&mut nodes, "/usr/bin/sh", Some(Node { mode: 0o4755, uid: 7, ..file("shell") }));
    set(&mut nodes, "/srv", Some(file("")));
    set(&mut nodes, "/opt/\u{1b}[2J", Some(folder()));
    set(&mut nodes, "/opt/\u{1b}[2J/a", Some(file("a")));
    set(&mut nodes, "/var/lib/app/data", Some(file("other")));
    set(&mut nodes, "/var/lib/app/more", Some(file("more")));
    set(&mut nodes, "/etc/systemd/system/cron.service", Some(link("/dev/null")));
    let mutable = [Pattern::new("/var/lib/app").unwrap()];
    let machine = host(&nodes, &[("dash", "1")]);
    let drift = compare(&image, &machine, &Rules { mutable: &mutable, ..Rules::default() });
    let expected: [(&str, Change, &[What]); 9] = [
        ("/etc/link", Change::Changed, &[What::Target]),
        ("/etc/motd", Change::Removed, &[]),
        ("/etc/passwd", Change::Changed, &[What::Content]),
        ("/etc/systemd/system/cron.service", Change::Added, &[]),
        ("/opt/\\u{1b}[2J", Change::Added, &[]),
        ("/opt/\\u{1b}[2J/a", Change::Added, &[]),
        ("/srv", Change::Changed, &[What::Type, What::Mode]),
        ("/usr/bin/sh", Change::Changed, &[What::Mode, What::Owner, What::Attributes]),
        ("/usr/lib/systemd/system/cron.service", Change::Changed, &[What::Type]),
    ];
    assert_eq!(found(&drift), expected);
    assert_eq!((drift.mutable, drift.own, drift.differs), (2, 0, true));
    let units: Vec<_> = drift.units.iter().map(|unit| (unit.name.as_str(), unit.from.as_deref(), unit.to.as_deref())).collect();
    assert_eq!(units, [("cron.service", Some("present"), Some("masked"))]);
    let text = table(&drift, false);
    assert!(!text.contains('\u{1b}') && text.contains("/opt/\\u{1b}[2J  directory, mode 0755; 1 more inside"), "{text}");
    assert!(text.contains("/usr/bin/sh  mode 0644 → 4755; owner 0:0 → 7:0; security.capability 0x01 → none; of user 7"), "{text}");
    assert!(
        text.contains("5 changed, 3 added, 1 removed; 0 packages, 1 unit") && text.contains("2 paths that may change have changed"),
        "{text}"
    );
}

#[test]
fn what_belongs_to_a_changed_package_is_part_of_it() {
    let image = manifest(&base(), &[("dash", "1"), ("gone", "1"), ("old", "1")]);
    let mut nodes = base();
    set(&mut nodes, "/usr/bin/tool", Some(file("tool")));
    set(&mut nodes, "/etc/tool.conf", Some(file("conf")));
    set(&mut nodes, "/etc/motd", None);
    set(&mut nodes, "/var/lib/dpkg/status", Some(file("another")));
    set(&mut nodes, "/var/lib/dpkg/info/tool.list", Some(file("list")));
    set(&mut nodes, "/var/lib/dpkg/info/other.list", Some(file("list")));
    let mut machine = host(&nodes, &[("dash", "1"), ("old", "2"), ("tool", "1")]);
    let list = b"/var/lib/dpkg/info/tool:amd64.list:/bin\n/var/lib/dpkg/info/tool:amd64.list:/bin/tool\n";
    machine.lists(list);
    let by = "Start-Date: 2026-11-22  03:04:05\nCommandline: apt-get install tool\nRequested-By: eve (1000)\nInstall: tool:amd64 (1), more:all (2, automatic)\n\n";
    machine.logs(by, "2026-11-22 03:04:06 install tool:amd64 <none> 1\n2026-11-23 01:02:03 upgrade old:all 1 2\n");
    let removed = HashMap::from([(b"/etc/motd".to_vec(), "gone".to_owned())]);
    let drift = compare(&image, &machine, &Rules { removed, ..Rules::default() });
    let packages: Vec<_> = drift.packages.iter().map(|p| (p.name.as_str(), p.files, p.by.as_ref().map(|by| by.command.as_str()))).collect();
    assert_eq!(packages, [("gone", 1, None), ("old", 0, Some("dpkg (upgrade)")), ("tool", 2, Some("apt-get install tool"))]);
    let left: Vec<_> = drift.files.iter().filter(|file| !file.explained).map(|file| file.path.as_str()).collect();
    assert_eq!(left, ["/etc/tool.conf", "/var/lib/dpkg/info/other.list"]);
    let text = table(&drift, false);
    assert!(text.contains("+ tool 1  2 paths  by `apt-get install tool`, requested by eve (1000), 2026-11-22 03:04:05"), "{text}");
    assert!(text.contains("~ old 1 → 2") && !text.contains("/usr/bin/tool") && table(&drift, true).contains("/usr/bin/tool"), "{text}");

    // Without a change of a package its records are files like others.
    let same = host(&nodes, &[("dash", "1"), ("gone", "1"), ("old", "1")]);
    let drift = compare(&image, &same, &Rules::default());
    assert!(drift.packages.is_empty() && drift.files.iter().any(|file| file.path == "/var/lib/dpkg/status" && !file.explained));
}

#[test]
fn an_answer_is_read() {
    let mut answer = b"banner\n".to_vec();
    let mut section = |name: &str, bytes: &[u8]| answer.extend([format!("\0n0nce {name}\0").as_bytes(), bytes].concat());
    section("host", b"0\nweb-1\n1800000000\n");
    section("release", b"NAME=\"web\"\nVERSION=\"1.4\"\n");
    section("mounts", b"29 1 254:1 / / rw - ext4 /dev/vda1 rw\n30 29 0:1 / /mnt/a\\040b rw - tmpfs tmpfs rw\n");
    section("passwd", b"root:x:0:0::/root:/bin/sh\neve:x:1000:1000::/home/eve:/bin/sh\n");
    section("dpkg", b"Package: dash\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n");
    section("masks", b"cron.service\0");
    let node = |facts: &str, path: &[u8], target: &[u8]| [facts.as_bytes(), b"\0", path, b"\0", target, b"\0"].concat();
    let mut nodes = Vec::new();
    nodes.extend(node("d 755 0 0 4096 1.5 2.5", b"/", b""));
    nodes.extend(node("f 4644 1000 0 3 1700000000.123 1700000001.9", b"/etc/a\nb\\c", b""));
    nodes.extend(node("l 777 0 0 3 1 2", b"/bin", b"usr/bin"));
    nodes.extend(node("f 644 0 0 3 1 2", b"/tmp/x", b""));
    section("nodes", &nodes);
    section("closed", b"/root\0");
    section("digests", format!("\\{}  /etc/a\\nb\\\\c\n", Digest::of("abc").hex()).as_bytes());
    section("attributes", b"# file: /etc/a\\012b\\134c\nuser.note=0x6f6e65\nuser.empty\n\n");
    let cut = Host::of_answer(&answer, "n0nce", None).unwrap_err();
    assert_eq!(cut.kind(), kiln_model::Code::Infrastructure);
    let mut whole = answer.clone();
    whole.extend(b"\0n0nce end\0");
    let host = Host::of_answer(&whole, "n0nce", None).unwrap();
    assert_eq!((host.name.as_str(), host.root, host.release.clone()), ("web-1", true, Some(("web".into(), "1.4".into()))));
    assert!(host.mounts.contains(b"/mnt/a b".as_slice()) && host.masks == ["cron.service"] && host.closed == [b"/root".to_vec()]);
    let node = &host.manifest.nodes[b"/etc/a\nb\\c".as_slice()];
    assert_eq!((node.mode, node.uid, node.digest), (0o4644, 1000, Some(Digest::of("abc"))));
    assert_eq!(node.attributes, Some(vec![(b"user.note".to_vec(), b"one".to_vec())]));
    assert_eq!(host.manifest.nodes.len(), 2);
    assert_eq!(host.merged(b"/bin/sh"), b"/usr/bin/sh");
    assert_eq!(host.manifest.packages.len(), 1);

    let mut unfit = answer;
    unfit.extend(b"\0n0nce unfit\0GNU find\n");
    assert_eq!(Host::of_answer(&unfit, "n0nce", None).unwrap_err().kind(), kiln_model::Code::Missing);
}

#[test]
fn what_was_not_read_is_told_or_was_not_touched() {
    let image = manifest(&base(), &[]);
    let unread = || {
        let mut machine = host(&base(), &[]);
        for (path, node) in &mut machine.manifest.nodes {
            if path.starts_with(b"/etc/") {
                node.digest = None;
            }
            machine.times.insert(path.clone(), host::Times { content: 5, inode: 5 });
        }
        machine
    };
    let drift = compare(&image, &unread(), &Rules::default());
    assert_eq!((drift.differs, drift.unread.as_slice()), (false, ["/etc/motd".to_owned(), "/etc/passwd".to_owned()].as_slice()));
    assert!(drift.notes[0].contains("2 paths could not be read"), "{:?}", drift.notes);
    // Quickly: nobody has touched them since.
    let mut machine = unread();
    machine.since = Some(5);
    assert!(compare(&image, &machine, &Rules::default()).unread.is_empty());
    machine.since = Some(4);
    assert_eq!(compare(&image, &machine, &Rules::default()).unread.len(), 2);

    // A folder that may not be looked into hides, and removes nothing; a mount hides and says so.
    let mut nodes = base();
    set(&mut nodes, "/var/lib/app/data", None);
    let mut machine = host(&nodes, &[]);
    machine.closed.push(b"/var/lib/app".to_vec());
    let drift = compare(&image, &machine, &Rules::default());
    assert!(!drift.differs);
    assert_eq!(drift.unread, ["/var/lib/app", "/var/lib/app/data"]);
    // A closed one that the image does not have is new, and hides as well.
    let mut more = nodes.clone();
    set(&mut more, "/opt", Some(folder()));
    let mut other = host(&more, &[]);
    other.closed.push(b"/opt".to_vec());
    let drift = compare(&image, &other, &Rules::default());
    assert!(drift.files.iter().any(|file| file.path == "/opt" && file.change == Change::Added));
    assert_eq!(drift.unread, ["/opt"]);
    machine.closed.clear();
    machine.mounts = [b"/".to_vec(), b"/var/lib/app".to_vec()].into();
    let drift = compare(&image, &machine, &Rules::default());
    assert_eq!(drift.files[0].because.as_deref(), Some("hidden by what is mounted at /var/lib/app"));
    machine.masks.push("cron.service".into());
    let drift = compare(&image, &machine, &Rules::default());
    assert_eq!(drift.units[0].to.as_deref(), Some("masked until the next boot"));
}
