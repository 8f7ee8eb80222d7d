//! A KubeVirt containerDisk: a container image whose one layer holds
//! `disk/NAME.qcow2`, owned by 107 (`qemu` in KubeVirt's pods).
//!
//! ```text
//!  blocks ─► qcow2 ─► tar ─► gzip members (all cores) ─► a temporary file ─► registry
//! ```
//!
//! Neither the qcow2 nor the tar is ever on a disk: the layout of the one is
//! known from the block map, so the other's header can say its size before the
//! first block is read. The compressed layer has to be, once, since a registry
//! wants its digest before its bytes, and since an upload that is cut goes on.
//! gzip allows several members one after the other, which is how several cores
//! compress one stream. The same image gives the same layer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use flate2::Compression;
use flate2::write::GzEncoder;
use kiln_disk::qcow2::Layout;
use kiln_disk::raw::RawSource;
use kiln_model::Digest;
use kiln_model::base::DiskFormat;
use kiln_model::block::{BLOCK, BlockSource};
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{BlockMap, CREATED, Config};
use kiln_registry::FileSource;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::fetch::{Fetch, fetch};
use super::meter::Meter;
use super::origin::Raw;
use super::partial::blocking;
use super::remote::{Remote, label};
use super::send::{Sending, put};
use crate::blobs::Store;
use crate::manifest::{Descriptor, MANIFEST, Manifest, TITLE};
use crate::publish::Moved;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Annotation: the image that it was made of.
const IMAGE: &str = "vnd.kiln.image";
/// The user and group that KubeVirt reads disks as.
const OWNER: u64 = 107;
/// Bytes that are compressed at once.
const MEMBER: usize = 1 << 20;
/// gzip's level: on disks, more takes twice the time for a twentieth less.
const LEVEL: u32 = 4;

/// What a containerDisk is made of.
pub enum Source<'a> {
    /// An image of the store.
    Store(&'a Digest),
    /// An image at a registry: its disk is fetched first.
    Remote(&'a Remote),
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Converted {
    /// Digest of the container image's manifest.
    pub digest: Digest,
    /// Digest of the image that it was made of.
    pub image: Digest,
    /// Its file in the container.
    pub file: String,
    /// Bytes that were sent.
    pub bytes_sent: u64,
    /// Whether it was there already.
    pub existed: bool,
    /// What the tag meant before, when that was something else.
    pub moved_from: Option<Digest>,
}

/// What is known of the image, wherever it is.
struct Image {
    digest: Digest,
    manifest: Manifest,
    config: Config,
    map: BlockMap,
    disk_digest: Digest,
}

/// Writes an image as a containerDisk to a registry. `store` lends the place
/// for temporary files.
///
/// # Errors
/// As [`super::push`].
pub async fn containerdisk(store: &Store, source: &Source<'_>, to: &Sending<'_>) -> Result<Converted> {
    let image = match source {
        Source::Store(digest) => {
            let (found, record) = (store.image(digest)?, store.record(digest)?);
            Image { digest: **digest, manifest: found.manifest, config: found.config, disk_digest: record.digest, map: record.map }
        }
        Source::Remote(remote) => {
            let disk = remote.root()?;
            let (manifest, config) = (remote.manifest.clone(), remote.config.clone());
            Image { digest: remote.digest(), manifest, config, disk_digest: disk.config.digest, map: disk.map.clone() }
        }
    };
    let name = image.config.name.rsplit('/').next().unwrap_or("disk");
    let file = format!("disk/{name}.qcow2");
    let before = match to.tag {
        Some(tag) => {
            crate::channel::may_tag(to.repository, tag).await?;
            to.repository.manifest(tag).await?
        }
        None => None,
    };
    if let (Some(before), Some(tag)) = (&before, to.tag) {
        let value: Value = serde_json::from_slice(&before.bytes).unwrap_or_default();
        let of = value.get("annotations").and_then(|all| all.get(IMAGE)).and_then(Value::as_str);
        if of == Some(image.digest.to_string().as_str()) {
            return Ok(Converted { digest: before.digest, image: image.digest, file, bytes_sent: 0, existed: true, moved_from: None });
        }
        if tag == image.config.version {
            let what = format!(
                "{}:{tag} was pushed as sha256:{}… and never changes: it is a version",
                label(to.repository),
                before.digest.short()
            );
            return Err(Error::new(Code::Refused, what).next("give the new content another version"));
        }
    }
    let folder = store.temp_folder()?;
    let blocks: Box<dyn BlockSource> = match source {
        Source::Store(digest) => store.disk_source(&store.record(digest)?)?,
        Source::Remote(remote) => {
            let raw = folder.path().join("disk.raw");
            let wanted =
                Fetch { image: remote, store: Some(store), to: &raw, format: DiskFormat::Raw, replace: false, reports: to.reports };
            fetch(&wanted).await?;
            Box::new(RawSource::open(&raw)?)
        }
    };
    let path = folder.path().join("layer");
    let layer = {
        let (map, path, file) = (image.map.clone(), path.clone(), file.clone());
        let meter = Meter::new("compress", Layout::of(&map).length(), to.reports);
        blocking(move || write_layer(blocks, &map, &file, &path, &meter)).await?
    };
    let mut bytes_sent = 0;
    let config = serde_json::to_vec(&container_config(&image, &layer)).trying(|| "write the container's config".into())?;
    let config_path = folder.path().join("config");
    std::fs::write(&config_path, &config).trying(|| "write the container's config".into())?;
    let config = Descriptor::new(CONFIG, Digest::of(&config), config.len() as u64);
    let layer = Descriptor::new(LAYER, layer.digest, layer.size);
    let meter = Meter::new("push", config.size + layer.size, to.reports);
    for (blob, path) in [(&layer, path), (&config, config_path)] {
        if to.repository.blob_size(&blob.digest).await? == Some(blob.size) {
            continue;
        }
        let _permit = to.repository.limit().acquire().await;
        let before = std::sync::atomic::AtomicU64::new(0);
        let progress = |now: u64| meter.part(before.swap(now, std::sync::atomic::Ordering::Relaxed), now);
        to.repository.upload(&blob.digest, blob.size, &FileSource(path), &progress).await?;
        bytes_sent += blob.size;
    }
    meter.end();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer], "annotations": annotations(&image),
    });
    let bytes = serde_json::to_vec(&manifest).trying(|| "write the container's manifest".into())?;
    let raw = Raw { digest: Digest::of(&bytes), media_type: MANIFEST.into(), bytes };
    let at = to.tag.map_or_else(|| raw.digest.to_string(), ToOwned::to_owned);
    put(to.repository, &at, &raw).await?;
    bytes_sent += raw.bytes.len() as u64;
    let moved_from = before.map(|before| before.digest).filter(|before| *before != raw.digest);
    if let (Some(tag), Some(from)) = (to.tag, moved_from) {
        to.reports.note(Moved { name: format!("{}:{tag}", label(to.repository)), from, to: raw.digest }.to_string());
    }
    Ok(Converted { digest: raw.digest, image: image.digest, file, bytes_sent, existed: false, moved_from })
}

fn annotations(image: &Image) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::from([
        (IMAGE.to_owned(), image.digest.to_string()),
        (crate::manifest::DISK_DIGEST.to_owned(), image.disk_digest.to_string()),
        (TITLE.to_owned(), format!("{}:{}", image.config.name, image.config.version)),
    ]);
    if let Some(created) = image.manifest.annotations.get(CREATED) {
        annotations.insert(CREATED.to_owned(), created.clone());
    }
    annotations
}

fn container_config(image: &Image, layer: &Layer) -> Value {
    // Of the image, not of now: the same image gives the same container.
    let created = image.manifest.annotations.get(CREATED);
    let mut config = json!({
        "architecture": image.config.architecture, "os": "linux",
        "config": { "Labels": image.config.labels },
        "rootfs": { "type": "layers", "diff_ids": [layer.content] },
        "history": [{ "created_by": "kiln copy" }],
    });
    if let (Some(created), Some(object)) = (created, config.as_object_mut()) {
        object.insert("created".into(), json!(created));
        object.insert("history".into(), json!([{ "created": created, "created_by": "kiln copy" }]));
    }
    config
}

/// A layer that was written.
struct Layer {
    /// Digest of the file.
    digest: Digest,
    size: u64,
    /// Digest of what is compressed in it.
    content: Digest,
}

/// Writes the layer to `path`.
fn write_layer(mut blocks: Box<dyn BlockSource>, map: &BlockMap, file: &str, path: &Path, meter: &Meter) -> Result<Layer> {
    let what = || "write the container's layer".to_owned();
    let layout = Layout::of(map);
    let out = File::options().write(true).create_new(true).open(path).trying(what)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    let (work, jobs) = sync_channel::<Job>(cores);
    let (order, members) = sync_channel::<Receiver<Vec<u8>>>(cores * 2);
    let jobs = Mutex::new(jobs);
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || write_members(out, &members));
        for _ in 0..cores {
            let jobs = &jobs;
            scope.spawn(move || compress(jobs));
        }
        let mut stream = Members { work, order, now: Vec::with_capacity(MEMBER), hasher: Sha256::new(), meter };
        // Either way the stream has ended then, and with it the threads.
        let streamed = match write_tar(&mut *blocks, &layout, file, &mut stream) {
            Ok(()) => stream.finish().trying(what),
            Err(error) => {
                drop(stream);
                Err(error)
            }
        };
        let written = writing.join().unwrap_or_else(|_| Err(Error::new(Code::Failed, "the container's layer could not be written")));
        // A full disk is why nobody took any more.
        let (digest, size) = match (written, &streamed) {
            (Ok(done), _) => done,
            (Err(error), _) => return Err(error),
        };
        Ok(Layer { digest, size, content: streamed? })
    })
}

/// The tar: a folder, and the qcow2 in it.
fn write_tar(blocks: &mut dyn BlockSource, layout: &Layout, file: &str, out: &mut dyn Write) -> Result<()> {
    let what = || "write the container's layer".to_owned();
    let mut header = |path: &str, size: u64, mode: u32, kind: tar::EntryType| -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_path(path).trying(what)?;
        header.set_size(size);
        header.set_mode(mode);
        header.set_uid(OWNER);
        header.set_gid(OWNER);
        header.set_mtime(0);
        header.set_entry_type(kind);
        header.set_cksum();
        out.write_all(header.as_bytes()).trying(what)
    };
    header("disk/", 0, 0o755, tar::EntryType::Directory)?;
    header(file, layout.length(), 0o440, tar::EntryType::Regular)?;
    layout.write_head(out).trying(what)?;
    let size = blocks.size();
    let mut bytes = vec![0; usize::try_from(BLOCK).unwrap_or(0)];
    for index in 0..usize::try_from(size.div_ceil(BLOCK)).unwrap_or(0) {
        let Some((_, length)) = layout.place(index) else { continue };
        let at = index as u64 * BLOCK;
        let real = usize::try_from(size - at).unwrap_or(usize::MAX).min(bytes.len());
        blocks.read_at(at, &mut bytes[..real])?;
        bytes[real..].fill(0);
        out.write_all(&bytes[..length]).trying(what)?;
    }
    // A qcow2 is made of whole clusters, so it needs no filling up; two empty
    // records end the archive.
    out.write_all(&[0; 1024]).trying(what)
}

/// What is to be compressed, and where the member goes.
type Job = (Vec<u8>, SyncSender<Vec<u8>>);

/// Cuts a stream into members and has them compressed, in order.
struct Members<'a> {
    work: SyncSender<Job>,
    order: SyncSender<Receiver<Vec<u8>>>,
    now: Vec<u8>,
    hasher: Sha256,
    meter: &'a Meter,
}

impl Members<'_> {
    fn send(&mut self) -> std::io::Result<()> {
        let bytes = std::mem::replace(&mut self.now, Vec::with_capacity(MEMBER));
        let (done, member) = sync_channel(1);
        let gone = |_| std::io::Error::other("nobody takes the compressed layer any more");
        self.order.send(member).map_err(|_| gone(()))?;
        self.work.send((bytes, done)).map_err(|_| gone(()))
    }

    /// Ends the stream; gives the digest of what went into it.
    fn finish(mut self) -> std::io::Result<Digest> {
        if !self.now.is_empty() {
            self.send()?;
        }
        Ok(Digest::finish(self.hasher))
    }
}

impl Write for Members<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = bytes.len().min(MEMBER - self.now.len());
        self.now.extend_from_slice(&bytes[..count]);
        self.hasher.update(&bytes[..count]);
        self.meter.add(count as u64);
        if self.now.len() == MEMBER {
            self.send()?;
        }
        Ok(count)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A thread that compresses until there is nothing more.
fn compress(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((bytes, done)) = next else { return };
        let mut encoder = GzEncoder::new(Vec::with_capacity(bytes.len() / 2), Compression::new(LEVEL));
        // Into memory: cannot fail, and would show as a member that is missing.
        if let Ok(member) = encoder.write_all(&bytes).and_then(|()| encoder.finish()) {
            drop(done.send(member));
        }
    }
}

/// Writes the members in order; gives digest and size of the file.
fn write_members(out: File, members: &Receiver<Receiver<Vec<u8>>>) -> Result<(Digest, u64)> {
    let what = || "write the container's layer".to_owned();
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let (mut hasher, mut size) = (Sha256::new(), 0);
    for member in members {
        let bytes = member.recv().trying(what)?;
        out.write_all(&bytes).trying(what)?;
        hasher.update(&bytes);
        size += bytes.len() as u64;
    }
    out.flush().trying(what)?;
    Ok((Digest::finish(hasher), size))
}
