//! Digests of files that were read before, by where they lie on their disks.
//!
//! A bake that ran its last step again leaves nearly every file where it was,
//! in blocks that are what they were: what lies at the same [place] has the same
//! bytes, whatever disk it is on, and is not read again.
//!
//! The file can be lost at any time: it ends with a digest of itself, and what
//! does not fit that is as good as none.
//!
//! [place]: kiln_model::machine::Entry::place

use std::collections::HashMap;
use std::io;
use std::path::Path;

use kiln_model::Digest;

const MAGIC: &[u8; 16] = b"kiln-files-v1\n\0\0";
/// Most entries that are kept, the newest of them: 16 MiB.
const MOST: usize = 1 << 18;

/// What is known.
#[derive(Debug, Default)]
pub struct Known {
    digests: HashMap<Digest, Digest>,
    /// In the order in which they came.
    order: Vec<Digest>,
    new: usize,
}

impl Known {
    /// What a file holds; nothing where there is none, or it is damaged.
    pub fn load(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_default();
        let mut known = Self::default();
        let Some((body, sum)) = bytes.split_last_chunk::<32>() else { return known };
        let Some(entries) = body.strip_prefix(MAGIC.as_slice()) else { return known };
        if Digest::of(body).as_bytes() != sum || entries.len() % 64 != 0 {
            return known;
        }
        for entry in entries.chunks_exact(64) {
            if let (Some(place), Some(digest)) = (entry.first_chunk::<32>(), entry.last_chunk::<32>()) {
                known.put(Digest::from_bytes(*place), Digest::from_bytes(*digest));
            }
        }
        known.new = 0;
        known
    }

    /// The digest of the file that lies at `place`.
    pub fn get(&self, place: &Digest) -> Option<Digest> {
        self.digests.get(place).copied()
    }

    /// Adds a file.
    pub fn put(&mut self, place: Digest, digest: Digest) {
        if self.digests.insert(place, digest).is_none() {
            self.order.push(place);
            self.new += 1;
        }
    }

    /// Writes it, unless nothing is new. Of two at the same time the last one
    /// stays, which costs some reading.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        if self.new == 0 {
            return Ok(());
        }
        let first = self.order.len().saturating_sub(MOST);
        let mut bytes = MAGIC.to_vec();
        for place in &self.order[first..] {
            if let Some(digest) = self.digests.get(place) {
                bytes.extend(place.as_bytes());
                bytes.extend(digest.as_bytes());
            }
        }
        let sum = Digest::of(&bytes);
        bytes.extend(sum.as_bytes());
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        io::Write::write_all(&mut file, &bytes)?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_damage_is_as_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/files");
        let mut known = Known::load(&path);
        known.save(&path).unwrap();
        assert!(!path.exists(), "nothing to write");
        for name in ["a", "b"] {
            known.put(Digest::of(name), Digest::of(format!("content of {name}")));
        }
        known.save(&path).unwrap();
        let again = Known::load(&path);
        assert_eq!(again.get(&Digest::of("a")), Some(Digest::of("content of a")));
        assert_eq!((again.get(&Digest::of("c")), again.new), (None, 0));

        let whole = std::fs::read(&path).unwrap();
        for at in [0, 20, 100, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert!(Known::load(&path).digests.is_empty(), "{at}");
        }
        std::fs::write(&path, &whole[..whole.len() - 64]).unwrap();
        assert!(Known::load(&path).digests.is_empty());
    }

    #[test]
    fn it_is_bounded_and_the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("files");
        let place = |n: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            Digest::from_bytes(bytes)
        };
        let mut known = Known::default();
        (0..MOST + 10).for_each(|n| known.put(place(n), place(n)));
        known.save(&path).unwrap();
        let again = Known::load(&path);
        assert_eq!(again.digests.len(), MOST);
        assert_eq!((again.get(&place(9)), again.get(&place(10))), (None, Some(place(10))));
    }
}
