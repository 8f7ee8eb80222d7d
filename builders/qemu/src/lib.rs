//! The QEMU builder: fresh machines from a base, and the bases themselves.
//!
//! ```text
//!  Base ──► overlay ──► QEMU ──► guest answers ──► Machine ──► Stopped
//!           start.rs    vm.rs    ways_in.rs        machine.rs   (kiln-disk)
//!                       command.rs   kiln-ssh
//! ```
//!
//! **The base is never written to.** A machine writes to a qcow2 overlay in
//! the bake's work folder. When the disk is to be larger than the base, the
//! partition table is moved along on the overlay before the start, and the file
//! system is grown by the guest after it.
//!
//! **Nothing waits for a fixed time.** QEMU inherits one end of each of three
//! socket pairs: QMP, the serial console, the firmware's messages. Its events
//! tell how a machine ended; its messages tell early that one will never start;
//! only an SSH server that does not answer is polled, up to `boot_timeout`.
//!
//! **Nothing listens but on loopback**, on a port that the kernel picks when
//! QEMU binds it. There is no VNC, no monitor socket, and no server for seeds.
//!
//! **Nobody is let in by chance.** Every machine gets a client key and a host
//! key of its own; both reach the guest by files that only their owner can
//! read, and the host key is pinned ([`kiln_ssh::way_in`] says how).
//!
//! **Nothing outlives the bake.** QEMU is in the ledger before it is started,
//! leads its own process group, and is killed by the kernel should kiln die
//! ([`kiln_process`]).
//!
//! A guest that ends by itself is paused, not gone: the screen can still be
//! looked at when kiln tells what happened. Stopping well means that QEMU closes
//! the overlay itself, so that the disk is whole though the guest's flushes were
//! not passed on while it ran.

mod accelerator;
mod agent;
pub mod base;
mod checkpoint;
mod command;
mod console;
pub mod doctor;
mod kept;
mod layers;
mod machine;
mod private;
mod qmp;
mod screenshot;
mod settings;
mod start;
mod vm;
mod ways_in;

use std::path::PathBuf;

use async_trait::async_trait;
use kiln_model::base::Base;
use kiln_model::checkpoint::Checkpoint;
use kiln_model::machine::{Builder, Context, Machine, Portable, Start};
use kiln_model::{Key, Result};

pub use accelerator::Chosen;
pub use settings::{Accelerator, Boot, QemuKind, Settings};

/// Gives machines under QEMU, all with the same settings.
pub struct QemuBuilder {
    settings: Settings,
    diagnostics: PathBuf,
    kept: PathBuf,
    chosen: tokio::sync::OnceCell<Chosen>,
}

#[async_trait]
impl Builder for QemuBuilder {
    fn kind(&self) -> &'static str {
        "qemu"
    }

    fn memory(&self) -> u64 {
        self.settings.memory
    }

    async fn memory_key(&self, step: &Key, base: &Base, context: &Context) -> Result<Option<Key>> {
        self.shape_key(step, base, context).await
    }

    async fn start(&self, base: &Base, start: &Start, context: &Context) -> Result<Box<dyn Machine>> {
        Ok(Box::new(self.start_machine(base, start, context).await?))
    }

    async fn resume(&self, base: &Base, checkpoint: &Checkpoint, start: &Start, context: &Context) -> Result<Option<Box<dyn Machine>>> {
        let machine = self.resume_machine(base, checkpoint, start, context).await?;
        Ok(machine.map(|machine| Box::new(machine) as Box<dyn Machine>))
    }

    fn portable(&self, checkpoint: &Checkpoint) -> Option<Portable> {
        Self::portable_files(checkpoint)
    }
}
