//! A real OpenSSH server on loopback, run as the current user, for tests.
//! A machine without `sshd` fails them: what is not tested is not known.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot be set up has to fail at once")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::{Keys, SshGuest, Target, connect};

/// An sshd with a bake's keys. Ends when it is dropped.
pub struct Sshd {
    /// The keys it knows.
    pub keys: Arc<Keys>,
    /// Its TCP port on 127.0.0.1.
    pub port: u16,
    child: Child,
    folder: tempfile::TempDir,
}

impl Sshd {
    /// Starts one.
    ///
    /// # Panics
    /// When there is no sshd, or it does not start.
    pub fn start() -> Self {
        Self::start_with(Arc::new(Keys::generate().unwrap()))
    }

    /// Starts one with keys that are known already.
    ///
    /// # Panics
    /// As [`Sshd::start`].
    pub fn start_with(keys: Arc<Keys>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = start(folder.path(), &keys, port);
        Self { keys, port, child, folder }
    }

    /// Where it is.
    pub fn target(&self) -> Target {
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap().trim().to_owned();
        Target { host: "127.0.0.1".into(), port: self.port, user, keys: Arc::clone(&self.keys), folder: self.path().to_owned() }
    }

    /// A folder of its own, gone when it is dropped.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Connects to it.
    ///
    /// # Panics
    /// When that fails.
    pub async fn guest(&self) -> Arc<SshGuest> {
        connect(self.target(), Duration::from_secs(30)).await.unwrap()
    }

    /// Kills the processes that hold its connections, so that those are lost.
    ///
    /// # Panics
    /// When `/proc` cannot be read.
    pub fn kill_connections(&self) {
        let mut all = children(self.child.id());
        let mut at = 0;
        while let Some(pid) = all.get(at) {
            all.extend(children(*pid));
            at += 1;
        }
        // From the top, so that none is left to tell how its child ended.
        for pid in all {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
        }
    }
}

fn children(parent: u32) -> Vec<u32> {
    let ppid = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid| ppid(*pid) == Some(parent)).collect()
}

fn start(folder: &Path, keys: &Keys, port: u16) -> Child {
    let file = |name: &str, text: &str| -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let host = file("host", keys.host_private_openssh());
    let allowed = file("authorized_keys", &format!("{}\n", keys.client_public()));
    // bash reads `~/.bashrc` under sshd, but for its SHLVL; what a developer has
    // there (pyenv waits for its lock a minute) is no part of a test.
    let config = file(
        "sshd_config",
        &format!(
            "ListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nSetEnv SHLVL=5\n",
            host.display(),
            allowed.display()
        ),
    );
    let _ = std::fs::create_dir_all("/run/sshd");
    let sshd = ["/usr/sbin/sshd", "/usr/bin/sshd"].into_iter().find(|path| Path::new(path).exists());
    let Some(sshd) = sshd else { panic!("these tests need sshd: apt-get install openssh-server") };
    let log = std::fs::File::create(folder.join("log")).unwrap();
    Command::new(sshd)
        .args(["-D", "-e", "-p", &port.to_string(), "-f"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.kill_connections();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
