//! A disk into a snapshot.
//!
//! ```text
//!  plan ──► intent on disk ──► StartSnapshot ──► PutSnapshotBlock … ──► CompleteSnapshot ──► completed
//!              synced            client token      any order; each noted     count, checksum
//! ```
//!
//! Killed at any arrow, the next attempt goes on from there: what is on the
//! disk is always at least as much as what AWS was asked for. Blocks go out as
//! they are decompressed; their digests come from the block map and are checked
//! by AWS, so nothing is hashed here at all. A block that AWS finds to be
//! another one is read again with a check, to tell damage in the store from
//! damage on the way.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kiln_model::block::BLOCK;
use kiln_model::event::Reports;
use kiln_model::image::BlockMap;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::plan::{self, Write};
use super::state::{Intent, Parent, State};
use super::{Disk, Maps, Region};
use crate::api::ebs::{Encryption, NewSnapshot, SnapshotState};
use crate::api::error::CallExt as _;
use crate::api::images::Snapshot;
use crate::api::{self, CallError, Find, Kind, Tags};
use crate::tags;

/// How long AWS keeps a snapshot that nobody writes to: long enough to go on
/// after a night.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// For how long a snapshot may be made by AWS after its last block.
const COMPLETING: Duration = Duration::from_secs(2 * 60 * 60);

/// Blocks that are read ahead of those under way.
const AHEAD: usize = 16;

/// Blocks under way at most; how many of them are calls is [`crate::api::retry`]'s.
pub(crate) const UNDER_WAY: usize = 64;

/// How often a block is sent again that came out as another one at AWS.
const DAMAGED: usize = 3;

/// How many earlier snapshots are looked at to find the nearest.
const CANDIDATES: usize = 20;

/// A snapshot that holds a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// Its id.
    pub snapshot: String,
    /// Size of its volumes in GiB.
    pub gib: u32,
    /// The snapshot that it is based on.
    pub parent: Option<String>,
    /// Blocks that differ from that one (or are not zero): what was written.
    pub written: u64,
    /// Blocks that this process has sent: less after an earlier attempt, none
    /// when the snapshot was there.
    pub sent: u64,
}

/// What is uploaded, and where to.
pub(crate) struct Upload<'a> {
    pub(crate) region: &'a Region,
    pub(crate) disk: &'a Disk,
    /// Maps of disks that earlier snapshots hold.
    pub(crate) maps: &'a dyn Maps,
    /// ARN of the key to encrypt with.
    pub(crate) key: Option<&'a str>,
    pub(crate) description: &'a str,
    /// Tags beside those that say what is in it.
    pub(crate) tags: &'a Tags,
    /// Folder of what is known of unfinished uploads.
    pub(crate) folder: &'a Path,
    pub(crate) reports: &'a Reports,
}

/// What a snapshot is to become.
struct Goal {
    intent: Intent,
    writes: Arc<Vec<Write>>,
}

impl Upload<'_> {
    /// Makes the snapshot, or takes the one that is there.
    pub(crate) async fn run(&self) -> Result<Uploaded> {
        let gib = plan::gib(self.disk.map.size);
        let mut state = self.turn(gib).await?;
        let begun = self.begun(&state).await?;
        let goal = match begun {
            Some(goal) => goal,
            None => {
                let known = self.known(gib).await?;
                if let Some(there) = known.iter().find(|snapshot| self.holds(snapshot) == Some(self.disk.digest)) {
                    state.clear()?;
                    return Ok(Uploaded { snapshot: there.id.clone(), gib: there.gib, parent: None, written: 0, sent: 0 });
                }
                let goal = self.plan(gib, &known).await?;
                // What is left of another snapshot says nothing of this one.
                state.clear()?;
                goal
            }
        };
        self.carry_out(&mut state, goal).await
    }

    /// The state of this upload; waits for another process that is at the same.
    /// What that one has made is then found, like anything that is there.
    async fn turn(&self, gib: u32) -> Result<State> {
        /// The lock of another process tells nobody when it goes.
        const PAUSE: Duration = Duration::from_millis(200);
        let mut told = false;
        loop {
            if let Some(state) = State::open(self.folder, &self.region.name, &self.disk.digest, gib, self.key)? {
                return Ok(state);
            }
            if !std::mem::replace(&mut told, true) {
                self.reports.note(format!("another kiln is publishing this disk to {}: waiting for it", self.region.name));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What an earlier process has begun and can be gone on with.
    async fn begun(&self, state: &State) -> Result<Option<Goal>> {
        let Some((intent, ago)) = state.read() else { return Ok(None) };
        if let Some(id) = &intent.snapshot {
            let one = Find::id(id);
            let find = || self.region.images.snapshots(&one);
            // One that was begun a moment ago need not be known everywhere yet.
            let calls = &self.region.calls;
            let there = if ago > calls.pace().lag {
                calls.make(|| async { found(find().await) }).await
            } else {
                let seen = calls.wait(calls.pace().lag, || async { found(find().await).map(|found| found.map(Some)) }).await;
                seen.map(Option::flatten).or_else(|error| if error.kind == Kind::NotFound { Ok(None) } else { Err(error) })
            };
            match there.trying_to(|| format!("look at the snapshot {id}"))? {
                Some(snapshot) if snapshot.state != SnapshotState::Failed => {}
                _ => return Ok(None),
            }
        }
        let parent = match &intent.parent {
            None => None,
            // Without its map it is not known any more what was to be written.
            Some(parent) => match self.maps.map(&parent.disk, None).await? {
                Some(map) => Some(map),
                None => return Ok(None),
            },
        };
        let writes = Arc::new(plan::writes(&self.disk.map, parent.as_ref()));
        Ok(Some(Goal { intent, writes }))
    }

    /// The completed snapshots of this account that hold disks known by their
    /// digests, and are encrypted as this one is to be; newest first, those of
    /// images of this name before all others.
    async fn known(&self, gib: u32) -> Result<Vec<Snapshot>> {
        let find = Find::own().with("tag-key", tags::DISK_DIGEST);
        let all = self.region.calls.make(|| self.region.images.snapshots(&find)).await;
        let mut all = all.trying_to(|| format!("list the snapshots in {}", self.region.name))?;
        all.retain(|snapshot| {
            let key = snapshot.tags.get(tags::KEY).map(String::as_str);
            let encrypted = key == self.key && (key.is_none() || snapshot.key.as_deref() == key);
            snapshot.state == SnapshotState::Completed && snapshot.gib <= gib && encrypted && self.holds(snapshot).is_some()
        });
        let name = self.tags.get(tags::NAME);
        all.sort_by_key(|snapshot| (snapshot.tags.get(tags::NAME) != name, std::cmp::Reverse(snapshot.started)));
        Ok(all)
    }

    /// Digest of the disk in a snapshot, as its tags have it. A snapshot of
    /// another size than the disk's is no snapshot of it.
    fn holds(&self, snapshot: &Snapshot) -> Option<Digest> {
        let size: u64 = snapshot.tags.get(tags::DISK_SIZE)?.parse().ok()?;
        let disk = snapshot.tags.get(tags::DISK_DIGEST)?.parse().ok()?;
        (plan::gib(size) == snapshot.gib).then_some(disk)
    }

    /// What to write, on the snapshot from which least differs.
    async fn plan(&self, gib: u32, known: &[Snapshot]) -> Result<Goal> {
        let mut best = (None, plan::writes(&self.disk.map, None));
        let mut looked_at = HashSet::new();
        for snapshot in known {
            let Some(disk) = self.holds(snapshot) else { continue };
            if looked_at.len() >= CANDIDATES || !looked_at.insert(disk) {
                continue;
            }
            let image = snapshot.tags.get(tags::DIGEST).and_then(|digest| digest.parse().ok());
            let Some(map) = self.maps.map(&disk, image.as_ref()).await? else { continue };
            let writes = plan::writes(&self.disk.map, Some(&map));
            if writes.len() < best.1.len() {
                best = (Some(Parent { snapshot: snapshot.id.clone(), disk }), writes);
            }
        }
        let (parent, writes) = best;
        let key = self.key.map(str::to_owned);
        let mut all_tags = self.tags.clone();
        all_tags.insert(tags::DISK_DIGEST.to_owned(), self.disk.digest.to_string());
        all_tags.insert(tags::DISK_SIZE.to_owned(), self.disk.map.size.to_string());
        all_tags.extend(key.clone().map(|key| (tags::KEY.to_owned(), key)));
        let intent = Intent::new(gib, parent, key, self.description.to_owned(), all_tags);
        Ok(Goal { intent, writes: Arc::new(writes) })
    }

    async fn carry_out(&self, state: &mut State, goal: Goal) -> Result<Uploaded> {
        let Goal { mut intent, writes } = goal;
        let snapshot = match &intent.snapshot {
            Some(snapshot) => snapshot.clone(),
            None => {
                state.write(&intent)?;
                let started = self.start(&intent).await?;
                intent.snapshot = Some(started.clone());
                state.write(&intent)?;
                started
            }
        };
        let mut taken = state.taken();
        // What was noted of blocks that are not to be written is of no use.
        let planned: HashSet<u32> = writes.iter().map(|write| write.index).collect();
        if !taken.is_subset(&planned) {
            state.start_over()?;
            taken.clear();
        }
        let mut sent = 0;
        if !intent.completing {
            sent += self.send(state, &snapshot, &writes, &taken).await?;
            intent.completing = true;
            state.write(&intent)?;
        }
        if let Err(error) = self.complete(&snapshot, &writes).await {
            // AWS does not have all that was noted, or has not had it yet when
            // it was asked: everything again, once.
            if error.kind() != Code::Corrupt {
                return Err(error);
            }
            if taken.is_empty() {
                state.clear()?;
                return Err(error.code(Code::Failed));
            }
            state.start_over()?;
            sent += self.send(state, &snapshot, &writes, &HashSet::new()).await?;
            self.complete(&snapshot, &writes).await?;
        }
        self.completed(&snapshot).await?;
        state.clear()?;
        let parent = intent.parent.map(|parent| parent.snapshot);
        Ok(Uploaded { snapshot, gib: intent.gib, parent, written: writes.len() as u64, sent })
    }

    async fn start(&self, intent: &Intent) -> Result<String> {
        let new = NewSnapshot {
            token: intent.token.clone(),
            gib: intent.gib,
            parent: intent.parent.as_ref().map(|parent| parent.snapshot.clone()),
            // A parent gives its own.
            encryption: match (&intent.parent, &intent.key) {
                (None, Some(key)) => Encryption::Key(key.clone()),
                _ => Encryption::Inherited,
            },
            description: intent.description.clone(),
            tags: intent.tags.clone(),
            timeout: KEPT,
        };
        let started = self.region.calls.make(|| self.region.ebs.start_snapshot(&new)).await;
        let started = started.trying_to(|| format!("begin a snapshot in {}", self.region.name))?;
        if u64::from(started.block_size) != BLOCK {
            let what = format!("{} has blocks of {} bytes, and kiln's have {BLOCK}", started.id, started.block_size);
            return Err(Error::new(Code::Failed, what).next("what answers is not the EBS direct APIs of AWS"));
        }
        Ok(started.id)
    }

    /// Sends what is not taken yet; gives how many blocks that were.
    async fn send(&self, state: &mut State, snapshot: &str, writes: &Arc<Vec<Write>>, taken: &HashSet<u32>) -> Result<u64> {
        let left: Vec<Write> = writes.iter().filter(|write| !taken.contains(&write.index)).copied().collect();
        let left = Arc::new(left);
        let total = left.len() as u64 * BLOCK;
        let name = format!("upload to {}", self.region.name);
        self.reports.progress(&name, 0, Some(total));
        let (give, mut blocks) = mpsc::channel(AHEAD);
        let mut readers = JoinSet::new();
        let next = Arc::new(AtomicUsize::new(0));
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8).min(left.len());
        for _ in 0..threads {
            let reader = Reading { disk: self.disk.clone(), left: left.clone(), next: next.clone(), give: give.clone() };
            readers.spawn_blocking(move || reader.run());
        }
        drop(give);
        let mut puts: JoinSet<Result<u32>> = JoinSet::new();
        let mut done = 0;
        let mut open = true;
        let mut outcome = Ok(());
        while outcome.is_ok() && (open || !puts.is_empty()) {
            // A snapshot that was begun a moment ago may be unknown: one block
            // finds out when it is not.
            let room = if done == 0 { 1 } else { UNDER_WAY };
            tokio::select! {
                block = blocks.recv(), if open && puts.len() < room => match block {
                    Some((write, data)) => {
                        let (region, snapshot, disk) = (self.region.clone(), snapshot.to_owned(), self.disk.clone());
                        puts.spawn(async move { put(&region, &disk, &snapshot, write, data).await });
                    }
                    None => open = false,
                },
                Some(put) = puts.join_next(), if !puts.is_empty() => {
                    match put.trying(|| "send a block".into()).and_then(|put| put) {
                        Ok(index) => {
                            outcome = state.took(index);
                            done += 1;
                            self.reports.progress(&name, done * BLOCK, Some(total));
                        }
                        Err(error) => outcome = Err(error),
                    }
                }
            }
        }
        // Readers end when nobody takes what they read.
        drop(blocks);
        while let Some(reader) = readers.join_next().await {
            let reader = reader.trying(|| "read the disk".into()).and_then(|read| read);
            // Why no block came says more than that one did not.
            outcome = outcome.and(reader);
        }
        // What has arrived meanwhile need not be sent again. What is still under
        // way arrives or not, and is.
        while let Some(Ok(Ok(index))) = puts.try_join_next() {
            outcome = outcome.and(state.took(index));
        }
        outcome.map(|()| done)
    }

    /// Completes the snapshot: [`Code::Corrupt`] when AWS has other blocks than
    /// these.
    async fn complete(&self, snapshot: &str, writes: &[Write]) -> Result<()> {
        let changed = u32::try_from(writes.len()).unwrap_or(u32::MAX);
        let checksum = plan::checksum(writes);
        let calls = &self.region.calls;
        let failed = match calls.make(|| self.region.ebs.complete_snapshot(snapshot, changed, &checksum)).await {
            Ok(_) => return Ok(()),
            Err(error) if matches!(error.kind, Kind::Exists | Kind::State | Kind::Invalid) => error,
            Err(error) => return Err(error.trying(format!("complete the snapshot {snapshot}"))),
        };
        // An earlier call may have been carried out, and its answer lost: then
        // it is completed, or soon will be.
        let seen = calls.wait(calls.pace().lag, || self.ended(snapshot)).await.trying_to(|| format!("look at the snapshot {snapshot}"))?;
        match seen {
            Some(SnapshotState::Completed) => Ok(()),
            _ => Err(failed.trying(format!("complete the snapshot {snapshot}")).code(Code::Corrupt)),
        }
    }

    async fn look(&self, snapshot: &str) -> api::Result<Option<SnapshotState>> {
        let found = found(self.region.images.snapshots(&Find::id(snapshot)).await)?;
        Ok(found.map(|snapshot| snapshot.state))
    }

    /// As [`Upload::look`], once it is not pending any more.
    async fn ended(&self, snapshot: &str) -> api::Result<Option<SnapshotState>> {
        Ok(self.look(snapshot).await?.filter(|state| *state != SnapshotState::Pending))
    }

    /// Waits until AWS has completed it.
    async fn completed(&self, snapshot: &str) -> Result<()> {
        self.reports.note(format!("AWS is completing the snapshot {snapshot}"));
        let state =
            self.region.calls.wait(COMPLETING, || self.ended(snapshot)).await.trying_to(|| format!("look at the snapshot {snapshot}"))?;
        match state {
            Some(SnapshotState::Completed) => Ok(()),
            Some(_) => {
                let next = "run the same command again: it begins another one";
                Err(Error::new(Code::Infrastructure, format!("AWS could not complete the snapshot {snapshot}")).next(next))
            }
            None => Err(Error::new(Code::Timeout, format!("AWS has not completed the snapshot {snapshot} within two hours"))
                .next("run the same command again: it goes on waiting")),
        }
    }
}

/// The one snapshot that was asked for; `None` when it is not there.
fn found(snapshots: api::Result<Vec<Snapshot>>) -> api::Result<Option<Snapshot>> {
    match snapshots {
        Ok(snapshots) => Ok(snapshots.into_iter().next()),
        Err(error) if error.kind == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes one block; gives its index.
async fn put(region: &Region, disk: &Disk, snapshot: &str, write: Write, data: Bytes) -> Result<u32> {
    let Write { index, digest, zero } = write;
    for attempt in 1.. {
        // A snapshot that was just begun may be unknown for a moment.
        let done = region.blocks.make_of_new(|| region.ebs.put_block(snapshot, index, data.clone(), &digest)).await;
        let error: CallError = match done {
            Ok(()) => return Ok(index),
            Err(error) => error,
        };
        if error.kind == Kind::Invalid && attempt <= DAMAGED && !zero {
            let blocks = disk.blocks.clone();
            let check = move || blocks.reader()?.check(index as usize);
            tokio::task::spawn_blocking(check).await.trying(|| "read the disk".into())??;
            continue;
        }
        return Err(error.trying(format!("write block {index} of the snapshot {snapshot}")));
    }
    Ok(index)
}

/// A thread that reads blocks.
struct Reading {
    disk: Disk,
    left: Arc<Vec<Write>>,
    next: Arc<AtomicUsize>,
    give: mpsc::Sender<(Write, Bytes)>,
}

impl Reading {
    fn run(self) -> Result<()> {
        const ZEROS: &[u8] = &[0; BLOCK as usize];
        let mut reader = self.disk.blocks.reader()?;
        while let Some(write) = self.left.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let data = if write.zero { Bytes::from_static(ZEROS) } else { Bytes::from(reader.read(write.index as usize)?) };
            if self.give.blocking_send((*write, data)).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Checks that a map is the map of a disk.
pub(crate) fn is_of(map: &BlockMap, disk: &Digest) -> bool {
    map.disk_digest() == *disk
}
