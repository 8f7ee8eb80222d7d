//! Whole bakes against EC2 in memory: what is made, what is left, whatever
//! fails and whenever it ends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::base::{Base, BaseDisk, BaseSource as _, DiskFile, DiskFormat};
use kiln_model::cleanup::Scope;
use kiln_model::event::{Event, Reporter, Reports};
use kiln_model::guest::{Command, Exit, Guest, OnLine, SshAccess};
use kiln_model::image::{CloudImage, Firmware};
use kiln_model::ledger::{self, Ledger, Resource};
use kiln_model::machine::{Builder as _, Context, Machine, Naming, Start};
use kiln_model::secret::Redactor;
use kiln_model::tree::Tree;
use kiln_model::{Code, Digest, Error, Result};
use kiln_ssh::{Keys, Target};

use super::base::AmiSource;
use super::settings::{Ami, Chosen, HostKey, Settings, Volume, Way};
use super::testing::{Fake, Fault, quick};
use super::{Access, Around, Boxed, EC2, Ec2Builder, Leftovers, reap_ledger, reap_region};
use crate::api::Cloud;
use crate::api::images::Audience;
use crate::api::machines::Spot;
use crate::tags;

const HERE: &str = "eu-central-1";
const THERE: &str = "eu-west-1";
const AMI: &str = "ami-0ba5e";

/// A guest that does whatever it is asked.
struct Willing;

#[async_trait]
impl Guest for Willing {
    async fn execute(&self, _: &Command, _: OnLine<'_>) -> Result<Exit> {
        Ok(Exit::Status(0))
    }
    async fn upload(&self, _: &Tree, _: &str) -> Result<()> {
        Ok(())
    }
    async fn download(&self, _: &str, _: &Path) -> Result<()> {
        Ok(())
    }
    async fn wait_for_new_boot(&self, _: &str, _: Duration) -> Result<()> {
        Ok(())
    }
    fn ssh_access(&self) -> Option<SshAccess> {
        None
    }
}

fn settings() -> Settings {
    Settings {
        region: HERE.into(),
        types: vec!["t3.small".into()],
        spot: None,
        way: Way::Public,
        user: "root".into(),
        host_key: HostKey::Inject,
        allow_from: vec![],
        groups: vec![],
        vpc: None,
        subnet: None,
        profile: None,
        user_data: None,
        root: Volume::default(),
        volumes: vec![],
        tags: BTreeMap::new(),
        copy_to: vec![],
        kms_keys: BTreeMap::new(),
        share: vec![],
        deprecate_after: None,
        boot_timeout: Duration::from_secs(20),
        capture_timeout: Duration::from_secs(20),
    }
}

#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl Reporter for Said {
    fn report(&self, event: Event) {
        if let Event::Note { message } | Event::Warning { message } = event {
            self.0.lock().unwrap().push(message);
        }
    }
}

/// A bake's surroundings.
struct Bench {
    fake: Fake,
    folder: tempfile::TempDir,
    bake: String,
    said: Arc<Said>,
    /// Where the guest was looked for.
    targets: Arc<Mutex<Vec<Target>>>,
}

impl Bench {
    fn new() -> Self {
        let fake = Fake::default();
        fake.add_base(HERE, AMI);
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("ledger")).unwrap();
        let bake = ulid::Ulid::generate().to_string();
        Self { fake, folder, bake, said: Arc::default(), targets: Arc::default() }
    }

    fn context(&self) -> Context {
        let work = self.folder.path().join("work");
        std::fs::create_dir_all(&work).unwrap();
        let ledger = Ledger::create(&self.folder.path().join("ledger"), &self.bake).unwrap();
        let reports = Reports::new(self.said.clone(), Redactor::default());
        Context { bake: self.bake.clone(), scope: Arc::new(Scope::new(ledger)), reports, work }
    }

    fn cloud(&self) -> Arc<dyn Cloud> {
        Arc::new(self.fake.clone())
    }

    fn around(&self) -> Around {
        let (cloud, targets) = (self.cloud(), self.targets.clone());
        let access = move || -> Boxed<Result<Arc<dyn Cloud>>> {
            let cloud = cloud.clone();
            Box::pin(async move { Ok(cloud) })
        };
        let access: Access = Arc::new(access);
        let own_address = || -> Boxed<Result<IpAddr>> { Box::pin(async { Ok(IpAddr::from([203, 0, 113, 4])) }) };
        let connect = move |target: Target, _: Duration| -> Boxed<Result<Arc<dyn Guest>>> {
            targets.lock().unwrap().push(target);
            Box::pin(async { Ok(Arc::new(Willing) as Arc<dyn Guest>) })
        };
        let kept = self.folder.path().join("kept");
        Around { access, own_address: Arc::new(own_address), connect: Arc::new(connect), publish: None, pace: quick(), kept }
    }

    fn builder(&self, settings: Settings) -> Ec2Builder {
        Ec2Builder { settings, around: self.around() }
    }

    async fn base(&self, context: &Context) -> Result<Base> {
        let ami = Ami { chosen: Chosen::Id(AMI.into()), owners: vec![], region: Some(HERE.into()) };
        AmiSource::new(ami, self.around()).fetch(false, context).await
    }

    async fn start(&self, settings: &Settings, context: &Context) -> Result<Box<dyn Machine>> {
        let base = self.base(context).await?;
        self.builder(settings.clone()).start(&base, &Start { disk_size: Some(10 << 30), ..Start::default() }, context).await
    }

    /// All that a bake asks of its builder, in its order.
    async fn bake(&self, settings: &Settings, context: &Context) -> Result<Vec<CloudImage>> {
        let machine = self.start(settings, context).await?;
        let mut stopped = machine.stop(Duration::from_secs(20)).await?;
        let at_cloud = stopped.at_cloud().unwrap();
        let naming = Naming { name: "web".into(), version: "1.4.0".into(), commit: Some("c0ffee".into()), labels: BTreeMap::new() };
        at_cloud.capture(&naming).await?;
        let images = at_cloud.spread().await?;
        at_cloud.finish().await?;
        // As the store does it in one piece with recording them.
        let stays = context.scope.withhold(&at_cloud.tickets()).unwrap();
        context.scope.stays(stays)?;
        at_cloud.recorded(&Digest::of("image")).await;
        Ok(images)
    }

    async fn unwind(&self, context: &Context) -> Vec<Error> {
        let failed = context.scope.unwind().await;
        context.scope.close();
        failed
    }

    fn ledgers(&self) -> usize {
        std::fs::read_dir(self.folder.path().join("ledger")).unwrap().count()
    }
}

#[tokio::test]
async fn a_bake_leaves_an_image_and_nothing_else() {
    let bench = Bench::new();
    let context = bench.context();
    let settings = Settings { tags: BTreeMap::from([("team".into(), "shop".into())]), ..settings() };
    let images = bench.bake(&settings, &context).await.unwrap();
    assert!(bench.unwind(&context).await.is_empty());
    assert_eq!((bench.fake.leftovers(), bench.ledgers()), (vec![], 0));

    let [image] = <[_; 1]>::try_from(bench.fake.finished(HERE)).unwrap();
    assert_eq!((images.len(), &images[0].id, images[0].size), (1, &image.id, 10 << 30));
    assert_eq!(Some(images[0].snapshots[0].as_str()), image.root_snapshot());
    let tag = |key: &str| image.tags.get(key).map(String::as_str);
    assert_eq!((tag(tags::NAME), tag(tags::VERSION), tag("team")), (Some("web"), Some("1.4.0"), Some("shop")));
    assert_eq!((tag(tags::BAKE), tag(tags::COMMIT)), (Some(bench.bake.as_str()), Some("c0ffee")));
    assert_eq!(tag(tags::DIGEST), Some(Digest::of("image").to_string().as_str()));

    // What was asked of EC2.
    let [asked] = <[_; 1]>::try_from(bench.fake.asked()).unwrap();
    assert_eq!((asked.image.as_str(), asked.volumes[0].gib, asked.public), (AMI, Some(10), Some(true)));
    let [target] = <[_; 1]>::try_from(bench.targets.lock().unwrap().clone()).unwrap();
    assert_eq!((target.host.as_str(), target.port, target.user.as_str()), ("198.51.100.7", 22, "root"));
    use base64::Engine as _;
    let key = base64::engine::general_purpose::STANDARD.encode(target.keys.host_private_openssh());
    assert!(String::from_utf8(asked.user_data).unwrap().contains(&key), "the guest gets the host key that is pinned");
    // The instance is gone before its group goes, and that before the key.
    let calls = bench.fake.world().calls.clone();
    let at = |action: &str| calls.iter().position(|call| *call == action).unwrap_or_else(|| panic!("{action} in {calls:?}"));
    assert!(at("StopInstances") < at("CreateImage") && at("CreateImage") < at("TerminateInstances"));
    assert!(at("TerminateInstances") < at("DeleteSecurityGroup") && at("DeleteSecurityGroup") < at("DeleteKeyPair"));
}

#[tokio::test]
async fn only_this_machine_is_let_in() {
    for (allow_from, open) in [(vec![], "203.0.113.4/32"), (vec!["192.0.2.0/24".to_owned()], "192.0.2.0/24")] {
        let bench = Bench::new();
        let context = bench.context();
        let machine = bench.start(&Settings { allow_from, ..settings() }, &context).await.unwrap();
        assert_eq!(bench.fake.groups_open_to(), [open]);
        machine.kill().await;
        assert_eq!(bench.fake.leftovers(), Vec::<String>::new());
    }
    // Groups of one's own are taken as they are.
    let bench = Bench::new();
    let context = bench.context();
    let machine = bench.start(&Settings { groups: vec!["sg-0aaa".into()], ..settings() }, &context).await.unwrap();
    assert_eq!(bench.fake.asked()[0].groups, ["sg-0aaa"]);
    assert!(!bench.fake.world().calls.iter().any(|call| call.contains("SecurityGroup")));
    machine.kill().await;
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn images_are_copied_shared_and_deprecated() {
    let bench = Bench::new();
    let context = bench.context();
    let account = Audience::Account("123456789012".into());
    let settings = Settings {
        copy_to: vec![THERE.into(), HERE.into()],
        share: vec![account.clone(), Audience::Organization("arn:o".into())],
        deprecate_after: Some(Duration::from_secs(86_400)),
        ..settings()
    };
    let images = bench.bake(&settings, &context).await.unwrap();
    assert!(bench.unwind(&context).await.is_empty());
    assert_eq!(images.iter().map(|image| image.region.as_str()).collect::<Vec<_>>(), [HERE, THERE]);
    for image in &images {
        assert_eq!(bench.fake.finished(&image.region).len(), 1);
        assert_eq!(bench.fake.shared(&image.id).len(), 2);
        assert_eq!(bench.fake.snapshot_shared(&image.snapshots[0]), ["123456789012"]);
        assert!(bench.fake.finished(&image.region)[0].deprecated.is_some());
    }
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());

    let builder = bench.builder(settings);
    assert!(builder.still_there(&images, &context).await.unwrap());
    assert!(!builder.still_there(&images[..1], &context).await.unwrap(), "a region is missing");
    let gone = CloudImage { id: "ami-0bad".into(), ..images[1].clone() };
    assert!(!builder.still_there(&[images[0].clone(), gone], &context).await.unwrap());
}

#[tokio::test]
async fn other_types_and_places_are_tried() {
    let bench = Bench::new();
    bench.fake.world().scarce = vec!["m7i.large".into()];
    let context = bench.context();
    let filter = BTreeMap::from([("tag:Own".to_owned(), "vpc-01".to_owned())]);
    let settings = Settings {
        types: vec!["m7i.large".into(), "m6i.large".into()],
        spot: Some(Spot { max_price: Some("0.05".into()) }),
        vpc: Some(Chosen::Filter(filter)),
        ..settings()
    };
    let machine = bench.start(&settings, &context).await.unwrap();
    let [asked] = <[_; 1]>::try_from(bench.fake.asked()).unwrap();
    // The subnet of that VPC with the most room.
    assert_eq!((asked.instance_type.as_str(), asked.subnet.as_deref()), ("m6i.large", Some("subnet-0b")));
    assert_eq!(bench.said.0.lock().unwrap().iter().filter(|said| said.starts_with("no m7i.large")).count(), 2);
    machine.kill().await;
    // Its persistent request would start another one.
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());

    let bench = Bench::new();
    bench.fake.world().scarce = vec!["t3.small".into()];
    let context = bench.context();
    let error = bench.start(&self::settings(), &context).await.err().unwrap();
    assert_eq!(error.kind(), Code::Infrastructure);
    assert!(bench.unwind(&context).await.is_empty());
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_filter_that_means_several_vpcs_is_a_mistake() {
    let bench = Bench::new();
    let context = bench.context();
    for (vpc, subnet, word) in [
        (Some(BTreeMap::from([("tag:Name".to_owned(), "build".to_owned())])), None, "2 VPCs"),
        (Some(BTreeMap::from([("tag:Name".to_owned(), "x".to_owned())])), None, "no VPC"),
        (None, Some(BTreeMap::from([("vpc-id".to_owned(), "vpc-03".to_owned())])), "no subnet"),
    ] {
        let settings = Settings { vpc: vpc.map(Chosen::Filter), subnet: subnet.map(Chosen::Filter), ..settings() };
        let error = bench.start(&settings, &context).await.err().unwrap();
        assert!(error.kind() == Code::Usage && error.to_string().contains(word), "{error}");
    }
    assert!(bench.fake.asked().is_empty(), "nothing was made for it");
}

#[tokio::test]
async fn the_host_key_may_come_from_the_console() {
    let bench = Bench::new();
    let context = bench.context();
    let host = Keys::generate().unwrap();
    let shown = format!("-----BEGIN SSH HOST KEY KEYS-----\n{} root@x\n-----END SSH HOST KEY KEYS-----\n", host.host_public());
    bench.fake.world().console = Some(shown);
    let settings = Settings { host_key: HostKey::Console, user: "admin".into(), ..settings() };
    let machine = bench.start(&settings, &context).await.unwrap();
    let [target] = <[_; 1]>::try_from(bench.targets.lock().unwrap().clone()).unwrap();
    assert_eq!((target.keys.host_public(), target.user.as_str()), (host.host_public(), "admin"));
    assert!(bench.fake.asked()[0].user_data.is_empty());
    machine.kill().await;

    // One that never shows it.
    let bench = Bench::new();
    let context = bench.context();
    let settings = Settings { boot_timeout: Duration::from_millis(30), ..settings };
    let error = bench.start(&settings, &context).await.err().unwrap();
    assert_eq!(error.kind(), Code::Unreachable);
    assert!(bench.unwind(&context).await.is_empty());
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_base_is_found_where_the_builder_is() {
    let bench = Bench::new();
    let context = bench.context();
    let builder = bench.builder(settings());
    let image = |region: &str| CloudImage { builder: EC2.into(), region: region.into(), id: AMI.into(), size: 8 << 30, snapshots: vec![] };
    let base = |disk: BaseDisk| Base {
        label: "debian".into(),
        disk,
        firmware: Firmware::BiosUefi,
        architecture: "amd64".into(),
        credentials: None,
    };
    let elsewhere = base(BaseDisk::Cloud(vec![image(THERE)]));
    let error = builder.start(&elsewhere, &Start::default(), &context).await.err().unwrap();
    assert!(error.kind() == Code::Base && error.to_string().contains("is not in eu-central-1"), "{error}");
    // A disk of this machine has to be published first.
    let file = base(DiskFile { path: "/x".into(), format: DiskFormat::Raw, size: 1 << 30 }.into());
    let start = Start { disk_digest: Some(Digest::of("disk")), ..Start::default() };
    let error = builder.start(&file, &start, &context).await.err().unwrap();
    assert!(error.next_move().unwrap().contains("kiln publish"), "{error:?}");
    // Or it is published on the way, where somebody can.
    let fake = bench.fake.clone();
    let publish = move |disk: Digest, region: String, _: Reports| -> Boxed<Result<String>> {
        assert_eq!((disk, region.as_str()), (Digest::of("other"), HERE));
        fake.add_base(HERE, "ami-0ca11");
        Box::pin(async { Ok("ami-0ca11".to_owned()) })
    };
    let publishing = Ec2Builder { settings: settings(), around: bench.around().publishing(Arc::new(publish)) };
    let other = Start { disk_digest: Some(Digest::of("other")), ..Start::default() };
    let machine = publishing.start(&file, &other, &context).await.unwrap();
    assert_eq!(bench.fake.asked()[0].image, "ami-0ca11");
    machine.kill().await;
    // Once it is, its AMI is found by the disk's digest.
    let snapshot = bench.fake.finished_of_disk(HERE, AMI, &Digest::of("disk"));
    let machine = builder.start(&file, &start, &context).await.unwrap();
    assert!(bench.fake.asked().iter().any(|asked| asked.image == AMI), "{snapshot}");
    machine.kill().await;
    assert!(bench.unwind(&context).await.is_empty());
}

#[tokio::test]
async fn a_base_by_filter_is_the_newest_and_has_a_key() {
    let bench = Bench::new();
    let context = bench.context();
    let filter = BTreeMap::from([("name".to_owned(), "debian-12-*".to_owned())]);
    let ami = Ami { chosen: Chosen::Filter(filter), owners: vec!["136693071363".into()], region: None };
    let mut source = AmiSource::new(ami.clone(), bench.around());
    assert_eq!(source.known().unwrap(), None);
    assert_eq!(source.fetch(false, &context).await.unwrap_err().kind(), Code::Usage, "no region");
    source.builder_is_at(HERE);
    let base = source.fetch(false, &context).await.unwrap();
    let BaseDisk::Cloud(images) = &base.disk else { panic!("{base:?}") };
    assert_eq!((images[0].id.as_str(), images[0].size), (AMI, 8 << 30));
    assert_eq!((base.architecture.as_str(), base.firmware), ("amd64", Firmware::BiosUefi));
    assert_eq!(source.known().unwrap(), Some(images[0].identity()));
    assert!(base.file().unwrap_err().next_move().unwrap().contains("[builder.ec2]"));

    let other = Ami { owners: vec!["self".into()], ..ami };
    let mut source = AmiSource::new(other, bench.around());
    source.builder_is_at(HERE);
    assert_eq!(source.fetch(false, &context).await.unwrap_err().kind(), Code::Base);
}

#[tokio::test]
async fn what_is_kept_on_purpose_is_no_leftover_of_the_scope() {
    let bench = Bench::new();
    let context = bench.context();
    let machine = bench.start(&settings(), &context).await.unwrap();
    let told = machine.keep().await.unwrap();
    assert!(told.contains("costs money") && told.contains("kiln reap --ec2"), "{told}");
    assert!(bench.unwind(&context).await.is_empty());
    assert_eq!(bench.fake.leftovers().len(), 4, "instance, volume, group and key");
    let key = bench.folder.path().join("kept").join(&bench.bake).join("id_ed25519");
    assert!(std::fs::read_to_string(key).unwrap().contains("PRIVATE"));
    let which = Leftovers { bake: Some(bench.bake.clone()), older_than: Duration::from_secs(3600), running: vec![], dry_run: false };
    let reaped = reap_region(&bench.cloud(), quick(), HERE, &which).await.unwrap();
    assert_eq!((reaped.len(), reaped[0].left.len()), (1, 4));
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn throttling_and_lag_are_borne_without_a_storm() {
    let calm = {
        let bench = Bench::new();
        let context = bench.context();
        bench.bake(&Settings { copy_to: vec![THERE.into()], ..settings() }, &context).await.unwrap();
        assert!(bench.unwind(&context).await.is_empty());
        bench.fake.world().calls.len()
    };
    let bench = Bench::new();
    (bench.fake.world().throttle, bench.fake.world().lag) = (30, 3);
    let context = bench.context();
    bench.bake(&Settings { copy_to: vec![THERE.into()], ..settings() }, &context).await.unwrap();
    assert!(bench.unwind(&context).await.is_empty());
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());
    let calls = bench.fake.world().calls.len();
    // Three in ten again, and a few looks at each of what is new.
    assert!(calls < calm * 4, "{calls} calls, {calm} in peace");
}

/// Runs a bake with every call failing in turn.
async fn each_call(fault: Fault) {
    let settings = Settings { copy_to: vec![THERE.into()], share: vec![Audience::Account("123456789012".into())], ..settings() };
    let mut number = 1;
    loop {
        let bench = Bench::new();
        bench.fake.world().fault = Some((number, fault));
        let context = bench.context();
        let done = bench.bake(&settings, &context).await;
        let failed = bench.unwind(&context).await;
        let calls = bench.fake.world().calls.clone();
        let Some(call) = calls.get(number - 1) else {
            done.unwrap();
            assert!(number > 30, "that were all {number}");
            return;
        };
        assert!(failed.is_empty(), "call {number}, {call}: {failed:?}");
        assert_eq!((bench.fake.leftovers(), bench.ledgers()), (vec![], 0), "call {number}, {call}: {calls:?}");
        let images = if done.is_ok() { 1 } else { 0 };
        for region in [HERE, THERE] {
            assert_eq!(bench.fake.finished(region).len(), images, "call {number}, {call}: {done:?}");
        }
        number += 1;
    }
}

#[tokio::test]
async fn whichever_call_is_refused_nothing_is_left() {
    each_call(Fault::Denied).await;
}

#[tokio::test]
async fn whichever_answer_is_lost_nothing_is_left() {
    each_call(Fault::Unanswered).await;
}

/// Interrupts a bake while each call in turn is under way. `answered`: the
/// call's answer comes at once then, and not only when nobody waits for it any
/// more.
async fn each_moment(fault: Fault, answered: bool) {
    let settings = Settings { copy_to: vec![THERE.into()], ..settings() };
    let mut number = 1;
    loop {
        let bench = Bench::new();
        bench.fake.world().fault = Some((number, fault));
        let context = bench.context();
        let done = tokio::select! {
            done = bench.bake(&settings, &context) => Some(done),
            // As after Ctrl-C: the bake's future is dropped where it is.
            () = bench.fake.hangs.notified() => None,
        };
        let (goes_on, late) = (bench.fake.goes_on.clone(), if answered { Duration::ZERO } else { Duration::from_millis(400) });
        tokio::spawn(async move {
            tokio::time::sleep(late).await;
            goes_on.notify_one();
        });
        let failed = bench.unwind(&context).await;
        let calls = bench.fake.world().calls.clone();
        if let Some(done) = done {
            assert!(number > 25, "that were all {number}");
            done.unwrap();
            return;
        }
        let call = calls[number - 1];
        assert!(failed.is_empty(), "call {number}, {call}: {failed:?}");
        assert_eq!((bench.fake.leftovers(), bench.ledgers()), (vec![], 0), "call {number}, {call}: {calls:?}");
        number += 1;
    }
}

#[tokio::test]
async fn an_interrupted_bake_leaves_nothing() {
    each_moment(Fault::HangsBefore, true).await;
    each_moment(Fault::HangsAfter, true).await;
}

#[tokio::test]
async fn an_interrupted_bake_that_hears_no_answer_leaves_nothing() {
    each_moment(Fault::HangsBefore, false).await;
    each_moment(Fault::HangsAfter, false).await;
}

/// Kills a bake while each call in turn is under way: nothing of it runs any
/// more, and its scope is never unwound. `ledger`: it can still be read.
fn killed_at_each_moment(fault: Fault, ledger: bool) {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let settings = Settings { copy_to: vec![THERE.into()], ..settings() };
    let mut number = 1;
    loop {
        let bench = Bench::new();
        bench.fake.world().fault = Some((number, fault));
        let killed = {
            let context = bench.context();
            let runtime = runtime();
            // The task of the call dies with its runtime.
            runtime.block_on(async {
                tokio::select! {
                    done = bench.bake(&settings, &context) => { done.unwrap(); false }
                    () = bench.fake.hangs.notified() => true,
                }
            })
        };
        let calls = bench.fake.world().calls.clone();
        if !killed {
            assert!(number > 25, "that were all {number}");
            return;
        }
        bench.fake.world().fault = None;
        runtime().block_on(async {
            if ledger {
                for orphan in ledger::orphans(&bench.folder.path().join("ledger")).unwrap() {
                    for resource in &orphan.left {
                        let Resource::Cloud { builder, region, resource, id } = resource else { panic!("{resource:?}") };
                        assert_eq!(builder, EC2);
                        reap_ledger(&bench.cloud(), quick(), &orphan.bake, region, resource, id.as_deref()).await.unwrap();
                    }
                    orphan.settle().unwrap();
                }
                assert_eq!(bench.ledgers(), 0);
                let finished = bench.fake.finished(HERE).len() + bench.fake.finished(THERE).len();
                let kept = calls[number - 1] == "CreateTags";
                assert!(finished == 0 || kept, "call {number}, {}", calls[number - 1]);
            } else {
                let which = Leftovers { bake: None, older_than: Duration::ZERO, running: vec![], dry_run: false };
                for region in [HERE, THERE] {
                    reap_region(&bench.cloud(), quick(), region, &which).await.unwrap();
                }
            }
        });
        let call = calls[number - 1];
        assert_eq!(bench.fake.leftovers(), Vec::<String>::new(), "call {number}, {call}: {calls:?}");
        number += 1;
    }
}

#[test]
fn a_killed_bake_is_cleaned_up_by_its_ledger() {
    killed_at_each_moment(Fault::HangsBefore, true);
    killed_at_each_moment(Fault::HangsAfter, true);
}

#[test]
fn a_killed_bake_is_cleaned_up_by_its_tags() {
    killed_at_each_moment(Fault::HangsBefore, false);
    killed_at_each_moment(Fault::HangsAfter, false);
}

#[tokio::test]
async fn bakes_that_may_be_running_are_spared() {
    let bench = Bench::new();
    let context = bench.context();
    let _machine = bench.start(&settings(), &context).await.unwrap();
    let all = bench.fake.leftovers().len();
    for (older_than, running, dry_run, word) in [
        (Duration::from_secs(3600), vec![], false, Some("may be running elsewhere")),
        (Duration::ZERO, vec![bench.bake.clone()], false, Some("is running on this machine")),
        (Duration::ZERO, vec![], true, None),
    ] {
        let which = Leftovers { bake: None, older_than, running, dry_run };
        let [found] = <[_; 1]>::try_from(reap_region(&bench.cloud(), quick(), HERE, &which).await.unwrap()).unwrap();
        assert_eq!(found.bake, bench.bake);
        assert_eq!(found.left.keys().collect::<Vec<_>>(), ["instance", "key-pair", "security-group", "volume"]);
        assert_eq!(found.spared.is_some(), word.is_some());
        assert!(word.is_none_or(|word| found.spared.unwrap().contains(word)));
        assert_eq!(bench.fake.leftovers().len(), all);
    }
    let error = reap_ledger(&bench.cloud(), quick(), &bench.bake, HERE, "moon", None).await.unwrap_err();
    assert!(error.to_string().contains("knows no such thing"), "{error}");
    assert!(bench.unwind(&context).await.is_empty());
    assert_eq!(bench.fake.leftovers(), Vec::<String>::new());
}
