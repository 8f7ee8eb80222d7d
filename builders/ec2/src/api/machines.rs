//! Instances, and what one needs while an image is baked on it.
//!
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/>.
//!
//! Of these calls RunInstances alone takes a client token. Key pairs, groups
//! and images are made happen once by their names, which hold the bake's id:
//! a second call answers [`super::Kind::Exists`], and the name finds the first.

use async_trait::async_trait;

use super::ebs::Encryption;
use super::{Find, Result, Tags};

/// An instance to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewInstance {
    /// Client token: the same call with the same token gives the same instance.
    pub token: String,
    /// The AMI to start from.
    pub image: String,
    /// Such as `t3.small`.
    pub instance_type: String,
    /// Name of the key pair.
    pub key: String,
    /// Ids of the security groups.
    pub groups: Vec<String>,
    /// Id of the subnet; without, one of the default VPC.
    pub subnet: Option<String>,
    /// Whether it gets a public address; without, as the subnet does.
    pub public: Option<bool>,
    /// What cloud-init reads, at most 16 KiB.
    pub user_data: Vec<u8>,
    /// Name or ARN of an instance profile.
    pub profile: Option<String>,
    /// Its disks, the root and others. All of them go with the instance.
    pub volumes: Vec<NewVolume>,
    /// As a spot instance.
    pub spot: Option<Spot>,
    /// Tags of the instance, its volumes, its network interface, and its spot
    /// request.
    pub tags: Tags,
}

/// A disk of a [`NewInstance`]. What is not said is as the AMI says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewVolume {
    /// Its name for EC2, such as `/dev/xvda`.
    pub device: String,
    /// Its size in GiB.
    pub gib: Option<u32>,
    /// Volume type, such as `gp3`.
    pub volume_type: Option<String>,
    /// I/O operations a second.
    pub iops: Option<u32>,
    /// MiB a second.
    pub throughput: Option<u32>,
    /// A snapshot to make it from.
    pub snapshot: Option<String>,
    /// How it is encrypted.
    pub encryption: Encryption,
}

/// How a spot instance is asked for. The request is persistent and stops the
/// instance when it is interrupted: one that is asked for once can only be
/// terminated, and so never be captured at rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spot {
    /// US dollars an hour at most; without, the on-demand price.
    pub max_price: Option<String>,
}

/// Where an instance is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstanceState {
    /// It starts.
    Pending,
    /// It runs.
    Running,
    /// It is being stopped.
    Stopping,
    /// It has stopped, and keeps its disks.
    Stopped,
    /// It is being terminated.
    ShuttingDown,
    /// It is gone; EC2 tells of it for another hour.
    Terminated,
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Its id (`i-…`).
    pub id: String,
    /// Where it is on its way.
    pub state: InstanceState,
    /// Why it is there, as AWS says it.
    pub reason: Option<String>,
    /// Its public address.
    pub public_address: Option<String>,
    /// Its address in its VPC.
    pub private_address: Option<String>,
    /// The spot request that it fulfils.
    pub spot_request: Option<String>,
    /// Its tags.
    pub tags: Tags,
}

/// A spot request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpotRequest {
    /// Its id (`sir-…`).
    pub id: String,
    /// Whether it is open or active: it may still start an instance.
    pub live: bool,
    /// Its tags.
    pub tags: Tags,
}

/// A key pair or a security group: what is known of it by its id and name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Its id (`key-…`, `sg-…`).
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its tags.
    pub tags: Tags,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its id (`vol-…`).
    pub id: String,
    /// Whether an instance has it.
    pub in_use: bool,
    /// Whether it is being deleted already.
    pub deleting: bool,
    /// Its tags.
    pub tags: Tags,
}

/// A security group to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewGroup {
    /// Its name, of which a VPC has one.
    pub name: String,
    /// For people.
    pub description: String,
    /// Id of the VPC; without, the default one.
    pub vpc: Option<String>,
    /// Its tags.
    pub tags: Tags,
}

/// An image to be made of a stopped instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCapture {
    /// The instance.
    pub instance: String,
    /// Name of the AMI: 3 to 128 letters, digits and `()[] ./-'@_`.
    pub name: String,
    /// For people.
    pub description: String,
    /// Tags of the AMI and of its snapshots.
    pub tags: Tags,
}

/// A subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subnet {
    /// Its id (`subnet-…`).
    pub id: String,
    /// Its VPC.
    pub vpc: String,
    /// How many addresses are free in it.
    pub free: u32,
}

/// Instances of one region, and what they need.
#[async_trait]
pub trait Machines: Send + Sync {
    /// RunInstances, of one instance. Its metadata service takes IMDSv2 alone,
    /// and shutting down from inside stops it.
    ///
    /// # Errors
    /// [`super::Kind::Limit`] when there is no capacity for that type now.
    async fn run(&self, instance: &NewInstance) -> Result<Instance>;

    /// DescribeInstances.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn instances(&self, find: &Find) -> Result<Vec<Instance>>;

    /// StopInstances. One that has stopped stays so.
    ///
    /// # Errors
    /// When it is not there, or cannot be stopped.
    async fn stop(&self, instance: &str) -> Result<()>;

    /// TerminateInstances. One that is gone stays so.
    ///
    /// # Errors
    /// When it is not there.
    async fn terminate(&self, instance: &str) -> Result<()>;

    /// GetConsoleOutput: what its serial console has shown, some minutes late;
    /// `None` before there is any.
    ///
    /// # Errors
    /// When it cannot be read.
    async fn console(&self, instance: &str) -> Result<Option<String>>;

    /// DescribeSpotInstanceRequests.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn spot_requests(&self, find: &Find) -> Result<Vec<SpotRequest>>;

    /// CancelSpotInstanceRequests. The instance goes on.
    ///
    /// # Errors
    /// When it is not there.
    async fn cancel_spot(&self, request: &str) -> Result<()>;

    /// ImportKeyPair: a public key in OpenSSH's format under a name. Gives its id.
    ///
    /// # Errors
    /// [`super::Kind::Exists`] when there is one of that name.
    async fn import_key(&self, name: &str, public: &str, tags: &Tags) -> Result<String>;

    /// DescribeKeyPairs.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn keys(&self, find: &Find) -> Result<Vec<Named>>;

    /// DeleteKeyPair, by its id. One that is gone stays so.
    ///
    /// # Errors
    /// When this user may not.
    async fn delete_key(&self, key: &str) -> Result<()>;

    /// CreateSecurityGroup: nothing may come in. Gives its id.
    ///
    /// # Errors
    /// [`super::Kind::Exists`] when there is one of that name.
    async fn create_group(&self, group: &NewGroup) -> Result<String>;

    /// AuthorizeSecurityGroupIngress: lets `networks` (CIDR, either family)
    /// reach one TCP port.
    ///
    /// # Errors
    /// [`super::Kind::Exists`] when they may already.
    async fn open_group(&self, group: &str, port: u16, networks: &[String]) -> Result<()>;

    /// DescribeSecurityGroups.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn groups(&self, find: &Find) -> Result<Vec<Named>>;

    /// DeleteSecurityGroup.
    ///
    /// # Errors
    /// [`super::Kind::State`] while an instance is in it;
    /// [`super::Kind::NotFound`] when it is gone.
    async fn delete_group(&self, group: &str) -> Result<()>;

    /// DescribeVolumes.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn volumes(&self, find: &Find) -> Result<Vec<Volume>>;

    /// DeleteVolume.
    ///
    /// # Errors
    /// [`super::Kind::State`] while an instance has it;
    /// [`super::Kind::NotFound`] when it is gone.
    async fn delete_volume(&self, volume: &str) -> Result<()>;

    /// CreateImage. The AMI is pending for a while. Gives its id.
    ///
    /// # Errors
    /// [`super::Kind::Exists`] when there is an AMI of that name.
    async fn create_image(&self, capture: &NewCapture) -> Result<String>;

    /// DescribeSubnets.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn subnets(&self, find: &Find) -> Result<Vec<Subnet>>;

    /// DescribeVpcs: their ids.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn vpcs(&self, find: &Find) -> Result<Vec<String>>;

    /// DeleteTags: takes these keys from resources of any kind.
    ///
    /// # Errors
    /// When one of them is not there.
    async fn untag(&self, ids: &[String], keys: &[String]) -> Result<()>;
}
