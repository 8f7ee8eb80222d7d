//! Instances, and what they need.

use async_trait::async_trait;
use aws_sdk_ec2::primitives::Blob;
use aws_sdk_ec2::types::{
    BlockDeviceMapping, EbsBlockDevice, HttpTokensState, IamInstanceProfileSpecification, InstanceInterruptionBehavior,
    InstanceMarketOptionsRequest, InstanceMetadataEndpointState, InstanceMetadataOptionsRequest, InstanceNetworkInterfaceSpecification,
    InstanceStateName, InstanceType, IpPermission, IpRange, Ipv6Range, MarketType, ResourceType, ShutdownBehavior, SpotInstanceState,
    SpotInstanceType, SpotMarketOptions, Tag, VolumeState, VolumeType,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::failed;
use super::images::{filters, key, lacks, page, some, specification, tags_of};
use crate::api::machines::{
    Instance, InstanceState, Machines, Named, NewCapture, NewGroup, NewInstance, NewVolume, Spot, SpotRequest, Subnet, Volume,
};
use crate::api::{Find, Result, Tags};

pub(super) struct Client(pub(super) aws_sdk_ec2::Client);

/// The next page's token; an empty one is none.
fn next(token: Option<&str>) -> Option<String> {
    token.filter(|token| !token.is_empty()).map(Into::into)
}

fn number(number: Option<u32>) -> Option<i32> {
    number.map(|number| i32::try_from(number).unwrap_or(i32::MAX))
}

/// One as kiln sees it; `None` for one without an id.
fn instance(instance: &aws_sdk_ec2::types::Instance) -> Option<Instance> {
    let text = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(ToOwned::to_owned);
    let reason = instance.state_reason().and_then(|reason| reason.message());
    Some(Instance {
        id: instance.instance_id()?.to_owned(),
        state: match instance.state().and_then(|state| state.name()) {
            Some(InstanceStateName::Running) => InstanceState::Running,
            Some(InstanceStateName::Stopping) => InstanceState::Stopping,
            Some(InstanceStateName::Stopped) => InstanceState::Stopped,
            Some(InstanceStateName::ShuttingDown) => InstanceState::ShuttingDown,
            Some(InstanceStateName::Terminated) => InstanceState::Terminated,
            _ => InstanceState::Pending,
        },
        reason: text(reason).or_else(|| text(instance.state_transition_reason())),
        public_address: text(instance.public_ip_address()),
        private_address: text(instance.private_ip_address()),
        spot_request: text(instance.spot_instance_request_id()),
        tags: tags_of(instance.tags()),
    })
}

fn mapping(volume: &NewVolume) -> BlockDeviceMapping {
    let key = key(&volume.encryption);
    let ebs = EbsBlockDevice::builder()
        .delete_on_termination(true)
        .set_volume_size(number(volume.gib))
        .set_volume_type(volume.volume_type.as_deref().map(VolumeType::from))
        .set_iops(number(volume.iops))
        .set_throughput(number(volume.throughput))
        .set_snapshot_id(volume.snapshot.clone())
        .set_encrypted(key.as_ref().map(|_| true))
        .set_kms_key_id(key);
    BlockDeviceMapping::builder().device_name(&volume.device).ebs(ebs.build()).build()
}

fn market(spot: &Spot) -> InstanceMarketOptionsRequest {
    let options = SpotMarketOptions::builder()
        .set_max_price(spot.max_price.clone())
        .spot_instance_type(SpotInstanceType::Persistent)
        .instance_interruption_behavior(InstanceInterruptionBehavior::Stop);
    InstanceMarketOptionsRequest::builder().market_type(MarketType::Spot).spot_options(options.build()).build()
}

#[async_trait]
impl Machines for Client {
    async fn run(&self, new: &NewInstance) -> Result<Instance> {
        const ACTION: &str = "RunInstances";
        let mut kinds = vec![ResourceType::Instance, ResourceType::Volume];
        if new.spot.is_some() {
            kinds.push(ResourceType::SpotInstancesRequest);
        }
        let tags = kinds.into_iter().flat_map(|kind| specification(kind, &new.tags)).collect::<Vec<_>>();
        let metadata = InstanceMetadataOptionsRequest::builder()
            .http_tokens(HttpTokensState::Required)
            .http_endpoint(InstanceMetadataEndpointState::Enabled);
        let profile = new.profile.as_ref().map(|profile| {
            let specification = IamInstanceProfileSpecification::builder();
            if profile.starts_with("arn:") { specification.arn(profile) } else { specification.name(profile) }.build()
        });
        let volumes: Vec<BlockDeviceMapping> = new.volumes.iter().map(mapping).collect();
        let call = self
            .0
            .run_instances()
            .client_token(&new.token)
            .image_id(&new.image)
            .instance_type(InstanceType::from(new.instance_type.as_str()))
            .min_count(1)
            .max_count(1)
            .key_name(&new.key)
            .set_user_data((!new.user_data.is_empty()).then(|| STANDARD.encode(&new.user_data)))
            .set_iam_instance_profile(profile)
            .set_block_device_mappings(some(&volumes))
            .set_instance_market_options(new.spot.as_ref().map(market))
            .metadata_options(metadata.build())
            .set_instance_initiated_shutdown_behavior(new.spot.is_none().then_some(ShutdownBehavior::Stop))
            .set_tag_specifications(some(&tags));
        let call = match (&new.subnet, new.public) {
            // A public address is asked for on the interface alone, and then
            // everything about the network has to be said there.
            (Some(subnet), Some(public)) => {
                let interface = InstanceNetworkInterfaceSpecification::builder()
                    .device_index(0)
                    .subnet_id(subnet)
                    .set_groups(some(&new.groups))
                    .associate_public_ip_address(public)
                    .delete_on_termination(true);
                call.network_interfaces(interface.build())
            }
            (subnet, _) => call.set_subnet_id(subnet.clone()).set_security_group_ids(some(&new.groups)),
        };
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        answer.instances().first().and_then(instance).ok_or_else(|| lacks(ACTION, "instance"))
    }

    async fn instances(&self, find: &Find) -> Result<Vec<Instance>> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let call = self.0.describe_instances().set_instance_ids(some(&find.ids)).set_filters(filters(find));
            let call = call.set_max_results(page(find)).set_next_token(token);
            let answer = call.send().await.map_err(|error| failed("DescribeInstances", error))?;
            all.extend(answer.reservations().iter().flat_map(|reservation| reservation.instances()).filter_map(instance));
            token = next(answer.next_token());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn stop(&self, instance: &str) -> Result<()> {
        self.0.stop_instances().instance_ids(instance).send().await.map(drop).map_err(|error| failed("StopInstances", error))
    }

    async fn terminate(&self, instance: &str) -> Result<()> {
        self.0.terminate_instances().instance_ids(instance).send().await.map(drop).map_err(|error| failed("TerminateInstances", error))
    }

    async fn console(&self, instance: &str) -> Result<Option<String>> {
        const ACTION: &str = "GetConsoleOutput";
        let latest = self.0.get_console_output().instance_id(instance).latest(true).send().await.map_err(|error| failed(ACTION, error));
        let answer = match latest {
            // Older types of instances know only what was on it some time ago.
            Err(error) if error.code.starts_with("Unsupported") => {
                self.0.get_console_output().instance_id(instance).send().await.map_err(|error| failed(ACTION, error))?
            }
            answer => answer?,
        };
        // Base64 in lines; the console itself is in no particular encoding.
        let text = answer.output().map(|text| text.split_whitespace().collect::<String>());
        let bytes = text.filter(|text| !text.is_empty()).and_then(|text| STANDARD.decode(text).ok());
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    async fn spot_requests(&self, find: &Find) -> Result<Vec<SpotRequest>> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let call = self.0.describe_spot_instance_requests().set_spot_instance_request_ids(some(&find.ids));
            let call = call.set_filters(filters(find)).set_max_results(page(find)).set_next_token(token);
            let answer = call.send().await.map_err(|error| failed("DescribeSpotInstanceRequests", error))?;
            all.extend(answer.spot_instance_requests().iter().filter_map(|request| {
                let live =
                    matches!(request.state(), Some(SpotInstanceState::Open | SpotInstanceState::Active | SpotInstanceState::Disabled));
                Some(SpotRequest { id: request.spot_instance_request_id()?.to_owned(), live, tags: tags_of(request.tags()) })
            }));
            token = next(answer.next_token());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn cancel_spot(&self, request: &str) -> Result<()> {
        let call = self.0.cancel_spot_instance_requests().spot_instance_request_ids(request);
        call.send().await.map(drop).map_err(|error| failed("CancelSpotInstanceRequests", error))
    }

    async fn import_key(&self, name: &str, public: &str, tags: &Tags) -> Result<String> {
        const ACTION: &str = "ImportKeyPair";
        let call = self.0.import_key_pair().key_name(name).public_key_material(Blob::new(public.as_bytes()));
        let call = call.set_tag_specifications(some(&specification(ResourceType::KeyPair, tags)));
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        answer.key_pair_id().map(Into::into).ok_or_else(|| lacks(ACTION, "KeyPairId"))
    }

    async fn keys(&self, find: &Find) -> Result<Vec<Named>> {
        let call = self.0.describe_key_pairs().set_key_pair_ids(some(&find.ids)).set_filters(filters(find));
        let answer = call.send().await.map_err(|error| failed("DescribeKeyPairs", error))?;
        let named = |pair: &aws_sdk_ec2::types::KeyPairInfo| {
            let name = pair.key_name().unwrap_or_default().to_owned();
            Some(Named { id: pair.key_pair_id()?.to_owned(), name, tags: tags_of(pair.tags()) })
        };
        Ok(answer.key_pairs().iter().filter_map(named).collect())
    }

    async fn delete_key(&self, key: &str) -> Result<()> {
        self.0.delete_key_pair().key_pair_id(key).send().await.map(drop).map_err(|error| failed("DeleteKeyPair", error))
    }

    async fn create_group(&self, group: &NewGroup) -> Result<String> {
        const ACTION: &str = "CreateSecurityGroup";
        let call = self
            .0
            .create_security_group()
            .group_name(&group.name)
            .description(&group.description)
            .set_vpc_id(group.vpc.clone())
            .set_tag_specifications(some(&specification(ResourceType::SecurityGroup, &group.tags)));
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        answer.group_id().map(Into::into).ok_or_else(|| lacks(ACTION, "GroupId"))
    }

    async fn open_group(&self, group: &str, port: u16, networks: &[String]) -> Result<()> {
        let (four, six): (Vec<&String>, Vec<&String>) = networks.iter().partition(|network| !network.contains(':'));
        let four: Vec<IpRange> = four.into_iter().map(|network| IpRange::builder().cidr_ip(network).build()).collect();
        let six: Vec<Ipv6Range> = six.into_iter().map(|network| Ipv6Range::builder().cidr_ipv6(network).build()).collect();
        let permission = IpPermission::builder()
            .ip_protocol("tcp")
            .from_port(i32::from(port))
            .to_port(i32::from(port))
            .set_ip_ranges(some(&four))
            .set_ipv6_ranges(some(&six));
        let call = self.0.authorize_security_group_ingress().group_id(group).ip_permissions(permission.build());
        call.send().await.map(drop).map_err(|error| failed("AuthorizeSecurityGroupIngress", error))
    }

    async fn groups(&self, find: &Find) -> Result<Vec<Named>> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let call = self.0.describe_security_groups().set_group_ids(some(&find.ids)).set_filters(filters(find));
            let call = call.set_max_results(page(find)).set_next_token(token);
            let answer = call.send().await.map_err(|error| failed("DescribeSecurityGroups", error))?;
            all.extend(answer.security_groups().iter().filter_map(|group| {
                let name = group.group_name().unwrap_or_default().to_owned();
                Some(Named { id: group.group_id()?.to_owned(), name, tags: tags_of(group.tags()) })
            }));
            token = next(answer.next_token());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn delete_group(&self, group: &str) -> Result<()> {
        self.0.delete_security_group().group_id(group).send().await.map(drop).map_err(|error| failed("DeleteSecurityGroup", error))
    }

    async fn volumes(&self, find: &Find) -> Result<Vec<Volume>> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let call = self.0.describe_volumes().set_volume_ids(some(&find.ids)).set_filters(filters(find));
            let call = call.set_max_results(page(find)).set_next_token(token);
            let answer = call.send().await.map_err(|error| failed("DescribeVolumes", error))?;
            all.extend(answer.volumes().iter().filter_map(|volume| {
                Some(Volume {
                    id: volume.volume_id()?.to_owned(),
                    in_use: volume.state() == Some(&VolumeState::InUse),
                    deleting: matches!(volume.state(), Some(VolumeState::Deleting | VolumeState::Deleted)),
                    tags: tags_of(volume.tags()),
                })
            }));
            token = next(answer.next_token());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn delete_volume(&self, volume: &str) -> Result<()> {
        self.0.delete_volume().volume_id(volume).send().await.map(drop).map_err(|error| failed("DeleteVolume", error))
    }

    async fn create_image(&self, capture: &NewCapture) -> Result<String> {
        const ACTION: &str = "CreateImage";
        let tags = [specification(ResourceType::Image, &capture.tags), specification(ResourceType::Snapshot, &capture.tags)].concat();
        let call = self
            .0
            .create_image()
            .instance_id(&capture.instance)
            .name(&capture.name)
            .description(&capture.description)
            // It has stopped, and is not to be started to be stopped again.
            .no_reboot(true)
            .set_tag_specifications(some(&tags));
        let answer = call.send().await.map_err(|error| failed(ACTION, error))?;
        answer.image_id().map(Into::into).ok_or_else(|| lacks(ACTION, "ImageId"))
    }

    async fn subnets(&self, find: &Find) -> Result<Vec<Subnet>> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let call = self.0.describe_subnets().set_subnet_ids(some(&find.ids)).set_filters(filters(find));
            let call = call.set_max_results(page(find)).set_next_token(token);
            let answer = call.send().await.map_err(|error| failed("DescribeSubnets", error))?;
            all.extend(answer.subnets().iter().filter_map(|subnet| {
                let free = subnet.available_ip_address_count().and_then(|count| u32::try_from(count).ok()).unwrap_or(0);
                Some(Subnet { id: subnet.subnet_id()?.to_owned(), vpc: subnet.vpc_id().unwrap_or_default().to_owned(), free })
            }));
            token = next(answer.next_token());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn vpcs(&self, find: &Find) -> Result<Vec<String>> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let call = self.0.describe_vpcs().set_vpc_ids(some(&find.ids)).set_filters(filters(find));
            let call = call.set_max_results(page(find)).set_next_token(token);
            let answer = call.send().await.map_err(|error| failed("DescribeVpcs", error))?;
            all.extend(answer.vpcs().iter().filter_map(|vpc| vpc.vpc_id()).map(ToOwned::to_owned));
            token = next(answer.next_token());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn untag(&self, ids: &[String], keys: &[String]) -> Result<()> {
        let tags: Vec<Tag> = keys.iter().map(|key| Tag::builder().key(key).build()).collect();
        let call = self.0.delete_tags().set_resources(some(ids)).set_tags(some(&tags));
        call.send().await.map(drop).map_err(|error| failed("DeleteTags", error))
    }
}
