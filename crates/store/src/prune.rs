//! Removing what nothing needs: mark and sweep, safe beside running bakes.

use std::collections::{HashMap, HashSet};

use kiln_model::Digest;
use kiln_model::error::{Result, ResultExt};
use kiln_model::image::{KIND, KIND_BASE};

use crate::artifacts;
use crate::blobs::Store;
use crate::index::{BASE_DISK, CONFIG_DIGEST, Index, REF_NAME, ROOT_DISK};
use crate::lease;
use crate::manifest::{Descriptor, INDEX, MANIFEST, MANIFEST_LIMIT, Manifest, links, parse_config};

/// How many states of each channel [`Store::prune`] keeps unless it is said.
pub const HISTORY: usize = 10;

/// What [`Store::prune`] keeps beside what has a name.
#[derive(Debug, Clone)]
pub struct Keep {
    /// Keep the disks that bakes start from: of each base the newest.
    pub bases: bool,
    /// Of each channel keep the images of this many states, and those that as
    /// many rollbacks could reach. Where a channel is stays in any case.
    pub history: usize,
    /// Keep these blobs, and what they need when they are manifests.
    pub also: Vec<Digest>,
    /// Remove nothing, only say what would be.
    pub dry_run: bool,
}

impl Default for Keep {
    fn default() -> Self {
        Self { bases: false, history: HISTORY, also: Vec::new(), dry_run: false }
    }
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Manifests that had no name any more, and bases if those were not kept.
    pub manifests: Vec<Digest>,
    /// How many blobs, manifests included.
    pub blobs: usize,
    /// How many bytes.
    pub bytes: u64,
    /// Temporary files of writers that are gone, and packs that nobody goes on
    /// fetching.
    pub leftovers: usize,
}

impl Store {
    /// Removes manifests without a name and blobs that no manifest needs. What
    /// stays: what a channel is or was lately at, what an image that stays was
    /// baked from, what is attached to either, and what a living process holds
    /// (a bake that has not published yet, a machine that is being started, a
    /// promotion).
    ///
    /// # Errors
    /// [`kiln_model::Code::Corrupt`] when a manifest or a channel cannot be
    /// read: then it is not known what it needs, and nothing is removed.
    pub fn prune(&self, keep: &Keep) -> Result<Pruned> {
        let (temp, file) = self.temp()?;
        let _index_lock = self.lock_index()?;
        let _blobs_lock = self.removing()?;
        let held = lease::living(&self.leases())?;
        let before = self.index()?;
        let roots = self.roots(&before, keep, &held.digests)?;
        let mut index = before.clone();
        index.manifests.retain(|entry| roots.contains(&entry.digest));
        let mut needed: HashSet<Digest> = held.digests.iter().chain(&keep.also).copied().collect();
        for entry in &index.manifests {
            self.mark(entry, &mut needed, 0)?;
        }

        let mut pruned = Pruned::default();
        let gone = before.manifests.iter().map(|entry| entry.digest).filter(|digest| !roots.contains(digest));
        pruned.manifests = gone.collect::<HashSet<_>>().into_iter().collect();
        pruned.manifests.sort();
        if !keep.dry_run {
            // The index first: a crash must not leave a name without its image.
            if index != before {
                self.put_index(&index, temp, file)?;
            }
            pruned.leftovers = self.clear_tmp(&held)? + self.clear_partial()?;
        }
        let what = || format!("read {}", self.blobs().display());
        for entry in std::fs::read_dir(self.blobs()).trying(what)? {
            let entry = entry.trying(what)?;
            let digest = entry.file_name().to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
            // What is no blob is not kiln's to remove.
            let Some(digest) = digest.filter(|digest| !needed.contains(digest)) else { continue };
            pruned.bytes += entry.metadata().map_or(0, |meta| meta.len());
            pruned.blobs += 1;
            if !keep.dry_run {
                std::fs::remove_file(entry.path()).trying(|| format!("remove blob {digest}"))?;
            }
        }
        Ok(pruned)
    }

    /// Which manifests of the index stay: those with a name, those that a
    /// channel needs, what these were baked from, and what is attached to one
    /// that stays.
    fn roots(&self, index: &Index, keep: &Keep, held: &HashSet<Digest>) -> Result<HashSet<Digest>> {
        // After the leases were read: a promotion holds its image until its
        // record is written.
        let channels = self.channel_images(keep.history.max(1))?;
        let (mut roots, mut lineage) = (HashSet::new(), Lineage::default());
        let mut attached: HashMap<Digest, Vec<Digest>> = HashMap::new();
        for entry in &index.manifests {
            let base = entry.annotation(KIND) == Some(KIND_BASE);
            // The bare name of a base is at its newest disk.
            let named = entry.annotation(REF_NAME).is_some_and(|name| !base || keep.bases && !name.contains(':'));
            let wanted = [held, &channels].iter().any(|set| set.contains(&entry.digest)) || keep.also.contains(&entry.digest);
            if named || wanted {
                roots.insert(entry.digest);
            } else if let Some(subject) = artifacts::subject(entry) {
                attached.entry(subject).or_default().push(entry.digest);
            } else if !base && entry.annotation(CONFIG_DIGEST).is_none() {
                let subject = links(&self.read_blob(&entry.digest, MANIFEST_LIMIT)?)?.subject;
                attached.entry(subject.unwrap_or(entry.digest)).or_default().push(entry.digest);
            }
            // Bases that nobody baked can be made again, and go as they are told to.
            if !base {
                self.trace(entry, &mut lineage)?;
            }
        }
        let indexes: HashSet<Digest> = index.manifests.iter().filter(|entry| entry.media_type == INDEX).map(|entry| entry.digest).collect();
        let mut new: Vec<Digest> = roots.iter().copied().collect();
        while let Some(digest) = new.pop() {
            let followers = attached.remove(&digest).unwrap_or_default();
            let before = lineage.base.get(&digest).and_then(|disk| lineage.with_root.get(disk)).cloned().unwrap_or_default();
            // What is attached to one architecture of several stays with all of them.
            let parts = if indexes.contains(&digest) { links(&self.read_blob(&digest, MANIFEST_LIMIT)?)?.manifests } else { Vec::new() };
            for next in followers.into_iter().chain(before).chain(parts.into_iter().map(|part| part.digest)) {
                if roots.insert(next) {
                    new.push(next);
                }
            }
        }
        Ok(roots)
    }

    /// Notes the disk that an image was baked from, and its own.
    fn trace(&self, entry: &Descriptor, lineage: &mut Lineage) -> Result<()> {
        let disk = |key: &str| entry.annotation(key).and_then(|text| text.parse::<Digest>().ok());
        let (mut root, mut base) = (disk(ROOT_DISK), disk(BASE_DISK));
        // An entry of an earlier kiln does not say what the image was baked from.
        if root.is_some() && base.is_none() && !lineage.seen.contains(&entry.digest) && entry.media_type == MANIFEST {
            let manifest = Manifest::parse(&self.read_blob(&entry.digest, MANIFEST_LIMIT)?)?;
            let config = parse_config(&self.read_blob(&manifest.config.digest, MANIFEST_LIMIT)?, &manifest.config.digest)?;
            (root, base) = (config.as_base(), config.base);
        }
        lineage.seen.insert(entry.digest);
        if let Some(root) = root {
            let images = lineage.with_root.entry(root).or_default();
            if !images.contains(&entry.digest) {
                images.push(entry.digest);
            }
        }
        if let Some(base) = base {
            lineage.base.insert(entry.digest, base);
        }
        Ok(())
    }

    /// Marks a blob, and what it needs.
    fn mark(&self, blob: &Descriptor, needed: &mut HashSet<Digest>, depth: u32) -> Result<()> {
        needed.insert(blob.digest);
        let more = [MANIFEST, INDEX].contains(&blob.media_type.as_str())
            || blob.media_type.starts_with("application/vnd.docker.distribution.manifest");
        // An index of indexes of indexes is nobody's image.
        if more && depth < 4 {
            let name = || format!("read manifest {}", blob.digest);
            for next in links(&self.read_blob(&blob.digest, MANIFEST_LIMIT).trying(name)?).trying(name)?.needs() {
                self.mark(next, needed, depth + 1)?;
            }
        }
        Ok(())
    }
}

/// Which image was baked from which, by the digests of their disks.
#[derive(Default)]
struct Lineage {
    /// The images that have a root disk.
    with_root: HashMap<Digest, Vec<Digest>>,
    /// The disk that an image was baked from.
    base: HashMap<Digest, Digest>,
    seen: HashSet<Digest>,
}
