//! A machine's disk: qcow2 layers in its folder, each on the one below it, the
//! lowest on the base.
//!
//! A checkpoint freezes the top layer and puts an empty one on it, so that it
//! copies nothing. The frozen layers are then linked (hard) into the
//! checkpoint's folder, and from there into the folder of each machine that
//! goes on from it: a layer lives as long as anybody has it, and evicting one
//! checkpoint never breaks another. They refer to each other by names in the
//! same folder, so that they mean the same wherever they are linked; only the
//! lowest one names the base, by its absolute path. A checkpoint that was made
//! where the base lies elsewhere, such as on another machine, gets a copy of
//! that one, which names the base here.

use std::path::{Path, PathBuf};

use kiln_disk::qemu_img;
use kiln_model::base::{DiskFile, DiskFormat};
use kiln_model::{Result, ResultExt as _};

/// The layers of one machine.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    folder: PathBuf,
    base: DiskFile,
    /// Virtual size in bytes.
    size: u64,
    count: usize,
}

/// A layer's file name; 0 is the lowest.
pub(crate) fn name(layer: usize) -> String {
    format!("layer-{layer}.qcow2")
}

impl Layers {
    /// One empty layer of `size` bytes on `base`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) async fn create(base: &DiskFile, folder: &Path, size: u64) -> Result<Self> {
        qemu_img::create_overlay(base, &folder.join(name(0)), size).await?;
        Ok(Self { folder: folder.to_owned(), base: base.clone(), size, count: 1 })
    }

    #[cfg(test)]
    pub(crate) fn existing(base: &DiskFile, folder: &Path, count: usize) -> Self {
        Self { folder: folder.to_owned(), base: base.clone(), size: base.size, count }
    }

    /// The `count` layers of a checkpoint in the folder `from`, and an empty
    /// one on them. `moved`: the lowest one names another file than `base`,
    /// with the same content.
    ///
    /// # Errors
    /// When they cannot be linked.
    pub(crate) async fn resume(base: &DiskFile, from: &Path, count: usize, folder: &Path, size: u64, moved: bool) -> Result<Self> {
        link(from, folder, count)?;
        if moved {
            let lowest = folder.join(name(0));
            let copy = || {
                std::fs::remove_file(&lowest)?;
                std::fs::copy(from.join(name(0)), &lowest)
            };
            copy().trying(|| format!("copy {} to {}", from.join(name(0)).display(), lowest.display()))?;
            qemu_img::move_to(&lowest, base).await?;
        }
        let mut layers = Self { folder: folder.to_owned(), base: base.clone(), size, count };
        layers.push().await?;
        Ok(layers)
    }

    /// Makes an empty layer on top; gives its path. A running machine must be
    /// told ([`crate::vm::Vm::freeze_disk`]).
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) async fn push(&mut self) -> Result<PathBuf> {
        let path = self.folder.join(name(self.count));
        qemu_img::create_layer(&path, &name(self.count - 1), self.size).await?;
        self.count += 1;
        Ok(path)
    }

    /// Forgets the top one, which was never used.
    pub(crate) fn pop(&mut self) {
        self.count -= 1;
        let _ = std::fs::remove_file(self.folder.join(name(self.count)));
    }

    /// Links all layers but the top one, which is being written to, into `folder`.
    ///
    /// # Errors
    /// When they cannot be linked.
    pub(crate) fn link_frozen(&self, folder: &Path) -> Result<Vec<String>> {
        link(&self.folder, folder, self.count - 1)?;
        Ok((0..self.count - 1).map(name).collect())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// What the lowest one lies on.
    pub(crate) fn base(&self) -> &DiskFile {
        &self.base
    }

    /// Their paths, the lowest first.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        (0..self.count).map(|layer| self.folder.join(name(layer))).collect()
    }

    /// The disk as it is.
    pub(crate) fn top(&self) -> DiskFile {
        DiskFile { path: self.folder.join(name(self.count - 1)), format: DiskFormat::Qcow2, size: self.size }
    }
}

fn link(from: &Path, to: &Path, count: usize) -> Result<()> {
    for layer in 0..count {
        let (from, to) = (from.join(name(layer)), to.join(name(layer)));
        std::fs::hard_link(&from, &to).trying(|| format!("link {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}
