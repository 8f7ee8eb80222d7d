//! `kiln prune`: frees what no image needs.

use std::fs::File;
use std::path::Path;

use kiln_model::cleanup::remove_path;
use kiln_model::home::Home;
use kiln_model::{Result, ResultExt as _};
use kiln_store::Keep;
use serde_json::json;

use super::App;
use crate::cli::Prune;
use crate::image_base;
use crate::output::bytes;

pub(super) fn run(app: &App, arguments: &Prune) -> Result<u8> {
    let keep = Keep { bases: !arguments.cache, also: Vec::new(), dry_run: arguments.dry_run };
    let pruned = app.store()?.prune(&keep)?;
    // Unpacked disks can be made from the store at any time.
    let mut cached = unpacked_disks(&app.home, arguments.dry_run)?;
    if arguments.cache {
        cached += kiln_qemu::base::prune(&app.home.cache(), arguments.dry_run)?;
    }
    let value = json!({
        "blobs": pruned.blobs, "bytes": pruned.bytes, "manifests": pruned.manifests, "cache_bytes": cached, "dry_run": arguments.dry_run,
    });
    app.output.result(&value, || {
        let verb = if arguments.dry_run { "would free" } else { "freed" };
        format!("{verb} {} in {} blobs, and {} of cache", bytes(pruned.bytes), pruned.blobs, bytes(cached))
    });
    Ok(0)
}

/// Removes unpacked disks that no machine uses; gives their bytes.
fn unpacked_disks(home: &Home, dry_run: bool) -> Result<u64> {
    let folder = image_base::disks(home)?;
    let mut freed = 0;
    for entry in std::fs::read_dir(&folder).trying(|| format!("read {}", folder.display()))?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "raw") && !in_use(&path) {
            freed += entry.metadata().map_or(0, |meta| std::os::unix::fs::MetadataExt::blocks(&meta) * 512);
            if !dry_run {
                remove_path(&path)?;
            }
        }
    }
    Ok(freed)
}

fn in_use(path: &Path) -> bool {
    File::open(path.with_extension("lock")).is_ok_and(|lock| lock.try_lock().is_err())
}
