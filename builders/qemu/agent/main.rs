//! kiln's agent in the guest: runs commands over a virtio-serial port, and makes
//! the guest stand still before a checkpoint and a fresh one after it.
//!
//! It exists because a connection over the network does not survive a
//! checkpoint, and because somebody has to act in a resumed guest before
//! anything else runs there: it is the one process that is not frozen. It is
//! started by kiln over SSH as `kiln-agent PORT NONCE`, goes on without its
//! file, and ends with the guest, so that nothing of it is in the image.

mod groups;
#[allow(dead_code, reason = "the host's half is used there")]
mod protocol;
mod system;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use groups::Group;
use protocol::{HEAD, Kind, Nonce, Refresh};

/// How long output may stay away after a command has ended: what it has started
/// may hold its output open for ever, and what it wrote itself is there.
const AFTER_EXIT: Duration = Duration::from_secs(5);

/// How long to wait before asking again whether there is a host.
const NO_HOST: Duration = Duration::from_millis(20);

fn main() -> std::process::ExitCode {
    let done = match &std::env::args().skip(1).collect::<Vec<_>>()[..] {
        [port, nonce] => start(port, nonce),
        _ => Err(io::Error::other("usage: kiln-agent PORT NONCE")),
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "kiln-agent: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Whatever can fail does so before the agent takes leave of its caller. `-` is
/// its standard input, in the caller's process: so it is tested.
fn start(port: &str, nonce: &str) -> io::Result<()> {
    let nonce = parse(nonce).ok_or_else(|| io::Error::other("the nonce is not 32 hexadecimal digits"))?;
    let file = if port == "-" {
        File::from(io::stdin().as_fd().try_clone_to_owned()?)
    } else {
        let path = find(port)?;
        let file = File::options().read(true).write(true).open(&path);
        let file = file.map_err(|error| io::Error::new(error.kind(), format!("cannot open {path}: {error}")))?;
        let _ = std::env::current_exe().and_then(fs::remove_file);
        system::leave()?;
        // Without, commands run and no checkpoint holds memory: freezing says why.
        let _ = groups::enter();
        file
    };
    serve(&Arc::new(Port { file, writing: Mutex::new(()) }), &nonce)
}

/// The device of the port called `name` (Linux: drivers/char/virtio_console.c).
fn find(name: &str) -> io::Result<String> {
    const PORTS: &str = "/sys/class/virtio-ports";
    let missing = |_| io::Error::other(format!("this guest has no {PORTS}: its kernel lacks virtio_console"));
    for entry in fs::read_dir(PORTS).map_err(missing)? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim() == name) {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(io::Error::other(format!("there is no port {name} below {PORTS}")))
}

fn parse(hex: &str) -> Option<Nonce> {
    let mut nonce = Nonce::default();
    (hex.len() == 32 && hex.is_ascii()).then_some(())?;
    for (at, byte) in nonce.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(at * 2..at * 2 + 2)?, 16).ok()?;
    }
    Some(nonce)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Port {
    file: File,
    writing: Mutex<()>,
}

impl Port {
    /// Waits for bytes; no host is no end.
    fn read(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < buffer.len() {
            match (&self.file).read(&mut buffer[at..]) {
                Ok(0) => std::thread::sleep(NO_HOST),
                Ok(read) => at += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A host that is gone takes nothing, and nobody could be told.
    fn send(&self, kind: Kind, channel: u32, payload: &[u8]) {
        let _writing = lock(&self.writing);
        let _ = (&self.file).write_all(&protocol::frame(kind, channel, payload));
    }

    fn reply(&self, channel: u32, done: io::Result<()>) {
        match done {
            Ok(()) => self.send(Kind::Answer, channel, &[]),
            Err(error) => self.send(Kind::Failed, channel, error.to_string().as_bytes()),
        }
    }

    /// Drops what comes before the nonce, and says it too.
    fn greet(&self, nonce: &Nonce) -> io::Result<()> {
        let mut seen = Nonce::default();
        self.read(&mut seen)?;
        while seen != *nonce {
            seen.rotate_left(1);
            self.read(&mut seen[15..])?;
        }
        let _writing = lock(&self.writing);
        (&self.file).write_all(nonce)
    }
}

/// Does what the host asks for, one request after the other; commands run
/// beside it.
fn serve(port: &Arc<Port>, nonce: &Nonce) -> io::Result<()> {
    port.greet(nonce)?;
    let mut running: BTreeMap<u32, Running> = BTreeMap::new();
    loop {
        let mut head = [0; HEAD];
        port.read(&mut head)?;
        let (kind, channel, length) = protocol::head(&head).ok_or_else(|| io::Error::other("what the host says is no frame"))?;
        let mut payload = vec![0; length];
        port.read(&mut payload)?;
        match kind {
            Kind::Execute => {
                running.retain(|_, running| !running.ended());
                match Running::start(port, channel, &String::from_utf8_lossy(&payload)) {
                    Ok(started) => drop(running.insert(channel, started)),
                    Err(error) => port.reply(channel, Err(error)),
                }
            }
            Kind::Stdin => {
                if let Some(running) = running.get(&channel) {
                    running.give(payload);
                }
            }
            Kind::StdinEnd => {
                if let Some(running) = running.get_mut(&channel) {
                    running.input = None;
                }
            }
            Kind::Kill => {
                if let Some(running) = running.get(&channel) {
                    running.kill();
                }
            }
            Kind::Quiesce => port.reply(channel, groups::freeze().map(|()| system::sync_all())),
            Kind::Thaw => port.reply(channel, groups::thaw()),
            Kind::Refresh => {
                let refresh = Refresh::read(&payload).ok_or_else(|| io::Error::other("what the host says is too short"));
                port.reply(channel, refresh.and_then(|refresh| make_fresh(&refresh)));
            }
            Kind::Stdout | Kind::Stderr | Kind::Taken | Kind::Exit | Kind::Answer | Kind::Failed => {}
        }
    }
}

/// Makes a resumed guest another one than its siblings, and only then lets its
/// processes go on.
fn make_fresh(refresh: &Refresh) -> io::Result<()> {
    let trying = |what: &str, done: io::Result<()>| done.map_err(|error| io::Error::new(error.kind(), format!("cannot {what}: {error}")));
    trying("add entropy", system::add_entropy(&refresh.seed))?;
    trying("reseed the kernel's generator", system::reseed())?;
    trying("set the clock", system::set_clock(refresh.now))?;
    for (path, mode, bytes) in &refresh.files {
        trying(&format!("write {path}"), write(Path::new(path), *mode, bytes))?;
    }
    // sshd reads its keys again as soon as it can run.
    let sshd = fs::read_to_string("/run/sshd.pid").ok().and_then(|pid| pid.trim().parse().ok());
    if let Some(pid) = sshd {
        system::send_signal(pid, system::SIGHUP);
    }
    trying("wake the processes", groups::thaw())
}

/// Writes a file, whole or not at all.
fn write(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("kiln-new");
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let _ = fs::remove_file(&new);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    fs::rename(&new, path)
}

/// A command that runs.
struct Running {
    group: Arc<Group>,
    leader: i32,
    input: Option<mpsc::Sender<Vec<u8>>>,
    ended: Arc<Mutex<bool>>,
}

impl Running {
    fn start(port: &Arc<Port>, channel: u32, line: &str) -> io::Result<Self> {
        let group = Arc::new(Group::new(channel));
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(line).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        environment(&mut command);
        system::set_apart(&mut command, group.door());
        let mut child = command.spawn()?;
        let leader = i32::try_from(child.id()).map_err(io::Error::other)?;
        let (input, received) = mpsc::channel::<Vec<u8>>();
        let output =
            Arc::new(Output { port: port.clone(), channel, open: Mutex::new(2), changed: Condvar::new(), told: Mutex::new(false) });
        if let Some(mut stdin) = child.stdin.take() {
            let port = port.clone();
            std::thread::spawn(move || {
                let mut taking = true;
                for bytes in received {
                    // A command need not read its input.
                    taking = taking && stdin.write_all(&bytes).is_ok();
                    port.send(Kind::Taken, channel, &u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
                }
            });
        }
        output.follow(Kind::Stdout, child.stdout.take());
        output.follow(Kind::Stderr, child.stderr.take());
        let ended = Arc::new(Mutex::new(false));
        let running = Self { group: group.clone(), leader, input: Some(input), ended: ended.clone() };
        std::thread::spawn(move || {
            let status = await_end(&mut child, &ended);
            output.finish(status);
            drop(group);
        });
        Ok(running)
    }

    fn give(&self, bytes: Vec<u8>) {
        if let Some(input) = &self.input {
            let _ = input.send(bytes);
        }
    }

    fn ended(&self) -> bool {
        *lock(&self.ended)
    }

    fn kill(&self) {
        self.group.kill();
        // Held, so that the number cannot be another process's by now.
        let ended = lock(&self.ended);
        if !*ended {
            system::send_signal(-self.leader, system::SIGKILL);
        }
    }
}

/// Waits for a command's end. Its number is its own until `ended` says so.
fn await_end(child: &mut Child, ended: &Mutex<bool>) -> Option<ExitStatus> {
    system::await_exit(child.id());
    let mut ended = lock(ended);
    *ended = true;
    child.wait().ok()
}

/// What a command prints.
struct Output {
    port: Arc<Port>,
    channel: u32,
    /// How many of its streams are open.
    open: Mutex<u32>,
    changed: Condvar,
    /// Whether its end was told, which is the last word.
    told: Mutex<bool>,
}

impl Output {
    /// Sends what a stream gives. What a daemon writes into it after the
    /// command's end is read, so that it does not stall, and dropped.
    fn follow(self: &Arc<Self>, kind: Kind, stream: Option<impl Read + Send + 'static>) {
        let output = self.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 15];
            if let Some(mut stream) = stream {
                loop {
                    match stream.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(read) => {
                            let told = lock(&output.told);
                            if !*told {
                                output.port.send(kind, output.channel, &buffer[..read]);
                            }
                        }
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
            }
            *lock(&output.open) -= 1;
            output.changed.notify_all();
        });
    }

    /// Tells the command's end once its streams have ended too.
    fn finish(&self, status: Option<ExitStatus>) {
        let waited = self.changed.wait_timeout_while(lock(&self.open), AFTER_EXIT, |open| *open > 0);
        drop(waited);
        let mut told = lock(&self.told);
        *told = true;
        let number = |value: i32| u32::try_from(value).unwrap_or(u32::MAX);
        let payload = match status.map(|status| (status.code(), status.signal())) {
            Some((Some(code), _)) => protocol::pair(0, number(code)),
            Some((_, Some(signal))) => protocol::pair(1, number(signal)),
            _ => protocol::pair(0, u32::MAX),
        };
        self.port.send(Kind::Exit, self.channel, &payload);
    }
}

/// Gives a command what a login would: what this one had, and what
/// /etc/environment says by now (pam_env(8)).
fn environment(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let name_ = name.to_string_lossy();
        if name_.starts_with("SSH_") || name_.starts_with("XDG_") || matches!(&*name_, "OLDPWD" | "SHLVL" | "_") {
            command.env_remove(name);
        }
    }
    let text = fs::read_to_string("/etc/environment").unwrap_or_default();
    for line in text.lines().map(str::trim) {
        let line = line.strip_prefix("export ").unwrap_or(line);
        let Some((name, value)) = line.split_once('=') else { continue };
        let quoted = |mark: char| value.strip_prefix(mark).and_then(|value| value.strip_suffix(mark));
        if !name.is_empty() && !name.starts_with('#') {
            command.env(name, quoted('"').or_else(|| quoted('\'')).unwrap_or(value));
        }
    }
    if let Some(home) = std::env::var_os("HOME").filter(|home| Path::new(home).is_dir()) {
        command.current_dir(home);
    }
}
