//! The seal: the last step, kiln's own. It removes what must not be cloned,
//! stops the machine, and then checks the *stopped* disk, since shutting down
//! rewrites several of the files in question.

mod check;
mod rules;
mod script;

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_model::guest::{Command, Guest, GuestExt as _};
use kiln_model::machine::{Machine, Stopped};
use kiln_model::{Code, Error, Result};

/// How long a guest may take to power off. Services may need a while, and
/// emulation makes everything ten times slower.
pub(crate) const STOP: Duration = Duration::from_secs(300);

/// What the seal is told.
pub(crate) struct Seal<'a> {
    /// Image name, for `/etc/kiln-release`.
    pub name: &'a str,
    /// Image version.
    pub version: &'a str,
    /// Source commit.
    pub commit: Option<&'a str>,
    /// Paths that stay.
    pub keep: &'a [String],
}

/// Which step put what where the seal removes things.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Traces {
    /// Path → checksum and size.
    files: BTreeMap<String, String>,
    /// Path → the step that put or changed it.
    by: BTreeMap<String, String>,
}

impl Traces {
    /// What is there before the first step.
    pub(crate) async fn begin(guest: &dyn Guest) -> Result<Self> {
        Ok(Self { files: inventory(guest).await?, by: BTreeMap::new() })
    }

    /// Looks again, after `step`.
    pub(crate) async fn after(&mut self, step: &str, guest: &dyn Guest) -> Result<()> {
        let now = inventory(guest).await?;
        for (path, state) in &now {
            if self.files.get(path) != Some(state) {
                self.by.insert(path.clone(), step.to_owned());
            }
        }
        self.by.retain(|path, _| now.contains_key(path));
        self.files = now;
        Ok(())
    }

    /// Fails when the seal would remove what a step has put there.
    fn refuse_to_remove(&self, keep: &[String]) -> Result<()> {
        let lost: Vec<_> = self.by.iter().filter(|(path, _)| !rules::kept(keep, path)).collect();
        let Some((path, step)) = lost.first() else { return Ok(()) };
        let list = lost.iter().map(|(path, step)| format!("{path}  (step `{step}`)")).collect::<Vec<_>>().join("\n");
        let folder = path.rsplit_once('/').map_or(path.as_str(), |(folder, _)| folder);
        let keep = if folder.ends_with(".ssh") { folder } else { path.as_str() };
        Err(Error::new(Code::Hygiene, format!("step `{step}` put {path} there, which the seal would remove from the image"))
            .step(step.as_str())
            .detail(list)
            .next(format!("keep it with `[seal] keep = [\"{keep}\"]`, or remove it in a later step")))
    }
}

/// What the seal removes and the check looks for.
pub(crate) fn rules() -> impl Iterator<Item = &'static str> {
    rules::RULES.iter().map(|rule| rule.what)
}

async fn inventory(guest: &dyn Guest) -> Result<BTreeMap<String, String>> {
    let output = guest.output(&Command::new(script::inventory())).await?;
    Ok(output
        .stdout
        .lines()
        .filter_map(|line| {
            let (sum, rest) = line.split_once(' ')?;
            let (size, path) = rest.split_once(' ')?;
            Some((path.to_owned(), format!("{sum} {size}")))
        })
        .collect())
}

/// Prepares a machine for its last stop; see [`script::prepare`].
pub(crate) async fn prepare(machine: &dyn Machine, seal: &Seal<'_>, traces: &Traces) -> Result<()> {
    traces.refuse_to_remove(seal.keep)?;
    let script = script::prepare(&release(seal), seal.keep);
    let output = machine.guest().output(&Command::new("sh -s").stdin(script).timeout(STOP)).await?;
    if output.exit.success() {
        return Ok(());
    }
    Err(Error::new(Code::Hygiene, format!("the guest could not be prepared for the seal ({})", output.exit)).detail(output.stderr))
}

/// Checks the stopped disk. `false` when kiln cannot read its file system.
pub(crate) async fn check(stopped: &dyn Stopped, keep: &[String]) -> Result<bool> {
    let Some(files) = stopped.files().await? else { return Ok(false) };
    let keep = keep.to_vec();
    let left = crate::blocking("check the stopped disk", move || check::leftovers(&*files, &keep)).await?;
    if left.is_empty() {
        return Ok(true);
    }
    let list = left.iter().map(|left| format!("{}: {}", left.what, left.path)).collect::<Vec<_>>().join("\n");
    Err(Error::new(Code::Hygiene, format!("the sealed disk still holds {} of what must not be cloned", count(left.len())))
        .detail(list)
        .next("find the step or service that writes it when the machine stops; or keep it with `[seal] keep = [\"/path\"]`"))
}

fn count(n: usize) -> String {
    if n == 1 { "one piece".into() } else { format!("{n} pieces") }
}

/// `/etc/kiln-release`, in the form of os-release(5).
fn release(seal: &Seal<'_>) -> String {
    let mut text = format!("NAME=\"{}\"\nVERSION=\"{}\"\n", seal.name, seal.version);
    if let Some(commit) = seal.commit {
        text.push_str(&format!("COMMIT=\"{commit}\"\n"));
    }
    text
}
