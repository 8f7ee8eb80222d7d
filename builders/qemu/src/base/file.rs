//! `[base] file`: a disk of this machine, used in place: never copied, never
//! written to. It must not change while a bake runs; that it did is noticed at
//! the bake's end, and is an error.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use async_trait::async_trait;
use kiln_model::base::{Base, BaseSource};
use kiln_model::kind::Kind;
use kiln_model::machine::Context;
use kiln_model::settings::{Node, Problems, Reader};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use serde::{Deserialize, Serialize};

use super::cache::{Card, Shelf, read_card, write_card};
use super::checksum::{Algorithm, Hasher};
use super::download::digest_into;
use super::inspect;

/// Reads `file` of `[base]`.
pub(super) struct FileKind {
    cache: PathBuf,
}

impl FileKind {
    pub(super) fn new(cache: PathBuf) -> Self {
        Self { cache }
    }
}

impl Kind<dyn BaseSource> for FileKind {
    fn name(&self) -> &'static str {
        "file"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["file"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn BaseSource>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[base]", problems)?;
        let entry = reader.entry("file");
        let path = reader.existing_path("file", folder, problems);
        reader.finish(problems);
        let (entry, path) = (entry?, path?);
        let path = std::path::absolute(&path).unwrap_or(path);
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => {
                problems.add(entry.node.place, "`file` must be a file that holds a disk").help(format!("looked at {}", path.display()));
            }
            Err(error) => {
                problems.add(entry.node.place, format!("cannot read `file`: {error}")).help(format!("looked at {}", path.display()));
            }
        }
        let shown = if let kiln_model::settings::Value::String(text) = &entry.node.value { text.as_str() } else { "" };
        (problems.0.len() == before).then(|| Box::new(FileSource::new(&self.cache, shown, path)) as _)
    }
}

/// What tells one state of a file from another without reading it. The time of
/// the last change of status is among it, since the other one can be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    size: u64,
    device: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).trying(|| format!("read {}", path.display()))?;
        Ok(Self {
            size: meta.len(),
            device: meta.dev(),
            inode: meta.ino(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// What `base.json` says of a base that is used in place.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Place {
    path: PathBuf,
    stamp: Stamp,
    /// Digest of the file's bytes.
    content: Digest,
    base: Card,
}

struct FileSource {
    /// As the template has it.
    shown: String,
    path: PathBuf,
    shelf: Shelf,
    /// `cache/bases/<id>/base.json`.
    card: PathBuf,
    /// As it was when it was fetched.
    fetched: Mutex<Option<Stamp>>,
}

impl FileSource {
    fn new(cache: &Path, shown: &str, path: PathBuf) -> Self {
        let id = format!("file-{}", Digest::of(path.as_os_str().as_encoded_bytes()).hex());
        let card = cache.join("bases").join(&id).join("base.json");
        Self { shown: shown.to_owned(), shelf: Shelf::new(cache, &id), path, card, fetched: Mutex::new(None) }
    }

    fn changing(&self) -> Error {
        Error::new(Code::Base, format!("the base {} changed while the bake ran", self.path.display()))
            .next("let nothing write to it during a bake (no machine may run from it), then bake again")
    }

    /// Digests the file, and looks what it is, unless that is known.
    async fn read(&self, known: Option<&Place>, stamp: Stamp, context: &Context) -> Result<Place> {
        let what = || format!("read the base {}", self.path.display());
        let mut file = File::open(&self.path).trying(what)?;
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let reports = context.reports.clone();
        let mut told = std::time::Instant::now();
        let mut progress = move |done| {
            if told.elapsed().as_millis() >= 100 {
                told = std::time::Instant::now();
                reports.progress("base", done, Some(stamp.size));
            }
        };
        digest_into(&mut file, &mut hasher, &mut progress).await.trying(what)?;
        let content = hasher.finish().to_string().parse::<Digest>().trying(what)?;
        let base = match known {
            Some(known) if known.content == content => known.base.clone(),
            known => {
                if known.is_some() {
                    context.reports.note(format!("the base {} has changed since it was last used", self.shown));
                }
                let found = inspect(&self.path, &format!("the file {}", self.path.display()), &context.work).await?;
                Card::new(&self.label(), &found.disk, stamp.size, found.firmware, None)
            }
        };
        if Stamp::of(&self.path)? != stamp {
            return Err(self.changing());
        }
        Ok(Place { path: self.path.clone(), stamp, content, base })
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Option<Stamp>> {
        self.fetched.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[async_trait]
impl BaseSource for FileSource {
    fn label(&self) -> String {
        format!("file {}", self.shown)
    }

    fn known(&self) -> Result<Option<Digest>> {
        let Some(place) = read_card::<Place>(&self.card)? else { return Ok(None) };
        if place.stamp != Stamp::of(&self.path)? {
            return Ok(None);
        }
        Ok(place.base.disk)
    }

    async fn fetch(&self, fresh: bool, context: &Context) -> Result<Base> {
        let _making = self.shelf.making(&self.label(), context).await?;
        let stamp = Stamp::of(&self.path)?;
        let known = read_card::<Place>(&self.card)?;
        let place = match known {
            Some(place) if place.stamp == stamp && !fresh => place,
            known => {
                let place = self.read(known.as_ref(), stamp, context).await?;
                write_card(&self.card, &place)?;
                place
            }
        };
        *self.seen() = Some(place.stamp);
        let format = || Error::new(Code::Corrupt, format!("{} is of another kiln", self.card.display())).next("remove it");
        place.base.base(&self.label(), self.path.clone()).ok_or_else(format)
    }

    fn remember(&self, base: &Base, digest: &Digest) -> Result<()> {
        let fetched = self.seen().clone();
        if base.file()?.path != self.path || fetched.as_ref() != Some(&Stamp::of(&self.path)?) {
            return Err(self.changing());
        }
        // Another bake may have found the file in another state by now.
        let Some(mut place) = read_card::<Place>(&self.card)?.filter(|p| Some(&p.stamp) == fetched.as_ref()) else { return Ok(()) };
        let known = Some(*digest);
        if place.base.disk != known {
            place.base.disk = known;
            write_card(&self.card, &place)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
