use super::*;
use crate::base::testing::{context, disk};
use kiln_model::image::Firmware;

struct Bench {
    home: tempfile::TempDir,
    path: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("disk.img");
        std::fs::write(&path, disk(1 << 20)).unwrap();
        Self { home, path }
    }

    fn source(&self) -> FileSource {
        FileSource::new(self.home.path(), "disk.img", self.path.clone())
    }
}

fn digest() -> Digest {
    Digest::of("disk")
}

#[tokio::test]
async fn it_is_used_in_place_and_its_blocks_are_remembered() {
    let bench = Bench::new();
    let (context, heard) = context(bench.home.path(), "one");
    let source = bench.source();
    assert_eq!(source.known().unwrap(), None);
    let base = source.fetch(false, &context).await.unwrap();
    assert_eq!(base.file().unwrap().path, bench.path);
    assert_eq!((base.size(), base.firmware, base.credentials), (1 << 20, Firmware::Bios, None));
    source.remember(&base, &digest()).unwrap();
    assert_eq!(bench.source().known().unwrap(), Some(digest()));
    assert!(heard.notes().is_empty());
}

#[tokio::test]
async fn a_changed_file_is_noticed_and_a_touched_one_is_not_another() {
    let bench = Bench::new();
    let (context, heard) = context(bench.home.path(), "one");
    let source = bench.source();
    let base = source.fetch(false, &context).await.unwrap();
    source.remember(&base, &digest()).unwrap();
    // Touched: read again, and found to be the same.
    File::options().append(true).open(&bench.path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(bench.source().known().unwrap(), None);
    bench.source().fetch(false, &context).await.unwrap();
    assert_eq!(bench.source().known().unwrap(), Some(digest()));
    // Changed, the size and the time of modification left as they were.
    let mut bytes = disk(1 << 20);
    bytes[600_000] ^= 1;
    std::fs::write(&bench.path, bytes).unwrap();
    File::options().append(true).open(&bench.path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(bench.source().known().unwrap(), None);
    bench.source().fetch(false, &context).await.unwrap();
    assert_eq!(bench.source().known().unwrap(), None);
    assert!(heard.notes()[0].contains("has changed"));
}

#[tokio::test]
async fn a_file_that_changes_during_the_bake_is_an_error() {
    let bench = Bench::new();
    let (context, _) = context(bench.home.path(), "one");
    let source = bench.source();
    let base = source.fetch(false, &context).await.unwrap();
    std::fs::write(&bench.path, disk(2 << 20)).unwrap();
    let error = source.remember(&base, &digest()).unwrap_err();
    assert_eq!(error.kind(), Code::Base);
    assert_eq!(bench.source().known().unwrap(), None);
}

#[tokio::test]
async fn what_is_no_disk_is_refused() {
    let bench = Bench::new();
    let (context, _) = context(bench.home.path(), "one");
    std::fs::write(&bench.path, b"\xfd7zXZ\0 and so on").unwrap();
    let error = bench.source().fetch(false, &context).await.unwrap_err();
    assert_eq!(error.kind(), Code::Base);
    assert!(error.to_string().contains("compressed with xz"), "{error}");
    assert!(error.next_move().unwrap().contains("unxz"));
    std::fs::write(&bench.path, b"").unwrap();
    let error = bench.source().fetch(false, &context).await.unwrap_err();
    assert_eq!(error.kind(), Code::Base, "{error:?}");
}

#[tokio::test]
async fn a_qcow2_by_any_name_is_looked_into() {
    let bench = Bench::new();
    let (context, _) = context(bench.home.path(), "one");
    let raw = bench.home.path().join("raw");
    std::fs::rename(&bench.path, &raw).unwrap();
    let convert = |more: &[&str]| {
        let mut command = std::process::Command::new("qemu-img");
        assert!(command.args(["convert", "-f", "raw", "-O", "qcow2"]).args(more).arg(&raw).arg(&bench.path).status().unwrap().success());
    };
    for more in [&[][..], &["-c"]] {
        convert(more);
        let base = bench.source().fetch(true, &context).await.unwrap();
        assert_eq!((base.file().unwrap().format, base.size()), (kiln_model::base::DiskFormat::Qcow2, 1 << 20));
        assert_eq!(base.firmware, Firmware::Bios, "read from within, {more:?}");
    }
    assert_eq!(std::fs::read_dir(&context.work).unwrap().count(), 0);
}
