//! The machine while it runs, and after it has stopped.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_disk::files::DiskFiles;
use kiln_disk::overlay::OverlayDisk;
use kiln_model::base::DiskFile;
use kiln_model::block::BlockSource;
use kiln_model::checkpoint::{Checkpoint, Slot};
use kiln_model::cleanup::Scope;
use kiln_model::guest::{Command, Guest};
use kiln_model::machine::{Context, Files, Machine, Stopped};
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_ssh::SshGuest;
use serde_json::Value;

use crate::kept::Shown;
use crate::vm::{End, Vm};

/// Asks the guest to power off. The first one that is there does it; none of
/// them waits for the end, which would cut the connection.
const POWER_OFF: &str = "systemctl --no-block poweroff 2>/dev/null || poweroff || halt -p";

/// How long the guest may take to answer that.
const ASKING: Duration = Duration::from_secs(60);

/// How long a kept machine may take to write its files.
const SYNCING: Duration = Duration::from_secs(60);

/// A running machine.
pub(crate) struct QemuMachine {
    pub(crate) vm: Vm,
    pub(crate) guest: Arc<SshGuest>,
    pub(crate) disk: DiskFile,
    /// A folder of this machine's own.
    pub(crate) folder: PathBuf,
    pub(crate) context: Context,
    pub(crate) shown: Shown,
}

#[async_trait]
impl Machine for QemuMachine {
    fn guest(&self) -> Arc<dyn Guest> {
        self.guest.clone()
    }

    async fn ended(&self) -> Error {
        let end = self.vm.end().await;
        self.vm.unexpected(end).await
    }

    /// Keeps none yet.
    async fn checkpoint(&mut self, _: &Slot) -> Result<Option<Written>> {
        Ok(None)
    }

    async fn explain(&self, error: Error) -> Error {
        self.vm.explain(error, true).await
    }

    async fn stop(self: Box<Self>, deadline: Duration) -> Result<Box<dyn Stopped>> {
        let ended = tokio::select! {
            end = self.vm.end() => Ok(end),
            never = self.power_off() => match never {},
            () = tokio::time::sleep(deadline) => {
                let error = Error::new(Code::Timeout, format!("the guest did not power off within {} s", deadline.as_secs()));
                Err(self.vm.explain(error, true).await)
            }
        };
        match ended {
            Ok(End::PoweredOff) => {
                self.vm.quit().await?;
                Ok(Box::new(QemuStopped { disk: self.disk, folder: self.folder, scope: self.context.scope.clone() }))
            }
            Ok(end) => {
                let error = self.vm.unexpected(end).await;
                self.vm.kill().await;
                Err(error)
            }
            Err(error) => {
                self.vm.kill().await;
                Err(error)
            }
        }
    }

    async fn kill(self: Box<Self>) {
        self.vm.kill().await;
    }

    /// Keeps the *disk*: the machine itself ends with kiln, as nothing may
    /// outlive it unseen. Gives the commands that boot the disk and log in.
    async fn keep(self: Box<Self>) -> Result<String> {
        let Self { vm, guest, disk, context, shown, folder: _ } = *self;
        // A guest that no longer answers is kept as it is.
        let _ = guest.execute(&Command::new("sync").timeout(SYNCING), &mut |_, _| {}).await;
        let _ = vm.qmp.execute("stop", Value::Null).await;
        vm.quit().await?;
        shown.keep(&disk, &context).await
    }
}

enum Never {}

impl QemuMachine {
    /// Asks the guest to power off, by every way there is; its end is told by
    /// an event, not by this.
    async fn power_off(&self) -> Never {
        let asked = self.guest.execute(&Command::new(POWER_OFF).timeout(ASKING), &mut |_, _| {}).await;
        if !asked.is_ok_and(|exit| exit.success()) {
            // The connection may be gone because the guest is going; pressing
            // its power button then does no harm.
            let _ = self.vm.qmp.execute("system_powerdown", Value::Null).await;
        }
        std::future::pending().await
    }
}

/// A machine that has stopped: its disk.
struct QemuStopped {
    disk: DiskFile,
    folder: PathBuf,
    scope: Arc<Scope>,
}

impl QemuStopped {
    async fn open(&self) -> Result<OverlayDisk> {
        let (disk, folder, scope) = (self.disk.clone(), self.folder.clone(), self.scope.clone());
        // The machine's own layer is the top one; below it lies the base.
        let open = move || OverlayDisk::open(&disk, 1, &folder, Some(&scope));
        tokio::task::spawn_blocking(open).await.trying(|| "open the stopped disk".into())?
    }
}

#[async_trait]
impl Stopped for QemuStopped {
    async fn blocks(&self) -> Result<Box<dyn BlockSource>> {
        Ok(Box::new(self.open().await?))
    }

    async fn files(&self) -> Result<Option<Box<dyn Files>>> {
        let disk = self.open().await?;
        let open = move || DiskFiles::open(Box::new(disk));
        let files = tokio::task::spawn_blocking(open).await.trying(|| "read the stopped disk".into())??;
        Ok(files.map(|files| Box::new(files) as Box<dyn Files>))
    }

    fn disk(&self) -> DiskFile {
        self.disk.clone()
    }
}
