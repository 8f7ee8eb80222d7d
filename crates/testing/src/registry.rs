//! docker-registry as a child process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use kiln_model::{Code, Error, Result, ResultExt as _};
use tempfile::TempDir;

use crate::tls;
use crate::watch::Watched;

/// How long it may take to listen.
const START: Duration = Duration::from_secs(60);

/// What the registry is to be like.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    login: Option<(String, String)>,
    tls: bool,
}

impl Builder {
    /// Wants this user and this password (htpasswd, bcrypt).
    #[must_use]
    pub fn basic_auth(mut self, user: &str, password: &str) -> Self {
        self.login = Some((user.into(), password.into()));
        self
    }

    /// Speaks TLS, with a certificate for `localhost` and `127.0.0.1` from an
    /// authority of its own ([`Registry::authority`]).
    #[must_use]
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Starts it; returns when it listens.
    ///
    /// # Errors
    /// [`Code::Missing`] when docker-registry, openssl or perl are not there,
    /// [`Code::Failed`] with the registry's log when it does not start.
    pub fn start(self) -> Result<Registry> {
        let folder = tempfile::Builder::new().prefix("kiln-registry-").tempdir().trying(|| "make a folder for a registry".into())?;
        let mut auth = String::new();
        if let Some((user, password)) = &self.login {
            let path = folder.path().join("htpasswd");
            std::fs::write(&path, format!("{user}:{}\n", bcrypt(password)?)).trying(|| format!("write {}", path.display()))?;
            auth = format!("auth: {{htpasswd: {{realm: kiln tests, path: \"{}\"}}}}\n", path.display());
        }
        let certificates = if self.tls { Some(tls::make(folder.path())?) } else { None };
        let mut registry = Registry { auth, login: self.login, certificates, address: String::new(), pid: 0, running: None, folder };
        registry.run("127.0.0.1:0")?;
        Ok(registry)
    }
}

/// Debian's docker-registry 2.8.2, as a child process with a folder of its
/// own. It and the folder are gone when this is dropped, and when the process
/// of the test dies.
///
/// It has no referrers API, answers 206 to `Range`, mounts across repositories,
/// removes by request, forgets an upload session when a PATCH is cut, and does
/// not keep tags from being moved ([`crate::Proxy`] can).
pub struct Registry {
    auth: String,
    login: Option<(String, String)>,
    certificates: Option<tls::Certificates>,
    address: String,
    pid: u32,
    running: Option<Watched>,
    folder: TempDir,
}

impl Registry {
    /// One that is plain and open to everybody, unless told otherwise.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process id, for tests that kill it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The certificate to trust, of one that speaks TLS.
    pub fn authority(&self) -> Option<&Path> {
        self.certificates.as_ref().map(|certificates| certificates.authority.as_path())
    }

    /// The folder in which it keeps what it stores. A blob is the file
    /// `docker/registry/v2/blobs/sha256/<first 2 digits>/<hex>/data` in it.
    pub fn storage(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    /// Where the blob (or manifest) with these 64 hex digits is stored.
    pub fn blob(&self, hex: &str) -> PathBuf {
        let two = hex.get(..2).unwrap_or_default();
        self.storage().join("docker/registry/v2/blobs/sha256").join(two).join(hex).join("data")
    }

    /// Writes a Docker `config.json` with the user and the password, for the
    /// registry and for `others` (the address of a proxy before it).
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn docker_config(&self, others: &[&str]) -> Result<PathBuf> {
        let mut auths = serde_json::Map::new();
        if let Some((user, password)) = &self.login {
            let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
            for host in others.iter().copied().chain([self.address.as_str()]) {
                auths.insert(host.to_owned(), serde_json::json!({ "auth": auth }));
            }
        }
        let path = self.folder.path().join("config.json");
        std::fs::write(&path, serde_json::json!({ "auths": auths }).to_string()).trying(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Kills it; what it stored stays.
    pub fn stop(&mut self) {
        self.running = None;
    }

    /// Starts it again, at the same address, after [`Registry::stop`].
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub fn start_again(&mut self) -> Result<()> {
        self.stop();
        let address = self.address.clone();
        self.run(&address)
    }

    fn run(&mut self, address: &str) -> Result<()> {
        let folder = self.folder.path();
        let (config, log) = (folder.join("config.yml"), folder.join("log"));
        let tls = self.certificates.as_ref().map_or_else(String::new, |tls| {
            format!(", tls: {{certificate: \"{}\", key: \"{}\"}}", tls.certificate.display(), tls.key.display())
        });
        let text = format!(
            "version: 0.1\n\
             log: {{level: info, formatter: json, accesslog: {{disabled: true}}}}\n\
             storage:\n  filesystem: {{rootdirectory: \"{}\"}}\n  delete: {{enabled: true}}\n  maintenance: {{uploadpurging: {{enabled: false}}}}\n\
             http: {{addr: \"{address}\", secret: kiln-tests{tls}}}\n{}",
            self.storage().display(),
            self.auth,
        );
        std::fs::write(&config, text).trying(|| format!("write {}", config.display()))?;
        let arguments = ["serve", &config.to_string_lossy()];
        let running = Watched::start(Path::new("docker-registry"), &arguments, &log, folder)?;
        self.pid = running.pid();
        let running = self.running.insert(running);
        let since = Instant::now();
        loop {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(address) = listening(&log) {
                self.address = address;
                return Ok(());
            }
            if !running.runs() || since.elapsed() > START {
                let missing = log.contains("not found") && log.lines().count() <= 2;
                let error = Error::new(if missing { Code::Missing } else { Code::Failed }, "docker-registry does not start").detail(log);
                return Err(error.next("install it: apt-get install docker-registry"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The address in `listening on 127.0.0.1:35821, tls`.
fn listening(log: &str) -> Option<String> {
    let (_, rest) = log.split_once("listening on ")?;
    let end = rest.find(['"', ','])?;
    Some(rest[..end].to_owned())
}

/// The bcrypt hash of a password, by the C library's crypt(3), which Debian's
/// perl-base reaches: htpasswd(1) would be a package for one line.
fn bcrypt(password: &str) -> Result<String> {
    let what = || Error::new(Code::Missing, "cannot hash a password with bcrypt").next("install perl-base");
    let mut command = Command::new("perl");
    command.args(["-e", "print crypt($ENV{PASSWORD}, '$2y$05$kilnKilnKilnKilnKilnKu')"]).env("PASSWORD", password);
    let output = command.output().map_err(|error| what().because(error))?;
    let hash = String::from_utf8_lossy(&output.stdout).into_owned();
    if hash.starts_with("$2y$05$") { Ok(hash) } else { Err(what()) }
}
