//! A stopped machine's disk as blocks: which of them are its own, which are
//! unchanged from the base, and which are zeros, known without reading any.

use std::path::Path;
use std::sync::Arc;

use kiln_model::Result;
use kiln_model::base::DiskFile;
use kiln_model::block::{BlockSource, Content, Extent};
use kiln_model::cleanup::Scope;

use crate::nbd::{Access, Client, Export, Status, failed};

/// `base:allocation`: the stretch reads as zeros.
const ZERO: u32 = 1 << 1;

/// A disk read through its own server. Dropping it ends the server.
pub struct OverlayDisk {
    client: Client,
    own: u32,
    // After the client: it says goodbye before its server goes.
    _export: Arc<Export>,
}

impl OverlayDisk {
    /// Opens `disk`, serving it from `folder`. What its top `own` layers hold
    /// is its own; what comes from below them is [`Content::Backing`].
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(disk: &DiskFile, own: u32, folder: &Path, scope: Option<&Arc<Scope>>) -> Result<Self> {
        Self::on(Arc::new(Export::start(disk, Access::Read, folder, scope)?), own)
    }

    /// Reads what is served already.
    ///
    /// # Errors
    /// When it cannot be connected to.
    pub fn on(export: Arc<Export>, own: u32) -> Result<Self> {
        Ok(Self { client: export.connect()?, own, _export: export })
    }
}

impl BlockSource for OverlayDisk {
    fn size(&self) -> u64 {
        self.client.size()
    }

    fn extents(&mut self) -> Result<Vec<Extent>> {
        let status = self.client.status().map_err(|error| failed("cannot tell which parts of the disk are in use", error))?;
        Ok(merge(&status, self.client.knows_depth(), self.own))
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.client.read_at(offset, buffer).map_err(|error| failed("cannot read the disk", error))
    }
}

/// Both contexts as one list of extents, neighbours of one kind joined.
fn merge(status: &Status, knows_depth: bool, own: u32) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut depths = status.depth.iter().copied();
    let mut depth = (0, 0);
    let mut offset = 0;
    for &(mut left, flags) in &status.allocation {
        while left > 0 {
            while depth.0 == 0 {
                // Without depths everything that is not zero has to be read.
                depth = depths.next().filter(|_| knows_depth).unwrap_or((u64::MAX, 1));
            }
            let length = left.min(depth.0);
            let content = match depth.1 {
                _ if flags & ZERO != 0 => Content::Zero,
                layer if layer > own => Content::Backing,
                _ => Content::Data,
            };
            match extents.last_mut() {
                Some(last) if last.content == content => last.length += length,
                _ => extents.push(Extent { offset, length, content }),
            }
            offset += length;
            left -= length;
            depth.0 -= length;
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::qemu_img;
    use kiln_model::base::DiskFormat;

    #[test]
    fn contexts_of_different_grain_are_merged() {
        let status = Status { allocation: vec![(100, 0), (50, 3), (50, 0)], depth: vec![(30, 1), (90, 2), (80, 1)] };
        let found: Vec<_> = merge(&status, true, 1).iter().map(|e| (e.offset, e.length, e.content)).collect();
        assert_eq!(found, [(0, 30, Content::Data), (30, 70, Content::Backing), (100, 50, Content::Zero), (150, 50, Content::Data)]);
        assert_eq!(merge(&status, true, 2).len(), 3);
        assert_eq!(merge(&status, false, 1).len(), 3);
    }

    #[tokio::test]
    async fn an_overlay_on_a_base_in_a_folder_with_a_long_name() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(150));
        std::fs::create_dir(&long).unwrap();
        let base = DiskFile { path: long.join("base, odd.raw"), format: DiskFormat::Raw, size: 4 << 20 };
        let file = std::fs::File::create(&base.path).unwrap();
        file.set_len(base.size).unwrap();
        file.write_all_at(&[1; 1 << 20], 1 << 20).unwrap();
        let overlay = qemu_img::create_overlay(&base, &long.join("overlay.qcow2"), 8 << 20).await.unwrap();

        let export = Export::start(&overlay, Access::Write, &long, None).unwrap();
        let mut client = export.connect().unwrap();
        client.write_at(3 << 19, &[2; 64 << 10]).unwrap();
        client.write_at(6 << 20, &[3; 64 << 10]).unwrap();
        client.flush().unwrap();
        drop(client);
        export.close().unwrap();
        assert_eq!(std::fs::read_dir(&long).unwrap().count(), 2, "the socket stayed");

        let mut disk = OverlayDisk::open(&overlay, 1, &long, None).unwrap();
        assert_eq!(disk.size(), 8 << 20);
        let extents = disk.extents().unwrap();
        let found: Vec<_> = extents.iter().map(|e| (e.offset >> 16, e.length >> 16, e.content)).collect();
        let expected = [
            (0, 16, Content::Zero),
            (16, 8, Content::Backing),
            (24, 1, Content::Data),
            (25, 7, Content::Backing),
            (32, 64, Content::Zero),
            (96, 1, Content::Data),
            (97, 31, Content::Zero),
        ];
        assert_eq!(found, expected);
        let mut bytes = vec![9; 3 << 20];
        disk.read_at(0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[1 << 20], bytes[3 << 19], bytes[2 << 20]), (0, 1, 2, 0));

        std::fs::write(&overlay.path, b"QFI\xfb").unwrap();
        let error = OverlayDisk::open(&overlay, 1, &long, None).err().unwrap();
        assert!(error.details().iter().any(|detail| detail.contains("qcow2") || detail.contains("Image")), "{error:?}");
    }
}
