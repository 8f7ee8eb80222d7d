use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use kiln_model::base::{DiskFile, DiskFormat};
use kiln_model::checkpoint::{Checkpoint, Slot, Written};
use kiln_model::cleanup::Scope;
use kiln_model::event::{Reports, Stream};
use kiln_model::guest::{Exit, Guest, OnLine, SshAccess};
use kiln_model::image::Firmware;
use kiln_model::key::KeyHasher;
use kiln_model::ledger::Ledger;
use kiln_model::machine::{Builder, Stopped};
use kiln_model::provision::{Provisioner, Step};
use kiln_model::tree::Tree;

use super::*;
use crate::template::testing::Fakes;
use crate::template::{Inputs, load};

/// What happened, in order.
type Log = Arc<Mutex<Vec<String>>>;

struct House(Log);

struct Host {
    log: Log,
    boots: Arc<AtomicU32>,
}

#[async_trait]
impl Builder for House {
    fn kind(&self) -> &'static str {
        "qemu"
    }
    async fn memory_key(&self, _: &Key, _: &Base, _: &Context) -> Result<Option<Key>> {
        Ok(None)
    }
    async fn start(&self, _: &Base, start: &Start, _: &Context) -> Result<Box<dyn Machine>> {
        let user_data = start.user_data.clone().map(|bytes| String::from_utf8(bytes).unwrap()).unwrap_or_default();
        self.0.lock().unwrap().push(format!("start {user_data}"));
        if user_data == "bad" {
            return Err(Error::new(Code::Unreachable, "no answer").detail("panic"));
        }
        Ok(Box::new(Host { log: self.0.clone(), boots: Arc::default() }))
    }
    async fn resume(&self, _: &Base, _: &Checkpoint, _: &Start, _: &Context) -> Result<Option<Box<dyn Machine>>> {
        Ok(None)
    }
}

#[async_trait]
impl Machine for Host {
    fn guest(&self) -> Arc<dyn Guest> {
        Arc::new(Host { log: self.log.clone(), boots: self.boots.clone() })
    }
    async fn ended(&self) -> Error {
        std::future::pending().await
    }
    async fn checkpoint(&mut self, _: &Slot) -> Result<Option<Written>> {
        Ok(None)
    }
    fn checkpoint_size(&self) -> Option<u64> {
        None
    }
    async fn explain(&self, error: Error) -> Error {
        error.detail("the console's tail")
    }
    async fn stop(self: Box<Self>, _: Duration) -> Result<Box<dyn Stopped>> {
        Err(Error::new(Code::Failed, "never"))
    }
    async fn kill(self: Box<Self>) {
        self.log.lock().unwrap().push("kill".into());
    }
    async fn keep(self: Box<Self>) -> Result<String> {
        Err(Error::new(Code::Failed, "never"))
    }
}

#[async_trait]
impl Guest for Host {
    async fn execute(&self, command: &Command, on_line: OnLine<'_>) -> Result<Exit> {
        if command.line.contains("boot_id") {
            on_line(Stream::Stdout, &self.boots.load(Ordering::SeqCst).to_string());
        } else if command.line.contains("reboot") {
            self.log.lock().unwrap().push("reboot".into());
            self.boots.fetch_add(1, Ordering::SeqCst);
        }
        Ok(Exit::Status(0))
    }
    async fn upload(&self, _: &Tree, _: &str) -> Result<()> {
        Ok(())
    }
    async fn download(&self, _: &str, _: &Path) -> Result<()> {
        Ok(())
    }
    async fn wait_for_new_boot(&self, before: &str, _: Duration) -> Result<()> {
        while self.boots.load(Ordering::SeqCst).to_string() == before {
            tokio::task::yield_now().await;
        }
        Ok(())
    }
    fn ssh_access(&self) -> Option<SshAccess> {
        None
    }
}

/// `lost` loses the machine, `no` finds something wrong, `once` does so once.
struct Check(String, Log);

#[async_trait]
impl Provisioner for Check {
    fn kind(&self) -> &'static str {
        "check"
    }
    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("what", &self.0);
        Ok(())
    }
    async fn run(&self, _: &Step<'_>) -> Result<()> {
        Ok(())
    }
    async fn test(&self, step: &Step<'_>) -> Result<Vec<Case>> {
        let name = step.common.name.clone();
        let tried = self.1.lock().unwrap().iter().filter(|line| **line == name).count();
        self.1.lock().unwrap().push(name.clone());
        let outcome = match self.0.as_str() {
            "lost" => return Err(Error::new(Code::Unreachable, "gone")),
            "broken" => return Err(Error::new(Code::Missing, "no such program")),
            "no" => Outcome::Failed("expected 1, found 2\nsecret hunter22".into()),
            "once" if tried == 0 => Outcome::Failed("not yet".into()),
            _ => Outcome::Passed,
        };
        Ok(vec![Case { name: "case".into(), seconds: 0.0, outcome }])
    }
}

/// Results in memory.
#[derive(Default)]
struct Memory(Mutex<Vec<(Digest, Tested)>>);

impl Results for Memory {
    fn passed(&self, disk: &Digest, test: &Key) -> Result<Option<Tested>> {
        let kept = self.0.lock().unwrap();
        Ok(kept.iter().rfind(|(of, tested)| of == disk && tested.key == *test).map(|(_, tested)| tested.clone()).filter(|t| !t.failed()))
    }
    fn keep(&self, disk: &Digest, tested: &Tested) -> Result<()> {
        self.0.lock().unwrap().push((*disk, tested.clone()));
        Ok(())
    }
}

struct World {
    folder: tempfile::TempDir,
    log: Log,
    results: Arc<dyn Results>,
    context: Context,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for word in ["one", "bad"] {
            std::fs::write(folder.path().join(word), word).unwrap();
        }
        std::fs::create_dir(folder.path().join("ledger")).unwrap();
        let scope = Arc::new(Scope::new(Ledger::create(&folder.path().join("ledger"), "01J0").unwrap()));
        let reports = Reports::silent();
        reports.redactor().add(&kiln_model::secret::Secret::new("hunter22"));
        let context = Context { bake: "01J0".into(), scope, reports, work: folder.path().to_owned() };
        Self { folder, log: Log::default(), results: Arc::new(Memory::default()), context }
    }

    async fn test(&self, tests: &str, again: bool) -> Result<(Trial, Vec<String>)> {
        let text = format!("[image]\nname = 'web'\nversion = '1'\n[base]\ndebian = 'x'\n{tests}");
        std::fs::write(self.folder.path().join("kiln.toml"), text).unwrap();
        let mut template = load(self.folder.path(), &Inputs::default(), &Fakes::default().kinds()).unwrap_or_else(|m| panic!("{m:#?}"));
        template.builder = Box::new(House(self.log.clone()));
        let bodies: Vec<String> =
            tests.lines().filter_map(|line| Some(line.strip_prefix("shell = '")?.trim_end_matches('\'').to_owned())).collect();
        for (test, body) in template.tests.iter_mut().zip(bodies) {
            test.provisioner = Box::new(Check(body, self.log.clone()));
        }
        let config = Config::new("web", "1", "amd64", Firmware::Bios);
        let image = Tried { image: Digest::of("image"), disk: Digest::of("disk"), config };
        let unpack = |_, _| -> Unpacked {
            Box::pin(async {
                let disk = DiskFile { path: "/x".into(), format: DiskFormat::Raw, size: 1 }.into();
                let hold: Hold = Arc::new(());
                Ok((Base { label: "x".into(), disk, firmware: Firmware::Bios, architecture: "amd64".into(), credentials: None }, hold))
            })
        };
        let testing = Testing { results: &self.results, unpack: &unpack, told: &|_| {} };
        let trial = super::test(&template, &image, again, &testing, &self.context).await?;
        Ok((trial, std::mem::take(&mut *self.log.lock().unwrap())))
    }
}

fn test(name: &str, body: &str, more: &str) -> String {
    format!("[[test]]\nname = '{name}'\nshell = '{body}'\n{more}\n")
}

fn outcomes(trial: &Trial) -> Vec<(String, bool, bool)> {
    let cases = trial.tests.iter().flat_map(|test| test.cases.iter().map(move |case| (test, case)));
    cases.map(|(test, case)| (test.full_name(case), !case.outcome.failed(), test.cached)).collect()
}

#[tokio::test]
async fn one_machine_for_each_user_data_and_all_tests_run() {
    let world = World::new();
    let tests = test("a", "no", "")
        + &test("b", "yes", "boot = 'both'")
        + &test("c", "yes", "user_data = 'one'")
        + &test("d", "yes", "boot = 'again'")
        + &test("e", "once", "retries = 1");
    let (trial, log) = world.test(&tests, false).await.unwrap();
    assert_eq!(log, ["start ", "a", "b", "e", "e", "reboot", "b", "d", "kill", "start one", "c", "kill"]);
    let names = ["a: case", "b: case", "b: case after a reboot", "c: case", "d: case after a reboot", "e: case"];
    let found = outcomes(&trial);
    assert_eq!(found.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>(), names);
    assert_eq!(found.iter().filter(|(_, good, _)| !good).count(), 1);
    let Outcome::Failed(why) = &trial.tests[0].cases[0].outcome else { panic!("{trial:?}") };
    assert!(!why.contains("hunter22"), "secrets are taken out");
    let error = failure("web:1", &trial, "next");
    assert_eq!((error.kind(), error.step_name()), (Code::Test, Some("a")));
    assert_eq!(error.chain(), "web:1 failed its test `a`: expected 1, found 2");
}

#[tokio::test]
async fn what_has_passed_on_a_disk_is_not_run_again() {
    let world = World::new();
    let (good, bad) = (test("a", "yes", ""), test("b", "no", ""));
    let (first, _) = world.test(&(good.clone() + &bad), false).await.unwrap();
    assert!(first.failed());
    // What failed is tried again, under whatever name; nothing else is.
    let (mended, log) = world.test(&(test("other", "yes", "") + &test("b", "good", "")), false).await.unwrap();
    assert_eq!(log, ["start ", "b", "kill"]);
    assert_eq!(outcomes(&mended), [("other: case".to_owned(), true, true), ("b: case".to_owned(), true, false)]);
    // Now nothing starts at all; another boot is another test; `again` asks for all.
    assert!(world.test(&(good.clone() + &test("b", "good", "")), false).await.unwrap().1.is_empty());
    assert_eq!(world.test(&test("a", "yes", "boot = 'again'"), false).await.unwrap().1, ["start ", "reboot", "a", "kill"]);
    assert_eq!(world.test(&good, true).await.unwrap().1, ["start ", "a", "kill"]);
}

#[tokio::test]
async fn a_machine_that_is_lost_fails_its_tests_and_no_others() {
    let world = World::new();
    let tests = test("a", "yes", "") + &test("b", "lost", "") + &test("c", "yes", "") + &test("d", "yes", "user_data = 'bad'");
    let (trial, log) = world.test(&tests, false).await.unwrap();
    assert_eq!(log, ["start ", "a", "b", "kill", "start bad"]);
    assert_eq!(outcomes(&trial).iter().map(|(_, good, _)| *good).collect::<Vec<_>>(), [true, false, false, false]);
    let why = |at: usize| trial.tests[at].failures().next().unwrap().1.to_owned();
    assert_eq!(why(1), "the machine was lost: gone\nthe console's tail");
    assert_eq!(why(2), why(1));
    assert_eq!(why(3), "the image did not start: no answer\npanic");
    // What is no fault of the image's is none of its results.
    assert_eq!(world.test(&test("x", "broken", ""), false).await.unwrap_err().kind(), Code::Missing);
}
