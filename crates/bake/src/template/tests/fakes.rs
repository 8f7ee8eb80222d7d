//! Kinds that read settings and do nothing.

use std::path::Path;

use async_trait::async_trait;
use kiln_model::base::{Base, BaseSource};
use kiln_model::checkpoint::Checkpoint;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::machine::{Builder, Context, Machine, Start};
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, Value, wrong_type};
use kiln_model::{Code, Digest, Error, Key, Result};

use crate::template::Kinds;

pub(crate) struct Fakes {
    provisioners: Vec<Box<dyn Kind<dyn Provisioner>>>,
    tests: Vec<Box<dyn Kind<dyn Provisioner>>>,
    builders: Vec<Box<dyn Kind<dyn Builder>>>,
    bases: Vec<Box<dyn Kind<dyn BaseSource>>>,
}

impl Default for Fakes {
    fn default() -> Self {
        Self {
            provisioners: vec![Box::new(Shell), Box::new(File)],
            tests: vec![Box::new(Shell)],
            builders: vec![Box::new(Virtual("qemu")), Box::new(Virtual("ec2"))],
            bases: vec![Box::new(Distribution("debian")), Box::new(Distribution("url"))],
        }
    }
}

impl Fakes {
    pub(crate) fn kinds(&self) -> Kinds<'_> {
        Kinds { provisioners: &self.provisioners, tests: &self.tests, builders: &self.builders, bases: &self.bases }
    }
}

/// `shell = "…"` or `shell = { inline = "…", script = "FILE" }`.
struct Shell;
/// `file = { source = "…", destination = "…" }`.
struct File;
/// A builder with `memory` and `cpus`.
struct Virtual(&'static str);
/// A base with `checksum`.
struct Distribution(&'static str);

/// What was read, as text: the key is made of it, and tests look at it.
pub(crate) struct Fake {
    kind: &'static str,
    pub(crate) settings: String,
}

impl Kind<dyn Provisioner> for Shell {
    fn name(&self) -> &'static str {
        "shell"
    }
    fn keys(&self) -> &'static [&'static str] {
        &["inline", "script", "interpreter"]
    }
    fn verbatim(&self) -> &'static [&'static str] {
        &["", "inline"]
    }
    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let settings = if let Value::String(text) = &settings.value {
            text.clone()
        } else {
            let mut reader = Reader::new(settings, "shell", problems)?;
            let inline = reader.string("inline", problems).unwrap_or_default().to_owned();
            let script = reader.existing_path("script", folder, problems);
            let script = script.map(|path| std::fs::read_to_string(path).unwrap()).unwrap_or_default();
            let interpreter = reader.string("interpreter", problems).unwrap_or_default();
            let settings = format!("{inline}{script}{interpreter}");
            reader.finish(problems);
            settings
        };
        (problems.0.len() == before).then(|| Box::new(Fake { kind: "shell", settings }) as _)
    }
}

impl Kind<dyn Provisioner> for File {
    fn name(&self) -> &'static str {
        "file"
    }
    fn keys(&self) -> &'static [&'static str] {
        &["source", "destination"]
    }
    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let mut reader = Reader::new(settings, "file", problems)?;
        let source = reader.existing_path("source", folder, problems);
        let destination = reader.required_string("destination", problems).map(str::to_owned);
        reader.finish(problems);
        let bytes = std::fs::read_to_string(source?).unwrap_or_default();
        Some(Box::new(Fake { kind: "file", settings: format!("{}={bytes}", destination?) }))
    }
}

#[async_trait]
impl Provisioner for Fake {
    fn kind(&self) -> &'static str {
        self.kind
    }
    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("settings", &self.settings);
        Ok(())
    }
    async fn run(&self, step: &Step<'_>) -> Result<()> {
        Err(Error::new(Code::Failed, format!("a fake never runs ({})", step.common.name)))
    }
}

impl Kind<dyn Builder> for Virtual {
    fn name(&self) -> &'static str {
        self.0
    }
    fn keys(&self) -> &'static [&'static str] {
        &["memory", "cpus"]
    }
    fn read(&self, settings: &Node, _: &Path, problems: &mut Problems) -> Option<Box<dyn Builder>> {
        let mut reader = Reader::new(settings, format!("[builder.{}]", self.0), problems)?;
        reader.size("memory", problems);
        reader.integer("cpus", problems);
        reader.finish(problems);
        Some(Box::new(Fake { kind: self.0, settings: String::new() }))
    }
}

#[async_trait]
impl Builder for Fake {
    fn kind(&self) -> &'static str {
        self.kind
    }
    async fn memory_key(&self, _: &Key, _: &Base, _: &Context) -> Result<Option<Key>> {
        Ok(None)
    }
    async fn start(&self, _: &Base, _: &Start, _: &Context) -> Result<Box<dyn Machine>> {
        Err(Error::new(Code::Failed, "a fake never starts"))
    }
    async fn resume(&self, _: &Base, _: &Checkpoint, _: &Start, _: &Context) -> Result<Option<Box<dyn Machine>>> {
        Ok(None)
    }
}

impl Kind<dyn BaseSource> for Distribution {
    fn name(&self) -> &'static str {
        self.0
    }
    fn keys(&self) -> &'static [&'static str] {
        &["checksum"]
    }
    fn read(&self, settings: &Node, _: &Path, problems: &mut Problems) -> Option<Box<dyn BaseSource>> {
        let mut reader = Reader::new(settings, "[base]", problems)?;
        let entry = reader.entry(self.0)?;
        let Value::String(text) = &entry.node.value else {
            return wrong_type(&entry.node, self.0, "a string", problems);
        };
        let settings = format!("{} {text}", self.0);
        reader.string("checksum", problems);
        reader.finish(problems);
        Some(Box::new(Fake { kind: self.0, settings }))
    }
}

#[async_trait]
impl BaseSource for Fake {
    fn label(&self) -> String {
        self.settings.clone()
    }
    fn known(&self) -> Result<Option<Digest>> {
        Ok(None)
    }
    async fn fetch(&self, _: bool, _: &Context) -> Result<Base> {
        Err(Error::new(Code::Failed, "a fake has no disk"))
    }
    fn remember(&self, _: &Base, _: &kiln_model::Digest) -> Result<()> {
        Ok(())
    }
}

/// What a step's provisioner read, seen through its key.
pub(crate) fn made_of(step: &crate::template::StepSpec, kind: &'static str, settings: &str) -> bool {
    let own = |provisioner: &dyn Provisioner| {
        let mut hasher = KeyHasher::new("test");
        provisioner.key(&mut hasher).unwrap();
        hasher.finish()
    };
    step.provisioner.kind() == kind && own(&*step.provisioner) == own(&Fake { kind, settings: settings.into() })
}
