//! Tools that describe what a machine is to be: run once, proven, and gone.
//!
//! They differ in what they are given and how they are called ([`Tool`], one
//! file each); that they come into the guest, run, are asked again and leave is
//! the same for all ([`Configuration`]):
//!
//! ```text
//!  inputs ──► /run/kiln/tool-…     what the step names, and nothing else
//!  bootstrap  install              what was there before is remembered
//!  apply                           the one run
//!  check      would change: a b    `converge = "once"`: then the bake fails
//!  leave      purge                what bootstrap brought, and nothing else
//! ```

mod ansible;
mod cfengine;
mod chef;
mod presence;
mod puppet;
mod read;
mod salt;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::event::Stream;
use kiln_model::guest::{Command, GuestExt as _, quote};
use kiln_model::key::KeyHasher;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Problems, Reader};
use kiln_model::tree::Tree;
use kiln_model::{Code, Error, Result};

pub(crate) use ansible::AnsibleKind;
pub(crate) use cfengine::CfengineKind;
pub(crate) use chef::ChefKind;
pub(crate) use presence::Presence;
pub(crate) use puppet::PuppetKind;
pub(crate) use salt::SaltKind;

use crate::shell::{Shell, nonce};

/// How long tidying up may take.
const TIDYING: Duration = Duration::from_secs(60);
/// How many resources an error names.
const NAMED: usize = 20;

/// Whether the tool is brought, whether it stays, and whether one run has to
/// be enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Settings {
    /// Install the tool before, and remove it afterwards.
    pub(crate) bootstrap: bool,
    /// Leave what `bootstrap` installed in the image.
    pub(crate) keep: bool,
    /// Ask the tool a second time, and fail when it would change anything.
    pub(crate) converge: bool,
}

impl Settings {
    pub(crate) fn read(reader: &mut Reader<'_>, problems: &mut Problems) -> Self {
        let bootstrap = reader.boolean("bootstrap", problems).unwrap_or(false);
        let place = reader.entry("keep").map(|entry| entry.node.place);
        let keep = reader.boolean("keep", problems);
        if let (Some(place), false) = (place, bootstrap) {
            problems
                .add(place, "`keep` is about what `bootstrap` installs")
                .help("remove `keep`, or write `bootstrap = true`: a tool that was there before stays");
        }
        let place = reader.entry("converge").map(|entry| entry.node.place);
        let converge = match (place, reader.string("converge", problems)) {
            (_, Some("once")) => true,
            (_, Some("no") | None) => false,
            (place, Some(other)) => {
                let place = place.unwrap_or_else(|| reader.place());
                problems.add(place, format!("`{other}` says nothing of how to converge")).help("write \"once\", or \"no\"");
                false
            }
        };
        Self { bootstrap, keep: keep.unwrap_or(false), converge }
    }

    pub(crate) fn key(self, hasher: &mut KeyHasher) {
        hasher.field("bootstrap", self.bootstrap.to_string());
        // What is not set is no part, so that it counts as added when it is.
        for (name, set, value) in [("keep", self.keep, "true"), ("converge", self.converge, "once")] {
            hasher.hidden(name, if set { value } else { "" });
            if set {
                hasher.part(name, value);
            }
        }
    }
}

/// A file or folder that the guest gets for the run alone.
pub(crate) struct Input {
    /// Where it is here.
    pub(crate) from: PathBuf,
    /// Where it goes, below the run's folder.
    pub(crate) to: String,
}

/// What the second run would do.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// The resources that it would change, as the tool names them.
    pub(crate) resources: Vec<String>,
}

/// A tool, with what it is given in one step.
#[async_trait]
pub(crate) trait Tool: Send + Sync {
    /// What the template calls it.
    fn kind(&self) -> &'static str;

    /// How it comes into the guest and leaves it.
    fn presence(&self) -> Presence;

    /// Adds all that it is given to the step's key; see [`Provisioner::key`].
    ///
    /// # Errors
    /// When an input cannot be read.
    fn key(&self, hasher: &mut KeyHasher) -> Result<()>;

    /// The secrets that its settings name; see [`Provisioner::secrets`].
    fn secrets(&self) -> Vec<&str> {
        Vec::new()
    }

    /// What of this machine it needs.
    fn inputs(&self) -> Vec<Input>;

    /// What of an input the guest gets.
    ///
    /// # Errors
    /// When it cannot be read, or must not be used.
    fn tree(&self, input: &Input) -> Result<Tree> {
        Tree::walk(&input.from)
    }

    /// Small files of kiln's own that it needs, by their paths below the run's
    /// folder. They are 0600: secrets may be in them.
    ///
    /// # Errors
    /// When something that they are made of is not there.
    fn files(&self, _step: &Step<'_>, _folder: &str) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(Vec::new())
    }

    /// The script (bash, strict) of the run; all that it needs is in `folder`,
    /// which is its working directory. It must fail when the tool did not do
    /// all it was to do. Never holds a secret.
    fn apply(&self, folder: &str) -> String;

    /// Sees each line that [`Tool::apply`] prints; where the tool says only so
    /// that something failed, this says what, once.
    fn failure(&self, _stream: Stream, _line: &str) -> Option<String> {
        None
    }

    /// The script of the second run, in the tool's own check mode.
    fn check(&self, folder: &str) -> String;

    /// What the second run would do, from the lines it printed.
    ///
    /// # Errors
    /// When they cannot be understood: a proof that was not understood is none.
    fn changes(&self, lines: &[(Stream, String)]) -> Result<Changes>;
}

/// A step that runs a tool.
pub(crate) struct Configuration<T> {
    pub(crate) tool: T,
    pub(crate) settings: Settings,
}

#[async_trait]
impl<T: Tool> Provisioner for Configuration<T> {
    fn kind(&self) -> &'static str {
        self.tool.kind()
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        self.settings.key(hasher);
        if self.settings.bootstrap {
            self.tool.presence().key(hasher);
        }
        self.tool.key(hasher)
    }

    fn converges(&self) -> bool {
        self.settings.converge
    }

    fn secrets(&self) -> Vec<&str> {
        self.tool.secrets()
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        let folder = format!("/run/kiln/tool-{}", nonce());
        let done = self.all(step, &folder).await;
        let line = format!("rm -rf {folder}");
        let tidied = step.guest.output(&Command::new(line).timeout(TIDYING)).await;
        done?;
        tidied.map(drop)
    }
}

impl<T: Tool> Configuration<T> {
    async fn all(&self, step: &Step<'_>, folder: &str) -> Result<()> {
        let (kind, presence) = (self.tool.kind(), self.tool.presence());
        if self.settings.bootstrap {
            presence.bring(step).await?;
        } else if !presence.is_there(step).await? {
            let error = Error::new(Code::Step, format!("{kind} is not in the guest: there is no `{}`", presence.program()));
            return Err(error.step(&step.common.name).next("write `bootstrap = true`, or install it in a step before"));
        }
        self.bring(step, folder).await?;
        let mut said = None;
        let applied = Shell::own(format!("cd {folder}\n{}", self.tool.apply(folder)))
            .watched(step, &mut |stream, line| said = said.take().or_else(|| self.tool.failure(stream, line)))
            .await;
        applied.map_err(|error| match (error.kind(), said) {
            (Code::Step, Some(said)) => {
                Error::new(Code::Step, format!("{kind}: {said}")).because(error).step(&step.common.name).next(crate::shell::LOOK)
            }
            _ => error,
        })?;
        if self.settings.converge {
            self.prove(step, folder).await?;
        }
        if self.settings.bootstrap {
            if self.settings.keep { presence.leave(step).await? } else { presence.take_away(step).await? }
        }
        Ok(())
    }

    async fn bring(&self, step: &Step<'_>, folder: &str) -> Result<()> {
        let mut command = format!("umask 077 && mkdir -p {folder}");
        if let Some(user) = &step.common.user {
            command.push_str(&format!(" && chmod 711 /run/kiln && chown {} {folder}", quote(user)));
        }
        let made = step.guest.output(&Command::new(command)).await?;
        if !made.exit.success() {
            return Err(Error::new(Code::Step, format!("cannot make {folder} in the guest")).detail(made.stderr).step(&step.common.name));
        }
        for input in self.tool.inputs() {
            step.guest.upload(&self.tool.tree(&input)?, &format!("{folder}/{}", input.to)).await?;
        }
        for (path, bytes) in self.tool.files(step, folder)? {
            step.guest.write(&format!("{folder}/{path}"), 0o600, &bytes).await?;
        }
        if let Some(user) = &step.common.user {
            step.guest.output(&Command::new(format!("chown -R {} {folder}", quote(user)))).await?;
        }
        Ok(())
    }

    /// The second run, which has to have nothing to do.
    async fn prove(&self, step: &Step<'_>, folder: &str) -> Result<()> {
        let (kind, name) = (self.tool.kind(), &step.common.name);
        step.reports.note(format!("step `{name}`: asking {kind} what a second run would change"));
        let mut lines = Vec::new();
        let mut see = |stream, line: &str| lines.push((stream, line.to_owned()));
        Shell::own(format!("cd {folder}\n{}", self.tool.check(folder))).watched(step, &mut see).await?;
        not_converged(kind, &self.tool.changes(&lines)?).map_or(Ok(()), |error| Err(error.step(name)))
    }
}

/// The error for what a second run would change; none when that is nothing.
pub(crate) fn not_converged(kind: &str, changes: &Changes) -> Option<Error> {
    let names = &changes.resources;
    let (first, more) = (names.first()?, names.len() - 1);
    let what = if more == 0 { first.clone() } else { format!("{first} and {more} more") };
    let error = Error::new(Code::Step, format!("one run of {kind} was not enough: a second one would change {what}"));
    let listed: Vec<&str> = names.iter().take(NAMED).map(String::as_str).collect();
    Some(error.detail(listed.join("\n")).next("make these resources idempotent; `converge = \"no\"` bakes them as they are"))
}

/// Adds a tree of inputs to a key under a name of its own.
pub(crate) fn key_tree(hasher: &mut KeyHasher, name: &str, path: &Path) -> Result<()> {
    hasher.hidden("input", name);
    Tree::walk(path)?.key(hasher)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_change_is_named() {
        assert!(not_converged("puppet", &Changes::default()).is_none());
        let error = not_converged("puppet", &Changes { resources: vec!["File[/a]".into(), "Exec[b]".into()] }).unwrap();
        assert_eq!(error.chain(), "one run of puppet was not enough: a second one would change File[/a] and 1 more");
        assert_eq!(error.details(), ["File[/a]\nExec[b]"]);
    }
}
