use super::*;
use crate::base::checksum::Algorithm;
use crate::base::testing::{Fault, Server, context, disk};
use kiln_model::settings::{Place, Table, Value};

fn sum(bytes: &[u8]) -> Checksum {
    let mut hasher = Hasher::new(Algorithm::Sha512);
    hasher.update(bytes);
    hasher.finish()
}

fn table(entries: &[(&str, &str)]) -> Node {
    let place = Place::default();
    let entry =
        |(name, text): &(&str, &str)| Entry { name: (*name).into(), place, node: Node { value: Value::String((*text).into()), place } };
    Node { value: Value::Table(Table { entries: entries.iter().map(entry).collect() }), place }
}

fn read(home: &Path, entries: &[(&str, &str)]) -> Result<Box<dyn BaseSource>, Problems> {
    let kind = UrlKind::new(home.join("cache"), Site::default());
    let mut problems = Problems::default();
    kind.read(&table(entries), home, &mut problems).ok_or(problems)
}

fn source(home: &Path, url: &Url, checksum: &str) -> Box<dyn BaseSource> {
    read(home, &[("url", url.as_str()), ("checksum", checksum)]).unwrap()
}

#[tokio::test]
async fn downloaded_once_whatever_the_address() {
    let home = tempfile::tempdir().unwrap();
    let body = disk(700_000);
    let server = Server::start(&body);
    server.state().files.push(("/mirror/other.img".into(), body.clone()));
    let ((one, _), (two, _)) = (context(home.path(), "one"), context(home.path(), "two"));
    let checksum = sum(&body).to_string();
    let a = source(home.path(), &server.url("/disk.raw"), &checksum);
    let b = source(home.path(), &server.url("/mirror/other.img"), &checksum);
    let (first, second) = tokio::join!(a.fetch(false, &one), b.fetch(false, &two));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(server.state().requests.len(), 1);
    assert_eq!(first.disk, second.disk);
    assert!(std::fs::read(&first.file().unwrap().path).unwrap() == body);
    assert!(second.label.ends_with("/mirror/other.img"));
    assert_eq!(std::fs::read_dir(home.path().join("cache/downloads")).unwrap().count(), 0);
    // Fresh looks whether it is still what it was.
    a.fetch(true, &one).await.unwrap();
    assert_eq!(server.state().requests.len(), 1);
    std::fs::write(&first.file().unwrap().path, vec![0; body.len()]).unwrap();
    let again = a.fetch(true, &one).await.unwrap();
    assert_eq!(server.state().requests.len(), 2);
    assert!(std::fs::read(&again.file().unwrap().path).unwrap() == body);
}

#[tokio::test]
async fn a_list_is_asked_for_the_last_part_of_the_address() {
    let home = tempfile::tempdir().unwrap();
    let body = disk(100_000);
    let server = Server::start(&body);
    let list = format!("{}  other.raw\n{} *disk.raw\n", sum(b"x").hex, sum(&body).hex);
    server.state().files.push(("/SHA512SUMS".into(), list.clone().into_bytes()));
    server.fault(Fault::Answer("503 Busy", String::new()));
    let (one, heard) = context(home.path(), "one");
    let base = source(home.path(), &server.url("/disk.raw"), &format!("file:{}", server.url("/SHA512SUMS")));
    base.fetch(false, &one).await.unwrap();
    assert!(heard.notes().iter().any(|n| n.contains(&sum(&body).to_string())), "{:?}", heard.notes());
    // A list beside the template, and an address of this machine.
    std::fs::write(home.path().join("SUMS"), list).unwrap();
    std::fs::write(home.path().join("disk.raw"), &body).unwrap();
    let url = Url::from_file_path(home.path().join("disk.raw")).unwrap();
    let before = server.state().requests.len();
    let base = source(home.path(), &url, "file:SUMS");
    assert!(std::fs::read(base.fetch(false, &one).await.unwrap().file().unwrap().path.clone()).unwrap() == body);
    assert_eq!(server.state().requests.len(), before);
    // And one that does not know it.
    server.state().files[1].1 = b"nothing".to_vec();
    let base = source(home.path(), &server.url("/disk.raw"), &format!("file:{}", server.url("/SHA512SUMS")));
    let error = base.fetch(false, &one).await.unwrap_err();
    assert_eq!(error.kind(), Code::Base);
    assert!(error.to_string().contains("does not list `disk.raw`"), "{error}");
}

#[tokio::test]
async fn what_is_wrong_keeps_nothing() {
    let home = tempfile::tempdir().unwrap();
    let body = disk(100_000);
    let server = Server::start(&body);
    std::fs::write(home.path().join("disk.raw"), &body).unwrap();
    for url in [server.url("/disk.raw"), Url::from_file_path(home.path().join("disk.raw")).unwrap()] {
        let (one, _) = context(home.path(), url.scheme());
        let base = source(home.path(), &url, &sum(b"another").to_string());
        let error = base.fetch(false, &one).await.unwrap_err();
        assert_eq!(error.kind(), Code::DigestMismatch);
        assert!(error.to_string().contains(&sum(&body).hex) && error.to_string().contains(&sum(b"another").hex), "{error}");
        assert_eq!(std::fs::read_dir(home.path().join("cache/downloads")).unwrap().count(), 0);
        assert_eq!(base.known().unwrap(), None);
    }
    // The right bytes, but no disk.
    let squeezed = b"\x28\xb5\x2f\xfd and so on".to_vec();
    server.state().files[0].1 = squeezed.clone();
    let (one, _) = context(home.path(), "zstd");
    let base = source(home.path(), &server.url("/disk.raw"), &sum(&squeezed).to_string());
    let error = base.fetch(false, &one).await.unwrap_err();
    assert_eq!(error.kind(), Code::Base);
    assert!(error.to_string().contains("compressed with zstd"), "{error}");
    assert!(one.scope.unwind().await.is_empty());
    assert_eq!(base.known().unwrap(), None);
    let shelf = home.path().join("cache/bases").join(format!("sha512-{}", sum(&squeezed).hex));
    assert!(std::fs::read_dir(shelf).unwrap().all(|e| e.unwrap().path().is_file()));
}

#[test]
fn mistakes_of_a_template() {
    let home = tempfile::tempdir().unwrap();
    let hex = sum(b"x").to_string();
    let url = "https://example.org/disk.qcow2";
    for (entries, message, help) in [
        (vec![("url", url)], "needs a `checksum`", "SHA512SUMS"),
        (vec![("url", url), ("checksum", "md5:1234")], "not an algorithm", "sha256:"),
        (vec![("url", url), ("checksum", "file:gone")], "not there", "SHA512SUMS"),
        (vec![("url", url), ("checksum", "file:http://example.org/SUMS")], "must come over https", "digest itself"),
        (vec![("url", "disk.qcow2"), ("checksum", &hex)], "not an address", "file ="),
        (vec![("url", "ftp://example.org/x"), ("checksum", &hex)], "http, https or file", ""),
        (vec![("url", "https://example.org/"), ("checksum", "file:https://example.org/SUMS")], "does not end in", ""),
        (vec![("url", url), ("checksum", &hex), ("chekcsum", "x")], "unknown key", "`checksum`"),
    ] {
        let Err(problems) = read(home.path(), &entries) else { panic!("{entries:?} was taken") };
        assert_eq!(problems.0.len(), 1, "{problems:?}");
        assert!(problems.0[0].message.contains(message), "{problems:?}");
        assert!(problems.0[0].help.clone().unwrap_or_default().contains(help), "{problems:?}");
    }
    assert!(read(home.path(), &[("url", url), ("checksum", &hex)]).is_ok());
}

#[test]
fn names_are_decoded() {
    for (text, expected) in [
        ("https://a/x/disk%20one.raw?q=1", Some("disk one.raw")),
        ("https://a/100%.raw", Some("100%.raw")),
        ("https://a/x/", None),
        ("https://a/%ff", None),
    ] {
        assert_eq!(last_part(&Url::parse(text).unwrap()).as_deref(), expected, "{text}");
    }
}
