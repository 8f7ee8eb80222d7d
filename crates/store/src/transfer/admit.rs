//! The last step of everything that comes into the store: one change of the
//! index, by which images, their names and what is attached appear at once.

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result};
use kiln_model::image::{CONFIG, Config, KIND, KIND_BASE};

use super::attached::Artifact;
use super::origin::Raw;
use crate::artifacts::{SUBJECT, TAG};
use crate::blobs::Store;
use crate::index::{AT, BASE_DISK, CONFIG_DIGEST, FIXED, Index, ROOT_DISK};
use crate::manifest::{Descriptor, MANIFEST, Manifest};
use crate::publish::{Moved, now, point};

/// Why a version that came from a registry never changes.
pub(crate) const PUSHED: &str = "pushed";

/// The names that an image gets when it comes into the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// It was asked for by this tag, which will be its name here too. A tag
    /// that is the image's version is fixed, as it is where it comes from.
    Tag(String),
    /// Its own name and version, if they are free.
    Version,
    /// These, as they are.
    These(Vec<String>),
}

/// An image whose blobs are all there and checked.
pub(crate) struct Admit<'a> {
    pub(crate) digest: Digest,
    /// Bytes of its manifest.
    pub(crate) size: u64,
    pub(crate) manifest: &'a Manifest,
    pub(crate) config: &'a Config,
    pub(crate) names: &'a Names,
    pub(crate) attached: &'a [Artifact],
}

impl Admit<'_> {
    fn entry(&self) -> Descriptor {
        let mut entry = Descriptor::new(MANIFEST, self.digest, self.size);
        entry.annotations.insert(AT.into(), now());
        debug_assert_eq!(self.manifest.config.media_type, CONFIG);
        entry.annotations.insert(CONFIG_DIGEST.into(), self.manifest.config.digest.to_string());
        if let Some(root) = self.config.as_base() {
            entry.annotations.insert(ROOT_DISK.into(), root.to_string());
        }
        if let Some(base) = &self.config.base {
            entry.annotations.insert(BASE_DISK.into(), base.to_string());
        }
        if self.manifest.annotations.get(KIND).is_some_and(|kind| kind == KIND_BASE) {
            entry.annotations.insert(KIND.into(), KIND_BASE.into());
        }
        entry
    }

    fn apply(&self, index: &mut Index) -> Result<Vec<Moved>> {
        let entry = self.entry();
        let name = &self.config.name;
        let version = format!("{name}:{}", self.config.version);
        let (sure, perhaps, fixed) = match self.names {
            Names::Tag(tag) => (vec![format!("{name}:{tag}")], vec![&version], *tag == self.config.version),
            Names::Version => (vec![], vec![&version], false),
            Names::These(names) => (names.clone(), vec![], false),
        };
        if !index.manifests.iter().any(|there| there.digest == entry.digest) {
            index.manifests.push(entry.clone());
        }
        let mut moved = Vec::new();
        for name in sure {
            moved.extend(point(index, &name, &entry)?);
        }
        for name in perhaps.into_iter().chain(std::iter::once(name)) {
            if index.entry(name).is_none() {
                index.point(name, entry.clone());
            }
        }
        if fixed && let Some(entry) = index.entry_mut(&version) {
            entry.annotations.entry(FIXED.into()).or_insert_with(|| PUSHED.into());
        }
        for artifact in self.attached {
            let entry = artifact.entry(&self.digest)?;
            let about = |there: &Descriptor| there.annotation(SUBJECT) == entry.annotation(SUBJECT);
            if index
                .manifests
                .iter()
                .any(|there| there.digest == entry.digest && about(there) && there.annotation(TAG) == entry.annotation(TAG))
            {
                continue;
            }
            // One that another program has put there says less; what was at
            // the same tag is in this one.
            let replaced = |there: &Descriptor| {
                there.digest == entry.digest
                    || entry.annotation(TAG).is_some() && about(there) && there.annotation(TAG) == entry.annotation(TAG)
            };
            index.manifests.retain(|there| !replaced(there));
            index.manifests.push(entry);
        }
        Ok(moved)
    }
}

impl Store {
    /// What comes to be attached to `subject`, so that signatures which are at
    /// the same tag here stay.
    pub(crate) fn merge_tagged(&self, subject: &Digest, coming: Vec<Artifact>) -> Result<Vec<Artifact>> {
        let mut merged = Vec::new();
        let there = super::attached::in_store(self, subject)?;
        for artifact in coming {
            let same = there.iter().find(|there| artifact.tag.is_some() && there.tag == artifact.tag);
            merged.push(match same {
                None => artifact,
                Some(same) => match artifact.merged(&same.manifest)? {
                    None => same.clone(),
                    Some(Raw { digest, media_type, bytes }) => {
                        self.write_blob(&bytes)?;
                        Artifact { manifest: Raw { digest, media_type, bytes }, tag: artifact.tag }
                    }
                },
            });
        }
        Ok(merged)
    }

    /// Makes images visible, all at once.
    pub(crate) fn admit(&self, images: &[Admit<'_>]) -> Result<Vec<Moved>> {
        self.update(|index| {
            let mut moved = Vec::new();
            for image in images {
                moved.extend(image.apply(index)?);
            }
            Ok(moved)
        })
    }

    /// Says early what [`Store::admit`] would refuse.
    pub(crate) fn may_name(&self, config: &Config, digest: &Digest, names: &Names) -> Result<()> {
        let names = match names {
            Names::Tag(tag) => vec![format!("{}:{tag}", config.name)],
            Names::Version => vec![],
            Names::These(names) => names.clone(),
        };
        let index = self.index()?;
        for name in names {
            if let Some(before) = index.entry(&name)
                && let Some(why) = before.annotation(FIXED)
                && before.digest != *digest
            {
                let what = format!(
                    "{name} was {why} as sha256:{}… and never changes; what comes is sha256:{}…",
                    before.digest.short(),
                    digest.short()
                );
                return Err(Error::new(Code::Refused, what).next(format!("`kiln untag {name}` is refused too: ask who published it twice")));
            }
        }
        Ok(())
    }
}
