//! The calls that came.

use std::time::{Duration, Instant};

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `PutSnapshotBlock`, `RunInstances` …
    pub action: String,
    /// The region that it was for.
    pub region: String,
    /// When it came, since the front began.
    pub at: Duration,
    /// The status that was answered; 0 as long as, or when, there was none.
    pub status: u16,
}

/// All calls, and how many were under way at once.
#[derive(Debug)]
pub(crate) struct Calls {
    began: Instant,
    all: Vec<Call>,
    /// Those before this one were forgotten.
    first: usize,
    now: usize,
    most: usize,
}

impl Default for Calls {
    fn default() -> Self {
        Self { began: Instant::now(), all: Vec::new(), first: 0, now: 0, most: 0 }
    }
}

impl Calls {
    /// A call came; gives its number.
    pub(crate) fn begin(&mut self, action: &str, region: &str) -> usize {
        self.now += 1;
        self.most = self.most.max(self.now);
        self.all.push(Call { action: action.into(), region: region.into(), at: self.began.elapsed(), status: 0 });
        self.first + self.all.len() - 1
    }

    /// It ended.
    pub(crate) fn end(&mut self, number: usize, status: u16) {
        self.now = self.now.saturating_sub(1);
        if let Some(call) = number.checked_sub(self.first).and_then(|at| self.all.get_mut(at)) {
            call.status = status;
        }
    }

    /// How many are under way.
    pub(crate) fn under_way(&self) -> usize {
        self.now
    }

    /// The most that were.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Those that were not forgotten, as they came.
    pub(crate) fn all(&self) -> Vec<Call> {
        self.all.clone()
    }

    /// Counting begins anew.
    pub(crate) fn forget(&mut self) {
        self.first += self.all.len();
        self.all.clear();
        self.most = self.now;
    }
}

/// The most calls that came within any `window`: a request storm shows here.
pub fn most_within(calls: &[Call], window: Duration) -> usize {
    let mut first = 0;
    let mut most = 0;
    for (last, call) in calls.iter().enumerate() {
        while calls.get(first).is_some_and(|earlier| earlier.at + window <= call.at) {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_and_forgotten() {
        let mut calls = Calls::default();
        let (one, two) = (calls.begin("A", "x"), calls.begin("B", "x"));
        calls.end(one, 200);
        calls.forget();
        calls.end(two, 500);
        let three = calls.begin("C", "y");
        calls.end(three, 201);
        let all = calls.all();
        assert_eq!(all.iter().map(|call| (call.action.as_str(), call.status)).collect::<Vec<_>>(), [("C", 201)]);
        assert_eq!((calls.under_way(), calls.most()), (0, 1));
    }

    #[test]
    fn a_storm_shows() {
        let at = |ms| Call { action: "A".into(), region: "x".into(), at: Duration::from_millis(ms), status: 200 };
        let calls: Vec<_> = [0, 10, 500, 501, 502, 1500].into_iter().map(at).collect();
        assert_eq!(most_within(&calls, Duration::from_millis(100)), 3);
        assert_eq!(most_within(&calls, Duration::from_secs(1)), 5);
        assert_eq!(most_within(&[], Duration::from_secs(1)), 0);
    }
}
