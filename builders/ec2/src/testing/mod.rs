//! AWS in memory, as strict as it is documented to be, for unit tests: block
//! size, checksums, counts, aggregation, parents, client tokens, names. It
//! throttles, lags and fails where a test says so, and counts every call.

mod blocks;
mod images;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

use crate::api::ebs::{NewSnapshot, SnapshotState};
use crate::api::images::{Audience, Image, Use};
use crate::api::parameters::Parameter;
use crate::api::retry::Pace;
use crate::api::{CallError, Cloud, Ebs, Images, Kind, Machines, Parameters, Result, Tags};

/// A pace at which tests do not sleep for long.
pub(crate) fn quick() -> Pace {
    Pace {
        first: Duration::from_micros(200),
        longest: Duration::from_millis(4),
        throttled: Duration::from_secs(20),
        failing: Duration::from_secs(10),
        lag: Duration::from_millis(300),
        look: Duration::from_millis(1),
    }
}

/// What goes wrong with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is not carried out: AWS says that it failed.
    Failed,
    /// It is carried out, and the answer lost.
    Lost,
    /// From this call on the process is as good as dead: nothing is carried
    /// out any more.
    Dead,
}

/// AWS.
#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<State>>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) regions: BTreeMap<String, RegionState>,
    /// What was called, failed calls included.
    pub(crate) calls: Vec<&'static str>,
    pub(crate) throttle: u64,
    pub(crate) lag: Duration,
    /// Number of the call, from 0, and what happens to it.
    pub(crate) fault: Option<(usize, Fault)>,
    /// How long AWS takes to complete a snapshot or to make a copy.
    pub(crate) making: Duration,
    ids: u64,
    random: u64,
}

#[derive(Default)]
pub(crate) struct RegionState {
    pub(crate) snapshots: BTreeMap<String, Snap>,
    pub(crate) images: BTreeMap<String, Ami>,
    pub(crate) parameters: BTreeMap<String, Parameter>,
    pub(crate) uses: Vec<Use>,
    copies: HashMap<String, String>,
}

pub(crate) struct Snap {
    pub(crate) asked: NewSnapshot,
    pub(crate) blocks: BTreeMap<u32, Bytes>,
    pub(crate) written: BTreeMap<u32, kiln_model::Digest>,
    pub(crate) tags: Tags,
    pub(crate) key: Option<String>,
    pub(crate) accounts: Vec<String>,
    pub(crate) began: jiff::Timestamp,
    since: Instant,
    completed: Option<Instant>,
}

pub(crate) struct Ami {
    pub(crate) image: Image,
    pub(crate) audience: Vec<Audience>,
    since: Instant,
    ready: Instant,
}

impl Snap {
    fn state(&self) -> SnapshotState {
        match self.completed {
            Some(at) if at <= Instant::now() => SnapshotState::Completed,
            _ => SnapshotState::Pending,
        }
    }
}

impl Fake {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn with(change: impl FnOnce(&mut State)) -> Self {
        let fake = Self::default();
        change(&mut fake.state());
        fake
    }

    pub(crate) fn count(&self, action: &str) -> usize {
        self.state().calls.iter().filter(|call| **call == action).count()
    }

    /// Forgets what was called so far.
    pub(crate) fn again(&self) {
        let mut state = self.state();
        state.calls.clear();
        state.fault = None;
    }

    /// One call: noted, perhaps failed, carried out, perhaps lost.
    pub(crate) fn call<T>(&self, action: &'static str, region: &str, work: impl FnOnce(&mut Carried<'_>) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        let number = state.calls.len();
        state.calls.push(action);
        let fault = state.fault.filter(|(at, fault)| *at == number || *fault == Fault::Dead && *at < number).map(|(_, fault)| fault);
        match fault {
            Some(Fault::Failed) => return Err(CallError::answered(action, 500, "InternalError", "planned")),
            Some(Fault::Dead) => return Err(CallError::answered(action, 403, "AccessDenied", "the process is dead")),
            _ => {}
        }
        state.random = state.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if (state.random >> 33) % 100 < state.throttle {
            return Err(CallError::answered(action, 503, "RequestLimitExceeded", "too many calls"));
        }
        let (lag, making) = (state.lag, state.making);
        state.ids += 1;
        let id = state.ids;
        let done = work(&mut Carried { action, region, lag, making, id, state: &mut state });
        match fault {
            Some(Fault::Lost) if done.is_ok() => Err(CallError::unanswered(action, "the connection was reset")),
            _ => done,
        }
    }
}

/// A call that is carried out.
pub(crate) struct Carried<'a> {
    action: &'static str,
    region: &'a str,
    lag: Duration,
    making: Duration,
    id: u64,
    state: &'a mut State,
}

impl Carried<'_> {
    fn here(&mut self) -> &mut RegionState {
        self.state.regions.entry(self.region.to_owned()).or_default()
    }

    fn fails<T>(&self, code: &str, why: impl Into<String>) -> Result<T> {
        Err(CallError::answered(self.action, 400, code, &why.into()))
    }
}

impl Cloud for Fake {
    fn ebs(&self, region: &str) -> Arc<dyn Ebs> {
        Arc::new(Service { fake: self.clone(), region: region.to_owned() })
    }

    fn images(&self, region: &str) -> Arc<dyn Images> {
        Arc::new(Service { fake: self.clone(), region: region.to_owned() })
    }

    fn machines(&self, _: &str) -> Arc<dyn Machines> {
        // Instances are tested in `crate::bake`, against EC2 in memory there.
        panic!("nothing that is published needs an instance")
    }

    fn parameters(&self, region: &str) -> Arc<dyn Parameters> {
        Arc::new(Service { fake: self.clone(), region: region.to_owned() })
    }
}

/// The services of one region.
pub(crate) struct Service {
    fake: Fake,
    region: String,
}

impl Service {
    fn call<T>(&self, action: &'static str, work: impl FnOnce(&mut Carried<'_>) -> Result<T>) -> Result<T> {
        self.fake.call(action, &self.region, work)
    }
}

#[async_trait]
impl Parameters for Service {
    async fn get(&self, name: &str) -> Result<Option<Parameter>> {
        self.call("GetParameter", |call| Ok(call.here().parameters.get(name).cloned()))
    }

    async fn put_image(&self, name: &str, image: &str) -> Result<()> {
        self.call("PutParameter", |call| {
            if !call.here().images.contains_key(image) {
                return call.fails("ValidationException", "there is no such AMI");
            }
            let version = call.here().parameters.get(name).map_or(0, |there| there.version) + 1;
            call.here().parameters.insert(name.to_owned(), Parameter { value: image.to_owned(), version });
            Ok(())
        })
    }
}

/// Whether tags fulfil a filter by tag; `None` for a filter of another kind.
fn by_tag(filter: &(String, Vec<String>), tags: &Tags) -> Option<bool> {
    let (name, values) = filter;
    if name == "tag-key" {
        return Some(values.iter().any(|key| tags.contains_key(key)));
    }
    let key = name.strip_prefix("tag:")?;
    Some(tags.get(key).is_some_and(|value| values.contains(value)))
}

#[test]
fn kinds_of_planned_faults() {
    let fake = Fake::with(|state| state.fault = Some((1, Fault::Dead)));
    let call = |fake: &Fake| fake.call("Call", "eu-central-1", |_| Ok(()));
    assert!(call(&fake).is_ok());
    assert_eq!(call(&fake).map_err(|error| error.kind), Err(Kind::Denied));
    assert_eq!(call(&fake).map_err(|error| error.kind), Err(Kind::Denied));
    fake.again();
    fake.state().fault = Some((0, Fault::Lost));
    assert_eq!(call(&fake).map_err(|error| error.kind), Err(Kind::Transient));
    assert!(call(&fake).is_ok());
}
