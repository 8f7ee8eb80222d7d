//! `assert`: what is true of a machine, in TOML.
//!
//! Each thing that is asserted is a case of its own. All of them are looked at
//! by one command, since each costs a guest under emulation its time, and
//! compared here.
//!
//! ```text
//!  settings ──► expect.rs ──► probe.rs ──► guest ──► facts ──► expect.rs ──► cases
//!               what is wanted  one script                     expected X, found Y
//! ```

mod expect;
mod probe;
mod read;
mod sockets;

use std::path::Path;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kiln_model::event::Reports;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Case, Outcome, Provisioner, Step};
use kiln_model::settings::{Node, Problems};
use kiln_model::{Code, Error, Result};

use crate::shell::{Shell, nonce};
use expect::Item;
use probe::Facts;

/// How long to wait before looking again at what was not yet so.
const PAUSE: Duration = Duration::from_secs(1);

/// Reads `[test.assert]`.
pub(crate) struct AssertKind;

/// What is to be true.
pub(crate) struct Assert {
    items: Vec<Item>,
    /// How long it may take until it is.
    within: Duration,
}

impl Kind<dyn Provisioner> for AssertKind {
    fn name(&self) -> &'static str {
        "assert"
    }

    fn keys(&self) -> &'static [&'static str] {
        &read::KEYS
    }

    fn read(&self, settings: &Node, _: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let assert = read::read(settings, self.keys(), problems)?;
        (problems.0.len() == before).then(|| Box::new(assert) as _)
    }
}

impl Assert {
    /// Looks once at the items with these numbers.
    async fn look(&self, step: &Step<'_>, which: &[usize]) -> Result<Facts> {
        let nonce = nonce();
        let items: Vec<(usize, &Item)> = which.iter().filter_map(|at| Some((*at, self.items.get(*at)?))).collect();
        let mut facts = Facts::new(&nonce);
        let quiet = Reports::silent();
        // What is looked at is nobody's output; what is found is told by case.
        let step = Step { guest: step.guest.clone(), reports: &quiet, ..*step };
        Shell::plain(probe::script(&nonce, &items)).watched(&step, &mut |_, line| facts.take(line)).await?;
        Ok(facts)
    }
}

#[async_trait]
impl Provisioner for Assert {
    fn kind(&self) -> &'static str {
        "assert"
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        // In whatever order they are written; how long they may take changes
        // what may be found.
        let mut items: Vec<(String, String)> = self.items.iter().map(|item| (item.name(), item.expected())).collect();
        items.sort();
        hasher.hidden("items", items.len().to_string());
        for (name, expected) in items {
            hasher.field(&name, expected);
        }
        hasher.field("within", self.within.as_millis().to_string());
        Ok(())
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        let cases = self.test(step).await?;
        match cases.iter().find_map(|case| if let Outcome::Failed(why) = &case.outcome { Some((&case.name, why)) } else { None }) {
            Some((name, why)) => Err(Error::new(Code::Step, format!("{name}: {why}")).step(&step.common.name)),
            None => Ok(()),
        }
    }

    async fn test(&self, step: &Step<'_>) -> Result<Vec<Case>> {
        let began = Instant::now();
        let mut found: Vec<Vec<(String, Outcome)>> = vec![Vec::new(); self.items.len()];
        let mut left: Vec<usize> = (0..self.items.len()).collect();
        loop {
            let facts = self.look(step, &left).await?;
            for at in &left {
                if let (Some(item), Some(found)) = (self.items.get(*at), found.get_mut(*at)) {
                    *found = item.compare(*at, &facts);
                }
            }
            left.retain(|at| found.get(*at).is_some_and(|cases| cases.iter().any(|(_, outcome)| outcome.failed())));
            if left.is_empty() || began.elapsed() + PAUSE > self.within {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        let cases: Vec<(String, Outcome)> = found.into_iter().flatten().collect();
        // One command looked at all of them.
        let seconds = began.elapsed().as_secs_f64() / f64::from(u32::try_from(cases.len()).unwrap_or(1).max(1));
        Ok(cases.into_iter().map(|(name, outcome)| Case { name, seconds, outcome }).collect())
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
