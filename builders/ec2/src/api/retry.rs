//! Making a call until it succeeds: how long, how often, and how many at once.
//!
//! AWS answers "too many" to whoever calls too often, and counts those calls
//! too; so the answer to it is to call less, not only later. [`Calls`] bounds
//! the calls under way and halves that bound when AWS throttles, and raises it
//! by one with each round that it does not (additive increase, multiplicative
//! decrease, as TCP does). Each call that failed waits for a random time below
//! a bound that doubles.
//!
//! What was made a moment ago is not known to every server of AWS at once.
//! That a thing "does not exist" which this very program has made is therefore
//! a reason to ask again, for [`Pace::lag`].

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Kind, Result};

/// How long to wait for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Most that is waited after a first failure; doubles with each further one.
    pub first: Duration,
    /// Most that is waited between two calls.
    pub longest: Duration,
    /// For how long a call is repeated while AWS throttles.
    pub throttled: Duration,
    /// For how long a call is repeated while AWS fails or does not answer.
    pub failing: Duration,
    /// For how long something that was just made may be unknown.
    pub lag: Duration,
    /// Time between the first two looks at what AWS is making; grows to a hundred
    /// times as much.
    pub look: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(200),
            longest: Duration::from_secs(20),
            throttled: Duration::from_secs(15 * 60),
            failing: Duration::from_secs(2 * 60),
            lag: Duration::from_secs(2 * 60),
            look: Duration::from_millis(100),
        }
    }
}

/// Fewest calls under way that throttling brings it to.
const FEWEST: f64 = 2.0;

/// The calls that are made of one service in one region.
pub struct Calls {
    pace: Pace,
    most: f64,
    gate: Mutex<Gate>,
    free: Notify,
}

struct Gate {
    /// How many may be under way.
    limit: f64,
    running: usize,
    /// Calls that were begun before this time say nothing new by being throttled.
    cut: Instant,
    made: u64,
}

/// A call's place among those under way; given back when dropped.
struct Place<'a>(&'a Calls);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.gate().running -= 1;
        self.0.free.notify_one();
    }
}

impl Calls {
    /// At most `most` calls at once.
    pub fn new(pace: Pace, most: usize) -> Self {
        let most = most.max(1) as f64;
        let gate = Gate { limit: most.min(16.0), running: 0, cut: Instant::now(), made: 0 };
        Self { pace, most, gate: Mutex::new(gate), free: Notify::new() }
    }

    /// How long what is waited for.
    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    /// How many calls were made so far, failed ones included.
    pub fn made(&self) -> u64 {
        self.gate().made
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call until it succeeds, fails for a reason that repeating does
    /// not change, or the time is over. It may be carried out more than once:
    /// the call has to bear that, by a client token or by its nature.
    ///
    /// # Errors
    /// The call's last failure.
    pub async fn make<T, F, A>(&self, call: F) -> Result<T>
    where
        F: Fn() -> A + Send + Sync,
        A: Future<Output = Result<T>> + Send,
        T: Send,
    {
        self.repeat(call, Duration::ZERO).await
    }

    /// As [`Calls::make`], about something that was made a moment ago: that it
    /// does not exist is a reason to repeat too.
    ///
    /// # Errors
    /// As [`Calls::make`].
    pub async fn make_of_new<T, F, A>(&self, call: F) -> Result<T>
    where
        F: Fn() -> A + Send + Sync,
        A: Future<Output = Result<T>> + Send,
        T: Send,
    {
        self.repeat(call, self.pace.lag).await
    }

    async fn repeat<T, F, A>(&self, call: F, unknown: Duration) -> Result<T>
    where
        F: Fn() -> A + Send + Sync,
        A: Future<Output = Result<T>> + Send,
        T: Send,
    {
        let begun = Instant::now();
        let mut bound = self.pace.first;
        loop {
            let (made, at) = {
                let _place = self.enter().await;
                let at = Instant::now();
                (call().await, at)
            };
            let error = match made {
                Ok(value) => {
                    self.went_well();
                    return Ok(value);
                }
                Err(error) => error,
            };
            let patience = match error.kind {
                Kind::Throttled => {
                    self.slow_down(at);
                    self.pace.throttled
                }
                Kind::Transient => self.pace.failing,
                Kind::NotFound => unknown,
                _ => return Err(error),
            };
            if begun.elapsed() >= patience {
                return Err(error);
            }
            tokio::time::sleep(Self::up_to(bound)).await;
            bound = (bound * 2).min(self.pace.longest);
        }
    }

    /// Looks until there is what is looked for; `None` when that was not so
    /// within `limit`. That the thing does not exist is borne for
    /// [`Pace::lag`].
    ///
    /// # Errors
    /// The last failure of `look`.
    pub async fn wait<T, F, A>(&self, limit: Duration, look: F) -> Result<Option<T>>
    where
        F: Fn() -> A + Send + Sync,
        A: Future<Output = Result<Option<T>>> + Send,
        T: Send,
    {
        let begun = Instant::now();
        let mut pause = self.pace.look;
        loop {
            if let Some(found) = self.make_of_new(&look).await? {
                return Ok(Some(found));
            }
            if begun.elapsed() >= limit {
                return Ok(None);
            }
            tokio::time::sleep(pause.min(limit.saturating_sub(begun.elapsed()))).await;
            pause = (pause + pause / 2).min(self.pace.look * 100);
        }
    }

    async fn enter(&self) -> Place<'_> {
        loop {
            let freed = self.free.notified();
            {
                let mut gate = self.gate();
                if (gate.running as f64) < gate.limit.floor() {
                    gate.running += 1;
                    gate.made += 1;
                    return Place(self);
                }
            }
            freed.await;
        }
    }

    fn went_well(&self) {
        let mut gate = self.gate();
        gate.limit = (gate.limit + 1.0 / gate.limit).min(self.most);
        drop(gate);
        self.free.notify_one();
    }

    /// Halves the bound, once for all the calls that were under way together.
    fn slow_down(&self, begun: Instant) {
        let mut gate = self.gate();
        if begun >= gate.cut {
            gate.limit = (gate.limit / 2.0).max(FEWEST).min(self.most);
            gate.cut = Instant::now();
        }
    }

    /// A random time, not above this.
    fn up_to(bound: Duration) -> Duration {
        // Each has random keys of its own.
        let share = u32::try_from(RandomState::new().build_hasher().finish() >> 48).unwrap_or(0);
        // Never nothing: calls that come back at once are the storm.
        bound / 4 + bound * 3 / 4 * share / (1 << 16)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::api::CallError;

    fn quick() -> Pace {
        Pace {
            first: Duration::from_micros(200),
            longest: Duration::from_millis(5),
            throttled: Duration::from_secs(20),
            failing: Duration::from_secs(5),
            lag: Duration::from_secs(5),
            look: Duration::from_millis(1),
        }
    }

    fn failure(status: u16, code: &str) -> CallError {
        CallError::answered("Call", status, code, "said so")
    }

    #[tokio::test]
    async fn what_passes_is_repeated_and_what_does_not_is_not() {
        for (code, calls) in [("RequestLimitExceeded", 4), ("InternalError", 4), ("InvalidParameterValue", 1), ("AccessDenied", 1)] {
            let count = AtomicUsize::new(0);
            let made = Calls::new(quick(), 4)
                .make(|| async {
                    match count.fetch_add(1, Ordering::Relaxed) {
                        0..3 => Err(failure(400, code)),
                        _ => Ok(()),
                    }
                })
                .await;
            assert_eq!((count.load(Ordering::Relaxed), made.is_ok()), (calls, calls == 4), "{code}");
        }
    }

    #[tokio::test]
    async fn it_ends_when_the_time_is_over() {
        let pace = Pace { throttled: Duration::from_millis(30), failing: Duration::from_millis(30), ..quick() };
        for code in ["Throttling", "InternalError"] {
            let error = Calls::new(pace, 1).make(|| async { Err::<(), _>(failure(503, code)) }).await.unwrap_err();
            assert_eq!(error.code, code);
        }
    }

    #[tokio::test]
    async fn what_is_new_may_be_unknown_for_a_while() {
        let count = AtomicUsize::new(0);
        let call = || async {
            match count.fetch_add(1, Ordering::Relaxed) {
                0..2 => Err(failure(400, "InvalidAMIID.NotFound")),
                n => Ok(n),
            }
        };
        assert_eq!(Calls::new(quick(), 1).make(call).await.unwrap_err().kind, Kind::NotFound);
        count.store(0, Ordering::Relaxed);
        assert_eq!(Calls::new(quick(), 1).make_of_new(call).await.unwrap(), 2);
        let never = Calls::new(quick(), 1).wait(Duration::from_millis(20), || async { Ok(None::<()>) }).await;
        assert_eq!(never.unwrap(), None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn throttling_lowers_how_many_are_under_way() {
        #[derive(Default)]
        struct Seen {
            now: AtomicUsize,
            most: AtomicUsize,
            count: AtomicUsize,
        }
        let (calls, seen) = (Arc::new(Calls::new(quick(), 64)), Arc::new(Seen::default()));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..700 {
            let (calls, seen) = (calls.clone(), seen.clone());
            tasks.spawn(async move {
                let call = || async {
                    let running = seen.now.fetch_add(1, Ordering::Relaxed) + 1;
                    seen.most.fetch_max(running, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_micros(100)).await;
                    seen.now.fetch_sub(1, Ordering::Relaxed);
                    // Three in ten.
                    if seen.count.fetch_add(1, Ordering::Relaxed) % 10 < 3 { Err(failure(503, "RequestLimitExceeded")) } else { Ok(()) }
                };
                calls.make(call).await
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap().unwrap();
        }
        // Ten calls for seven that succeed, and no storm.
        let count = seen.count.load(Ordering::Relaxed);
        assert!((990..=1010).contains(&count), "{count}");
        assert_eq!(calls.made(), count as u64);
        assert!(seen.most.load(Ordering::Relaxed) <= 16, "{:?}", seen.most);
        assert!(calls.gate().limit < 12.0, "{}", calls.gate().limit);
    }
}
