//! What happens during a bake, as one stream that feeds bars, plain lines and
//! JSON alike.

use std::sync::Arc;

use serde::Serialize;

use crate::Digest;
use crate::error::Error;
use crate::key::Key;
use crate::secret::Redactor;
use crate::trial::Tested;

/// Which stretch of a bake something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Getting the base.
    Base,
    /// Starting a machine until its guest can be reached.
    Boot,
    /// One provisioning step.
    Step,
    /// Keeping the machine for later bakes.
    Checkpoint,
    /// Removing what must not be cloned, stopping, checking the stopped disk.
    Seal,
    /// Reading blocks into the store.
    Snapshot,
    /// One test on the finished image.
    Test,
}

/// Which stream of a command a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A step as the `baked` event and the provenance tell it.
#[derive(Debug, Clone, Serialize)]
pub struct StepReport {
    /// Its unique name.
    pub name: String,
    /// Its key; none for the phases that have none.
    pub key: Key,
    /// Whether it was taken from the cache.
    pub cached: bool,
    /// Seconds it took.
    pub seconds: f64,
}

/// One baked image.
#[derive(Debug, Clone, Serialize)]
pub struct Baked {
    /// Image name.
    pub name: String,
    /// Image version.
    pub version: String,
    /// Architecture in OCI's words (`amd64`).
    pub arch: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Digest of the root disk's blocks (`kiln-disk-v1`); none where the disk
    /// is at a cloud alone.
    pub disk_digest: Option<Digest>,
    /// The steps, in order.
    pub steps: Vec<StepReport>,
    /// What was made elsewhere: AMIs, snapshots, pushed references.
    pub artifacts: Vec<serde_json::Value>,
    /// Seconds from the start of the bake.
    pub seconds: f64,
}

/// The error as the `done` event tells it.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// [`crate::Code::name`].
    pub code: &'static str,
    /// The step in which it happened.
    pub step: Option<String>,
    /// Message and causes in one line.
    pub cause: String,
    /// What to do next.
    pub next: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            code: error.kind().name(),
            step: error.step_name().map(Into::into),
            cause: error.chain(),
            next: error.next_move().map(Into::into),
        }
    }
}

/// Something that happened. Serialised with `--json`, one object per line.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A bake begins.
    Started {
        /// Bake id (ULID).
        bake: String,
        /// Image name.
        name: String,
        /// Image version.
        version: String,
        /// How many provisioning steps there are.
        steps: usize,
    },
    /// A phase (or a step or test of it) begins.
    Begin {
        /// Which phase.
        phase: Phase,
        /// What, in a few words; for steps their unique name.
        name: String,
    },
    /// A line that the guest or a tool printed.
    Output {
        /// The step's name.
        name: String,
        /// Which stream.
        stream: Stream,
        /// The line, without its end.
        line: String,
    },
    /// How far something has come.
    Progress {
        /// What is being moved or counted, e.g. `snapshot`.
        name: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all, where known.
        total: Option<u64>,
    },
    /// A phase ends well.
    End {
        /// Which phase.
        phase: Phase,
        /// As in `begin`.
        name: String,
        /// Whether nothing had to be done.
        cached: bool,
        /// How long ago what is used was made, in seconds, where that is known.
        #[serde(skip_serializing_if = "Option::is_none")]
        age_seconds: Option<u64>,
        /// Seconds it took.
        seconds: f64,
    },
    /// Something worth saying, e.g. which accelerator was chosen and why.
    Note {
        /// One sentence.
        message: String,
    },
    /// Something that is probably not wanted.
    Warning {
        /// One sentence.
        message: String,
    },
    /// A test was carried out, or had passed on the same disk before.
    Tested(Tested),
    /// An image is in the store whose tests failed: without a name, marked as
    /// failed.
    Failed {
        /// Image name.
        name: String,
        /// Image version, which may be another image's.
        version: String,
        /// Digest of the manifest.
        digest: Digest,
        /// Digest of the root disk.
        disk_digest: Option<Digest>,
    },
    /// An image is in the store.
    Baked(Baked),
    /// Always the last event.
    Done {
        /// Version of this event's form.
        v: u32,
        /// Whether everything was done.
        ok: bool,
        /// The images that are in the store now.
        images: Vec<Baked>,
        /// What went wrong.
        error: Option<Failure>,
    },
}

/// Takes events; shared by everything that runs in a bake.
pub trait Reporter: Send + Sync {
    /// Takes one event. Must not block for long.
    fn report(&self, event: Event);
}

/// What a part of a bake reports to: secrets are taken out on the way.
#[derive(Clone)]
pub struct Reports {
    sink: Arc<dyn Reporter>,
    redactor: Redactor,
}

impl Reports {
    /// Reports to `sink`, without what `redactor` knows.
    pub fn new(sink: Arc<dyn Reporter>, redactor: Redactor) -> Self {
        Self { sink, redactor }
    }

    /// Reports to nobody.
    pub fn silent() -> Self {
        struct Nobody;
        impl Reporter for Nobody {
            fn report(&self, _: Event) {}
        }
        Self::new(Arc::new(Nobody), Redactor::default())
    }

    /// The secrets that are taken out.
    pub fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    /// Reports one event.
    pub fn event(&self, mut event: Event) {
        let clean = |text: &mut String| *text = self.redactor.clean(text);
        match &mut event {
            Event::Output { line, .. } => clean(line),
            Event::Note { message } | Event::Warning { message } => clean(message),
            Event::Done { error: Some(failure), .. } => {
                clean(&mut failure.cause);
                failure.next.as_mut().map(clean);
            }
            _ => {}
        }
        self.sink.report(event);
    }

    /// Says something worth knowing.
    pub fn note(&self, message: impl Into<String>) {
        self.event(Event::Note { message: message.into() });
    }

    /// Says something that is probably not wanted.
    pub fn warn(&self, message: impl Into<String>) {
        self.event(Event::Warning { message: message.into() });
    }

    /// Passes on a line of output.
    pub fn output(&self, name: &str, stream: Stream, line: &str) {
        self.event(Event::Output { name: name.into(), stream, line: line.into() });
    }

    /// Says how far something has come, in bytes.
    pub fn progress(&self, name: &str, done: u64, total: Option<u64>) {
        self.event(Event::Progress { name: name.into(), done, total });
    }

    /// Says that something need not be done: an earlier bake did it, so long ago.
    pub fn cached(&self, phase: Phase, name: &str, age: Option<std::time::Duration>) {
        let age_seconds = age.map(|age| age.as_secs());
        self.event(Event::End { phase, name: name.into(), cached: true, age_seconds, seconds: 0.0 });
    }

    /// Begins a phase; [`Span::end`] ends it and tells how long it took.
    pub fn begin(&self, phase: Phase, name: &str) -> Span {
        self.event(Event::Begin { phase, name: name.into() });
        Span { reports: self.clone(), phase, name: name.into(), since: std::time::Instant::now() }
    }
}

/// A phase that has begun.
pub struct Span {
    reports: Reports,
    phase: Phase,
    name: String,
    since: std::time::Instant,
}

impl Span {
    /// Seconds since it began.
    pub fn seconds(&self) -> f64 {
        self.since.elapsed().as_secs_f64()
    }

    /// Ends it well; gives the seconds it took.
    #[must_use = "the seconds go into the record"]
    pub fn end(self, cached: bool) -> f64 {
        let seconds = self.seconds();
        self.reports.event(Event::End { phase: self.phase, name: self.name, cached, age_seconds: None, seconds });
        seconds
    }
}
