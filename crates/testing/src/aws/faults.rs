//! What the front does that AWS does too, and a test cannot wait for.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How a call fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It is answered with this status and error code, and nothing is done.
    Refused {
        /// The HTTP status.
        status: u16,
        /// The code, such as `InsufficientInstanceCapacity`.
        code: String,
    },
    /// The connection breaks, and nothing is done.
    Broken,
    /// What was asked for is done, and the connection breaks in place of the
    /// answer.
    Lost,
}

impl Failure {
    /// A client's error.
    pub fn refused(code: &str) -> Self {
        Self::Refused { status: 400, code: code.into() }
    }

    /// The service's own error.
    pub fn internal() -> Self {
        Self::Refused { status: 500, code: "InternalError".into() }
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Go,
    Throttled,
    Fails(Failure),
}

/// What is planned.
#[derive(Debug)]
pub(crate) struct Faults {
    /// Of a hundred calls.
    pub(crate) throttle: u32,
    /// How long what was made is not seen.
    pub(crate) lag: Duration,
    /// The call, how many more of it are to pass, and what happens then.
    planned: Vec<(String, usize, Failure)>,
    /// When the things were made that may not be seen yet, by their id.
    born: HashMap<String, Instant>,
    seed: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self { throttle: 0, lag: Duration::ZERO, planned: Vec::new(), born: HashMap::new(), seed: 0x2545_f491_4f6c_dd1d }
    }
}

impl Faults {
    /// See [`crate::Aws::fail`].
    pub(crate) fn plan(&mut self, action: &str, nth: usize, failure: Failure) {
        self.planned.push((action.into(), nth.max(1), failure));
    }

    /// Takes back all that was planned or set.
    pub(crate) fn heal(&mut self) {
        (self.throttle, self.lag) = (0, Duration::ZERO);
        self.planned.clear();
    }

    /// What becomes of this call; counts it.
    pub(crate) fn judge(&mut self, action: &str) -> Verdict {
        let mut fails = None;
        self.planned.retain_mut(|(call, left, failure)| {
            if call != action && call != "*" {
                return true;
            }
            *left -= 1;
            if *left == 0 && fails.is_none() {
                fails = Some(failure.clone());
            }
            *left > 0
        });
        match fails {
            Some(failure) => Verdict::Fails(failure),
            None if self.throttle > 0 && self.random() % 100 < u64::from(self.throttle) => Verdict::Throttled,
            None => Verdict::Go,
        }
    }

    /// Something was made just now.
    pub(crate) fn born(&mut self, id: &str) {
        if !id.is_empty() {
            self.born.insert(id.into(), Instant::now());
        }
    }

    /// Whether something is not seen yet.
    pub(crate) fn unseen(&self, id: &str) -> bool {
        !self.lag.is_zero() && self.born.get(id).is_some_and(|born| born.elapsed() < self.lag)
    }

    /// xorshift64*: the same in every run, so that a test that fails does so again.
    fn random(&mut self) -> u64 {
        self.seed ^= self.seed >> 12;
        self.seed ^= self.seed << 25;
        self.seed ^= self.seed >> 27;
        self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_fails_and_no_other() {
        let mut faults = Faults::default();
        faults.plan("A", 2, Failure::Broken);
        faults.plan("*", 4, Failure::internal());
        let verdicts: Vec<_> = ["A", "B", "A", "A", "A", "B"].into_iter().map(|action| faults.judge(action)).collect();
        let expected =
            [Verdict::Go, Verdict::Go, Verdict::Fails(Failure::Broken), Verdict::Fails(Failure::internal()), Verdict::Go, Verdict::Go];
        assert_eq!(verdicts, expected);
    }

    #[test]
    fn as_many_are_throttled_as_was_said() {
        let mut faults = Faults { throttle: 30, ..Faults::default() };
        let throttled = (0..10_000).filter(|_| faults.judge("A") == Verdict::Throttled).count();
        assert!((2_700..3_300).contains(&throttled), "{throttled}");
        faults.heal();
        assert!((0..100).all(|_| faults.judge("A") == Verdict::Go));
    }

    #[test]
    fn what_was_made_is_seen_later() {
        let mut faults = Faults { lag: Duration::from_millis(50), ..Faults::default() };
        faults.born("i-1");
        assert!(faults.unseen("i-1") && !faults.unseen("i-2"));
        std::thread::sleep(Duration::from_millis(60));
        assert!(!faults.unseen("i-1"));
    }
}
