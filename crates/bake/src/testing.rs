//! Earlier bakes that never were, for the tests of what is used of them.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_model::checkpoint::{Checkpoint, CheckpointCache, Hold, Peek, Slot, Written};
use kiln_model::history::{Record, StepRecord};
use kiln_model::image::{Config, Firmware, StepConfig};
use kiln_model::{Digest, Key, Result};

use crate::explain::{Explanation, explain};
use crate::plan::Plan;
use crate::resume::{Decision, Earlier, Options, decide};
use crate::template::testing::Fakes;
use crate::template::{Inputs, Template, load};

pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);

/// Checkpoints without files.
#[derive(Default)]
pub(crate) struct Kept(Mutex<HashMap<Key, Peek>>);

impl CheckpointCache for Kept {
    fn peek(&self, step: &Key) -> Result<Option<Peek>> {
        Ok(self.0.lock().unwrap().get(step).copied())
    }
    fn find(&self, step: &Key, _: Option<Duration>, _: &dyn Fn(String)) -> Result<Option<Checkpoint>> {
        Ok(self.peek(step)?.map(|peek| Checkpoint {
            step: *step,
            memory: peek.memory,
            folder: PathBuf::new(),
            files: Vec::new(),
            note: serde_json::Value::Null,
            made: peek.made,
            worth: Duration::ZERO,
            hold: Arc::new(()),
        }))
    }
    fn drop_damaged(&self, checkpoint: Checkpoint) -> Result<()> {
        self.0.lock().unwrap().remove(&checkpoint.step);
        Ok(())
    }
    fn slot(&self, _: &Key, _: Option<&Key>, _: u64) -> Result<Option<Slot>> {
        Ok(None)
    }
    fn commit(&self, _: Slot, _: &Written, _: Duration) -> Result<()> {
        Ok(())
    }
    fn claim(&self, _: &Key) -> Result<Option<Hold>> {
        Ok(Some(Arc::new(())))
    }
}

/// A machine on which bakes have been made.
pub(crate) struct World {
    pub(crate) now: SystemTime,
    /// Disk digest of the base; none as long as it was not fetched.
    pub(crate) base: Option<Digest>,
    pub(crate) records: Vec<Record>,
    pub(crate) images: RefCell<HashMap<Digest, Config>>,
    pub(crate) kept: Kept,
    /// Which disks have passed which tests.
    pub(crate) passed: HashSet<(Digest, Key)>,
}

impl Default for World {
    fn default() -> Self {
        let now = UNIX_EPOCH + 1000 * DAY;
        Self {
            now,
            base: Some(Digest::of("base")),
            records: Vec::new(),
            images: RefCell::default(),
            kept: Kept::default(),
            passed: HashSet::new(),
        }
    }
}

/// The template of an image `web:1` with this behind its head.
pub(crate) fn web(rest: &str) -> String {
    format!("[image]\nname = 'web'\nversion = '1'\n[base]\ndebian = 'x'\n{rest}")
}

/// Steps, each a name and a script.
pub(crate) fn steps(list: &[(&str, &str)]) -> String {
    list.iter().map(|(name, script)| format!("[[provision]]\nname = '{name}'\nshell = '{script}'\n")).collect()
}

pub(crate) fn read(text: &str) -> Template {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("kiln.toml"), text).unwrap();
    load(folder.path(), &Inputs::default(), &Fakes::default().kinds()).unwrap_or_else(|mistakes| panic!("{mistakes:#?}\n{text}"))
}

impl World {
    pub(crate) fn plan(&self, template: &Template) -> Plan {
        Plan::new(template, self.base).unwrap()
    }

    /// Bakes as of `ago`: what is kept is used, whatever its age, and
    /// everything is kept.
    pub(crate) fn bake(&mut self, text: &str, ago: Duration) -> &mut Record {
        let template = read(text);
        let plan = self.plan(&template);
        let at = self.now - ago;
        let number = self.records.len();
        let made = at.duration_since(UNIX_EPOCH).unwrap().as_secs();
        let known: HashMap<Key, u64> = self.records.iter().flat_map(|record| &record.steps).map(|step| (step.key, step.made)).collect();
        let steps = plan.steps.iter().map(|step| {
            let key = step.key.unwrap();
            StepRecord {
                name: step.name.clone(),
                kind: step.kind.into(),
                key,
                parts: step.parts.clone(),
                made: known.get(&key).copied().filter(|_| self.kept.peek(&key).unwrap().is_some()).unwrap_or(made),
                seconds: 10.0,
            }
        });
        let record = Record {
            bake: format!("01J{number}"),
            name: template.name.clone(),
            version: template.version.clone(),
            finished: made,
            base_label: template.base.label(),
            base: plan.base.unwrap(),
            start: plan.start.unwrap(),
            boot: Some(20.0),
            steps: steps.collect(),
            seal: plan.seal.unwrap(),
            seal_parts: plan.seal_parts.clone(),
            seal_seconds: 5.0,
            checked: Some(true),
            tests: plan.tests,
            test_seconds: 7.0,
            image: Digest::of(format!("image {number}")),
            disk: Some(Digest::of(plan.seal.unwrap().hex())),
            cloud: Vec::new(),
            base_at_cloud: false,
        };
        let disk = record.tested_disk().unwrap();
        self.passed.extend(plan.each_test.iter().map(|test| (disk, *test)));
        for key in std::iter::once(record.start).chain(record.steps.iter().map(|step| step.key)) {
            self.kept.0.lock().unwrap().entry(key).or_insert(Peek { made: at, memory: Some(key) });
        }
        let config = Config {
            base: plan.base,
            steps: record.steps.iter().map(|step| StepConfig { name: step.name.clone(), key: step.key }).collect(),
            labels: template.labels.clone(),
            ..Config::new(template.name.clone(), template.version.clone(), template.architecture.clone(), Firmware::Bios)
        };
        self.images.borrow_mut().insert(record.image, config);
        self.records.push(record);
        self.records.last_mut().unwrap()
    }

    /// Removes the checkpoint after a step of the last bake.
    pub(crate) fn drop_checkpoint(&self, step: usize) {
        let key = self.records.last().unwrap().steps[step].key;
        self.kept.0.lock().unwrap().remove(&key);
    }

    /// Removes all images.
    pub(crate) fn drop_images(&self) {
        self.images.borrow_mut().clear();
    }

    fn with<T>(&self, work: impl FnOnce(&Earlier<'_>) -> T) -> T {
        let image = |record: &Record| Ok(self.images.borrow().get(&record.image).cloned());
        let passed = |disk: &Digest, test: &Key| Ok(self.passed.contains(&(*disk, *test)));
        work(&Earlier { cache: &self.kept, records: &self.records, image: &image, passed: &passed, now: self.now })
    }

    pub(crate) fn try_decide(&self, text: &str, options: &Options) -> Result<Decision> {
        let template = read(text);
        self.with(|earlier| decide(&template, &self.plan(&template), options, earlier))
    }

    pub(crate) fn explain(&self, text: &str, options: &Options) -> Explanation {
        let template = read(text);
        let plan = self.plan(&template);
        self.with(|earlier| {
            let decision = decide(&template, &plan, options, earlier).unwrap();
            explain(&template, &plan, options, earlier, &decision).unwrap()
        })
    }
}
