//! `from = "here"`: Ansible of this machine, over the bake's own connection.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kiln_model::event::Stream;
use kiln_model::guest::{GuestExt as _, OnLine, SshAccess, quote};
use kiln_model::key::KeyHasher;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_process::{self as process, Child, describe};

use super::layout::{EVENTS, MEMORY, in_memory};
use super::said::{Events, NOTHING};
use super::sources::PROJECT;
use super::{Play, sources};
use crate::configuration::{Presence, Settings, TIDYING, not_converged};
use crate::shell::{LOOK, nonce};

/// How long the first connection may take: a guest under emulation is slow.
const CONNECTING: Duration = Duration::from_secs(120);
/// Lines of an error that no task is to blame for.
const TAIL: usize = 20;
/// The socket that all of Ansible's connections go through. Relative to the
/// working directory, since a socket's path must be short.
const SOCKET: &str = "../socket";
/// Kills what the connection that it comes through has left running.
const KILL: &str = r#"for p in /proc/[0-9]*; do
  n=${p#/proc/}; [ $n = $$ ] || ! grep -qzxF "SSH_CONNECTION=$SSH_CONNECTION" $p/environ 2> /dev/null || kill -KILL $n
done"#;

/// Ansible on this machine.
pub(super) struct Here {
    pub(super) play: Play,
    pub(super) settings: Settings,
}

/// The folder of one run; gone when it is dropped.
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn make(work: &Path, nonce: &str) -> Result<Self> {
        let path = work.join(format!("ansible-{nonce}"));
        let make = |path: &Path| std::fs::DirBuilder::new().mode(0o700).create(path).trying(|| format!("make {}", path.display()));
        make(&path)?;
        let folder = Self { path };
        for name in ["home", "tmp", "inventory", "callbacks"] {
            make(&folder.path.join(name))?;
        }
        Ok(folder)
    }

    /// Writes a file that nobody else can read.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let write = || {
            let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            std::io::Write::write_all(&mut file, bytes)
        };
        write().trying(|| format!("write {}", path.display()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// What a run works with.
struct Run<'a> {
    step: &'a Step<'a>,
    folder: &'a Folder,
    access: SshAccess,
}

#[async_trait]
impl Provisioner for Here {
    fn kind(&self) -> &'static str {
        "ansible"
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        self.settings.key(hasher);
        if self.settings.bootstrap {
            python().key(hasher);
        }
        hasher.field("from", "here");
        self.play.key(hasher)
    }

    fn converges(&self) -> bool {
        self.settings.converge
    }

    fn secrets(&self) -> Vec<&str> {
        self.play.secrets()
    }

    async fn ready(&self) -> Result<()> {
        if process::find("ansible-playbook").is_some() {
            return Ok(());
        }
        Err(Error::new(Code::Missing, "the program `ansible-playbook` is missing on this machine")
            .next("apt-get install ansible-core, or pipx install ansible-core; `from = \"guest\"` needs none here"))
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        let Some(access) = step.guest.ssh_access() else {
            let what = "Ansible of this machine needs SSH, which this guest is not reached by";
            let error = Error::new(Code::Usage, what).step(&step.common.name);
            return Err(error.next("write from = \"guest\""));
        };
        let nonce = nonce();
        let folder = Folder::make(step.work, &nonce)?;
        let memory = format!("{MEMORY}/kiln-ansible-{nonce}");
        let done = self.all(&Run { step, folder: &folder, access }, &memory).await;
        let line = format!("rm -rf {memory}");
        let tidied = step.guest.output(&kiln_model::guest::Command::new(line).timeout(TIDYING)).await;
        done?;
        tidied.map(drop)
    }
}

/// What Ansible needs in the guest: Python, and apt's module for it, which it
/// would otherwise install by itself and leave there.
fn python() -> Presence {
    let packages = ["python3", "python3-apt"].map(Into::into).into();
    Presence { programs: Vec::new(), packages, install: String::new(), remains: Vec::new() }
}

impl Here {
    async fn all(&self, run: &Run<'_>, memory: &str) -> Result<()> {
        let step = run.step;
        let python3 = self.python3(step).await?;
        let mut connection = in_memory(memory);
        let key = run.access.key_file.display().to_string();
        for (name, value) in [
            ("ansible_host", run.access.host.as_str().into()),
            ("ansible_port", run.access.port.into()),
            ("ansible_user", run.access.user.as_str().into()),
            ("ansible_ssh_private_key_file", key.into()),
            ("ansible_python_interpreter", python3.into()),
        ] {
            connection.insert(name.to_owned(), value);
        }
        self.fill(run, &connection.into())?;
        let socket = run.connect().await?;
        self.play(run, socket.as_ref(), false).await?;
        if self.settings.converge {
            step.reports.note(format!("step `{}`: asking ansible what a second run would change", step.common.name));
            let events = self.play(run, socket.as_ref(), true).await?;
            if let Some(error) = not_converged("ansible", &events.changes()) {
                return Err(error.step(&step.common.name));
            }
        }
        if self.settings.bootstrap && !self.settings.keep {
            python().take_away(step).await?;
        }
        Ok(())
    }

    /// Where Python is in the guest; brought there if need be.
    async fn python3(&self, step: &Step<'_>) -> Result<String> {
        let ask = |line: &str| kiln_model::guest::Command::new(line);
        if self.settings.bootstrap {
            let complete = "command -v python3 > /dev/null && { ! command -v apt-get > /dev/null || python3 -c 'import apt'; }";
            if !step.guest.output(&ask(complete)).await?.exit.success() {
                python().bring(step).await?;
            }
        }
        let found = step.guest.output(&ask("command -v python3")).await?;
        if found.exit.success() {
            return Ok(found.stdout.trim().to_owned());
        }
        let error = Error::new(Code::Step, "Ansible needs python3 in the guest, and there is none").step(&step.common.name);
        Err(error.next("write `bootstrap = true`, or install python3 in a step before"))
    }

    /// Puts everything that Ansible is given into the run's folder.
    fn fill(&self, run: &Run<'_>, connection: &serde_json::Value) -> Result<()> {
        let Run { step, folder, access } = run;
        for input in &self.play.inputs {
            sources::copy(&sources::walk(&input.from)?, &folder.path.join(&input.to))?;
        }
        for (name, bytes) in self.play.files(step, connection)? {
            folder.write(&name, &bytes)?;
        }
        if let Some(name) = &self.play.vault_password {
            folder.write("vault", self.play.secret(step, name)?.as_bytes())?;
        }
        let known = std::fs::read(&access.known_hosts).trying(|| format!("read {}", access.known_hosts.display()))?;
        folder.write("known_hosts", &known)?;
        EVENTS.iter().try_for_each(|name| folder.write(name, b""))
    }

    /// One run of the playbook, to its end.
    async fn play(&self, run: &Run<'_>, socket: Option<&Child>, check: bool) -> Result<Events> {
        let Run { step, folder, .. } = run;
        let root = folder.path.display().to_string();
        let mut command = run.command("ansible-playbook");
        command.args(self.play.arguments(&root, check)).envs(&step.common.env).envs(self.play.environment(&root, check));
        command.env("ANSIBLE_HOST_KEY_CHECKING", "1").env("ANSIBLE_SSH_TRANSFER_METHOD", "piped");
        let options: Vec<String> = run.options().iter().map(|option| quote(option)).collect();
        command.env("ANSIBLE_SSH_ARGS", options.join(" ")).env("ANSIBLE_SSH_EXECUTABLE", "ssh");
        if self.play.vault_password.is_some() {
            command.env("ANSIBLE_VAULT_PASSWORD_FILE", folder.path.join("vault"));
        }
        if let Some(user) = &step.common.user {
            command.env("ANSIBLE_BECOME", "1").env("ANSIBLE_BECOME_METHOD", "sudo").env("ANSIBLE_BECOME_USER", user);
        }
        let mut tail: Vec<String> = Vec::new();
        let mut see = |stream, line: &str| {
            step.reports.output(&step.common.name, stream, line);
            if tail.len() == TAIL {
                tail.remove(0);
            }
            tail.push(line.to_owned());
        };
        let running = lines(command, &mut see);
        let status = match step.common.timeout {
            None => running.await?,
            Some(limit) => match tokio::time::timeout(limit, running).await {
                Ok(status) => status?,
                Err(_) => {
                    run.kill_there(socket).await;
                    let error = Error::new(Code::Timeout, format!("ansible took over {limit:?} and was killed"));
                    return Err(error.step(&step.common.name).next("raise its `timeout`"));
                }
            },
        };
        let path = folder.path.join(EVENTS[usize::from(check)]);
        let text = std::fs::read_to_string(&path).trying(|| format!("read {}", path.display()))?;
        let events = Events::read(text.lines())?;
        if status.success() && !events.is_empty() {
            return Ok(events);
        }
        Err(self.failure(run, &events, (!status.success()).then(|| describe(status)), &tail, check))
    }

    fn failure(&self, run: &Run<'_>, events: &Events, how: Option<String>, tail: &[String], check: bool) -> Error {
        let name = &run.step.common.name;
        let run_ = if check { "the second run of ansible, in check mode" } else { "ansible" };
        let Some(how) = how else {
            let groups = if self.play.groups.is_empty() { "no group".to_owned() } else { self.play.groups.join(", ") };
            let error = Error::new(Code::Step, format!("{run_}: {NOTHING}")).step(name);
            return error
                .detail(format!("the guest is `{}`, in {groups}", self.play.host))
                .next("write `groups`, or `hosts: all` in the play");
        };
        let (message, detail) = match events.failed() {
            Some((message, printed)) => (message, printed),
            None => {
                let said = tail.iter().find_map(|line| line.strip_prefix("ERROR! "));
                let detail = (!tail.is_empty()).then(|| tail.join("\n"));
                (said.map_or_else(|| format!("ansible-playbook failed ({how})"), Into::into), detail)
            }
        };
        let error = Error::new(Code::Step, format!("{run_}: {message}")).step(name);
        let error = detail.into_iter().fold(error, Error::detail);
        if check {
            error.next("`check_mode: false` lets a task that only looks run then, too; `converge = \"no\"` asks for no proof")
        } else {
            error.next(LOOK)
        }
    }
}

impl Run<'_> {
    /// A program that sees nothing of the user's: no settings, no agent, no
    /// variables. `PATH` says where programs are, and Python's modules of a user
    /// are where they would be.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.folder.path.join(PROJECT)).env_clear().stdin(Stdio::null());
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        if let Some(home) = std::env::var_os("HOME") {
            command.env("PYTHONUSERBASE", Path::new(&home).join(".local"));
        }
        command
    }

    /// What every `ssh` is called with. The host key is the one that this bake
    /// gave to the guest.
    fn options(&self) -> Vec<String> {
        let mut options: Vec<String> = ["-F", "none"].map(Into::into).into();
        for option in [
            "ControlMaster=no",
            &format!("ControlPath={SOCKET}"),
            "StrictHostKeyChecking=yes",
            "GlobalKnownHostsFile=/dev/null",
            "UserKnownHostsFile=../known_hosts",
            "UpdateHostKeys=no",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
            "ConnectTimeout=60",
            "LogLevel=ERROR",
        ] {
            options.extend(["-o".to_owned(), option.to_owned()]);
        }
        options
    }

    fn ssh(&self, more: &[&str]) -> Command {
        let SshAccess { host, port, user, key_file, .. } = &self.access;
        let mut command = self.command("ssh");
        command.args(more).args(self.options()).arg("-i").arg(key_file).args(["-p", &port.to_string(), &format!("{user}@{host}")]);
        command
    }

    /// The one connection that all tasks share, since a handshake takes seconds
    /// under emulation. It is a process of kiln's, and ends with the run.
    async fn connect(&self) -> Result<Option<Child>> {
        let mut command = self.ssh(&["-N", "-o", "ControlMaster=yes"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let child = process::spawn(command, "ssh", Vec::new())?;
        let (socket, end) = (self.folder.path.join(PROJECT).join(SOCKET), Instant::now() + CONNECTING);
        while !socket.exists() {
            if let Some(status) = child.status() {
                let error = Error::new(Code::Unreachable, format!("ssh did not reach the guest ({})", describe(status)));
                return Err(error.detail(child.stderr_tail()).step(&self.step.common.name));
            }
            // Without it every task connects by itself.
            if Instant::now() > end {
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Some(child))
    }

    /// Ends what Ansible has left running in the guest when it was killed.
    async fn kill_there(&self, socket: Option<&Child>) {
        if socket.is_some() {
            let mut command = self.ssh(&[]);
            command.arg(KILL);
            let _ = tokio::time::timeout(TIDYING, process::run_to_end(command)).await;
        }
    }
}

/// Runs a program and gives each line it prints as it comes; it ends when the
/// future is dropped.
async fn lines(mut command: Command, see: OnLine<'_>) -> Result<std::process::ExitStatus> {
    let pipes = || std::io::pipe().trying(|| "make a pipe for ansible-playbook".into());
    let ((out, child_out), (err, child_err)) = (pipes()?, pipes()?);
    command.stdout(child_out).stderr(child_err);
    let child = process::spawn(command, "ansible-playbook", Vec::new())?;
    let (send, mut received) = tokio::sync::mpsc::channel::<(Stream, String)>(64);
    for (stream, pipe) in [(Stream::Stdout, out), (Stream::Stderr, err)] {
        let send = send.clone();
        tokio::task::spawn_blocking(move || {
            let mut reader = BufReader::new(pipe);
            let mut line = Vec::new();
            while let Ok(1..) = reader.read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
                if send.blocking_send((stream, text)).is_err() {
                    break;
                }
                line.clear();
            }
        });
    }
    drop(send);
    while let Some((stream, line)) = received.recv().await {
        see(stream, &line);
    }
    Ok(child.ended().await)
}
