//! `kiln prune`: frees what no image needs, and what the cache holds beyond its
//! budget. With `--cache` all that can be made again goes; what somebody uses
//! stays in any case.

use std::fs::File;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_bake::explain::span;
use kiln_cache::Listed;
use kiln_model::cleanup::remove_path;
use kiln_model::home::Home;
use kiln_model::{Key, Result, ResultExt as _};
use kiln_store::Keep;
use serde::Serialize;

use super::App;
use crate::cli::Prune;
use crate::image_base;
use crate::output::{ago, bytes, seconds, table};

pub(super) fn run(app: &App, arguments: &Prune) -> Result<u8> {
    let dry_run = arguments.dry_run;
    let checkpoints = app.checkpoints()?;
    // Before anything goes.
    let listed = if arguments.cache && dry_run { Some(checkpoints.list()?) } else { None };
    let keep = Keep { bases: !arguments.cache, also: Vec::new(), dry_run };
    let store = app.store()?.prune(&keep)?;
    let target = if arguments.cache { None } else { Some(checkpoints.usage()?.budget) };
    let evicted = checkpoints.prune(target, dry_run)?;
    let made = if arguments.cache { kiln_qemu::base::prune(&app.home.cache(), dry_run)? } else { Default::default() };
    let cache = Cache {
        checkpoints: Evicted { count: evicted.checkpoints, bytes: evicted.bytes },
        // They can be made from the store at any time.
        disks: unpacked_disks(&app.home, dry_run)?,
        bases: made.bases,
        downloads: made.downloads,
    };
    let now = SystemTime::now();
    let freed = Freed {
        dry_run,
        blobs: store.blobs,
        bytes: store.bytes,
        manifests: store.manifests,
        cache_bytes: cache.bytes(),
        cache,
        checkpoints: listed.map(|listed| listed.iter().map(|listed| Row::new(listed, now)).collect()),
    };
    app.output.result(&freed, || freed.to_string());
    Ok(0)
}

/// What was freed, by kind.
#[derive(Serialize)]
struct Freed {
    dry_run: bool,
    /// Of the store.
    blobs: usize,
    bytes: u64,
    manifests: Vec<kiln_model::Digest>,
    cache_bytes: u64,
    cache: Cache,
    /// What the cache holds; with `--cache --dry-run`.
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoints: Option<Vec<Row>>,
}

#[derive(Serialize)]
struct Cache {
    checkpoints: Evicted,
    /// Bytes, as all others.
    disks: u64,
    bases: u64,
    downloads: u64,
}

impl Cache {
    fn bytes(&self) -> u64 {
        self.checkpoints.bytes + self.disks + self.bases + self.downloads
    }
}

#[derive(Serialize)]
struct Evicted {
    count: usize,
    bytes: u64,
}

/// One checkpoint.
#[derive(Serialize)]
struct Row {
    step: Key,
    memory: bool,
    made: u64,
    age_seconds: u64,
    used_seconds_ago: u64,
    worth_seconds: f64,
    bytes: u64,
    /// What only it takes.
    frees: u64,
    in_use: bool,
}

impl Row {
    fn new(listed: &Listed, now: SystemTime) -> Self {
        let since = |time: SystemTime| now.duration_since(time).unwrap_or_default().as_secs();
        Self {
            step: listed.step,
            memory: listed.memory.is_some(),
            made: listed.made.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            age_seconds: since(listed.made),
            used_seconds_ago: since(listed.last_used),
            worth_seconds: listed.worth.as_secs_f64(),
            bytes: listed.bytes,
            frees: listed.frees,
            in_use: listed.in_use,
        }
    }

    fn cells(&self) -> Vec<String> {
        let length = std::time::Duration::from_secs;
        let holds = if self.memory { "disk, memory" } else { "disk" };
        let last_used = if self.in_use { "now".to_owned() } else { ago(length(self.used_seconds_ago)) };
        vec![
            self.step.short(),
            holds.to_owned(),
            span(length(self.age_seconds)),
            last_used,
            seconds(self.worth_seconds),
            bytes(self.bytes),
            bytes(self.frees),
        ]
    }
}

impl std::fmt::Display for Freed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(rows) = &self.checkpoints {
            let head = ["CHECKPOINT", "HOLDS", "AGE", "LAST USED", "SAVES", "SIZE", "FREES"].map(String::from).to_vec();
            let rows: Vec<_> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
            writeln!(f, "{}", table(&rows))?;
        }
        let row = |count: Option<usize>, what: &str, size: u64| {
            vec![String::new(), bytes(size), count.map(|count| count.to_string()).unwrap_or_default(), what.to_owned()]
        };
        let Cache { checkpoints, disks, bases, downloads } = &self.cache;
        let rows = [
            row(Some(self.blobs), "blobs of the store", self.bytes),
            row(Some(checkpoints.count), "checkpoints", checkpoints.bytes),
            row(None, "unpacked disks", *disks),
            row(None, "built and downloaded bases", *bases),
            row(None, "downloads that came in part", *downloads),
        ];
        let verb = if self.dry_run { "would free" } else { "freed" };
        write!(f, "{verb} {}\n{}", bytes(self.bytes + self.cache_bytes), table(&rows))
    }
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
