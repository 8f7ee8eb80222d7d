//! EC2: passed on to moto, with what moto does not hold in place.
//!
//! moto keeps names, tags, filters and permissions. What it says of a snapshot
//! or an image that was made through the front, the front corrects from what
//! it knows itself; what moto makes up (a snapshot and a volume for every
//! image) is not shown.

use bytes::Bytes;
use hyper::Response;

use super::query::{Filter, Query};
use super::server::{Ask, Shared, lock};
use super::snapshots::{Snapshot, Stage, Wish};
use super::xml::Element;
use super::{ACCOUNT, images};
use crate::answer::answer;
use crate::flow::Outgoing;

/// Why a call is refused.
#[derive(Debug)]
pub(crate) enum Wrong {
    /// By the front.
    Refused(&'static str, String),
    /// By moto: its answer as it came.
    Said(u16, Bytes),
}

pub(crate) type Done<T = Element> = Result<T, Wrong>;

/// A refusal of the front.
pub(crate) fn wrong<T>(code: &'static str, message: impl Into<String>) -> Done<T> {
    Err(Wrong::Refused(code, message.into()))
}

/// What things are called when they are not there, by how their ids begin.
const MISSING: [(&str, &str); 8] = [
    ("ami-", "InvalidAMIID.NotFound"),
    ("i-", "InvalidInstanceID.NotFound"),
    ("snap-", "InvalidSnapshot.NotFound"),
    ("sg-", "InvalidGroup.NotFound"),
    ("vol-", "InvalidVolume.NotFound"),
    ("key", "InvalidKeyPair.NotFound"),
    ("sir-", "InvalidSpotInstanceRequestID.NotFound"),
    ("lt-", "InvalidLaunchTemplateId.NotFound"),
];

/// The calls that make something, and where their answers name it.
const MAKES: [(&str, &str); 11] = [
    ("RegisterImage", "imageId"),
    ("CreateImage", "imageId"),
    ("CopyImage", "imageId"),
    ("CopySnapshot", "snapshotId"),
    ("CreateSnapshot", "snapshotId"),
    ("CreateSecurityGroup", "groupId"),
    ("CreateVolume", "volumeId"),
    ("ImportKeyPair", "keyPairId"),
    ("CreateKeyPair", "keyPairId"),
    ("RunInstances", "instancesSet/item/instanceId"),
    ("RequestSpotInstances", "spotInstanceRequestSet/item/spotInstanceRequestId"),
];

/// What an item of a list is known by.
const KNOWN_BY: [&str; 7] = ["imageId", "instanceId", "snapshotId", "groupId", "volumeId", "keyPairId", "spotInstanceRequestId"];

/// An error in EC2's form.
pub(crate) fn refuse(status: u16, code: &str, message: &str) -> Response<Outgoing> {
    let error = Element::of("Error", vec![Element::new("Code", code), Element::new("Message", message)]);
    let errors = Element::of("Errors", vec![error]);
    let body = Element::of("Response", vec![errors, Element::new("RequestID", "front")]).render();
    answer(status, &[("Content-Type", "text/xml;charset=UTF-8")], body)
}

/// An answer of the front's own.
pub(crate) fn response(action: &str, mut children: Vec<Element>) -> Element {
    children.insert(0, Element::new("requestId", "front"));
    Element::of(&format!("{action}Response"), children)
}

impl Shared {
    /// Does what an EC2 request asks for.
    pub(crate) async fn ec2(&self, ask: &Ask) -> Response<Outgoing> {
        match self.ec2_once(&ask.region, &Query::parse(&ask.body)).await {
            Ok(element) => answer(200, &[("Content-Type", "text/xml;charset=UTF-8")], element.render()),
            Err(Wrong::Refused(code, message)) => refuse(400, code, &message),
            Err(Wrong::Said(status, body)) => answer(status, &[("Content-Type", "text/xml;charset=UTF-8")], body),
        }
    }

    /// What is asked with a client token is done once.
    async fn ec2_once(&self, region: &str, query: &Query) -> Done {
        // moto knows what would come of it.
        if query.is("DryRun") {
            return self.pass(region, query).await;
        }
        self.all_seen(query)?;
        let Some(token) = query.get("ClientToken") else { return self.ec2_seen(region, query).await };
        let key = (region.to_owned(), query.action().to_owned(), token.to_owned());
        let request = query.without("ClientToken").encode();
        let _starting = self.starting.lock().await;
        let earlier = lock(&self.state).tokens.get(&key).cloned();
        if let Some((before, said)) = earlier {
            if before != request {
                return wrong("IdempotentParameterMismatch", format!("the client token {token} was used for another {}", query.action()));
            }
            return Element::parse(&said).ok_or(Wrong::Said(500, Bytes::from(said)));
        }
        let done = self.ec2_seen(region, query).await?;
        lock(&self.state).tokens.insert(key, (request, done.render()));
        Ok(done)
    }

    /// Remembers what is made, and leaves out what cannot be seen yet.
    async fn ec2_seen(&self, region: &str, query: &Query) -> Done {
        let mut done = self.ec2_call(region, query).await?;
        let action = query.action();
        let mut faults = lock(&self.faults);
        for (_, path) in MAKES.iter().filter(|(call, _)| *call == action) {
            match path.split_once("/item/") {
                Some((set, name)) => done.items(set).iter().for_each(|item| faults.born(item.at(name))),
                None => faults.born(done.at(path)),
            }
        }
        if let ("ImportKeyPair" | "CreateKeyPair", Some(name)) = (action, query.get("KeyName")) {
            faults.born(&format!("key:{name}"));
        }
        if action.starts_with("Describe") {
            done.keep(&|item| !KNOWN_BY.iter().any(|name| faults.unseen(item.at(name))));
            done.keep(&|item| item.child("instancesSet").is_none_or(|set| !set.children.is_empty()));
        }
        Ok(done)
    }

    /// Refuses what names something that cannot be seen yet.
    fn all_seen(&self, query: &Query) -> Done<()> {
        let faults = lock(&self.faults);
        for (name, value) in query.pairs() {
            let id = if name.starts_with("KeyName") { format!("key:{value}") } else { value.clone() };
            if name.starts_with("Filter.") || name == "ClientToken" || !faults.unseen(&id) {
                continue;
            }
            let code = MISSING.iter().find(|(start, _)| id.starts_with(start)).map_or("InvalidParameterValue", |(_, code)| *code);
            return wrong(code, format!("'{value}' does not exist"));
        }
        Ok(())
    }

    pub(crate) async fn ec2_call(&self, region: &str, query: &Query) -> Done {
        match query.action() {
            "DescribeSnapshots" => self.describe_snapshots(region, query).await,
            "DeleteSnapshot" => self.delete_snapshot(region, query).await,
            "CopySnapshot" => self.copy_snapshot(region, query).await,
            "RegisterImage" => self.register_image(region, query).await,
            "CreateImage" => self.create_image(region, query).await,
            "CopyImage" => self.copy_image(region, query).await,
            "DescribeImages" => self.describe_images(region, query).await,
            "DeregisterImage" => self.deregister_image(region, query).await,
            "EnableImageDeprecation" | "DisableImageDeprecation" => self.deprecate(region, query),
            "RunInstances" | "StartInstances" | "StopInstances" | "TerminateInstances" => self.move_instances(region, query).await,
            "DescribeInstances" | "DescribeInstanceStatus" => self.describe_instances(region, query).await,
            "DescribeKeyPairs" => self.describe_keys(region, query).await,
            "DeleteKeyPair" => self.delete_key(region, query).await,
            "DeleteSecurityGroup" => self.delete_group(region, query).await,
            _ => self.pass(region, query).await,
        }
    }

    /// What moto answers.
    pub(crate) async fn pass(&self, region: &str, query: &Query) -> Done {
        let Some(moto) = &self.moto else {
            return Err(Wrong::Said(501, Bytes::from_static(b"there is no moto behind this front")));
        };
        moto.ec2(region, query).await.map_err(|(status, body)| Wrong::Said(status, body))
    }

    /// Makes a snapshot known to moto; gives its id.
    pub(crate) async fn new_snapshot(&self, region: &str, wish: &Wish) -> Result<String, String> {
        let Some(moto) = &self.moto else { return Ok(format!("snap-{}", self.number())) };
        let tags: Vec<_> = wish.tags.iter().map(|(key, value)| serde_json::json!({ "Key": key, "Value": value })).collect();
        let body = serde_json::json!({ "VolumeSize": wish.size, "Description": wish.description, "Tags": tags });
        let id = moto.start_snapshot(region, &body).await.map_err(|error| error.to_string())?;
        // moto made a volume for it, which AWS does not.
        let described = self.pass(region, &Query::new("DescribeSnapshots").with("SnapshotId.1", &id)).await;
        let volume = described.map(|described| described.at("snapshotSet/item/volumeId").to_owned()).unwrap_or_default();
        if !volume.is_empty() {
            drop(self.pass(region, &Query::new("DeleteVolume").with("VolumeId", volume)).await);
        }
        Ok(id)
    }

    /// 17 hex digits that were not given before.
    fn number(&self) -> String {
        let mut state = lock(&self.state);
        let count = state.snapshots.len() + state.tokens.len();
        let number = kiln_model::Digest::of(format!("{} {count}", self.secret)).hex();
        // Counts up even where nothing else does.
        state.tokens.insert((String::new(), String::new(), number.clone()), (String::new(), String::new()));
        number[..17].to_owned()
    }

    /// Gives tags to what has none yet.
    pub(crate) async fn tag(&self, region: &str, id: &str, tags: &[(String, String)]) -> Done<()> {
        if tags.is_empty() {
            return Ok(());
        }
        let mut query = Query::new("CreateTags").with("ResourceId.1", id);
        for (number, (key, value)) in (1..).zip(tags) {
            query = query.with(format!("Tag.{number}.Key"), key).with(format!("Tag.{number}.Value"), value);
        }
        self.pass(region, &query).await.map(drop)
    }

    async fn describe_snapshots(&self, region: &str, query: &Query) -> Done {
        let phantom = |id: &str| lock(&self.state).phantoms.contains(id);
        if let Some(id) = query.list("SnapshotId").into_iter().find(|id| phantom(id)) {
            return wrong("InvalidSnapshot.NotFound", format!("The snapshot '{id}' does not exist."));
        }
        // These moto would answer from what it believes.
        let (own, others): (Vec<Filter>, Vec<Filter>) =
            query.filters().into_iter().partition(|filter| ["status", "encrypted", "volume-size"].contains(&filter.name.as_str()));
        let mut said = self.pass(region, &query.filtered(&others)).await?;
        let owners = query.list("Owner");
        let state = lock(&self.state);
        let Some(set) = said.child_mut("snapshotSet") else { return Ok(said) };
        for item in &mut set.children {
            if let Some(snapshot) = state.snapshots.get(item.at("snapshotId")) {
                correct(item, snapshot, snapshot.status(state.settling));
            }
        }
        let name_of = |filter: &str| match filter {
            "status" => "status",
            "encrypted" => "encrypted",
            _ => "volumeSize",
        };
        set.children.retain(|item| {
            let owner = item.at("ownerId");
            !state.phantoms.contains(item.at("snapshotId"))
                && (owners.is_empty() || owners.iter().any(|wanted| *wanted == owner || *wanted == "self" && owner == ACCOUNT))
                && own.iter().all(|filter| filter.fits(item.at(name_of(&filter.name))))
        });
        drop(state);
        Ok(said)
    }

    async fn delete_snapshot(&self, region: &str, query: &Query) -> Done {
        let id = query.get("SnapshotId").unwrap_or_default();
        if lock(&self.state).phantoms.contains(id) {
            return wrong("InvalidSnapshot.NotFound", format!("The snapshot '{id}' does not exist."));
        }
        let user = lock(&self.state).images.values().find(|image| image.uses(id)).map(|image| image.id.clone());
        if let Some(image) = user {
            return wrong("InvalidSnapshot.InUse", format!("The snapshot {id} is currently in use by {image}"));
        }
        let said = self.pass(region, query).await?;
        lock(&self.state).snapshots.remove(id);
        Ok(said)
    }

    async fn copy_snapshot(&self, region: &str, query: &Query) -> Done {
        let (id, from) = (query.get("SourceSnapshotId").unwrap_or_default(), query.get("SourceRegion").unwrap_or_default());
        if query.get("KmsKeyId").is_some() && !query.is("Encrypted") {
            return wrong("InvalidParameterCombination", "KmsKeyId needs Encrypted");
        }
        let source = self.completed(from, id)?;
        let said = self.pass(region, query).await?;
        let copy = said.at("snapshotId").to_owned();
        self.adopt_copy(region, &copy, &source, query);
        Ok(said)
    }

    /// A copy that moto has made of a snapshot.
    pub(crate) fn adopt_copy(&self, region: &str, id: &str, source: &Snapshot, query: &Query) {
        let encrypted = query.is("Encrypted") || source.wish.encrypted;
        let kms_key = query.get("KmsKeyId").map(str::to_owned).or_else(|| source.wish.kms_key.clone());
        let wish = Wish { size: source.wish.size, encrypted, kms_key: kms_key.filter(|_| encrypted), ..Wish::default() };
        let mut snapshot = Snapshot::new(id, region, wish);
        snapshot.inherited = source.blocks();
        snapshot.stage = Stage::Sealed(std::time::Instant::now());
        lock(&self.state).snapshots.insert(id.to_owned(), snapshot);
    }

    /// A snapshot of the region that is completed.
    pub(crate) fn completed(&self, region: &str, id: &str) -> Done<Snapshot> {
        let state = lock(&self.state);
        let Some(snapshot) = state.snapshots.get(id).filter(|snapshot| snapshot.region == region) else {
            return wrong("InvalidSnapshot.NotFound", format!("The snapshot '{id}' does not exist."));
        };
        if snapshot.status(state.settling) != "completed" {
            return wrong("IncorrectState", format!("The snapshot '{id}' is not completed."));
        }
        Ok(snapshot.clone())
    }

    async fn delete_group(&self, region: &str, query: &Query) -> Done {
        if let Some(id) = query.get("GroupId") {
            let all = self.describe_instances(region, &Query::new("DescribeInstances")).await?;
            let mut instances = all.items("reservationSet").iter().flat_map(|reservation| reservation.items("instancesSet"));
            let uses = |instance: &&Element| {
                instance.at("instanceState/name") != "terminated"
                    && instance.items("groupSet").iter().any(|group| group.at("groupId") == id)
            };
            if let Some(instance) = instances.find(uses) {
                return wrong("DependencyViolation", format!("resource {id} has a dependent object: {}", instance.at("instanceId")));
            }
        }
        self.pass(region, query).await
    }
}

/// Puts right what moto says of a snapshot.
fn correct(item: &mut Element, snapshot: &Snapshot, status: &str) {
    item.set("status", status);
    item.set("progress", if status == "completed" { "100%" } else { "0%" });
    item.set("volumeSize", snapshot.wish.size.to_string());
    item.set("volumeId", "vol-ffffffff");
    item.set("encrypted", snapshot.wish.encrypted.to_string());
    if let Some(key) = &snapshot.wish.kms_key {
        item.set("kmsKeyId", key);
    }
}

/// The snapshot that moto made up for an image, in what it says of the image.
pub(crate) fn made_up(described: &Element) -> String {
    described.at("imagesSet/item/blockDeviceMapping/item/ebs/snapshotId").to_owned()
}

/// Tags that a call gives to an image and to its snapshots.
pub(crate) fn tags_of(query: &Query) -> images::Tags {
    images::Tags { image: query.tags("image"), snapshot: query.tags("snapshot") }
}
