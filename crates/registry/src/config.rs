//! Who one is at a registry: Docker's `config.json` and credential helpers.
//!
//! For a host, in this order, and in each of the files in their order:
//! `credHelpers`, `credsStore`, `auths`. Keys of `auths` are a host, also as an
//! address (`https://index.docker.io/v1/`), or a host and the beginning of a
//! repository's name (`ghcr.io/team`), of which the longest that fits is taken.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use kiln_model::secret::Secret;
use kiln_model::{Code, Error, Result, ResultExt as _};
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::Mutex;

/// A helper may ask a keychain, which may ask a person.
const HELPER: Duration = Duration::from_secs(60);
/// What Docker's own registry is called in configurations.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// How one proves who one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Proof {
    /// A user and a password.
    Password(String, Secret),
    /// A token that gets tokens (`identitytoken`).
    Refresh(Secret),
    /// A token for the registry itself (`registrytoken`).
    Token(Secret),
}

/// Who one is at a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Login {
    pub(crate) proof: Proof,
    /// Where it is from, for people.
    pub(crate) from: String,
}

impl Login {
    /// Whom the registry was asked as, for people.
    pub(crate) fn shown(&self) -> String {
        match &self.proof {
            Proof::Password(user, _) => format!("as `{user}`, whose password is from {}", self.from),
            Proof::Refresh(_) | Proof::Token(_) => format!("with the token from {}", self.from),
        }
    }

    /// What must never be shown.
    pub(crate) fn secret(&self) -> &Secret {
        match &self.proof {
            Proof::Password(_, secret) | Proof::Refresh(secret) | Proof::Token(secret) => secret,
        }
    }
}

// No `Debug`: these hold passwords.
#[derive(Default, Deserialize)]
#[serde(default)]
struct File {
    auths: HashMap<String, Entry>,
    #[serde(rename = "credHelpers")]
    helpers: HashMap<String, String>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// The files of credentials, read when they are needed first.
pub(crate) struct Logins {
    /// Whether the first must be there.
    named: bool,
    paths: Vec<PathBuf>,
    files: OnceLock<Vec<(PathBuf, File)>>,
    /// What helpers answered, by helper and host.
    answers: Mutex<HashMap<(String, String), Option<Login>>>,
}

impl fmt::Debug for Logins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logins").field("paths", &self.paths).finish_non_exhaustive()
    }
}

impl Logins {
    /// Those of `only`, or of the files that the environment names.
    pub(crate) fn new(only: Option<PathBuf>) -> Self {
        let named = only.is_some();
        let paths = only.map_or_else(|| paths(&|name| std::env::var_os(name)), |only| vec![only]);
        Self { named, paths, files: OnceLock::new(), answers: Mutex::default() }
    }

    /// The files, for people.
    pub(crate) fn shown(&self) -> String {
        let paths: Vec<String> = self.paths.iter().map(|path| path.display().to_string()).collect();
        if paths.is_empty() { "no file, since there is no home directory".into() } else { paths.join(", ") }
    }

    fn files(&self) -> Result<&[(PathBuf, File)]> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let mut files = Vec::new();
        for path in &self.paths {
            match std::fs::read(path) {
                Ok(json) => files.push((path.clone(), read(path, &json)?)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && !self.named => {}
                Err(error) => return Err(error).trying(|| format!("read the credentials in {}", path.display())),
            }
        }
        Ok(self.files.get_or_init(|| files))
    }

    /// Who one is at `host`, for its repository `repository`; none when nobody
    /// says.
    ///
    /// # Errors
    /// [`Code::Usage`] for a file that cannot be read, [`Code::Missing`] for a
    /// helper that is not there, [`Code::Failed`] for one that fails.
    pub(crate) async fn find(&self, host: &str, repository: &str) -> Result<Option<Login>> {
        for (path, file) in self.files()? {
            let helpers = file.helpers.iter().filter(|(key, _)| normal(key) == normal(host)).map(|(_, helper)| helper);
            for helper in helpers.chain(&file.store) {
                if let Some(login) = self.ask(helper, host, path).await? {
                    return Ok(Some(login));
                }
            }
            if let Some(login) = in_auths(path, file, host, repository)? {
                return Ok(Some(login));
            }
        }
        Ok(None)
    }

    async fn ask(&self, helper: &str, host: &str, path: &Path) -> Result<Option<Login>> {
        // Held while the helper runs: it asks a person once, not four times.
        let mut answers = self.answers.lock().await;
        let key = (helper.to_owned(), host.to_owned());
        if let Some(answer) = answers.get(&key) {
            return Ok(answer.clone());
        }
        let answer = run(helper, host, path).await?;
        answers.insert(key, answer.clone());
        Ok(answer)
    }
}

fn paths(env: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let env = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let docker = env("DOCKER_CONFIG").or_else(|| env("HOME").map(|home| home.join(".docker")));
    let podman = env("XDG_RUNTIME_DIR").map(|folder| folder.join("containers/auth.json"));
    env("REGISTRY_AUTH_FILE").into_iter().chain(docker.map(|folder| folder.join("config.json"))).chain(podman).collect()
}

fn read(path: &Path, json: &[u8]) -> Result<File> {
    let wrong = |why: String| {
        Error::new(Code::Usage, format!("cannot read the credentials in {}: {why}", path.display()))
            .next("repair that file, or remove it and log in anew with `docker login HOST`")
    };
    if json.iter().all(u8::is_ascii_whitespace) {
        return Ok(File::default());
    }
    // The parser's message would quote what it stumbles over: a password, maybe.
    serde_json::from_slice(json).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => wrong(format!("line {} is of another kind than Docker's own", error.line())),
        _ => wrong(format!("line {} is no JSON", error.line())),
    })
}

/// A key of `auths`, or a host, without what does not matter.
fn normal(key: &str) -> &str {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let key = match bare {
        // Only addresses have a path that is not a repository's.
        Some(bare) => bare.split('/').next().unwrap_or(bare),
        None => key.trim_end_matches('/'),
    };
    match key {
        "docker.io" | "registry-1.docker.io" | "index.docker.io/v1" => "index.docker.io",
        _ => key,
    }
}

fn in_auths(path: &Path, file: &File, host: &str, repository: &str) -> Result<Option<Login>> {
    let whole = format!("{}/{repository}", normal(host));
    let fits = |key: &str| whole.strip_prefix(normal(key)).is_some_and(|rest| rest.starts_with('/'));
    let Some((key, entry)) = file.auths.iter().filter(|(key, _)| fits(key)).max_by_key(|(key, _)| normal(key).len()) else {
        return Ok(None);
    };
    let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let proof = if let Some(token) = given(&entry.identitytoken) {
        Proof::Refresh(Secret::new(token))
    } else if let Some(token) = given(&entry.registrytoken) {
        Proof::Token(Secret::new(token))
    } else if let Some(auth) = given(&entry.auth) {
        let (user, password) = decode(&auth).ok_or_else(|| {
            Error::new(Code::Usage, format!("`auth` of `{key}` in {} is not the base64 of `user:password`", path.display()))
                .next(format!("log in anew with `docker login {host}`"))
        })?;
        Proof::Password(user, Secret::new(password))
    } else if let (Some(user), Some(password)) = (given(&entry.username), given(&entry.password)) {
        Proof::Password(user, Secret::new(password))
    } else {
        return Ok(None);
    };
    Ok(Some(Login { proof, from: path.display().to_string() }))
}

fn decode(auth: &str) -> Option<(String, String)> {
    let auth = auth.trim();
    let bytes = STANDARD.decode(auth).or_else(|_| STANDARD_NO_PAD.decode(auth)).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    // Docker pads old entries with zeros.
    Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

/// Asks `docker-credential-<helper>`, which the file at `path` names, who one
/// is at `host`.
async fn run(helper: &str, host: &str, path: &Path) -> Result<Option<Login>> {
    if helper.is_empty() || helper.contains(['/', '\0']) {
        return Err(Error::new(Code::Usage, format!("{} names a credential helper that cannot be one: `{helper}`", path.display()))
            .next("correct `credsStore` and `credHelpers` in that file"));
    }
    run_program(&format!("docker-credential-{helper}"), host, path).await
}

async fn run_program(program: &str, host: &str, path: &Path) -> Result<Option<Login>> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "Username", default)]
        user: String,
        #[serde(rename = "Secret", default)]
        secret: String,
    }

    let failed = |code, why: String| Error::new(code, format!("cannot get the credentials of {host}: {why}"));
    let mut command = Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(failed(Code::Missing, format!("{program}, which {} names, is not installed", path.display()))
                .next(format!("install {program}, or take it out of that file and log in anew with `docker login {host}`")));
        }
        Err(error) => return Err(failed(Code::Failed, format!("{program} cannot be started")).because(error)),
    };
    let name = if normal(host) == "index.docker.io" { DOCKER_HUB } else { host };
    let ask = async {
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that ends without reading has an answer all the same.
            let _ = stdin.write_all(name.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(HELPER, ask).await {
        Ok(output) => output.trying(|| format!("run {program}"))?,
        Err(_) => return Err(failed(Code::Failed, format!("{program} did not answer within {} s", HELPER.as_secs()))),
    };
    if !output.status.success() {
        let said = format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if said.to_lowercase().contains("credentials not found") {
            return Ok(None);
        }
        // Helpers tell their errors on standard output, in one line.
        let line: String =
            said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it said nothing").chars().take(200).collect();
        return Err(failed(Code::Failed, format!("{program} failed: {line}"))
            .next(format!("run `{program} get` with `{name}` on its standard input")));
    }
    let answer: Answer = serde_json::from_slice(&output.stdout)
        .map_err(|_| failed(Code::Failed, format!("{program} answered with something else than its protocol says")))?;
    if answer.secret.is_empty() {
        return Ok(None);
    }
    let secret = Secret::new(answer.secret);
    let proof = if answer.user == "<token>" { Proof::Refresh(secret) } else { Proof::Password(answer.user, secret) };
    Ok(Some(Login { proof, from: program.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn written(json: &str) -> (tempfile::TempDir, Logins) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        (folder, Logins::new(Some(path)))
    }

    fn password(login: Option<Login>) -> Option<(String, String)> {
        match login?.proof {
            Proof::Password(user, password) => Some((user, password.expose().to_owned())),
            other => panic!("{other:?}"),
        }
    }

    fn pair(user: &str, password: &str) -> Option<(String, String)> {
        Some((user.into(), password.into()))
    }

    #[tokio::test]
    async fn passwords_by_host_and_by_repository() {
        let auth = |text: &str| STANDARD.encode(text);
        let (_folder, logins) = written(&format!(
            r#"{{"auths": {{
                "localhost:5000": {{"auth": "{}"}},
                "ghcr.io": {{"auth": "{}"}},
                "ghcr.io/team": {{"auth": "{}"}},
                "https://index.docker.io/v1/": {{"username": "hub", "password": "p:w"}},
                "https://quay.io": {{"auth": "{}", "email": "x@y"}},
                "empty.example": {{}}
            }}, "HttpHeaders": {{"User-Agent": "x"}}}}"#,
            auth("me:secret"),
            auth("all:1"),
            auth("team:2:3"),
            auth("q:padded\0\0"),
        ));
        let find = async |host, repository| password(logins.find(host, repository).await.unwrap());
        assert_eq!(find("localhost:5000", "a/b").await, pair("me", "secret"));
        assert_eq!(find("localhost:5001", "a/b").await, None);
        assert_eq!(find("localhost", "a/b").await, None);
        assert_eq!(find("ghcr.io", "other/web").await, pair("all", "1"));
        assert_eq!(find("ghcr.io", "team/web").await, pair("team", "2:3"));
        assert_eq!(find("ghcr.io", "teammates/web").await, pair("all", "1"));
        assert_eq!(find("docker.io", "library/debian").await, pair("hub", "p:w"));
        assert_eq!(find("quay.io", "a").await, pair("q", "padded"));
        assert_eq!(find("empty.example", "a").await, None);
    }

    #[tokio::test]
    async fn tokens() {
        let (_folder, logins) =
            written(r#"{"auths": {"a.example": {"auth": "eDp5", "identitytoken": "idt"}, "b.example": {"registrytoken": "rgt"}}}"#);
        let find = async |host| logins.find(host, "x").await.unwrap().unwrap();
        assert_eq!(find("a.example").await.proof, Proof::Refresh(Secret::new("idt")));
        assert_eq!(find("b.example").await.proof, Proof::Token(Secret::new("rgt")));
        assert!(!format!("{:?} {}", find("a.example").await, find("a.example").await.shown()).contains("idt"));
    }

    #[tokio::test]
    async fn wrong_files_are_named_and_never_quoted() {
        for json in ["{\"auths\": {\"h\": {\"auth\": 77hunter2", r#"{"auths": {"h": "hunter2"}}"#, "hunter2"] {
            let (folder, logins) = written(json);
            let error = logins.find("h", "x").await.unwrap_err();
            assert_eq!(error.kind(), Code::Usage);
            let text = format!("{error:?} {:?}", error.next_move());
            assert!(text.contains(&folder.path().display().to_string()) && !text.contains("hunter2"), "{text}");
        }
        let (_folder, logins) = written(r#"{"auths": {"h": {"auth": "!hunter2"}}}"#);
        assert!(!format!("{:?}", logins.find("h", "x").await.unwrap_err()).contains("hunter2"));
        let (_folder, logins) = written("\n");
        assert_eq!(logins.find("h", "x").await.unwrap(), None);
        let error = Logins::new(Some("/nowhere/config.json".into())).find("h", "x").await.unwrap_err();
        assert!(error.chain().contains("/nowhere/config.json"), "{error:?}");
    }

    #[test]
    fn where_they_are_looked_for() {
        let env = |set: &'static [(&str, &str)]| paths(&move |name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v)));
        let shown = |paths: Vec<PathBuf>| paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(shown(env(&[("HOME", "/h")])), "/h/.docker/config.json");
        assert_eq!(
            shown(env(&[("HOME", "/h"), ("DOCKER_CONFIG", "/d"), ("REGISTRY_AUTH_FILE", "/r.json"), ("XDG_RUNTIME_DIR", "/run/1")])),
            "/r.json /d/config.json /run/1/containers/auth.json"
        );
        assert_eq!(shown(env(&[("DOCKER_CONFIG", "")])), "");
    }

    /// Helpers are found by `PATH`, which all tests share: this one is run by
    /// its whole path.
    async fn helper(script: &str, host: &str) -> Result<Option<Login>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker-credential-x");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        run_program(&path.display().to_string(), host, Path::new("config.json")).await
    }

    #[tokio::test]
    async fn helpers() {
        let json = r#"[ "$1" = get ] && host=$(cat) && printf '{"ServerURL":"%s","Username":"u","Secret":"s-%s"}' "$host" "$host""#;
        assert_eq!(password(helper(json, "ghcr.io").await.unwrap()), pair("u", "s-ghcr.io"));
        assert_eq!(password(helper(json, "docker.io").await.unwrap()), pair("u", "s-https://index.docker.io/v1/"));
        let token = helper(r#"cat >/dev/null; echo '{"Username":"<token>","Secret":"t"}'"#, "h").await.unwrap().unwrap();
        assert_eq!(token.proof, Proof::Refresh(Secret::new("t")));
        // Ends without reading what it is given.
        assert_eq!(helper("echo 'credentials not found in native keychain'; exit 1", "h").await.unwrap(), None);
        let error = helper("echo 'no keychain' >&2; exit 1", "h").await.unwrap_err();
        assert!(error.chain().contains("no keychain"), "{error:?}");
        let error = helper("echo hunter2", "h").await.unwrap_err();
        assert!(!format!("{error:?}").contains("hunter2"));
    }

    #[tokio::test]
    async fn helpers_that_are_not_there() {
        let (_folder, logins) = written(r#"{"credsStore": "kiln-test-of-nothing"}"#);
        let error = logins.find("h", "x").await.unwrap_err();
        assert_eq!(error.kind(), Code::Missing);
        assert!(error.chain().contains("docker-credential-kiln-test-of-nothing"), "{error:?}");
        let (_folder, logins) = written(r#"{"credHelpers": {"other": "kiln-test-of-nothing"}}"#);
        assert_eq!(logins.find("h", "x").await.unwrap(), None);
        let (_folder, logins) = written(r#"{"credsStore": "../evil"}"#);
        assert_eq!(logins.find("h", "x").await.unwrap_err().kind(), Code::Usage);
    }
}
