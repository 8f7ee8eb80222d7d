//! The plan stage: every step with its key.
//!
//! A step's *own* key is made of what the step itself is, and is known before
//! the base is; its key chains that to everything before it. So inputs are
//! read once, and the keys follow as soon as the base's digest is known.
//!
//! Never in a key: times, host names, absolute paths, memory size, the order
//! of keys in a file, a step's name, limit in time, retries and cache policy
//! (they change how a step is run or shown, not what it makes), and the value
//! of a secret.

use kiln_model::key::KeyHasher;
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
    /// The steps, as many as the template has.
    pub steps: Vec<PlannedStep>,
    /// Key of the sealed disk.
    pub seal: Option<Key>,
    seal_own: Key,
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
    /// Its key. None: the base's digest is not known.
    pub key: Option<Key>,
}

impl Plan {
    /// Hashes every input of `template`; `base` is the base's disk digest
    /// where it is known.
    ///
    /// # Errors
    /// When an input file cannot be read.
    pub fn new(template: &Template, base: Option<Digest>) -> Result<Self> {
        let steps = template.steps.iter().map(PlannedStep::new).collect::<Result<_>>()?;
        let seal_own = seal_own(&template.name, &template.version, template.commit.as_deref(), &template.keep);
        let mut plan = Self { base: None, disk_size: template.disk_size, start: None, steps, seal: None, seal_own };
        if let Some(base) = base {
            plan.set_base(base);
        }
        Ok(plan)
    }

    /// Computes the keys, now that the base's disk digest is known.
    pub fn set_base(&mut self, base: Digest) {
        let start = start_key(&base, self.disk_size);
        let mut last = start;
        for step in &mut self.steps {
            last = chain("step", &last, &step.own);
            step.key = Some(last);
        }
        self.base = Some(base);
        self.start = Some(start);
        self.seal = Some(chain("seal", &last, &self.seal_own));
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

    fn new(step: &StepSpec) -> Result<Self> {
        let own = own_key(step.provisioner.as_ref(), &step.common).map_err(|error| error.step(&step.common.name))?;
        Ok(Self { name: step.common.name.clone(), kind: step.provisioner.kind(), own, key: None })
    }
}

/// The key of a machine before its first step: the base's disk and the disk's
/// size. An unset size follows from the base, so it needs no number.
pub fn start_key(base: &Digest, disk_size: Option<u64>) -> Key {
    let mut hasher = KeyHasher::new("start");
    hasher.field("base", base.as_bytes());
    hasher.field("disk size", disk_size.map_or_else(|| "default".to_owned(), |size| size.to_string()));
    hasher.finish()
}

/// What a step is made of itself.
///
/// # Errors
/// When an input file cannot be read.
pub fn own_key(provisioner: &dyn Provisioner, common: &Common) -> Result<Key> {
    let mut hasher = KeyHasher::new("own");
    hasher.field("provisioner", provisioner.kind());
    hasher.map("env", common.env.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    hasher.map("secrets", common.secrets.iter().map(|name| (name.as_str(), "")));
    hasher.field("user", common.user.as_deref().unwrap_or("root"));
    provisioner.key(&mut hasher)?;
    Ok(hasher.finish())
}

fn seal_own(name: &str, version: &str, commit: Option<&str>, keep: &[String]) -> Key {
    let mut hasher = KeyHasher::new("seal settings");
    hasher.field("name", name).field("version", version).field("commit", commit.unwrap_or_default());
    hasher.field("seal version", SEAL_VERSION);
    hasher.map("keep", keep.iter().map(|path| (path.as_str(), "")));
    hasher.finish()
}

fn chain(kind: &str, previous: &Key, own: &Key) -> Key {
    let mut hasher = KeyHasher::new(kind);
    hasher.field("previous", previous.hex()).field("own", own.hex());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use kiln_model::secret::Secret;
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
        let environment = vec![("TOKEN".to_owned(), secret.to_owned())];
        let inputs = Inputs { environment, now, ..Inputs::default() };
        let template = load(folder, &inputs, &Fakes::default().kinds()).unwrap_or_else(|mistakes| panic!("{mistakes:#?}\n{text}"));
        Plan::new(&template, Some(Digest::of("base"))).unwrap()
    }

    fn keys(plan: &Plan) -> Vec<Key> {
        plan.steps.iter().map(|step| step.known_key().unwrap()).chain(plan.seal).collect()
    }

    /// What changes bytes in the image, or might.
    fn matters(step: &Step) -> (&str, &BTreeMap<String, String>, bool, &str) {
        (&step.body, &step.env, step.secret, step.user.as_deref().unwrap_or("root"))
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
            for (number, (one, two)) in keys(&one).into_iter().zip(keys(&two)).enumerate() {
                prop_assert_eq!(one == two, number < at || same, "key {}", number);
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
        ] as [&dyn Fn(&mut Template); 4]
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
        // Before the base is known there are no keys, and then the same ones.
        let mut late = Plan::new(&load(), None).unwrap();
        assert_eq!((late.start, late.seal), (None, None));
        late.set_base(Digest::of("base"));
        assert_eq!(keys(&late), keys(&first));
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
