//! How far a transfer has come, told a few times a second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_model::event::Reports;

/// How often it is told.
const EVERY: Duration = Duration::from_millis(100);

/// Counts what several tasks have moved.
#[derive(Clone)]
pub(crate) struct Meter(Arc<Inner>);

struct Inner {
    name: &'static str,
    reports: Reports,
    total: u64,
    done: AtomicU64,
    told: Mutex<Instant>,
}

impl Meter {
    /// For `total` bytes.
    pub(crate) fn new(name: &'static str, total: u64, reports: &Reports) -> Self {
        if total > 0 {
            reports.progress(name, 0, Some(total));
        }
        Self(Arc::new(Inner { name, reports: reports.clone(), total, done: AtomicU64::new(0), told: Mutex::new(Instant::now()) }))
    }

    /// So many bytes more.
    pub(crate) fn add(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Ordering::Relaxed);
        self.tell(false);
    }

    /// One part has `now` bytes after it had `before`: less, when it began anew.
    pub(crate) fn part(&self, before: u64, now: u64) {
        if now >= before {
            self.add(now - before);
        } else {
            self.0.done.fetch_sub(before - now, Ordering::Relaxed);
        }
    }

    /// It is all done.
    pub(crate) fn end(&self) {
        self.0.done.store(self.0.total, Ordering::Relaxed);
        self.tell(true);
    }

    fn tell(&self, last: bool) {
        let Inner { name, reports, total, done, told } = &*self.0;
        // Whoever comes while another one tells need not wait for it.
        let mut told = match told.try_lock() {
            Ok(told) => told,
            Err(_) if !last => return,
            Err(_) => told.lock().unwrap_or_else(PoisonError::into_inner),
        };
        if *total > 0 && (last || told.elapsed() >= EVERY) {
            *told = Instant::now();
            reports.progress(name, done.load(Ordering::Relaxed).min(*total), Some(*total));
        }
    }
}
