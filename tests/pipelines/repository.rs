//! A repository whose pipelines are run here: what tests/whole and tests/ec2
//! share.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_testing::Registry;
use serde_json::{Value, json};

use crate::context::{Kiln, Ran, new_word, tool};

pub const TOP: &str = env!("CARGO_MANIFEST_DIR");
pub const PASSWORD: &str = "of the pipeline";

/// A repository with a template in `image/`, a key, and a registry.
pub struct Repository {
    pub folder: tempfile::TempDir,
    pub registry: Registry,
    pub kiln: Kiln,
    /// What every command finds in its environment as well.
    pub environment: Vec<(&'static str, String)>,
}

impl Repository {
    pub fn new(kiln: Kiln) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let repository = Self { folder, registry: Registry::builder().start().unwrap(), kiln, environment: Vec::new() };
        let key = repository.path("kiln.key");
        let mut keygen = repository.kiln.command(&["keygen", "--output", key.to_str().unwrap()]);
        assert!(keygen.env("KILN_KEY_PASSWORD", PASSWORD).output().unwrap().status.success());
        let word = new_word();
        let template = format!(
            "[image]\nname = \"pipeline\"\n[base]\ndebian = \"bookworm\"\n[disk]\nsize = \"3GiB\"\n\
             [cache]\ntrusted = [\"../kiln.pub\"]\n\
             [[provision]]\nname = \"slow\"\nshell = 'sleep 6; echo {word} >/etc/word'\n\
             [[test]]\nname = \"word\"\nshell = 'grep -q {word} /etc/word'\n"
        );
        repository.write("image/kiln.toml", &template);
        repository.git(&["init", "-q", "-b", "main"]);
        repository.git(&["add", "image", "kiln.pub"]);
        repository.git(&["commit", "-qm", "x"]);
        repository.git(&["tag", "-a", "v1.0.0", "-m", "x"]);
        repository
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub fn git(&self, arguments: &[&str]) {
        let folder = self.folder.path().to_str().unwrap();
        tool("git", &[&["-C", folder, "-c", "user.name=x", "-c", "user.email=x@x"], arguments].concat());
    }

    /// Runs a pipeline; `context` is what its runner knows beside this.
    pub fn run(&self, kind: &str, mut context: Value) -> Ran {
        let programs = self.path("bin");
        std::fs::create_dir_all(&programs).unwrap();
        drop(std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kiln"), programs.join("kiln")));
        // There is no Docker to log in with; the registry here lets everybody in.
        self.write("bin/docker", "#!/bin/sh\ncat >/dev/null\n");
        tool("chmod", &["+x", programs.join("docker").to_str().unwrap()]);
        let path = std::env::var("PATH").unwrap();
        let mut environment = json!({
            "PATH": format!("{}:{path}", programs.display()), "KILN_HOME": self.kiln.home, "HOME": self.path("home"), "NO_COLOR": "1",
        });
        for (name, value) in &self.environment {
            environment[*name] = value.as_str().into();
        }
        context["environment"] = environment;
        let file = self.path("context.json");
        std::fs::write(&file, context.to_string()).unwrap();
        let runner = Path::new(TOP).join("tests/pipelines/run.py");
        let output = Command::new("/usr/bin/python3").arg(runner).args([kind, TOP]).arg(self.folder.path()).arg(file).output().unwrap();
        Ran::of(output, &["pipeline", kind])
    }

    /// What GitHub's runner knows: of a push of a tag, or of a pull request.
    /// `publish_to` stands in the place of the regions of the workflow.
    pub fn github(&self, event: &str, temp: &str, role: &str, publish_to: &str) -> Value {
        json!({
            "github": {
                "event_name": event, "ref_type": if event == "push" { "tag" } else { "branch" }, "ref_name": "v1.0.0", "ref": "x",
                "repository": "shop/site",
            },
            "secrets": { "GITHUB_TOKEN": "t", "KILN_KEY": self.key(), "KILN_PASSWORD": PASSWORD },
            "vars": { "AWS_ROLE": role },
            "runner": { "temp": self.path(temp) },
            "replace": [["ghcr.io", self.registry.address()], ["ec2:eu-central-1 ec2:us-east-1", publish_to]],
            "steps": {},
        })
    }

    /// What GitLab's runner knows of a push of a tag; with the files that its
    /// pipeline is copied together with.
    pub fn gitlab(&self, leave_out: &[&str]) -> Value {
        for file in ["pipeline", "summary.py", "packages"] {
            let to = self.path(&format!("ci/{file}"));
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(Path::new(TOP).join("ci").join(file), to).unwrap();
        }
        std::fs::create_dir_all(self.path("home")).unwrap();
        json!({
            "variables": {
                "CI_REGISTRY": self.registry.address(), "CI_REGISTRY_USER": "u", "CI_REGISTRY_PASSWORD": "p",
                "CI_REGISTRY_IMAGE": format!("{}/shop/site", self.registry.address()),
                "CI_COMMIT_TAG": "v1.0.0", "CI_COMMIT_BRANCH": "", "CI_DEFAULT_BRANCH": "main",
                "KILN_SIGNING_KEY": self.key(), "KILN_KEY_PASSWORD": PASSWORD, "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/kiln",
            },
            "id_token": "token-of-the-job",
            "replace": [],
            "leave_out": leave_out,
        })
    }

    pub fn key(&self) -> String {
        std::fs::read_to_string(self.path("kiln.key")).unwrap()
    }

    /// The digest that a channel of the registry is at.
    pub fn channel(&self, repository: &str) -> String {
        let history = self.kiln.ok(&["history", "--json", &format!("{}/{repository}@production", self.registry.address())]).json();
        history["image"].as_str().unwrap_or_else(|| panic!("{history}")).to_owned()
    }
}

pub fn lines(ran: &Ran, prefix: &str) -> Vec<String> {
    ran.stdout.lines().filter_map(|line| line.strip_prefix(prefix)).map(str::to_owned).collect()
}
