//! Instances, key pairs, security groups, networks and volumes of it.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Computer, Here, Known, Part, Picture, error};
use crate::api::images::{Image, ImageDisk, ImageState};
use crate::api::machines::{Instance, InstanceState, Machines, Named, NewCapture, NewGroup, NewInstance, SpotRequest, Subnet, Volume};
use crate::api::{Find, Result, Tags};

fn named(all: &BTreeMap<String, Part>, region: &str, word: &'static str) -> Vec<Known<'static, Named>> {
    let here = all.iter().filter(|(_, part)| part.region == region);
    here.map(|(id, part)| {
        let named = Named { id: id.clone(), name: part.name.clone(), tags: part.tags.clone() };
        (id.clone(), part.tags.clone(), vec![(word, part.name.clone())], named)
    })
    .collect()
}

#[async_trait]
impl Machines for Here {
    async fn run(&self, new: &NewInstance) -> Result<Instance> {
        self.fake
            .call("RunInstances", |world| {
                if let Some(one) = world.instances.values().find(|one| one.wanted.token == new.token) {
                    return if one.wanted == *new { Ok(one.instance.clone()) } else { Err(error("IdempotentParameterMismatch")) };
                }
                let image = world.images.get(&new.image).filter(|one| one.region == self.region);
                if !image.is_some_and(|one| one.image.state == ImageState::Available) {
                    return Err(error("InvalidAMIID.NotFound"));
                }
                let key = world.keys.iter().find(|(_, key)| key.region == self.region && key.name == new.key).map(|(id, _)| id.clone());
                world.known(&key.clone().unwrap_or_default(), key.is_some(), "InvalidKeyPair.NotFound")?;
                assert!(!new.groups.is_empty(), "an instance in no group is open to whom the default one lets in");
                for group in new.groups.iter().filter(|group| *group != "sg-0aaa") {
                    let there = world.groups.contains_key(group);
                    world.known(group, there, "InvalidGroup.NotFound")?;
                }
                if world.scarce.contains(&new.instance_type) {
                    return Err(error("InsufficientInstanceCapacity"));
                }
                let id = world.id("i");
                for volume in &new.volumes {
                    let part = Part { region: self.region.clone(), name: volume.device.clone(), tags: new.tags.clone(), open: vec![] };
                    let volume = world.id("vol");
                    world.volumes.insert(volume, (part, id.clone()));
                }
                let spot_request = new.spot.as_ref().map(|_| {
                    let part = Part { region: self.region.clone(), name: String::new(), tags: new.tags.clone(), open: vec![] };
                    let request = world.id("sir");
                    world.spots.insert(request.clone(), (part, true));
                    request
                });
                let instance = Instance {
                    id: id.clone(),
                    state: InstanceState::Pending,
                    reason: None,
                    public_address: None,
                    private_address: None,
                    spot_request,
                    tags: new.tags.clone(),
                };
                let one = Computer { region: self.region.clone(), instance: instance.clone(), wanted: new.clone(), looks: 0 };
                world.instances.insert(id, one);
                Ok(instance)
            })
            .await
    }

    async fn instances(&self, find: &Find) -> Result<Vec<Instance>> {
        self.fake
            .call("DescribeInstances", |world| {
                let ids: Vec<String> =
                    world.instances.values().filter(|one| one.region == self.region).map(|one| one.instance.id.clone()).collect();
                ids.iter().for_each(|id| world.moves_on(id));
                let all = ids.iter().map(|id| world.instances[id].instance.clone());
                let all = all.map(|one| (one.id.clone(), one.tags.clone(), vec![], one)).collect();
                world.pick(find, all, "InvalidInstanceID.NotFound")
            })
            .await
    }

    async fn stop(&self, instance: &str) -> Result<()> {
        self.fake
            .call("StopInstances", |world| {
                let there = world.instances.contains_key(instance);
                world.known(instance, there, "InvalidInstanceID.NotFound")?;
                let one = world.instances.get_mut(instance).unwrap();
                match one.instance.state {
                    InstanceState::Running => (one.instance.state, one.looks) = (InstanceState::Stopping, 0),
                    InstanceState::Stopping | InstanceState::Stopped => {}
                    _ => return Err(error("IncorrectInstanceState")),
                }
                Ok(())
            })
            .await
    }

    async fn terminate(&self, instance: &str) -> Result<()> {
        self.fake
            .call("TerminateInstances", |world| {
                let there = world.instances.contains_key(instance);
                world.known(instance, there, "InvalidInstanceID.NotFound")?;
                let one = world.instances.get_mut(instance).unwrap();
                if one.instance.state != InstanceState::Terminated {
                    (one.instance.state, one.looks) = (InstanceState::ShuttingDown, 0);
                }
                Ok(())
            })
            .await
    }

    async fn console(&self, _: &str) -> Result<Option<String>> {
        self.fake.call("GetConsoleOutput", |world| Ok(world.console.clone())).await
    }

    async fn spot_requests(&self, find: &Find) -> Result<Vec<SpotRequest>> {
        self.fake
            .call("DescribeSpotInstanceRequests", |world| {
                let all = world.spots.iter().filter(|(_, (part, _))| part.region == self.region);
                let all = all.map(|(id, (part, live))| {
                    let request = SpotRequest { id: id.clone(), live: *live, tags: part.tags.clone() };
                    (id.clone(), part.tags.clone(), vec![], request)
                });
                let all = all.collect();
                world.pick(find, all, "InvalidSpotInstanceRequestID.NotFound")
            })
            .await
    }

    async fn cancel_spot(&self, request: &str) -> Result<()> {
        self.fake
            .call("CancelSpotInstanceRequests", |world| {
                world.spots.get_mut(request).ok_or_else(|| error("InvalidSpotInstanceRequestID.NotFound"))?.1 = false;
                Ok(())
            })
            .await
    }

    async fn import_key(&self, name: &str, public: &str, tags: &Tags) -> Result<String> {
        self.fake
            .call("ImportKeyPair", |world| {
                if !public.starts_with("ssh-ed25519 ") {
                    return Err(error("InvalidKey.Format"));
                }
                if world.keys.values().any(|key| key.region == self.region && key.name == name) {
                    return Err(error("InvalidKeyPair.Duplicate"));
                }
                let id = world.id("key");
                world.keys.insert(id.clone(), Part { region: self.region.clone(), name: name.into(), tags: tags.clone(), open: vec![] });
                Ok(id)
            })
            .await
    }

    async fn keys(&self, find: &Find) -> Result<Vec<Named>> {
        self.fake
            .call("DescribeKeyPairs", |world| {
                let all = named(&world.keys, &self.region, "key-name");
                world.pick(find, all, "InvalidKeyPair.NotFound")
            })
            .await
    }

    async fn delete_key(&self, key: &str) -> Result<()> {
        self.fake
            .call("DeleteKeyPair", |world| {
                world.keys.remove(key);
                Ok(())
            })
            .await
    }

    async fn create_group(&self, group: &NewGroup) -> Result<String> {
        self.fake
            .call("CreateSecurityGroup", |world| {
                if world.groups.values().any(|other| other.region == self.region && other.name == group.name) {
                    return Err(error("InvalidGroup.Duplicate"));
                }
                let id = world.id("sg");
                let part = Part { region: self.region.clone(), name: group.name.clone(), tags: group.tags.clone(), open: vec![] };
                world.groups.insert(id.clone(), part);
                Ok(id)
            })
            .await
    }

    async fn open_group(&self, group: &str, port: u16, networks: &[String]) -> Result<()> {
        self.fake
            .call("AuthorizeSecurityGroupIngress", |world| {
                let there = world.groups.contains_key(group);
                world.known(group, there, "InvalidGroup.NotFound")?;
                assert_eq!(port, 22);
                let open = &mut world.groups.get_mut(group).unwrap().open;
                if networks.iter().any(|network| open.contains(network)) {
                    return Err(error("InvalidPermission.Duplicate"));
                }
                open.extend(networks.iter().cloned());
                Ok(())
            })
            .await
    }

    async fn groups(&self, find: &Find) -> Result<Vec<Named>> {
        self.fake
            .call("DescribeSecurityGroups", |world| {
                let all = named(&world.groups, &self.region, "group-name");
                world.pick(find, all, "InvalidGroup.NotFound")
            })
            .await
    }

    async fn delete_group(&self, group: &str) -> Result<()> {
        self.fake
            .call("DeleteSecurityGroup", |world| {
                let there = world.groups.contains_key(group);
                world.known(group, there, "InvalidGroup.NotFound")?;
                let uses =
                    |one: &Computer| one.instance.state != InstanceState::Terminated && one.wanted.groups.iter().any(|id| id == group);
                if world.instances.values().any(uses) {
                    return Err(error("DependencyViolation"));
                }
                world.groups.remove(group);
                Ok(())
            })
            .await
    }

    async fn volumes(&self, find: &Find) -> Result<Vec<Volume>> {
        self.fake
            .call("DescribeVolumes", |world| {
                let all = world.volumes.iter().filter(|(_, (part, _))| part.region == self.region);
                let all = all.map(|(id, (part, instance))| {
                    let in_use = world.instances.get(instance).is_some_and(|one| one.instance.state != InstanceState::Terminated);
                    let volume = Volume { id: id.clone(), in_use, deleting: false, tags: part.tags.clone() };
                    (id.clone(), part.tags.clone(), vec![], volume)
                });
                let all = all.collect();
                world.pick(find, all, "InvalidVolume.NotFound")
            })
            .await
    }

    async fn delete_volume(&self, volume: &str) -> Result<()> {
        self.fake.call("DeleteVolume", |world| world.volumes.remove(volume).map(drop).ok_or_else(|| error("InvalidVolume.NotFound"))).await
    }

    async fn create_image(&self, capture: &NewCapture) -> Result<String> {
        self.fake
            .call("CreateImage", |world| {
                let there = world.instances.contains_key(&capture.instance);
                world.known(&capture.instance, there, "InvalidInstanceID.NotFound")?;
                let one = world.instances[&capture.instance].clone();
                if one.instance.state != InstanceState::Stopped {
                    return Err(error("IncorrectState"));
                }
                if world.images.values().any(|other| other.region == self.region && other.image.name == capture.name) {
                    return Err(error("InvalidAMIName.Duplicate"));
                }
                if !(3..=128).contains(&capture.name.len()) {
                    return Err(error("InvalidAMIName.Malformed"));
                }
                let disks = one.wanted.volumes.iter().map(|volume| {
                    let snapshot = world.snapshot(&self.region, capture.tags.clone());
                    ImageDisk { device: volume.device.clone(), snapshot: Some(snapshot), gib: volume.gib.or(Some(8)) }
                });
                let disks = disks.collect();
                let id = world.id("ami");
                let source = world.images[&one.wanted.image].image.clone();
                let image = Image {
                    id: id.clone(),
                    name: capture.name.clone(),
                    owner: "self".into(),
                    state: ImageState::Pending,
                    disks,
                    tags: capture.tags.clone(),
                    created: Some(Timestamp::UNIX_EPOCH),
                    ..source
                };
                world.images.insert(id.clone(), Picture { region: self.region.clone(), image, looks: 0, shared: BTreeSet::new() });
                Ok(id)
            })
            .await
    }

    async fn subnets(&self, find: &Find) -> Result<Vec<Subnet>> {
        self.fake
            .call("DescribeSubnets", |world| {
                let all =
                    [("subnet-0a", "vpc-01", 9), ("subnet-0b", "vpc-01", 200), ("subnet-0c", "vpc-02", 250), ("subnet-0d", "vpc-01", 0)];
                let all = all.map(|(id, vpc, free)| {
                    let words = vec![("vpc-id", vpc.to_owned()), ("subnet-id", id.to_owned())];
                    let tags = Tags::from([("Name".to_owned(), format!("of {vpc}"))]);
                    (id.to_owned(), tags, words, Subnet { id: id.into(), vpc: vpc.into(), free })
                });
                world.pick(find, all.into(), "InvalidSubnetID.NotFound")
            })
            .await
    }

    async fn vpcs(&self, find: &Find) -> Result<Vec<String>> {
        self.fake
            .call("DescribeVpcs", |world| {
                let all = ["vpc-01", "vpc-02"].map(|id| {
                    let tags = Tags::from([("Name".to_owned(), "build".to_owned()), ("Own".to_owned(), id.to_owned())]);
                    (id.to_owned(), tags, vec![("vpc-id", id.to_owned())], id.to_owned())
                });
                world.pick(find, all.into(), "InvalidVpcID.NotFound")
            })
            .await
    }

    async fn untag(&self, ids: &[String], keys: &[String]) -> Result<()> {
        self.fake
            .call("DeleteTags", |world| {
                if let Some(id) = ids.iter().find(|id| world.resource(id).is_none()) {
                    return Err(error(if id.starts_with("ami-") { "InvalidAMIID.NotFound" } else { "InvalidSnapshot.NotFound" }));
                }
                for tags in ids.iter().filter_map(|id| world.resource(id).map(std::mem::take).map(|tags| (id, tags))).collect::<Vec<_>>() {
                    let (id, mut tags) = tags;
                    tags.retain(|key, _| !keys.contains(key));
                    *world.resource(id).unwrap() = tags;
                }
                Ok(())
            })
            .await
    }
}
