//! What every test works with: the program, a home, templates.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// The program with a home of its own, or the shared one.
pub struct Kiln {
    pub home: PathBuf,
    _own: Option<TempDir>,
}

impl Kiln {
    /// The home that tests share, so that the base is built once. What a test
    /// bakes there has a name of its own.
    pub fn shared() -> Self {
        let home = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("home");
        std::fs::create_dir_all(&home).unwrap();
        Self { home, _own: None }
    }

    /// An empty home.
    pub fn fresh() -> Self {
        let own = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { home: own.path().to_owned(), _own: Some(own) }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.args(arguments).env("KILN_HOME", &self.home).env("NO_COLOR", "1").stdin(Stdio::null());
        command
    }

    /// Runs it to the end.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(self.command(arguments).output().unwrap(), arguments)
    }

    /// Runs it; it has to succeed.
    pub fn ok(&self, arguments: &[&str]) -> Ran {
        let ran = self.run(arguments);
        assert_eq!(ran.status, 0, "{ran}");
        ran
    }

    pub fn store(&self) -> PathBuf {
        self.home.join("store")
    }

    /// templates/debian-nginx, baked once in each run of the tests.
    pub fn with_nginx() -> Self {
        let kiln = Self::shared();
        let lock = File::create(kiln.home.join("nginx.lock")).unwrap();
        lock.lock().unwrap();
        let run = std::env::var("NEXTEST_RUN_ID").unwrap_or_else(|_| std::os::unix::process::parent_id().to_string());
        let marker = kiln.home.join("nginx.run");
        if std::fs::read_to_string(&marker).unwrap_or_default() != run {
            let template = concat!(env!("CARGO_MANIFEST_DIR"), "/templates/debian-nginx");
            kiln.ok(&["bake", template, "--no-cache", "--result", kiln.home.join("nginx.json").to_str().unwrap()]);
            std::fs::write(marker, run).unwrap();
        }
        kiln
    }

    /// What a bake has left outside the store and the cache.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        ["work", "ledger"]
            .iter()
            .flat_map(|folder| std::fs::read_dir(self.home.join(folder)).into_iter().flatten())
            .map(|entry| entry.unwrap().path())
            .collect()
    }

    /// Pids of processes that have this home on their command line.
    pub fn processes(&self) -> Vec<u32> {
        let home = self.home.to_str().unwrap().to_owned();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains("qemu") && line.contains(&home) {
                found.push(pid);
            }
        }
        found
    }
}

/// How a run ended.
pub struct Ran {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
    what: String,
}

impl Ran {
    pub fn of(output: Output, arguments: &[&str]) -> Self {
        use std::os::unix::process::ExitStatusExt as _;
        Self {
            status: output.status.code().unwrap_or_else(|| -output.status.signal().unwrap_or(0)),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            what: arguments.join(" "),
        }
    }

    /// Fails unless it ended like this and said all of that.
    #[track_caller]
    pub fn fails(&self, status: i32, said: &[&str]) {
        assert_eq!(self.status, status, "{self}");
        for text in said {
            assert!(self.stderr.contains(text), "no {text:?} in:\n{self}");
        }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    /// One JSON object per line.
    pub fn events(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "kiln {}: status {}\n--- stdout\n{}\n--- stderr\n{}", self.what, self.status, self.stdout, self.stderr)
    }
}

/// A folder with a template.
pub struct Template(pub TempDir);

impl Template {
    pub fn new(text: &str) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::write(folder.path().join("kiln.toml"), text).unwrap();
        Self(folder)
    }

    /// On the shared Debian base.
    pub fn debian(name: &str, rest: &str) -> Self {
        Self::new(&format!("[image]\nname = \"{name}\"\nversion = \"1\"\n[base]\ndebian = \"bookworm\"\n{rest}"))
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }
}

/// A home of its own with the base of the shared one, so that what it keeps is
/// known.
pub fn with_base() -> Kiln {
    let shared = Kiln::shared();
    shared.ok(&["bake", Template::debian("base-for-all", "").path()]);
    let kiln = Kiln::fresh();
    share(&shared, &kiln, "bases");
    kiln
}

/// Gives a home a folder of the cache of the shared one.
pub fn share(shared: &Kiln, own: &Kiln, folder: &str) {
    std::fs::create_dir_all(own.home.join("cache")).unwrap();
    std::os::unix::fs::symlink(shared.home.join("cache").join(folder), own.home.join("cache").join(folder)).unwrap();
}

/// A word that no earlier run has used: a step that says it is new.
pub fn new_word() -> String {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos().to_string()
}

/// Waits until `what` holds.
#[track_caller]
pub fn wait_until(limit: std::time::Duration, what: impl Fn() -> bool) {
    let end = std::time::Instant::now() + limit;
    while !what() {
        assert!(std::time::Instant::now() < end, "not within {limit:?}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Runs another program; it has to succeed.
#[track_caller]
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Looks for a word in a file, however large.
pub fn contains(path: &Path, word: &str) -> bool {
    let status = Command::new("grep").args(["-a", "-q", "-F", "-e", word]).arg(path).status().unwrap();
    // What another bake has put away by now holds nothing.
    assert!(matches!(status.code(), Some(0 | 1)) || !path.exists(), "grep in {}: {status}", path.display());
    status.success()
}
