//! The template stage, with small kinds in place of the real ones.

pub(crate) mod fakes;
mod good;
mod mistakes;
mod secrets;

use std::path::Path;

use fakes::Fakes;
use kiln_model::settings::Problem;

use super::{Inputs, Mistakes, Template};

/// The least that a template needs, for tests of something else.
const HEAD: &str = "[image]\nname = \"web\"\nversion = \"1.0\"\n[base]\ndebian = \"bookworm\"\n";

/// A folder with a template and what it needs.
struct Bench {
    folder: tempfile::TempDir,
    inputs: Inputs,
}

impl Bench {
    fn new(template: &str) -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap(), inputs: Inputs { arch: "amd64".into(), ..Inputs::default() } };
        bench.file("kiln.toml", template)
    }

    fn file(self, name: &str, text: &str) -> Self {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn var(mut self, name: &str, value: &str) -> Self {
        self.inputs.vars.push((name.into(), value.into()));
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.inputs.environment.push((name.into(), value.into()));
        self
    }

    fn var_file(mut self, name: &str, text: &str) -> Self {
        self.inputs.var_files.push(self.path().join(name));
        self.file(name, text)
    }

    fn builder(mut self, name: &str) -> Self {
        self.inputs.builder = Some(name.into());
        self
    }

    fn git(&self, arguments: &[&str]) {
        let status = std::process::Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false"])
            .args(arguments)
            .current_dir(self.path())
            .output()
            .unwrap();
        assert!(status.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&status.stderr));
    }

    fn load(&self) -> Result<Template, Mistakes> {
        let fakes = Fakes::default();
        super::load(self.path(), &self.inputs, &fakes.kinds())
    }

    fn good(&self) -> Template {
        match self.load() {
            Ok(template) => template,
            Err(mistakes) => panic!("{:#?}", told(&mistakes)),
        }
    }

    /// Each mistake as (underlined text, message, help or label).
    fn bad(&self) -> Vec<Told> {
        match self.load() {
            Ok(_) => panic!("no mistake was found"),
            Err(mistakes) => told(&mistakes),
        }
    }
}

/// A mistake as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    source: String,
    at: String,
    message: String,
    more: String,
}

fn told(mistakes: &Mistakes) -> Vec<Told> {
    let tell = |problem: &Problem| {
        let source = problem.place.map(|place| &mistakes.sources[place.source]);
        Told {
            source: source.map(|s| s.name.rsplit('/').next().unwrap().to_owned()).unwrap_or_default(),
            at: problem.place.map(|place| source.unwrap().text[place.start..place.end].to_owned()).unwrap_or_default(),
            message: problem.message.clone(),
            more: format!("{} {}", problem.label.as_deref().unwrap_or_default(), problem.help.as_deref().unwrap_or_default()),
        }
    };
    mistakes.problems.0.iter().map(tell).collect()
}
