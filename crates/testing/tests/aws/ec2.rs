//! EC2, with moto behind.

use std::io::Read as _;
use std::time::{Duration, Instant};

use kiln_testing::{Aws, Failure, Moto};

use crate::http::{Answer, ec2, try_ask, try_ec2};

const REGION: &str = "eu-central-1";
/// SHA-256 of nothing, in base64.
const NOTHING: &str = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

fn ask(aws: &Aws, action: &str, parameters: &[(&str, &str)]) -> Answer {
    ec2(aws, REGION, action, parameters)
}

fn done(aws: &Aws, action: &str, parameters: &[(&str, &str)]) -> Answer {
    let answer = ask(aws, action, parameters);
    assert_eq!(answer.status, 200, "{action}: {}", answer.text());
    answer
}

fn snapshot(aws: &Aws, region: &str, size: u64) -> String {
    let body = serde_json::json!({ "VolumeSize": size, "Description": "d", "Tags": [{ "Key": "kiln:bake", "Value": "b1" }] }).to_string();
    let started = try_ask(aws, region, "ebs", "POST /snapshots", &[], body.as_bytes()).unwrap();
    assert_eq!(started.status, 201, "{}", started.text());
    started.json()["SnapshotId"].as_str().unwrap().to_owned()
}

fn complete(aws: &Aws, region: &str, id: &str) {
    let headers = [
        ("x-amz-ChangedBlocksCount", "0"),
        ("x-amz-Checksum", NOTHING),
        ("x-amz-Checksum-Algorithm", "SHA256"),
        ("x-amz-Checksum-Aggregation-Method", "LINEAR"),
    ];
    let completed = try_ask(aws, region, "ebs", &format!("POST /snapshots/completion/{id}"), &headers, b"").unwrap();
    assert_eq!(completed.status, 202, "{}", completed.text());
}

fn register<'a>(name: &'a str, snapshot: &'a str) -> Vec<(&'a str, &'a str)> {
    vec![
        ("Name", name),
        ("Architecture", "x86_64"),
        ("VirtualizationType", "hvm"),
        ("EnaSupport", "true"),
        ("BootMode", "uefi-preferred"),
        ("ImdsSupport", "v2.0"),
        ("RootDeviceName", "/dev/xvda"),
        ("BlockDeviceMapping.1.DeviceName", "/dev/xvda"),
        ("BlockDeviceMapping.1.Ebs.SnapshotId", snapshot),
        ("BlockDeviceMapping.1.Ebs.VolumeType", "gp3"),
        ("TagSpecification.1.ResourceType", "image"),
        ("TagSpecification.1.Tag.1.Key", "kiln:name"),
        ("TagSpecification.1.Tag.1.Value", "web"),
    ]
}

fn eventually(what: &str, check: impl Fn() -> bool) {
    let since = Instant::now();
    while !check() {
        assert!(since.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One moto for all that is below: it takes seconds to start.
#[test]
fn ec2_is_what_it_says() {
    let moto = Moto::start().unwrap();
    let aws = Aws::before(&moto).unwrap();
    snapshots_and_images(&aws);
    copies(&aws);
    tokens(&aws);
    lag(&aws);
    instances(&aws);
    keys(&aws);
    other_services(&aws);
}

fn snapshots_and_images(aws: &Aws) {
    aws.settling(Duration::from_millis(300));
    let id = snapshot(aws, REGION, 3);
    let state = || done(aws, "DescribeSnapshots", &[("SnapshotId.1", &id)]);
    assert_eq!((state().element("status"), state().element("volumeSize")), ("pending".into(), "3".into()));
    let tagged = [("Filter.1.Name", "tag:kiln:bake"), ("Filter.1.Value.1", "b1"), ("Owner.1", "self")];
    assert_eq!(done(aws, "DescribeSnapshots", &tagged).elements("snapshotId"), std::slice::from_ref(&id));
    assert!(aws.left(REGION).unwrap().volumes.is_empty(), "StartSnapshot makes no volume");

    let refused = |parameters: &[(&str, &str)]| ask(aws, "RegisterImage", parameters).element("Code");
    assert_eq!(refused(&register("web-1", &id)), "IncorrectState", "not completed");
    complete(aws, REGION, &id);
    assert_eq!(state().element("status"), "pending", "only after a while");
    eventually("it is completed", || state().element("status") == "completed");
    let completed = [("Filter.1.Name", "status"), ("Filter.1.Value.1", "completed"), ("Owner.1", "self")];
    assert_eq!(done(aws, "DescribeSnapshots", &completed).elements("snapshotId"), std::slice::from_ref(&id));

    assert_eq!(refused(&register("web-1", "snap-0123456789abcdef0")), "InvalidSnapshot.NotFound");
    assert_eq!(refused(&register("w", &id)), "InvalidAMIName.Malformed");
    let change = |name: &str, value: &'static str| {
        let mut all: Vec<(String, String)> = register("web-1", &id).into_iter().map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
        all.retain(|(key, _)| key != name);
        all.push((name.to_owned(), value.to_owned()));
        let pairs: Vec<(&str, &str)> = all.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        refused(&pairs)
    };
    assert_eq!(change("Architecture", "sparc"), "InvalidParameterValue");
    assert_eq!(change("Architecture", "arm64"), "InvalidParameterCombination", "arm64 boots by UEFI alone");
    assert_eq!(change("VirtualizationType", "paravirtual"), "InvalidParameterCombination");
    assert_eq!(change("ImdsSupport", "v1.0"), "InvalidParameterValue");
    assert_eq!(change("RootDeviceName", "/dev/sda1"), "InvalidBlockDeviceMapping");
    assert_eq!(change("BlockDeviceMapping.1.Ebs.VolumeSize", "2"), "InvalidBlockDeviceMapping");
    assert_eq!(change("BlockDeviceMapping.1.Ebs.Iops", "10"), "InvalidParameterCombination");

    let image = done(aws, "RegisterImage", &register("web-1", &id)).element("imageId");
    assert_eq!(refused(&register("web-1", &id)), "InvalidAMIName.Duplicate");
    let described = || done(aws, "DescribeImages", &[("ImageId.1", &image)]);
    assert_eq!(described().element("imageState"), "pending");
    eventually("it is available", || described().element("imageState") == "available");
    let said = described();
    for (name, value) in [
        ("architecture", "x86_64"),
        ("bootMode", "uefi-preferred"),
        ("imdsSupport", "v2.0"),
        ("enaSupport", "true"),
        ("rootDeviceName", "/dev/xvda"),
        ("snapshotId", id.as_str()),
        ("volumeSize", "3"),
        ("volumeType", "gp3"),
    ] {
        assert_eq!(said.element(name), value, "{name} in {}", said.text());
    }
    let found = [
        ("Owner.1", "self"),
        ("Filter.1.Name", "architecture"),
        ("Filter.1.Value.1", "x86_64"),
        ("Filter.2.Name", "tag:kiln:name"),
        ("Filter.2.Value.1", "web"),
    ];
    assert_eq!(done(aws, "DescribeImages", &found).elements("imageId"), std::slice::from_ref(&image));
    let none = [("Owner.1", "self"), ("Filter.1.Name", "architecture"), ("Filter.1.Value.1", "arm64")];
    assert!(done(aws, "DescribeImages", &none).elements("imageId").is_empty());
    let using = [("Filter.1.Name", "block-device-mapping.snapshot-id"), ("Filter.1.Value.1", id.as_str())];
    assert_eq!(done(aws, "DescribeImages", &using).elements("imageId"), std::slice::from_ref(&image));
    done(aws, "EnableImageDeprecation", &[("ImageId", &image), ("DeprecateAt", "2027-01-01T00:00:00Z")]);
    assert_eq!(described().element("deprecationTime"), "2027-01-01T00:00:00Z");

    let left = aws.left(REGION).unwrap();
    assert_eq!((left.images, left.snapshots), (vec![image.clone()], vec![id.clone()]), "what moto makes up is not shown");
    let delete = || ask(aws, "DeleteSnapshot", &[("SnapshotId", &id)]);
    assert_eq!(delete().element("Code"), "InvalidSnapshot.InUse");
    done(aws, "DeregisterImage", &[("ImageId", &image)]);
    assert_eq!(ask(aws, "DescribeImages", &[("ImageId.1", &image)]).element("Code"), "InvalidAMIID.NotFound");
    assert_eq!(delete().status, 200);
    assert_eq!(ask(aws, "DescribeSnapshots", &[("SnapshotId.1", &id)]).element("Code"), "InvalidSnapshot.NotFound");
}

fn copies(aws: &Aws) {
    aws.settling(Duration::ZERO);
    let id = snapshot(aws, REGION, 1);
    complete(aws, REGION, &id);
    let image = done(aws, "RegisterImage", &register("web-2", &id)).element("imageId");
    let to = "eu-west-1";
    let copy = [
        ("SourceImageId", image.as_str()),
        ("SourceRegion", REGION),
        ("Name", "web-2"),
        ("Encrypted", "true"),
        ("TagSpecification.1.ResourceType", "snapshot"),
        ("TagSpecification.1.Tag.1.Key", "kiln:name"),
        ("TagSpecification.1.Tag.1.Value", "web"),
    ];
    let copied = ec2(aws, to, "CopyImage", &copy);
    assert_eq!(copied.status, 200, "{}", copied.text());
    let copied = copied.element("imageId");
    let said = ec2(aws, to, "DescribeImages", &[("ImageId.1", &copied)]);
    let snapshot = said.element("snapshotId");
    assert!(snapshot != id && said.element("encrypted") == "true" && said.element("bootMode") == "uefi-preferred", "{}", said.text());
    let tagged = ec2(aws, to, "DescribeSnapshots", &[("Filter.1.Name", "tag:kiln:name"), ("Filter.1.Value.1", "web")]);
    assert_eq!((tagged.elements("snapshotId"), tagged.element("encrypted")), (vec![snapshot], "true".into()));
    let twin = ec2(aws, to, "CopySnapshot", &[("SourceRegion", REGION), ("SourceSnapshotId", &id)]);
    assert_eq!(twin.status, 200, "{}", twin.text());
    assert_eq!(
        ec2(aws, to, "CopySnapshot", &[("SourceRegion", to), ("SourceSnapshotId", &id)]).element("Code"),
        "InvalidSnapshot.NotFound"
    );
}

/// An image to start instances of.
fn image(aws: &Aws, name: &str) -> String {
    aws.settling(Duration::ZERO);
    let id = snapshot(aws, REGION, 1);
    complete(aws, REGION, &id);
    done(aws, "RegisterImage", &register(name, &id)).element("imageId")
}

fn tokens(aws: &Aws) {
    let image = image(aws, "web-tokens");
    let run = |token: &str, kind: &str| {
        ask(
            aws,
            "RunInstances",
            &[("ImageId", &image), ("MinCount", "1"), ("MaxCount", "1"), ("InstanceType", kind), ("ClientToken", token)],
        )
    };
    let first = run("t1", "t3.micro").element("instanceId");
    assert!(first.starts_with("i-"));
    assert_eq!(run("t1", "t3.micro").element("instanceId"), first);
    assert_eq!(run("t1", "t3.small").element("Code"), "IdempotentParameterMismatch");
    // The answer was lost, the instance is there: the same token finds it.
    aws.fail("RunInstances", 1, Failure::Lost);
    let lost = try_ec2(
        aws,
        REGION,
        "RunInstances",
        &[("ImageId", &image), ("MinCount", "1"), ("MaxCount", "1"), ("InstanceType", "t3.micro"), ("ClientToken", "t2")],
    );
    assert!(lost.is_none());
    let second = run("t2", "t3.micro").element("instanceId");
    assert!(second.starts_with("i-") && second != first);
    let left = aws.left(REGION).unwrap();
    assert_eq!(left.instances.len(), 2, "{left:?}");
    assert!(!left.is_clean());
    done(aws, "TerminateInstances", &[("InstanceId.1", &first), ("InstanceId.2", &second)]);
}

fn lag(aws: &Aws) {
    aws.lag(Duration::from_millis(400));
    let group = done(aws, "CreateSecurityGroup", &[("GroupName", "kiln-lag"), ("GroupDescription", "d")]).element("groupId");
    let delete = || ask(aws, "DeleteSecurityGroup", &[("GroupId", &group)]);
    let named = [("Filter.1.Name", "group-name"), ("Filter.1.Value.1", "kiln-lag")];
    assert_eq!(delete().element("Code"), "InvalidGroup.NotFound", "it does not exist yet");
    assert!(done(aws, "DescribeSecurityGroups", &named).elements("groupId").is_empty());
    eventually("it is seen", || !done(aws, "DescribeSecurityGroups", &named).elements("groupId").is_empty());
    assert_eq!(delete().status, 200);
    aws.heal();
}

fn instances(aws: &Aws) {
    let image = image(aws, "web-instances");
    aws.settling(Duration::from_millis(400));
    eventually("the image can be used", || done(aws, "DescribeImages", &[("ImageId.1", &image)]).element("imageState") == "available");
    let group = done(aws, "CreateSecurityGroup", &[("GroupName", "kiln-1"), ("GroupDescription", "d")]).element("groupId");
    let id = done(
        aws,
        "RunInstances",
        &[("ImageId", &image), ("MinCount", "1"), ("MaxCount", "1"), ("InstanceType", "t3.micro"), ("SecurityGroupId.1", &group)],
    )
    .element("instanceId");
    // The instance's own state, not its volumes' or interfaces'.
    let state = || {
        let said = done(aws, "DescribeInstances", &[("InstanceId.1", &id)]).element("instanceState");
        said.split_once("<name>").and_then(|(_, rest)| rest.split_once('<')).map(|(name, _)| name.to_owned()).unwrap_or_default()
    };
    assert_eq!(state(), "pending");
    assert_eq!(ask(aws, "StopInstances", &[("InstanceId.1", &id)]).element("Code"), "IncorrectInstanceState");
    eventually("it runs", || state() == "running");
    done(aws, "StopInstances", &[("InstanceId.1", &id)]);
    assert_eq!(state(), "stopping");
    let create = || {
        ask(
            aws,
            "CreateImage",
            &[
                ("InstanceId", &id),
                ("Name", "web-baked"),
                ("TagSpecification.1.ResourceType", "snapshot"),
                ("TagSpecification.1.Tag.1.Key", "kiln:bake"),
                ("TagSpecification.1.Tag.1.Value", "b2"),
            ],
        )
    };
    assert_eq!(create().element("Code"), "IncorrectState");
    eventually("it is stopped", || state() == "stopped");

    let folder = tempfile::tempdir().unwrap();
    let (disk, read) = (folder.path().join("disk"), folder.path().join("read"));
    let bytes: Vec<u8> = (0..600_000_u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(&disk, &bytes).unwrap();
    aws.instance_disk(&disk);
    let baked = create();
    assert_eq!(baked.status, 200, "{}", baked.text());
    let said = done(aws, "DescribeImages", &[("ImageId.1", &baked.element("imageId"))]);
    assert_eq!((said.element("architecture"), said.element("bootMode")), ("x86_64".into(), "uefi-preferred".into()), "of its source");
    let snapshot = said.element("snapshotId");
    aws.snapshot_to_raw(&snapshot, &read).unwrap();
    let mut begin = vec![0; bytes.len()];
    std::fs::File::open(&read).unwrap().read_exact(&mut begin).unwrap();
    assert_eq!(begin, bytes);
    let tagged = done(aws, "DescribeSnapshots", &[("Filter.1.Name", "tag:kiln:bake"), ("Filter.1.Value.1", "b2")]);
    assert_eq!(tagged.elements("snapshotId"), [snapshot]);

    let delete = || ask(aws, "DeleteSecurityGroup", &[("GroupId", &group)]);
    assert_eq!(delete().element("Code"), "DependencyViolation");
    done(aws, "TerminateInstances", &[("InstanceId.1", &id)]);
    assert_eq!(state(), "shutting-down");
    assert_eq!(delete().element("Code"), "DependencyViolation", "as long as it is not gone");
    eventually("the group can go", || delete().status == 200);
    let left = aws.left(REGION).unwrap();
    assert!(left.is_clean(), "{left:?}");
}

fn keys(aws: &Aws) {
    let made = done(aws, "CreateKeyPair", &[("KeyName", "kiln-1"), ("KeyType", "ed25519")]).element("keyPairId");
    done(aws, "CreateKeyPair", &[("KeyName", "kiln-2"), ("KeyType", "ed25519")]);
    assert_eq!(done(aws, "DescribeKeyPairs", &[("KeyPairId.1", &made)]).elements("keyName"), ["kiln-1"]);
    done(aws, "DeleteKeyPair", &[("KeyPairId", &made)]);
    assert_eq!(aws.left(REGION).unwrap().key_pairs, ["kiln-2"]);
    for call in [("DescribeKeyPairs", "KeyPairId.1"), ("DeleteKeyPair", "KeyPairId")] {
        assert_eq!(ask(aws, call.0, &[(call.1, &made)]).element("Code"), "InvalidKeyPair.NotFound");
    }
    done(aws, "DeleteKeyPair", &[("KeyName", "kiln-2")]);
    done(aws, "DeleteKeyPair", &[("KeyName", "kiln-2")]);
    assert!(aws.left(REGION).unwrap().is_clean());
}

fn other_services(aws: &Aws) {
    let ssm = |call: &str, body: &str| {
        let target = format!("AmazonSSM.{call}");
        let headers = [("X-Amz-Target", target.as_str()), ("Content-Type", "application/x-amz-json-1.1")];
        try_ask(aws, REGION, "ssm", "POST /", &headers, body.as_bytes()).unwrap()
    };
    let put = ssm("PutParameter", r#"{"Name": "/images/web", "Value": "ami-1", "Type": "String"}"#);
    assert_eq!(put.status, 200, "{}", put.text());
    assert_eq!(ssm("GetParameter", r#"{"Name": "/images/web"}"#).json()["Parameter"]["Value"], "ami-1");
    aws.throttle(100);
    let throttled = ssm("GetParameter", r#"{"Name": "/images/web"}"#);
    assert_eq!((throttled.status, throttled.json()["__type"].as_str()), (400, Some("ThrottlingException")));
    aws.heal();
    aws.throttle(100);
    assert_eq!(ask(aws, "DescribeVpcs", &[]).element("Code"), "RequestLimitExceeded");
    aws.heal();
    // OIDC: the one call that is not signed.
    let body = "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn=arn:aws:iam::123456789012:role/kiln&RoleSessionName=ci&WebIdentityToken=token";
    let kind = [("Content-Type", "application/x-www-form-urlencoded")];
    let role = try_ask(aws, REGION, "sts", "POST /", &kind, body.as_bytes()).unwrap();
    assert!(role.status == 200 && !role.element("SessionToken").is_empty(), "{}", role.text());
}
