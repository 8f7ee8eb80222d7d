//! `reboot`: starts the guest anew, and waits until it is really back.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::guest::{Command, GuestExt as _};
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, Value, wrong_type};
use kiln_model::{Code, Error, Result};

use crate::settings::finish;

const TIMEOUT: Duration = Duration::from_secs(600);
const COMMAND: &str = "systemctl reboot || reboot";

/// Reads `reboot = true` or `reboot = { timeout = "5m", command = "…" }`.
pub(crate) struct RebootKind;

struct Reboot {
    command: String,
    timeout: Option<Duration>,
}

impl Kind<dyn Provisioner> for RebootKind {
    fn name(&self) -> &'static str {
        "reboot"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["timeout", "command"]
    }

    fn verbatim(&self) -> &'static [&'static str] {
        &["command"]
    }

    fn read(&self, settings: &Node, _: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut reboot = Reboot { command: COMMAND.into(), timeout: None };
        match &settings.value {
            Value::Boolean(true) => {}
            Value::Boolean(false) => {
                problems.add(settings.place, "`reboot = false` does nothing").help("remove this step");
            }
            Value::Table(_) => {
                let mut reader = Reader::new(settings, "[provision.reboot]", problems)?;
                reboot.timeout = reader.duration("timeout", problems);
                if let Some(command) = reader.string("command", problems) {
                    reboot.command = command.to_owned();
                }
                finish(reader, settings, self.keys(), problems);
            }
            _ => wrong_type::<()>(settings, "reboot", "true, or a table with `timeout` or `command`", problems)?,
        }
        (problems.0.len() == before).then(|| Box::new(reboot) as _)
    }
}

#[async_trait]
impl Provisioner for Reboot {
    fn kind(&self) -> &'static str {
        "reboot"
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        // How long it may take changes nothing in the image.
        hasher.field("command", &self.command);
        Ok(())
    }

    fn reboots(&self) -> bool {
        true
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        let name = &step.common.name;
        let limit = self.timeout.or(step.common.timeout).unwrap_or(TIMEOUT);
        let before = step.guest.boot_id().await?;
        // Nobody knows whether the command still answers: it may end at once,
        // be cut off, or (kexec) take the connection down without a word. What
        // counts is the new boot id, so both are watched at the same time.
        let command = Command::new(&self.command);
        let mut stderr = String::new();
        let mut on_line = |stream, line: &str| {
            stderr.push_str(line);
            stderr.push('\n');
            step.reports.output(name, stream, line);
        };
        let back = step.guest.wait_for_new_boot(&before, limit);
        tokio::pin!(back);
        tokio::select! {
            back = &mut back => return back.map_err(|error| error.step(name)),
            ended = step.guest.execute(&command, &mut on_line) => match ended {
                Ok(exit) if !exit.success() => {
                    let error = Error::new(Code::Step, format!("`{}` failed with {exit}", self.command)).step(name);
                    return Err(error.detail(stderr));
                }
                Err(error) if error.kind() != Code::Unreachable => return Err(error.step(name)),
                _ => {}
            },
        }
        back.await.map_err(|error| error.step(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::tests::{key, node, read, string, table, wrong};

    #[test]
    fn settings() {
        let here = Path::new(".");
        assert!(read("reboot", &node(Value::Boolean(true)), here).reboots());
        assert!(wrong("reboot", &node(Value::Boolean(false)), here)[0].contains("does nothing"));
        assert!(wrong("reboot", &node(Value::Integer(1)), here)[0].contains("must be true, or a table"));
        assert!(wrong("reboot", &table(&[("comand", string("x"))]), here)[0].contains("did you mean `command`?"));
        assert!(wrong("reboot", &table(&[("timeout", string("soon"))]), here)[0].contains("not a length of time"));
    }

    #[test]
    fn the_command_is_in_the_key_and_the_timeout_is_not() {
        let of = |entries: &[(&str, Value)]| key(&*read("reboot", &table(entries), Path::new(".")));
        let plain = key(&*read("reboot", &node(Value::Boolean(true)), Path::new(".")));
        assert_eq!(of(&[("timeout", string("5m"))]), plain);
        assert_ne!(of(&[("command", string("kexec -e"))]), plain);
    }
}
