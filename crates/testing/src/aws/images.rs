//! Images: what `RegisterImage` is told, and what AWS would refuse of it.

use std::time::Instant;

use super::ec2::{Done, made_up, response, tags_of, wrong};
use super::query::{Filter, Query};
use super::server::{Shared, lock};
use super::snapshots::{Blocks, PER_GIB, Snapshot, Stage, Wish};
use super::xml::Element;

/// Tags that a call gives.
pub(crate) struct Tags {
    pub(crate) image: Vec<(String, String)>,
    pub(crate) snapshot: Vec<(String, String)>,
}

/// What an image says of a disk.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mapping {
    device: String,
    snapshot: Option<String>,
    /// GiB.
    size: u64,
    kind: String,
    iops: Option<u64>,
    throughput: Option<u64>,
    delete: bool,
    encrypted: bool,
}

/// One image.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) id: String,
    region: String,
    name: String,
    since: Instant,
    /// Name in EC2's answers, and value, of what moto does not keep.
    said: Vec<(&'static str, String)>,
    mappings: Vec<Mapping>,
    deprecation: Option<String>,
}

impl Image {
    /// Whether one of its disks is this snapshot.
    pub(crate) fn uses(&self, snapshot: &str) -> bool {
        self.mappings.iter().any(|mapping| mapping.snapshot.as_deref() == Some(snapshot))
    }

    /// Puts right what moto says of it.
    fn correct(&self, item: &mut Element, available: bool) {
        item.set("imageState", if available { "available" } else { "pending" });
        item.set("rootDeviceType", "ebs");
        for (name, value) in &self.said {
            item.set(name, value);
        }
        if let Some(at) = &self.deprecation {
            item.set("deprecationTime", at);
        }
        item.put(Element::of("blockDeviceMapping", self.mappings.iter().map(Mapping::element).collect()));
    }
}

impl Mapping {
    fn element(&self) -> Element {
        let mut ebs = Element::of("ebs", Vec::new());
        if let Some(snapshot) = &self.snapshot {
            ebs.set("snapshotId", snapshot);
        }
        ebs.set("volumeSize", self.size.to_string());
        ebs.set("volumeType", &self.kind);
        ebs.set("deleteOnTermination", self.delete.to_string());
        ebs.set("encrypted", self.encrypted.to_string());
        for (name, value) in [("iops", self.iops), ("throughput", self.throughput)] {
            if let Some(value) = value {
                ebs.set(name, value.to_string());
            }
        }
        Element::of("item", vec![Element::new("deviceName", &self.device), ebs])
    }
}

/// Filters of `DescribeImages` that are answered from what the front knows,
/// and where the answer says it.
const FILTERS: [(&str, &str); 11] = [
    ("architecture", "architecture"),
    ("boot-mode", "bootMode"),
    ("ena-support", "enaSupport"),
    ("state", "imageState"),
    ("virtualization-type", "virtualizationType"),
    ("root-device-name", "rootDeviceName"),
    ("root-device-type", "rootDeviceType"),
    ("description", "description"),
    ("image-type", "imageType"),
    ("is-public", "isPublic"),
    ("hypervisor", "hypervisor"),
];

const SNAPSHOT_FILTER: &str = "block-device-mapping.snapshot-id";

impl Shared {
    pub(super) async fn register_image(&self, region: &str, query: &Query) -> Done {
        self.new_name(region, query)?;
        let said = described(query)?;
        let mappings = self.mappings(region, query)?;
        let root = query.get("RootDeviceName").unwrap_or_default();
        if !mappings.iter().any(|mapping| mapping.device == root && mapping.snapshot.is_some()) {
            return wrong("InvalidBlockDeviceMapping", format!("The root device {root:?} has no mapping with a snapshot"));
        }
        let mut plain = Query::new("RegisterImage").with("Name", query.get("Name").unwrap_or_default());
        if let Some(description) = query.get("Description") {
            plain = plain.with("Description", description);
        }
        let done = self.pass(region, &plain).await?;
        let id = done.at("imageId").to_owned();
        self.hide_made_up(region, &id).await?;
        self.tag(region, &id, &tags_of(query).image).await?;
        self.remember(region, &id, query, said, mappings);
        Ok(done)
    }

    /// Checks the name of an image to be made.
    fn new_name(&self, region: &str, query: &Query) -> Done<()> {
        let Some(name) = query.get("Name") else { return wrong("MissingParameter", "The request must contain the parameter Name") };
        let fine = |letter: char| letter.is_ascii_alphanumeric() || "()[] ./-'@_".contains(letter);
        if !(3..=128).contains(&name.len()) || !name.chars().all(fine) {
            return wrong("InvalidAMIName.Malformed", format!("AMI names must be between 3 and 128 characters long: {name:?}"));
        }
        let state = lock(&self.state);
        match state.images.values().find(|image| image.region == region && image.name == name) {
            Some(image) => wrong("InvalidAMIName.Duplicate", format!("AMI name {name} is already in use by AMI {}", image.id)),
            None => Ok(()),
        }
    }

    fn remember(&self, region: &str, id: &str, query: &Query, said: Vec<(&'static str, String)>, mappings: Vec<Mapping>) {
        let name = query.get("Name").unwrap_or_default().to_owned();
        let image = Image { id: id.into(), region: region.into(), name, since: Instant::now(), said, mappings, deprecation: None };
        lock(&self.state).images.insert(id.into(), image);
    }

    /// moto makes up a snapshot for every image.
    async fn hide_made_up(&self, region: &str, image: &str) -> Done<String> {
        let described = self.pass(region, &Query::new("DescribeImages").with("ImageId.1", image)).await?;
        let snapshot = made_up(&described);
        lock(&self.state).phantoms.insert(snapshot.clone());
        Ok(snapshot)
    }

    /// Reads and checks `BlockDeviceMapping.N`.
    fn mappings(&self, region: &str, query: &Query) -> Done<Vec<Mapping>> {
        let mut all: Vec<Mapping> = Vec::new();
        for number in query.numbers("BlockDeviceMapping") {
            let at = |name: &str| query.get(&format!("BlockDeviceMapping.{number}.{name}"));
            let amount = |name: &str| at(name).and_then(|text| text.parse::<u64>().ok());
            let device = at("DeviceName").unwrap_or_default().to_owned();
            if device.is_empty() || all.iter().any(|other| other.device == device) {
                return wrong("InvalidBlockDeviceMapping", format!("The device name {device:?} is missing or there twice"));
            }
            if at("VirtualName").is_some() || at("NoDevice").is_some() {
                continue;
            }
            let kind = at("Ebs.VolumeType").unwrap_or("standard").to_owned();
            let (iops, throughput) = (amount("Ebs.Iops"), amount("Ebs.Throughput"));
            let fits = match kind.as_str() {
                "gp3" => iops.is_none_or(|iops| (3000..=80_000).contains(&iops)) && throughput.is_none_or(|t| (125..=2000).contains(&t)),
                "io1" | "io2" => iops.is_some() && throughput.is_none(),
                "gp2" | "standard" | "st1" | "sc1" => iops.is_none() && throughput.is_none(),
                _ => false,
            };
            if !fits {
                let message = format!("The volume type {kind} does not go with iops {iops:?} and throughput {throughput:?}");
                return wrong("InvalidParameterCombination", message);
            }
            let mut mapping = Mapping { device, kind, iops, throughput, size: amount("Ebs.VolumeSize").unwrap_or(0), ..Mapping::default() };
            mapping.delete = at("Ebs.DeleteOnTermination") != Some("false");
            match at("Ebs.SnapshotId") {
                Some(id) => {
                    let snapshot = self.completed(region, id)?;
                    if at("Ebs.Encrypted").is_some() || at("Ebs.KmsKeyId").is_some() {
                        return wrong("InvalidBlockDeviceMapping", "a mapping with a snapshot takes its encryption");
                    }
                    if mapping.size != 0 && mapping.size < snapshot.wish.size {
                        let (size, least) = (mapping.size, snapshot.wish.size);
                        let message = format!("Volume of size {size}GB is smaller than snapshot '{id}', expect size>= {least}GB");
                        return wrong("InvalidBlockDeviceMapping", message);
                    }
                    mapping.size = mapping.size.max(snapshot.wish.size);
                    mapping.encrypted = snapshot.wish.encrypted;
                    mapping.snapshot = Some(id.to_owned());
                }
                None if mapping.size == 0 => {
                    return wrong("InvalidBlockDeviceMapping", format!("{} has neither snapshot nor size", mapping.device));
                }
                None => mapping.encrypted = at("Ebs.Encrypted") == Some("true"),
            }
            all.push(mapping);
        }
        Ok(all)
    }

    pub(super) async fn describe_images(&self, region: &str, query: &Query) -> Done {
        let own = |filter: &Filter| FILTERS.iter().any(|(name, _)| *name == filter.name) || filter.name == SNAPSHOT_FILTER;
        let (own, others): (Vec<Filter>, Vec<Filter>) = query.filters().into_iter().partition(own);
        let mut said = self.pass(region, &query.filtered(&others)).await?;
        let there: Vec<String> = said.items("imagesSet").iter().map(|item| item.at("imageId").to_owned()).collect();
        // Of those that were deregistered moto says nothing.
        if let Some(id) = query.list("ImageId").into_iter().find(|id| !there.iter().any(|there| there == id) && others.is_empty()) {
            return wrong("InvalidAMIID.NotFound", format!("The image id '[{id}]' does not exist"));
        }
        let state = lock(&self.state);
        let Some(set) = said.child_mut("imagesSet") else { return Ok(said) };
        for item in &mut set.children {
            if let Some(image) = state.images.get(item.at("imageId")) {
                image.correct(item, image.since.elapsed() >= state.settling);
            }
        }
        let fits = |item: &Element, filter: &Filter| match FILTERS.iter().find(|(name, _)| *name == filter.name) {
            Some((_, place)) => filter.fits(item.at(place)),
            None => item.items("blockDeviceMapping").iter().any(|mapping| filter.fits(mapping.at("ebs/snapshotId"))),
        };
        set.children.retain(|item| own.iter().all(|filter| fits(item, filter)));
        drop(state);
        Ok(said)
    }

    pub(super) async fn deregister_image(&self, region: &str, query: &Query) -> Done {
        let said = self.pass(region, query).await?;
        let id = query.get("ImageId").unwrap_or_default();
        let image = lock(&self.state).images.remove(id);
        if query.is("DeleteAssociatedSnapshots") {
            for snapshot in image.iter().flat_map(|image| &image.mappings).filter_map(|mapping| mapping.snapshot.as_deref()) {
                if !lock(&self.state).images.values().any(|image| image.uses(snapshot)) {
                    self.pass(region, &Query::new("DeleteSnapshot").with("SnapshotId", snapshot)).await?;
                    lock(&self.state).snapshots.remove(snapshot);
                }
            }
        }
        Ok(said)
    }

    pub(super) fn deprecate(&self, region: &str, query: &Query) -> Done {
        let id = query.get("ImageId").unwrap_or_default();
        let mut state = lock(&self.state);
        let Some(image) = state.images.get_mut(id).filter(|image| image.region == region) else {
            return wrong("InvalidAMIID.NotFound", format!("The image id '[{id}]' does not exist"));
        };
        image.deprecation = match (query.action(), query.get("DeprecateAt")) {
            ("EnableImageDeprecation", None) => return wrong("MissingParameter", "The request must contain the parameter DeprecateAt"),
            ("EnableImageDeprecation", Some(at)) => Some(at.to_owned()),
            _ => None,
        };
        Ok(response(query.action(), vec![Element::new("return", "true")]))
    }

    pub(super) async fn copy_image(&self, region: &str, query: &Query) -> Done {
        let (id, from) = (query.get("SourceImageId").unwrap_or_default(), query.get("SourceRegion").unwrap_or_default());
        self.new_name(region, query)?;
        let source = {
            let state = lock(&self.state);
            let source = state.images.get(id).filter(|image| image.region == from).cloned();
            match source {
                Some(image) if image.since.elapsed() < state.settling => {
                    return wrong("InvalidAMIID.Unavailable", format!("The image ID '{id}' is currently pending"));
                }
                source => source,
            }
        };
        // One of moto's own.
        let Some(source) = source else { return self.pass(region, query).await };
        let done = self.pass(region, query).await?;
        let copy = done.at("imageId").to_owned();
        self.hide_made_up(region, &copy).await?;
        let tags = tags_of(query);
        let mut mappings = source.mappings.clone();
        for mapping in &mut mappings {
            let Some(id) = mapping.snapshot.clone() else { continue };
            let of = self.completed(from, &id)?;
            let ask = Query::new("CopySnapshot").with("SourceRegion", from).with("SourceSnapshotId", &id);
            let ask = ask.with("Description", format!("Copied for DestinationAmi {copy} from SourceAmi {}", source.id));
            let snapshot = self.pass(region, &ask).await?.at("snapshotId").to_owned();
            self.adopt_copy(region, &snapshot, &of, query);
            self.tag(region, &snapshot, &tags.snapshot).await?;
            mapping.encrypted = of.wish.encrypted || query.is("Encrypted");
            mapping.snapshot = Some(snapshot);
        }
        self.tag(region, &copy, &tags.image).await?;
        self.remember(region, &copy, query, source.said.clone(), mappings);
        Ok(done)
    }

    pub(super) async fn create_image(&self, region: &str, query: &Query) -> Done {
        self.new_name(region, query)?;
        let instance_id = query.get("InstanceId").unwrap_or_default();
        let instance = self.instance(region, instance_id).await?;
        let state = instance.at("instanceState/name");
        if !["running", "stopped"].contains(&state) {
            return wrong("IncorrectState", format!("Instance '{instance_id}' is {state}."));
        }
        let filter = Filter { name: "attachment.instance-id".into(), values: vec![instance_id.to_owned()] };
        let volumes = self.pass(region, &Query::new("DescribeVolumes").filtered(&[filter])).await?;
        let done = self.pass(region, &query.without("TagSpecification").without("BlockDeviceMapping")).await?;
        let id = done.at("imageId").to_owned();
        // The one that moto makes up is the root's here.
        let made_up = self.hide_made_up(region, &id).await?;
        lock(&self.state).phantoms.remove(&made_up);
        let tags = tags_of(query);
        // moto calls every root the same, whatever the image says.
        let devices: Vec<&str> = volumes.items("volumeSet").iter().map(|volume| volume.at("attachmentSet/item/device")).collect();
        let root = instance.at("rootDeviceName");
        let root = if devices.contains(&root) { root } else { devices.first().copied().unwrap_or_default() }.to_owned();
        let disk = lock(&self.state).disk.clone();
        let held = match disk {
            Some(disk) => self.shelf.take(&disk).map_err(|error| super::ec2::Wrong::Said(500, error.to_string().into()))?,
            None => Blocks::new(),
        };
        let least = held.last_key_value().map_or(1, |(last, _)| last / PER_GIB + 1);
        let mut mappings = Vec::new();
        for volume in volumes.items("volumeSet") {
            let device = volume.at("attachmentSet/item/device").to_owned();
            let is_root = device == root;
            let snapshot = if is_root {
                made_up.clone()
            } else {
                let ask = Query::new("CreateSnapshot").with("VolumeId", volume.at("volumeId"));
                self.pass(region, &ask).await?.at("snapshotId").to_owned()
            };
            let size = volume.at("size").parse().unwrap_or(0).max(if is_root { least } else { 1 });
            let encrypted = volume.at("encrypted") == "true";
            let mut adopted = Snapshot::new(&snapshot, region, Wish { size, encrypted, ..Wish::default() });
            adopted.written = if is_root { held.clone() } else { Blocks::new() };
            adopted.stage = Stage::Sealed(Instant::now());
            lock(&self.state).snapshots.insert(snapshot.clone(), adopted);
            self.tag(region, &snapshot, &tags.snapshot).await?;
            let kind = Some(volume.at("volumeType")).filter(|kind| !kind.is_empty()).unwrap_or("gp2").to_owned();
            mappings.push(Mapping { device, snapshot: Some(snapshot), size, kind, delete: true, encrypted, ..Mapping::default() });
        }
        self.tag(region, &id, &tags.image).await?;
        // It inherits from the image of its instance; moto has forgotten what.
        let inherited = lock(&self.state).images.get(instance.at("imageId")).map(|image| image.said.clone());
        let mut said = inherited.unwrap_or_else(|| {
            let architecture = Some(instance.at("architecture")).filter(|text| !text.is_empty()).unwrap_or("x86_64");
            vec![("architecture", architecture.to_owned()), ("enaSupport", "true".into()), ("virtualizationType", "hvm".into())]
        });
        said.retain(|(name, _)| *name != "rootDeviceName");
        said.push(("rootDeviceName", root));
        self.remember(region, &id, query, said, mappings);
        Ok(done)
    }

    /// Refuses an image of the front's own that is not ready.
    pub(super) fn available(&self, region: &str, id: &str) -> Done<()> {
        let state = lock(&self.state);
        match state.images.get(id) {
            Some(image) if image.region != region => wrong("InvalidAMIID.NotFound", format!("The image id '[{id}]' does not exist")),
            Some(image) if image.since.elapsed() < state.settling => {
                wrong("InvalidAMIID.Unavailable", format!("The image ID '{id}' is currently pending and may not be run"))
            }
            _ => Ok(()),
        }
    }
}

/// Reads and checks what is said of the machine that an image is for.
fn described(query: &Query) -> Done<Vec<(&'static str, String)>> {
    let architecture = query.get("Architecture").unwrap_or("i386");
    if !["i386", "x86_64", "arm64", "x86_64_mac", "arm64_mac"].contains(&architecture) {
        return wrong("InvalidParameterValue", format!("Value ({architecture}) for parameter architecture is invalid."));
    }
    let virtualization = query.get("VirtualizationType").unwrap_or("paravirtual");
    if !["hvm", "paravirtual"].contains(&virtualization) {
        return wrong("InvalidParameterValue", format!("Value ({virtualization}) for parameter virtualizationType is invalid."));
    }
    let hvm = virtualization == "hvm";
    if (query.is("EnaSupport") || architecture.starts_with("arm64")) && !hvm {
        return wrong("InvalidParameterCombination", "ENA and arm64 need the virtualization type hvm");
    }
    let mut said = vec![
        ("architecture", architecture.to_owned()),
        ("virtualizationType", virtualization.to_owned()),
        ("enaSupport", query.is("EnaSupport").to_string()),
        ("rootDeviceName", query.get("RootDeviceName").unwrap_or_default().to_owned()),
    ];
    let boot = query.get("BootMode");
    if let Some(boot) = boot {
        let fits = match boot {
            "uefi" => true,
            "legacy-bios" | "uefi-preferred" => architecture != "arm64",
            _ => false,
        };
        if !fits || !hvm {
            return wrong(
                "InvalidParameterCombination",
                format!("The boot mode {boot} does not go with {architecture} and {virtualization}"),
            );
        }
        said.push(("bootMode", boot.to_owned()));
    }
    match query.get("ImdsSupport") {
        None => {}
        Some("v2.0") => said.push(("imdsSupport", "v2.0".into())),
        Some(other) => return wrong("InvalidParameterValue", format!("Value ({other}) for parameter imdsSupport is invalid.")),
    }
    match query.get("TpmSupport") {
        None => {}
        Some("v2.0") if matches!(boot, Some("uefi" | "uefi-preferred")) => said.push(("tpmSupport", "v2.0".into())),
        Some(_) => return wrong("InvalidParameterCombination", "tpmSupport v2.0 needs a boot mode with UEFI"),
    }
    Ok(said)
}
