//! `from = "guest"`: Ansible inside the guest, on itself.

use std::collections::BTreeMap;

use async_trait::async_trait;
use kiln_model::event::Stream;
use kiln_model::guest::quote;
use kiln_model::key::KeyHasher;
use kiln_model::provision::Step;
use kiln_model::tree::Tree;
use kiln_model::{Code, Error, Result};

use super::layout::{EVENTS, MEMORY, in_memory};
use super::said::{Events, NOTHING};
use super::{Play, sources};
use crate::configuration::{Changes, Input, Presence, Tool};

/// Begins what the scripts tell kiln.
const MARK: &str = "kiln-ansible: ";

/// Ansible in the guest.
pub(super) struct Inside {
    pub(super) play: Play,
}

/// Where Ansible keeps what it makes for a task; not in the run's folder, since
/// programs may not run there.
fn memory(folder: &str) -> String {
    format!("{MEMORY}/kiln-ansible-{}", folder.rsplit('-').next().unwrap_or_default())
}

impl Inside {
    fn script(&self, folder: &str, check: bool) -> String {
        let mut environment = self.play.environment(folder, check);
        if let Some(name) = &self.play.vault_password {
            environment.insert("ANSIBLE_VAULT_PASSWORD_FILE".into(), format!("/run/kiln/secrets/{name}"));
        }
        let exports: String = environment.iter().map(|(name, value)| format!("export {name}={}\n", quote(value))).collect();
        let arguments: Vec<String> = self.play.arguments(folder, check).iter().map(|argument| quote(argument)).collect();
        let (events, memory) = (EVENTS[usize::from(check)], memory(folder));
        let (arguments, nothing) = (arguments.join(" "), quote(NOTHING));
        format!(
            "trap 'rm -rf {memory}' EXIT
umask 077; mkdir -p home tmp; : > {events}
umask 022
{exports}cd project
s=0; ansible-playbook {arguments} || s=$?
cd ..
sed -n -e '/\"outcome\": \"\\(failed\\|unreachable\\)\"/s/^/{MARK}/p' -e '/\"would_change\": \\[\"/s/^/{MARK}/p' {events}
[ $s = 0 ] || exit $s
[ -s {events} ] || {{ echo {MARK}{nothing}; exit 1; }}
echo '{MARK}end'\n"
        )
    }
}

#[async_trait]
impl Tool for Inside {
    fn kind(&self) -> &'static str {
        "ansible"
    }

    fn presence(&self) -> Presence {
        Presence {
            programs: vec!["ansible-playbook".into()],
            packages: vec!["ansible-core".into(), "python3-apt".into()],
            install: String::new(),
            remains: Vec::new(),
        }
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("from", "guest");
        self.play.key(hasher)
    }

    fn secrets(&self) -> Vec<&str> {
        self.play.secrets()
    }

    fn inputs(&self) -> Vec<Input> {
        self.play.inputs.iter().map(|input| Input { from: input.from.clone(), to: input.to.clone() }).collect()
    }

    fn tree(&self, input: &Input) -> Result<Tree> {
        sources::walk(&input.from)
    }

    fn files(&self, step: &Step<'_>, folder: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let mut connection = in_memory(&memory(folder));
        connection.extend(BTreeMap::from([
            ("ansible_connection".to_owned(), "local".into()),
            ("ansible_python_interpreter".to_owned(), "/usr/bin/python3".into()),
        ]));
        self.play.files(step, &connection.into())
    }

    fn apply(&self, folder: &str) -> String {
        self.script(folder, false)
    }

    fn failure(&self, _stream: Stream, line: &str) -> Option<String> {
        if let Some(said) = line.strip_prefix("ERROR! ") {
            return Some(said.to_owned());
        }
        let told = line.strip_prefix(MARK)?;
        if told == NOTHING {
            return Some(told.to_owned());
        }
        let (message, printed) = Events::read([told]).ok()?.failed()?;
        Some(printed.map_or(message.clone(), |printed| format!("{message}\n{printed}")))
    }

    fn check(&self, folder: &str) -> String {
        self.script(folder, true)
    }

    fn changes(&self, lines: &[(Stream, String)]) -> Result<Changes> {
        let mut told: Vec<&str> = lines.iter().filter_map(|(_, line)| line.strip_prefix(MARK)).collect();
        if told.pop() != Some("end") {
            return Err(Error::new(Code::Step, "Ansible did not tell what a second run would change"));
        }
        Ok(Events::read(told)?.changes())
    }
}
