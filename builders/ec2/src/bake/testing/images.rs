//! Its images and snapshots.

use std::collections::BTreeSet;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Here, LOOKS, Picture, error};
use crate::api::images::{Audience, Image, ImageCopy, ImageDisk, ImageState, Images, NewImage, Snapshot, SnapshotCopy, Use};
use crate::api::{Find, Result, Tags};

#[async_trait]
impl Images for Here {
    async fn images(&self, find: &Find) -> Result<Vec<Image>> {
        self.fake
            .call("DescribeImages", |world| {
                let mut all = Vec::new();
                for one in world.images.values_mut().filter(|one| one.region == self.region) {
                    one.looks += 1;
                    if one.looks >= LOOKS && one.image.state == ImageState::Pending {
                        one.image.state = ImageState::Available;
                    }
                    if !find.owners.is_empty() && !find.owners.contains(&one.image.owner) {
                        continue;
                    }
                    let mut words = vec![("name", one.image.name.clone()), ("owner-id", one.image.owner.clone())];
                    words.extend(one.image.root_snapshot().map(|id| ("block-device-mapping.snapshot-id", id.to_owned())));
                    all.push((one.image.id.clone(), one.image.tags.clone(), words, one.image.clone()));
                }
                world.pick(find, all, "InvalidAMIID.NotFound")
            })
            .await
    }

    async fn register(&self, _: &NewImage) -> Result<String> {
        panic!("a bake registers nothing")
    }

    async fn deregister(&self, image: &str) -> Result<()> {
        self.fake
            .call("DeregisterImage", |world| {
                let there = world.images.contains_key(image);
                world.known(image, there, "InvalidAMIID.NotFound")?;
                world.images.remove(image);
                Ok(())
            })
            .await
    }

    async fn copy_image(&self, copy: &ImageCopy) -> Result<String> {
        self.fake
            .call("CopyImage", |world| {
                let source = world.images.get(&copy.source).filter(|one| one.region == copy.source_region).cloned();
                let source = source.ok_or_else(|| error("InvalidAMIID.NotFound"))?;
                if source.image.state != ImageState::Available {
                    return Err(error("InvalidRequest"));
                }
                let mine = |one: &&Picture| one.region == self.region && one.image.name == copy.name;
                if let Some(one) = world.images.values().find(mine) {
                    // The only other user of that name is an earlier call with the token.
                    return Ok(one.image.id.clone());
                }
                let disks = source.image.disks.iter().map(|disk| {
                    let snapshot = world.snapshot(&self.region, copy.tags.clone());
                    ImageDisk { snapshot: Some(snapshot), ..disk.clone() }
                });
                let disks = disks.collect();
                let id = world.id("ami");
                let image = Image {
                    id: id.clone(),
                    name: copy.name.clone(),
                    owner: "self".into(),
                    state: ImageState::Pending,
                    disks,
                    tags: copy.tags.clone(),
                    ..source.image
                };
                world.images.insert(id.clone(), Picture { region: self.region.clone(), image, looks: 0, shared: BTreeSet::new() });
                Ok(id)
            })
            .await
    }

    async fn snapshots(&self, find: &Find) -> Result<Vec<Snapshot>> {
        self.fake
            .call("DescribeSnapshots", |world| {
                let all = world.snapshots.values().filter(|one| one.region == self.region).map(|one| one.snapshot.clone());
                let all = all.map(|one| (one.id.clone(), one.tags.clone(), vec![], one)).collect();
                world.pick(find, all, "InvalidSnapshot.NotFound")
            })
            .await
    }

    async fn copy_snapshot(&self, _: &SnapshotCopy) -> Result<String> {
        panic!("a bake copies images")
    }

    async fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        self.fake
            .call("DeleteSnapshot", |world| {
                let there = world.snapshots.contains_key(snapshot);
                world.known(snapshot, there, "InvalidSnapshot.NotFound")?;
                let uses = |one: &Picture| one.image.disks.iter().any(|disk| disk.snapshot.as_deref() == Some(snapshot));
                if world.images.values().any(uses) {
                    return Err(error("InvalidSnapshot.InUse"));
                }
                world.snapshots.remove(snapshot);
                Ok(())
            })
            .await
    }

    async fn tag(&self, ids: &[String], tags: &Tags) -> Result<()> {
        self.fake
            .call("CreateTags", |world| {
                for id in ids {
                    let there = world.resource(id).ok_or_else(|| error("InvalidAMIID.NotFound"))?;
                    there.extend(tags.clone());
                }
                Ok(())
            })
            .await
    }

    async fn share_image(&self, image: &str, with: &[Audience]) -> Result<()> {
        self.fake
            .call("ModifyImageAttribute", |world| {
                let one = world.images.get_mut(image).ok_or_else(|| error("InvalidAMIID.NotFound"))?;
                one.shared.extend(with.iter().cloned());
                Ok(())
            })
            .await
    }

    async fn shared_with(&self, image: &str) -> Result<Vec<Audience>> {
        self.fake.call("DescribeImageAttribute", |world| Ok(world.images[image].shared.iter().cloned().collect())).await
    }

    async fn share_snapshot(&self, snapshot: &str, accounts: &[String]) -> Result<()> {
        self.fake
            .call("ModifySnapshotAttribute", |world| {
                let one = world.snapshots.get_mut(snapshot).ok_or_else(|| error("InvalidSnapshot.NotFound"))?;
                one.shared.extend(accounts.iter().cloned());
                Ok(())
            })
            .await
    }

    async fn deprecate(&self, image: &str, at: Timestamp) -> Result<()> {
        self.fake
            .call("EnableImageDeprecation", |world| {
                let one = world.images.get_mut(image).ok_or_else(|| error("InvalidAMIID.NotFound"))?;
                one.image.deprecated = Some(at);
                Ok(())
            })
            .await
    }

    async fn uses(&self) -> Result<Vec<Use>> {
        panic!("a bake asks for no uses")
    }
}
