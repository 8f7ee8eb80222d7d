//! Bases that can be started under QEMU: built from Debian's packages, or a
//! disk from an address or a file. The fourth kind, an image, is the binary's,
//! since it needs the store.
//!
//! ```text
//!  [base] ──► Kind::read ──► BaseSource::fetch ──► Base
//!              debian           suite.rs ── debian.rs (mmdebstrap) ─┐
//!              url              url.rs ──── download.rs ────────────┤ cache.rs
//!              file             file.rs ─── (used in place)         ┘
//! ```

use std::path::{Path, PathBuf};

use kiln_disk::qemu_img;
use kiln_model::base::{BaseSource, DiskFile, DiskFormat};
use kiln_model::image::Firmware;
use kiln_model::kind::Kind;
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_process as process;

mod cache;
mod checksum;
mod debian;
mod download;
mod file;
mod firmware;
mod http;
mod layout;
mod suite;
#[cfg(test)]
mod testing;
mod url;

pub use debian::remove as remove_half_built;

/// What the site says of its network. Holds while a base is made, and enters
/// no image.
#[derive(Debug, Clone, Default)]
pub struct Site {
    /// Proxy for http and https, `http://host:port`. Without one, what the
    /// environment says (`https_proxy`, `no_proxy`).
    pub proxy: Option<String>,
    /// Mirror of Debian's archive, in place of Debian's own.
    pub mirror: Option<String>,
    /// A file of PEM certificates to trust beside the system's.
    pub ca_certificates: Option<PathBuf>,
}

/// The kinds of bases that this builder knows: `debian`, `url`, `file`.
///
/// They are cached below `cache`.
pub fn kinds(cache: PathBuf, site: Site) -> Vec<Box<dyn Kind<dyn BaseSource>>> {
    vec![
        Box::new(suite::DebianKind::new(cache.clone(), site.clone())),
        Box::new(url::UrlKind::new(cache.clone(), site)),
        Box::new(file::FileKind::new(cache)),
    ]
}

/// Bytes on disk that [`prune`] freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Of bases.
    pub bases: u64,
    /// Of downloads that came in part.
    pub downloads: u64,
}

/// Removes every base below `cache` that nobody makes or uses, and the parts of
/// downloads. They are made again when they are needed.
///
/// # Errors
/// When the cache cannot be read or a base cannot be removed.
pub fn prune(cache: &Path, dry_run: bool) -> Result<Pruned> {
    Ok(Pruned { bases: cache::prune(cache, dry_run)?, downloads: cache::prune_downloads(cache, dry_run)? })
}

/// What a file that is to be a base turned out to be.
#[derive(Debug)]
struct Inspected {
    disk: DiskFile,
    firmware: Firmware,
}

/// Recognises the disk in the file at `path` by its content. `what` names it
/// for people. `work` is a folder for files that are removed again.
///
/// # Errors
/// [`Code::Base`] when it is compressed, damaged or not a disk, or when it has a
/// backing or data file.
async fn inspect(path: &Path, what: &str, work: &Path) -> Result<Inspected> {
    let start = head(path)?;
    if let Some(found) = firmware::compression(&start) {
        let next = format!("decompress it (`{} FILE`) and use the result with `file = \"…\"` in [base]", found.undo);
        return Err(
            Error::new(Code::Base, format!("{what} is compressed with {}, and kiln does not decompress bases", found.name)).next(next)
        );
    }
    let disk = qemu_img::probe(path).await.map_err(|error| {
        let code = if error.kind() == Code::Failed { Code::Base } else { error.kind() };
        let next = error.next_move().map(str::to_owned);
        let outer = Error::new(code, format!("{what} cannot be used as a base")).because(error);
        if let Some(next) = next { outer.next(next) } else { outer }
    })?;
    let firmware = match disk.format {
        DiskFormat::Raw => firmware::firmware(&start),
        // Not worth an error: it is started either way then.
        DiskFormat::Qcow2 => raw_head(path, work).await.map_or(Firmware::BiosUefi, |start| firmware::firmware(&start)),
    };
    Ok(Inspected { disk, firmware })
}

/// The first bytes of a file.
fn head(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let mut start = Vec::with_capacity(firmware::HEAD);
    let mut read = || std::fs::File::open(path)?.take(firmware::HEAD as u64).read_to_end(&mut start);
    read().trying(|| format!("read {}", path.display()))?;
    Ok(start)
}

/// The first bytes of the disk in a qcow2, taken out by qemu-img.
async fn raw_head(path: &Path, work: &Path) -> Result<Vec<u8>> {
    let out = tempfile::Builder::new().prefix("head").tempfile_in(work).trying(|| format!("make a file in {}", work.display()))?;
    let argument = |name: &str, path: &Path| {
        let mut text = std::ffi::OsString::from(name);
        text.push(path);
        text
    };
    let mut command = process::piped("qemu-img");
    command.args(["dd", "-U", "-f", "qcow2", "-O", "raw", "count=1"]).arg(format!("bs={}", firmware::HEAD));
    command.arg(argument("if=", path)).arg(argument("of=", out.path()));
    process::run_async(command).await?;
    head(out.path())
}
