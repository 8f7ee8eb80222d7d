//! Which step touched which path.
//!
//! After each step the guest lists its root file system: of every path the time
//! at which its inode last changed (ctime, which no program can set), the
//! inode's number, mode, owner and size. What differs from the listing before
//! was touched by that step. Listings are compared with each other and never
//! with a clock, so that a guest whose time jumps is no trouble; the one before
//! the first step is made on the booted base.
//!
//! One walk takes a second or two even under emulation, since nothing is read
//! but inodes, and reaches what a list of changed blocks would not tell apart.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kiln_contents::diff::Change;
use kiln_contents::text::shown;
use kiln_model::guest::{Command, Guest, GuestExt as _};
use kiln_model::key::KeyHasher;
use kiln_model::provision::{Case, Provisioner, Step};
use kiln_model::{Code, Error, Result};
use serde::Serialize;

/// What of each path is compared.
const LIST: &str = "LC_ALL=C exec find / -xdev -printf '%C@ %i %m %U %G %s %p\\n' 2>/dev/null";

/// How many words come before the path.
const WORDS: usize = 6;

/// How long a walk may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What the seal itself writes.
const SEAL: [&str; 3] = [
    "/etc/kiln-release",
    "/etc/systemd/system/kiln-host-keys.service",
    "/etc/systemd/system/multi-user.target.wants/kiln-host-keys.service",
];

/// Where a difference comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", content = "name", rename_all = "lowercase")]
pub(crate) enum Origin {
    /// The base is another one, and no step touched it.
    Base,
    /// The last step that touched it.
    Step(String),
    /// Booting, sealing or stopping the machine.
    Seal,
    /// It is in the first image alone, and nothing this time says what made it.
    Unknown,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Base => f.write_str("(base)"),
            Self::Step(name) => f.write_str(name),
            Self::Seal => f.write_str("(seal)"),
            Self::Unknown => f.write_str("(not seen)"),
        }
    }
}

/// What steps touched.
#[derive(Debug, Default)]
pub(crate) struct Origins {
    /// Path to what was last seen there.
    seen: Option<HashMap<String, String>>,
    /// Path to the number of the last step that touched it.
    by: HashMap<String, usize>,
    /// Each step, and how many paths it touched.
    steps: Vec<(String, usize)>,
}

impl Origins {
    /// What is there before the first step.
    fn begin(&mut self, listing: HashMap<String, String>) {
        self.seen = Some(listing);
    }

    /// What is there after `step`.
    fn after(&mut self, step: &str, listing: HashMap<String, String>) {
        let before = self.seen.take().unwrap_or_default();
        let number = self.steps.len();
        let changed = listing.iter().filter(|(path, state)| before.get(*path) != Some(state)).map(|(path, _)| path);
        let gone = before.keys().filter(|path| !listing.contains_key(*path));
        let touched: Vec<String> = changed.chain(gone).cloned().collect();
        self.steps.push((step.to_owned(), touched.len()));
        self.by.extend(touched.into_iter().map(|path| (path, number)));
        self.seen = Some(listing);
    }

    /// How many paths a step touched.
    pub(crate) fn touched(&self, step: &str) -> Option<usize> {
        self.steps.iter().find(|(name, _)| name == step).map(|(_, touched)| *touched)
    }

    fn step(&self, path: &str) -> Option<Origin> {
        let (name, _) = self.steps.get(*self.by.get(path)?)?;
        Some(Origin::Step(name.clone()))
    }

    /// Where a path that differs comes from; `same_base` tells whether the
    /// machine was started from the same disk.
    pub(crate) fn of(&self, path: &str, change: Change, same_base: bool) -> Origin {
        if SEAL.contains(&path) {
            return Origin::Seal;
        }
        if let Some(step) = self.step(path) {
            return step;
        }
        let elsewhere = if same_base { Origin::Seal } else { Origin::Base };
        if change != Change::Removed || self.seen.as_ref().is_some_and(|seen| seen.contains_key(path)) {
            return elsewhere;
        }
        // The first image has it, and this time it was never there. Whatever put
        // something else into its folder is the best guess.
        let mut folder = path;
        while let Some((parent, _)) = folder.rsplit_once('/') {
            folder = if parent.is_empty() { "/" } else { parent };
            if self.seen.as_ref().is_none_or(|seen| seen.contains_key(folder)) || folder == "/" {
                break;
            }
        }
        self.step(folder).unwrap_or(if same_base { Origin::Unknown } else { Origin::Base })
    }
}

/// Reads a listing.
fn parse(text: &str) -> HashMap<String, String> {
    let line = |line: &str| {
        let (at, _) = line.match_indices(' ').nth(WORDS - 1)?;
        let (state, path) = (line.get(..at)?, line.get(at + 1..)?);
        // The second half of a name with a line's end in it is no path.
        path.starts_with('/').then(|| (shown(path.as_bytes()), state.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

async fn listing(guest: &dyn Guest) -> Result<HashMap<String, String>> {
    let output = guest.output(&Command::new(LIST).timeout(LIMIT)).await?;
    let found = parse(&output.stdout);
    if found.is_empty() {
        let what = "the guest cannot list its files, so nobody could say which step a difference comes from";
        return Err(Error::new(Code::Step, what).next("it needs GNU find (Debian: findutils); bake the image twice, and use `kiln diff`"));
    }
    Ok(found)
}

/// A step that is looked at from outside.
pub(crate) struct Watched {
    /// The step.
    pub(crate) inner: Box<dyn Provisioner>,
    /// Where to write down what it touched.
    pub(crate) origins: Arc<Mutex<Origins>>,
}

impl Watched {
    fn with<T>(&self, act: impl FnOnce(&mut Origins) -> T) -> T {
        act(&mut self.origins.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Provisioner for Watched {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        self.inner.key(hasher)
    }

    fn reboots(&self) -> bool {
        self.inner.reboots()
    }

    fn takes_out(&self) -> bool {
        self.inner.takes_out()
    }

    fn converges(&self) -> bool {
        self.inner.converges()
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        if self.with(|origins| origins.seen.is_none()) {
            let before = listing(&*step.guest).await?;
            self.with(|origins| origins.begin(before));
        }
        // What it brings out would be written over what the first bake brought.
        if !self.inner.takes_out() {
            self.inner.run(step).await?;
        }
        let after = listing(&*step.guest).await?;
        self.with(|origins| origins.after(&step.common.name, after));
        Ok(())
    }

    async fn test(&self, step: &Step<'_>) -> Result<Vec<Case>> {
        self.inner.test(step).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(entries: &[(&str, u32)]) -> HashMap<String, String> {
        let text: String = entries.iter().map(|(path, time)| format!("{time}.0000000000 12 644 0 0 5 {path}\n")).collect();
        parse(&text)
    }

    fn origins() -> Origins {
        let mut origins = Origins::default();
        origins.begin(listed(&[("/", 1), ("/etc", 1), ("/etc/hosts", 1), ("/srv", 1), ("/usr", 1), ("/usr/bin/true", 1), ("/old", 1)]));
        origins.after(
            "one",
            listed(&[("/", 2), ("/etc", 1), ("/etc/hosts", 3), ("/srv", 2), ("/srv/a", 2), ("/usr", 1), ("/usr/bin/true", 1)]),
        );
        // An earlier time is another one too: the guest's clock went back.
        origins.after(
            "two",
            listed(&[("/", 2), ("/etc", 1), ("/etc/hosts", 2), ("/srv", 2), ("/srv/a", 2), ("/usr", 1), ("/usr/bin/true", 1)]),
        );
        origins
    }

    #[test]
    fn the_last_step_that_touched_a_path_is_named() {
        let origins = origins();
        let step = |name: &str| Origin::Step(name.into());
        assert_eq!(origins.of("/srv/a", Change::Added, true), step("one"));
        assert_eq!(origins.of("/etc/hosts", Change::Changed, true), step("two"));
        assert_eq!(origins.of("/old", Change::Removed, true), step("one"), "it removed it");
        assert_eq!((origins.touched("one"), origins.touched("two"), origins.touched("three")), (Some(5), Some(1), None));
    }

    #[test]
    fn what_no_step_touched_is_the_bases_or_the_seals() {
        let origins = origins();
        assert_eq!(origins.of("/usr/bin/true", Change::Changed, true), Origin::Seal);
        assert_eq!(origins.of("/usr/bin/true", Change::Changed, false), Origin::Base);
        assert_eq!(origins.of("/etc/kiln-release", Change::Changed, false), Origin::Seal);
        assert_eq!(origins.of("/var/new", Change::Added, true), Origin::Seal);
    }

    #[test]
    fn what_the_first_image_alone_has_is_guessed_by_its_folder() {
        let origins = origins();
        // Step one made something else in there.
        assert_eq!(origins.of("/srv/b", Change::Removed, true), Origin::Step("one".into()));
        assert_eq!(origins.of("/srv/gone/deep/b", Change::Removed, true), Origin::Step("one".into()));
        // Nobody touched this folder.
        assert_eq!(origins.of("/etc/b", Change::Removed, true), Origin::Unknown);
        assert_eq!(origins.of("/etc/b", Change::Removed, false), Origin::Base);
    }

    #[test]
    fn listings_are_read_whatever_names_hold() {
        let found = parse("1.5 2 644 0 0 5 /a b\n1.5 3 644 0 0 5 /x\nsecond line\n1.5 4 100 0 0 5 y\n1.0 1 755 0 0 5 /tab\there\n");
        let mut paths: Vec<&str> = found.keys().map(String::as_str).collect();
        paths.sort_unstable();
        assert_eq!(paths, ["/a b", "/tab\\there", "/x"]);
        assert_eq!(found["/a b"], "1.5 2 644 0 0 5");
        assert!(parse("").is_empty());
    }

    #[test]
    fn the_listing_of_a_real_find_is_read() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a b"), "x").unwrap();
        let root = folder.path().to_str().unwrap();
        let list = || {
            let line = LIST.replace("find / ", &format!("find {root} "));
            let output = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
            parse(&String::from_utf8(output.stdout).unwrap())
        };
        let mut origins = Origins::default();
        origins.begin(list());
        std::fs::write(folder.path().join("a b"), "y").unwrap();
        std::fs::write(folder.path().join("new"), "y").unwrap();
        origins.after("write", list());
        for name in ["a b", "new"] {
            assert_eq!(origins.of(&format!("{root}/{name}"), Change::Changed, true), Origin::Step("write".into()));
        }
    }
}
