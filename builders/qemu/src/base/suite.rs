//! `[base] debian`: which suites there are, and the cache around their making
//! (`debian.rs`).

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use kiln_model::base::{Base, BaseSource, DiskFile, DiskFormat};
use kiln_model::image::Firmware;
use kiln_model::kind::Kind;
use kiln_model::machine::Context;
use kiln_model::settings::{Node, Problems, Reader, nearest};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};

use super::Site;
use super::cache::{Card, Made, Shelf, age, now};
use super::debian::Mmdebstrap;

/// A suite of Debian that can be built.
#[derive(Debug)]
struct Suite {
    name: &'static str,
    /// Its number, for those who write that instead.
    number: &'static str,
    /// Whether its systemd (252 or later) reads credentials from the firmware.
    credentials: bool,
}

const fn suite(name: &'static str, number: &'static str, credentials: bool) -> Suite {
    Suite { name, number, credentials }
}

/// Source: <https://www.debian.org/releases/>; systemd is 247 in bullseye and
/// 252 in bookworm.
const SUITES: [Suite; 5] = [
    suite("bookworm", "12", true),
    suite("trixie", "13", true),
    suite("forky", "14", true),
    suite("sid", "unstable", true),
    suite("bullseye", "11", false),
];

/// Names that mean another suite next year: a base by such a name would be kept
/// as what it once was.
const MOVING: [&str; 4] = ["stable", "oldstable", "oldoldstable", "testing"];

/// What makes a Debian disk.
#[async_trait]
pub(super) trait Maker: Send + Sync {
    /// What the disk depends on beside the suite: another recipe is another base.
    fn recipe(&self) -> String;

    /// Writes a raw disk of `suite` to `out`.
    async fn make(&self, suite: &str, out: &Path, context: &Context) -> Result<()>;
}

/// Reads `debian` of `[base]`.
pub(super) struct DebianKind {
    cache: PathBuf,
    site: Site,
}

impl DebianKind {
    pub(super) fn new(cache: PathBuf, site: Site) -> Self {
        Self { cache, site }
    }
}

impl Kind<dyn BaseSource> for DebianKind {
    fn name(&self) -> &'static str {
        "debian"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["debian"]
    }

    fn read(&self, settings: &Node, _folder: &Path, problems: &mut Problems) -> Option<Box<dyn BaseSource>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[base]", problems)?;
        let entry = reader.entry("debian");
        let name = reader.string("debian", problems);
        reader.finish(problems);
        let (entry, name) = (entry?, name?);
        let Some(suite) = SUITES.iter().find(|s| s.name == name) else {
            problems.add(entry.node.place, format!("Debian has no suite `{name}` that kiln can build")).help(help(name));
            return None;
        };
        let maker = Mmdebstrap { site: self.site.clone() };
        let source = || Box::new(DebianSource::new(&self.cache, suite, self.site.mirror.as_deref(), Box::new(maker))) as _;
        (problems.0.len() == before).then(source)
    }
}

fn help(name: &str) -> String {
    if let Some(suite) = SUITES.iter().find(|s| s.number == name || s.number == name.split('.').next().unwrap_or_default()) {
        return format!("write its name: debian = \"{}\"", suite.name);
    }
    let all = || SUITES.iter().map(|s| s.name);
    if MOVING.contains(&name) {
        return format!("`{name}` means another suite next year: write the suite's own name ({})", all().collect::<Vec<_>>().join(", "));
    }
    match nearest(&name.to_lowercase(), all()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known suites: {}", all().collect::<Vec<_>>().join(", ")),
    }
}

struct DebianSource {
    suite: &'static Suite,
    maker: Box<dyn Maker>,
    shelf: Shelf,
}

impl DebianSource {
    /// Another mirror is another base: it may be a snapshot of a certain day.
    fn new(cache: &Path, suite: &'static Suite, mirror: Option<&str>, maker: Box<dyn Maker>) -> Self {
        let architecture = kiln_model::image::host_architecture();
        let recipe = Digest::of(format!("{architecture}\n{}\n{}", mirror.unwrap_or_default(), maker.recipe()));
        let shelf = Shelf::new(cache, &format!("debian-{}-{}", suite.name, recipe.short()));
        Self { suite, maker, shelf }
    }

    fn base(&self, made: &Made) -> Result<Base> {
        let unknown = || Error::new(Code::Corrupt, format!("{} is of another kiln", made.folder.display())).next("run again with --fresh");
        made.card.base(&self.label(), made.disk()).ok_or_else(unknown)
    }
}

#[async_trait]
impl BaseSource for DebianSource {
    fn label(&self) -> String {
        format!("debian {}", self.suite.name)
    }

    fn known(&self) -> Result<Option<Digest>> {
        Ok(self.shelf.current()?.and_then(|made| made.card.disk))
    }

    async fn fetch(&self, fresh: bool, context: &Context) -> Result<Base> {
        let asked = now();
        let say = |made: &Made| {
            context.reports.note(format!("base {} was built {} ago (--fresh builds it anew)", self.label(), age(made.card.made)));
        };
        if !fresh && let Some(made) = self.shelf.take()? {
            say(&made);
            return self.base(&made);
        }
        let _making = self.shelf.making(&self.label(), context).await?;
        // By now another bake may have built it: that is as fresh as ours.
        if let Some(made) = self.shelf.take()?
            && (!fresh || made.card.made >= asked)
        {
            say(&made);
            return self.base(&made);
        }
        let draft = self.shelf.draft(context)?;
        let path = draft.disk();
        self.maker.make(self.suite.name, &path, context).await.trying(|| format!("build the base {}", self.label()))?;
        let size = std::fs::metadata(&path).trying(|| format!("read {}", path.display()))?.len();
        let disk = DiskFile { path, format: DiskFormat::Raw, size };
        let card = Card::new(&self.label(), &disk, size, Firmware::BiosUefi, Some(self.suite.credentials));
        let made = self.shelf.commit(draft, card, context).await?;
        self.base(&made.ok_or_else(|| Error::new(Code::Failed, "the base vanished from the cache while it was put there"))?)
    }

    fn remember(&self, base: &Base, digest: &Digest) -> Result<()> {
        self.shelf.remember(&base.file()?.path, digest)
    }
}

#[cfg(test)]
mod tests;
