//! The EBS direct APIs, as the [reference] has them, and strictly: what AWS
//! refuses is refused, and where the reference leaves something open, the
//! stricter reading holds.
//!
//! [reference]: https://docs.aws.amazon.com/ebs/latest/APIReference/
//!
//! | Call | What is wanted |
//! |---|---|
//! | StartSnapshot | a size of 1 to 65536 GiB, not below the parent's; a parent that is completed, and then no encryption; a timeout of 10 to 4320 minutes; the same client token only for the same request |
//! | PutSnapshotBlock | exactly 524288 bytes, below the volume's size, with the SHA-256 that is said, into a snapshot that is still open |
//! | CompleteSnapshot | as many blocks as were written; the digest of the digests by ascending index, if one is said; once |
//! | ListSnapshotBlocks, ListChangedBlocks | completed snapshots; of the same lineage |
//! | GetSnapshotBlock | a token that one of the lists gave for this block |

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Response;
use kiln_model::Digest;
use serde_json::{Value, json};

use super::server::{Ask, Shared, lock};
use super::snapshots::{BLOCK, Blocks, Snapshot, Stage, Wish};
use crate::answer::answer;
use crate::flow::Outgoing;

/// Most entries of a page, and how many come when nothing is said.
const PAGE: usize = 10_000;
/// Fewest that may be asked for.
const LEAST: usize = 100;

/// Why a call is refused.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) kind: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Refusal {
    fn invalid(reason: &'static str, message: impl Into<String>) -> Self {
        Self { status: 400, kind: "ValidationException", reason, message: message.into() }
    }

    fn missing(message: impl Into<String>) -> Self {
        Self { status: 404, kind: "ResourceNotFoundException", reason: "SNAPSHOT_NOT_FOUND", message: message.into() }
    }

    fn failed(what: &str, error: impl std::fmt::Display) -> Self {
        Self { status: 500, kind: "InternalServerException", reason: "", message: format!("{what}: {error}") }
    }

    /// The answer.
    pub(crate) fn answer(&self) -> Response<Outgoing> {
        let body = json!({ "Message": self.message, "Reason": self.reason }).to_string();
        answer(self.status, &[("Content-Type", "application/json"), ("x-amzn-ErrorType", self.kind)], body)
    }
}

type Done = Result<Response<Outgoing>, Refusal>;

/// Which call a request is.
pub(crate) fn action(method: &str, path: &str) -> Option<&'static str> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match (method, parts.as_slice()) {
        ("POST", ["snapshots"]) => Some("StartSnapshot"),
        ("PUT", ["snapshots", _, "blocks", _]) => Some("PutSnapshotBlock"),
        ("GET", ["snapshots", _, "blocks", _]) => Some("GetSnapshotBlock"),
        ("POST", ["snapshots", "completion", _]) => Some("CompleteSnapshot"),
        ("GET", ["snapshots", _, "blocks"]) => Some("ListSnapshotBlocks"),
        ("GET", ["snapshots", _, "changedblocks"]) => Some("ListChangedBlocks"),
        _ => None,
    }
}

impl Shared {
    /// Does what an EBS request asks for.
    pub(crate) async fn ebs(self: &Arc<Self>, ask: &Ask) -> Response<Outgoing> {
        let parts: Vec<&str> = ask.path.trim_matches('/').split('/').collect();
        let part = |at: usize| parts.get(at).copied().unwrap_or_default();
        let done = match ask.action.as_str() {
            "StartSnapshot" => self.start_snapshot(ask).await,
            "PutSnapshotBlock" => self.put_block(ask, part(1), part(3)).await,
            "CompleteSnapshot" => self.complete(ask, part(2)),
            "ListSnapshotBlocks" => self.list_blocks(ask, part(1)),
            "ListChangedBlocks" => self.list_changed(ask, part(1)),
            "GetSnapshotBlock" => self.get_block(ask, part(1), part(3)).await,
            other => Err(Refusal { status: 404, kind: "UnknownOperationException", reason: "", message: format!("no call {other}") }),
        };
        done.unwrap_or_else(|refusal| refusal.answer())
    }

    async fn start_snapshot(&self, ask: &Ask) -> Done {
        let body: Value =
            serde_json::from_slice(&ask.body).map_err(|_| Refusal::invalid("INVALID_PARAMETER_VALUE", "the body is no JSON"))?;
        // Whoever asks with the same token at the same time gets the same.
        let _starting = self.starting.lock().await;
        let token = body["ClientToken"].as_str().map(|token| (ask.region.clone(), "StartSnapshot".to_owned(), token.to_owned()));
        if let Some(token) = &token {
            if token.2.is_empty() || token.2.len() > 255 {
                return Err(Refusal::invalid("INVALID_PARAMETER_VALUE", "a client token has 1 to 255 characters"));
            }
            let earlier = lock(&self.state).tokens.get(token).cloned();
            if let Some((request, id)) = earlier {
                // As text: a string of JSON is something else than what it says.
                let text = body.to_string();
                if request != text {
                    let message = "the client token was used for another request".to_owned();
                    return Err(Refusal { status: 503, kind: "ConflictException", reason: "", message });
                }
                let state = lock(&self.state);
                let again = state.snapshots.get(&id).ok_or_else(|| Refusal::missing(format!("{id} is gone")))?;
                return Ok(self.started(again));
            }
        }
        let wish = self.wish(&body, &ask.region)?;
        let id = self.new_snapshot(&ask.region, &wish).await.map_err(|why| Refusal::failed("moto", why))?;
        let mut snapshot = Snapshot::new(&id, &ask.region, wish);
        let mut state = lock(&self.state);
        if let Some(parent) = snapshot.wish.parent.as_ref().and_then(|parent| state.snapshots.get(parent)) {
            snapshot.inherited = parent.blocks();
            snapshot.lineage.clone_from(&parent.lineage);
        }
        if let Some(token) = token {
            state.tokens.insert(token, (body.to_string(), id.clone()));
        }
        let response = self.started(&snapshot);
        state.snapshots.insert(id.clone(), snapshot);
        drop(state);
        lock(&self.faults).born(&id);
        Ok(response)
    }

    /// Reads and checks what `StartSnapshot` is asked.
    fn wish(&self, body: &Value, region: &str) -> Result<Wish, Refusal> {
        let invalid = |message: &str| Refusal::invalid("INVALID_PARAMETER_VALUE", message);
        let size = body["VolumeSize"].as_u64().filter(|size| (1..=65_536).contains(size));
        let size = size.ok_or_else(|| Refusal::invalid("INVALID_VOLUME_SIZE", "VolumeSize is 1 to 65536 GiB"))?;
        if !body["Timeout"].is_null() && !body["Timeout"].as_u64().is_some_and(|minutes| (10..=4320).contains(&minutes)) {
            return Err(invalid("Timeout is 10 to 4320 minutes"));
        }
        let text = |name: &str| body[name].as_str().map(str::to_owned);
        let encrypted = body["Encrypted"].as_bool();
        let kms_key = text("KmsKeyArn");
        let parent = text("ParentSnapshotId");
        if kms_key.is_some() && encrypted != Some(true) {
            return Err(invalid("KmsKeyArn needs Encrypted"));
        }
        let description = text("Description").unwrap_or_default();
        if description.len() > 255 {
            return Err(invalid("Description has at most 255 characters"));
        }
        let mut tags = Vec::new();
        for tag in body["Tags"].as_array().into_iter().flatten() {
            let (key, value) = (tag["Key"].as_str().unwrap_or_default(), tag["Value"].as_str().unwrap_or_default());
            if key.is_empty() || key.len() > 127 || key.starts_with("aws:") || value.len() > 255 {
                return Err(Refusal::invalid("INVALID_TAG", format!("the tag {key:?}")));
            }
            tags.push((key.to_owned(), value.to_owned()));
        }
        if tags.len() > 50 {
            return Err(Refusal::invalid("INVALID_TAG", "more than 50 tags"));
        }
        let mut wish = Wish { size, parent, description, encrypted: encrypted == Some(true), kms_key, tags };
        if let Some(id) = &wish.parent {
            if encrypted.is_some() || wish.kms_key.is_some() {
                return Err(invalid("a snapshot with a parent takes its encryption"));
            }
            let state = lock(&self.state);
            let parent = state.snapshots.get(id).filter(|parent| parent.region == region);
            let parent = parent.ok_or_else(|| Refusal::missing(format!("the parent {id} does not exist")))?;
            if parent.status(state.settling) != "completed" {
                return Err(Refusal::invalid("INVALID_SNAPSHOT_ID", format!("the parent {id} is not completed")));
            }
            if size < parent.wish.size {
                return Err(Refusal::invalid("INVALID_VOLUME_SIZE", format!("the parent {id} has {} GiB", parent.wish.size)));
            }
            (wish.encrypted, wish.kms_key) = (parent.wish.encrypted, parent.wish.kms_key.clone());
        }
        Ok(wish)
    }

    fn started(&self, snapshot: &Snapshot) -> Response<Outgoing> {
        let wish = &snapshot.wish;
        let tags: Vec<_> = wish.tags.iter().map(|(key, value)| json!({ "Key": key, "Value": value })).collect();
        let mut body = json!({
            "Description": wish.description, "SnapshotId": snapshot.id, "OwnerId": super::ACCOUNT,
            "Status": if snapshot.stage == Stage::Open { "pending" } else { "completed" },
            "StartTime": snapshot.begun.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            "VolumeSize": wish.size, "BlockSize": BLOCK, "Tags": tags,
        });
        if let Some(object) = body.as_object_mut() {
            for (name, value) in [("ParentSnapshotId", &wish.parent), ("KmsKeyArn", &wish.kms_key)] {
                if let Some(value) = value {
                    object.insert(name.into(), json!(value));
                }
            }
        }
        answer(201, &[("Content-Type", "application/json")], body.to_string())
    }

    /// Looks at a snapshot of the region.
    fn with<T>(&self, ask: &Ask, id: &str, look: impl FnOnce(&mut Snapshot) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let mut state = lock(&self.state);
        let snapshot = state.snapshots.get_mut(id).filter(|snapshot| snapshot.region == ask.region);
        look(snapshot.ok_or_else(|| Refusal::missing(format!("the snapshot {id} does not exist")))?)
    }

    async fn put_block(self: &Arc<Self>, ask: &Ask, id: &str, index: &str) -> Done {
        let invalid = |message: String| Refusal::invalid("INVALID_PARAMETER_VALUE", message);
        let open = |snapshot: &mut Snapshot| match snapshot.stage {
            Stage::Open => Ok(snapshot.room()),
            Stage::Sealed(_) => Err(Refusal::invalid("INVALID_SNAPSHOT_ID", format!("{id} takes no more blocks"))),
        };
        let room = self.with(ask, id, open)?;
        let index: u64 = index.parse().map_err(|_| Refusal::invalid("INVALID_BLOCK", format!("no block {index}")))?;
        if index >= room {
            return Err(Refusal::invalid("INVALID_BLOCK", format!("block {index} lies beyond the volume's {room} blocks")));
        }
        if ask.header("x-amz-data-length") != Some("524288") || ask.body.len() != BLOCK {
            let said = ask.header("x-amz-data-length").unwrap_or("nothing");
            return Err(invalid(format!("a block has {BLOCK} bytes; {said} is said, and {} came", ask.body.len())));
        }
        if ask.header("x-amz-checksum-algorithm") != Some("SHA256") {
            return Err(invalid("x-amz-Checksum-Algorithm has to be SHA256".into()));
        }
        if ask.header("x-amz-progress").is_some_and(|progress| !progress.parse().is_ok_and(|percent: u32| percent <= 100)) {
            return Err(invalid("x-amz-Progress is 0 to 100".into()));
        }
        let (shelf, body) = (self.shelf.clone(), ask.body.clone());
        let said = ask.header("x-amz-checksum").unwrap_or_default().to_owned();
        let keep = move || {
            let digest = Digest::of(&body);
            let checksum = STANDARD.encode(digest.as_bytes());
            if checksum != said {
                return Err(Refusal::invalid("INVALID_PARAMETER_VALUE", format!("the checksum is {checksum}, and {said:?} was said")));
            }
            shelf.put(&digest, &body).map_err(|error| Refusal::failed("keep a block", error))?;
            Ok((digest, checksum))
        };
        let (digest, checksum) = tokio::task::spawn_blocking(keep).await.map_err(|error| Refusal::failed("keep a block", error))??;
        self.with(ask, id, |snapshot| {
            open(snapshot)?;
            snapshot.written.insert(index, digest);
            Ok(())
        })?;
        Ok(answer(201, &[("x-amz-Checksum", &checksum), ("x-amz-Checksum-Algorithm", "SHA256")], "{}"))
    }

    fn complete(&self, ask: &Ask, id: &str) -> Done {
        let invalid = |message: String| Refusal::invalid("INVALID_PARAMETER_VALUE", message);
        let settling = lock(&self.state).settling;
        let status = self.with(ask, id, |snapshot| {
            if snapshot.stage != Stage::Open {
                return Err(Refusal::invalid("INVALID_SNAPSHOT_ID", format!("{id} is completed already")));
            }
            let count = ask.header("x-amz-changedblockscount").and_then(|count| count.parse::<usize>().ok());
            if count != Some(snapshot.written.len()) {
                let said = ask.header("x-amz-changedblockscount").unwrap_or("nothing");
                return Err(invalid(format!("{} blocks were written, and {said} were said", snapshot.written.len())));
            }
            if let Some(said) = ask.header("x-amz-checksum") {
                let how = (ask.header("x-amz-checksum-algorithm"), ask.header("x-amz-checksum-aggregation-method"));
                if how != (Some("SHA256"), Some("LINEAR")) {
                    return Err(invalid("a checksum is SHA256, and its aggregation LINEAR".into()));
                }
                let checksum = linear(&snapshot.written);
                if said != checksum {
                    return Err(invalid(format!("the checksum is {checksum}, and {said} was said")));
                }
            }
            snapshot.stage = Stage::Sealed(std::time::Instant::now());
            Ok(snapshot.status(settling))
        })?;
        Ok(answer(202, &[("Content-Type", "application/json")], json!({ "Status": status }).to_string()))
    }

    /// The blocks of a snapshot that may be read.
    fn readable(&self, ask: &Ask, id: &str) -> Result<Snapshot, Refusal> {
        let settling = lock(&self.state).settling;
        self.with(ask, id, |snapshot| {
            if snapshot.status(settling) == "completed" {
                return Ok(snapshot.clone());
            }
            Err(Refusal::invalid("INVALID_SNAPSHOT_ID", format!("{id} is not completed")))
        })
    }

    fn list_blocks(&self, ask: &Ask, id: &str) -> Done {
        let snapshot = self.readable(ask, id)?;
        let entries = snapshot
            .blocks()
            .into_iter()
            .map(|(index, digest)| (index, json!({ "BlockIndex": index, "BlockToken": self.token(id, index, &digest) })));
        self.page(ask, &snapshot, "Blocks", entries.collect())
    }

    fn list_changed(&self, ask: &Ask, id: &str) -> Done {
        let second = self.readable(ask, id)?;
        let mut before = Blocks::new();
        let mut first_id = String::new();
        if let Some(first) = ask.parameter("firstSnapshotId") {
            let first = self.readable(ask, &first)?;
            if first.lineage != second.lineage {
                return Err(Refusal::invalid("UNRELATED_SNAPSHOTS", format!("{} and {id} have no snapshot in common", first.id)));
            }
            before = first.blocks();
            first_id = first.id;
        }
        let after = second.blocks();
        let mut entries = Vec::new();
        let mut indices: Vec<u64> = before.keys().chain(after.keys()).copied().collect();
        indices.sort_unstable();
        indices.dedup();
        for index in indices {
            let (one, two) = (before.get(&index), after.get(&index));
            if one == two {
                continue;
            }
            let mut entry = json!({ "BlockIndex": index });
            if let Some(object) = entry.as_object_mut() {
                for (name, of, digest) in [("FirstBlockToken", first_id.as_str(), one), ("SecondBlockToken", id, two)] {
                    if let Some(digest) = digest {
                        object.insert(name.into(), json!(self.token(of, index, digest)));
                    }
                }
            }
            entries.push((index, entry));
        }
        self.page(ask, &second, "ChangedBlocks", entries)
    }

    /// One page of a list, by ascending index.
    fn page(&self, ask: &Ask, snapshot: &Snapshot, name: &str, entries: Vec<(u64, Value)>) -> Done {
        let invalid = |reason, message: &str| Err(Refusal::invalid(reason, message));
        let number = |name: &str| ask.parameter(name).map(|text| text.parse::<u64>());
        let most = match number("maxResults") {
            None => PAGE,
            Some(Ok(most)) if (LEAST as u64..=PAGE as u64).contains(&most) => usize::try_from(most).unwrap_or(PAGE),
            Some(_) => return invalid("INVALID_PARAMETER_VALUE", "maxResults is 100 to 10000"),
        };
        // A page may hold less than was asked for.
        let most = most.min(lock(&self.state).page);
        let from = match (ask.parameter("pageToken"), number("startingBlockIndex")) {
            (Some(token), _) => match self.page_from(&ask.path, &token) {
                Some(from) => from,
                None => return invalid("INVALID_PAGE_TOKEN", "the token is of another list"),
            },
            (None, None) => 0,
            (None, Some(Ok(from))) => from,
            (None, Some(Err(_))) => return invalid("INVALID_PARAMETER_VALUE", "startingBlockIndex is a number"),
        };
        let mut rest = entries.into_iter().filter(|(index, _)| *index >= from);
        let page: Vec<Value> = rest.by_ref().take(most).map(|(_, entry)| entry).collect();
        let mut body = json!({
            name: page, "VolumeSize": snapshot.wish.size, "BlockSize": BLOCK,
            "ExpiryTime": UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64() + 7.0 * 86_400.0,
        });
        if let (Some((next, _)), Some(object)) = (rest.next(), body.as_object_mut()) {
            object.insert("NextToken".into(), json!(format!("{next}.{}", self.seal(&format!("{} {next}", ask.path)))));
        }
        Ok(answer(200, &[("Content-Type", "application/json")], body.to_string()))
    }

    fn page_from(&self, path: &str, token: &str) -> Option<u64> {
        let (from, seal) = token.split_once('.')?;
        (self.seal(&format!("{path} {from}")) == seal).then(|| from.parse().ok())?
    }

    /// What proves that the front itself said this.
    fn seal(&self, text: &str) -> String {
        Digest::of(format!("{} {text}", self.secret)).short()
    }

    fn token(&self, id: &str, index: u64, digest: &Digest) -> String {
        STANDARD.encode(self.seal(&format!("{id} {index} {digest}")))
    }

    async fn get_block(&self, ask: &Ask, id: &str, index: &str) -> Done {
        let snapshot = self.readable(ask, id)?;
        let block = index.parse().ok().and_then(|index: u64| Some((index, *snapshot.blocks().get(&index)?)));
        let (index, digest) = block.ok_or_else(|| Refusal::invalid("INVALID_BLOCK", format!("{id} has no block {index}")))?;
        if ask.parameter("blockToken").as_deref() != Some(self.token(id, index, &digest).as_str()) {
            return Err(Refusal::invalid("INVALID_BLOCK_TOKEN", format!("the token is not one for block {index} of {id}")));
        }
        let shelf = self.shelf.clone();
        let bytes = tokio::task::spawn_blocking(move || shelf.get(&digest)).await;
        let bytes =
            bytes.map_err(|error| Refusal::failed("read a block", error))?.map_err(|error| Refusal::failed("read a block", error))?;
        let checksum = STANDARD.encode(digest.as_bytes());
        let headers = [
            ("Content-Type", "application/octet-stream"),
            ("x-amz-Data-Length", "524288"),
            ("x-amz-Checksum", &checksum),
            ("x-amz-Checksum-Algorithm", "SHA256"),
        ];
        Ok(answer(200, &headers, bytes))
    }
}

/// `LINEAR`: base64 of the SHA-256 over the blocks' digests by ascending index.
pub(crate) fn linear(blocks: &Blocks) -> String {
    let all: Vec<u8> = blocks.values().flat_map(|digest| *digest.as_bytes()).collect();
    STANDARD.encode(Digest::of(all).as_bytes())
}
