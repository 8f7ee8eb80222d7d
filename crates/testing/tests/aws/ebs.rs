//! The EBS direct APIs, without moto.

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::Digest;
use kiln_testing::{Aws, Failure};
use serde_json::{Value, json};

use crate::http::{Answer, ebs, try_ask};

const BLOCK: usize = 524_288;

fn block(fill: u8) -> Vec<u8> {
    vec![fill; BLOCK]
}

fn checksum(bytes: &[u8]) -> String {
    STANDARD.encode(Digest::of(bytes).as_bytes())
}

/// LINEAR over blocks by ascending index.
fn linear(blocks: &[&[u8]]) -> String {
    let all: Vec<u8> = blocks.iter().flat_map(|block| *Digest::of(block).as_bytes()).collect();
    checksum(&all)
}

fn start(aws: &Aws, body: &Value) -> Answer {
    ebs(aws, "POST /snapshots", &[], body.to_string().as_bytes())
}

fn started(aws: &Aws, body: &Value) -> String {
    let answer = start(aws, body);
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.json()["BlockSize"], BLOCK);
    answer.json()["SnapshotId"].as_str().unwrap().to_owned()
}

fn put(aws: &Aws, id: &str, index: u64, bytes: &[u8]) -> Answer {
    let sum = checksum(bytes);
    let headers = [("x-amz-Data-Length", "524288"), ("x-amz-Checksum", sum.as_str()), ("x-amz-Checksum-Algorithm", "SHA256")];
    ebs(aws, &format!("PUT /snapshots/{id}/blocks/{index}"), &headers, bytes)
}

fn complete(aws: &Aws, id: &str, count: usize, sum: &str) -> Answer {
    let count = count.to_string();
    let headers = [
        ("x-amz-ChangedBlocksCount", count.as_str()),
        ("x-amz-Checksum", sum),
        ("x-amz-Checksum-Algorithm", "SHA256"),
        ("x-amz-Checksum-Aggregation-Method", "LINEAR"),
    ];
    ebs(aws, &format!("POST /snapshots/completion/{id}"), &headers, b"")
}

/// A snapshot of so many GiB that holds these blocks and is completed.
fn snapshot(aws: &Aws, request: &Value, blocks: &[(u64, u8)]) -> String {
    let id = started(aws, request);
    let data: Vec<_> = blocks.iter().map(|(index, fill)| (*index, block(*fill))).collect();
    for (index, bytes) in &data {
        assert_eq!(put(aws, &id, *index, bytes).status, 201);
    }
    let mut sorted = data.clone();
    sorted.sort();
    let sum = linear(&sorted.iter().map(|(_, bytes)| bytes.as_slice()).collect::<Vec<_>>());
    assert_eq!(complete(aws, &id, blocks.len(), &sum).status, 202);
    id
}

fn quick() -> Aws {
    let aws = Aws::alone().unwrap();
    aws.settling(Duration::ZERO);
    aws
}

/// What a snapshot holds, as a raw disk.
struct Raw {
    file: std::fs::File,
    _folder: tempfile::TempDir,
}

impl Raw {
    fn of(aws: &Aws, id: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        aws.snapshot_to_raw(id, &path).unwrap();
        Self { file: std::fs::File::open(path).unwrap(), _folder: folder }
    }

    fn size(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn at(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, offset).unwrap();
        byte[0]
    }
}

#[test]
fn what_is_written_is_what_the_snapshot_holds() {
    let aws = quick();
    let id = snapshot(&aws, &json!({ "VolumeSize": 1 }), &[(2047, 9), (0, 1)]);
    let (disk, block) = (Raw::of(&aws, &id), BLOCK as u64);
    assert_eq!(disk.size(), 1 << 30);
    assert_eq!([0, block - 1, block, (1 << 30) - 1].map(|offset| disk.at(offset)), [1, 1, 0, 9]);
}

#[test]
fn a_block_has_its_size_its_place_and_its_checksum() {
    let aws = quick();
    let id = started(&aws, &json!({ "VolumeSize": 1 }));
    assert_eq!(put(&aws, &id, 2048, &block(1)).reason(), "INVALID_BLOCK", "beyond the end");
    assert_eq!(put(&aws, &id, 0, &block(1)[..1000]).reason(), "INVALID_PARAMETER_VALUE", "too short");
    assert_eq!(put(&aws, "snap-none", 0, &block(1)).status, 404);
    let bytes = block(1);
    let with = |headers: &[(&str, &str)]| ebs(&aws, &format!("PUT /snapshots/{id}/blocks/0"), headers, &bytes);
    let (sum, other) = (checksum(&bytes), checksum(&block(2)));
    let wrong = [
        vec![("x-amz-Data-Length", "524288"), ("x-amz-Checksum", other.as_str()), ("x-amz-Checksum-Algorithm", "SHA256")],
        vec![("x-amz-Data-Length", "512"), ("x-amz-Checksum", sum.as_str()), ("x-amz-Checksum-Algorithm", "SHA256")],
        vec![("x-amz-Data-Length", "524288"), ("x-amz-Checksum", sum.as_str())],
        vec![("x-amz-Data-Length", "524288"), ("x-amz-Checksum-Algorithm", "SHA256")],
    ];
    for headers in &wrong {
        assert_eq!(with(headers).reason(), "INVALID_PARAMETER_VALUE", "{headers:?}");
    }
    assert_eq!(complete(&aws, &id, 0, &linear(&[])).status, 202, "nothing of this was written");
}

#[test]
fn count_and_checksum_are_those_of_what_was_written() {
    let aws = quick();
    let id = started(&aws, &json!({ "VolumeSize": 1 }));
    let (one, two) = (block(1), block(2));
    assert_eq!(put(&aws, &id, 5, &two).status, 201);
    assert_eq!(put(&aws, &id, 3, &one).status, 201);
    // The same again, as after a lost answer, is one block.
    assert_eq!(put(&aws, &id, 3, &one).header("x-amz-checksum"), Some(checksum(&one).as_str()));
    assert_eq!(complete(&aws, &id, 3, &linear(&[&one, &two])).reason(), "INVALID_PARAMETER_VALUE");
    assert_eq!(complete(&aws, &id, 2, &linear(&[&two, &one])).reason(), "INVALID_PARAMETER_VALUE", "by ascending index");
    assert_eq!(complete(&aws, &id, 2, &linear(&[&one, &two])).status, 202);
    assert_eq!(complete(&aws, &id, 2, &linear(&[&one, &two])).reason(), "INVALID_SNAPSHOT_ID", "once");
    assert_eq!(put(&aws, &id, 4, &one).reason(), "INVALID_SNAPSHOT_ID", "and then nothing more is written");
}

#[test]
fn what_is_not_written_is_what_the_parent_holds() {
    let aws = quick();
    let parent = snapshot(&aws, &json!({ "VolumeSize": 1 }), &[(0, 1), (1, 2), (2, 3)]);
    let child = snapshot(&aws, &json!({ "VolumeSize": 2, "ParentSnapshotId": parent }), &[(1, 0), (2048, 7)]);
    let disk = Raw::of(&aws, &child);
    assert_eq!(disk.size(), 2 << 30);
    assert_eq!([0, 1, 2, 3, 2048].map(|index| disk.at(index * BLOCK as u64)), [1, 0, 3, 0, 7]);
    assert_eq!(Raw::of(&aws, &parent).at(BLOCK as u64), 2, "the parent stays what it was");

    let changed = ebs(&aws, &format!("GET /snapshots/{child}/changedblocks?firstSnapshotId={parent}"), &[], b"").json();
    let indices: Vec<u64> = changed["ChangedBlocks"].as_array().unwrap().iter().map(|b| b["BlockIndex"].as_u64().unwrap()).collect();
    assert_eq!(indices, [1, 2048]);
    assert!(changed["ChangedBlocks"][0]["FirstBlockToken"].is_string() && changed["ChangedBlocks"][1]["FirstBlockToken"].is_null());
    let other = snapshot(&aws, &json!({ "VolumeSize": 1 }), &[]);
    let unrelated = ebs(&aws, &format!("GET /snapshots/{child}/changedblocks?firstSnapshotId={other}"), &[], b"");
    assert_eq!(unrelated.reason(), "UNRELATED_SNAPSHOTS");
}

#[test]
fn a_parent_is_completed_not_larger_and_takes_no_encryption() {
    let aws = quick();
    let parent = snapshot(&aws, &json!({ "VolumeSize": 2 }), &[]);
    let with = |more: Value| {
        let mut body = json!({ "VolumeSize": 2, "ParentSnapshotId": parent });
        more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
        start(&aws, &body)
    };
    assert_eq!(with(json!({ "VolumeSize": 1 })).reason(), "INVALID_VOLUME_SIZE");
    assert_eq!(with(json!({ "Encrypted": true })).reason(), "INVALID_PARAMETER_VALUE");
    assert_eq!(with(json!({ "ParentSnapshotId": "snap-none" })).status, 404);
    assert_eq!(with(json!({ "Timeout": 5 })).reason(), "INVALID_PARAMETER_VALUE");
    let open = started(&aws, &json!({ "VolumeSize": 2 }));
    assert_eq!(with(json!({ "ParentSnapshotId": open })).reason(), "INVALID_SNAPSHOT_ID");
    aws.settling(Duration::from_secs(60));
    assert_eq!(complete(&aws, &open, 0, &linear(&[])).json()["Status"], "pending");
    assert_eq!(with(json!({ "ParentSnapshotId": open })).reason(), "INVALID_SNAPSHOT_ID", "completed only after a while");
    aws.settling(Duration::ZERO);
    assert_eq!(with(json!({ "ParentSnapshotId": open })).status, 201);
    let elsewhere = json!({ "VolumeSize": 2, "ParentSnapshotId": parent }).to_string();
    let elsewhere = try_ask(&aws, "us-west-2", "ebs", "POST /snapshots", &[], elsewhere.as_bytes()).unwrap();
    assert_eq!(elsewhere.status, 404, "a snapshot is of one region");
}

#[test]
fn a_token_starts_one_snapshot() {
    let aws = quick();
    let request = json!({ "VolumeSize": 1, "ClientToken": "one", "Tags": [{ "Key": "a", "Value": "b" }] });
    let id = started(&aws, &request);
    let again: Vec<String> = std::thread::scope(|scope| {
        let asks: Vec<_> = (0..8).map(|_| scope.spawn(|| started(&aws, &request))).collect();
        asks.into_iter().map(|ask| ask.join().unwrap()).collect()
    });
    assert!(again.iter().all(|other| *other == id));
    assert_ne!(started(&aws, &json!({ "VolumeSize": 1, "ClientToken": "two" })), id);
    let other = start(&aws, &json!({ "VolumeSize": 2, "ClientToken": "one" }));
    assert_eq!((other.status, other.header("x-amzn-errortype")), (503, Some("ConflictException")));
    assert_eq!(aws.snapshots().len(), 2);
}

#[test]
fn blocks_are_listed_in_pages_and_read_with_their_tokens() {
    let aws = quick();
    let id = snapshot(&aws, &json!({ "VolumeSize": 1 }), &[(1, 1), (5, 5), (9, 9)]);
    aws.page(2);
    let page = |query: &str| ebs(&aws, &format!("GET /snapshots/{id}/blocks{query}"), &[], b"");
    let first = page("").json();
    assert_eq!((&first["BlockSize"], &first["VolumeSize"]), (&json!(BLOCK), &json!(1)));
    let next = first["NextToken"].as_str().unwrap();
    let second = page(&format!("?pageToken={next}")).json();
    let indices = |page: &Value| page["Blocks"].as_array().unwrap().iter().map(|b| b["BlockIndex"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((indices(&first), indices(&second), &second["NextToken"]), (vec![1, 5], vec![9], &Value::Null));
    assert_eq!(indices(&page("?startingBlockIndex=6").json()), [9]);
    assert_eq!(page("?maxResults=5").reason(), "INVALID_PARAMETER_VALUE");
    assert_eq!(page("?pageToken=9.x").reason(), "INVALID_PAGE_TOKEN");

    let token = second["Blocks"][0]["BlockToken"].as_str().unwrap().replace('=', "%3D").replace('+', "%2B").replace('/', "%2F");
    let read = ebs(&aws, &format!("GET /snapshots/{id}/blocks/9?blockToken={token}"), &[], b"");
    assert_eq!((read.status, read.header("x-amz-checksum")), (200, Some(checksum(&block(9)).as_str())));
    assert_eq!(read.body, block(9));
    let wrong = ebs(&aws, &format!("GET /snapshots/{id}/blocks/5?blockToken={token}"), &[], b"");
    assert_eq!(wrong.reason(), "INVALID_BLOCK_TOKEN");
    let open = started(&aws, &json!({ "VolumeSize": 1 }));
    assert_eq!(ebs(&aws, &format!("GET /snapshots/{open}/blocks"), &[], b"").reason(), "INVALID_SNAPSHOT_ID");
}

#[test]
fn calls_are_throttled_fail_and_are_counted() {
    let aws = quick();
    let id = started(&aws, &json!({ "VolumeSize": 1 }));
    aws.forget();
    aws.throttle(50);
    let answers: Vec<Answer> = (0..60).map(|index| put(&aws, &id, index, &block(1))).collect();
    let throttled = answers.iter().filter(|answer| answer.status == 400).count();
    assert!((15..45).contains(&throttled), "{throttled}");
    assert!(answers.iter().filter(|a| a.status == 400).all(|a| a.header("x-amzn-errortype") == Some("RequestThrottledException")));
    assert_eq!((aws.count("PutSnapshotBlock"), aws.calls().iter().filter(|call| call.status == 400).count()), (60, throttled));
    aws.heal().forget();

    let ask = |index: u64| {
        let (bytes, line) = (block(3), format!("PUT /snapshots/{id}/blocks/{index}"));
        let sum = checksum(&bytes);
        let headers = [("x-amz-Data-Length", "524288"), ("x-amz-Checksum", sum.as_str()), ("x-amz-Checksum-Algorithm", "SHA256")];
        try_ask(&aws, "eu-central-1", "ebs", &line, &headers, &bytes)
    };
    aws.fail("PutSnapshotBlock", 1, Failure::Broken).fail("PutSnapshotBlock", 2, Failure::Lost);
    aws.fail("PutSnapshotBlock", 3, Failure::internal());
    assert!(ask(100).is_none() && ask(101).is_none());
    assert_eq!(ask(102).unwrap().status, 500);
    assert_eq!(ask(103).unwrap().status, 201);
    assert_eq!(aws.calls().iter().map(|call| call.status).collect::<Vec<_>>(), [0, 0, 500, 201]);
    let written = 60 - throttled + 2;
    assert_ne!(complete(&aws, &id, written - 1, &linear(&[])).status, 202);
    let message = complete(&aws, &id, written - 1, &linear(&[])).json()["Message"].as_str().unwrap().to_owned();
    assert!(message.starts_with(&format!("{written} blocks were written")), "the lost one is there, the broken one is not: {message}");
}

#[test]
fn more_at_once_than_allowed_are_throttled() {
    let aws = quick();
    let id = started(&aws, &json!({ "VolumeSize": 1 }));
    aws.at_once(1);
    let bytes = block(1);
    let since = Instant::now();
    let mut crowded = false;
    while !crowded && since.elapsed() < Duration::from_secs(30) {
        crowded = std::thread::scope(|scope| {
            let asks: Vec<_> = (0..8)
                .map(|index| {
                    scope.spawn({
                        let (aws, id, bytes) = (&aws, &id, &bytes);
                        move || put(aws, id, index, bytes).status
                    })
                })
                .collect();
            asks.into_iter().map(|ask| ask.join().unwrap()).any(|status| status == 400)
        });
    }
    assert!(crowded && aws.most_at_once() > 1);
}
