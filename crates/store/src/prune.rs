//! Removing what nothing needs: mark and sweep, safe beside running bakes.

use std::collections::{HashMap, HashSet};

use kiln_model::Digest;
use kiln_model::error::{Result, ResultExt};
use kiln_model::image::{KIND, KIND_BASE};

use crate::blobs::Store;
use crate::index::{Index, REF_NAME};
use crate::lease;
use crate::manifest::{Descriptor, INDEX, MANIFEST, MANIFEST_LIMIT, links};

/// What [`Store::prune`] keeps beside what has a name.
#[derive(Debug, Clone, Default)]
pub struct Keep {
    /// Keep the disks that bakes start from: of each base the newest.
    pub bases: bool,
    /// Keep these blobs, and what they need when they are manifests.
    pub also: Vec<Digest>,
    /// Remove nothing, only say what would be.
    pub dry_run: bool,
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
    /// Temporary files of writers that are gone.
    pub leftovers: usize,
}

impl Store {
    /// Removes manifests without a name and blobs that no manifest needs. What
    /// a living process holds (a bake that has not published yet, a machine
    /// that is being started) stays.
    ///
    /// # Errors
    /// [`kiln_model::Code::Corrupt`] when a manifest cannot be read: then it is
    /// not known what it needs, and nothing is removed.
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
            pruned.leftovers = self.clear_tmp(&held)?;
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

    /// Which manifests of the index stay: those with a name, and what is
    /// attached to one that stays.
    fn roots(&self, index: &Index, keep: &Keep, held: &HashSet<Digest>) -> Result<HashSet<Digest>> {
        let mut roots = HashSet::new();
        let mut attached: HashMap<Digest, Vec<Digest>> = HashMap::new();
        for entry in &index.manifests {
            let base = entry.annotation(KIND) == Some(KIND_BASE);
            // The bare name of a base is at its newest disk.
            let named = entry.annotation(REF_NAME).is_some_and(|name| !base || keep.bases && !name.contains(':'));
            if named || held.contains(&entry.digest) || keep.also.contains(&entry.digest) {
                roots.insert(entry.digest);
            } else if !base && let Some(subject) = links(&self.read_blob(&entry.digest, MANIFEST_LIMIT)?)?.subject {
                attached.entry(subject).or_default().push(entry.digest);
            }
        }
        let mut new: Vec<Digest> = roots.iter().copied().collect();
        while let Some(digest) = new.pop() {
            for follower in attached.remove(&digest).unwrap_or_default() {
                if roots.insert(follower) {
                    new.push(follower);
                }
            }
        }
        Ok(roots)
    }

    /// Marks a blob, and what it needs.
    fn mark(&self, blob: &Descriptor, needed: &mut HashSet<Digest>, depth: u32) -> Result<()> {
        needed.insert(blob.digest);
        let more = [MANIFEST, INDEX].contains(&blob.media_type.as_str())
            || blob.media_type.starts_with("application/vnd.docker.distribution.manifest");
        // An index of indexes of indexes is nobody's image.
        if more && depth < 4 {
            let name = || format!("read manifest {}", blob.digest);
            for next in links(&self.read_blob(&blob.digest, MANIFEST_LIMIT).trying(name)?).trying(name)?.needs {
                self.mark(&next, needed, depth + 1)?;
            }
        }
        Ok(())
    }
}
