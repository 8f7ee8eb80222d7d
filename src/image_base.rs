//! Images as bases: for `[base] image = "…"` and for `kiln run`. One at a
//! registry is pulled into the store first.
//!
//! A machine starts from a file, so an image's disk is unpacked once, named by
//! its disk digest, and kept in the cache, which can be removed at any time.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use kiln_bake::trial::Unpacked;
use kiln_model::base::{Base, BaseDisk, BaseSource, DiskFile, DiskFormat};
use kiln_model::checkpoint::Hold;
use kiln_model::event::Reports;
use kiln_model::home::Home;
use kiln_model::kind::Kind;
use kiln_model::machine::Context;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::settings::{Node, Problems, Reader};
use kiln_model::{Code, Digest, Result, ResultExt as _};
use kiln_store::revoke::revoked;
use kiln_store::{Place, Store};

use crate::network;

/// `[base] image = "…"`.
pub(crate) struct ImageKind(Home);

impl ImageKind {
    pub(crate) fn new(home: Home) -> Self {
        Self(home)
    }
}

impl Kind<dyn BaseSource> for ImageKind {
    fn name(&self) -> &'static str {
        "image"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["image"]
    }

    fn read(&self, settings: &Node, _: &Path, problems: &mut Problems) -> Option<Box<dyn BaseSource>> {
        let mut reader = Reader::new(settings, "[base]", problems)?;
        let place = reader.entry("image")?.node.place;
        let text = reader.string("image", problems)?;
        match text.parse::<Reference>() {
            Ok(reference) => Some(Box::new(ImageSource {
                home: self.0.clone(),
                reference,
                pinned: None,
                fetched: Mutex::default(),
                in_use: Mutex::default(),
            })),
            Err(error) => {
                let problem = problems.add(place, error.to_string());
                if let Some(next) = error.next_move() {
                    problem.help(next);
                }
                None
            }
        }
    }
}

struct ImageSource {
    home: Home,
    reference: Reference,
    pinned: Option<Digest>,
    /// What it was when it was fetched.
    fetched: Mutex<Option<Digest>>,
    in_use: Mutex<Option<File>>,
}

impl ImageSource {
    /// What to ask for: what another template of the same call has baked is
    /// in the store, whatever the reference says.
    fn wanted(&self) -> Reference {
        match self.pinned {
            Some(digest) => in_store(&self.reference, digest),
            None => self.reference.clone(),
        }
    }
}

#[async_trait]
impl BaseSource for ImageSource {
    fn label(&self) -> String {
        self.reference.to_string()
    }

    fn known(&self) -> Result<Option<Digest>> {
        let store = Store::open(&self.home.store())?;
        let wanted = self.wanted();
        let fetched = *self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let digest = match (&wanted.registry, fetched, &wanted.pointer) {
            (_, Some(digest), _) => digest,
            (None, None, _) => store.resolve(&wanted)?,
            (Some(_), None, Pointer::Digest(digest)) => *digest,
            // Where a tag of a registry leads, the registry alone knows.
            (Some(_), None, _) => return Ok(None),
        };
        match store.image(&digest) {
            Ok(image) => Ok(image.config.as_base()),
            Err(error) if error.kind() == Code::NotFound && wanted.registry.is_some() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn image(&self) -> Option<&Reference> {
        Some(&self.reference)
    }

    fn pin(&mut self, image: Digest) {
        self.pinned = Some(image);
    }

    async fn fetch(&self, _fresh: bool, context: &Context) -> Result<Base> {
        let store = Store::open(&self.home.store())?;
        let digest = network::bring(&self.home, &store, &self.wanted(), None, &context.reports).await?;
        let image = store.image(&digest)?;
        if image.disk_digest().is_none() && !image.config.cloud.is_empty() {
            *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = Some(digest);
            return Ok(Base {
                label: self.label(),
                disk: BaseDisk::Cloud(image.config.cloud),
                firmware: image.config.firmware,
                architecture: image.config.architecture,
                credentials: image.config.credentials.then_some(true),
            });
        }
        let (base, lock) = unpack(&self.home, &store, &in_store(&self.reference, digest), context).await?;
        *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = Some(digest);
        *self.in_use.lock().unwrap_or_else(PoisonError::into_inner) = Some(lock);
        Ok(Base { label: self.label(), ..base })
    }

    fn remember(&self, _: &Base, _: &Digest) -> Result<()> {
        // The store knows its own images.
        Ok(())
    }
}

/// The image `digest` of the store, under the name of a reference.
fn in_store(reference: &Reference, digest: Digest) -> Reference {
    Reference { registry: None, name: reference.name.clone(), pointer: Pointer::Digest(digest) }
}

/// Refuses an image that was revoked, or was baked from one that was; says so
/// where that is allowed.
pub(crate) async fn refuse_revoked(
    place: &dyn Place,
    reference: &Reference,
    digest: &Digest,
    allow: bool,
    reports: &Reports,
) -> Result<()> {
    match revoked(place, digest).await? {
        None => Ok(()),
        Some(revoked) if allow => {
            reports.warn(format!("{reference} was revoked, and is used all the same: {}", revoked.why));
            Ok(())
        }
        Some(revoked) => Err(revoked.refuse(&reference.to_string(), digest)),
    }
}

/// Unpacks the root disk of an image into the cache, unless it is there; from a
/// registry the image comes into the store first. The file stays as long as the
/// lock that is given with it is held.
pub(crate) async fn unpack(home: &Home, store: &Store, reference: &Reference, context: &Context) -> Result<(Base, File)> {
    let digest = network::bring(home, store, reference, None, &context.reports).await?;
    let image = store.image(&digest)?;
    let record = store.record(&digest)?;
    let size = record.map.size;
    let path = disks(home)?.join(format!("{}.raw", record.digest.hex()));
    let lock = loop {
        // Others may use it at the same time; nobody may remove it.
        let shared = locked(&path, File::lock_shared).await?;
        if path.exists() {
            break shared;
        }
        drop(shared);
        let _alone = locked(&path, File::lock).await?;
        if path.exists() {
            continue;
        }
        let temp = context.work.join(format!("{}.raw", record.digest.hex()));
        let (store, record, reports, to) = (store.clone(), record.clone(), context.reports.clone(), temp.clone());
        let unpacked = tokio::task::spawn_blocking(move || {
            store.materialise(&record, &to, &mut |done, total| reports.progress("unpack", done, Some(total)))
        });
        unpacked.await.trying(|| "unpack the image".into())??;
        std::fs::rename(&temp, &path).trying(|| format!("keep the unpacked disk {}", path.display()))?;
    };
    let base = Base {
        label: reference.to_string(),
        disk: DiskFile { path, format: DiskFormat::Raw, size }.into(),
        firmware: image.config.firmware,
        architecture: image.config.architecture,
        // `false` is also what an older image says that was never asked.
        credentials: image.config.credentials.then_some(true),
    };
    Ok((base, lock))
}

/// Unpacks images of the store for tests.
pub(crate) fn unpacking(home: &Home, store: &Store) -> impl Fn(Digest, Context) -> Unpacked + Send + Sync + use<> {
    let (home, store) = (home.clone(), store.clone());
    move |digest, context| {
        let (home, store) = (home.clone(), store.clone());
        Box::pin(async move {
            let image = Reference { registry: None, name: store.image(&digest)?.config.name, pointer: Pointer::Digest(digest) };
            let (base, lock) = unpack(&home, &store, &image, &context).await?;
            let hold: Hold = std::sync::Arc::new(lock);
            Ok((base, hold))
        })
    }
}

/// Where unpacked disks are.
pub(crate) fn disks(home: &Home) -> Result<PathBuf> {
    let folder = home.cache().join("disks");
    std::fs::create_dir_all(&folder).trying(|| format!("make the folder {}", folder.display()))?;
    Ok(folder)
}

/// The lock beside an unpacked disk, taken with `how`.
async fn locked(path: &Path, how: fn(&File) -> std::io::Result<()>) -> Result<File> {
    let lock = path.with_extension("lock");
    let locked = tokio::task::spawn_blocking(move || {
        let file = File::options().create(true).append(true).open(&lock)?;
        how(&file).map(|()| file)
    });
    locked.await.trying(|| "wait for a lock".into())?.trying(|| format!("lock {}", path.display()))
}
