//! A QEMU process, from its start to its end.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_model::cleanup::{Scope, Ticket};
use kiln_model::secret::Redactor;
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_process::{self as process, Child};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use crate::agent::Port;
use crate::command::{self, Descriptors, Shape};
use crate::console::{Console, PANIC};
use crate::qmp::{Event, Qmp};
use crate::screenshot;

/// How long QEMU may take to write what it holds and leave.
const CLOSING: Duration = Duration::from_secs(120);

/// How long writing or reading a machine's state may take: gigabytes on a slow
/// disk.
const MIGRATING: Duration = Duration::from_secs(600);

/// How long QEMU may take to put away what a migration took.
const FINISHING: Duration = Duration::from_secs(60);

/// QEMU's limit of a migration's speed, in bytes per second: none.
const UNLIMITED: u64 = 1 << 40;

/// What QEMU calls the file of that state.
const STATE: &str = "state";

/// How long a screenshot may take, of a QEMU that may be in trouble.
const PICTURE: Duration = Duration::from_secs(10);

/// How many lines of the console an error shows.
const CONSOLE_LINES: usize = 30;

/// How many lines of the firmware's messages: it has much to say, and the last
/// words are those that count.
const FIRMWARE_LINES: usize = 8;

/// How a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest powered off.
    PoweredOff,
    /// The guest's kernel panicked.
    Panicked,
    /// It printed that it will get no further; what that means.
    Hopeless(&'static str),
    /// This machine's disk is full: the guest could not write.
    DiskFull,
    /// The guest's disk could not be read or written.
    DiskFailed,
    /// QEMU ended.
    Died(ExitStatus),
}

/// A running QEMU.
pub(crate) struct Vm {
    child: Child,
    ticket: Ticket,
    scope: Arc<Scope>,
    pub(crate) qmp: Qmp,
    console: Console,
    firmware: Console,
    end: watch::Receiver<Option<End>>,
    /// Status of the newest migration, as its events tell.
    migration: watch::Receiver<String>,
    agent: Mutex<Option<Port>>,
    redactor: Redactor,
    diagnostics: PathBuf,
    name: String,
}

/// What a machine needs of its bake.
pub(crate) struct Surroundings {
    pub(crate) scope: Arc<Scope>,
    pub(crate) redactor: Redactor,
    /// Where screenshots go.
    pub(crate) diagnostics: PathBuf,
    /// What their names begin with.
    pub(crate) name: String,
}

impl Vm {
    /// Starts QEMU with `shape`, whose descriptors are filled in here.
    ///
    /// # Errors
    /// When it does not start; with its own words.
    pub(crate) async fn start(mut shape: Shape<'_>, around: Surroundings) -> Result<Self> {
        match Self::launch(&shape, &around).await {
            // A QEMU that was built without seccomp knows no sandbox.
            Err(error) if error.details().iter().any(|words| words.contains("sandbox")) => {
                shape.sandbox = false;
                Self::launch(&shape, &around).await
            }
            result => result,
        }
        .map_err(|error| taken_port(error, &shape))
    }

    async fn launch(shape: &Shape<'_>, around: &Surroundings) -> Result<Self> {
        let pair = || UnixStream::pair().trying(|| "make a connection to QEMU".into());
        let ((qmp, qmp_end), (serial, serial_end), (firmware, firmware_end)) = (pair()?, pair()?, pair()?);
        let (agent, agent_end) = pair()?;
        let [qmp_end, serial_end, firmware_end, agent_end] = [qmp_end, serial_end, firmware_end, agent_end].map(OwnedFd::from);
        let descriptors = Descriptors {
            qmp: qmp_end.as_raw_fd(),
            serial: serial_end.as_raw_fd(),
            firmware: firmware_end.as_raw_fd(),
            agent: agent_end.as_raw_fd(),
        };
        let inherit = vec![qmp_end, serial_end, firmware_end, agent_end];
        let mut command = Command::new(&shape.settings.binary);
        command.args(command::arguments(&Shape { descriptors, ..*shape }));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let (child, ticket) = process::spawn_registered(&around.scope, command, "QEMU", inherit)?;
        let (console, firmware) = (Console::read(serial)?, Console::read(firmware)?);
        let (qmp, events) = match Qmp::connect(qmp).await {
            Ok(connected) => connected,
            Err(error) => {
                // It closed the connection, so that it is about to end by itself.
                let status = tokio::time::timeout(Duration::from_secs(10), child.ended()).await;
                around.scope.undo(ticket).await?;
                return Err(status.map_or(error, |status| child.failure(status)));
            }
        };
        let (tell, end) = watch::channel(None);
        let (tell_migration, migration) = watch::channel(String::new());
        let (tell_closing, closings) = watch::channel(0);
        let tell = Tell { end: tell, migration: tell_migration, closing: tell_closing };
        tokio::spawn(watch_over(events, child.clone(), console.clone(), firmware.clone(), tell));
        let Surroundings { scope, redactor, diagnostics, name } = around;
        Ok(Self {
            child,
            ticket,
            scope: scope.clone(),
            qmp,
            console,
            firmware,
            end,
            migration,
            agent: Mutex::new(Some(Port { stream: agent, closings })),
            redactor: redactor.clone(),
            diagnostics: diagnostics.clone(),
            name: name.clone(),
        })
    }

    /// Waits until the machine has ended, and tells how.
    pub(crate) async fn end(&self) -> End {
        let mut end = self.end.clone();
        let told = end.wait_for(Option::is_some).await.ok().and_then(|end| *end);
        match told {
            Some(end) => end,
            None => End::Died(self.child.ended().await),
        }
    }

    /// The error for an end that nobody asked for.
    pub(crate) async fn unexpected(&self, end: End) -> Error {
        let error = match end {
            End::PoweredOff => Error::new(Code::MachineEnded, "the guest powered itself off")
                .next("a step must not shut the machine down; restart it with the provisioner `reboot`"),
            End::Panicked => Error::new(Code::MachineEnded, "the guest's kernel panicked"),
            End::Hopeless(meaning) => Error::new(Code::MachineEnded, format!("the machine cannot go on: {meaning}")),
            End::DiskFull => Error::new(Code::DiskFull, "the guest could not write to its disk")
                .because(std::io::Error::from(std::io::ErrorKind::StorageFull)),
            End::DiskFailed => {
                Error::new(Code::MachineEnded, "the guest's disk could not be read or written").next("see this machine's kernel log")
            }
            End::Died(status) => {
                let error = Error::new(Code::MachineEnded, format!("QEMU ended unexpectedly ({})", process::describe(status)));
                match self.child.stderr_tail() {
                    words if words.is_empty() => error.next("if the kernel ended it for lack of memory, lower `memory` in [builder.qemu]"),
                    words => error.detail(format!("QEMU's last words:\n{words}")),
                }
            }
        };
        self.explain(error, !matches!(end, End::Died(_) | End::PoweredOff)).await
    }

    /// Adds the end of the console and, with `picture`, a screenshot's path.
    pub(crate) async fn explain(&self, error: Error, picture: bool) -> Error {
        let (console, firmware) = (self.console.tail(CONSOLE_LINES), self.firmware.tail(FIRMWARE_LINES));
        let error = match (console.as_str(), firmware.as_str()) {
            ("", "") => error.detail("the guest printed nothing on its serial console"),
            // A boot loader was never reached: all that is known is the firmware's.
            ("", firmware) => error.detail(format!("the end of the firmware's messages:\n{}", self.redactor.clean(firmware))),
            (console, _) => error.detail(format!("the end of the guest's serial console:\n{}", self.redactor.clean(console))),
        };
        if !picture || self.child.status().is_some() {
            return error;
        }
        match tokio::time::timeout(PICTURE, screenshot::take(&self.qmp, &self.diagnostics, &self.name)).await {
            Ok(Ok(path)) => error.detail(format!("screenshot: {}", path.display())),
            _ => error,
        }
    }

    /// Bytes of this machine's memory that QEMU has in use, those of the guest
    /// above all.
    pub(crate) fn resident(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.child.pid())).unwrap_or_default();
        let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or_default();
        pages * rustix::param::page_size() as u64
    }

    /// The host's end of the agent's port; once.
    pub(crate) fn take_agent(&self) -> Option<Port> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Lets no processor of the guest run.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub(crate) async fn pause(&self) -> Result<()> {
        self.qmp.execute("stop", Value::Null).await.map(|_| ())
    }

    /// Lets them run again.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub(crate) async fn go_on(&self) -> Result<()> {
        self.qmp.execute("cont", Value::Null).await.map(|_| ())
    }

    /// Puts the empty layer at `path` on the disk of a paused machine. What was
    /// the top is whole in its file then, and is never written to again.
    ///
    /// # Errors
    /// When QEMU cannot open or use it.
    pub(crate) async fn freeze_disk(&self, layer: usize, path: &Path) -> Result<()> {
        let mut node = command::layer_node(layer, path, false);
        node["backing"] = Value::Null;
        self.qmp.execute("blockdev-add", node).await?;
        let arguments = json!({ "node": command::layer_name(layer - 1), "overlay": command::layer_name(layer) });
        self.qmp.execute("blockdev-snapshot", arguments).await.map(|_| ())
    }

    /// Writes the state of a paused machine, its memory and its devices, to
    /// `file`. Pages of zeros take no room in it.
    ///
    /// # Errors
    /// When QEMU cannot write it.
    pub(crate) async fn save_state(&self, file: OwnedFd) -> Result<()> {
        self.prepare_migration().await?;
        self.qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": UNLIMITED })).await?;
        self.qmp.pass(STATE, file).await?;
        self.migrate("migrate", json!({ "uri": format!("fd:{STATE}") })).await.trying(|| "save the machine's state".into())
    }

    /// Reads the state that [`Vm::save_state`] wrote, of a machine that was
    /// started for it. It stays paused.
    ///
    /// # Errors
    /// When QEMU cannot use it.
    pub(crate) async fn load_state(&self, file: OwnedFd) -> Result<()> {
        self.prepare_migration().await?;
        self.qmp.pass(STATE, file).await?;
        self.migrate("migrate-incoming", json!({ "uri": format!("fd:{STATE}") })).await.trying(|| "load the machine's state".into())
    }

    /// Has events tell how a migration goes.
    async fn prepare_migration(&self) -> Result<()> {
        let capabilities = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.qmp.execute("migrate-set-capabilities", capabilities).await.map(|_| ())
    }

    /// Begins a migration and waits for its end.
    async fn migrate(&self, command: &str, arguments: Value) -> Result<()> {
        let mut migration = self.migration.clone();
        migration.mark_unchanged();
        self.qmp.execute(command, arguments).await?;
        let ended = async {
            // What an earlier one ended with counts for nothing.
            while migration.changed().await.is_ok() {
                let status = migration.borrow_and_update().clone();
                if matches!(status.as_str(), "completed" | "failed" | "cancelled") {
                    return status;
                }
            }
            "ended with QEMU".to_owned()
        };
        let status = match tokio::time::timeout(MIGRATING, ended).await {
            Ok(status) if status == "completed" => return self.finish_migration().await,
            Ok(status) => status,
            Err(_) => format!("took over {} s", MIGRATING.as_secs()),
        };
        Err(Error::new(Code::Failed, format!("QEMU's migration {status}")).detail(self.child.stderr_tail()))
    }

    /// Waits until QEMU has put away what a migration took: it tells of the end
    /// before, and until then refuses to go on. No event tells of this.
    async fn finish_migration(&self) -> Result<()> {
        const PAUSE: Duration = Duration::from_millis(2);
        let end = tokio::time::Instant::now() + FINISHING;
        loop {
            let answer = self.qmp.execute("query-status", Value::Null).await?;
            match answer["status"].as_str().unwrap_or_default() {
                "finish-migrate" | "inmigrate" if tokio::time::Instant::now() < end => tokio::time::sleep(PAUSE).await,
                "finish-migrate" | "inmigrate" => {
                    return Err(Error::new(Code::Timeout, format!("QEMU's migration did not end within {} s", FINISHING.as_secs())));
                }
                _ => return Ok(()),
            }
        }
    }

    /// Ends QEMU so that its disk is whole.
    ///
    /// # Errors
    /// When it fails or takes too long; it is gone in any case.
    pub(crate) async fn quit(self) -> Result<()> {
        // The connection may close before the answer comes.
        let asked = self.qmp.execute("quit", Value::Null).await;
        let status = match tokio::time::timeout(CLOSING, self.child.ended()).await {
            Ok(status) => status,
            Err(_) => {
                self.kill().await;
                return Err(Error::new(Code::Timeout, format!("QEMU did not close its disk within {} s", CLOSING.as_secs())));
            }
        };
        self.scope.forget(self.ticket)?;
        match asked {
            _ if status.success() => Ok(()),
            Err(error) if error.kind() != Code::MachineEnded => Err(error),
            _ => Err(self.child.failure(status)),
        }
    }

    /// Ends QEMU at once.
    pub(crate) async fn kill(self) {
        self.child.kill();
        self.child.ended().await;
        let _ = self.scope.forget(self.ticket);
    }
}

/// Where it is told what becomes of a machine.
struct Tell {
    end: watch::Sender<Option<End>>,
    migration: watch::Sender<String>,
    closing: watch::Sender<u32>,
}

/// Follows a machine until QEMU has ended; the first reason counts.
async fn watch_over(mut events: mpsc::UnboundedReceiver<Event>, child: Child, console: Console, firmware: Console, tell: Tell) {
    let first = |end| {
        tell.end.send_if_modified(|told| told.is_none() && told.replace(end).is_none());
    };
    loop {
        let told = tell.end.borrow().is_some();
        let event = tokio::select! {
            event = events.recv() => event,
            meaning = console.hopeless(), if !told => { first(hopeless(meaning)); continue }
            meaning = firmware.hopeless(), if !told => { first(hopeless(meaning)); continue }
        };
        match event {
            None => break,
            Some(event) if event.name == "MIGRATION" => {
                tell.migration.send_replace(event.data["status"].as_str().unwrap_or_default().to_owned());
            }
            // The only port whose other end tells.
            Some(event) if event.name == "VSERPORT_CHANGE" => {
                if event.data["open"] == false {
                    tell.closing.send_modify(|count| *count += 1);
                }
            }
            Some(event) => {
                if let Some(end) = meaning(&event) {
                    first(end);
                }
            }
        }
    }
    first(End::Died(child.ended().await));
}

/// A panic is the same whether pvpanic or the console tells of it: the former
/// needs a driver that a guest has not loaded yet early in its boot.
fn hopeless(meaning: &'static str) -> End {
    if meaning == PANIC { End::Panicked } else { End::Hopeless(meaning) }
}

/// What an event says about the machine's end (QEMU's `qapi/run-state.json`
/// and `qapi/block-core.json`).
fn meaning(event: &Event) -> Option<End> {
    let text = |key: &str| event.data[key].as_str().unwrap_or_default();
    match event.name.as_str() {
        "SHUTDOWN" if text("reason") == "guest-panic" => Some(End::Panicked),
        "SHUTDOWN" if event.data["guest"] == true => Some(End::PoweredOff),
        "GUEST_PANICKED" => Some(End::Panicked),
        "BLOCK_IO_ERROR" if text("action") == "stop" && event.data["nospace"] == true => Some(End::DiskFull),
        "BLOCK_IO_ERROR" if text("action") == "stop" => Some(End::DiskFailed),
        _ => None,
    }
}

/// Says which of the ports that were asked for is taken, if that was it.
fn taken_port(error: Error, shape: &Shape<'_>) -> Error {
    let words = error.details().join("\n");
    let taken = shape.ports.iter().find(|port| words.contains(&format!("'tcp:127.0.0.1:{}-:{}'", port.host, port.guest)));
    match taken {
        Some(port) => Error::new(Code::Usage, format!("port {} of this machine cannot be used", port.host))
            .detail(words)
            .next("choose another port; ports below 1024 are for root"),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_and_what_they_mean() {
        let of = |name: &str, data| meaning(&Event { name: name.into(), data });
        assert_eq!(of("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"})), Some(End::PoweredOff));
        assert_eq!(of("SHUTDOWN", json!({"guest": false, "reason": "host-qmp-quit"})), None);
        assert_eq!(of("SHUTDOWN", json!({"guest": true, "reason": "guest-panic"})), Some(End::Panicked));
        assert_eq!(of("GUEST_PANICKED", json!({"action": "pause"})), Some(End::Panicked));
        assert_eq!(of("BLOCK_IO_ERROR", json!({"action": "stop", "nospace": true})), Some(End::DiskFull));
        assert_eq!(of("BLOCK_IO_ERROR", json!({"action": "report", "nospace": false})), None);
        assert_eq!(of("RESET", json!({"guest": true})), None);
    }
}
