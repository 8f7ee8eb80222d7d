//! How many transfers a host bears at once: found out, not configured.
//!
//! Additive increase, multiplicative decrease, as TCP does it. The bound
//! doubles at first and then grows by one, as long as more transfers at once
//! move more bytes per second; it is halved when the host says that it is too
//! much (429, 503) or breaks connections.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

const FIRST: usize = 4;
const MOST: usize = 32;
/// Throughput is compared over stretches of at least this.
const WINDOW: Duration = Duration::from_millis(500);
/// Failures within this are of one cause, and halve the bound once.
const ONE_CAUSE: Duration = Duration::from_secs(1);
/// A bound that moved this much more than the last one was worth it.
const GAIN: f64 = 1.05;
/// After so many windows without a change, one more is tried: what the host
/// bears may have grown.
const PATIENT: u32 = 10;

/// How many transfers a host bears at once. Clones share it.
#[derive(Clone)]
pub struct Limit(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    room: Notify,
}

struct State {
    bound: usize,
    in_use: usize,
    /// Whether somebody wanted more than the bound in this window.
    full: bool,
    /// Bytes moved in this window.
    moved: u64,
    since: Instant,
    /// Bytes per second before the bound was last raised.
    before: f64,
    /// What the bound was before it was last raised, until that is judged.
    from: Option<usize>,
    /// Whether the bound doubles still.
    doubling: bool,
    /// Windows without a change.
    still: u32,
    /// When it was halved last.
    halved: Option<Instant>,
}

/// The right to one transfer; given back on drop.
#[must_use = "it is given back on drop"]
pub struct Permit(Arc<Shared>);

impl Default for Limit {
    fn default() -> Self {
        let state = State {
            bound: FIRST,
            in_use: 0,
            full: false,
            moved: 0,
            since: Instant::now(),
            before: 0.0,
            from: None,
            doubling: true,
            still: 0,
            halved: None,
        };
        Self(Arc::new(Shared { state: Mutex::new(state), room: Notify::new() }))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Limit {
    /// Waits for the right to one more transfer.
    pub async fn acquire(&self) -> Permit {
        loop {
            // Made before the look, so that room made after it is not missed.
            let room = self.0.room.notified();
            if self.enter() {
                return Permit(self.0.clone());
            }
            room.await;
        }
    }

    fn enter(&self) -> bool {
        let mut state = self.0.state();
        let free = state.in_use < state.bound;
        if free {
            state.in_use += 1;
        }
        state.full |= state.in_use >= state.bound;
        free
    }

    /// The bound as it is now.
    pub fn bound(&self) -> usize {
        self.0.state().bound
    }

    /// Tells that bytes were moved.
    pub(crate) fn moved(&self, bytes: u64) {
        self.moved_at(bytes, Instant::now());
    }

    fn moved_at(&self, bytes: u64, now: Instant) {
        let grown = {
            let mut state = self.0.state();
            state.moved += bytes;
            let passed = now.saturating_duration_since(state.since);
            if passed < WINDOW {
                return;
            }
            let rate = state.moved as f64 / passed.as_secs_f64();
            let bound = state.bound;
            if state.full {
                state.judge(rate);
            }
            (state.moved, state.since) = (0, now);
            state.full = state.in_use >= state.bound;
            state.bound.saturating_sub(bound)
        };
        for _ in 0..grown {
            self.0.room.notify_one();
        }
    }

    /// Tells that the host refused or broke something off: it is too much.
    pub(crate) fn too_much(&self) {
        self.too_much_at(Instant::now());
    }

    fn too_much_at(&self, now: Instant) {
        let mut state = self.0.state();
        if state.halved.is_some_and(|at| now.saturating_duration_since(at) < ONE_CAUSE) {
            return;
        }
        state.bound = (state.bound / 2).max(1);
        (state.halved, state.doubling, state.still, state.from) = (Some(now), false, 0, None);
        // What was measured belongs to the old bound.
        (state.moved, state.since, state.before, state.full) = (0, now, 0.0, false);
    }
}

impl State {
    /// Decides after a window in which the bound was reached.
    fn judge(&mut self, rate: f64) {
        let gained = rate > self.before * GAIN;
        let raised_from = self.from.take();
        self.doubling &= gained;
        self.still += 1;
        if gained || self.still >= PATIENT {
            self.from = Some(self.bound);
            self.bound = if self.doubling { self.bound * 2 } else { self.bound + 1 }.min(MOST);
            (self.before, self.still) = (rate, 0);
        } else if let Some(from) = raised_from {
            // More at once was no faster: back to what was enough.
            self.bound = from;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let room = {
            let mut state = self.0.state();
            state.in_use -= 1;
            state.in_use < state.bound
        };
        if room {
            self.0.room.notify_one();
        }
    }
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state();
        f.debug_struct("Limit").field("bound", &state.bound).field("in_use", &state.in_use).finish()
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Runs windows of a host that moves what `rate` says at a bound.
    fn settle(limit: &Limit, windows: usize, rate: impl Fn(usize) -> u64, from: Instant) -> Instant {
        let mut now = from;
        for _ in 0..windows {
            limit.0.state().full = true;
            now += WINDOW;
            limit.moved_at(rate(limit.bound()), now);
        }
        now
    }

    #[tokio::test]
    async fn grows_while_more_at_once_move_more() {
        let limit = Limit::default();
        let start = limit.0.state().since;
        // Six at once are as fast as it gets.
        let now = settle(&limit, 8, |bound| 1_000_000 * bound.min(6) as u64, start);
        assert_eq!(limit.bound(), 8);
        // Later the host bears more.
        settle(&limit, 60, |bound| 1_000_000 * bound.min(20) as u64, now);
        assert!((16..=21).contains(&limit.bound()), "{limit:?}");
        let fast = Limit::default();
        let start = fast.0.state().since;
        settle(&fast, 200, |bound| 1_000_000 * bound as u64, start);
        assert_eq!(fast.bound(), MOST);
    }

    #[tokio::test]
    async fn a_bound_that_nobody_reached_stays() {
        let limit = Limit::default();
        let mut now = limit.0.state().since;
        for round in 1..10 {
            now += WINDOW;
            limit.moved_at(1_000_000 * round, now);
        }
        assert_eq!(limit.bound(), FIRST);
    }

    #[tokio::test]
    async fn is_halved_once_for_one_cause() {
        let limit = Limit::default();
        let start = limit.0.state().since;
        let now = settle(&limit, 50, |bound| 1_000_000 * bound as u64, start);
        let before = limit.bound();
        for _ in 0..8 {
            limit.too_much_at(now);
        }
        assert_eq!(limit.bound(), before / 2);
        for seconds in 2..20 {
            limit.too_much_at(now + Duration::from_secs(seconds));
        }
        assert_eq!(limit.bound(), 1);
        settle(&limit, 2, |bound| 1_000_000 * bound as u64, now + Duration::from_secs(30));
        assert!(limit.bound() > 1);
    }

    #[tokio::test]
    async fn no_more_than_the_bound_at_once_and_nobody_is_forgotten() {
        let limit = Limit::default();
        let (at_once, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> = (0..100)
            .map(|number| {
                let (limit, at_once, most) = (limit.clone(), at_once.clone(), most.clone());
                tokio::spawn(async move {
                    if number % 3 == 0 {
                        // Waiting can be given up.
                        let _ = tokio::time::timeout(Duration::from_micros(number), limit.acquire()).await;
                    }
                    let permit = limit.acquire().await;
                    most.fetch_max(at_once.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_micros(200)).await;
                    at_once.fetch_sub(1, Ordering::SeqCst);
                    drop(permit);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(most.load(Ordering::SeqCst), FIRST);
        assert_eq!(limit.0.state().in_use, 0);
    }
}
