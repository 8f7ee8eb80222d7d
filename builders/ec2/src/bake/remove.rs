//! Removing what a bake has made: by its id, or by the bake's tags.
//!
//! Removing is done as often as it takes. A failure of a call that has nothing
//! to do with what is removed (an outage, a right that was just withdrawn) is
//! tried again a few times; that something is not there is success; and one
//! thing that cannot be removed keeps nothing else from being removed.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_model::{Code, Error, Result};
use tokio::time::Instant;

use super::part::Part;
use super::region::Region;
use crate::api::error::CallExt as _;
use crate::api::machines::InstanceState;
use crate::api::retry::Pace;
use crate::api::{self, Cloud, Find, Kind, Tags};
use crate::tags;

/// How often a call is made that fails for no reason that passes by itself.
const ATTEMPTS: u32 = 4;

/// Longest that an instance may take to be gone.
const TERMINATING: Duration = Duration::from_secs(14 * 60);

/// Longest that something may be in use by what is just going.
const RELEASING: Duration = Duration::from_secs(5 * 60);

/// What is to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sought {
    /// This one.
    Id(String),
    /// What has the bake's tags; after a call whose end nobody knows it may
    /// take a while until it is found.
    OfBake { settling: bool },
}

/// Removes what one bake has made in one region.
pub(crate) struct Remover {
    region: Region,
    bake: String,
}

impl Remover {
    pub(crate) fn new(region: Region, bake: &str) -> Self {
        Self { region, bake: bake.to_owned() }
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// Removes every part of this kind, and waits until it is gone.
    pub(crate) async fn remove(&self, part: Part, sought: &Sought) -> Result<()> {
        match part {
            Part::Instance => self.instances(sought).await,
            Part::SecurityGroup => self.groups(sought).await,
            Part::KeyPair => self.keys(sought).await,
            Part::Image => self.images(sought).await,
        }
    }

    /// What has this bake's tags.
    fn of_bake(&self) -> Find {
        Find::default().with(&format!("tag:{}", tags::BAKE), &self.bake).with("tag-key", tags::UNFINISHED)
    }

    async fn instances(&self, sought: &Sought) -> Result<()> {
        let machines = &self.region.machines;
        let mut problems = Problems::default();
        let all = self.of_bake();
        let live = |instance: &api::machines::Instance| instance.state != InstanceState::Terminated;
        let ids = match sought {
            Sought::Id(id) => vec![id.clone()],
            Sought::OfBake { settling } => {
                let look = || async {
                    let found = machines.instances(&all).await?;
                    Ok::<Vec<String>, api::CallError>(found.into_iter().filter(live).map(|instance| instance.id).collect())
                };
                problems.of(self.look_for(*settling, look).await.trying_to(|| self.asking("instances")))
            }
        };
        // A persistent request would start another instance in its place.
        let requests = problems.of(persist(&self.region, || machines.spot_requests(&all)).await.trying_to(|| self.asking("spot requests")));
        for request in requests.iter().filter(|request| request.live) {
            let done = persist(&self.region, || machines.cancel_spot(&request.id)).await;
            problems.take(gone_is_fine(done).trying_to(|| format!("cancel the spot request {}", request.id)));
        }
        for id in &ids {
            problems.take(self.unless_unknown(|| machines.terminate(id)).await.trying_to(|| format!("terminate the instance {id}")));
        }
        for id in &ids {
            problems.take(self.terminated(id).await);
        }
        // They go with it; but one whose attachment failed would stay.
        let volumes = problems.of(persist(&self.region, || machines.volumes(&all)).await.trying_to(|| self.asking("volumes")));
        for volume in volumes.iter().filter(|volume| !volume.in_use && !volume.deleting) {
            let done = self.release(|| self.unless_unknown(|| machines.delete_volume(&volume.id))).await;
            problems.take(done.trying_to(|| format!("delete the volume {}", volume.id)));
        }
        problems.end()
    }

    /// Waits until an instance is gone.
    async fn terminated(&self, id: &str) -> Result<()> {
        let find = Find::id(id);
        let end = Instant::now() + TERMINATING;
        let mut pause = self.region.calls.pace().look;
        loop {
            match persist(&self.region, || self.region.machines.instances(&find)).await {
                Ok(found) if found.iter().all(|instance| instance.state == InstanceState::Terminated) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind == Kind::NotFound => return Ok(()),
                Err(error) => return Err(error.trying(format!("wait for the end of the instance {id}"))),
            }
            if Instant::now() >= end {
                return Err(Error::new(Code::Timeout, format!("the instance {id} is still being terminated")));
            }
            tokio::time::sleep(pause).await;
            pause = (pause + pause / 2).min(self.region.calls.pace().look * 10);
        }
    }

    async fn groups(&self, sought: &Sought) -> Result<()> {
        let machines = &self.region.machines;
        let mut problems = Problems::default();
        let ids = match sought {
            Sought::Id(id) => vec![id.clone()],
            Sought::OfBake { settling } => {
                let all = self.of_bake();
                let look = || async { machines.groups(&all).await.map(|found| found.into_iter().map(|group| group.id).collect()) };
                problems.of(self.look_for(*settling, look).await.trying_to(|| self.asking("security groups")))
            }
        };
        for id in &ids {
            let done = self.release(|| self.unless_unknown(|| machines.delete_group(id))).await;
            problems.take(done.trying_to(|| format!("delete the security group {id}")));
        }
        problems.end()
    }

    async fn keys(&self, sought: &Sought) -> Result<()> {
        let machines = &self.region.machines;
        let mut problems = Problems::default();
        let ids = match sought {
            Sought::Id(id) => vec![id.clone()],
            Sought::OfBake { settling } => {
                let all = self.of_bake();
                let look = || async { machines.keys(&all).await.map(|found| found.into_iter().map(|key| key.id).collect()) };
                problems.of(self.look_for(*settling, look).await.trying_to(|| self.asking("key pairs")))
            }
        };
        for id in &ids {
            let done = self.unless_unknown(|| machines.delete_key(id)).await;
            problems.take(done.trying_to(|| format!("delete the key pair {id}")));
        }
        problems.end()
    }

    async fn images(&self, sought: &Sought) -> Result<()> {
        let images = &self.region.images;
        let mut problems = Problems::default();
        let all = Find { owners: vec!["self".to_owned()], ..self.of_bake() };
        let found = match sought {
            Sought::Id(id) => {
                let find = Find::id(id);
                let look = || async {
                    match images.images(&find).await {
                        Ok(found) => Ok(found),
                        Err(error) if error.kind == Kind::NotFound => Ok(Vec::new()),
                        Err(error) => Err(error),
                    }
                };
                let found = problems.of(self.look_for(true, look).await.trying_to(|| self.asking("images")));
                found.into_iter().filter(|image| image.id == *id).collect()
            }
            Sought::OfBake { settling } => {
                let look = || images.images(&all);
                problems.of(self.look_for(*settling, look).await.trying_to(|| self.asking("images")))
            }
        };
        let mut snapshots = BTreeSet::new();
        for image in &found {
            snapshots.extend(image.disks.iter().filter_map(|disk| disk.snapshot.clone()));
            let done = self.unless_unknown(|| images.deregister(&image.id)).await;
            problems.take(done.trying_to(|| format!("deregister the image {}", image.id)));
        }
        // Those of an image that was never finished are named by nothing else.
        let tagged = problems.of(persist(&self.region, || images.snapshots(&all)).await.trying_to(|| self.asking("snapshots")));
        snapshots.extend(tagged.into_iter().map(|snapshot| snapshot.id));
        for id in &snapshots {
            let done = self.release(|| self.unless_unknown(|| images.delete_snapshot(id))).await;
            problems.take(done.trying_to(|| format!("delete the snapshot {id}")));
        }
        problems.end()
    }

    fn asking(&self, what: &str) -> String {
        format!("ask which {what} the bake {} has left in {}", self.bake, self.region.name)
    }

    /// Looks once; while it may not be known everywhere yet, until something
    /// is found.
    async fn look_for<T, F, A>(&self, settling: bool, look: F) -> api::Result<Vec<T>>
    where
        F: Fn() -> A + Send + Sync,
        A: Future<Output = api::Result<Vec<T>>> + Send,
        T: Send,
    {
        let end = Instant::now() + if settling { self.region.settling() } else { Duration::ZERO };
        let mut pause = self.region.calls.pace().look / 2;
        loop {
            let found = persist(&self.region, &look).await?;
            if !found.is_empty() || Instant::now() >= end {
                return Ok(found);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(self.region.calls.pace().look * 2);
        }
    }

    /// Removes something whose id is known: that it does not exist is success,
    /// but not at once, since it may be too new to be known everywhere.
    async fn unless_unknown<F, A>(&self, call: F) -> api::Result<()>
    where
        F: Fn() -> A + Send + Sync,
        A: Future<Output = api::Result<()>> + Send,
    {
        let end = Instant::now() + self.region.settling();
        let mut pause = self.region.calls.pace().look / 2;
        loop {
            match persist(&self.region, &call).await {
                Err(error) if error.kind == Kind::NotFound && Instant::now() < end => {}
                done => return gone_is_fine(done),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(self.region.calls.pace().look * 2);
        }
    }

    /// Removes something that may still be in use by what is going.
    async fn release<F, A>(&self, call: F) -> api::Result<()>
    where
        F: Fn() -> A + Send + Sync,
        A: Future<Output = api::Result<()>> + Send,
    {
        let end = Instant::now() + RELEASING;
        loop {
            match call().await {
                Err(error) if error.kind == Kind::State && Instant::now() < end => {}
                done => return gone_is_fine(done),
            }
            tokio::time::sleep(self.region.calls.pace().look * 2).await;
        }
    }
}

/// Makes a call again when it fails for whatever reason: removing is worth it.
/// What cannot help (it is not there, it is in use) is the caller's.
async fn persist<T, F, A>(region: &Region, call: F) -> api::Result<T>
where
    F: Fn() -> A + Send + Sync,
    A: Future<Output = api::Result<T>> + Send,
    T: Send,
{
    let mut pause = region.calls.pace().first;
    for _ in 1..ATTEMPTS {
        match region.calls.make(&call).await {
            Err(error) if !matches!(error.kind, Kind::NotFound | Kind::State | Kind::Credentials) => {}
            done => return done,
        }
        tokio::time::sleep(pause).await;
        pause *= 3;
    }
    region.calls.make(&call).await
}

fn gone_is_fine(done: api::Result<()>) -> api::Result<()> {
    match done {
        Err(error) if error.kind == Kind::NotFound => Ok(()),
        done => done,
    }
}

/// The first error of several, while the work goes on.
#[derive(Default)]
struct Problems(Option<Error>);

impl Problems {
    fn take(&mut self, done: Result<()>) {
        if let Err(error) = done {
            self.0.get_or_insert(error);
        }
    }

    fn of<T>(&mut self, done: Result<Vec<T>>) -> Vec<T> {
        done.unwrap_or_else(|error| {
            self.0.get_or_insert(error);
            Vec::new()
        })
    }

    fn end(self) -> Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}

/// Removes what the ledger of the dead bake `bake` names: a `resource` in a
/// region, and its `id` where that was known.
///
/// # Errors
/// When it cannot be removed, or a later kiln wrote the ledger.
pub async fn reap_ledger(cloud: &Arc<dyn Cloud>, pace: Pace, bake: &str, region: &str, resource: &str, id: Option<&str>) -> Result<()> {
    let part = Part::of_word(resource)
        .ok_or_else(|| Error::new(Code::Failed, format!("a {resource} in {region} was left behind, and this kiln knows no such thing")))?;
    let remover = Remover::new(Region::new(cloud, region, pace), bake);
    let sought = id.map_or(Sought::OfBake { settling: true }, |id| Sought::Id(id.to_owned()));
    remover.remove(part, &sought).await
}

/// Which leftovers to look for.
#[derive(Debug, Clone)]
pub struct Leftovers {
    /// Of this bake alone, whatever its age.
    pub bake: Option<String>,
    /// Of bakes that began longer ago than this: younger ones may be running
    /// on another machine.
    pub older_than: Duration,
    /// Bakes that run on this machine.
    pub running: Vec<String>,
    /// Say what would go, and remove nothing.
    pub dry_run: bool,
}

/// What was found of one bake.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Reaped {
    /// The bake's id.
    pub bake: String,
    /// The ids of what it has left, by kind.
    pub left: BTreeMap<String, Vec<String>>,
    /// Why it was left alone; `None`: it was removed, or would be.
    pub spared: Option<String>,
}

/// Finds by their tags what bakes have left in a region, and removes it; the
/// ledgers of these bakes may be on any machine, or lost.
///
/// # Errors
/// The first failure; everything else is removed all the same.
pub async fn reap_region(cloud: &Arc<dyn Cloud>, pace: Pace, name: &str, which: &Leftovers) -> Result<Vec<Reaped>> {
    let region = Region::new(cloud, name, pace);
    let mut all = leftovers(&region).await.trying_to(|| format!("look for what bakes have left in {name}"))?;
    if let Some(wanted) = &which.bake {
        all.retain(|bake, _| bake == wanted);
    }
    let mut problems = Problems::default();
    let mut reaped = Vec::new();
    for (bake, left) in all {
        let spared = spared(&bake, which);
        if spared.is_none() && !which.dry_run {
            let remover = Remover::new(region.clone(), &bake);
            for part in Part::ALL {
                problems.take(remover.remove(part, &Sought::OfBake { settling: false }).await);
            }
        }
        reaped.push(Reaped { bake, left, spared });
    }
    problems.end().map(|()| reaped)
}

/// Why a bake's leftovers are none, perhaps.
fn spared(bake: &str, which: &Leftovers) -> Option<String> {
    if which.running.iter().any(|running| running == bake) {
        return Some("it is running on this machine".to_owned());
    }
    if which.bake.is_some() {
        return None;
    }
    // What has no such id was not tagged by kiln, or not as it does now.
    let Ok(id) = bake.parse::<ulid::Ulid>() else { return Some("its id is not one of a bake".to_owned()) };
    let began = UNIX_EPOCH + Duration::from_millis(id.timestamp_ms());
    let age = SystemTime::now().duration_since(began).unwrap_or_default();
    (age < which.older_than).then(|| format!("it began {} min ago, and may be running elsewhere", age.as_secs() / 60))
}

/// Everything unfinished in a region, by bake and kind.
async fn leftovers(region: &Region) -> api::Result<BTreeMap<String, BTreeMap<String, Vec<String>>>> {
    let Region { machines, images, calls, .. } = region;
    let any = Find::default().with("tag-key", tags::UNFINISHED);
    let own = Find { owners: vec!["self".to_owned()], ..any.clone() };
    let mut all: BTreeMap<String, BTreeMap<String, Vec<String>>> = BTreeMap::new();
    let mut add = |kind: &str, id: String, tags: &Tags| {
        if let Some(bake) = tags.get(tags::BAKE) {
            all.entry(bake.clone()).or_default().entry(kind.to_owned()).or_default().push(id);
        }
    };
    for instance in calls.make(|| machines.instances(&any)).await? {
        if instance.state != InstanceState::Terminated {
            add("instance", instance.id, &instance.tags);
        }
    }
    for request in calls.make(|| machines.spot_requests(&any)).await? {
        if request.live {
            add("spot-request", request.id, &request.tags);
        }
    }
    for group in calls.make(|| machines.groups(&any)).await? {
        add("security-group", group.id, &group.tags);
    }
    for key in calls.make(|| machines.keys(&any)).await? {
        add("key-pair", key.id, &key.tags);
    }
    for volume in calls.make(|| machines.volumes(&any)).await? {
        if !volume.deleting {
            add("volume", volume.id, &volume.tags);
        }
    }
    for image in calls.make(|| images.images(&own)).await? {
        add("image", image.id, &image.tags);
    }
    for snapshot in calls.make(|| images.snapshots(&own)).await? {
        add("snapshot", snapshot.id, &snapshot.tags);
    }
    Ok(all)
}
