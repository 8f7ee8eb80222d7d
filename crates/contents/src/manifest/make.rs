//! Makes a manifest of the files of a disk.

use std::collections::BTreeMap;
use std::thread;

use kiln_model::machine::{EntryKind, Files};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};

use super::{Installed, Known, Manifest, Node, NodeKind, is_volatile, units};
use crate::packages;
use crate::text;

/// A manifest in which digests of files are missing.
#[derive(Debug)]
pub struct Surveyed {
    manifest: Manifest,
    /// Paths of files whose digests are not known, in the order in which they
    /// lie on the disk, and their places.
    missing: Vec<(Vec<u8>, Option<Digest>)>,
}

/// Walks through a disk; digests of files that lie where they lay before are
/// taken from `known`.
///
/// # Errors
/// When the file system or a package database is damaged.
pub fn survey(files: &dyn Files, known: &Known) -> Result<Surveyed> {
    let mut nodes = BTreeMap::new();
    let mut missing = Vec::new();
    for entry in files.walk()? {
        let entry = entry?;
        if is_volatile(&entry.path) {
            continue;
        }
        let kind = NodeKind::of(&entry.kind);
        let mut digest = None;
        if kind == NodeKind::File {
            digest = match entry.place {
                _ if entry.size == 0 => Some(Digest::of(b"")),
                Some(place) => known.get(&place),
                None => None,
            };
            if digest.is_none() {
                missing.push((entry.position, entry.path.clone(), entry.place));
            }
        }
        let target = if let EntryKind::Link(target) = entry.kind { target } else { Vec::new() };
        // A link's own mode means nothing.
        let mode = if kind == NodeKind::Link { 0o777 } else { entry.mode };
        let (uid, gid, size, attributes) = (entry.uid, entry.gid, entry.size, entry.attributes);
        nodes.insert(entry.path, Node { kind, mode, uid, gid, size, digest, target, attributes });
    }
    missing.sort();
    let mut packages: Vec<Installed> = packages::read(files)?.packages.iter().map(Installed::from).collect();
    packages.sort();
    let units = units::read(&nodes);
    let missing = missing.into_iter().map(|(_, path, place)| (path, place)).collect();
    Ok(Surveyed { manifest: Manifest { nodes, packages, units }, missing })
}

impl Surveyed {
    /// How many digests are missing.
    pub fn missing(&self) -> usize {
        self.missing.len()
    }
}

/// Reads the files whose digests are missing, as many at once as there are
/// `readers` of the same disk, and remembers their digests in `known`.
///
/// # Errors
/// When a file cannot be read.
pub fn digest_files(surveyed: Surveyed, readers: &mut [Box<dyn Files>], known: &mut Known) -> Result<Manifest> {
    let Surveyed { mut manifest, missing } = surveyed;
    if missing.is_empty() {
        return Ok(manifest);
    }
    // Neighbours on the disk go to the same reader: they share blocks.
    let share = missing.len().div_ceil(readers.len().max(1));
    let digests: Vec<Result<Vec<Digest>>> = thread::scope(|scope| {
        let threads: Vec<_> = missing
            .chunks(share)
            .zip(readers.iter_mut())
            .map(|(paths, files)| scope.spawn(move || paths.iter().map(|(path, _)| digest(&**files, path)).collect()))
            .collect();
        let gone = || Error::new(Code::Failed, "reading the image's files ended unexpectedly");
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(gone()))).collect()
    });
    let mut all = Vec::new();
    for part in digests {
        all.extend(part?);
    }
    for ((path, place), digest) in missing.into_iter().zip(all) {
        if let Some(place) = place {
            known.put(place, digest);
        }
        if let Some(node) = manifest.nodes.get_mut(&path) {
            node.digest = Some(digest);
        }
    }
    Ok(manifest)
}

fn digest(files: &dyn Files, path: &[u8]) -> Result<Digest> {
    let mut reader = files.open(path)?;
    Digest::of_reader(&mut *reader).map(|(digest, _)| digest).trying(|| format!("read {} of the image", text::shown(path)))
}
