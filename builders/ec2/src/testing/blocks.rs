//! The EBS direct APIs.

use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use kiln_model::Digest;
use kiln_model::block::BLOCK;

use super::{Carried, Service, Snap};
use crate::api::ebs::{ChangedBlock, Ebs, Encryption, ListedBlock, NewSnapshot, Page, SnapshotState, Started};
use crate::api::{CallError, Result};

/// Blocks on one page: few, so that there are several.
const PAGE: usize = 3;

impl Carried<'_> {
    /// A snapshot that can be seen.
    fn snapshot(&mut self, id: &str) -> Result<&mut Snap> {
        let (action, lag) = (self.action, self.lag);
        let found = self.here().snapshots.get_mut(id).filter(|snapshot| snapshot.since.elapsed() >= lag);
        found.ok_or_else(|| CallError::answered(action, 404, "ResourceNotFoundException", "no such snapshot"))
    }

    fn completed(&mut self, id: &str) -> Result<&mut Snap> {
        let action = self.action;
        let snapshot = self.snapshot(id)?;
        if snapshot.state() != SnapshotState::Completed {
            return Err(CallError::answered(action, 400, "ValidationException", "the snapshot is not completed"));
        }
        Ok(snapshot)
    }
}

fn paged<T>(all: Vec<T>, gib: u32, next: Option<&str>) -> Page<T> {
    let from: usize = next.map_or(0, |next| next.parse().unwrap());
    let end = from + PAGE;
    let next = (end < all.len()).then(|| end.to_string());
    Page { blocks: all.into_iter().skip(from).take(PAGE).collect(), gib: gib.into(), next }
}

#[async_trait]
impl Ebs for Service {
    async fn start_snapshot(&self, new: &NewSnapshot) -> Result<Started> {
        self.call("StartSnapshot", |call| {
            let same = call.here().snapshots.iter().find(|(_, there)| there.asked.token == new.token);
            if let Some((id, there)) = same {
                if there.asked != *new {
                    return call.fails("ConflictException", "the token was used with other values");
                }
                return Ok(Started { id: id.clone(), block_size: 524_288, state: there.state() });
            }
            let minutes = new.timeout.as_secs() / 60;
            if !(10..=4320).contains(&minutes) || new.gib == 0 || new.token.len() > 64 || new.description.len() > 255 {
                return call.fails("ValidationException", "a value is out of bounds");
            }
            if new.parent.is_some() && new.encryption != Encryption::Inherited {
                return call.fails("ValidationException", "a parent and encryption exclude each other");
            }
            let mut key = match &new.encryption {
                Encryption::Inherited => None,
                Encryption::Key(arn) => Some(arn.clone()),
            };
            let mut blocks = std::collections::BTreeMap::new();
            if let Some(parent) = &new.parent {
                let parent = call.completed(parent)?;
                if parent.asked.gib > new.gib {
                    return call.fails("ValidationException", "smaller than its parent");
                }
                (blocks, key) = (parent.blocks.clone(), parent.key.clone());
            }
            let id = format!("snap-{:017x}", call.id);
            let snapshot = Snap {
                asked: new.clone(),
                blocks,
                written: std::collections::BTreeMap::new(),
                tags: new.tags.clone(),
                key,
                accounts: Vec::new(),
                began: jiff::Timestamp::now(),
                since: Instant::now(),
                completed: None,
            };
            call.here().snapshots.insert(id.clone(), snapshot);
            Ok(Started { id, block_size: 524_288, state: SnapshotState::Pending })
        })
    }

    async fn put_block(&self, snapshot: &str, index: u32, data: Bytes, digest: &Digest) -> Result<()> {
        // Not under the lock, or all calls would come one after the other.
        let own = Digest::of(&data);
        tokio::task::yield_now().await;
        self.call("PutSnapshotBlock", |call| {
            let action = call.action;
            let refuse = |why: &str| Err(CallError::answered(action, 400, "ValidationException", why));
            let there = call.snapshot(snapshot)?;
            if there.completed.is_some() {
                return refuse("the snapshot is not pending");
            }
            if data.len() as u64 != BLOCK || own != *digest {
                return refuse("the data are not those of the checksum");
            }
            if u64::from(index) >= u64::from(there.asked.gib) * 2048 {
                return refuse("after the volume's end");
            }
            there.written.insert(index, own);
            there.blocks.insert(index, data);
            Ok(())
        })
    }

    async fn complete_snapshot(&self, snapshot: &str, changed: u32, checksum: &Digest) -> Result<SnapshotState> {
        self.call("CompleteSnapshot", |call| {
            let (action, making) = (call.action, call.making);
            let refuse = |why: &str| Err(CallError::answered(action, 400, "ValidationException", why));
            let there = call.snapshot(snapshot)?;
            if there.completed.is_some() {
                return refuse("the snapshot is not pending");
            }
            let raw: Vec<u8> = there.written.values().flat_map(|digest| *digest.as_bytes()).collect();
            if there.written.len() != changed as usize || Digest::of(raw) != *checksum {
                return refuse("count or checksum is not that of what was written");
            }
            there.completed = Some(Instant::now() + making);
            Ok(there.state())
        })
    }

    async fn list_blocks(&self, snapshot: &str, next: Option<&str>) -> Result<Page<ListedBlock>> {
        self.call("ListSnapshotBlocks", |call| {
            let there = call.completed(snapshot)?;
            let block = |index: &u32| ListedBlock { index: *index, token: format!("{snapshot}/{index}") };
            Ok(paged(there.blocks.keys().map(block).collect(), there.asked.gib, next))
        })
    }

    async fn list_changed(&self, first: &str, second: &str, next: Option<&str>) -> Result<Page<ChangedBlock>> {
        self.call("ListChangedBlocks", |call| {
            let before = call.completed(first)?.blocks.clone();
            let there = call.completed(second)?;
            let differs = |index: &u32| before.get(index) != there.blocks.get(index);
            let mut all: Vec<u32> = before.keys().chain(there.blocks.keys()).copied().filter(differs).collect();
            all.sort_unstable();
            all.dedup();
            let token = |index: u32| there.blocks.contains_key(&index).then(|| format!("{second}/{index}"));
            let all = all.into_iter().map(|index| ChangedBlock { index, token: token(index) }).collect();
            Ok(paged(all, there.asked.gib, next))
        })
    }

    async fn get_block(&self, snapshot: &str, block: &ListedBlock) -> Result<(Bytes, Digest)> {
        let data = self.call("GetSnapshotBlock", |call| {
            if block.token != format!("{snapshot}/{}", block.index) {
                return call.fails("ValidationException", "the token does not fit");
            }
            let action = call.action;
            let found = call.completed(snapshot)?.blocks.get(&block.index).cloned();
            found.ok_or_else(|| CallError::answered(action, 404, "ResourceNotFoundException", "no such block"))
        })?;
        let digest = Digest::of(&data);
        Ok((data, digest))
    }
}
