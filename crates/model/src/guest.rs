//! The guest: the inside of a machine. Execute, upload, download.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::event::Stream;
use crate::tree::Tree;

/// A command for the guest's POSIX shell, run as root.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// A line for `/bin/sh`; use [`quote`] for values. Never holds a secret:
    /// it shows in the guest's process list.
    pub line: String,
    /// What the command reads on standard input; empty otherwise.
    pub stdin: Vec<u8>,
    /// How long it may take; then it is killed. None: as long as it likes.
    pub timeout: Option<Duration>,
}

impl Command {
    /// A command with no input and no limit.
    pub fn new(line: impl Into<String>) -> Self {
        Self { line: line.into(), ..Self::default() }
    }

    /// With bytes on standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// With a limit.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }
}

/// `value` quoted for a POSIX shell.
pub fn quote(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%_-+=:,./".contains(c);
    if !value.is_empty() && value.chars().all(plain) { value.to_owned() } else { format!("'{}'", value.replace('\'', r"'\''")) }
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// With this status; 0 is success.
    Status(u32),
    /// By this signal (`KILL`, `TERM`, …).
    Signal(String),
}

impl Exit {
    /// Whether the command succeeded.
    pub fn success(&self) -> bool {
        *self == Self::Status(0)
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Signal(name) => write!(f, "killed by SIG{name}"),
        }
    }
}

/// Takes output line by line, while the command runs.
pub type OnLine<'a> = &'a mut (dyn FnMut(Stream, &str) + Send);

/// What a command printed, and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// How to reach the guest with a stock OpenSSH, as plain data (for Ansible,
/// and for `--on-failure shell`).
#[derive(Debug, Clone)]
pub struct SshAccess {
    /// Address of the guest's sshd as seen from here.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Login name.
    pub user: String,
    /// Private key file (0600), alive as long as the machine.
    pub key_file: PathBuf,
    /// A known_hosts file with this bake's host key alone.
    pub known_hosts: PathBuf,
}

impl SshAccess {
    /// Arguments for `ssh` that pin the host key and read no user's settings.
    pub fn ssh_arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = ["-F", "none", "-p", &self.port.to_string(), "-i"].map(Into::into).into();
        arguments.push(self.key_file.display().to_string());
        for option in [
            "IdentitiesOnly=yes".to_owned(),
            "StrictHostKeyChecking=yes".to_owned(),
            "GlobalKnownHostsFile=/dev/null".to_owned(),
            format!("UserKnownHostsFile={}", self.known_hosts.display()),
            "LogLevel=ERROR".to_owned(),
        ] {
            arguments.extend(["-o".to_owned(), option]);
        }
        arguments.push(format!("{}@{}", self.user, self.host));
        arguments
    }
}

/// The inside of a machine, reached over a pinned connection.
///
/// Methods may be called at the same time from several tasks. A connection
/// that was lost is made again by the next call; a command whose connection is
/// lost fails with [`crate::Code::Unreachable`], and is never run twice.
#[async_trait]
pub trait Guest: Send + Sync {
    /// Runs a command; gives its lines as they come, and how it ended. A
    /// command that fails is an `Ok` with its exit.
    ///
    /// # Errors
    /// When the guest cannot be reached, or with [`crate::Code::Timeout`].
    async fn execute(&self, command: &Command, on_line: OnLine<'_>) -> Result<Exit>;

    /// Copies a local tree into the guest below (or, for a single file, at)
    /// `destination`, as a tar stream: any size, modes and symbolic links
    /// kept, owned by root.
    ///
    /// # Errors
    /// When reading, sending or unpacking fails.
    async fn upload(&self, tree: &Tree, destination: &str) -> Result<()>;

    /// Copies a file or tree out of the guest below `destination` (made if
    /// missing) as a tar stream. Entries that would leave `destination` are
    /// refused.
    ///
    /// # Errors
    /// When reading, sending or unpacking fails.
    async fn download(&self, source: &str, destination: &Path) -> Result<()>;

    /// Waits until the guest has booted again: its boot id differs from
    /// `boot_id` and it answers.
    ///
    /// # Errors
    /// [`crate::Code::Unreachable`] after `deadline`.
    async fn wait_for_new_boot(&self, boot_id: &str, deadline: Duration) -> Result<()>;

    /// How others may reach it; `None` where nobody else can.
    fn ssh_access(&self) -> Option<SshAccess>;
}

/// Ways of using a guest that need no more than its trait.
#[async_trait]
pub trait GuestExt: Guest {
    /// Runs a command and collects what it prints.
    async fn output(&self, command: &Command) -> Result<Output>;
    /// Writes a small file with exactly `mode`, by way of standard input, so
    /// that its bytes never show on a command line; parents are made.
    async fn write(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<()>;
    /// The kernel's boot id.
    async fn boot_id(&self) -> Result<String>;
}

#[async_trait]
impl<G: Guest + ?Sized> GuestExt for G {
    async fn output(&self, command: &Command) -> Result<Output> {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let exit = self
            .execute(command, &mut |stream, line| {
                let into = if stream == Stream::Stdout { &mut stdout } else { &mut stderr };
                into.push_str(line);
                into.push('\n');
            })
            .await?;
        Ok(Output { exit, stdout, stderr })
    }

    async fn write(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let path_ = quote(path);
        let line = format!("umask 077 && mkdir -p \"$(dirname {path_})\" && cat > {path_} && chmod {mode:o} {path_}");
        let output = self.output(&Command::new(line).stdin(bytes)).await?;
        if output.exit.success() {
            Ok(())
        } else {
            Err(crate::Error::new(crate::Code::Failed, format!("cannot write {path} in the guest ({})", output.exit)).detail(output.stderr))
        }
    }

    async fn boot_id(&self) -> Result<String> {
        let output = self.output(&Command::new("cat /proc/sys/kernel/random/boot_id")).await?;
        Ok(output.stdout.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn quoting_survives_a_real_shell() {
        for value in ["", "plain", "two words", "it's", "$(rm -rf /)", "a\nb", "ü;|&"] {
            let output = std::process::Command::new("sh").arg("-c").arg(format!("printf %s {}", quote(value))).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), value);
        }
    }
}
