//! AMIs that nobody needs any more, and snapshots without an AMI.
//!
//! What is not known is kept: of images whose name has no channel here nothing
//! is removed, since then somebody else decides about them. Deciding
//! ([`judge`]) has no side effects.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::event::Reports;
use kiln_model::{Digest, Result};
use serde::Serialize;

use super::Region;
use crate::api::ebs::SnapshotState;
use crate::api::error::CallExt as _;
use crate::api::images::{Image, ImageState, Snapshot, Use};
use crate::api::{Find, Kind};
use crate::tags;

/// A snapshot that is being written is left alone for so long.
const WRITING: Duration = Duration::from_secs(25 * 60 * 60);

/// What begins the name of an image in a launch template that a parameter says.
const RESOLVE: &str = "resolve:ssm:";

/// What is kept.
#[derive(Debug, Clone)]
pub struct Keep {
    /// Images that channels need, by the digest of their manifest, and which
    /// channel that is.
    pub needed: BTreeMap<Digest, String>,
    /// Names of images that have a channel which was looked at. AMIs of other
    /// names are kept.
    pub known: BTreeSet<String>,
    /// What is younger is kept.
    pub younger: Duration,
    /// What others may use is kept: nobody can tell whether they do.
    pub shared: bool,
    /// Now.
    pub now: Timestamp,
    /// Remove nothing, only say what would be.
    pub dry_run: bool,
}

/// What was decided of an AMI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The AMI.
    pub ami: String,
    /// The image that it is of: `name:version`.
    pub reference: String,
    /// Digest of that image's manifest.
    pub digest: Option<Digest>,
    /// Its snapshots.
    pub snapshots: Vec<String>,
    /// Why it is kept; `None` when it is not.
    pub kept: Option<String>,
}

/// What was removed, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// The region.
    pub region: String,
    /// Every AMI of kiln's, and what was decided of it.
    pub amis: Vec<Verdict>,
    /// Snapshots that were removed, those of removed AMIs among them.
    pub snapshots: Vec<String>,
    /// Whether that was only looked at.
    pub dry_run: bool,
}

/// Removes what nobody needs.
///
/// # Errors
/// When the region cannot be asked, or something cannot be removed; what was
/// removed until then stays removed.
pub async fn prune(region: &Region, keep: &Keep, reports: &Reports) -> Result<Pruned> {
    let all = region.calls.make(|| async { region.images.images(&Find::own()).await }).await;
    let all = all.trying_to(|| format!("list the AMIs in {}", region.name))?;
    let uses = uses(region).await?;
    let mut amis = judge(&all, &uses, keep);
    for verdict in amis.iter_mut().filter(|verdict| verdict.kept.is_none() && keep.shared) {
        let shared = region.calls.make(|| region.images.shared_with(&verdict.ami)).await;
        let shared = shared.trying_to(|| format!("ask who may use {}", verdict.ami))?;
        if !shared.is_empty() {
            verdict.kept = Some(format!("{} others may use it", shared.len()));
        }
    }
    let find = Find::own().with("tag-key", tags::DISK_DIGEST);
    let snapshots = region.calls.make(|| region.images.snapshots(&find)).await;
    let snapshots = snapshots.trying_to(|| format!("list the snapshots in {}", region.name))?;
    let removed: BTreeSet<&str> = amis.iter().filter(|verdict| verdict.kept.is_none()).map(|verdict| verdict.ami.as_str()).collect();
    let gone = orphans(&snapshots, &all, &removed, keep);
    let mut pruned = Pruned { region: region.name.clone(), amis: amis.clone(), snapshots: Vec::new(), dry_run: keep.dry_run };
    if keep.dry_run {
        pruned.snapshots = gone;
        return Ok(pruned);
    }
    // The AMI first: AWS keeps the snapshots of one that is there.
    for ami in &removed {
        let done = region.calls.make(|| region.images.deregister(ami)).await;
        let done = done.or_else(|error| if error.kind == Kind::NotFound { Ok(()) } else { Err(error) });
        done.trying_to(|| format!("deregister {ami} in {}", region.name))?;
    }
    for snapshot in gone {
        match region.calls.make(|| region.images.delete_snapshot(&snapshot)).await {
            Ok(()) => pruned.snapshots.push(snapshot),
            Err(error) if error.kind == Kind::NotFound => {}
            // An AMI that came since the list was made, or one that was
            // deregistered and is not known to be everywhere.
            Err(error) if error.kind == Kind::State => reports.warn(format!("{snapshot} is kept: {error}")),
            Err(error) => return Err(error.trying(format!("delete the snapshot {snapshot} in {}", region.name))),
        }
    }
    Ok(pruned)
}

/// What uses AMIs, those included that a launch template takes from a
/// parameter.
async fn uses(region: &Region) -> Result<HashMap<String, String>> {
    let found = region.calls.make(|| region.images.uses()).await;
    let found = found.trying_to(|| format!("list the instances and launch templates in {}", region.name))?;
    let mut uses = HashMap::new();
    for Use { image, by } in found {
        let Some(parameter) = image.strip_prefix(RESOLVE) else {
            uses.entry(image).or_insert(by);
            continue;
        };
        // A version or a label may follow.
        let name = parameter.split(':').next().unwrap_or(parameter);
        let said = region.calls.make(|| region.parameters.get(name)).await;
        if let Some(said) = said.trying_to(|| format!("read the parameter {name}, which {by} uses"))? {
            uses.entry(said.value).or_insert(format!("{by}, by {name}"));
        }
    }
    Ok(uses)
}

/// Decides about every AMI of kiln's, newest first; what only AWS can be asked
/// about one by one is left out.
pub fn judge(images: &[Image], uses: &HashMap<String, String>, keep: &Keep) -> Vec<Verdict> {
    let mut ours: Vec<&Image> = images.iter().filter(|image| image.tags.contains_key(tags::DIGEST)).collect();
    ours.sort_by(|a, b| (b.created, &b.id).cmp(&(a.created, &a.id)));
    let mut newest = BTreeSet::new();
    let decide = |image: &&Image| {
        let tag = |tag: &str| image.tags.get(tag).map(String::as_str).unwrap_or_default();
        let digest: Option<Digest> = tag(tags::DIGEST).parse().ok();
        let name = tag(tags::NAME);
        let first = newest.insert((name.to_owned(), image.architecture.clone()));
        let age = image.created.map(|created| keep.now.duration_since(created));
        let young = age.is_none_or(|age| Duration::try_from(age).is_ok_and(|age| age < keep.younger) || age.is_negative());
        let needed = digest.and_then(|digest| keep.needed.get(&digest));
        let kept = if image.state == ImageState::Pending {
            Some("AWS is making it".to_owned())
        } else if let Some(channel) = needed {
            Some(format!("{channel} needs it"))
        } else if let Some(by) = uses.get(&image.id) {
            Some(format!("{by} uses it"))
        } else if first {
            Some(format!("the newest of {name}"))
        } else if young {
            Some("young".to_owned())
        } else if !keep.known.contains(name) {
            Some(format!("no channel of {name} is known here"))
        } else {
            None
        };
        let snapshots = image.disks.iter().filter_map(|disk| disk.snapshot.clone()).collect();
        Verdict { ami: image.id.clone(), reference: format!("{name}:{}", tag(tags::VERSION)), digest, snapshots, kept }
    };
    ours.iter().map(decide).collect()
}

/// The snapshots of kiln's that no AMI has that stays: of AMIs that go, and old
/// ones of none.
fn orphans(snapshots: &[Snapshot], images: &[Image], removed: &BTreeSet<&str>, keep: &Keep) -> Vec<String> {
    let of = |stays: bool| -> BTreeSet<&str> {
        let images = images.iter().filter(|image| removed.contains(image.id.as_str()) != stays);
        images.flat_map(|image| image.disks.iter().filter_map(|disk| disk.snapshot.as_deref())).collect()
    };
    let (stay, go) = (of(true), of(false));
    let old = |snapshot: &Snapshot| {
        let least = if snapshot.state == SnapshotState::Pending { keep.younger.max(WRITING) } else { keep.younger };
        let age = snapshot.started.map(|started| keep.now.duration_since(started));
        age.and_then(|age| Duration::try_from(age).ok()).is_some_and(|age| age >= least)
    };
    let ours = snapshots.iter().filter(|snapshot| snapshot.tags.contains_key(tags::DISK_DIGEST) && !stay.contains(snapshot.id.as_str()));
    ours.filter(|snapshot| go.contains(snapshot.id.as_str()) || old(snapshot)).map(|snapshot| snapshot.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Tags;
    use crate::api::images::ImageDisk;

    const DAY: u64 = 24 * 60 * 60;

    fn now() -> Timestamp {
        "2026-06-01T00:00:00Z".parse().unwrap()
    }

    fn before(days: u64) -> Option<Timestamp> {
        Some(now() - Duration::from_secs(days * DAY))
    }

    fn ami(number: u64, name: &str, days: u64) -> Image {
        let tags = [(tags::NAME, name.to_owned()), (tags::VERSION, number.to_string()), (tags::DIGEST, digest(number).to_string())];
        Image {
            id: format!("ami-{number}"),
            name: format!("{name}-{number}"),
            owner: "1".into(),
            state: ImageState::Available,
            reason: None,
            created: before(days),
            architecture: "x86_64".into(),
            boot_mode: None,
            root: Some("/dev/xvda".into()),
            disks: vec![ImageDisk { device: "/dev/xvda".into(), snapshot: Some(format!("snap-{number}")), gib: Some(1) }],
            tags: tags.map(|(tag, value)| (tag.to_owned(), value)).into(),
            deprecated: None,
        }
    }

    fn snapshot(id: &str, days: u64, state: SnapshotState) -> Snapshot {
        let tags = Tags::from([(tags::DISK_DIGEST.to_owned(), digest(0).to_string())]);
        Snapshot { id: id.into(), state, gib: 1, started: before(days), key: None, encrypted: false, tags }
    }

    fn digest(number: u64) -> Digest {
        Digest::of(number.to_string())
    }

    fn keep() -> Keep {
        Keep {
            needed: BTreeMap::from([(digest(2), "web@production".to_owned())]),
            known: BTreeSet::from(["web".to_owned()]),
            younger: Duration::from_secs(7 * DAY),
            shared: true,
            now: now(),
            dry_run: false,
        }
    }

    #[test]
    fn what_is_needed_used_new_or_not_known_is_kept() {
        let mut pending = ami(8, "web", 30);
        pending.state = ImageState::Pending;
        let mut foreign = ami(9, "web", 300);
        foreign.tags.clear();
        let images = [
            ami(1, "web", 90),
            ami(2, "web", 80),
            ami(3, "web", 70),
            ami(4, "web", 6),
            ami(5, "web", 1),
            ami(6, "db", 50),
            ami(7, "db", 40),
            pending,
            foreign,
        ];
        let uses = HashMap::from([("ami-3".to_owned(), "i-1".to_owned())]);
        let verdicts = judge(&images, &uses, &keep());
        let drawn: Vec<_> = verdicts.iter().map(|verdict| (verdict.ami.as_str(), verdict.kept.as_deref())).collect();
        assert_eq!(
            drawn,
            [
                ("ami-5", Some("the newest of web")),
                ("ami-4", Some("young")),
                ("ami-8", Some("AWS is making it")),
                ("ami-7", Some("the newest of db")),
                ("ami-6", Some("no channel of db is known here")),
                ("ami-3", Some("i-1 uses it")),
                ("ami-2", Some("web@production needs it")),
                ("ami-1", None),
            ]
        );
    }

    #[test]
    fn an_image_of_unknown_age_is_young() {
        let mut image = ami(1, "web", 0);
        image.created = None;
        let verdicts = judge(&[ami(2, "web", 3), image], &HashMap::new(), &Keep { needed: BTreeMap::new(), ..keep() });
        assert!(verdicts.iter().all(|verdict| verdict.kept.is_some()), "{verdicts:?}");
    }

    #[test]
    fn snapshots_go_with_their_ami_unless_another_one_has_them() {
        let mut shares = ami(3, "db", 1);
        shares.disks[0].snapshot = Some("snap-2".into());
        let images = [ami(1, "web", 90), ami(2, "web", 80), shares];
        let snapshots = [
            snapshot("snap-1", 90, SnapshotState::Completed),
            snapshot("snap-2", 90, SnapshotState::Completed),
            snapshot("snap-old", 8, SnapshotState::Completed),
            snapshot("snap-failed", 8, SnapshotState::Failed),
            snapshot("snap-young", 6, SnapshotState::Completed),
            snapshot("snap-writing", 0, SnapshotState::Pending),
        ];
        let removed = BTreeSet::from(["ami-1", "ami-2"]);
        assert_eq!(orphans(&snapshots, &images, &removed, &keep()), ["snap-1", "snap-old", "snap-failed"]);
        let eager = Keep { younger: Duration::ZERO, ..keep() };
        assert_eq!(orphans(&snapshots, &images, &removed, &eager), ["snap-1", "snap-old", "snap-failed", "snap-young"]);
    }
}
