//! `kiln prune`: frees what no image needs, and what the cache holds beyond its
//! budget. With `--cache` all that can be made again goes; what somebody uses
//! stays in any case. `kiln prune ec2:REGION` does the same with AMIs: what no
//! channel needs and nobody uses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_bake::explain::span;
use kiln_cache::Listed;
use kiln_ec2::api::retry::Pace;
use kiln_ec2::publish::Region;
use kiln_ec2::publish::prune::Keep;
use kiln_model::cleanup::remove_path;
use kiln_model::home::Home;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::settings::parse_duration;
use kiln_model::{Code, Error, Key, Result, ResultExt as _};
use kiln_store::Place;
use kiln_store::place::images_of;
use serde::Serialize;

use super::App;
use crate::cli::Prune;
use crate::ec2::Target;
use crate::output::{ago, bytes, seconds, table};
use crate::{archive, image_base};

pub(super) async fn run(app: &App, arguments: &Prune) -> Result<u8> {
    match &arguments.place {
        Some(place) => amis(app, place, arguments).await,
        None => here(app, arguments),
    }
}

/// The AMIs of a region.
async fn amis(app: &App, place: &str, arguments: &Prune) -> Result<u8> {
    let Target::Region(region) = place.parse()? else {
        return Err(
            Error::new(Code::Usage, format!("nothing can be pruned of `{place}`")).next("write ec2:REGION, such as ec2:eu-central-1")
        );
    };
    let younger = parse_duration(&arguments.older_than).ok_or_else(|| {
        Error::new(Code::Usage, format!("`--older-than {}` is no length of time", arguments.older_than)).next("write 7d or 12h")
    })?;
    let store = app.store()?;
    let here: BTreeSet<String> = store.images(false)?.images.into_iter().map(|image| image.config.name).collect();
    let mut needed = BTreeMap::new();
    let mut places: Vec<(Box<dyn Place>, Vec<String>)> = vec![(Box::new(store), here.into_iter().collect())];
    for repository in &arguments.repositories {
        let reference: Reference = repository.parse()?;
        if reference.registry.is_none() || reference.pointer != Pointer::Tag(None) {
            return Err(Error::new(Code::Usage, format!("`{repository}` is no repository")).next("write HOST/NAMESPACE/NAME"));
        }
        places.push((app.place(&reference)?, vec![reference.name]));
    }
    let (mut known, mut channels) = (BTreeSet::new(), Vec::new());
    for (place, names) in &places {
        for name in names {
            for channel in place.channels().list(name).await? {
                let chain = place.channels().history(name, &channel).await?;
                channels.push(format!("{name}@{channel} of {}", place.label()));
                for digest in chain.recent(arguments.history.max(1)) {
                    needed.entry(digest).or_insert_with(|| format!("{name}@{channel}"));
                    // One that is gone there cannot be one of several architectures.
                    let images = match images_of(&**place, &digest).await {
                        Ok(images) => images,
                        Err(error) if error.kind() == Code::NotFound => Vec::new(),
                        Err(error) => return Err(error),
                    };
                    for image in images {
                        known.insert(image.config.name);
                        needed.entry(image.digest).or_insert_with(|| format!("{name}@{channel}"));
                    }
                }
            }
        }
    }
    match &*channels {
        [] => app.output.reports().note("no channel is known here, so every AMI is kept; --channels-of names a repository that has some"),
        all => app.output.reports().note(format!("what counts: {}", all.join(", "))),
    }
    let aws = crate::ec2::connect().await?;
    let region = Region::new(&*aws.cloud, &region, Pace::default())?;
    let keep = Keep { needed, known, younger, shared: !arguments.shared, now: jiff::Timestamp::now(), dry_run: arguments.dry_run };
    let pruned = kiln_ec2::publish::prune::prune(&region, &keep, &app.output.reports()).await?;
    app.output.result(&pruned, || drawn(&pruned));
    Ok(0)
}

/// What was removed of a region, for people.
fn drawn(pruned: &kiln_ec2::publish::prune::Pruned) -> String {
    let mut rows = vec![["AMI", "IMAGE", "DECISION"].map(String::from).to_vec()];
    rows.extend(pruned.amis.iter().map(|verdict| {
        let decision = match (&verdict.kept, pruned.dry_run) {
            (Some(why), _) => format!("kept: {why}"),
            (None, true) => "would be removed".to_owned(),
            (None, false) => "removed".to_owned(),
        };
        vec![verdict.ami.clone(), verdict.reference.clone(), decision]
    }));
    let gone = pruned.amis.iter().filter(|verdict| verdict.kept.is_none()).count();
    let verb = if pruned.dry_run { "would remove" } else { "removed" };
    let list = if pruned.amis.is_empty() { String::new() } else { format!("{}\n", table(&rows)) };
    format!("{list}{verb} {gone} AMIs and {} snapshots in {}", pruned.snapshots.len(), pruned.region)
}

fn here(app: &App, arguments: &Prune) -> Result<u8> {
    let dry_run = arguments.dry_run;
    let checkpoints = app.checkpoints()?;
    // Before anything goes.
    let listed = if arguments.cache && dry_run { Some(checkpoints.list()?) } else { None };
    let keep = kiln_store::Keep { bases: !arguments.cache, history: arguments.history, also: Vec::new(), dry_run };
    let store = app.store()?.prune(&keep)?;
    let target = if arguments.cache { None } else { Some(checkpoints.usage()?.budget) };
    let evicted = checkpoints.prune(target, dry_run)?;
    let made = if arguments.cache { kiln_qemu::base::prune(&app.home.cache(), dry_run)? } else { Default::default() };
    if arguments.cache && !dry_run {
        // Small, and made again by the next bake.
        drop(std::fs::remove_file(crate::manifest::cache(&app.home)));
    }
    let cache = Cache {
        checkpoints: Evicted { count: evicted.checkpoints, bytes: evicted.bytes },
        // They can be made from the store at any time.
        disks: unpacked_disks(&app.home, dry_run)?,
        bases: made.bases,
        downloads: made.downloads + if arguments.cache { archive::prune(&app.home, dry_run)? } else { 0 },
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
