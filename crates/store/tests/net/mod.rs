//! What the tests of transfers share: a registry behind a proxy, disks that are
//! larger, and the transfers with a client that is not patient.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_disk::raw::RawSource;
use kiln_http::Patience;
use kiln_model::Digest;
use kiln_model::base::DiskFormat;
use kiln_model::block::{BLOCK, ImageSink as _};
use kiln_model::event::Reports;
use kiln_model::image::DiskRecord;
use kiln_registry::{Client, Options, Repository};
use kiln_store::transfer::{self, Fetch, Known, Names, Pulled, Remote, Sending, Sent, Written};
use kiln_store::{Place as _, RemotePlace, Store};
use kiln_testing::{Proxy, Registry};

use crate::common::{Context, noise};

/// A registry behind a proxy, and a client that is not patient.
pub(crate) struct Net {
    pub(crate) registry: Registry,
    pub(crate) proxy: Proxy,
    pub(crate) client: Client,
}

impl Net {
    pub(crate) fn new() -> Self {
        let registry = Registry::builder().start().unwrap();
        let proxy = Proxy::before(registry.address()).unwrap();
        Self { registry, proxy, client: client() }
    }

    pub(crate) fn repository(&self, name: &str) -> Repository {
        self.client.repository(self.proxy.address(), name).unwrap()
    }
}

pub(crate) fn client() -> Client {
    let patience = Patience { failures: 3, first: Duration::from_millis(5), longest: Duration::from_millis(50) };
    Client::new(Options { patience, ..Options::default() }).unwrap()
}

/// A raw disk of `blocks` (index, seed), larger than those of `common`.
pub(crate) fn disk(folder: &Path, size: u64, blocks: &[(u64, u64)]) -> PathBuf {
    use std::os::unix::fs::FileExt as _;
    let path = folder.join("large.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (index, seed) in blocks {
        // Half of it noise: packs to half of its size.
        let bytes = noise(*seed, 256 << 10);
        let room = usize::try_from(size - index * BLOCK).unwrap().min(bytes.len());
        file.write_all_at(&bytes[..room], index * BLOCK).unwrap();
    }
    path
}

pub(crate) fn blocks(count: u64) -> Vec<(u64, u64)> {
    // Every fifth is a hole, every seventh repeats the first.
    (0..count).filter(|n| n % 5 != 4).map(|n| (n, if n % 7 == 6 { 1 } else { n + 1 })).collect()
}

pub(crate) fn write(store: &Store, path: &Path, parents: &[DiskRecord]) -> DiskRecord {
    store.write_disk("root", &mut RawSource::open(path).unwrap(), None, parents, &mut |_, _| {}).unwrap()
}

pub(crate) fn known(context: &Context) -> Known {
    Known::new(&context.folder.path().join("registries"))
}

pub(crate) async fn push(context: &Context, image: &Digest, to: &Repository, tag: &str) -> kiln_model::Result<Sent> {
    let known = known(context);
    let to = Sending { repository: to, tag: Some(tag), known: &known, reports: &Reports::silent() };
    transfer::push(&context.store, image, &to).await
}

pub(crate) async fn pull(context: &Context, from: &Repository, tag: &str) -> kiln_model::Result<Pulled> {
    let digest = RemotePlace::new(from.clone()).resolve(&format!("h.example/x:{tag}").parse().unwrap()).await?;
    let image = Remote::open(from, &digest).await?;
    transfer::pull(&image, &context.store, &Names::Tag(tag.into()), &known(context), &Reports::silent()).await
}

pub(crate) async fn fetch(context: &Context, from: &Repository, tag: &str, to: &Path, format: DiskFormat) -> kiln_model::Result<Written> {
    let digest = from.resolve(tag).await?.unwrap();
    let image = Remote::open(from, &digest).await?;
    let reports = Reports::silent();
    transfer::fetch(&Fetch { image: &image, store: Some(&context.store), to, format, replace: false, reports: &reports }).await
}

pub(crate) fn run(command: &str, arguments: &[&str]) -> String {
    let output = Command::new(command).args(arguments).output().unwrap_or_else(|error| panic!("{command}: {error}"));
    assert!(output.status.success(), "{command} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
