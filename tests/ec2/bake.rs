//! Baking on EC2. The calls go to the front; the guest of an "instance" is a
//! QEMU guest of kiln's own base, which gets the very user data that the
//! instance was run with. It is reached through `ssh = { host, port }`.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kiln_testing::{Aws, Failure};
use serde_json::Value;

use crate::context::{Kiln, Ran, Template, tool, wait_until};
use crate::publish::{Cloud, REGION, disk_digest, first, raw};

/// Where nobody listens: a guest that never comes up.
const NOBODY: u16 = 9;

/// A free port of loopback.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// `[builder.ec2]` for guests at this port.
fn builder(port: u16, more: &str) -> String {
    format!("[builder.ec2]\nregion = '{REGION}'\nssh = {{ host = '127.0.0.1', port = {port} }}\nallow_from = ['127.0.0.1/32']\n{more}\n")
}

/// Asks moto itself, which counts as no call; gives its XML.
fn ask(address: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let scope = format!("Credential=test/20260101/{REGION}/ec2/aws4_request");
    write!(
        stream,
        "POST / HTTP/1.1\r\nHost: ec2.{REGION}.amazonaws.com\r\nContent-Type: application/x-www-form-urlencoded; charset=utf-8\r\n\
         Authorization: AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// What stands between two words, each time.
fn between<'a>(text: &'a str, start: &str, end: &str) -> Vec<&'a str> {
    text.split(start).skip(1).filter_map(|rest| rest.split(end).next()).collect()
}

/// Ids and states of moto's instances.
fn instances(moto: &str) -> Vec<(String, String)> {
    let text = ask(moto, "Action=DescribeInstances&Version=2016-11-15");
    let ids = between(&text, "<instanceId>", "</instanceId>");
    let states =
        between(&text, "<instanceState>", "</instanceState>").into_iter().filter_map(|state| between(state, "<name>", "</name>").pop());
    ids.into_iter().map(ToOwned::to_owned).zip(states.map(ToOwned::to_owned)).collect()
}

/// A server that gives cloud-init its user data once asked, for one guest.
fn serve_user_data(data: Vec<u8>, instance: &str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let meta = format!("instance-id: {instance}\n").into_bytes();
    // An RSA key takes an emulated processor minutes.
    let vendor = b"#cloud-config\nssh_genkeytypes: [ed25519]\n".to_vec();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut asked = [0; 4096];
            let length = stream.read(&mut asked).unwrap_or(0);
            let line = String::from_utf8_lossy(&asked[..length]).lines().next().unwrap_or_default().to_owned();
            let (status, body) = match line.split(' ').nth(1) {
                Some(path) if path.ends_with("/user-data") => ("200 OK", &data),
                Some(path) if path.ends_with("/meta-data") => ("200 OK", &meta),
                Some(path) if path.ends_with("/vendor-data") => ("200 OK", &vendor),
                _ => ("404 Not Found", &Vec::new()),
            };
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(body);
        }
    });
    port
}

/// Boots a guest for each instance that is run, one at a time, always from the
/// same disk: what was captured is what the next one starts from.
struct Hall {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Hall {
    fn open(cloud: &Cloud, disk: &Path, port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, moto, disk) = (stop.clone(), cloud.moto.address().to_owned(), disk.to_owned());
        let thread = std::thread::spawn(move || {
            let mut seen: Vec<String> = Vec::new();
            let mut guest: Option<(String, Child)> = None;
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                let now = instances(&moto);
                if let Some((id, child)) = &mut guest {
                    // Terminated without a word to its guest: it is cut off.
                    if now.iter().any(|(other, state)| other == id && state == "terminated") {
                        let _ = child.kill();
                    }
                    if child.try_wait().unwrap().is_some() {
                        guest = None;
                    }
                    continue;
                }
                let new = now.into_iter().find(|(id, state)| state == "running" && !seen.contains(id));
                if let Some((id, _)) = new {
                    seen.push(id.clone());
                    let child = boot(&moto, &id, &disk, port);
                    guest = Some((id, child));
                }
            }
            if let Some((_, mut child)) = guest {
                let _ = child.kill();
                let _ = child.wait();
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Hall {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Boots the guest of an instance.
fn boot(moto: &str, id: &str, disk: &Path, port: u16) -> Child {
    let told = ask(moto, &format!("Action=DescribeInstanceAttribute&InstanceId={id}&Attribute=userData&Version=2016-11-15"));
    let encoded = between(&told, "<value>", "</value>").pop().unwrap_or_else(|| panic!("moto gives no user data: {told}")).to_owned();
    let data = tool("python3", &["-c", "import base64,sys; sys.stdout.write(base64.b64decode(sys.argv[1]).decode())", encoded.trim()]);
    let server = serve_user_data(data.into_bytes(), id);
    let log = std::fs::File::create(disk.with_extension("console")).unwrap();
    Command::new("qemu-system-x86_64")
        .args(["-machine", "q35,accel=tcg", "-cpu", "max,la57=off", "-smp", "2", "-m", "1G", "-nographic", "-no-reboot"])
        .arg("-drive")
        .arg(format!("if=virtio,format=raw,file={}", disk.display()))
        .arg("-smbios")
        .arg(format!("type=1,serial=ds=nocloud-net;s=http://10.0.2.2:{server}/"))
        .arg("-netdev")
        .arg(format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"))
        .args(["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// A cloud that has an AMI of kiln's Debian base, with a home that has the base,
/// and a copy of its disk.
fn with_debian() -> (Cloud, PathBuf) {
    let cloud = Cloud::start();
    let shared = Kiln::shared();
    shared.ok(&["bake", Template::debian("base-for-all", "").path()]);
    cloud.take(&shared, "base-for-all:1");
    let disk = cloud.kiln.home.join("instance.raw");
    cloud.kiln.ok(&["export", "base-for-all:1", "--format", "raw", "-o", disk.to_str().unwrap()]);
    cloud.ok(&["publish", "base-for-all:1", "--to", "ec2:eu-central-1"]);
    (cloud, disk)
}

#[track_caller]
fn nothing_left(cloud: &Cloud, images: usize) {
    assert_eq!(cloud.kiln.leftovers(), Vec::<PathBuf>::new());
    let left = cloud.aws.left(REGION).unwrap();
    assert!(left.is_clean(), "{left:?}");
    assert_eq!((left.images.len(), left.snapshots.len()), (images, images), "{left:?}");
}

/// The last event.
fn last(ran: &Ran) -> Value {
    ran.events().pop().unwrap()
}

/// A real bake: an AMI of kiln's own as base, steps and tests in real guests,
/// the disk read back.
#[test]
fn a_bake_on_an_instance() {
    let (cloud, disk) = with_debian();
    let port = free_port();
    cloud.aws.lag(Duration::from_millis(300)).instance_disk(&disk);
    // A guest takes longer to go down than moto does; its disk is read when the
    // instance has stopped.
    cloud.aws.settling(Duration::from_secs(20));
    let _hall = Hall::open(&cloud, &disk, port);
    let template = Template::new(&format!(
        "[image]\nname = 'on-ec2'\nversion = '1'\nlabels = {{ team = 'shop' }}\n[base]\nimage = 'base-for-all:1'\n{}\
         [[provision]]\nname = 'word'\nshell = 'echo baked-on-ec2 > /etc/word'\n\
         [[test]]\nname = 'word'\nshell = 'grep -qx baked-on-ec2 /etc/word'\n",
        builder(port, "tags = { team = 'shop' }\nboot_timeout = '10m'")
    ));
    let ran = cloud.run(&["bake", template.path(), "--fetch", "--json"]);
    assert_eq!(ran.status, 0, "{ran}");
    let image = last(&ran)["images"][0].clone();
    let ami = image["artifacts"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!((image["artifacts"][0]["kind"].as_str(), image["artifacts"][0]["region"].as_str()), (Some("ec2"), Some(REGION)));

    nothing_left(&cloud, 2);
    // The first instance was stopped, the one for the tests was not.
    let done = |action: &str| cloud.aws.calls().iter().filter(|call| call.action == action && call.status == 200).count();
    assert_eq!((done("RunInstances"), done("TerminateInstances")), (2, 2));
    let tags =
        ask(cloud.moto.address(), &format!("Action=DescribeTags&Filter.1.Name=resource-id&Filter.1.Value.1={ami}&Version=2016-11-15"));
    for said in ["kiln:name", "kiln:version", "kiln:bake", "kiln:digest", image["digest"].as_str().unwrap(), "team"] {
        assert!(tags.contains(said), "no {said} in {tags}");
    }
    assert!(!tags.contains("kiln:unfinished"), "{tags}");

    // What was captured is what was read back, and what the guest left.
    let inspected = cloud.kiln.ok(&["inspect", "--json", "on-ec2:1"]).json();
    assert_eq!((&inspected["cloud"][0]["id"], &inspected["disk_digest"]), (&image["artifacts"][0]["id"], &image["disk_digest"]));
    let size = inspected["disks"][0]["size"].as_u64().unwrap();
    let snapshot = inspected["cloud"][0]["snapshots"][0].as_str().unwrap();
    let copy = cloud.kiln.home.join("snapshot.raw");
    cloud.aws.snapshot_to_raw(snapshot, &copy).unwrap();
    assert_eq!(disk_digest(&copy, size), image["disk_digest"].as_str().unwrap());

    // The step's file is in it, and none of kiln's keys.
    let changed = cloud.kiln.command(&["diff", "base-for-all:1", "on-ec2:1", "--json"]).output().unwrap();
    let changed = String::from_utf8(changed.stdout).unwrap();
    assert!(changed.contains("/etc/word"), "{changed}");
    for gone in ["/root/.ssh", "sshd_config.d", "ssh_host_"] {
        assert!(!changed.contains(gone), "{gone} in {changed}");
    }

    // The same again makes nothing, as long as the AMI is there.
    cloud.aws.settling(Duration::from_millis(200)).forget();
    let again = cloud.run(&["bake", template.path(), "--fetch", "--json"]);
    assert_eq!((again.status, &last(&again)["images"][0]["digest"]), (0, &image["digest"]), "{again}");
    assert_eq!(cloud.aws.count("RunInstances"), 0);
}

/// A bake that is interrupted, and one that is killed, while a step runs in a
/// real guest; one whose image AWS refuses to make.
#[test]
#[ignore = "takes minutes: four bakes in real guests"]
fn a_bake_that_ends_in_the_middle() {
    let (cloud, disk) = with_debian();
    let port = free_port();
    let _hall = Hall::open(&cloud, &disk, port);
    let template = |version: &str, step: &str| {
        let head = format!("[image]\nname = 'ended'\nversion = '{version}'\n[base]\nimage = 'base-for-all:1'\n");
        let tail = format!("[[provision]]\nshell = '{step}'\n");
        Template::new(&format!("{head}{}{tail}", builder(port, "boot_timeout = '10m'")))
    };
    for (version, signal) in [("1", "INT"), ("2", "TERM"), ("3", "KILL")] {
        let template = template(version, "echo in-the-middle; sleep 600");
        let log = cloud.kiln.home.join(format!("log-{version}"));
        let mut child = cloud
            .kiln
            .command(&["bake", template.path()])
            .envs(cloud.aws.environment())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        wait_until(Duration::from_secs(900), || std::fs::read_to_string(&log).unwrap().contains("in-the-middle"));
        tool("kill", &[&format!("-{signal}"), &child.id().to_string()]);
        let status = child.wait().unwrap().code();
        let said = std::fs::read_to_string(&log).unwrap();
        match signal {
            "INT" => assert_eq!(status, Some(130), "{said}"),
            "TERM" => assert_eq!(status, Some(143), "{said}"),
            _ => {
                assert!(!cloud.aws.left(REGION).unwrap().is_clean());
                let reaped = cloud.run(&["reap"]);
                assert_eq!(reaped.status, 0, "{reaped}");
            }
        }
        nothing_left(&cloud, 1);
    }
}

/// Each call that only a bake makes whose guest was provisioned, refused in turn.
#[test]
#[ignore = "takes minutes: a bake in a real guest for each call"]
fn whichever_late_call_is_refused_nothing_is_left() {
    let (cloud, disk) = with_debian();
    let port = free_port();
    cloud.aws.settling(Duration::from_secs(10));
    let _hall = Hall::open(&cloud, &disk, port);
    let bake = |version: usize| {
        let head = format!("[image]\nname = 'late'\nversion = '{version}'\n[base]\nimage = 'base-for-all:1'\n");
        let template = Template::new(&format!("{head}{}[[provision]]\nshell = 'true'\n", builder(port, "boot_timeout = '10m'")));
        cloud.run(&["bake", template.path(), "--json"])
    };
    cloud.aws.forget();
    let ran = bake(0);
    assert_eq!(ran.status, 0, "{ran}");
    nothing_left(&cloud, 2);
    let all = calls(&cloud.aws);
    let (early, late) = all.split_at(all.iter().position(|call| call == "StopInstances").unwrap());
    let mut late: Vec<&String> = late.iter().filter(|call| !early.contains(call)).collect();
    late.sort();
    late.dedup();
    assert!(late.iter().any(|call| *call == "CreateImage"), "{late:?}");
    let mut images = 2;
    for (number, action) in late.into_iter().enumerate() {
        cloud.aws.fail(action, 1, Failure::refused("UnauthorizedOperation"));
        let ran = bake(number + 1);
        cloud.aws.heal();
        // A call that only undoes something is made again until it is done.
        assert!([0, 1, 75].contains(&ran.status) && (ran.status > 0 || action != "CreateImage"), "{action}: {ran}");
        images += usize::from(ran.status == 0);
        nothing_left(&cloud, images);
    }
}

/// A cloud with an AMI of a small disk that boots nowhere: enough for all that
/// happens before a guest would answer.
fn with_small_disk() -> Cloud {
    let cloud = Cloud::start();
    let disk = raw(&cloud.kiln.home, "disk-1", 40, &first);
    cloud.kiln.ok(&["import", disk.to_str().unwrap(), "small:1"]);
    cloud.ok(&["publish", "small:1", "--to", "ec2:eu-central-1"]);
    cloud
}

fn unreachable(more: &str) -> Template {
    let head = "[image]\nname = 'never'\nversion = '1'\n[base]\nimage = 'small:1'\n";
    Template::new(&format!("{head}{}", builder(NOBODY, &format!("boot_timeout = '1s'\n{more}"))))
}

fn calls(aws: &Aws) -> Vec<String> {
    aws.calls().into_iter().map(|call| call.action).collect()
}

/// The guest never answers; and before that, each call in turn fails.
#[test]
fn whichever_call_is_refused_nothing_is_left() {
    whichever_call_fails(&Failure::refused("UnauthorizedOperation"));
}

#[test]
#[ignore = "takes minutes"]
fn whichever_answer_is_lost_nothing_is_left() {
    whichever_call_fails(&Failure::Lost);
}

fn whichever_call_fails(failure: &Failure) {
    let cloud = with_small_disk();
    let template = unreachable("");
    cloud.aws.forget();
    cloud.run(&["bake", template.path()]).fails(1, &["did not answer SSH", "127.0.0.1:9"]);
    nothing_left(&cloud, 1);
    let all = calls(&cloud.aws);
    for needed in ["ImportKeyPair", "CreateSecurityGroup", "RunInstances", "AuthorizeSecurityGroupIngress", "TerminateInstances"] {
        assert!(all.iter().any(|call| call == needed), "{needed} in {all:?}");
    }
    let mut wanted: Vec<&String> = all.iter().collect();
    wanted.sort();
    wanted.dedup();
    for action in wanted {
        cloud.aws.fail(action, 1, failure.clone());
        let ran = cloud.run(&["bake", template.path()]);
        assert!(ran.status == 1 || ran.status == 75, "{action} {failure:?}: {ran}");
        cloud.aws.heal();
        nothing_left(&cloud, 1);
    }
}

#[test]
fn killed_at_some_moments_and_reaped() {
    killed_and_reaped(8);
}

#[test]
#[ignore = "takes minutes"]
fn killed_at_30_random_moments_and_reaped() {
    killed_and_reaped(30);
}

fn killed_and_reaped(rounds: u64) {
    let cloud = with_small_disk();
    // Slow enough that there are moments to be killed at.
    cloud.aws.settling(Duration::from_millis(700));
    let template = unreachable("spot = true\ninstance_types = ['t3.small', 't3.medium']");
    let mut caught = 0;
    for round in 0..rounds {
        let mut child = cloud.kiln.command(&["bake", template.path()]);
        let mut child = child.envs(cloud.aws.environment()).stderr(Stdio::null()).spawn().unwrap();
        // Spread over the whole of it, in no order.
        std::thread::sleep(Duration::from_millis(100 + round * 1_103 % 3_300));
        let _ = child.kill();
        child.wait().unwrap();
        caught += u64::from(!cloud.aws.left(REGION).unwrap().is_clean());
        // With the ledger, and where that is lost, by the tags.
        let reaped = if round % 3 == 2 {
            drop(std::fs::remove_dir_all(cloud.kiln.home.join("ledger")));
            drop(std::fs::remove_dir_all(cloud.kiln.home.join("work")));
            // A call that was under way is carried out a moment later.
            std::thread::sleep(Duration::from_millis(500));
            cloud.run(&["reap", "--ec2", REGION, "--older-than", "0s"])
        } else {
            cloud.run(&["reap"])
        };
        assert_eq!(reaped.status, 0, "round {round}: {reaped}");
        nothing_left(&cloud, 1);
    }
    assert!(caught * 3 >= rounds, "only {caught} of {rounds} had anything to be reaped");
}

#[test]
fn throttled_and_lagging_it_comes_as_far_without_a_storm() {
    let cloud = with_small_disk();
    let template = unreachable("");
    cloud.aws.forget();
    cloud.run(&["bake", template.path()]).fails(1, &["did not answer SSH"]);
    let calm = cloud.aws.calls().len();
    cloud.aws.forget();
    cloud.aws.throttle(30).lag(Duration::from_secs(1));
    let began = Instant::now();
    cloud.run(&["bake", template.path()]).fails(1, &["did not answer SSH"]);
    cloud.aws.heal();
    let stormy = cloud.aws.calls().len();
    assert!(stormy < calm * 4, "{stormy} calls in {:?}, {calm} in peace", began.elapsed());
    nothing_left(&cloud, 1);
}

/// An image without a disk says so to whoever needs one.
#[test]
fn mistakes_are_told_before_anything_is_made() {
    let cloud = with_small_disk();
    cloud.aws.forget();
    let template = |base: &str, builder: &str| Template::new(&format!("[image]\nname = 'x'\nversion = '1'\n[base]\n{base}\n{builder}"));
    let here = builder(NOBODY, "");
    cloud.run(&["bake", template("ami = 'ami-0123456789abcdef0'", &here).path()]).fails(1, &["is not in eu-central-1"]);
    cloud.run(&["bake", template("ami = { name = 'debian-*' }", &here).path()]).fails(2, &["without `owners`"]);
    cloud.run(&["bake", template("ami = 'ami-0123456789abcdef0'", "").path()]).fails(2, &["[builder.ec2]"]);
    cloud.run(&["reap", "--ec2", "europe"]).fails(2, &["europe"]);
    assert_eq!(cloud.aws.count("RunInstances") + cloud.aws.count("ImportKeyPair"), 0);
    // Found by a filter, the newest of this account's.
    let found = template("ami = { name = 'small-1-*', owners = ['self'] }", &builder(NOBODY, "boot_timeout = '1s'"));
    cloud.run(&["bake", found.path()]).fails(1, &["did not answer SSH"]);
    nothing_left(&cloud, 1);
}
