//! Images as AMIs.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_testing::{Aws, Failure, Moto, Registry};
use serde_json::Value;

use crate::context::{Kiln, Ran, Template, new_word, tool, wait_until};

const BLOCK: usize = 524_288;
pub(crate) const REGION: &str = "eu-central-1";

/// The digest of a disk of `size` bytes that a raw file begins with, as
/// docs/image-format.md has it, by another program.
pub(crate) fn disk_digest(raw: &Path, size: u64) -> String {
    const PROGRAM: &str = r#"
import hashlib, sys
BLOCK, path, size = 524288, sys.argv[1], int(sys.argv[2])
disk = hashlib.sha256(f"kiln-disk-v1 {size} {BLOCK}\n".encode())
with open(sys.argv[1], "rb") as raw:
    left = size
    while left > 0:
        block = raw.read(min(BLOCK, left))
        left -= len(block)
        disk.update(hashlib.sha256(block.ljust(BLOCK, b"\0")).digest())
    assert not any(raw.read()), "there is something after the end"
print("sha256:" + disk.hexdigest())
"#;
    tool("python3", &["-c", PROGRAM, raw.to_str().unwrap(), &size.to_string()]).trim().to_owned()
}

/// A raw disk with an MBR, of so many blocks and half a one; `content` says
/// what is in each block that is not zeros.
pub(crate) fn raw(folder: &Path, name: &str, blocks: usize, content: &dyn Fn(usize) -> Option<u8>) -> PathBuf {
    let path = folder.join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len((blocks * BLOCK + 4096) as u64).unwrap();
    for block in 0..blocks {
        if let Some(byte) = content(block) {
            file.write_all_at(&[byte; BLOCK], (block * BLOCK) as u64).unwrap();
        }
    }
    file.write_all_at(&[0x80, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0], 446).unwrap();
    file.write_all_at(&[0x55, 0xaa], 510).unwrap();
    path
}

/// Blocks 0 to 39 with something in every block but each fifth.
pub(crate) fn first(block: usize) -> Option<u8> {
    (block % 5 != 4).then(|| u8::try_from(block + 1).unwrap())
}

/// The same but for one that changed, one that became zeros and one that was.
fn second(block: usize) -> Option<u8> {
    match block {
        10 => Some(200),
        11 => None,
        14 => Some(201),
        _ => first(block),
    }
}

/// A home, and AWS.
pub(crate) struct Cloud {
    pub(crate) kiln: Kiln,
    pub(crate) aws: Aws,
    // After the front, which asks it.
    pub(crate) moto: Moto,
}

impl Cloud {
    pub(crate) fn start() -> Self {
        let moto = Moto::start().unwrap();
        let aws = Aws::before(&moto).unwrap();
        Self { kiln: Kiln::fresh(), aws, moto }
    }

    /// With web:1 and web:2 in the store.
    fn with_disks() -> Self {
        let cloud = Self::start();
        let home = &cloud.kiln.home;
        for (version, content) in [("1", &first as &dyn Fn(usize) -> Option<u8>), ("2", &second)] {
            let disk = raw(home, &format!("disk-{version}"), 40, content);
            cloud.kiln.ok(&["import", disk.to_str().unwrap(), &format!("web:{version}")]);
        }
        cloud
    }

    pub(crate) fn run_in(&self, kiln: &Kiln, arguments: &[&str]) -> Ran {
        Ran::of(kiln.command(arguments).envs(self.aws.environment()).output().unwrap(), arguments)
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.run_in(&self.kiln, arguments)
    }

    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> Ran {
        let ran = self.run(arguments);
        assert_eq!(ran.status, 0, "{ran}");
        ran
    }

    /// Takes an image from another home. What was published never changes, and
    /// what is in the shared one is baked anew in every run.
    pub(crate) fn take(&self, from: &Kiln, reference: &str) {
        let archive = self.kiln.home.join("image.tar");
        let path = archive.to_str().unwrap();
        from.ok(&["save", reference, "-o", path]);
        self.kiln.ok(&["load", path]);
        std::fs::remove_file(archive).unwrap();
    }

    fn publish(&self, reference: &str, more: &[&str]) -> Value {
        let to = format!("ec2:{REGION}");
        let arguments = [&["publish", reference, "--to", &to, "--json"], more].concat();
        self.ok(&arguments).json()
    }

    /// Fails unless the snapshot holds exactly this image's disk.
    #[track_caller]
    fn check(&self, kiln: &Kiln, reference: &str, snapshot: &Value) {
        let image = kiln.ok(&["inspect", "--json", reference]).json();
        let size = image["disks"][0]["size"].as_u64().unwrap();
        let file = tempfile::NamedTempFile::new_in(&kiln.home).unwrap();
        self.aws.snapshot_to_raw(snapshot.as_str().unwrap(), file.path()).unwrap();
        assert_eq!(disk_digest(file.path(), size), image["disk_digest"].as_str().unwrap(), "{reference} in {snapshot}");
    }
}

#[test]
fn publish_incrementally_verify_and_publish_again() {
    let cloud = Cloud::with_disks();
    let one = cloud.publish("web:1", &["--tag", "team=shop"]);
    cloud.check(&cloud.kiln, "web:1", &one["amis"][0]["snapshots"][0]);
    assert_eq!((one["blocks_sent"].as_u64(), cloud.aws.count("PutSnapshotBlock")), (Some(32), 32));

    cloud.aws.forget();
    let two = cloud.publish("web:2", &[]);
    cloud.check(&cloud.kiln, "web:2", &two["amis"][0]["snapshots"][0]);
    assert_eq!(two["parents"][0], one["amis"][0]["snapshots"][0]);
    assert_eq!(cloud.aws.count("PutSnapshotBlock"), 3, "{two}");

    // What was published never changes, and publishing it again makes nothing.
    let third = raw(&cloud.kiln.home, "disk-3", 40, &|block| first(block + 1));
    cloud.run(&["import", third.to_str().unwrap(), "web:1"]).fails(4, &["web:1 was published"]);
    cloud.aws.forget();
    let again = cloud.publish("web:2", &[]);
    assert_eq!((&again["amis"][0]["ami"], again["amis"][0]["existed"].as_bool()), (&two["amis"][0]["ami"], Some(true)));
    for made in ["StartSnapshot", "PutSnapshotBlock", "RegisterImage"] {
        assert_eq!(cloud.aws.count(made), 0, "{made}");
    }

    // Read back by kiln itself, with the image and without.
    let ami = format!("ec2:{REGION}:{}", two["amis"][0]["ami"].as_str().unwrap());
    let verified = cloud.ok(&["verify", &ami, "--json"]).json();
    assert_eq!((verified["ok"].as_bool(), verified["compared_with"].as_str()), (Some(true), Some("image")));
    let image = cloud.kiln.ok(&["inspect", "--json", "web:2"]).json();
    assert_eq!(verified["disks"][0]["disk_digest"], image["disk_digest"]);
    let other = Kiln::fresh();
    let verified = cloud.run_in(&other, &["verify", &ami, "--json"]).json();
    assert_eq!((verified["ok"].as_bool(), verified["compared_with"].as_str()), (Some(true), Some("tags")));
    cloud.run(&["verify", "ec2:eu-central-1:ami-0123456789abcdef0"]).fails(1, &["InvalidAMIID.NotFound"]);
    cloud.run(&["publish", "web:2", "--to", "europe"]).fails(2, &["`europe` names nothing of EC2", "ec2:REGION"]);
}

#[test]
fn an_empty_home_takes_the_earlier_map_from_the_registry() {
    let cloud = Cloud::with_disks();
    let registry = Registry::builder().start().unwrap();
    let at = |version: &str| format!("{}/shop/web:{version}", registry.address());
    for version in ["1", "2"] {
        cloud.ok(&["push", &format!("web:{version}"), &at(version)]);
    }
    cloud.publish("web:1", &[]);
    cloud.aws.forget();
    let runner = Kiln::fresh();
    let published = cloud.run_in(&runner, &["publish", &at("2"), "--to", "ec2:eu-central-1", "--json"]);
    assert_eq!(published.status, 0, "{published}");
    assert_eq!(cloud.aws.count("PutSnapshotBlock"), 3, "{published}");
    cloud.check(&cloud.kiln, "web:2", &published.json()["amis"][0]["snapshots"][0]);
}

#[test]
fn more_regions_accounts_and_a_deprecation() {
    let cloud = Cloud::with_disks();
    let more = ["--to", "ec2:us-west-2", "--share-account", "210987654321", "--deprecate-after", "90d"];
    let published = cloud.publish("web:1", &more);
    let amis = published["amis"].as_array().unwrap();
    assert_eq!(amis.iter().map(|ami| ami["region"].as_str().unwrap()).collect::<Vec<_>>(), [REGION, "us-west-2"]);
    for ami in amis {
        cloud.check(&cloud.kiln, "web:1", &ami["snapshots"][0]);
        let address = format!("ec2:{}:{}", ami["region"].as_str().unwrap(), ami["ami"].as_str().unwrap());
        assert_eq!(cloud.ok(&["verify", &address, "--json"]).json()["ok"], true);
    }
    assert!(cloud.aws.count("EnableImageDeprecation") >= 2 && cloud.aws.count("ModifyImageAttribute") >= 2);
    // Again: nothing is copied a second time.
    cloud.aws.forget();
    assert_eq!(cloud.publish("web:1", &more)["amis"][1]["ami"], amis[1]["ami"]);
    assert_eq!(cloud.aws.count("CopyImage"), 0);
}

#[test]
fn throttling_lag_and_broken_connections_are_borne() {
    let cloud = Cloud::with_disks();
    cloud.aws.throttle(30).lag(Duration::from_millis(500));
    cloud.aws.fail("PutSnapshotBlock", 5, Failure::Broken).fail("PutSnapshotBlock", 11, Failure::Lost);
    cloud.aws.fail("CompleteSnapshot", 1, Failure::Lost).fail("RegisterImage", 1, Failure::Lost);
    let one = cloud.publish("web:1", &[]);
    let two = cloud.publish("web:2", &[]);
    cloud.check(&cloud.kiln, "web:1", &one["amis"][0]["snapshots"][0]);
    cloud.check(&cloud.kiln, "web:2", &two["amis"][0]["snapshots"][0]);
    // 35 blocks; three calls in ten in vain.
    let puts = cloud.aws.count("PutSnapshotBlock");
    assert!((35..105).contains(&puts), "{puts} calls for 35 blocks");
    cloud.aws.heal();
    let left = cloud.aws.left(REGION).unwrap();
    assert_eq!((left.images.len(), left.snapshots.len()), (2, 2), "{left:?}");
}

#[test]
fn a_killed_publish_goes_on_where_it_was() {
    let cloud = Cloud::with_disks();
    let mut sent = 0;
    // So slow that it can be killed in the middle.
    cloud.aws.throttle(60);
    for round in 0.. {
        let mut child = cloud.kiln.command(&["publish", "web:1", "--to", "ec2:eu-central-1"]);
        let mut child = child.envs(cloud.aws.environment()).stderr(std::process::Stdio::null()).spawn().unwrap();
        let before = taken(&cloud.aws);
        wait_until(Duration::from_secs(120), || taken(&cloud.aws) >= before + 8 || child.try_wait_ended());
        if child.try_wait().unwrap().is_some() {
            break;
        }
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
        sent = taken(&cloud.aws);
        assert!(round < 20, "it never gets anywhere");
    }
    assert!(sent > 0, "it was never killed");
    cloud.aws.heal();
    let published = cloud.publish("web:1", &[]);
    cloud.check(&cloud.kiln, "web:1", &published["amis"][0]["snapshots"][0]);
    // What was under way at each kill is sent again, and no more.
    assert!(taken(&cloud.aws) < 32 * 3, "{} for 32 blocks", taken(&cloud.aws));
    let left = cloud.aws.left(REGION).unwrap();
    assert_eq!((left.images.len(), left.snapshots.len()), (1, 1), "{left:?}");
}

/// Blocks that the front has taken.
fn taken(aws: &Aws) -> usize {
    aws.calls().iter().filter(|call| call.action == "PutSnapshotBlock" && call.status / 100 == 2).count()
}

trait Ended {
    fn try_wait_ended(&self) -> bool;
}

impl Ended for std::process::Child {
    fn try_wait_ended(&self) -> bool {
        // A zombie's state, without waiting for it.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
    }
}

#[test]
fn damage_in_the_store_never_becomes_an_ami() {
    let cloud = Cloud::with_disks();
    // Every pack exchanged for frames of another block.
    let blobs = cloud.kiln.store().join("blobs/sha256");
    let image = cloud.kiln.ok(&["inspect", "--json", "web:1"]).json();
    assert!(image["packs"]["count"].as_u64().unwrap() > 0, "{image}");
    for blob in std::fs::read_dir(blobs).unwrap() {
        let path = blob.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    cloud.run(&["publish", "web:1", "--to", "ec2:eu-central-1"]).fails(1, &["damaged"]);
    assert_eq!(cloud.aws.count("RegisterImage"), 0);
}

#[test]
fn parameters_follow_a_channel() {
    let cloud = Cloud::with_disks();
    let folder = cloud.kiln.home.clone();
    let path = |name: &str| folder.join(name).display().to_string();
    tool("openssl", &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", &path("p.key")]);
    std::fs::write(path("policy.toml"), "followers = [\"ssm:eu-central-1:/images/{name}/{channel}/{arch}\"]\n").unwrap();
    cloud.ok(&["policy", "set", "web@production", &path("policy.toml"), "--key", &path("p.key")]);
    // Without an AMI nothing moves.
    cloud.run(&["promote", "web:1", "--to", "production"]).fails(4, &["/images/web/production/amd64", "kiln publish"]);
    let one = cloud.publish("web:1", &[])["amis"][0]["ami"].clone();
    let two = cloud.publish("web:2", &[])["amis"][0]["ami"].clone();
    let promoted = cloud.ok(&["promote", "web:1", "--to", "production", "--json"]).json();
    assert_eq!((&promoted["followers"][0]["ami"], promoted["followers"][0]["changed"].as_bool()), (&one, Some(true)));
    // A fan-out that fails: the channel has moved, and the same again sets what is left.
    cloud.aws.fail("PutParameter", 1, Failure::refused("AccessDeniedException"));
    cloud.run(&["promote", "web:2", "--to", "production"]).fails(75, &["promote the same image again", "AccessDenied"]);
    assert_eq!(cloud.kiln.ok(&["inspect", "--json", "web@production"]).json()["version"], "2");
    let again = cloud.ok(&["promote", "web:2", "--to", "production", "--json"]).json();
    assert_eq!((again["changed"].as_bool(), &again["followers"][0]["ami"]), (Some(false), &two));
    let back = cloud.ok(&["rollback", "web@production", "--json"]).json();
    assert_eq!((&back["followers"][0]["ami"], back["followers"][0]["changed"].as_bool()), (&one, Some(true)));
}

#[test]
fn what_no_channel_needs_is_pruned() {
    let cloud = Cloud::with_disks();
    let home = &cloud.kiln.home;
    for version in ["3", "4"] {
        let number = version.parse::<u8>().unwrap();
        let disk = raw(home, &format!("disk-{version}"), 40, &|block| first(block).map(|byte| byte.wrapping_add(number)));
        cloud.kiln.ok(&["import", disk.to_str().unwrap(), &format!("web:{version}")]);
    }
    let mut amis = Vec::new();
    for version in ["1", "2", "3", "4"] {
        let published = cloud.publish(&format!("web:{version}"), &[]);
        amis.push(published["amis"][0]["ami"].as_str().unwrap().to_owned());
        // Times are told in seconds.
        std::thread::sleep(Duration::from_millis(1100));
    }
    let prune = ["prune", "ec2:eu-central-1", "--older-than", "0s", "--json"];
    let gone = |pruned: &Value| -> Vec<String> {
        let amis = pruned["amis"].as_array().unwrap().iter().filter(|ami| ami["kept"].is_null());
        amis.map(|ami| ami["ami"].as_str().unwrap().to_owned()).collect()
    };
    // Where no channel is known, nothing goes.
    assert!(gone(&cloud.ok(&prune).json()).is_empty());
    cloud.ok(&["promote", "web:2", "--to", "production"]);
    let would = cloud.ok(&[&prune[..], &["--dry-run"]].concat()).json();
    assert_eq!(gone(&would), [amis[2].clone(), amis[0].clone()], "{would}");
    assert_eq!(cloud.aws.left(REGION).unwrap().images.len(), 4);
    // By default what is younger than a week stays.
    assert!(gone(&cloud.ok(&["prune", "ec2:eu-central-1", "--json"]).json()).is_empty());
    assert_eq!(gone(&cloud.ok(&prune).json()), gone(&would));
    let left = cloud.aws.left(REGION).unwrap();
    assert_eq!((left.images.len(), left.snapshots.len()), (2, 2), "{left:?}");
    // The child of a snapshot that is gone is whole.
    let ami = format!("ec2:{REGION}:{}", amis[3]);
    assert_eq!(cloud.ok(&["verify", &ami, "--json"]).json()["ok"], true);
}

/// The real thing: nginx, and the same with one file changed.
#[test]
#[ignore = "takes minutes: ci/prove"]
fn nginx_and_the_same_with_another_page() {
    let cloud = Cloud::start();
    let shared = Kiln::with_nginx();
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/templates/debian-nginx");
    let text =
        std::fs::read_to_string(format!("{template}/kiln.toml")).unwrap().replace("name = \"debian-nginx\"", "name = \"another-page\"");
    // Its test would boot it once more, and is not what this is about.
    let copy = Template::new(text.split("[[test]]").next().unwrap());
    // Of another name, since other tests take the newest debian-nginx; and
    // another page in every run: one baked earlier would not go on from the
    // checkpoint of this run's nginx, but differ from it in every package.
    let page = std::fs::read_to_string(format!("{template}/site/index.html")).unwrap();
    copy.write("site/index.html", page.replace("</body>", &format!("<p>And one line more: {}.</p></body>", new_word())));
    shared.ok(&["bake", copy.path()]);
    for reference in ["debian-nginx:1.0.0", "another-page:1.0.0"] {
        cloud.take(&shared, reference);
    }
    let one = cloud.publish("debian-nginx:1.0.0", &[]);
    let all = cloud.aws.count("PutSnapshotBlock");
    cloud.check(&cloud.kiln, "debian-nginx:1.0.0", &one["amis"][0]["snapshots"][0]);
    cloud.aws.forget();
    let two = cloud.publish("another-page:1.0.0", &[]);
    let changed = cloud.aws.count("PutSnapshotBlock");
    cloud.check(&cloud.kiln, "another-page:1.0.0", &two["amis"][0]["snapshots"][0]);
    assert!(changed > 0 && changed * 100 <= all * 4, "{changed} of {all} blocks were sent");
}
