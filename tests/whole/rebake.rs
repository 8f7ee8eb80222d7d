//! Baking images again from their provenance, and how old images are.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::context::{Kiln, Ran, Template, tool, with_base};

/// Every file of the store, with its size: what must be as it was.
fn store(kiln: &Kiln) -> (String, BTreeMap<PathBuf, u64>) {
    let index = std::fs::read_to_string(kiln.store().join("index.json")).unwrap();
    let blobs = std::fs::read_dir(kiln.store().join("blobs/sha256")).unwrap();
    (index, blobs.map(|entry| entry.unwrap()).map(|entry| (entry.path(), entry.metadata().unwrap().len())).collect())
}

fn rebake_in(kiln: &Kiln, folder: &Path, arguments: &[&str]) -> Ran {
    let arguments = [&["rebake"], arguments].concat();
    Ran::of(kiln.command(&arguments).current_dir(folder).output().unwrap(), &arguments)
}

/// The files that do not reproduce, and the step of each.
fn differing(answer: &Value) -> Vec<(String, String)> {
    let origin = |file: &Value| match file["origin"]["kind"].as_str() {
        Some("step") => file["origin"]["name"].as_str().unwrap().to_owned(),
        kind => format!("({})", kind.unwrap()),
    };
    let files = answer["files"].as_array().unwrap().iter();
    files.map(|file| (file["path"].as_str().unwrap().to_owned(), origin(file))).collect()
}

#[test]
fn what_does_not_reproduce_is_named_with_its_step() {
    let kiln = with_base();
    let template = Template::debian(
        "rebaked",
        "[variables]\nword = \"hello\"\n\
         [[provision]]\nname = \"motd\"\nfile = { source = \"motd\", destination = \"/etc/motd\" }\n\
         [[provision]]\nname = \"time\"\nenv = { WORD = \"{{ var.word }}\" }\nshell = '''\n\
         date +%s%N > /etc/baked-at\nmkdir /srv/own\necho \"$WORD\" > /srv/own/word\ntouch \"/srv/own/$(date +%N)\"\n'''\n\
         [[provision]]\nname = \"after\"\nshell = 'echo after >> /srv/own/word'\n",
    );
    let folder = template.0.path();
    template.write("motd", "one\n");
    let git = |arguments: &[&str]| {
        tool("git", &[&["-C", template.path(), "-c", "user.name=x", "-c", "user.email=x@example.org"], arguments].concat())
    };
    git(&["init", "-q"]);
    git(&["add", "."]);
    git(&["commit", "-qm", "one"]);
    let commit = git(&["rev-parse", "HEAD"]).trim().to_owned();
    kiln.ok(&["bake", template.path(), "--var", "word=goodbye"]);
    let image = kiln.ok(&["inspect", "--json", "rebaked:1"]).json();

    // The commit counts, and not what lies in the folder by now; the variable is
    // what it was.
    template.write("motd", "two\n");
    let before = store(&kiln);
    let page = folder.join("page.html");
    let ran = rebake_in(&kiln, folder, &["rebaked:1", "--json", "--html", page.to_str().unwrap()]);
    assert_eq!(ran.status, 3, "{ran}");
    let answer = ran.json();
    assert_eq!(answer["reproduces"], false, "{ran}");
    assert_eq!((&answer["source"]["kind"], &answer["source"]["commit"]), (&"commit".into(), &commit.as_str().into()), "{ran}");
    assert_eq!(answer["base"]["same"], true, "{ran}");
    let files = differing(&answer);
    // Each bake makes a file of another name in the folder.
    assert_eq!(files.len(), 3, "{files:?}");
    assert_eq!(files[0], ("/etc/baked-at".into(), "time".into()), "{files:?}");
    for (path, step) in &files[1..] {
        assert!(path.starts_with("/srv/own/") && path != "/srv/own/word", "{files:?}");
        assert!(["time", "after"].contains(&step.as_str()), "{files:?}");
    }
    let steps = answer["steps"].as_array().unwrap();
    assert!(steps.iter().all(|step| step["same_key"] == true && step["touched"].as_u64().unwrap() > 0), "{ran}");
    assert_eq!((&steps[0]["differ"], &steps[0]["name"]), (&0.into(), &"motd".into()), "{ran}");
    assert!(std::fs::read_to_string(&page).unwrap().contains("/etc/baked-at comes from time"));

    // Nothing has moved, and nothing is left.
    assert_eq!(store(&kiln), before);
    assert_eq!(kiln.ok(&["inspect", "--json", "rebaked:1"]).json(), image);
    assert!(kiln.leftovers().is_empty() && kiln.processes().is_empty(), "{:?}", kiln.leftovers());
    assert_eq!(git(&["status", "--porcelain"]), " M motd\n?? page.html\n");

    // Interrupted in the middle it leaves nothing either.
    let mut child = kiln.command(&["rebake", "rebaked:1", "--boot"]).current_dir(folder).spawn().unwrap();
    crate::context::wait_until(std::time::Duration::from_secs(120), || !kiln.processes().is_empty());
    tool("kill", &["-INT", &child.id().to_string()]);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(store(&kiln), before);
    assert!(kiln.leftovers().is_empty() && kiln.processes().is_empty(), "{:?}", kiln.leftovers());
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn what_reproduces_does_so_from_a_folder_that_is_as_it_was() {
    let kiln = with_base();
    let template = Template::debian(
        "reproducible",
        "[variables]\nword = { env = \"WORD_OF_TEST\" }\n\
         [[provision]]\nname = \"motd\"\nfile = { source = \"motd\", destination = \"/etc/motd\" }\n\
         [[provision]]\nname = \"word\"\nenv = { WORD = \"{{ var.word }}\" }\nshell = 'echo \"$WORD\" > /etc/word'\n",
    );
    let folder = template.0.path();
    template.write("motd", "one\n");
    let with_word = |arguments: &[&str]| {
        let ran = kiln.command(arguments).env("WORD_OF_TEST", "hello").current_dir(folder).output().unwrap();
        Ran::of(ran, arguments)
    };
    let baked = with_word(&["bake"]);
    assert_eq!(baked.status, 0, "{baked}");
    let digest = kiln.ok(&["inspect", "--json", "reproducible:1"]).json()["digest"].clone();

    // What is not as it was is named before anything starts.
    template.write("motd", "two\n");
    let changed = with_word(&["rebake", "reproducible:1"]);
    changed.fails(2, &["one of the files that the image was baked from is not what it was", "motd (step `motd`)", "--allow-changed"]);
    template.write("motd", "one\n");
    rebake_in(&kiln, folder, &["reproducible:1"]).fails(2, &["the provenance holds no value of word"]);
    kiln.run(&["rebake", "reproducible:1", "--template", "/nowhere"]).fails(1, &["there is no template /nowhere"]);

    let ran = with_word(&["rebake", "reproducible:1", "--json", "--keep"]);
    assert_eq!(ran.status, 0, "{ran}");
    let answer = ran.json();
    assert_eq!((&answer["reproduces"], &answer["source"]["kind"]), (&true.into(), &"folder".into()), "{ran}");
    assert_eq!(differing(&answer), [], "{ran}");
    // What is kept has a name of its own; the first one is where it was.
    assert_eq!(answer["kept"]["name"], "rebake/reproducible:1", "{ran}");
    kiln.ok(&["inspect", "rebake/reproducible:1"]);
    assert_eq!(kiln.ok(&["inspect", "--json", "reproducible:1"]).json()["digest"], digest);
    assert_eq!(kiln.ok(&["inspect", "--json", "reproducible"]).json()["digest"], digest);
    assert!(kiln.leftovers().is_empty() && kiln.processes().is_empty(), "{:?}", kiln.leftovers());
}

#[test]
fn an_image_without_provenance_cannot_be_baked_again() {
    let kiln = Kiln::fresh();
    let disk = kiln.home.join("disk.raw");
    std::fs::write(&disk, vec![1; 1 << 20]).unwrap();
    kiln.ok(&["import", disk.to_str().unwrap(), "imported:1"]);
    kiln.run(&["rebake", "imported:1"]).fails(1, &["imported:1 has no provenance", "imported"]);
}

/// A server of files: address to content. Everything has a tag, and counts how
/// often it was sent.
struct Served {
    address: SocketAddr,
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    sent: Arc<Mutex<Vec<(String, u16)>>>,
}

impl Served {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (files, sent) = (Arc::new(Mutex::new(BTreeMap::<String, Vec<u8>>::new())), Arc::new(Mutex::new(Vec::new())));
        let (these, counted) = (files.clone(), sent.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let (mut line, mut tag) = (String::new(), String::new());
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                if reader.read_line(&mut line).is_err() {
                    continue;
                }
                for header in reader.lines().map_while(Result::ok).take_while(|header| !header.is_empty()) {
                    if let Some((_, value)) = header.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("if-none-match")) {
                        value.trim().clone_into(&mut tag);
                    }
                }
                let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                let content = these.lock().unwrap().get(&path).cloned();
                let etag = |content: &[u8]| format!("\"{}-{}\"", content.len(), content.iter().map(|byte| u64::from(*byte)).sum::<u64>());
                let (status, body, own) = match content {
                    None => (404, Vec::new(), String::new()),
                    Some(content) if etag(&content) == tag => (304, Vec::new(), tag),
                    Some(content) => (200, content.clone(), etag(&content)),
                };
                counted.lock().unwrap().push((path, status));
                let head = format!("HTTP/1.1 {status} x\r\nETag: {own}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
            }
        });
        Self { address, files, sent }
    }

    /// Publishes a suite with one component of these packages.
    fn suite(&self, archive: &str, suite: &str, head: &str, packages: &[(&str, &str)]) {
        let text: String =
            packages.iter().map(|(name, version)| format!("Package: {name}\nVersion: {version}\nArchitecture: amd64\n\n")).collect();
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("Packages");
        std::fs::write(&plain, text).unwrap();
        let packed = Command::new("xz").arg("-kc").arg(&plain).output().unwrap().stdout;
        std::fs::write(folder.path().join("Packages.xz"), &packed).unwrap();
        let sum = tool("sha256sum", &[folder.path().join("Packages.xz").to_str().unwrap()]);
        let digest = sum.split(' ').next().unwrap();
        let release = format!(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nSuite: {suite}\nCodename: {suite}\n{head}\nAcquire-By-Hash: yes\n\
             SHA256:\n {digest} {} main/binary-amd64/Packages.xz\n-----BEGIN PGP SIGNATURE-----\n\n-----END PGP SIGNATURE-----\n",
            packed.len()
        );
        let mut files = self.files.lock().unwrap();
        files.insert(format!("/{archive}/dists/{suite}/InRelease"), release.into_bytes());
        files.insert(format!("/{archive}/dists/{suite}/main/binary-amd64/by-hash/SHA256/{digest}"), packed);
    }

    /// What was asked for since the last time.
    fn asked(&self) -> Vec<(String, u16)> {
        std::mem::take(&mut *self.sent.lock().unwrap())
    }
}

/// An image of a file system with these packages, and apt's sources at `server`.
fn image(kiln: &Kiln, name: &str, server: SocketAddr, packages: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    let write = |path: &str, text: &str| {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let status: String = packages
        .iter()
        .map(|(name, version)| format!("Package: {name}\nStatus: install ok installed\nVersion: {version}\nArchitecture: amd64\n\n"))
        .collect();
    write("var/lib/dpkg/status", &status);
    write("etc/os-release", "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n");
    write("etc/debian_version", "12.7\n");
    write(
        "etc/apt/sources.list",
        &format!("deb http://{server}/debian bookworm main\ndeb http://{server}/debian-security bookworm-security main\n"),
    );
    let disk = folder.path().join("disk.raw");
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let made = Command::new("mke2fs").env("PATH", path).args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&disk).arg("16M").status().unwrap();
    assert!(made.success());
    kiln.ok(&["import", disk.to_str().unwrap(), name]);
}

fn repository() -> Served {
    let server = Served::start();
    server.suite(
        "debian",
        "bookworm",
        "Label: Debian\nVersion: 12.8",
        &[("bash", "5.2.15-2+b7"), ("openssl", "3.0.15-1~deb12u1"), ("tzdata", "2024b-0+deb12u1")],
    );
    server.suite("debian-security", "bookworm-security", "Label: Debian-Security\nVersion: 12", &[("openssl", "3.0.15-1~deb12u2")]);
    server
}

#[test]
fn packages_that_are_behind_their_archive_are_named() {
    let (kiln, server) = (Kiln::fresh(), repository());
    image(&kiln, "good:1", server.address, &[("bash", "5.2.15-2+b7"), ("openssl", "3.0.15-1~deb12u2"), ("own", "1")]);
    image(&kiln, "late:1", server.address, &[("bash", "5.2.15-2+b7"), ("tzdata", "2024a-0+deb12u1")]);
    image(&kiln, "unsafe:1", server.address, &[("bash", "5.2.15-2+b7"), ("openssl", "3.0.15-1~deb12u1")]);

    // Nothing was asked before, and nobody may be asked.
    let ran = kiln.ok(&["age", "--offline"]);
    assert!(ran.stdout.contains("was not asked before, and --offline asks nobody"), "{ran}");
    assert_eq!(server.asked(), []);

    let ran = kiln.ok(&["age", "--json"]);
    let answer = ran.json();
    let shown = |row: &Value| {
        let outdated = row["packages"]["outdated"].as_array().unwrap().iter();
        let one = |package: &Value| format!(" {} {} {}", package["name"], package["available"], package["security"]);
        row["image"].as_str().unwrap().to_owned() + &outdated.map(one).collect::<String>().replace('"', "")
    };
    let rows: Vec<String> = answer["images"].as_array().unwrap().iter().map(shown).collect();
    assert_eq!(rows, ["unsafe:1 openssl 3.0.15-1~deb12u2 true", "late:1 tzdata 2024b-0+deb12u1 false", "good:1"], "{ran}");
    assert_eq!(answer["images"][0]["age_days"], 0, "{ran}");
    // Three images, and each thing was sent once.
    let asked = server.asked();
    assert_eq!((asked.len(), asked.iter().filter(|(_, status)| *status == 200).count()), (4, 4), "{asked:?}");

    // Right after, and without a network, what was fetched has to do.
    let ran = kiln.run(&["age", "unsafe:1", "--exit-code", "--packages"]);
    assert_eq!(ran.status, 3, "{ran}");
    assert!(ran.stdout.contains("1 of 2, 1 for security") && ran.stdout.contains("3.0.15-1~deb12u2"), "{ran}");
    assert_eq!(kiln.run(&["age", "good:1", "--exit-code"]).status, 0);
    assert!(kiln.ok(&["age", "--offline"]).stdout.contains("1 of 2, 1 for security"));
    assert_eq!(kiln.ok(&["age", "--max", "1"]).status, 0);
    assert_eq!(server.asked(), []);

    // Later the suites are asked again, and say that nothing has changed.
    for entry in std::fs::read_dir(kiln.home.join("cache/archives")).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_some_and(|extension| extension == "json") {
            let mut kept: Value = serde_json::from_slice(&std::fs::read(&entry).unwrap()).unwrap();
            kept["asked"] = 0.into();
            std::fs::write(&entry, kept.to_string()).unwrap();
        }
    }
    kiln.ok(&["age", "late:1"]);
    assert_eq!(server.asked().iter().map(|(_, status)| *status).collect::<Vec<_>>(), [304, 304]);

    // All of it can be fetched again.
    assert!(kiln.ok(&["prune", "--cache", "--json"]).json()["cache"]["downloads"].as_u64().unwrap() > 0);
    assert_eq!(std::fs::read_dir(kiln.home.join("cache/archives")).unwrap().count(), 0);
}

#[test]
fn an_archive_that_cannot_be_believed_or_reached_is_told() {
    let (kiln, server) = (Kiln::fresh(), repository());
    image(&kiln, "web:1", server.address, &[("openssl", "3.0.15-1~deb12u1"), ("tzdata", "2024a-0+deb12u1")]);
    // One byte of an index is another one.
    for (path, content) in server.files.lock().unwrap().iter_mut() {
        if path.contains("debian-security") && path.contains("by-hash") {
            *content.last_mut().unwrap() ^= 1;
        }
    }
    let ran = kiln.ok(&["age", "--json"]);
    let row = &ran.json()["images"][0];
    assert!(row["notes"].to_string().contains("bookworm-security main") && row["notes"].to_string().contains("its suite says"), "{ran}");
    let names: Vec<_> = row["packages"]["outdated"].as_array().unwrap().iter().map(|package| package["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["tzdata"], "the other archive is still believed: {ran}");

    // Where nobody listens.
    let nowhere = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    image(&kiln, "far:1", nowhere, &[("openssl", "1")]);
    kiln.run(&["age", "far:1"]).fails(75, &["not every archive could be asked", "--offline"]);
    assert_eq!(kiln.run(&["age", "nothing"]).status, 1);
}

/// Debian's own archive, as it is today: every package of a base that is
/// months old is compared with it.
#[test]
#[ignore = "takes minutes: ci/prove"]
fn debians_own_archive_is_understood() {
    let kiln = Kiln::shared();
    kiln.ok(&["bake", Template::debian("aged", "").path()]);
    let row = kiln.ok(&["age", "aged:1", "--json"]).json()["images"][0].clone();
    assert_eq!(row["base"]["name"], "debian bookworm", "{row:#}");
    assert!(row["base"]["newer"].is_boolean(), "{row:#}");
    assert!(row["packages"]["installed"].as_u64().unwrap() > 100, "{row:#}");
    // Security updates come under their own label.
    assert_eq!(row["notes"].as_array().unwrap().len(), 0, "{row:#}");
    for package in row["packages"]["outdated"].as_array().unwrap() {
        let (installed, available) = (package["installed"].as_str().unwrap(), package["available"].as_str().unwrap());
        let newer = Command::new("dpkg").args(["--compare-versions", available, "gt", installed]).status().unwrap();
        assert!(newer.success(), "{package}");
    }
}
