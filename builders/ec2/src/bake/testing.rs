//! EC2 in memory, as strict as it is documented to be, and as unhelpful: every
//! call can be made to fail, to be carried out without an answer, to be
//! throttled or to hang; and what was made a moment ago is not known yet.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that goes on after this would tell nothing")]

mod images;
mod machines;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use kiln_model::Digest;
use tokio::sync::Notify;

use crate::api::ebs::{ChangedBlock, Ebs, ListedBlock, NewSnapshot, Page, SnapshotState, Started};
use crate::api::images::{Audience, Image, ImageDisk, ImageState, Images, Snapshot};
use crate::api::machines::{Instance, InstanceState, Machines, NewInstance};
use crate::api::parameters::Parameters;
use crate::api::retry::Pace;
use crate::api::{CallError, Cloud, Find, Result, Tags};

/// How many times something is looked at before it is where it is going.
const LOOKS: u32 = 2;

/// What happens to one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is refused.
    Denied,
    /// It is carried out, and its answer is lost.
    Unanswered,
    /// Nothing more is heard of it until the test lets it go; it is carried
    /// out then.
    HangsBefore,
    /// As before, but it is carried out at once.
    HangsAfter,
}

#[derive(Debug, Clone)]
struct Computer {
    region: String,
    instance: Instance,
    wanted: NewInstance,
    looks: u32,
}

#[derive(Debug, Clone)]
struct Part {
    region: String,
    name: String,
    tags: Tags,
    /// Networks that a group lets in.
    open: Vec<String>,
}

#[derive(Debug, Clone)]
struct Picture {
    region: String,
    image: Image,
    looks: u32,
    shared: BTreeSet<Audience>,
}

#[derive(Debug, Clone)]
struct Disk {
    region: String,
    snapshot: Snapshot,
    shared: BTreeSet<String>,
}

/// Everything that is there, in all regions.
#[derive(Default)]
pub(crate) struct World {
    count: u32,
    instances: BTreeMap<String, Computer>,
    keys: BTreeMap<String, Part>,
    groups: BTreeMap<String, Part>,
    volumes: BTreeMap<String, (Part, String)>,
    spots: BTreeMap<String, (Part, bool)>,
    images: BTreeMap<String, Picture>,
    snapshots: BTreeMap<String, Disk>,
    /// Actions in the order in which they were called.
    pub(crate) calls: Vec<&'static str>,
    /// Which call, counted from 1, has which fault.
    pub(crate) fault: Option<(usize, Fault)>,
    /// Of a hundred calls, so many are throttled.
    pub(crate) throttle: u32,
    /// How many looks at something new say that it does not exist.
    pub(crate) lag: u32,
    seen: BTreeMap<String, u32>,
    /// Instance types that are not to be had.
    pub(crate) scarce: Vec<String>,
    /// What every console shows.
    pub(crate) console: Option<String>,
}

/// A shared [`World`], in which a test can wait for a call that hangs.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    world: Arc<Mutex<World>>,
    pub(crate) hangs: Arc<Notify>,
    pub(crate) goes_on: Arc<Notify>,
}

/// One region of it.
struct Here {
    fake: Fake,
    region: String,
}

impl Cloud for Fake {
    fn ebs(&self, _: &str) -> Arc<dyn Ebs> {
        Arc::new(Nothing)
    }
    fn images(&self, region: &str) -> Arc<dyn Images> {
        Arc::new(Here { fake: self.clone(), region: region.to_owned() })
    }
    fn machines(&self, region: &str) -> Arc<dyn Machines> {
        Arc::new(Here { fake: self.clone(), region: region.to_owned() })
    }
    fn parameters(&self, _: &str) -> Arc<dyn Parameters> {
        panic!("a bake asks for no parameters")
    }
}

/// How long things take here.
pub(crate) fn quick() -> Pace {
    Pace {
        first: Duration::from_micros(100),
        longest: Duration::from_millis(2),
        throttled: Duration::from_secs(20),
        failing: Duration::from_secs(5),
        lag: Duration::from_millis(600),
        look: Duration::from_micros(500),
    }
}

fn error(code: &str) -> CallError {
    CallError::answered("Call", 400, code, "as the test has it")
}

impl Fake {
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// An AMI of somebody else's, that bakes start from.
    pub(crate) fn add_base(&self, region: &str, id: &str) {
        let mut world = self.world();
        let snapshot = world.snapshot(region, Tags::new());
        let image = Image {
            id: id.to_owned(),
            name: "debian-12-amd64-20261101".into(),
            owner: "136693071363".into(),
            state: ImageState::Available,
            reason: None,
            created: Some(Timestamp::UNIX_EPOCH),
            architecture: "x86_64".into(),
            boot_mode: Some("uefi-preferred".into()),
            root: Some("/dev/xvda".into()),
            disks: vec![ImageDisk { device: "/dev/xvda".into(), snapshot: Some(snapshot), gib: Some(8) }],
            tags: Tags::new(),
            deprecated: None,
        };
        world.images.insert(id.to_owned(), Picture { region: region.to_owned(), image, looks: 0, shared: BTreeSet::new() });
    }

    /// What is left of bakes: everything but the base, images that are
    /// finished, and their snapshots.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let world = self.world();
        let unfinished = |tags: &Tags| tags.contains_key(crate::tags::UNFINISHED);
        let mut left: Vec<String> = Vec::new();
        left.extend(
            world.instances.values().filter(|one| one.instance.state != InstanceState::Terminated).map(|one| one.instance.id.clone()),
        );
        left.extend(world.keys.keys().cloned());
        left.extend(world.groups.keys().cloned());
        left.extend(world.volumes.keys().cloned());
        left.extend(world.spots.iter().filter(|(_, (_, live))| *live).map(|(id, _)| id.clone()));
        left.extend(world.images.values().filter(|one| unfinished(&one.image.tags)).map(|one| one.image.id.clone()));
        left.extend(world.snapshots.values().filter(|one| unfinished(&one.snapshot.tags)).map(|one| one.snapshot.id.clone()));
        // One that no image starts from any more would never be found again.
        let used: BTreeSet<&String> =
            world.images.values().flat_map(|one| &one.image.disks).filter_map(|disk| disk.snapshot.as_ref()).collect();
        left.extend(world.snapshots.keys().filter(|id| !used.contains(id)).cloned());
        left
    }

    /// The images of a region that are finished, the base left out.
    pub(crate) fn finished(&self, region: &str) -> Vec<Image> {
        let world = self.world();
        let own = world.images.values().filter(|one| one.region == region && one.image.owner == "self");
        own.filter(|one| !one.image.tags.contains_key(crate::tags::UNFINISHED)).map(|one| one.image.clone()).collect()
    }

    /// Makes of an AMI one that was published of a disk.
    pub(crate) fn finished_of_disk(&self, region: &str, id: &str, disk: &Digest) -> String {
        let mut world = self.world();
        let snapshot = world.images[id].image.root_snapshot().unwrap().to_owned();
        let one = world.snapshots.get_mut(&snapshot).unwrap();
        assert_eq!(one.region, region);
        one.snapshot.tags.insert(crate::tags::DISK_DIGEST.to_owned(), disk.to_string());
        world.images.get_mut(id).unwrap().image.owner = "self".to_owned();
        snapshot
    }

    pub(crate) fn shared(&self, image: &str) -> Vec<Audience> {
        self.world().images[image].shared.iter().cloned().collect()
    }

    pub(crate) fn snapshot_shared(&self, snapshot: &str) -> Vec<String> {
        self.world().snapshots[snapshot].shared.iter().cloned().collect()
    }

    /// Every instance that was ever asked for.
    pub(crate) fn asked(&self) -> Vec<NewInstance> {
        self.world().instances.values().map(|one| one.wanted.clone()).collect()
    }

    /// The networks that groups were ever opened to are in the call's record.
    pub(crate) fn groups_open_to(&self) -> Vec<String> {
        self.world().groups.values().flat_map(|group| group.open.clone()).collect()
    }

    /// Makes one call: counts it, and gives it its fault.
    async fn call<T: Send>(&self, action: &'static str, work: impl FnOnce(&mut World) -> Result<T> + Send) -> Result<T> {
        let fault = {
            let mut world = self.world();
            world.calls.push(action);
            let number = world.calls.len();
            // Spread evenly, and not in step with anything.
            if (u32::try_from(number).unwrap() * 37) % 100 < world.throttle {
                return Err(CallError::answered(action, 503, "RequestLimitExceeded", "as the test has it"));
            }
            world.fault.filter(|(at, _)| *at == number).map(|(_, fault)| fault)
        };
        let named = |error: CallError| CallError { action, ..error };
        match fault {
            None => work(&mut self.world()).map_err(named),
            Some(Fault::Denied) => Err(CallError::answered(action, 403, "UnauthorizedOperation", "as the test has it")),
            Some(Fault::Unanswered) => {
                let _ = work(&mut self.world());
                Err(CallError::unanswered(action, std::io::Error::from(std::io::ErrorKind::ConnectionReset)))
            }
            Some(Fault::HangsBefore) => {
                self.hangs.notify_one();
                self.goes_on.notified().await;
                work(&mut self.world()).map_err(named)
            }
            Some(Fault::HangsAfter) => {
                let done = work(&mut self.world()).map_err(named);
                self.hangs.notify_one();
                self.goes_on.notified().await;
                done
            }
        }
    }
}

impl World {
    fn id(&mut self, prefix: &str) -> String {
        self.count += 1;
        let id = format!("{prefix}-{:04x}", self.count);
        self.seen.insert(id.clone(), 0);
        id
    }

    fn snapshot(&mut self, region: &str, tags: Tags) -> String {
        let id = self.id("snap");
        let snapshot =
            Snapshot { id: id.clone(), state: SnapshotState::Completed, gib: 8, started: None, key: None, encrypted: false, tags };
        self.snapshots.insert(id.clone(), Disk { region: region.to_owned(), snapshot, shared: BTreeSet::new() });
        id
    }

    /// Whether a server that was asked about something knows of it yet.
    fn knows(&mut self, id: &str) -> bool {
        let lag = self.lag;
        let Some(seen) = self.seen.get_mut(id) else { return true };
        *seen += 1;
        *seen > lag
    }

    /// Of these, those that are known and that `find` means; ids that are not
    /// there are an error.
    fn pick<T: Clone>(&mut self, find: &Find, all: Vec<Known<'_, T>>, missing: &str) -> Result<Vec<T>> {
        let mut found = Vec::new();
        let mut ids: BTreeSet<&String> = find.ids.iter().collect();
        for (id, tags, words, one) in all {
            let wanted = find.filters.iter().all(|(name, values)| match name.strip_prefix("tag:") {
                Some(key) => tags.get(key).is_some_and(|value| values.contains(value)),
                None if name == "tag-key" => tags.keys().any(|key| values.contains(key)),
                None => {
                    let word = words.iter().find(|(word, _)| word == name);
                    let (_, is) = word.unwrap_or_else(|| panic!("the filter {name} is not known here"));
                    values.iter().any(|value| value == is || value.strip_suffix('*').is_some_and(|start| is.starts_with(start)))
                }
            });
            if (find.ids.is_empty() || find.ids.contains(&id)) && wanted && self.knows(&id) {
                ids.remove(&id);
                found.push(one);
            }
        }
        if ids.is_empty() { Ok(found) } else { Err(error(missing)) }
    }

    fn known(&mut self, id: &str, there: bool, missing: &str) -> Result<()> {
        if there && self.knows(id) { Ok(()) } else { Err(error(missing)) }
    }

    /// Lets an instance go one look further on its way.
    fn moves_on(&mut self, id: &str) {
        let Some(one) = self.instances.get_mut(id) else { return };
        one.looks += 1;
        if one.looks < LOOKS {
            return;
        }
        match one.instance.state {
            InstanceState::Pending => {
                one.instance.state = InstanceState::Running;
                one.instance.private_address = Some("10.0.0.7".into());
                one.instance.public_address = (one.wanted.public != Some(false)).then(|| "198.51.100.7".into());
            }
            InstanceState::Stopping => one.instance.state = InstanceState::Stopped,
            InstanceState::ShuttingDown => {
                one.instance.state = InstanceState::Terminated;
                // Every volume goes with it but the one that a test attached by hand.
                self.volumes.retain(|_, (_, instance)| instance != id);
            }
            _ => {}
        }
    }

    fn resource(&mut self, id: &str) -> Option<&mut Tags> {
        if let Some(one) = self.images.get_mut(id) {
            return Some(&mut one.image.tags);
        }
        self.snapshots.get_mut(id).map(|one| &mut one.snapshot.tags)
    }
}

/// Something by its id, with its tags and what filters compare.
type Known<'a, T> = (String, Tags, Vec<(&'a str, String)>, T);

/// No block of anything.
struct Nothing;

#[async_trait]
impl Ebs for Nothing {
    async fn start_snapshot(&self, _: &NewSnapshot) -> Result<Started> {
        Err(error("ValidationException"))
    }
    async fn put_block(&self, _: &str, _: u32, _: Bytes, _: &Digest) -> Result<()> {
        Err(error("ValidationException"))
    }
    async fn complete_snapshot(&self, _: &str, _: u32, _: &Digest) -> Result<SnapshotState> {
        Err(error("ValidationException"))
    }
    async fn list_blocks(&self, _: &str, _: Option<&str>) -> Result<Page<ListedBlock>> {
        Err(error("ValidationException"))
    }
    async fn list_changed(&self, _: &str, _: &str, _: Option<&str>) -> Result<Page<ChangedBlock>> {
        Err(error("ValidationException"))
    }
    async fn get_block(&self, _: &str, _: &ListedBlock) -> Result<(Bytes, Digest)> {
        Err(error("ValidationException"))
    }
}
