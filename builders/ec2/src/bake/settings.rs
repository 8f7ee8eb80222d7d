//! `[builder.ec2]` and `[base] ami`, as they are written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_model::settings::{Node, Place, Problems, Reader, Value, wrong_type};

use crate::api::images::Audience;
use crate::api::machines::Spot;

/// Keys of `[builder.ec2]`.
pub(crate) const KEYS: &[&str] = &[
    "region",
    "instance_type",
    "instance_types",
    "spot",
    "address",
    "bastion",
    "ssh",
    "user",
    "host_key",
    "allow_from",
    "security_groups",
    "vpc",
    "subnet",
    "instance_profile",
    "user_data",
    "root",
    "volumes",
    "tags",
    "copy_to",
    "kms_keys",
    "share",
    "deprecate_after",
    "boot_timeout",
    "capture_timeout",
];

/// Most bytes of user data that EC2 takes.
const USER_DATA: u64 = 16 * 1024;

/// What `[builder.ec2]` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where its machines are.
    pub region: String,
    /// Instance types, tried in this order while AWS has no capacity.
    pub types: Vec<String>,
    /// As spot instances.
    pub spot: Option<Spot>,
    /// How the guest is reached.
    pub way: Way,
    /// Login name.
    pub user: String,
    /// How the host key comes to be known.
    pub host_key: HostKey,
    /// Networks (CIDR) that the temporary security group lets in; empty: this
    /// machine's address alone.
    pub allow_from: Vec<String>,
    /// Security groups to use in place of a temporary one.
    pub groups: Vec<String>,
    /// The VPC; `None`: the subnet's, or else the default one.
    pub vpc: Option<Chosen>,
    /// The subnet; `None`: one of the VPC's.
    pub subnet: Option<Chosen>,
    /// Instance profile, by name or ARN.
    pub profile: Option<String>,
    /// A file that the guest gets as user data.
    pub user_data: Option<PathBuf>,
    /// The root volume, beyond what `[disk]` says.
    pub root: Volume,
    /// Other volumes. They are in the image too.
    pub volumes: Vec<Volume>,
    /// Tags of everything that is made, kiln's own beside them.
    pub tags: BTreeMap<String, String>,
    /// Regions that get a copy of the image.
    pub copy_to: Vec<String>,
    /// The KMS key that encrypts the image in a region.
    pub kms_keys: BTreeMap<String, String>,
    /// Who else may use the image.
    pub share: Vec<Audience>,
    /// How long after the bake the image counts as deprecated.
    pub deprecate_after: Option<Duration>,
    /// How long an instance may take until it answers.
    pub boot_timeout: Duration,
    /// How long AWS may take to make the image, or a copy of it.
    pub capture_timeout: Duration,
}

/// How the guest is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// By the instance's public address.
    Public,
    /// By its address in the VPC.
    Private,
    /// By its address in the VPC, through another host: what `ssh -J` takes.
    Bastion(String),
    /// There, whatever address EC2 says.
    Explicit {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
    },
}

/// How the host key comes to be known before the first connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKey {
    /// The guest gets one by its user data.
    Inject,
    /// The guest's cloud-init writes its own to the console, from where AWS
    /// gives it some minutes later.
    Console,
}

/// Something that is named by its id, or found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chosen {
    /// By its id.
    Id(String),
    /// By filters in EC2's words.
    Filter(BTreeMap<String, String>),
}

/// A volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volume {
    /// Its device; empty for the root, whose device the AMI names.
    pub device: String,
    /// Its size in GiB.
    pub gib: Option<u32>,
    /// Volume type.
    pub volume_type: Option<String>,
    /// I/O operations a second.
    pub iops: Option<u32>,
    /// MiB a second.
    pub throughput: Option<u32>,
    /// A snapshot to make it from.
    pub snapshot: Option<String>,
    /// ARN of the KMS key that encrypts it.
    pub kms_key: Option<String>,
}

/// What `[base] ami` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ami {
    /// Which one.
    pub chosen: Chosen,
    /// Whose it is: account numbers, `self`, `amazon`.
    pub owners: Vec<String>,
    /// Where it is; `None`: where the builder is.
    pub region: Option<String>,
}

/// Reads `[builder.ec2]`.
pub(crate) fn read(node: &Node, folder: &Path, problems: &mut Problems) -> Option<Settings> {
    let before = problems.0.len();
    let mut reader = Reader::new(node, "[builder.ec2]", problems)?;
    let region = reader.required_string("region", problems).map(ToOwned::to_owned);
    if let (Some(region), Some(entry)) = (&region, reader.entry("region")) {
        check_region(region, entry.node.place, problems);
    }
    let single = reader.string("instance_type", problems).map(ToOwned::to_owned);
    let several = reader.strings("instance_types", problems);
    let types = match (single, several) {
        (Some(_), Some(_)) => {
            problems.add(node.place, "`instance_type` and `instance_types` in one builder").help("keep one of them");
            Vec::new()
        }
        (Some(one), None) => vec![one],
        (None, Some(several)) => {
            if several.is_empty() {
                problems.add(node.place, "`instance_types` is empty");
            }
            several.into_iter().map(|(text, _)| text.to_owned()).collect()
        }
        (None, None) => vec!["t3.small".to_owned()],
    };
    let spot = read_spot(&mut reader, problems);
    let way = read_way(&mut reader, problems);
    let user = reader.string("user", problems).map(ToOwned::to_owned);
    let host_key = choice(&mut reader, "host_key", &[("inject", HostKey::Inject), ("console", HostKey::Console)], problems);
    let host_key = host_key.unwrap_or(HostKey::Inject);
    if host_key == HostKey::Console && user.is_none() {
        problems
            .add(node.place, "host_key = \"console\" needs `user`")
            .help("the login that the image makes for its key pair, such as \"admin\" or \"ec2-user\"");
    }
    let allow_from = words(&mut reader, "allow_from", problems, |text| {
        is_network(text).then_some(()).ok_or("is not a network such as \"203.0.113.0/24\"")
    });
    let groups = words(&mut reader, "security_groups", problems, |text| starts(text, "sg-"));
    if !groups.is_empty() && !allow_from.is_empty() {
        problems
            .add(node.place, "`allow_from` is for the temporary security group, and `security_groups` takes its place")
            .help("keep one of them");
    }
    if matches!(way, Way::Bastion(_)) && groups.is_empty() && allow_from.is_empty() {
        problems
            .add(node.place, "behind a bastion it is not known from which address the guest will be reached")
            .help("say the bastion's own with `allow_from`, or name `security_groups`");
    }
    let vpc = chosen(&mut reader, "vpc", "vpc-", problems);
    let subnet = chosen(&mut reader, "subnet", "subnet-", problems);
    let profile = reader.string("instance_profile", problems).map(ToOwned::to_owned);
    let user_data = reader.existing_path("user_data", folder, problems);
    if let Some(path) = &user_data
        && std::fs::metadata(path).is_ok_and(|meta| meta.len() > USER_DATA / 2)
    {
        let place = reader.entry("user_data").map_or(node.place, |entry| entry.node.place);
        problems.add(place, "EC2 takes 16 KiB of user data, and kiln needs half of it").help("let it include the rest from elsewhere");
    }
    let root = match reader.entry("root") {
        Some(entry) => read_volume(&entry.node, true, problems),
        None => Volume::default(),
    };
    let volumes = match reader.entry("volumes") {
        Some(entry) => match &entry.node.value {
            Value::Array(items) => items.iter().map(|item| read_volume(item, false, problems)).collect(),
            _ => wrong_type(&entry.node, "volumes", "an array of tables", problems).unwrap_or_default(),
        },
        None => Vec::new(),
    };
    let tags = reader.string_map("tags", problems).unwrap_or_default();
    if let Some(name) = tags.keys().find(|name| name.starts_with("kiln:") || name.starts_with("aws:")) {
        problems.add(node.place, format!("the tag `{name}` is not free: `kiln:` and `aws:` begin names of their own"));
    }
    let copy_to =
        words(&mut reader, "copy_to", problems, |text| is_region(text).then_some(()).ok_or("is not a region such as \"eu-west-1\""));
    let kms_keys = reader.string_map("kms_keys", problems).unwrap_or_default();
    let share = read_share(&mut reader, problems);
    let deprecate_after = reader.duration("deprecate_after", problems);
    let boot_timeout = positive(&mut reader, "boot_timeout", Duration::from_secs(600), problems);
    let capture_timeout = positive(&mut reader, "capture_timeout", Duration::from_secs(3600), problems);
    // `type` names the kind; whoever chose this one has read it.
    reader.finish_with(&["type"], problems);
    (problems.0.len() == before).then_some(())?;
    Some(Settings {
        region: region?,
        types,
        spot,
        way,
        user: user.unwrap_or_else(|| "root".to_owned()),
        host_key,
        allow_from,
        groups,
        vpc,
        subnet,
        profile,
        user_data,
        root,
        volumes,
        tags,
        copy_to,
        kms_keys,
        share,
        deprecate_after,
        boot_timeout,
        capture_timeout,
    })
}

/// Reads `ami` of `[base]`: an id, or a table.
pub(crate) fn read_ami(node: &Node, problems: &mut Problems) -> Option<Ami> {
    let before = problems.0.len();
    let mut base = Reader::new(node, "[base]", problems)?;
    let entry = base.entry("ami")?;
    base.finish(problems);
    if let Value::String(id) = &entry.node.value {
        check_id(id, "ami-", entry.node.place, problems);
        let ami = Ami { chosen: Chosen::Id(id.clone()), owners: Vec::new(), region: None };
        return (problems.0.len() == before).then_some(ami);
    }
    let mut reader = Reader::new(&entry.node, "`ami`", problems)?;
    let id = reader.string("id", problems).map(ToOwned::to_owned);
    if let (Some(id), Some(entry)) = (&id, reader.entry("id")) {
        check_id(id, "ami-", entry.node.place, problems);
    }
    let mut filter = reader.string_map("filter", problems).unwrap_or_default();
    if let Some(name) = reader.string("name", problems) {
        filter.insert("name".to_owned(), name.to_owned());
    }
    let owners = words(&mut reader, "owners", problems, |_| Ok(()));
    let region = reader.string("region", problems).map(ToOwned::to_owned);
    if let (Some(region), Some(entry)) = (&region, reader.entry("region")) {
        check_region(region, entry.node.place, problems);
    }
    reader.finish(problems);
    let chosen = match (id, filter.is_empty()) {
        (Some(_), false) => {
            problems.add(entry.node.place, "`ami` has an id and a filter").help("keep one of them");
            return None;
        }
        (Some(id), true) => Chosen::Id(id),
        (None, false) => {
            // Anybody may publish an image under any name.
            if owners.is_empty() {
                problems
                    .add(entry.node.place, "a filter without `owners` finds images of anybody, whatever their names promise")
                    .help("such as owners = [\"136693071363\"] for Debian's own, or [\"self\"]");
            }
            Chosen::Filter(filter)
        }
        (None, true) => {
            problems
                .add(entry.node.place, "`ami` does not say which one")
                .help("ami = \"ami-…\", or ami = { name = \"debian-12-amd64-*\", owners = [\"…\"] }");
            return None;
        }
    };
    (problems.0.len() == before).then_some(Ami { chosen, owners, region })
}

fn read_spot(reader: &mut Reader<'_>, problems: &mut Problems) -> Option<Spot> {
    let entry = reader.entry("spot")?;
    match &entry.node.value {
        Value::Boolean(false) => None,
        Value::Boolean(true) => Some(Spot::default()),
        Value::Table(_) => {
            let mut spot = Reader::new(&entry.node, "`spot`", problems)?;
            let max_price = spot.string("max_price", problems).map(ToOwned::to_owned);
            if max_price.as_ref().is_some_and(|price| !price.parse::<f64>().is_ok_and(|price| price > 0.0)) {
                problems.add(entry.node.place, "`max_price` is US dollars an hour, such as \"0.05\"");
            }
            spot.finish(problems);
            Some(Spot { max_price })
        }
        _ => wrong_type(&entry.node, "spot", "true, false or { max_price = \"…\" }", problems),
    }
}

fn read_way(reader: &mut Reader<'_>, problems: &mut Problems) -> Way {
    let address = choice(reader, "address", &[("public", Way::Public), ("private", Way::Private)], problems);
    let bastion = reader.string("bastion", problems).map(ToOwned::to_owned);
    let explicit = reader.entry("ssh");
    let place = reader.place();
    if usize::from(bastion.is_some()) + usize::from(explicit.is_some()) + usize::from(address == Some(Way::Public)) > 1 {
        problems.add(place, "the guest is to be reached in two ways").help("keep one of `address`, `bastion` and `ssh`");
    }
    if let Some(bastion) = bastion {
        if bastion.is_empty() || bastion.starts_with('-') {
            problems.add(place, "`bastion` is a host that `ssh` reaches, such as \"user@bastion.example.com\"");
        }
        return Way::Bastion(bastion);
    }
    if let Some(entry) = explicit
        && let Some(mut ssh) = Reader::new(&entry.node, "`ssh`", problems)
    {
        let host = ssh.required_string("host", problems).unwrap_or_default().to_owned();
        let port = match ssh.integer("port", problems) {
            None => 22,
            Some(port) => u16::try_from(port).unwrap_or(0),
        };
        if port == 0 {
            problems.add(entry.node.place, "`port` is a TCP port, from 1 to 65535");
        }
        ssh.finish(problems);
        return Way::Explicit { host, port };
    }
    address.unwrap_or(Way::Public)
}

fn read_volume(node: &Node, root: bool, problems: &mut Problems) -> Volume {
    let what = if root { "`root`" } else { "a volume" };
    let Some(mut reader) = Reader::new(node, what, problems) else { return Volume::default() };
    let mut volume = Volume::default();
    let number = |value: Option<u64>| value.map(|value| u32::try_from(value).unwrap_or(u32::MAX));
    if !root {
        volume.device = reader.required_string("device", problems).unwrap_or_default().to_owned();
        volume.snapshot = reader.string("snapshot", problems).map(ToOwned::to_owned);
        volume.gib = reader.size("size", problems).map(crate::bake::gib);
        if volume.gib.is_none() && volume.snapshot.is_none() {
            problems.add(node.place, "a volume needs `size` or `snapshot`");
        }
    }
    volume.volume_type = reader.string("type", problems).map(ToOwned::to_owned);
    volume.iops = number(reader.integer("iops", problems));
    volume.throughput = number(reader.integer("throughput", problems));
    volume.kms_key = reader.string("kms_key", problems).map(ToOwned::to_owned);
    reader.finish(problems);
    volume
}

fn read_share(reader: &mut Reader<'_>, problems: &mut Problems) -> Vec<Audience> {
    let Some(entry) = reader.entry("share") else { return Vec::new() };
    let Some(mut share) = Reader::new(&entry.node, "`share`", problems) else { return Vec::new() };
    let account = |text: &str| {
        (text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit())).then_some(()).ok_or("is not an account's number of 12 digits")
    };
    let arn = |text: &str| text.starts_with("arn:").then_some(()).ok_or("is not an ARN");
    let mut all: Vec<Audience> = words(&mut share, "accounts", problems, account).into_iter().map(Audience::Account).collect();
    all.extend(words(&mut share, "organizations", problems, arn).into_iter().map(Audience::Organization));
    all.extend(words(&mut share, "units", problems, arn).into_iter().map(Audience::Unit));
    share.finish(problems);
    all
}

fn chosen(reader: &mut Reader<'_>, name: &'static str, prefix: &str, problems: &mut Problems) -> Option<Chosen> {
    let entry = reader.entry(name)?;
    match &entry.node.value {
        Value::String(id) => {
            check_id(id, prefix, entry.node.place, problems);
            Some(Chosen::Id(id.clone()))
        }
        Value::Table(table) => {
            if table.entries.is_empty() {
                problems.add(entry.node.place, format!("the filter of `{name}` is empty")).help("such as { \"tag:Name\" = \"build\" }");
            }
            reader.string_map(name, problems).map(Chosen::Filter)
        }
        _ => wrong_type(&entry.node, name, &format!("an id ({prefix}…) or a table of filters"), problems),
    }
}

fn words(
    reader: &mut Reader<'_>,
    name: &'static str,
    problems: &mut Problems,
    check: impl Fn(&str) -> Result<(), &'static str>,
) -> Vec<String> {
    let mut all = Vec::new();
    for (text, place) in reader.strings(name, problems).unwrap_or_default() {
        match check(text) {
            Ok(()) => all.push(text.to_owned()),
            Err(why) => drop(problems.add(place, format!("`{text}` {why}"))),
        }
    }
    all
}

fn positive(reader: &mut Reader<'_>, name: &'static str, default: Duration, problems: &mut Problems) -> Duration {
    let value = reader.duration(name, problems);
    if value == Some(Duration::ZERO) {
        let place = reader.entry(name).map_or(reader.place(), |entry| entry.node.place);
        problems.add(place, format!("`{name}` must be longer than nothing"));
    }
    value.unwrap_or(default)
}

fn choice<T: Clone>(reader: &mut Reader<'_>, name: &'static str, choices: &[(&str, T)], problems: &mut Problems) -> Option<T> {
    let text = reader.string(name, problems)?;
    if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
        return Some(value.clone());
    }
    let place = reader.entry(name).map_or(reader.place(), |entry| entry.node.place);
    let words: Vec<String> = choices.iter().map(|(word, _)| format!("\"{word}\"")).collect();
    problems.add(place, format!("`{name}` must be one of {}", words.join(", ")));
    None
}

fn starts(text: &str, prefix: &str) -> Result<(), &'static str> {
    let rest = text.strip_prefix(prefix);
    let good = rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_hexdigit()));
    good.then_some(()).ok_or("is not an id")
}

fn check_id(text: &str, prefix: &str, place: Place, problems: &mut Problems) {
    if starts(text, prefix).is_err() {
        problems.add(place, format!("`{text}` is not an id of the form {prefix}0123456789abcdef0"));
    }
}

fn check_region(text: &str, place: Place, problems: &mut Problems) {
    if !is_region(text) {
        problems.add(place, format!("`{text}` is not a region")).help("such as \"eu-central-1\"");
    }
}

/// Whether a text has the form of a region (`eu-central-1`, `us-gov-west-1`).
pub(crate) fn is_region(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let (Some(last), true) = (parts.last(), parts.len() >= 3) else { return false };
    last.bytes().all(|b| b.is_ascii_digit())
        && !last.is_empty()
        && parts.iter().all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()))
}

fn is_network(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else { return false };
    let (Ok(address), Ok(length)) = (address.parse::<std::net::IpAddr>(), length.parse::<u8>()) else { return false };
    length <= if address.is_ipv4() { 32 } else { 128 }
}

#[cfg(test)]
mod tests {
    use kiln_model::settings::{Entry, Table};

    use super::*;

    fn node(value: Value) -> Node {
        Node { value, place: Place::default() }
    }

    fn table(entries: &[(&str, Value)]) -> Value {
        let place = Place::default();
        let entries = entries.iter().map(|(name, value)| Entry { name: (*name).into(), place, node: node(value.clone()) }).collect();
        Value::Table(Table { entries })
    }

    fn text(text: &str) -> Value {
        Value::String(text.into())
    }

    fn list(items: &[&str]) -> Value {
        Value::Array(items.iter().map(|item| node(text(item))).collect())
    }

    fn read_all(entries: &[(&str, Value)]) -> Result<Settings, Vec<String>> {
        let mut problems = Problems::default();
        let settings = read(&node(table(entries)), Path::new("/nowhere"), &mut problems);
        settings.ok_or_else(|| problems.0.into_iter().map(|problem| problem.message).collect())
    }

    #[test]
    fn a_region_is_all_it_needs() {
        let settings = read_all(&[("region", text("eu-central-1"))]).unwrap();
        assert_eq!(settings.types, ["t3.small"]);
        assert_eq!((settings.way, settings.host_key, settings.user.as_str()), (Way::Public, HostKey::Inject, "root"));
        assert_eq!((settings.spot, settings.subnet, settings.allow_from.len()), (None, None, 0));
        assert_eq!(read_all(&[]).unwrap_err(), ["[builder.ec2] needs `region`"]);
    }

    #[test]
    fn everything_that_can_be_said() {
        let volume = table(&[("device", text("/dev/sdf")), ("size", text("10GiB")), ("type", text("io2")), ("iops", Value::Integer(900))]);
        let settings = read_all(&[
            ("region", text("us-gov-west-1")),
            ("instance_types", list(&["m7i.large", "m6i.large"])),
            ("spot", table(&[("max_price", text("0.05"))])),
            ("ssh", table(&[("host", text("127.0.0.1")), ("port", Value::Integer(2222))])),
            ("allow_from", list(&["203.0.113.0/24", "2001:db8::/32"])),
            ("subnet", table(&[("tag:Name", text("build"))])),
            ("vpc", text("vpc-0a1b")),
            ("volumes", Value::Array(vec![node(volume)])),
            ("copy_to", list(&["eu-west-1"])),
            ("share", table(&[("accounts", list(&["123456789012"]))])),
            ("deprecate_after", text("90d")),
        ])
        .unwrap();
        assert_eq!(settings.types.len(), 2);
        assert_eq!(settings.spot.unwrap().max_price.as_deref(), Some("0.05"));
        assert_eq!(settings.way, Way::Explicit { host: "127.0.0.1".into(), port: 2222 });
        assert_eq!(settings.subnet, Some(Chosen::Filter(BTreeMap::from([("tag:Name".into(), "build".into())]))));
        assert_eq!((settings.volumes[0].gib, settings.volumes[0].iops), (Some(10), Some(900)));
        assert_eq!(settings.share, [Audience::Account("123456789012".into())]);
        assert_eq!(settings.deprecate_after, Some(Duration::from_secs(90 * 86_400)));
    }

    #[test]
    fn mistakes_are_told() {
        let region = ("region", text("eu-central-1"));
        for (entries, word) in [
            (vec![("region", text("Frankfurt"))], "is not a region"),
            (vec![region.clone(), ("vpc", text("subnet-1"))], "is not an id"),
            (vec![region.clone(), ("allow_from", list(&["everywhere"]))], "is not a network"),
            (vec![region.clone(), ("allow_from", list(&["10.0.0.0/33"]))], "is not a network"),
            (vec![region.clone(), ("host_key", text("console"))], "needs `user`"),
            (vec![region.clone(), ("bastion", text("jump"))], "behind a bastion"),
            (vec![region.clone(), ("bastion", text("-oProxyCommand=x")), ("security_groups", list(&["sg-1"]))], "`bastion` is a host"),
            (vec![region.clone(), ("share", table(&[("accounts", list(&["12"]))]))], "12 digits"),
            (vec![region.clone(), ("tags", table(&[("kiln:bake", text("x"))]))], "is not free"),
            (vec![region.clone(), ("volumes", Value::Array(vec![node(table(&[("device", text("/dev/sdf"))]))]))], "needs `size`"),
            (vec![region.clone(), ("instance_type", text("a")), ("instance_types", list(&["b"]))], "in one builder"),
            (vec![region.clone(), ("boot_timeout", text("0s"))], "longer than nothing"),
            (vec![region, ("regoin", text("x"))], "unknown key"),
        ] {
            let found = read_all(&entries).unwrap_err();
            assert!(found.iter().any(|message| message.contains(word)), "{word}: {found:?}");
        }
    }

    #[test]
    fn an_ami_has_an_id_or_an_owner() {
        let read = |value: Value| {
            let mut problems = Problems::default();
            let ami = read_ami(&node(table(&[("ami", value)])), &mut problems);
            ami.ok_or_else(|| problems.0.into_iter().map(|problem| problem.message).collect::<Vec<_>>().join("; "))
        };
        assert_eq!(read(text("ami-0abc")).unwrap().chosen, Chosen::Id("ami-0abc".into()));
        let named = read(table(&[("name", text("debian-12-*")), ("owners", list(&["136693071363"]))])).unwrap();
        assert_eq!(named.chosen, Chosen::Filter(BTreeMap::from([("name".into(), "debian-12-*".into())])));
        for (value, word) in [
            (text("debian"), "is not an id"),
            (table(&[]), "does not say which"),
            (table(&[("name", text("debian-12-*"))]), "without `owners`"),
            (table(&[("id", text("ami-1")), ("name", text("x"))]), "an id and a filter"),
            (table(&[("id", text("ami-1")), ("newest", Value::Boolean(true))]), "unknown key"),
        ] {
            let found = read(value).unwrap_err();
            assert!(found.contains(word), "{word}: {found}");
        }
    }
}
