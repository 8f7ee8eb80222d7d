//! From an AMI to an instance whose guest answers.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kiln_model::base::{Base, BaseDisk};
use kiln_model::guest::Guest;
use kiln_model::machine::{Context, Start};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_process::{self as process, Child};
use kiln_ssh::{Keys, Target};

use super::base::architecture;
use super::machine::Ec2Machine;
use super::network::{self, Site};
use super::part::{Made, Part, make};
use super::region::{Region, unfinished};
use super::settings::{HostKey, Settings, Volume, Way};
use super::user_data::{host_key_on, user_data};
use super::{EC2, Ec2Builder, gib};
use crate::api::ebs::{Encryption, SnapshotState};
use crate::api::error::CallExt as _;
use crate::api::images::{Image, ImageState};
use crate::api::machines::{Instance, InstanceState, NewGroup, NewInstance, NewVolume};
use crate::api::{self, CallError, Find, Kind, Tags};
use crate::tags;

/// sshd's port in the guest.
const SSH: u16 = 22;

/// How often the console is looked at for the host key; AWS refreshes what it
/// gives a few times a minute at most.
const CONSOLE_LOOKS: u32 = 5;

/// An instance while it is being reached.
pub(crate) struct Running {
    pub(crate) region: Region,
    pub(crate) image: Image,
    pub(crate) instance: Made,
    pub(crate) group: Option<Made>,
    pub(crate) key: Made,
    pub(crate) keys: Arc<Keys>,
    /// A folder of this machine's own.
    pub(crate) folder: PathBuf,
    /// What leads through the bastion.
    pub(crate) tunnel: Option<Child>,
}

impl Ec2Builder {
    /// Runs an instance from `base` and waits until its guest answers.
    pub(crate) async fn start_machine(&self, base: &Base, start: &Start, context: &Context) -> Result<Ec2Machine> {
        let settings = &self.settings;
        let region = self.region().await?;
        let image = self.source(&region, base, start, context).await?;
        let site = network::find(settings, &region).await?;
        let sources = network::known_sources(settings, &self.around.own_address).await?;
        let own = settings.user_data.as_ref().map(std::fs::read).transpose();
        let own = own.trying(|| "read the user data".to_owned())?.or_else(|| start.user_data.clone());
        let (number, folder) = machine_folder(&context.work)?;
        let keys = Arc::new(Keys::generate()?);
        let name = format!("kiln-{}-{number}", context.bake);
        let tags = unfinished(&settings.tags, context, &name);

        // In the order of their undoing: the instance first, then what it uses.
        let key = make_key(context, &region, &name, &keys, &tags).await?;
        let group = match settings.groups.is_empty() {
            true => Some(make_group(context, &region, &name, &site, &tags).await?),
            false => None,
        };
        let groups = group.as_ref().map_or_else(|| settings.groups.clone(), |group| vec![group.id.clone()]);
        let injected = (settings.host_key == HostKey::Inject).then_some(&*keys);
        let wanted = NewInstance {
            token: String::new(),
            image: image.id.clone(),
            instance_type: String::new(),
            key: name.clone(),
            groups,
            subnet: None,
            public: match settings.way {
                Way::Public => Some(true),
                Way::Private | Way::Bastion(_) => Some(false),
                Way::Explicit { .. } => None,
            },
            user_data: user_data(injected, own.as_deref()),
            profile: settings.profile.clone(),
            volumes: volumes(settings, &image, start.disk_size),
            spot: settings.spot.clone(),
            tags,
        };
        let instance = run(context, &region, wanted, &name, &settings.types, &site).await?;
        let mut running = Running { region, image, instance, group, key, keys, folder, tunnel: None };
        let (guest, target) = match self.reach(&mut running, sources, context).await {
            Ok(reached) => reached,
            Err(error) => return Err(explained(&running.region, &running.instance.id, error).await),
        };
        Ok(Ec2Machine::new(self, running, guest, target, context))
    }

    /// The AMI to start from.
    async fn source(&self, region: &Region, base: &Base, start: &Start, context: &Context) -> Result<Image> {
        let image = match &base.disk {
            BaseDisk::Cloud(images) => {
                let here = images.iter().find(|image| image.builder == EC2 && image.region == region.name);
                let here = here.ok_or_else(|| {
                    let there: Vec<String> = images.iter().map(|image| format!("{} in {}", image.id, image.region)).collect();
                    let error = Error::new(Code::Base, format!("the base {} is not in {}", base.label, region.name));
                    error.detail(there.join("\n")).next("bake where it is, or copy it there (`copy_to` in its own [builder.ec2])")
                })?;
                let gone =
                    || Error::new(Code::Base, format!("{}, which is the base {}, is not in {} any more", here.id, base.label, region.name));
                region.image(&here.id).await?.ok_or_else(gone)?
            }
            BaseDisk::File(_) => self.ami_of_disk(region, base, start, context).await?,
        };
        if architecture(&image.architecture) != base.architecture {
            let error =
                Error::new(Code::Base, format!("{} is for {}, and the base is for {}", image.id, image.architecture, base.architecture));
            return Err(error.next("choose a base of one architecture"));
        }
        Ok(image)
    }

    /// The AMI of a base whose disk is here: published now, unless it was before.
    async fn ami_of_disk(&self, region: &Region, base: &Base, start: &Start, context: &Context) -> Result<Image> {
        let missing = || {
            Error::new(Code::Base, format!("no AMI of the base {} is in {}", base.label, region.name))
                .next(format!("publish it first: `kiln publish IMAGE --to ec2:{}`", region.name))
        };
        let disk = start.disk_digest.ok_or_else(missing)?;
        if let Some(image) = published(region, &base.label, &disk).await? {
            return Ok(image);
        }
        let publish = self.around.publish.as_ref().ok_or_else(missing)?;
        context.reports.note(format!("the base {} is published in {}: once, it stays there", base.label, region.name));
        let id = publish(disk, region.name.clone(), context.reports.clone()).await?;
        region.image_made(&id, self.settings.capture_timeout).await
    }

    /// Waits for the instance, lets this machine in, and connects.
    async fn reach(&self, running: &mut Running, sources: Option<Vec<String>>, context: &Context) -> Result<(Arc<dyn Guest>, Target)> {
        let (settings, limit) = (&self.settings, self.settings.boot_timeout);
        let instance = wait_until_runs(&running.region, &running.instance.id, settings, limit).await?;
        let private = || instance.private_address.clone().ok_or_else(|| no_address("private"));
        let (host, port) = match &settings.way {
            Way::Public => (instance.public_address.clone().ok_or_else(|| no_address("public"))?, SSH),
            Way::Private | Way::Bastion(_) => (private()?, SSH),
            Way::Explicit { host, port } => (host.clone(), *port),
        };
        if let Some(group) = &running.group {
            let networks = match sources {
                Some(networks) => networks,
                None => vec![network::address_towards(&host)?],
            };
            open(&running.region, &group.id, &networks).await?;
        }
        if settings.host_key == HostKey::Console {
            let line = console_key(&running.region, &running.instance.id, limit).await?;
            context.reports.note("the guest's host key is the one on its console");
            running.keys = Arc::new(running.keys.of_host(&line)?);
        }
        let (host, port) = match &settings.way {
            Way::Bastion(bastion) => {
                let (tunnel, port) = tunnel(bastion, &host, context).await?;
                running.tunnel = Some(tunnel);
                ("127.0.0.1".to_owned(), port)
            }
            _ => (host, port),
        };
        let target = Target { host, port, user: settings.user.clone(), keys: running.keys.clone(), folder: running.folder.clone() };
        let guest = tokio::select! {
            guest = (self.around.connect)(target.clone(), limit) => guest.map_err(|error| match error.kind() {
                // Another host answered: its console would not explain it.
                Code::HostKey => error,
                _ => error.next("read the console's end below; `address`, `subnet` and `allow_from` in [builder.ec2] decide whether it can be reached"),
            })?,
            error = ended(&running.region, &running.instance.id) => return Err(error),
        };
        Ok((guest, target))
    }
}

/// The AMI that was published of a disk, the newest of several.
async fn published(region: &Region, label: &str, disk: &Digest) -> Result<Option<Image>> {
    let find = Find::own().with(&format!("tag:{}", tags::DISK_DIGEST), &disk.to_string());
    let what = || format!("look for an AMI of the base {label}");
    let snapshots = region.calls.make(|| region.images.snapshots(&find)).await.trying_to(what)?;
    let mut found = Vec::new();
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.state == SnapshotState::Completed) {
        let find = Find::own().with("block-device-mapping.snapshot-id", &snapshot.id);
        let images = region.calls.make(|| region.images.images(&find)).await.trying_to(what)?;
        found.extend(images.into_iter().filter(|image| {
            image.state == ImageState::Available
                && image.root_snapshot() == Some(&snapshot.id)
                && !image.tags.contains_key(tags::UNFINISHED)
        }));
    }
    Ok(found.into_iter().max_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id))))
}

async fn make_key(context: &Context, region: &Region, name: &str, keys: &Arc<Keys>, tags: &Tags) -> Result<Made> {
    let (of, name, public, tags) = (region.clone(), name.to_owned(), keys.client_public().to_owned(), tags.clone());
    let call = async move {
        match of.calls.make(|| of.machines.import_key(&name, &public, &tags)).await {
            // An earlier try was carried out, though its answer was lost.
            Err(error) if error.kind == Kind::Exists => {
                let find = Find::default().with("key-name", &name);
                let look = || async { of.machines.keys(&find).await.map(|found| found.into_iter().map(|key| key.id).collect()) };
                earlier(&of, error, look).await
            }
            made => made,
        }
    };
    make(context, region, Part::KeyPair, call).await
}

async fn make_group(context: &Context, region: &Region, name: &str, site: &Site, tags: &Tags) -> Result<Made> {
    let group = NewGroup {
        name: name.to_owned(),
        description: "A bake of kiln; removed when it ends".to_owned(),
        vpc: site.vpc.clone(),
        tags: tags.clone(),
    };
    let of = region.clone();
    let call = async move {
        match of.calls.make(|| of.machines.create_group(&group)).await {
            Err(error) if error.kind == Kind::Exists => {
                let find = Find::default().with("group-name", &group.name);
                let look = || async { of.machines.groups(&find).await.map(|found| found.into_iter().map(|group| group.id).collect()) };
                earlier(&of, error, look).await
            }
            made => made,
        }
    };
    make(context, region, Part::SecurityGroup, call).await
}

/// What an earlier try of a call has made, whose answer was lost: the one thing
/// of a name that only this bake uses. It may not be known everywhere yet.
pub(crate) async fn earlier<F, A>(region: &Region, error: CallError, look: F) -> api::Result<String>
where
    F: Fn() -> A + Send + Sync,
    A: Future<Output = api::Result<Vec<String>>> + Send,
{
    let one = || async { Ok::<_, CallError>(<[String; 1]>::try_from(look().await?).ok()) };
    let found = region.calls.wait(region.settling(), one).await?;
    found.map(|[id]| id).ok_or(error)
}

/// Runs the instance: of the first type, in the first subnet, for which AWS has
/// capacity now.
async fn run(context: &Context, region: &Region, wanted: NewInstance, name: &str, types: &[String], site: &Site) -> Result<Made> {
    let mut tries = Vec::new();
    for (number, instance_type) in types.iter().enumerate() {
        let subnets: Vec<Option<String>> = match site.subnets.is_empty() {
            true => vec![None],
            false => site.subnets.iter().cloned().map(Some).collect(),
        };
        for (place, subnet) in subnets.into_iter().enumerate() {
            // Each is another request to AWS, and has a token of its own.
            let token = format!("{name}-{number}-{place}");
            tries.push(NewInstance { token, instance_type: instance_type.clone(), subnet, ..wanted.clone() });
        }
    }
    let (of, reports) = (region.clone(), context.reports.clone());
    let call = async move {
        let mut last = None;
        for instance in &tries {
            // The key pair and the group are new.
            match of.calls.make_of_new(|| of.machines.run(instance)).await {
                Ok(made) => return Ok(made.id),
                Err(error) if has_no_capacity(&error) => {
                    let at = instance.subnet.as_deref().map_or_else(String::new, |subnet| format!(" in {subnet}"));
                    reports.note(format!("no {} to be had{at}: {}", instance.instance_type, error.code));
                    last = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| CallError::answered("RunInstances", 400, "MissingParameter", "no instance type was given")))
    };
    make(context, region, Part::Instance, call).await
}

/// Whether another type or another place may do.
fn has_no_capacity(error: &CallError) -> bool {
    const CODES: [&str; 8] = [
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientFreeAddressesInSubnet",
        "MaxSpotInstanceCountExceeded",
        "SpotMaxPriceTooLow",
        "Unsupported",
        "VcpuLimitExceeded",
        "InstanceLimitExceeded",
    ];
    CODES.contains(&error.code.as_str())
}

/// The disks of the instance. Every one of the AMI's is named, so that none
/// outlives the instance, whatever the AMI says.
fn volumes(settings: &Settings, image: &Image, disk_size: Option<u64>) -> Vec<NewVolume> {
    let Volume { volume_type, iops, throughput, kms_key, .. } = &settings.root;
    let key = |key: &Option<String>| key.clone().map_or(Encryption::Inherited, Encryption::Key);
    let root_key = kms_key.clone().or_else(|| settings.kms_keys.get(&settings.region).cloned());
    let mut all: Vec<NewVolume> = image
        .disks
        .iter()
        .map(|disk| match image.root.as_deref() == Some(disk.device.as_str()) {
            true => NewVolume {
                device: disk.device.clone(),
                gib: disk_size.map(gib).max(disk.gib),
                volume_type: volume_type.clone(),
                iops: *iops,
                throughput: *throughput,
                snapshot: None,
                encryption: key(&root_key),
            },
            false => NewVolume { device: disk.device.clone(), ..NewVolume::default() },
        })
        .collect();
    for volume in &settings.volumes {
        all.retain(|other| other.device != volume.device);
        all.push(NewVolume {
            device: volume.device.clone(),
            gib: volume.gib,
            volume_type: volume.volume_type.clone(),
            iops: volume.iops,
            throughput: volume.throughput,
            snapshot: volume.snapshot.clone(),
            encryption: key(&volume.kms_key),
        });
    }
    all
}

async fn wait_until_runs(region: &Region, id: &str, settings: &Settings, limit: Duration) -> Result<Instance> {
    let states = [InstanceState::Running, InstanceState::ShuttingDown, InstanceState::Terminated, InstanceState::Stopped];
    let instance = region.instance_in(id, &states, limit).await?;
    let late = || Error::new(Code::Timeout, format!("the instance {id} did not start within {} s", limit.as_secs()));
    let instance = instance.ok_or_else(|| late().next("raise `boot_timeout` in [builder.ec2], or try another instance type"))?;
    if instance.state != InstanceState::Running {
        return Err(has_ended(&instance));
    }
    // A public address comes a moment after the state.
    if settings.way != Way::Public || instance.public_address.is_some() {
        return Ok(instance);
    }
    let find = Find::id(id);
    let look = || async {
        let found = region.machines.instances(&find).await?;
        Ok::<_, CallError>(found.into_iter().find(|instance| instance.public_address.is_some()))
    };
    let found = region.calls.wait(region.settling(), look).await.trying_to(|| format!("ask for the address of {id}"))?;
    Ok(found.unwrap_or(instance))
}

fn no_address(what: &str) -> Error {
    Error::new(Code::Unreachable, format!("the instance has no {what} address")).next(
        "choose a `subnet` that gives public addresses; or reach it with address = \"private\", a `bastion`, or `ssh` in [builder.ec2]",
    )
}

async fn open(region: &Region, group: &str, networks: &[String]) -> Result<()> {
    match region.calls.make_of_new(|| region.machines.open_group(group, SSH, networks)).await {
        Err(error) if error.kind == Kind::Exists => Ok(()),
        done => done.trying_to(|| format!("open the security group {group} to {}", networks.join(", "))),
    }
}

/// The host key on an instance's console, once AWS shows it.
async fn console_key(region: &Region, id: &str, limit: Duration) -> Result<String> {
    let look = region.calls.pace().look * CONSOLE_LOOKS;
    let end = tokio::time::Instant::now() + limit;
    loop {
        let console = region.calls.make_of_new(|| region.machines.console(id)).await;
        let console = console.trying_to(|| format!("read the console of {id}"))?;
        if let Some(key) = console.as_deref().and_then(host_key_on) {
            return Ok(key);
        }
        if tokio::time::Instant::now() >= end {
            let error =
                Error::new(Code::Unreachable, format!("no Ed25519 host key was on the console of {id} within {} s", limit.as_secs()));
            return Err(error.next("the image needs cloud-init, which writes it there; or use host_key = \"inject\" in [builder.ec2]"));
        }
        tokio::time::sleep(look).await;
    }
}

/// Leads a port of loopback through a bastion, with the user's own settings for
/// it. Nothing but this machine's own users can reach that port, and the guest
/// behind it is known by its host key.
async fn tunnel(bastion: &str, host: &str, context: &Context) -> Result<(Child, u16)> {
    let free = || -> std::io::Result<u16> { Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port()) };
    let port = free().trying(|| "find a free port".to_owned())?;
    let mut command = std::process::Command::new("ssh");
    command.args(["-N", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15"]);
    command.arg("-L").arg(format!("127.0.0.1:{port}:{host}:{SSH}")).arg("--").arg(bastion);
    let (child, _) = process::spawn_registered(&context.scope, command, "ssh to the bastion", Vec::new())?;
    // Listening, or ended.
    let listening = async {
        loop {
            if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = listening => Ok((child, port)),
        status = child.ended() => Err(child.failure(status).next("`ssh` has to reach the bastion without asking anything; try it by hand")),
    }
}

/// Returns only when an instance runs no more, with what is known of it.
pub(crate) async fn ended(region: &Region, id: &str) -> Error {
    let find = Find::id(id);
    loop {
        tokio::time::sleep(region.calls.pace().look * 15).await;
        // That AWS cannot be asked now says nothing of the instance.
        let Ok(found) = region.calls.make(|| region.machines.instances(&find)).await else { continue };
        let up = |instance: &&Instance| matches!(instance.state, InstanceState::Pending | InstanceState::Running);
        if let Some(instance) = found.iter().find(|instance| instance.id == id && !up(instance)) {
            return has_ended(instance);
        }
    }
}

fn has_ended(instance: &Instance) -> Error {
    let reason = instance.reason.clone().unwrap_or_default();
    let error = Error::new(Code::MachineEnded, format!("the instance {} ended by itself", instance.id));
    let spot = reason.contains("Spot");
    let error = if reason.is_empty() { error } else { error.detail(reason) };
    if spot {
        error.code(Code::Infrastructure).next("AWS took the spot instance back: bake again, with more `instance_types` or without `spot`")
    } else {
        error
    }
}

/// Adds the end of an instance's console to an error.
pub(crate) async fn explained(region: &Region, id: &str, error: Error) -> Error {
    /// How much of it, in lines.
    const LINES: usize = 40;
    if error.kind() == Code::HostKey {
        return error;
    }
    match region.machines.console(id).await {
        Ok(Some(console)) => {
            let lines: Vec<&str> = console.lines().collect();
            let from = lines.len().saturating_sub(LINES);
            error.detail(format!("the end of the console of {id}:\n{}", lines.get(from..).unwrap_or_default().join("\n")))
        }
        _ => error,
    }
}

/// A folder for one machine of a bake, and its number.
fn machine_folder(work: &Path) -> Result<(u32, PathBuf)> {
    use std::os::unix::fs::DirBuilderExt as _;
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = work.join(format!("instance-{number}"));
    std::fs::DirBuilder::new().mode(0o700).create(&folder).trying(|| format!("make the folder {}", folder.display()))?;
    Ok((number, folder))
}
