//! OCI archives: images in one file, for machines without a network. An image
//! layout (`oci-layout`, `index.json`, `blobs/sha256/…`) in a plain tar, as
//! `skopeo copy oci-archive:FILE:web:1.4.0 …` takes it.
//!
//! What is saved twice gives the same bytes. What is loaded comes from
//! somebody else: no path in it is ever used as a path, every blob has to have
//! the digest that it is named by, and nothing of it is visible before all of
//! it has been looked at.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::event::Reports;
use kiln_model::reference::{Pointer, Reference, check_tag};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::admit::{Admit, Names};
use super::attached::{self, Artifact};
use super::local::Local;
use super::meter::Meter;
use super::origin::{Raw, media_type};
use super::partial::check_frames;
use super::pull::frames_of;
use super::remote;
use super::send::is_image;
use crate::artifacts::{SUBJECT, TAG};
use crate::blobs::{Store, damaged};
use crate::blockmap::MAP_LIMIT;
use crate::index::{AT, FIXED, REF_NAME};
use crate::manifest::{Descriptor, INDEX, MANIFEST, MANIFEST_LIMIT, Manifest, links, parse_config};
use crate::publish::Moved;

/// Most bytes of `index.json` and `oci-layout` in an archive.
const SMALL: u64 = 16 << 20;

/// What was saved.
#[derive(Debug, Clone, Serialize)]
pub struct Saved {
    /// The images' manifests.
    pub digests: Vec<Digest>,
    /// Blobs, each once.
    pub blobs: usize,
    /// Bytes of the archive.
    pub bytes: u64,
}

/// Writes images of the store, with what is attached to them, to `out`.
/// `images` are their references, which become their names there.
///
/// # Errors
/// As [`Store::resolve`]; [`Code::Corrupt`], naming the blob, when one is
/// damaged.
pub fn save(store: &Store, images: &[Reference], out: &mut dyn Write, reports: &Reports) -> Result<Saved> {
    let mut entries = Vec::new();
    let mut blobs: BTreeMap<Digest, u64> = BTreeMap::new();
    let mut digests = Vec::new();
    for reference in images {
        let digest = store.resolve(reference)?;
        let image = store.image(&digest)?;
        let needed: Vec<_> =
            image.manifest.blobs().map(|blob| kiln_model::image::PackRef { digest: blob.digest, size: blob.size }).collect();
        let size = std::fs::metadata(store.blob_path(&digest)).trying(|| format!("read manifest {digest}"))?.len();
        store.hold(&needed)?;
        store.protect(&digest)?;
        blobs.insert(digest, size);
        blobs.extend(needed.iter().map(|blob| (blob.digest, blob.size)));
        let mut entry = Descriptor::new(MANIFEST, digest, size);
        let name = match &reference.pointer {
            Pointer::Tag(Some(tag)) => format!("{}:{tag}", reference.name),
            _ => format!("{}:{}", image.config.name, image.config.version),
        };
        if let Some(why) = image.fixed.get(&name) {
            entry.annotations.insert(FIXED.into(), why.clone());
        }
        entry.annotations.insert(REF_NAME.into(), name);
        entries.push(entry);
        if digests.contains(&digest) {
            continue;
        }
        digests.push(digest);
        for artifact in attached::in_store(store, &digest)? {
            blobs.insert(artifact.manifest.digest, artifact.manifest.bytes.len() as u64);
            blobs.extend(artifact.blobs()?.iter().map(|blob| (blob.digest, blob.size)));
            let mut entry = artifact.entry(&digest)?;
            // When it came here is nobody's business there.
            entry.annotations.remove(AT);
            entries.push(entry);
        }
    }
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries }));
    let index = index.trying(|| "write the archive's index".into())?;
    let meter = Meter::new("save", blobs.values().sum(), reports);
    let mut counted = Counted { out: BufWriter::with_capacity(1 << 20, out), bytes: 0 };
    let mut tar = tar::Builder::new(&mut counted);
    let what = || "write the archive".to_owned();
    append(&mut tar, "oci-layout", crate::blobs::LAYOUT.len() as u64, &mut crate::blobs::LAYOUT.as_bytes()).trying(what)?;
    append(&mut tar, "index.json", index.len() as u64, &mut &*index).trying(what)?;
    for (digest, size) in &blobs {
        if !store.has_blob(digest, *size) {
            let what = format!("blob {digest} is missing from the store, or cut short");
            return Err(Error::new(Code::Corrupt, what).next("`kiln verify` names every image that is damaged"));
        }
        let mut reader =
            Hashed { inner: BufReader::with_capacity(1 << 20, store.open_blob(digest)?), hasher: Sha256::new(), meter: &meter };
        append(&mut tar, &format!("blobs/sha256/{}", digest.hex()), *size, &mut reader).trying(what)?;
        if Digest::finish(reader.hasher) != *digest {
            return Err(damaged(digest));
        }
    }
    tar.finish().trying(what)?;
    drop(tar);
    counted.out.flush().trying(what)?;
    meter.end();
    Ok(Saved { digests, blobs: blobs.len(), bytes: counted.bytes })
}

fn append(tar: &mut tar::Builder<&mut Counted<'_>>, name: &str, size: u64, reader: &mut dyn Read) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    // No time and nobody's id: the same images give the same archive.
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_entry_type(tar::EntryType::Regular);
    tar.append_data(&mut header, name, reader)
}

struct Counted<'a> {
    out: BufWriter<&'a mut dyn Write>,
    bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

struct Hashed<'a, R> {
    inner: R,
    hasher: Sha256,
    meter: &'a Meter,
}

impl<R: Read> Read for Hashed<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(into)?;
        self.hasher.update(&into[..count]);
        self.meter.add(count as u64);
        Ok(count)
    }
}

/// What was loaded.
#[derive(Debug, Clone, Serialize)]
pub struct Loaded {
    /// The images.
    pub images: Vec<LoadedImage>,
    /// Bytes of blobs that were not in the store.
    pub bytes_stored: u64,
    /// Bytes of blobs that were.
    pub bytes_skipped: u64,
    /// Names that meant something else before.
    #[serde(skip)]
    pub moved: Vec<Moved>,
}

/// One of them.
#[derive(Debug, Clone, Serialize)]
pub struct LoadedImage {
    /// Digest of its manifest.
    pub digest: Digest,
    /// The names that it has now.
    pub names: Vec<String>,
    /// How many artifacts are attached to it.
    pub attached: usize,
}

/// An image of the archive, read and checked.
struct Found {
    raw: Raw,
    manifest: Manifest,
    config: kiln_model::image::Config,
    names: Names,
    fixed: bool,
    attached: Vec<Artifact>,
}

/// Brings the images of an archive into the store, with what is attached to
/// them.
///
/// # Errors
/// [`Code::Corrupt`], naming the blob, when the archive is damaged, cut short or
/// holds what it may not; [`Code::Refused`] when a name is fixed elsewhere in
/// the store. Then nothing of it is to be seen.
pub fn load(store: &Store, archive: &mut dyn Read, size: u64, reports: &Reports) -> Result<Loaded> {
    let meter = Meter::new("load", size, reports);
    let mut loaded = Loaded { images: Vec::new(), bytes_stored: 0, bytes_skipped: 0, moved: Vec::new() };
    let mut blobs: HashMap<Digest, u64> = HashMap::new();
    let mut index = None;
    let mut layout = false;
    let what = || "read the archive".to_owned();
    let mut tar = tar::Archive::new(Metered { inner: BufReader::with_capacity(1 << 20, archive), meter: &meter });
    for entry in tar.entries().map_err(no_archive)? {
        let mut entry = entry.map_err(no_archive)?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let kind = entry.header().entry_type();
        if kind.is_dir() {
            continue;
        }
        if !kind.is_file() {
            return Err(bad(&format!("`{path}` in it is no file")));
        }
        match inside(&path) {
            Some(Inside::Layout) => {
                let version = serde_json::from_slice::<Value>(&read_small(&mut entry)?).ok();
                layout = version.as_ref().and_then(|v| v.get("imageLayoutVersion")).and_then(Value::as_str) == Some("1.0.0");
            }
            Some(Inside::Index) => index = Some(read_small(&mut entry)?),
            Some(Inside::Blob(digest)) => {
                let size = entry.size();
                if store.has_blob(&digest, size)
                    && store.hold(&[kiln_model::image::PackRef { digest, size }]).is_ok_and(|there| !there.is_empty())
                {
                    loaded.bytes_skipped += size;
                } else {
                    take_blob(store, &digest, size, &mut entry)?;
                    loaded.bytes_stored += size;
                }
                blobs.insert(digest, size);
            }
            // Docker's own index, and whatever others add: not needed.
            None => drop(std::io::copy(&mut entry, &mut std::io::sink()).trying(what)?),
        }
    }
    if !layout {
        return Err(bad("it is no OCI image layout 1.0.0").next("`kiln save` and `skopeo copy … oci-archive:FILE` write what kiln loads"));
    }
    let index = index.ok_or_else(|| bad("it has no index.json"))?;
    let found = find(store, &index, &blobs)?;
    if found.is_empty() {
        return Err(Error::new(Code::NotFound, "the archive holds no image of kiln's"));
    }
    for image in &found {
        store.may_name(&image.config, &image.raw.digest, &image.names)?;
    }
    check_blocks(store, &found)?;
    let mut found = found;
    for image in &mut found {
        image.attached = store.merge_tagged(&image.raw.digest, std::mem::take(&mut image.attached))?;
    }
    let admits: Vec<Admit<'_>> = found
        .iter()
        .map(|image| Admit {
            digest: image.raw.digest,
            size: image.raw.bytes.len() as u64,
            manifest: &image.manifest,
            config: &image.config,
            names: &image.names,
            attached: &image.attached,
        })
        .collect();
    loaded.moved = store.admit(&admits)?;
    for image in &found {
        if let (true, Names::These(names)) = (image.fixed, &image.names) {
            for name in names {
                store.fix(&name.parse()?, super::admit::PUSHED)?;
            }
        }
        let names = store.image(&image.raw.digest)?.names;
        loaded.images.push(LoadedImage { digest: image.raw.digest, names, attached: image.attached.len() });
    }
    meter.end();
    Ok(loaded)
}

fn bad(why: &str) -> Error {
    Error::new(Code::Corrupt, format!("this archive cannot be loaded: {why}"))
}

fn no_archive(error: std::io::Error) -> Error {
    bad("it is damaged, cut short, or no tar").because(error).next("an archive that was compressed has to be unpacked first (`gunzip`)")
}

/// What a path in an archive means. Nothing is ever written where it says.
enum Inside {
    Layout,
    Index,
    Blob(Digest),
}

fn inside(path: &str) -> Option<Inside> {
    match path.strip_prefix("./").unwrap_or(path) {
        "oci-layout" => Some(Inside::Layout),
        "index.json" => Some(Inside::Index),
        path => {
            let hex = path.strip_prefix("blobs/sha256/")?;
            format!("sha256:{hex}").parse().ok().map(Inside::Blob)
        }
    }
}

fn read_small(entry: &mut dyn Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    entry.take(SMALL + 1).read_to_end(&mut bytes).map_err(no_archive)?;
    if bytes.len() as u64 > SMALL { Err(bad("its index is too large")) } else { Ok(bytes) }
}

/// Stores one blob if it is what its name says.
fn take_blob(store: &Store, digest: &Digest, size: u64, entry: &mut dyn Read) -> Result<()> {
    let (temp, mut file) = store.temp()?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut left = size;
    while left > 0 {
        let count = entry.read(&mut buffer).map_err(no_archive)?;
        if count == 0 {
            return Err(bad(&format!("it ends in blob {digest}")));
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count]).trying(|| format!("write blob {digest}"))?;
        left = left.saturating_sub(count as u64);
    }
    let is = Digest::finish(hasher);
    if is != *digest {
        return Err(bad(&format!("what it holds as blob {digest} is {is}")));
    }
    file.sync_all().trying(|| format!("write blob {digest}"))?;
    store.place_blob(temp, digest)
}

/// The images that the index of an archive names, each checked as far as its
/// manifest goes.
fn find(store: &Store, index: &[u8], blobs: &HashMap<Digest, u64>) -> Result<Vec<Found>> {
    #[derive(serde::Deserialize)]
    struct Index {
        manifests: Vec<Descriptor>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| bad("its index.json is no index").because(error))?;
    let has = |blob: &Descriptor, of: &Digest| match blobs.get(&blob.digest) {
        Some(size) if *size == blob.size => Ok(()),
        Some(size) => Err(bad(&format!("blob {} of {of} has {size} bytes, and should have {}", blob.digest, blob.size))),
        None => Err(bad(&format!("blob {} of {of} is not in it", blob.digest))),
    };
    let read = |entry: &Descriptor| -> Result<Raw> {
        has(entry, &entry.digest)?;
        let bytes = store.read_blob(&entry.digest, MANIFEST_LIMIT)?;
        Ok(Raw { digest: entry.digest, media_type: entry.media_type.clone(), bytes })
    };
    let mut found: Vec<Found> = Vec::new();
    let mut others = Vec::new();
    for entry in &index.manifests {
        let raw = read(entry)?;
        if media_type(&raw.bytes) != entry.media_type {
            return Err(bad(&format!("its index says that {} is something else", entry.digest)));
        }
        // An index of several images, or what is none of kiln's.
        if entry.media_type != MANIFEST {
            continue;
        }
        let name = entry.annotation(REF_NAME);
        if !is_image(&raw.bytes) {
            others.push((entry, raw));
            continue;
        }
        let fixed = entry.annotation(FIXED).is_some();
        if let Some(image) = found.iter_mut().find(|image| image.raw.digest == raw.digest) {
            if let (Names::These(names), Some(name)) = (&mut image.names, name.and_then(|name| good_name(name, &image.config.name))) {
                names.push(name);
                image.fixed |= fixed;
            }
            continue;
        }
        let manifest = Manifest::parse(&raw.bytes).trying(|| format!("load {}", raw.digest))?;
        manifest.blobs().try_for_each(|blob| has(blob, &raw.digest))?;
        let config = parse_config(&store.read_blob(&manifest.config.digest, MANIFEST_LIMIT)?, &manifest.config.digest)?;
        remote::check(&manifest, &config).trying(|| format!("load {}", raw.digest))?;
        let names = match name.and_then(|name| good_name(name, &config.name)) {
            Some(name) => Names::These(vec![name]),
            None => Names::Version,
        };
        found.push(Found { raw, manifest, config, names, fixed, attached: Vec::new() });
    }
    let mut seen = HashSet::new();
    for (entry, raw) in others {
        let said = entry.annotation(SUBJECT).and_then(|text| text.parse::<Digest>().ok());
        let subject = links(&raw.bytes).ok().and_then(|links| links.subject).or(said);
        let Some(image) = subject.and_then(|subject| found.iter_mut().find(|image| image.raw.digest == subject)) else { continue };
        if seen.insert(raw.digest) {
            let artifact = Artifact { manifest: raw, tag: entry.annotation(TAG).map(ToOwned::to_owned) };
            artifact.blobs()?.iter().try_for_each(|blob| has(blob, &artifact.manifest.digest))?;
            image.attached.push(artifact);
        }
    }
    Ok(found)
}

/// The name that an entry gives an image, when it can be one of the store: the
/// image's own name and some tag. An archive does not choose whose name it takes.
fn good_name(text: &str, name: &str) -> Option<String> {
    let tag = text.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')).unwrap_or(text);
    check_tag(tag).is_ok().then(|| format!("{name}:{tag}"))
}

/// Looks into the packs of what was found, through their maps.
fn check_blocks(store: &Store, found: &[Found]) -> Result<()> {
    for image in found {
        let what = || format!("load {}", image.raw.digest);
        let mut maps = Vec::new();
        for disk in &image.config.disks {
            let layer = remote::map_layer(&image.manifest, &disk.name).trying(what)?;
            let bytes = store.read_blob(&layer.digest, MAP_LIMIT.min(layer.size))?;
            maps.push(remote::read_map(&image.manifest, disk, &bytes).trying(what)?);
        }
        let mut frames = frames_of(&maps);
        let wanted: HashSet<Digest> = frames.values().flatten().map(|(_, _, block)| *block).collect();
        let local = Local::find(store, &wanted, &image.config.name)?;
        let mut packs = Vec::new();
        for pack in maps.iter().flat_map(|map| &map.packs) {
            packs.extend(frames.remove(&pack.digest).map(|frames| (pack, frames)));
        }
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            while let Some((pack, frames)) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                check_frames(&store.open_blob(&pack.digest)?, pack, frames, &local).trying(what)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let cores = std::thread::available_parallelism().map_or(1, usize::from).min(16);
            let threads: Vec<_> = (0..cores.min(packs.len())).map(|_| scope.spawn(work)).collect();
            let broken = |_| Err(Error::new(Code::Failed, "looking into the packs failed"));
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(broken))
        })?;
    }
    Ok(())
}

/// Tells how far an archive was read.
struct Metered<'a, R> {
    inner: R,
    meter: &'a Meter,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(into)?;
        self.meter.add(count as u64);
        Ok(count)
    }
}

/// Writes an archive to a file that appears when it is whole.
///
/// # Errors
/// As [`save`]; [`Code::Usage`] when the file is there and may not be replaced.
pub fn save_to(store: &Store, images: &[Reference], file: &Path, replace: bool, reports: &Reports) -> Result<Saved> {
    if file.exists() && !replace {
        return Err(Error::new(Code::Usage, format!("{} is there already", file.display())).next("name another file, or add --force"));
    }
    let what = || format!("write {}", file.display());
    let absolute = std::path::absolute(file).trying(what)?;
    let name = absolute.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let part = Part(absolute.with_file_name(format!(".{name}.{}", std::process::id())));
    let mut out = File::create(&part.0).trying(what)?;
    let saved = save(store, images, &mut out, reports).trying(what)?;
    std::fs::rename(&part.0, &absolute).trying(what)?;
    Ok(saved)
}

/// A file that is removed unless it was renamed.
struct Part(std::path::PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}
