//! The EBS direct APIs.

use async_trait::async_trait;
use aws_sdk_ebs::primitives::ByteStream;
use aws_sdk_ebs::types::{ChecksumAggregationMethod, ChecksumAlgorithm, Status, Tag};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use kiln_model::Digest;
use kiln_model::block::BLOCK;

use super::failed;
use crate::api::ebs::{ChangedBlock, Ebs, Encryption, ListedBlock, NewSnapshot, Page, SnapshotState, Started};
use crate::api::{CallError, Kind, Result};

/// Blocks on one page of a list: the most there may be.
const PAGE: i32 = 10_000;

pub(super) struct Client(pub(super) aws_sdk_ebs::Client);

fn state(status: Option<&Status>) -> SnapshotState {
    match status {
        Some(Status::Completed) => SnapshotState::Completed,
        Some(Status::Error) => SnapshotState::Failed,
        _ => SnapshotState::Pending,
    }
}

/// An answer that lacks what it must have.
fn lacks(action: &'static str, what: &str) -> CallError {
    CallError { action, code: String::new(), message: format!("the answer has no {what}"), kind: Kind::Other, source: None }
}

fn number(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}

fn text(digest: &Digest) -> String {
    BASE64_STANDARD.encode(digest.as_bytes())
}

#[async_trait]
impl Ebs for Client {
    async fn start_snapshot(&self, snapshot: &NewSnapshot) -> Result<Started> {
        const ACTION: &str = "StartSnapshot";
        let tags = snapshot.tags.iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect();
        let key = match &snapshot.encryption {
            Encryption::Inherited => None,
            Encryption::Key(arn) => Some(arn.clone()),
        };
        let minutes = i32::try_from(snapshot.timeout.as_secs() / 60).unwrap_or(i32::MAX).clamp(10, 4320);
        let call = self
            .0
            .start_snapshot()
            .client_token(&snapshot.token)
            .volume_size(i64::from(snapshot.gib))
            .set_parent_snapshot_id(snapshot.parent.clone())
            .set_encrypted(key.as_ref().map(|_| true))
            .set_kms_key_arn(key)
            .description(&snapshot.description)
            .set_tags(Some(tags))
            .timeout(minutes);
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        Ok(Started {
            id: answer.snapshot_id().ok_or_else(|| lacks(ACTION, "SnapshotId"))?.to_owned(),
            block_size: answer.block_size().and_then(|size| u32::try_from(size).ok()).ok_or_else(|| lacks(ACTION, "BlockSize"))?,
            state: state(answer.status()),
        })
    }

    async fn put_block(&self, snapshot: &str, index: u32, data: Bytes, digest: &Digest) -> Result<()> {
        let call = self
            .0
            .put_snapshot_block()
            .snapshot_id(snapshot)
            .block_index(number(index))
            .data_length(i32::try_from(data.len()).unwrap_or(i32::MAX))
            .checksum(text(digest))
            .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
            .block_data(ByteStream::from(data));
        call.send().await.map(drop).map_err(|error| failed("PutSnapshotBlock", error))
    }

    async fn complete_snapshot(&self, snapshot: &str, changed: u32, checksum: &Digest) -> Result<SnapshotState> {
        let call = self
            .0
            .complete_snapshot()
            .snapshot_id(snapshot)
            .changed_blocks_count(number(changed))
            .checksum(text(checksum))
            .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
            .checksum_aggregation_method(ChecksumAggregationMethod::ChecksumAggregationLinear);
        let answer = call.send().await.map_err(|error| failed("CompleteSnapshot", error))?;
        Ok(state(answer.status()))
    }

    async fn list_blocks(&self, snapshot: &str, next: Option<&str>) -> Result<Page<ListedBlock>> {
        const ACTION: &str = "ListSnapshotBlocks";
        let call = self.0.list_snapshot_blocks().snapshot_id(snapshot).set_next_token(next.map(Into::into)).max_results(PAGE);
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        let block = |block: &aws_sdk_ebs::types::Block| {
            let index = u32::try_from(block.block_index()?).ok()?;
            Some(ListedBlock { index, token: block.block_token()?.to_owned() })
        };
        let blocks: Option<Vec<_>> = answer.blocks().iter().map(block).collect();
        Ok(Page {
            blocks: blocks.ok_or_else(|| lacks(ACTION, "BlockToken"))?,
            gib: answer.volume_size().and_then(|size| u64::try_from(size).ok()).ok_or_else(|| lacks(ACTION, "VolumeSize"))?,
            next: answer.next_token().map(Into::into),
        })
    }

    async fn list_changed(&self, first: &str, second: &str, next: Option<&str>) -> Result<Page<ChangedBlock>> {
        const ACTION: &str = "ListChangedBlocks";
        let call = self.0.list_changed_blocks().first_snapshot_id(first).second_snapshot_id(second);
        let call = call.set_next_token(next.map(Into::into)).max_results(PAGE);
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        let block = |block: &aws_sdk_ebs::types::ChangedBlock| {
            let index = u32::try_from(block.block_index()?).ok()?;
            Some(ChangedBlock { index, token: block.second_block_token().map(Into::into) })
        };
        let blocks: Option<Vec<_>> = answer.changed_blocks().iter().map(block).collect();
        Ok(Page {
            blocks: blocks.ok_or_else(|| lacks(ACTION, "BlockIndex"))?,
            gib: answer.volume_size().and_then(|size| u64::try_from(size).ok()).ok_or_else(|| lacks(ACTION, "VolumeSize"))?,
            next: answer.next_token().map(Into::into),
        })
    }

    async fn get_block(&self, snapshot: &str, block: &ListedBlock) -> Result<(Bytes, Digest)> {
        const ACTION: &str = "GetSnapshotBlock";
        let call = self.0.get_snapshot_block().snapshot_id(snapshot).block_index(number(block.index)).block_token(&block.token);
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        let checksum = answer.checksum().and_then(|text| BASE64_STANDARD.decode(text).ok());
        let checksum: Option<[u8; 32]> = checksum.and_then(|bytes| bytes.try_into().ok());
        let checksum = checksum.ok_or_else(|| lacks(ACTION, "SHA-256 checksum"))?;
        // What breaks off in the middle is as good as no answer.
        let data = answer.block_data.collect().await.map_err(|error| CallError::unanswered(ACTION, error))?.into_bytes();
        if data.len() as u64 != BLOCK {
            let why = format!("{} bytes came, and a block has {BLOCK}", data.len());
            return Err(CallError::unanswered(ACTION, why));
        }
        Ok((data, Digest::from_bytes(checksum)))
    }
}
