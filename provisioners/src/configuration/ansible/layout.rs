//! The folder of one run, and how Ansible is called in it:
//!
//! ```text
//!  project/      the playbook, and what is beside it; the working directory
//!  roles/N       collections/N
//!  inventory/    hosts.json, group_vars, host_vars
//!  given.json    secret.json      variables; the latter 0600
//!  callbacks/    kiln's own plugin, which tells what was done
//!  home/ tmp/    what Ansible takes for its user's
//! ```

use std::collections::BTreeMap;

use kiln_model::provision::Step;
use kiln_model::{Code, Error, Result};
use serde_json::json;

use super::Play;
use super::sources::PROJECT;

/// What the plugin writes in the run, and in the run after it.
pub(super) const EVENTS: [&str; 2] = ["events", "events-again"];
/// The plugin.
const CALLBACK: &str = include_str!("kiln_events.py");
/// Memory of the guest, where programs may run.
pub(super) const MEMORY: &str = "/dev/shm";

impl Play {
    /// The files of a run, but for the inputs; `connection` is how the guest is
    /// reached.
    pub(super) fn files(&self, step: &Step<'_>, connection: &serde_json::Value) -> Result<Vec<(String, Vec<u8>)>> {
        let host = serde_json::Map::from_iter([(self.host.clone(), connection.clone())]);
        let member = json!({ "hosts": { &self.host: {} } });
        let groups: serde_json::Map<_, _> = self.groups.iter().map(|group| (group.clone(), member.clone())).collect();
        let inventory = json!({ "all": { "hosts": host, "children": groups } });
        let mut secret = BTreeMap::new();
        for (name, of) in &self.secret_vars {
            secret.insert(name, self.secret(step, of)?);
        }
        Ok(vec![
            // Ansible reads this, and so no other.
            ("ansible.cfg".into(), b"[defaults]\n".to_vec()),
            ("inventory/hosts.json".into(), inventory.to_string().into_bytes()),
            ("given.json".into(), json!(self.extra_vars).to_string().into_bytes()),
            ("secret.json".into(), json!(secret).to_string().into_bytes()),
            ("callbacks/kiln_events.py".into(), CALLBACK.into()),
        ])
    }

    /// The value of a secret of the step.
    pub(super) fn secret<'a>(&self, step: &'a Step<'_>, name: &str) -> Result<&'a str> {
        step.secrets.get(name).map(kiln_model::secret::Secret::expose).ok_or_else(|| {
            Error::new(Code::Usage, format!("the secret `{name}` is not among the step's `secrets`"))
                .step(&step.common.name)
                .next(format!("write secrets = [\"{name}\"] into its [[provision]]"))
        })
    }

    /// The arguments of `ansible-playbook` in the run in `root`.
    pub(super) fn arguments(&self, root: &str, check: bool) -> Vec<String> {
        let mut arguments = vec!["--inventory".to_owned(), format!("{root}/inventory/hosts.json")];
        for file in ["given.json", "secret.json"] {
            arguments.extend(["--extra-vars".to_owned(), format!("@{root}/{file}")]);
        }
        for (option, names) in [("--tags", &self.tags), ("--skip-tags", &self.skip_tags)] {
            if !names.is_empty() {
                arguments.extend([option.to_owned(), names.join(",")]);
            }
        }
        if self.verbose > 0 {
            arguments.push(format!("-{}", (0..self.verbose).map(|_| 'v').collect::<String>()));
        }
        if check {
            arguments.push("--check".to_owned());
        }
        arguments.push(format!("{root}/{PROJECT}/{}", self.playbook));
        arguments
    }

    /// The environment of the run in `root`. What is set here has precedence
    /// over every file, and the user's own files are not looked for.
    pub(super) fn environment(&self, root: &str, check: bool) -> BTreeMap<String, String> {
        let below = |folders: &[String], none: &str| {
            let all: Vec<String> = folders.iter().map(|folder| format!("{root}/{folder}")).collect();
            if all.is_empty() { format!("{root}/{none}") } else { all.join(":") }
        };
        let [first, again] = EVENTS.map(|file| format!("{root}/{file}"));
        let set = [
            ("HOME", format!("{root}/home")),
            ("TMPDIR", format!("{root}/tmp")),
            ("LC_ALL", "C.UTF-8".into()),
            ("PYTHONDONTWRITEBYTECODE", "1".into()),
            ("ANSIBLE_CONFIG", format!("{root}/ansible.cfg")),
            ("ANSIBLE_HOME", format!("{root}/home")),
            ("ANSIBLE_LOCAL_TEMP", format!("{root}/tmp")),
            ("ANSIBLE_REMOTE_TEMP", format!("{root}/tmp")),
            ("ANSIBLE_INVENTORY_ENABLED", "yaml".into()),
            ("ANSIBLE_ROLES_PATH", below(&self.roles, "roles")),
            ("ANSIBLE_COLLECTIONS_PATH", below(&self.collections, "collections")),
            ("ANSIBLE_CALLBACK_PLUGINS", format!("{root}/callbacks")),
            ("ANSIBLE_CALLBACKS_ENABLED", "kiln_events".into()),
            ("ANSIBLE_PIPELINING", "1".into()),
            // What a module is called with must not come into the guest's log.
            ("ANSIBLE_NO_TARGET_SYSLOG", "1".into()),
            ("ANSIBLE_RETRY_FILES_ENABLED", "0".into()),
            ("ANSIBLE_NOCOWS", "1".into()),
            ("ANSIBLE_NOCOLOR", "1".into()),
            ("ANSIBLE_DEPRECATION_WARNINGS", "0".into()),
        ];
        let mut environment: BTreeMap<String, String> = set.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        if check {
            environment.insert("KILN_EVENTS_BEFORE".into(), first);
            environment.insert("KILN_EVENTS".into(), again);
        } else {
            environment.insert("KILN_EVENTS".into(), first);
        }
        environment
    }
}

/// The guest's variables for what Ansible keeps there: in memory, below
/// `folder`, so that nothing of it comes to lie on the disk.
pub(super) fn in_memory(folder: &str) -> serde_json::Map<String, serde_json::Value> {
    serde_json::Map::from_iter([
        ("ansible_remote_tmp".to_owned(), folder.into()),
        ("ansible_system_tmpdirs".to_owned(), json!([MEMORY])),
        ("ansible_async_dir".to_owned(), format!("{folder}/async").into()),
    ])
}
