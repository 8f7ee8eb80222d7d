//! Plain lines, for pipes and logs.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kiln_model::event::{Event, Phase};
use kiln_model::trial::Tested;

use super::{Sink, bytes, say, seconds};

/// How often a transfer says how far it has come.
const EVERY: Duration = Duration::from_secs(5);

/// Writes events as lines to standard error.
pub(super) struct Plain {
    warnings_only: bool,
    said: Mutex<HashMap<String, Instant>>,
}

impl Plain {
    pub(super) fn new() -> Self {
        Self { warnings_only: false, said: Mutex::default() }
    }

    pub(super) fn warnings_only() -> Self {
        Self { warnings_only: true, said: Mutex::default() }
    }

    /// Whether it is time to say something about `name` again.
    fn due(&self, name: &str) -> bool {
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = Instant::now();
        let last = said.entry(name.to_owned()).or_insert(now);
        let due = now.duration_since(*last) >= EVERY;
        if due {
            *last = now;
        }
        due
    }
}

impl Sink for Plain {
    fn take(&self, image: Option<&str>, event: Event) {
        let say = |text: &str| match image {
            Some(image) => say(&format!("{image}: {text}")),
            None => say(text),
        };
        if let Event::Warning { message } = &event {
            return say(&format!("warning: {message}"));
        }
        if self.warnings_only {
            return;
        }
        match event {
            Event::Started { bake, name, version, steps } => {
                say(&format!("baking {name}:{version} ({steps} {}, bake {bake})", if steps == 1 { "step" } else { "steps" }));
            }
            Event::Begin { phase, name } => say(&format!("{} ...", title(phase, &name))),
            Event::Output { name, line, .. } => say(&format!("{name} | {line}")),
            Event::Progress { name, done, total } => {
                if self.due(&format!("{} {name}", image.unwrap_or_default())) {
                    let of = total.map(|total| format!(" of {}", bytes(total))).unwrap_or_default();
                    say(&format!("{name}: {}{of}", bytes(done)));
                }
            }
            Event::End { phase, name, cached, age_seconds, seconds: took } => {
                say(&format!("{} {}", title(phase, &name), ended(cached, age_seconds, took)));
            }
            Event::Note { message } => say(&message),
            Event::Warning { .. } | Event::Done { .. } | Event::Failed { .. } => {}
            Event::Tested(test) => failures(&test).iter().for_each(|line| say(line)),
            Event::Baked(image) => {
                say(&format!("baked {}:{} {} in {}", image.name, image.version, image.digest, seconds(image.seconds)));
            }
        }
    }
}

/// What of a test went wrong, in front of people, a line or more each.
pub(super) fn failures(test: &Tested) -> Vec<String> {
    let failed = test.failures().count();
    let count = format!("test {} failed: {failed} of {}", test.name, test.cases.len());
    let lines = test.failures().map(|(case, why)| format!("  {}: {}", case.name, why.replace('\n', "\n    ")));
    if failed == 0 { Vec::new() } else { std::iter::once(count).chain(lines).collect() }
}

/// How a phase ended, in front of people: `done (3.2 s)`, `cached, 6 d old`.
pub(super) fn ended(cached: bool, age_seconds: Option<u64>, took: f64) -> String {
    match (cached, age_seconds) {
        (false, _) => format!("done ({})", seconds(took)),
        (true, None) => format!("cached ({})", seconds(took)),
        (true, Some(age)) => format!("cached, {} old", kiln_bake::explain::span(std::time::Duration::from_secs(age))),
    }
}

/// What a phase is called in front of people.
pub(super) fn title(phase: Phase, name: &str) -> String {
    match phase {
        Phase::Base => format!("base {name}"),
        Phase::Step => format!("step {name}"),
        Phase::Test => format!("test {name}"),
        Phase::Boot | Phase::Checkpoint | Phase::Seal | Phase::Snapshot => name.to_owned(),
    }
}
