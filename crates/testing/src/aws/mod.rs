//! AWS for tests: [`Moto`], and before it a front that is as strict as AWS.
//!
//! ```no_run
//! use kiln_testing::{Aws, Failure, Moto};
//!
//! # fn main() -> kiln_model::Result<()> {
//! let moto = Moto::start()?;
//! let aws = Aws::before(&moto)?;
//! aws.throttle(30).fail("RegisterImage", 1, Failure::internal());
//! // … run with `aws.environment()` …
//! assert!(aws.count("PutSnapshotBlock") > 0);
//! # Ok(())
//! # }
//! ```
//!
//! ```text
//!  kiln, coldsnap, aws …
//!     │  AWS_ENDPOINT_URL: one address for all services
//!     ▼
//!  server.rs ── calls.rs    counted
//!     │      ── faults.rs   throttled, failed, lost where that is planned
//!     ├─ /snapshots… ────── ebs.rs          the EBS direct APIs, held in snapshots.rs
//!     ├─ EC2 (a form) ───── ec2.rs          snapshots, tags, client tokens, what is not seen yet
//!     │                     images.rs       images
//!     │                     instances.rs    states on the way
//!     │                     keys.rs         key pairs by id
//!     └─ SSM, STS, … ─────────────────────┐ as they came
//!                                         ▼
//!                                     moto.rs
//! ```
//!
//! moto proves calls, not correctness: it takes blocks of any size with any
//! checksum, forgets parents, gives the same instance for any token and an
//! image for any mapping. So the front holds the blocks itself, and what it
//! knows of snapshots and images goes before what moto believes.

mod calls;
mod ebs;
mod ec2;
mod faults;
mod images;
mod instances;
mod keys;
mod moto;
mod query;
mod server;
mod snapshots;
mod xml;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use tempfile::TempDir;
use tokio::sync::oneshot;

pub use calls::{Call, most_within};
pub use faults::Failure;
pub use moto::Moto;

use query::Query;
use server::{Shared, State, lock};
use snapshots::Shelf;

/// Whom everything belongs to: moto's account.
pub(crate) const ACCOUNT: &str = "123456789012";
/// Where a request without a region goes.
pub(crate) const REGION: &str = "us-east-1";

/// AWS, as far as kiln needs it, at a loopback port; gone when it is dropped.
///
/// Runs in threads of its own. Settings hold for the calls that come after.
pub struct Aws {
    address: String,
    shared: Arc<Shared>,
    handle: tokio::runtime::Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    _folder: TempDir,
}

/// What of a region is still there, and costs money.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Left {
    /// Instances that are not terminated.
    pub instances: Vec<String>,
    /// Volumes.
    pub volumes: Vec<String>,
    /// Names of key pairs.
    pub key_pairs: Vec<String>,
    /// Security groups but the default ones.
    pub security_groups: Vec<String>,
    /// Spot requests that are open or active.
    pub spot_requests: Vec<String>,
    /// The account's snapshots.
    pub snapshots: Vec<String>,
    /// The account's images.
    pub images: Vec<String>,
}

impl Left {
    /// Whether there is nothing but snapshots and images.
    pub fn is_clean(&self) -> bool {
        [&self.instances, &self.volumes, &self.key_pairs, &self.security_groups, &self.spot_requests].iter().all(|left| left.is_empty())
    }
}

impl Aws {
    /// One before moto.
    ///
    /// # Errors
    /// When there is no port, no thread or no folder for it.
    pub fn before(moto: &Moto) -> Result<Self> {
        Self::start(Some(moto::Upstream::new(moto.address())))
    }

    /// The EBS direct APIs alone, for who needs nothing else.
    ///
    /// # Errors
    /// As [`Aws::before`].
    pub fn alone() -> Result<Self> {
        Self::start(None)
    }

    fn start(moto: Option<moto::Upstream>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("kiln-aws-").tempdir().trying(|| "make a folder for blocks".into())?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").trying(|| "listen on a port".into())?;
        listener.set_nonblocking(true).trying(|| "listen on a port".into())?;
        let address = listener.local_addr().trying(|| "listen on a port".into())?.to_string();
        let shared = Arc::new(Shared {
            moto,
            shelf: Shelf::new(folder.path()),
            state: Mutex::new(State::default()),
            faults: Mutex::default(),
            calls: Mutex::default(),
            starting: tokio::sync::Mutex::default(),
            secret: Digest::of(format!("{address} {}", folder.path().display())).hex(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.trying(|| "start the front".into())?;
        let (stop, stopped) = oneshot::channel();
        let (handle, for_thread) = (runtime.handle().clone(), shared.clone());
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped => {}
                    () = server::accept(listener, for_thread) => {}
                }
            });
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("aws".into()).spawn(run).trying(|| "start the front".into())?;
        Ok(Self { address, shared, handle, stop: Some(stop), thread: Some(thread), _folder: folder })
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What a program has to find in its environment to speak to this, and to
    /// nothing else.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_ACCESS_KEY_ID", "front".into()),
            ("AWS_SECRET_ACCESS_KEY", "front".into()),
            ("AWS_REGION", REGION.into()),
            ("AWS_EC2_METADATA_DISABLED", "true".into()),
            ("AWS_CONFIG_FILE", "/dev/null".into()),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null".into()),
        ]
    }

    /// So many of a hundred calls are told that there are too many.
    pub fn throttle(&self, percent: u32) -> &Self {
        lock(&self.shared.faults).throttle = percent;
        self
    }

    /// What is made does not exist for EC2's calls before so long.
    pub fn lag(&self, lag: Duration) -> &Self {
        lock(&self.shared.faults).lag = lag;
        self
    }

    /// The `nth` call of `action` from now on (from 1; `*`: of any) fails.
    pub fn fail(&self, action: &str, nth: usize, failure: Failure) -> &Self {
        lock(&self.shared.faults).plan(action, nth, failure);
        self
    }

    /// Takes throttling, lag and failures back.
    pub fn heal(&self) -> &Self {
        lock(&self.shared.faults).heal();
        self
    }

    /// What is begun takes so long: a snapshot is completed, an image
    /// available, an instance running or gone that much later. A fifth of a
    /// second unless said.
    pub fn settling(&self, settling: Duration) -> &Self {
        lock(&self.shared.state).settling = settling;
        self
    }

    /// More calls of EBS at once than so many are throttled.
    pub fn at_once(&self, calls: usize) -> &Self {
        lock(&self.shared.state).at_once = calls;
        self
    }

    /// Lists of blocks come in pages of at most so many.
    pub fn page(&self, entries: usize) -> &Self {
        lock(&self.shared.state).page = entries.max(1);
        self
    }

    /// The root volume of every instance holds this raw disk, which is read
    /// when an image is created.
    pub fn instance_disk(&self, disk: &Path) -> &Self {
        lock(&self.shared.state).disk = Some(disk.to_owned());
        self
    }

    /// The calls that came, in order.
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.shared.calls).all()
    }

    /// How often `action` was called, whatever was answered.
    pub fn count(&self, action: &str) -> usize {
        self.calls().iter().filter(|call| call.action == action).count()
    }

    /// The most calls that were under way at once.
    pub fn most_at_once(&self) -> usize {
        lock(&self.shared.calls).most()
    }

    /// Forgets the calls that came, so that counting begins anew.
    pub fn forget(&self) {
        lock(&self.shared.calls).forget();
    }

    /// Writes what a snapshot holds, of the size of its volume, as a raw disk.
    ///
    /// # Errors
    /// [`Code::NotFound`] when there is no such snapshot.
    pub fn snapshot_to_raw(&self, id: &str, to: &Path) -> Result<()> {
        let snapshot = lock(&self.shared.state).snapshots.get(id).cloned();
        let snapshot = snapshot.ok_or_else(|| Error::new(Code::NotFound, format!("the front has no snapshot {id}")))?;
        let write = self.shared.shelf.write(&snapshot.blocks(), snapshot.wish.size << 30, to);
        write.trying(|| format!("write {}", to.display()))
    }

    /// The ids of the snapshots that the front holds, in no order.
    pub fn snapshots(&self) -> Vec<String> {
        lock(&self.shared.state).snapshots.keys().cloned().collect()
    }

    /// What a region still holds. Asks moto, and is no call.
    ///
    /// # Errors
    /// When moto does not answer.
    pub fn left(&self, region: &str) -> Result<Left> {
        let (shared, region) = (self.shared.clone(), region.to_owned());
        let (sender, receiver) = std::sync::mpsc::channel();
        self.handle.spawn(async move {
            let _ = sender.send(shared.left(&region).await);
        });
        let left = receiver.recv().trying(|| "ask moto".into())?;
        left.map_err(|wrong| Error::new(Code::Failed, "moto does not say what is left").detail(format!("{wrong:?}")))
    }
}

impl Shared {
    async fn left(&self, region: &str) -> ec2::Done<Left> {
        let ask = |action: &str| Query::new(action);
        let ids = |said: &xml::Element, set: &str, name: &str, wanted: &dyn Fn(&xml::Element) -> bool| {
            said.items(set).iter().filter(|item| wanted(item)).map(|item| item.at(name).to_owned()).collect::<Vec<String>>()
        };
        let instances = self.pass(region, &ask("DescribeInstances")).await?;
        let mut left = Left::default();
        for reservation in instances.items("reservationSet") {
            left.instances.extend(ids(reservation, "instancesSet", "instanceId", &|item| item.at("instanceState/name") != "terminated"));
        }
        let any = |_: &xml::Element| true;
        left.volumes = ids(&self.pass(region, &ask("DescribeVolumes")).await?, "volumeSet", "volumeId", &any);
        left.key_pairs = ids(&self.pass(region, &ask("DescribeKeyPairs")).await?, "keySet", "keyName", &any);
        let groups = self.pass(region, &ask("DescribeSecurityGroups")).await?;
        left.security_groups = ids(&groups, "securityGroupInfo", "groupId", &|item| item.at("groupName") != "default");
        let spot = self.pass(region, &ask("DescribeSpotInstanceRequests")).await?;
        left.spot_requests =
            ids(&spot, "spotInstanceRequestSet", "spotInstanceRequestId", &|item| ["open", "active"].contains(&item.at("state")));
        let own = |action: &str| Query::new(action).with("Owner.1", "self");
        let snapshots = self.ec2_call(region, &own("DescribeSnapshots")).await?;
        left.snapshots = ids(&snapshots, "snapshotSet", "snapshotId", &any);
        let images = self.ec2_call(region, &own("DescribeImages")).await?;
        left.images = ids(&images, "imagesSet", "imageId", &any);
        Ok(left)
    }
}

impl Drop for Aws {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
