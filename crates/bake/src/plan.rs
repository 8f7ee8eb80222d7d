//! The plan stage: every step with its key.
//!
//! A step's *own* key is made of what the step itself is, and is known before
//! the base is; its key chains that to everything before it. So inputs are
//! read once, and the keys follow as soon as the base's digest is known.
//!
//! With each key come its *parts*: what it is made of, under names for people.
//! They are kept with every bake, so that the next plan can say which of them
//! has changed; they hold digests, never values.
//!
//! Never in a key: times, host names, absolute paths, memory size, the order
//! of keys in a file, a step's name, limit in time, retries and cache policy
//! (they change how a step is run or shown, not what it makes), and the value
//! of a secret.

use kiln_model::account::Input;
use kiln_model::history::StepRecord;
use kiln_model::key::{KeyHasher, Part};
use kiln_model::provision::{Common, Provisioner};
use kiln_model::{Code, Digest, Error, Key, Result};

use crate::template::{StepSpec, Template};

/// Version of the seal: what it removes and writes. A change makes every seal
/// run anew.
pub const SEAL_VERSION: &str = "1";

/// A template with its keys.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Disk digest of the base. None: not known before it was fetched.
    pub base: Option<Digest>,
    /// `[disk] size` in bytes, as in the template.
    pub disk_size: Option<u64>,
    /// Key of the machine before its first step.
    pub start: Option<Key>,
    /// What that is made of; empty while there is no such key.
    pub start_parts: Vec<Part>,
    /// The steps, as many as the template has.
    pub steps: Vec<PlannedStep>,
    /// Key of the sealed disk.
    pub seal: Option<Key>,
    /// What the seal is made of itself.
    pub seal_parts: Vec<Part>,
    /// Key of the tests on that disk. None: there are no tests, or the base is
    /// not known.
    pub tests: Option<Key>,
    /// What each test is made of itself, its boots and user data included.
    pub each_test: Vec<Key>,
    cloud: Option<&'static str>,
    seal_own: Key,
    tests_own: Option<Key>,
}

/// A step with its key.
#[derive(Debug, Clone)]
pub struct PlannedStep {
    /// Its name.
    pub name: String,
    /// Its provisioner's kind.
    pub kind: &'static str,
    /// What it is made of itself, without what comes before it.
    pub own: Key,
    /// What its own key is made of.
    pub parts: Vec<Part>,
    /// The local files that it brings to the guest.
    pub inputs: Vec<Input>,
    /// Its key. None: the base's digest is not known.
    pub key: Option<Key>,
    /// Whether that it succeeded proves that one run is enough.
    pub converges: bool,
}

impl Plan {
    /// Hashes every input of `template`; `base` is the base's disk digest
    /// where it is known.
    ///
    /// # Errors
    /// When an input file cannot be read.
    pub fn new(template: &Template, base: Option<Digest>) -> Result<Self> {
        let steps = template.steps.iter().map(PlannedStep::new).collect::<Result<_>>()?;
        let (seal_own, seal_parts) = seal_own(template);
        let each_test = test_keys(&template.tests)?;
        let mut plan = Self {
            base: None,
            disk_size: template.disk_size,
            start: None,
            start_parts: Vec::new(),
            steps,
            seal: None,
            seal_parts,
            tests: None,
            cloud: template.builder.at_cloud().then(|| template.builder.kind()),
            seal_own,
            tests_own: (!each_test.is_empty()).then(|| all_tests(&each_test)),
            each_test,
        };
        if let Some(base) = base {
            plan.set_base(base);
        }
        Ok(plan)
    }

    /// Computes the keys, now that the base's disk digest is known.
    pub fn set_base(&mut self, base: Digest) {
        let (start, start_parts) = start_key(&base, self.disk_size, self.cloud);
        let mut last = start;
        for step in &mut self.steps {
            last = chain("step", &last, &step.own);
            step.key = Some(last);
        }
        let seal = chain("seal", &last, &self.seal_own);
        self.base = Some(base);
        (self.start, self.start_parts) = (Some(start), start_parts);
        self.seal = Some(seal);
        self.tests = self.tests_own.map(|own| chain("tests", &seal, &own));
    }
}

impl PlannedStep {
    /// Its key, once the base is known.
    ///
    /// # Errors
    /// Before that.
    pub fn known_key(&self) -> Result<Key> {
        self.key.ok_or_else(|| Error::new(Code::Failed, format!("the key of step `{}` is not known before its base is", self.name)))
    }

    /// What a record says of it.
    pub(crate) fn record(&self, key: Key, made: u64, seconds: f64) -> StepRecord {
        StepRecord { name: self.name.clone(), kind: self.kind.to_owned(), key, parts: self.parts.clone(), made, seconds }
    }

    fn new(step: &StepSpec) -> Result<Self> {
        let (own, parts, inputs) = own_key(step.provisioner.as_ref(), &step.common).map_err(|error| error.step(&step.common.name))?;
        let converges = step.provisioner.converges();
        Ok(Self { name: step.common.name.clone(), kind: step.provisioner.kind(), own, parts, inputs, key: None, converges })
    }
}

/// The key of a machine before its first step: the base's disk and the disk's
/// size. An unset size follows from the base, so it needs no number. What is
/// baked at a `cloud` is nothing that a bake elsewhere could use.
pub fn start_key(base: &Digest, disk_size: Option<u64>, cloud: Option<&str>) -> (Key, Vec<Part>) {
    let size = disk_size.map_or_else(|| "default".to_owned(), |size| size.to_string());
    let mut hasher = KeyHasher::new("start");
    hasher.field("base", base.as_bytes());
    hasher.hidden("disk size", &size).part("[disk] size", &size);
    if let Some(cloud) = cloud {
        hasher.field("builder", cloud);
    }
    hasher.finish_with_parts()
}

/// What a step is made of itself, and the local files among that.
///
/// # Errors
/// When an input file cannot be read.
pub fn own_key(provisioner: &dyn Provisioner, common: &Common) -> Result<(Key, Vec<Part>, Vec<Input>)> {
    let mut hasher = KeyHasher::new("own");
    hasher.field("provisioner", provisioner.kind());
    hasher.map("env", common.env.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    names(&mut hasher, "secrets", "secret", &common.secrets);
    hasher.field("user", common.user.as_deref().unwrap_or("root"));
    provisioner.key(&mut hasher)?;
    let inputs = hasher.take_inputs();
    let (key, parts) = hasher.finish_with_parts();
    Ok((key, parts, inputs))
}

fn seal_own(template: &Template) -> (Key, Vec<Part>) {
    let mut hasher = KeyHasher::new("seal settings");
    let commit = template.commit.as_deref().unwrap_or_default();
    hasher.field("name", &template.name).field("version", &template.version).field("commit", commit);
    hasher.hidden("seal version", SEAL_VERSION).part("kiln's own seal", SEAL_VERSION);
    names(&mut hasher, "keep", "keep", &template.keep);
    // In the config alone, which is a part of the image.
    if !template.mutable.is_empty() {
        names(&mut hasher, "mutable", "mutable", &template.mutable);
    }
    hasher.finish_with_parts()
}

/// What each test is made of itself, in order: without an image, so that its
/// result is found again for every image with the same disk.
///
/// # Errors
/// When an input file cannot be read.
pub fn test_keys(tests: &[StepSpec]) -> Result<Vec<Key>> {
    let key = |test: &StepSpec| {
        let (own, ..) = own_key(test.provisioner.as_ref(), &test.common).map_err(|error| error.step(&test.common.name))?;
        let mut hasher = KeyHasher::new("own test");
        hasher.field("test", own.hex()).field("boot", test.boot.name());
        hasher.field("user data", test.user_data.as_ref().map(|bytes| Digest::of(bytes).hex()).unwrap_or_default());
        Ok(hasher.finish())
    };
    tests.iter().map(key).collect()
}

/// What all tests are made of, of what each is made of.
pub fn all_tests(each: &[Key]) -> Key {
    let mut hasher = KeyHasher::new("own tests");
    for own in each {
        hasher.field("test", own.hex());
    }
    hasher.finish()
}

/// Adds a set of names: of a secret, for one, only the name counts.
fn names(hasher: &mut KeyHasher, field: &str, shown: &str, names: &[String]) {
    let mut names: Vec<&String> = names.iter().collect();
    names.sort_unstable();
    hasher.hidden(field, names.len().to_string());
    for name in names {
        hasher.hidden(name, "").part(format!("{shown} {name}"), "");
    }
}

fn chain(kind: &str, previous: &Key, own: &Key) -> Key {
    let mut hasher = KeyHasher::new(kind);
    hasher.field("previous", previous.hex()).field("own", own.hex());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::{Path, PathBuf};
    use std::time::{Duration, SystemTime};

    use async_trait::async_trait;
    use kiln_model::secret::Secret;
    use kiln_model::tree::Tree;
    use proptest::prelude::*;

    use super::*;
    use crate::template::testing::Fakes;
    use crate::template::{Cache, Inputs, load};

    /// Everything about a step that may be written in a template.
    #[derive(Debug, Clone, PartialEq)]
    struct Step {
        body: String,
        env: BTreeMap<String, String>,
        secret: bool,
        user: Option<String>,
        name: Option<String>,
        timeout: Option<u32>,
        retries: u32,
        cache: Option<bool>,
        checkpoint: bool,
    }

    fn step() -> impl Strategy<Value = Step> {
        let env = prop::collection::btree_map("[A-Z]{1,3}", "[a-zé ]{0,4}", 0..3);
        let shown = (prop::option::of("[a-z]{8}"), prop::option::of(1_u32..99), 0_u32..3, prop::option::of(any::<bool>()), any::<bool>());
        ("[a-z ]{1,8}", env, any::<bool>(), prop::option::of("[a-z]{1,3}"), shown).prop_map(
            |(body, env, secret, user, (name, timeout, retries, cache, checkpoint))| Step {
                body,
                env,
                secret,
                user,
                name,
                timeout,
                retries,
                cache,
                checkpoint,
            },
        )
    }

    /// The template of some steps; `reversed` writes every table's keys the
    /// other way round.
    fn template(steps: &[Step], memory: u32, reversed: bool) -> String {
        let mut text = String::new();
        let table = |header: &str, mut lines: Vec<String>| {
            if reversed {
                lines.reverse();
            }
            format!("{header}\n{}\n", lines.join("\n"))
        };
        text += &table("[image]", vec!["name = 'web'".into(), "version = '1'".into()]);
        text += &table("[base]", vec!["debian = 'x'".into()]);
        text += &table("[builder.qemu]", vec![format!("memory = '{memory}MiB'"), "cpus = 2".into()]);
        if steps.iter().any(|step| step.secret) {
            text += "[variables]\ntoken = { env = 'TOKEN', sensitive = true }\n";
        }
        for (number, step) in steps.iter().enumerate() {
            let mut env: Vec<String> = step.env.iter().map(|(name, value)| format!("{name} = '{value}'")).collect();
            if reversed {
                env.reverse();
            }
            let mut lines = vec![format!("shell = '{}'", step.body), format!("env = {{ {} }}", env.join(", "))];
            lines.extend(step.secret.then(|| "secrets = ['token']".to_owned()));
            lines.extend(step.user.as_ref().map(|user| format!("user = '{user}'")));
            lines.extend(step.name.as_ref().map(|name| format!("name = '{name}{number}'")));
            lines.extend(step.timeout.map(|seconds| format!("timeout = '{seconds}s'")));
            lines.extend(step.cache.map(|cache| format!("cache = {cache}")));
            lines.push(format!("retries = {}\ncheckpoint = {}", step.retries, step.checkpoint));
            text += &table("[[provision]]", lines);
        }
        text
    }

    fn planned(text: &str, secret: &str, now: SystemTime) -> Plan {
        let folder = tempfile::tempdir().unwrap();
        plan_in(folder.path(), text, secret, now)
    }

    fn plan_in(folder: &Path, text: &str, secret: &str, now: SystemTime) -> Plan {
        std::fs::write(folder.join("kiln.toml"), text).unwrap();
        // Every run has another environment, as every host and user has.
        let host = folder.display().to_string();
        let environment = vec![("TOKEN".to_owned(), secret.to_owned()), ("HOSTNAME".to_owned(), host)];
        let inputs = Inputs { environment, now, ..Inputs::default() };
        let template = load(folder, &inputs, &Fakes::default().kinds()).unwrap_or_else(|mistakes| panic!("{mistakes:#?}\n{text}"));
        Plan::new(&template, Some(Digest::of("base"))).unwrap()
    }

    fn keys(plan: &Plan) -> Vec<Key> {
        plan.steps.iter().map(|step| step.known_key().unwrap()).chain(plan.seal).collect()
    }

    /// The names of the parts in which two steps differ.
    fn differing(one: &PlannedStep, two: &PlannedStep) -> BTreeSet<String> {
        let alone = |one: &[Part], two: &[Part]| one.iter().filter(|part| !two.contains(part)).map(|part| part.name.clone()).collect();
        let (first, second): (BTreeSet<String>, BTreeSet<String>) = (alone(&one.parts, &two.parts), alone(&two.parts, &one.parts));
        first.union(&second).cloned().collect()
    }

    /// What changes bytes in the image, or might.
    fn matters(step: &Step) -> (&str, &BTreeMap<String, String>, bool, &str) {
        (&step.body, &step.env, step.secret, step.user.as_deref().unwrap_or("root"))
    }

    /// What the parts are called that make the difference.
    fn names(one: &Step, two: &Step) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        let mut differ = |name: &str, differs: bool| differs.then(|| names.insert(name.to_owned()));
        differ("settings", one.body != two.body);
        differ("secret token", one.secret != two.secret);
        differ("user", matters(one).3 != matters(two).3);
        for name in one.env.keys().chain(two.env.keys()) {
            differ(&format!("env {name}"), one.env.get(name) != two.env.get(name));
        }
        names
    }

    /// Files for a guest, as a `file` step has them.
    struct Upload(PathBuf);

    #[async_trait]
    impl Provisioner for Upload {
        fn kind(&self) -> &'static str {
            "file"
        }
        fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
            Tree::walk(&self.0)?.key(hasher)
        }
        async fn run(&self, _: &kiln_model::provision::Step<'_>) -> Result<()> {
            Ok(())
        }
    }

    type Files = BTreeMap<String, (Vec<u8>, bool)>;

    /// The key of these files, wherever they are.
    fn uploaded(files: &Files) -> (Key, Vec<Part>) {
        let folder = tempfile::tempdir().unwrap();
        let site = folder.path().join("site");
        std::fs::create_dir(&site).unwrap();
        std::fs::set_permissions(&site, std::fs::Permissions::from_mode(0o755)).unwrap();
        for (name, (bytes, executable)) in files {
            std::fs::write(site.join(name), bytes).unwrap();
            let mode = if *executable { 0o755 } else { 0o644 };
            std::fs::set_permissions(site.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let (key, parts, _) = own_key(&Upload(site), &Common::default()).unwrap();
        (key, parts)
    }

    fn files() -> impl Strategy<Value = Files> {
        prop::collection::btree_map("[a-z]{1,3}", (prop::collection::vec(any::<u8>(), 0..4), any::<bool>()), 0..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// The folder, the order of keys, the time, memory, a secret's value,
        /// names, limits and cache policies: none of it enters a key.
        #[test]
        fn what_must_not_change_a_key(steps in prop::collection::vec(step(), 0..4), memory in 1_u32..9999, later in 1_u64..1 << 30) {
            let now = SystemTime::UNIX_EPOCH;
            let one = planned(&template(&steps, 512, false), "hunter22", now);
            let mut same = steps.clone();
            for step in &mut same {
                (step.name, step.timeout, step.retries, step.cache, step.checkpoint) = (None, None, 0, None, true);
            }
            let two = planned(&template(&same, memory, true), "another secret", now + Duration::from_secs(later));
            prop_assert_eq!(keys(&one), keys(&two));
            for (one, two) in one.steps.iter().zip(&two.steps) {
                prop_assert_eq!(&one.parts, &two.parts);
                let secret = Digest::of("hunter22").hex();
                prop_assert!(one.parts.iter().all(|part| !secret.starts_with(&part.digest)));
            }
        }

        /// A step's key changes exactly when it, or one before it, does; and
        /// no two different steps share their own key.
        #[test]
        fn what_must_change_a_key(steps in prop::collection::vec(step(), 1..4), other in step(), at in any::<prop::sample::Index>()) {
            let at = at.index(steps.len());
            let mut changed = steps.clone();
            changed[at] = other;
            let now = SystemTime::UNIX_EPOCH;
            let (one, two) = (planned(&template(&steps, 512, false), "x", now), planned(&template(&changed, 512, false), "x", now));
            let same = matters(&steps[at]) == matters(&changed[at]);
            prop_assert_eq!(one.steps[at].own == two.steps[at].own, same);
            prop_assert_eq!(differing(&one.steps[at], &two.steps[at]), names(&steps[at], &changed[at]));
            for (number, (one, two)) in keys(&one).into_iter().zip(keys(&two)).enumerate() {
                prop_assert_eq!(one == two, number < at || same, "key {}", number);
            }
        }

        /// Paths, modes and bytes of files, and neither where they are nor when
        /// they were written; and the part that differs is named.
        #[test]
        fn files_enter_by_path_mode_and_bytes(one in files(), two in files()) {
            let ((key, parts), (again, _), (other, others)) = (uploaded(&one), uploaded(&one), uploaded(&two));
            prop_assert_eq!(key, again);
            prop_assert_eq!(key == other, one == two);
            prop_assert_eq!(parts == others, one == two);
            let file = |name: &String| parts.iter().find(|part| part.name == format!("site/{name}"));
            for (name, content) in &two {
                let same = others.iter().find(|part| part.name == format!("site/{name}")) == file(name);
                prop_assert_eq!(same, one.get(name) == Some(content));
            }
        }

        /// Order matters, and so does where a step is left out.
        #[test]
        fn order_is_part_of_a_key(mut steps in prop::collection::vec(step(), 2..5), at in any::<prop::sample::Index>()) {
            let at = at.index(steps.len() - 1);
            prop_assume!(matters(&steps[at]) != matters(&steps[at + 1]));
            let now = SystemTime::UNIX_EPOCH;
            let one = keys(&planned(&template(&steps, 512, false), "x", now));
            steps.swap(at, at + 1);
            let two = keys(&planned(&template(&steps, 512, false), "x", now));
            for number in 0..one.len() {
                prop_assert_eq!(one[number] == two[number], number < at, "key {}", number);
            }
        }
    }

    #[test]
    fn input_files_enter_by_their_bytes_and_time_by_its_text() {
        let folder = tempfile::tempdir().unwrap();
        let head = "[image]\nname = 'web'\nversion = '1'\n[base]\ndebian = 'x'\n[[provision]]\n";
        let text = format!("{head}file = {{ source = 'f', destination = '/f' }}");
        std::fs::write(folder.path().join("f"), "one").unwrap();
        let one = plan_in(folder.path(), &text, "x", SystemTime::UNIX_EPOCH);
        std::fs::write(folder.path().join("f"), "two").unwrap();
        assert_ne!(keys(&one), keys(&plan_in(folder.path(), &text, "x", SystemTime::UNIX_EPOCH)));

        let text = format!("{head}shell = 'x'\nenv = {{ D = '{{{{ time.date }}}}' }}");
        let day = |seconds| keys(&planned(&text, "x", SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)));
        assert_eq!(day(0), day(86_399));
        assert_ne!(day(0), day(86_400));
    }

    #[test]
    fn base_and_disk_and_seal() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("kiln.toml"), template(&[], 512, false) + "[seal]\nkeep = ['/a', '/b']").unwrap();
        let load = || load(folder.path(), &Inputs::default(), &Fakes::default().kinds()).unwrap_or_else(|m| panic!("{m:?}"));
        let base = Some(Digest::of("base"));
        let plan = |change: &dyn Fn(&mut Template)| {
            let mut template = load();
            change(&mut template);
            Plan::new(&template, base).unwrap()
        };
        let first = plan(&|_| {});
        assert_ne!(first.start, Plan::new(&load(), Some(Digest::of("other"))).unwrap().start);
        assert_ne!(first.start, plan(&|t| t.disk_size = Some(1 << 32)).start);
        // A new name, version or commit runs the seal alone.
        for change in [
            &|t: &mut Template| t.name = "other".into(),
            &|t: &mut Template| t.version = "2".into(),
            &|t: &mut Template| t.commit = Some("c".into()),
            &|t: &mut Template| drop(t.keep.pop()),
            &|t: &mut Template| t.mutable.push("/c".into()),
        ] as [&dyn Fn(&mut Template); 5]
        {
            let changed = plan(change);
            assert_eq!(first.start, changed.start);
            assert_ne!(first.seal, changed.seal);
        }
        // These neither: labels are in the config, and not on the disk.
        for same in [
            &|t: &mut Template| drop(t.labels.insert("team".into(), "shop".into())),
            &|t: &mut Template| t.keep.reverse(),
            &|t: &mut Template| t.max_age = Cache::Forever,
            &|t: &mut Template| drop(t.secrets.insert("s".into(), Secret::new("x"))),
            &|t: &mut Template| t.folder = "/elsewhere".into(),
        ] as [&dyn Fn(&mut Template); 5]
        {
            assert_eq!(keys(&first), keys(&plan(same)));
        }
        // What each of them is made of has a name for people.
        let named = |parts: &[Part]| parts.iter().map(|part| part.name.clone()).collect::<Vec<_>>();
        assert_eq!(named(&first.start_parts), ["base", "[disk] size"]);
        assert_eq!(named(&first.seal_parts), ["name", "version", "commit", "kiln's own seal", "keep /a", "keep /b"]);
        // Before the base is known there are no keys, and then the same ones.
        let mut late = Plan::new(&load(), None).unwrap();
        assert_eq!((late.start, late.seal), (None, None));
        late.set_base(Digest::of("base"));
        assert_eq!(keys(&late), keys(&first));
    }

    #[test]
    fn the_tests_have_a_key_of_their_own() {
        let plan = |version: &str, tests: &str| {
            let text = format!("[image]\nname = 'web'\nversion = '{version}'\n[base]\ndebian = 'x'\n{tests}");
            planned(&text, "x", SystemTime::UNIX_EPOCH)
        };
        let test = |body: &str| format!("[[test]]\nshell = '{body}'\n");
        let (a, b) = (test("a"), test("b"));
        let first = plan("1", &(a.clone() + &b));
        assert!(first.tests.is_some());
        assert_eq!(plan("1", "").tests, None);
        // They change no image, and how they are run changes nothing.
        assert_eq!(plan("1", "").seal, first.seal);
        assert_eq!(plan("1", &(a.clone() + "name = 'x'\ntimeout = '5m'\nretries = 2\n" + &b)).tests, first.tests);
        let again = a.clone() + "boot = 'both'\n" + &b;
        for other in [a.clone(), b.clone() + &a, a.clone() + &test("c"), a.clone() + "env = { A = '1' }\n" + &b, again] {
            assert_ne!(plan("1", &other).tests, first.tests, "{other}");
        }
        assert_ne!(plan("2", &(a.clone() + &b)).tests, first.tests, "another image has passed nothing yet");
        // Each for itself, whatever the image and the other tests are.
        let (one, two) = (plan("1", &(a.clone() + &b)), plan("2", &(b.clone() + &a)));
        assert_eq!(one.each_test, [two.each_test[1], two.each_test[0]]);
    }

    #[test]
    fn keys_stay_what_they_were() {
        // A change here makes everything cached everywhere miss: raise
        // `kiln_model::key::FORMAT` or SEAL_VERSION on purpose, never by
        // accident.
        let text =
            "[image]\nname = 'web'\nversion = '1'\n[base]\ndebian = 'x'\n[[provision]]\nshell = 'a'\nenv = { A = 'b' }\nuser = 'u'\n";
        let plan = planned(text, "x", SystemTime::UNIX_EPOCH);
        let shown: Vec<String> = plan.start.iter().copied().chain(keys(&plan)).map(|key| key.short()).collect();
        assert_eq!(shown, ["9d6430de9436", "ad36d15dd457", "e63f07b7907f"]);
    }
}
