//! `qemu-nbd` as a child: a disk of any format as raw bytes behind a socket.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_model::base::DiskFile;
use kiln_model::cleanup::{Scope, Ticket};
use kiln_model::{Code, Error, Result, ResultExt as _};
use serde_json::json;

use crate::nbd::{self, Client};
use kiln_process::{self as process, Child};

/// How many clients may be connected at once.
const CLIENTS: u8 = 8;

/// How long the server may take to write what it holds and end.
const CLOSING: Duration = Duration::from_secs(120);

/// Whether an export may be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    Write,
}

/// A disk that is being served. Dropping it ends the server.
pub struct Export {
    child: Child,
    folder: OwnedFd,
    name: String,
    path: PathBuf,
    registered: Option<(Arc<Scope>, Ticket)>,
}

impl Export {
    /// Serves `disk` (with what it is based on) on a socket in `folder`, which
    /// must be closed to other users. The process is registered in `scope`.
    ///
    /// # Errors
    /// When `qemu-nbd` is missing or cannot open the disk.
    pub fn start(disk: &DiskFile, access: Access, folder: &Path, scope: Option<&Arc<Scope>>) -> Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let disk_path = std::path::absolute(&disk.path).trying(|| format!("find {}", disk.path.display()))?;
        if process::find("qemu-nbd").is_none() {
            // Its absence would show as a failed shell otherwise.
            process::run(Command::new("qemu-nbd"))?;
        }
        let name = format!("nbd-{:016x}", unique());
        let path = folder.join(&name);
        let held = std::fs::File::options().read(true).custom_flags(libc_o_path()).open(folder);
        let held: OwnedFd = held.trying(|| format!("open {}", folder.display()))?.into();
        // The socket exists and queues clients before the server starts, so
        // that nobody has to wait for it to appear: socket activation
        // (sd_listen_fds(3)) hands it over as descriptor 3.
        let listener = UnixListener::bind(short(&held, &name)).trying(|| format!("make the socket {}", path.display()))?;
        let source = json!({
            "driver": disk.format.name(),
            "file": { "driver": "file", "filename": disk_path.display().to_string(), "discard": "unmap" },
        });
        let mut command = Command::new("sh");
        command.args(["-c", "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd \"$@\"", "qemu-nbd"]);
        command.args(["--persistent", "--allocation-depth", &format!("--shared={CLIENTS}"), "--discard=unmap", "--cache=writeback"]);
        if access == Access::Read {
            command.arg("--read-only");
        }
        command.arg(format!("json:{source}"));
        command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null()).stderr(Stdio::piped());
        let what = format!("qemu-nbd for {}", disk.path.display());
        let spawned = match scope {
            Some(scope) => process::spawn_registered(scope, command, &what, Vec::new()).map(|(c, t)| (c, Some((scope.clone(), t)))),
            None => process::spawn(command, &what, Vec::new()).map(|child| (child, None)),
        };
        match spawned {
            Ok((child, registered)) => Ok(Self { child, folder: held, name, path, registered }),
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// Connects to it.
    ///
    /// # Errors
    /// When the server could not open the disk; with its words.
    pub fn connect(&self) -> Result<Client> {
        let stream =
            UnixStream::connect(short(&self.folder, &self.name)).map_err(|error| nbd::failed("the disk's NBD server is gone", error));
        stream.and_then(nbd::connect).map_err(|error| match self.child_ended() {
            Some(status) => self.child.failure(status),
            None => error,
        })
    }

    /// Ends the server and waits until everything is written.
    ///
    /// # Errors
    /// When the server failed, or did not end in time.
    pub fn close(mut self) -> Result<()> {
        self.child.terminate();
        let limit = Instant::now() + CLOSING;
        while self.child.status().is_none() {
            if Instant::now() > limit {
                return Err(Error::new(Code::Timeout, "the disk's NBD server did not end"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let status = self.child.wait();
        self.clean();
        // It handles SIGTERM by closing the disk and leaving well.
        if status.success() { Ok(()) } else { Err(self.child.failure(status)) }
    }

    /// How the server ended, if it has or is just about to.
    fn child_ended(&self) -> Option<std::process::ExitStatus> {
        let limit = Instant::now() + Duration::from_secs(1);
        while self.child.status().is_none() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.child.status()
    }

    fn clean(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        if let Some((scope, ticket)) = self.registered.take() {
            let _ = scope.forget(ticket);
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.child.kill();
        self.clean();
    }
}

/// The socket's name by way of its folder's descriptor: a socket's path may
/// have no more than 107 bytes (unix(7)), which `$KILN_HOME` can exceed.
fn short(folder: &OwnedFd, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

fn libc_o_path() -> i32 {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
    flags.bits().cast_signed()
}

/// A number that no other export of this machine has.
fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    u64::from(std::process::id()) << 32 | NEXT.fetch_add(1, Ordering::Relaxed)
}

impl crate::gpt::Disk for Client {
    fn size(&self) -> u64 {
        Client::size(self)
    }
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        Client::read_at(self, offset, buffer)
    }
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        Client::write_at(self, offset, bytes)
    }
}
