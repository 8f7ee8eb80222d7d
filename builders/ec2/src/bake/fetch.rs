//! Reading a snapshot back: its blocks in order, many under way at a time.
//!
//! The reader is an ordinary thread that wants one block after the other; each
//! takes a round trip to AWS. So the blocks that come next are asked for while
//! earlier ones are digested and stored. Every block is checked against the
//! digest that AWS gives with it.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use kiln_model::block::{BLOCK, BlockSource, Content, Extent};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::api::Ebs;
use crate::api::ebs::ListedBlock;
use crate::api::error::CallExt as _;
use crate::api::retry::Calls;

/// How many blocks are asked for ahead of the reader: 16 MiB.
const AHEAD: usize = 32;

/// A completed snapshot as a disk.
pub(crate) struct SnapshotSource {
    ebs: Arc<dyn Ebs>,
    calls: Arc<Calls>,
    snapshot: String,
    size: u64,
    /// By ascending index.
    blocks: Vec<ListedBlock>,
    /// Position in `blocks` of the next one to be asked for.
    next: usize,
    coming: VecDeque<(u32, JoinHandle<Result<Bytes>>)>,
    /// The block that was read last.
    here: Option<(u32, Bytes)>,
    runtime: Handle,
}

impl SnapshotSource {
    /// Lists the blocks of a snapshot.
    pub(crate) async fn open(ebs: Arc<dyn Ebs>, calls: Arc<Calls>, snapshot: &str) -> Result<Self> {
        let (mut blocks, mut next, mut gib) = (Vec::new(), None::<String>, 0);
        loop {
            let page = calls.make_of_new(|| ebs.list_blocks(snapshot, next.as_deref())).await;
            let page = page.trying_to(|| format!("list the blocks of {snapshot}"))?;
            gib = gib.max(page.gib);
            blocks.extend(page.blocks);
            match page.next {
                Some(token) => next = Some(token),
                None => break,
            }
        }
        blocks.sort_by_key(|block| block.index);
        blocks.dedup_by_key(|block| block.index);
        let size = gib << 30;
        if blocks.last().is_some_and(|last| (u64::from(last.index) + 1) * BLOCK > size) {
            return Err(Error::new(Code::Corrupt, format!("{snapshot} has blocks behind its end")));
        }
        let (snapshot, runtime) = (snapshot.to_owned(), Handle::current());
        Ok(Self { ebs, calls, snapshot, size, blocks, next: 0, coming: VecDeque::new(), here: None, runtime })
    }

    /// The content of a block; `None` where it was never written.
    fn block(&mut self, index: u32) -> Result<Option<Bytes>> {
        if let Some((here, bytes)) = &self.here
            && *here == index
        {
            return Ok(Some(bytes.clone()));
        }
        let Ok(position) = self.blocks.binary_search_by_key(&index, |block| block.index) else { return Ok(None) };
        // Whoever reads elsewhere than next gives up what is on its way.
        if self.coming.front().is_none_or(|(first, _)| *first != index) {
            self.abandon();
            self.next = position;
        }
        self.ask();
        let Some((_, coming)) = self.coming.pop_front() else { return Ok(None) };
        let bytes = self.runtime.block_on(coming).trying(|| format!("read {}", self.snapshot))??;
        self.ask();
        self.here = Some((index, bytes.clone()));
        Ok(Some(bytes))
    }

    /// Asks for as many blocks as may be under way.
    fn ask(&mut self) {
        while self.coming.len() < AHEAD {
            let Some(block) = self.blocks.get(self.next).cloned() else { return };
            self.next += 1;
            let (ebs, calls, snapshot) = (Arc::clone(&self.ebs), Arc::clone(&self.calls), self.snapshot.clone());
            let index = block.index;
            let task = async move { get(&*ebs, &calls, &snapshot, &block).await };
            self.coming.push_back((index, self.runtime.spawn(task)));
        }
    }

    fn abandon(&mut self) {
        for (_, coming) in self.coming.drain(..) {
            coming.abort();
        }
    }
}

/// One block, checked.
async fn get(ebs: &dyn Ebs, calls: &Calls, snapshot: &str, block: &ListedBlock) -> Result<Bytes> {
    let what = || format!("read block {} of {snapshot}", block.index);
    let (bytes, digest) = calls.make(|| ebs.get_block(snapshot, block)).await.trying_to(what)?;
    if bytes.len() as u64 != BLOCK || Digest::of(&bytes) != digest {
        let error = Error::new(Code::DigestMismatch, format!("block {} of {snapshot} came damaged", block.index));
        return Err(error.next("run the same command again"));
    }
    Ok(bytes)
}

impl Drop for SnapshotSource {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl BlockSource for SnapshotSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&mut self) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut end = 0;
        let mut add = |from: u64, to: u64, content: Content| match extents.last_mut() {
            Some(last) if last.content == content && last.offset + last.length == from => last.length += to - from,
            _ if to > from => extents.push(Extent { offset: from, length: to - from, content }),
            _ => {}
        };
        for block in &self.blocks {
            let offset = u64::from(block.index) * BLOCK;
            add(end, offset, Content::Zero);
            end = offset + BLOCK;
            add(offset, end, Content::Data);
        }
        add(end, self.size, Content::Zero);
        Ok(extents)
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let index = u32::try_from(at / BLOCK).trying(|| format!("read {}", self.snapshot))?;
            let within = usize::try_from(at % BLOCK).trying(|| format!("read {}", self.snapshot))?;
            let length = (buffer.len() - done).min(usize::try_from(BLOCK).unwrap_or(usize::MAX) - within);
            let Some(target) = buffer.get_mut(done..done + length) else { break };
            match self.block(index)? {
                Some(bytes) => match bytes.get(within..within + length) {
                    Some(bytes) => target.copy_from_slice(bytes),
                    None => return Err(Error::new(Code::Corrupt, format!("block {index} of {} is too short", self.snapshot))),
                },
                None => target.fill(0),
            }
            done += length;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::api::ebs::{ChangedBlock, NewSnapshot, Page, SnapshotState, Started};
    use crate::api::retry::Pace;
    use crate::api::{CallError, Result as Called};

    /// Two pages of blocks, whose bytes are their number.
    struct Some3 {
        damaged: bool,
    }

    #[async_trait]
    impl Ebs for Some3 {
        async fn start_snapshot(&self, _: &NewSnapshot) -> Called<Started> {
            Err(CallError::answered("StartSnapshot", 400, "ValidationException", "not here"))
        }
        async fn put_block(&self, _: &str, _: u32, _: Bytes, _: &Digest) -> Called<()> {
            Err(CallError::answered("PutSnapshotBlock", 400, "ValidationException", "not here"))
        }
        async fn complete_snapshot(&self, _: &str, _: u32, _: &Digest) -> Called<SnapshotState> {
            Err(CallError::answered("CompleteSnapshot", 400, "ValidationException", "not here"))
        }
        async fn list_blocks(&self, _: &str, next: Option<&str>) -> Called<Page<ListedBlock>> {
            let block = |index: u32| ListedBlock { index, token: format!("token {index}") };
            Ok(match next {
                None => Page { blocks: vec![block(1), block(2)], gib: 1, next: Some("more".into()) },
                Some(_) => Page { blocks: vec![block(7)], gib: 1, next: None },
            })
        }
        async fn list_changed(&self, _: &str, _: &str, _: Option<&str>) -> Called<Page<ChangedBlock>> {
            Err(CallError::answered("ListChangedBlocks", 400, "ValidationException", "not here"))
        }
        async fn get_block(&self, _: &str, block: &ListedBlock) -> Called<(Bytes, Digest)> {
            assert_eq!(block.token, format!("token {}", block.index));
            let bytes = vec![u8::try_from(block.index).unwrap(); BLOCK as usize];
            let digest = Digest::of(if self.damaged { b"other".as_slice() } else { bytes.as_slice() });
            Ok((bytes.into(), digest))
        }
    }

    async fn open(damaged: bool) -> SnapshotSource {
        SnapshotSource::open(Arc::new(Some3 { damaged }), Arc::new(Calls::new(Pace::default(), 4)), "snap-1").await.unwrap()
    }

    #[tokio::test]
    async fn a_snapshot_reads_as_a_disk() {
        let mut source = open(false).await;
        assert_eq!(source.size(), 1 << 30);
        let extent = |from: u64, to: u64, content| Extent { offset: from * BLOCK, length: (to - from) * BLOCK, content };
        let expected = [
            extent(0, 1, Content::Zero),
            extent(1, 3, Content::Data),
            extent(3, 7, Content::Zero),
            extent(7, 8, Content::Data),
            extent(8, 2048, Content::Zero),
        ];
        assert_eq!(source.extents().unwrap(), expected);
        let read = tokio::task::spawn_blocking(move || {
            let mut read = |offset: u64, length: usize| {
                let mut buffer = vec![9; length];
                source.read_at(offset, &mut buffer).map(|()| buffer)
            };
            // In order, across a border, backwards, and where nothing is.
            let whole = read(BLOCK, 2 * BLOCK as usize).unwrap();
            assert!(whole[..BLOCK as usize].iter().all(|b| *b == 1) && whole[BLOCK as usize..].iter().all(|b| *b == 2));
            assert_eq!(read(8 * BLOCK - 1, 2).unwrap(), [7, 0]);
            assert_eq!(read(2 * BLOCK - 1, 2).unwrap(), [1, 2]);
            assert_eq!(read(0, 3).unwrap(), [0, 0, 0]);
        });
        read.await.unwrap();
    }

    #[tokio::test]
    async fn damage_is_noticed() {
        let mut source = open(true).await;
        let read = tokio::task::spawn_blocking(move || source.read_at(BLOCK, &mut [0; 1]));
        assert_eq!(read.await.unwrap().unwrap_err().kind(), Code::DigestMismatch);
    }
}
