//! AMIs and snapshots.

use async_trait::async_trait;
use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types::{
    ArchitectureValues, BlockDeviceMapping, BootModeValues, EbsBlockDevice, Filter, ImageAttributeName, ImdsSupportValues,
    LaunchPermission, LaunchPermissionModifications, OperationType, PermissionGroup, ResourceType, SnapshotAttributeName, Tag,
    TagSpecification, VolumeType,
};
use jiff::Timestamp;

use super::{failed, time};
use crate::api::ebs::{Encryption, SnapshotState};
use crate::api::images::{Audience, Image, ImageCopy, ImageDisk, ImageState, Images, NewImage, Snapshot, SnapshotCopy, Use};
use crate::api::{CallError, Find, Kind, Result, Tags};

/// Results on one page.
const PAGE: i32 = 500;

/// States of instances that still need their AMI: all but `terminated`.
const ALIVE: [&str; 5] = ["pending", "running", "shutting-down", "stopping", "stopped"];

pub(super) struct Client(pub(super) aws_sdk_ec2::Client);

/// A list for the SDK, where an empty one means that nothing is said.
pub(crate) fn some<T: Clone>(list: &[T]) -> Option<Vec<T>> {
    (!list.is_empty()).then(|| list.to_vec())
}

pub(crate) fn filters(find: &Find) -> Option<Vec<Filter>> {
    let filters: Vec<Filter> =
        find.filters.iter().map(|(name, values)| Filter::builder().name(name).set_values(Some(values.clone())).build()).collect();
    some(&filters)
}

/// Ids and pages exclude each other.
pub(crate) fn page(find: &Find) -> Option<i32> {
    find.ids.is_empty().then_some(PAGE)
}

pub(super) fn tags_of(tags: &[Tag]) -> Tags {
    tags.iter().filter_map(|tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or_default().to_owned()))).collect()
}

pub(super) fn to_tags(tags: &Tags) -> Vec<Tag> {
    tags.iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect()
}

/// The tags of what is being made; none when there are none.
pub(super) fn specification(kind: ResourceType, tags: &Tags) -> Vec<TagSpecification> {
    if tags.is_empty() {
        return Vec::new();
    }
    vec![TagSpecification::builder().resource_type(kind).set_tags(Some(to_tags(tags))).build()]
}

pub(super) fn key(encryption: &Encryption) -> Option<String> {
    match encryption {
        Encryption::Inherited => None,
        Encryption::Key(arn) => Some(arn.clone()),
    }
}

/// An answer that lacks what it must have.
pub(super) fn lacks(action: &'static str, what: &str) -> CallError {
    CallError { action, code: String::new(), message: format!("the answer has no {what}"), kind: Kind::Other, source: None }
}

pub(super) fn gib(size: Option<i32>) -> Option<u32> {
    size.and_then(|size| u32::try_from(size).ok())
}

/// One as kiln sees it; `None` for one without an id.
fn image(image: &aws_sdk_ec2::types::Image) -> Option<Image> {
    use aws_sdk_ec2::types::ImageState as State;
    let disk = |mapping: &BlockDeviceMapping| {
        let ebs = mapping.ebs()?;
        let device = mapping.device_name().unwrap_or_default().to_owned();
        Some(ImageDisk { device, snapshot: ebs.snapshot_id().map(Into::into), gib: gib(ebs.volume_size()) })
    };
    Some(Image {
        id: image.image_id()?.to_owned(),
        name: image.name().unwrap_or_default().to_owned(),
        owner: image.owner_id().unwrap_or_default().to_owned(),
        state: match image.state() {
            Some(State::Available) => ImageState::Available,
            Some(State::Pending | State::Transient) => ImageState::Pending,
            _ => ImageState::Failed,
        },
        reason: image.state_reason().and_then(|reason| reason.message()).map(Into::into),
        created: image.creation_date().and_then(time),
        architecture: image.architecture().map(|one| one.as_str().to_owned()).unwrap_or_default(),
        boot_mode: image.boot_mode().map(|mode| mode.as_str().to_owned()),
        root: image.root_device_name().map(Into::into),
        disks: image.block_device_mappings().iter().filter_map(disk).collect(),
        tags: tags_of(image.tags()),
        deprecated: image.deprecation_time().and_then(time),
    })
}

fn snapshot(snapshot: &aws_sdk_ec2::types::Snapshot) -> Option<Snapshot> {
    use aws_sdk_ec2::types::SnapshotState as State;
    Some(Snapshot {
        id: snapshot.snapshot_id()?.to_owned(),
        state: match snapshot.state() {
            Some(State::Completed) => SnapshotState::Completed,
            Some(State::Error) => SnapshotState::Failed,
            _ => SnapshotState::Pending,
        },
        gib: gib(snapshot.volume_size()).unwrap_or(0),
        started: snapshot.start_time().and_then(|at| Timestamp::new(at.secs(), 0).ok()),
        key: snapshot.kms_key_id().map(Into::into),
        encrypted: snapshot.encrypted().unwrap_or(false),
        tags: tags_of(snapshot.tags()),
    })
}

fn permission(audience: &Audience) -> LaunchPermission {
    let permission = LaunchPermission::builder();
    match audience {
        Audience::Account(account) => permission.user_id(account),
        Audience::Organization(arn) => permission.organization_arn(arn),
        Audience::Unit(arn) => permission.organizational_unit_arn(arn),
        Audience::All => permission.group(PermissionGroup::All),
    }
    .build()
}

fn audience(permission: &LaunchPermission) -> Option<Audience> {
    let text = |text: Option<&str>| text.map(ToOwned::to_owned);
    let account = text(permission.user_id()).map(Audience::Account);
    let organization = || text(permission.organization_arn()).map(Audience::Organization);
    let unit = || text(permission.organizational_unit_arn()).map(Audience::Unit);
    account.or_else(organization).or_else(unit).or_else(|| permission.group().map(|_| Audience::All))
}

#[async_trait]
impl Images for Client {
    async fn images(&self, find: &Find) -> Result<Vec<Image>> {
        let (mut all, mut next) = (Vec::new(), None);
        loop {
            let call = self.0.describe_images().set_image_ids(some(&find.ids)).set_owners(some(&find.owners)).set_filters(filters(find));
            let call = call.include_deprecated(true).set_max_results(page(find)).set_next_token(next);
            let answer = call.send().await.map_err(|error| failed("DescribeImages", error))?;
            all.extend(answer.images().iter().filter_map(image));
            next = answer.next_token().filter(|next| !next.is_empty()).map(Into::into);
            if next.is_none() {
                return Ok(all);
            }
        }
    }

    async fn register(&self, new: &NewImage) -> Result<String> {
        const ACTION: &str = "RegisterImage";
        let disk = |disk: &crate::api::images::NewDisk| {
            let ebs = EbsBlockDevice::builder()
                .snapshot_id(&disk.snapshot)
                .volume_size(i32::try_from(disk.gib).unwrap_or(i32::MAX))
                .volume_type(VolumeType::from(disk.volume_type.as_str()))
                .delete_on_termination(true);
            BlockDeviceMapping::builder().device_name(&disk.device).ebs(ebs.build()).build()
        };
        let call = self
            .0
            .register_image()
            .name(&new.name)
            .description(&new.description)
            .architecture(ArchitectureValues::from(new.architecture.as_str()))
            .boot_mode(BootModeValues::from(new.boot_mode.as_str()))
            .virtualization_type("hvm")
            .ena_support(true)
            .sriov_net_support("simple")
            .imds_support(ImdsSupportValues::from("v2.0"))
            .set_root_device_name(new.disks.first().map(|disk| disk.device.clone()))
            .set_block_device_mappings(Some(new.disks.iter().map(disk).collect()))
            .set_tag_specifications(some(&specification(ResourceType::Image, &new.tags)));
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        answer.image_id().map(Into::into).ok_or_else(|| lacks(ACTION, "ImageId"))
    }

    async fn deregister(&self, image: &str) -> Result<()> {
        self.0.deregister_image().image_id(image).send().await.map(drop).map_err(|error| failed("DeregisterImage", error))
    }

    async fn copy_image(&self, copy: &ImageCopy) -> Result<String> {
        const ACTION: &str = "CopyImage";
        let key = key(&copy.encryption);
        let tags = [specification(ResourceType::Image, &copy.tags), specification(ResourceType::Snapshot, &copy.tags)].concat();
        let call = self
            .0
            .copy_image()
            .client_token(&copy.token)
            .source_image_id(&copy.source)
            .source_region(&copy.source_region)
            .name(&copy.name)
            .description(&copy.description)
            .set_encrypted(key.as_ref().map(|_| true))
            .set_kms_key_id(key)
            .set_tag_specifications(some(&tags));
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        answer.image_id().map(Into::into).ok_or_else(|| lacks(ACTION, "ImageId"))
    }

    async fn snapshots(&self, find: &Find) -> Result<Vec<Snapshot>> {
        let (mut all, mut next) = (Vec::new(), None);
        loop {
            let call = self.0.describe_snapshots().set_snapshot_ids(some(&find.ids)).set_owner_ids(some(&find.owners));
            let call = call.set_filters(filters(find)).set_max_results(page(find)).set_next_token(next);
            let answer = call.send().await.map_err(|error| failed("DescribeSnapshots", error))?;
            all.extend(answer.snapshots().iter().filter_map(snapshot));
            next = answer.next_token().filter(|next| !next.is_empty()).map(Into::into);
            if next.is_none() {
                return Ok(all);
            }
        }
    }

    async fn copy_snapshot(&self, copy: &SnapshotCopy) -> Result<String> {
        const ACTION: &str = "CopySnapshot";
        let key = key(&copy.encryption);
        let call = self
            .0
            .copy_snapshot()
            .source_region(&copy.source_region)
            .source_snapshot_id(&copy.source)
            .description(&copy.description)
            .set_encrypted(key.as_ref().map(|_| true))
            .set_kms_key_id(key)
            .set_tag_specifications(some(&specification(ResourceType::Snapshot, &copy.tags)));
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        answer.snapshot_id().map(Into::into).ok_or_else(|| lacks(ACTION, "SnapshotId"))
    }

    async fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        self.0.delete_snapshot().snapshot_id(snapshot).send().await.map(drop).map_err(|error| failed("DeleteSnapshot", error))
    }

    async fn tag(&self, ids: &[String], tags: &Tags) -> Result<()> {
        let call = self.0.create_tags().set_resources(some(ids)).set_tags(Some(to_tags(tags)));
        call.send().await.map(drop).map_err(|error| failed("CreateTags", error))
    }

    async fn share_image(&self, image: &str, with: &[Audience]) -> Result<()> {
        let add = LaunchPermissionModifications::builder().set_add(Some(with.iter().map(permission).collect())).build();
        let call = self.0.modify_image_attribute().image_id(image).attribute("launchPermission").launch_permission(add);
        call.send().await.map(drop).map_err(|error| failed("ModifyImageAttribute", error))
    }

    async fn shared_with(&self, image: &str) -> Result<Vec<Audience>> {
        let call = self.0.describe_image_attribute().image_id(image).attribute(ImageAttributeName::LaunchPermission);
        let answer = call.send().await.map_err(|error| failed("DescribeImageAttribute", error))?;
        Ok(answer.launch_permissions().iter().filter_map(audience).collect())
    }

    async fn share_snapshot(&self, snapshot: &str, accounts: &[String]) -> Result<()> {
        let call = self
            .0
            .modify_snapshot_attribute()
            .snapshot_id(snapshot)
            .attribute(SnapshotAttributeName::CreateVolumePermission)
            .operation_type(OperationType::Add)
            .set_user_ids(some(accounts));
        call.send().await.map(drop).map_err(|error| failed("ModifySnapshotAttribute", error))
    }

    async fn deprecate(&self, image: &str, at: Timestamp) -> Result<()> {
        // To the minute: AWS rounds.
        let at = DateTime::from_secs(at.as_second());
        let call = self.0.enable_image_deprecation().image_id(image).deprecate_at(at);
        call.send().await.map(drop).map_err(|error| failed("EnableImageDeprecation", error))
    }

    async fn uses(&self) -> Result<Vec<Use>> {
        let mut uses = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let alive = Filter::builder().name("instance-state-name").set_values(Some(ALIVE.map(String::from).to_vec())).build();
            let call = self.0.describe_instances().filters(alive).max_results(PAGE).set_next_token(next);
            let answer = call.send().await.map_err(|error| failed("DescribeInstances", error))?;
            for instance in answer.reservations().iter().flat_map(|reservation| reservation.instances()) {
                if let (Some(image), Some(id)) = (instance.image_id(), instance.instance_id()) {
                    uses.push(Use { image: image.to_owned(), by: id.to_owned() });
                }
            }
            next = answer.next_token().filter(|next| !next.is_empty()).map(Into::into);
            if next.is_none() {
                break;
            }
        }
        for template in self.launch_templates().await? {
            let mut next: Option<String> = None;
            loop {
                let call = self.0.describe_launch_template_versions().launch_template_id(&template).set_next_token(next);
                let answer = call.send().await.map_err(|error| failed("DescribeLaunchTemplateVersions", error))?;
                for version in answer.launch_template_versions() {
                    if let Some(image) = version.launch_template_data().and_then(|data| data.image_id()) {
                        let number = version.version_number().unwrap_or_default();
                        uses.push(Use { image: image.to_owned(), by: format!("{template} version {number}") });
                    }
                }
                next = answer.next_token().filter(|next| !next.is_empty()).map(Into::into);
                if next.is_none() {
                    break;
                }
            }
        }
        Ok(uses)
    }
}

impl Client {
    /// Ids of the launch templates.
    async fn launch_templates(&self) -> Result<Vec<String>> {
        let (mut all, mut next) = (Vec::new(), None::<String>);
        loop {
            let call = self.0.describe_launch_templates().max_results(200).set_next_token(next);
            let answer = call.send().await.map_err(|error| failed("DescribeLaunchTemplates", error))?;
            all.extend(answer.launch_templates().iter().filter_map(|template| template.launch_template_id()).map(ToOwned::to_owned));
            next = answer.next_token().filter(|next| !next.is_empty()).map(Into::into);
            if next.is_none() {
                return Ok(all);
            }
        }
    }
}
