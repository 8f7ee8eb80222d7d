//! AMIs and snapshots.

use std::time::Instant;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Ami, Carried, Service, Snap, by_tag};
use crate::api::ebs::{Encryption, NewSnapshot, SnapshotState};
use crate::api::images::{Audience, Image, ImageCopy, ImageDisk, ImageState, Images, NewImage, Snapshot, SnapshotCopy, Use};
use crate::api::{CallError, Find, Result, Tags};

impl Carried<'_> {
    /// An AMI that can be seen.
    fn ami(&mut self, id: &str) -> Result<&mut Ami> {
        let (action, lag) = (self.action, self.lag);
        let found = self.here().images.get_mut(id).filter(|ami| ami.since.elapsed() >= lag);
        found.ok_or_else(|| CallError::answered(action, 400, "InvalidAMIID.NotFound", "no such AMI"))
    }

    fn disk_of(&mut self, id: &str) -> Result<&mut Snap> {
        let (action, lag) = (self.action, self.lag);
        let found = self.here().snapshots.get_mut(id).filter(|snapshot| snapshot.since.elapsed() >= lag);
        found.ok_or_else(|| CallError::answered(action, 400, "InvalidSnapshot.NotFound", "no such snapshot"))
    }

    fn unnamed(&mut self, name: &str) -> Result<()> {
        if self.here().images.values().any(|ami| ami.image.name == name) {
            return self.fails("InvalidAMIName.Duplicate", "the name is taken");
        }
        Ok(())
    }

    fn add(&mut self, mut image: Image, ready: Instant) -> String {
        image.id = format!("ami-{:017x}", self.id);
        let id = image.id.clone();
        self.here().images.insert(id.clone(), Ami { image, audience: Vec::new(), since: Instant::now(), ready });
        id
    }
}

#[async_trait]
impl Images for Service {
    async fn images(&self, find: &Find) -> Result<Vec<Image>> {
        self.call("DescribeImages", |call| {
            for id in &find.ids {
                call.ami(id)?;
            }
            let lag = call.lag;
            let all = call.here().images.values().filter(|ami| ami.since.elapsed() >= lag).map(|ami| {
                let mut image = ami.image.clone();
                if ami.ready > Instant::now() {
                    image.state = ImageState::Pending;
                }
                image
            });
            let wanted = |image: &Image| {
                let by = |filter: &(String, Vec<String>)| match by_tag(filter, &image.tags) {
                    Some(fits) => fits,
                    None => match filter.0.as_str() {
                        "name" => filter.1.contains(&image.name),
                        other => panic!("no filter {other}"),
                    },
                };
                (find.ids.is_empty() || find.ids.contains(&image.id)) && find.filters.iter().all(by)
            };
            Ok(all.filter(wanted).collect())
        })
    }

    async fn register(&self, new: &NewImage) -> Result<String> {
        self.call("RegisterImage", |call| {
            call.unnamed(&new.name)?;
            let good = |c: char| c.is_ascii_alphanumeric() || "()[]./-'@_ ".contains(c);
            if !(3..=128).contains(&new.name.len()) || !new.name.chars().all(good) || new.disks.is_empty() {
                return call.fails("InvalidAMIName.Malformed", "the name or the disks are wrong");
            }
            for disk in &new.disks {
                let snapshot = call.disk_of(&disk.snapshot)?;
                let (state, gib) = (snapshot.state(), snapshot.asked.gib);
                if state != SnapshotState::Completed || disk.gib < gib {
                    return call.fails("InvalidParameterValue", "the snapshot is not completed, or larger than the disk");
                }
            }
            let disk = |disk: &crate::api::images::NewDisk| ImageDisk {
                device: disk.device.clone(),
                snapshot: Some(disk.snapshot.clone()),
                gib: Some(disk.gib),
            };
            let image = Image {
                id: String::new(),
                name: new.name.clone(),
                owner: "111122223333".into(),
                state: ImageState::Available,
                reason: None,
                created: Some(Timestamp::now()),
                architecture: new.architecture.clone(),
                boot_mode: Some(new.boot_mode.clone()),
                root: new.disks.first().map(|disk| disk.device.clone()),
                disks: new.disks.iter().map(disk).collect(),
                tags: new.tags.clone(),
                deprecated: None,
            };
            Ok(call.add(image, Instant::now()))
        })
    }

    async fn deregister(&self, image: &str) -> Result<()> {
        self.call("DeregisterImage", |call| {
            call.ami(image)?;
            call.here().images.remove(image);
            Ok(())
        })
    }

    async fn copy_image(&self, copy: &ImageCopy) -> Result<String> {
        self.call("CopyImage", |call| {
            if let Some(there) = call.here().copies.get(&copy.token) {
                return Ok(there.clone());
            }
            call.unnamed(&copy.name)?;
            let lag = call.lag;
            let source = call.state.regions.get(&copy.source_region);
            let source = source.and_then(|region| region.images.get(&copy.source)).filter(|ami| ami.since.elapsed() >= lag);
            let Some(source) = source.map(|ami| ami.image.clone()) else {
                return call.fails("InvalidAMIID.NotFound", "no such AMI");
            };
            let ready = Instant::now() + call.making;
            let mut image = Image { name: copy.name.clone(), tags: copy.tags.clone(), created: Some(Timestamp::now()), ..source };
            for (number, disk) in image.disks.iter_mut().enumerate() {
                let from = disk.snapshot.clone().unwrap();
                let from = &call.state.regions[&copy.source_region].snapshots[&from];
                let key = match &copy.encryption {
                    Encryption::Inherited => from.key.clone(),
                    Encryption::Key(arn) => Some(arn.clone()),
                };
                let asked = NewSnapshot { token: String::new(), ..from.asked.clone() };
                let snapshot = Snap {
                    asked,
                    blocks: from.blocks.clone(),
                    written: std::collections::BTreeMap::new(),
                    tags: copy.tags.clone(),
                    key,
                    accounts: Vec::new(),
                    began: Timestamp::now(),
                    since: Instant::now(),
                    completed: Some(ready),
                };
                let id = format!("snap-c{number}{:015x}", call.id);
                call.here().snapshots.insert(id.clone(), snapshot);
                disk.snapshot = Some(id);
            }
            let id = call.add(image, ready);
            call.here().copies.insert(copy.token.clone(), id.clone());
            Ok(id)
        })
    }

    async fn snapshots(&self, find: &Find) -> Result<Vec<Snapshot>> {
        self.call("DescribeSnapshots", |call| {
            for id in &find.ids {
                call.disk_of(id)?;
            }
            let lag = call.lag;
            let all = call.here().snapshots.iter().filter(|(_, there)| there.since.elapsed() >= lag);
            let all = all.map(|(id, there)| Snapshot {
                id: id.clone(),
                state: there.state(),
                gib: there.asked.gib,
                started: Some(there.began),
                key: there.key.clone(),
                encrypted: there.key.is_some(),
                tags: there.tags.clone(),
            });
            let by = |filter: &(String, Vec<String>), tags: &Tags| by_tag(filter, tags).expect("a filter by tags");
            let wanted = |snapshot: &Snapshot| {
                (find.ids.is_empty() || find.ids.contains(&snapshot.id)) && find.filters.iter().all(|filter| by(filter, &snapshot.tags))
            };
            Ok(all.filter(wanted).collect())
        })
    }

    async fn copy_snapshot(&self, _: &SnapshotCopy) -> Result<String> {
        panic!("nobody copies a snapshot by itself: that call has no client token")
    }

    async fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        self.call("DeleteSnapshot", |call| {
            call.disk_of(snapshot)?;
            let used = |ami: &Ami| ami.image.disks.iter().any(|disk| disk.snapshot.as_deref() == Some(snapshot));
            if call.here().images.values().any(used) {
                return call.fails("InvalidSnapshot.InUse", "an AMI needs it");
            }
            call.here().snapshots.remove(snapshot);
            Ok(())
        })
    }

    async fn tag(&self, ids: &[String], tags: &Tags) -> Result<()> {
        self.call("CreateTags", |call| {
            for id in ids {
                let there = match id.starts_with("ami-") {
                    true => &mut call.ami(id)?.image.tags,
                    false => &mut call.disk_of(id)?.tags,
                };
                there.extend(tags.clone());
                assert!(there.len() <= 50, "AWS takes 50 tags");
            }
            Ok(())
        })
    }

    async fn share_image(&self, image: &str, with: &[Audience]) -> Result<()> {
        self.call("ModifyImageAttribute", |call| {
            let there = &mut call.ami(image)?.audience;
            there.extend(with.iter().cloned());
            there.sort();
            there.dedup();
            Ok(())
        })
    }

    async fn shared_with(&self, image: &str) -> Result<Vec<Audience>> {
        self.call("DescribeImageAttribute", |call| Ok(call.ami(image)?.audience.clone()))
    }

    async fn share_snapshot(&self, snapshot: &str, accounts: &[String]) -> Result<()> {
        self.call("ModifySnapshotAttribute", |call| {
            let there = &mut call.disk_of(snapshot)?.accounts;
            there.extend(accounts.iter().cloned());
            there.sort();
            there.dedup();
            Ok(())
        })
    }

    async fn deprecate(&self, image: &str, at: Timestamp) -> Result<()> {
        self.call("EnableImageDeprecation", |call| {
            call.ami(image)?.image.deprecated = Some(at);
            Ok(())
        })
    }

    async fn uses(&self) -> Result<Vec<Use>> {
        self.call("DescribeInstances", |call| Ok(call.here().uses.clone()))
    }
}
