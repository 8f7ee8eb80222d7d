//! `shell`: runs a script on the guest.

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, Hasher as _};
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::event::Stream;
use kiln_model::guest::{Command, Exit, OnLine, quote};
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Common, Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, Value, wrong_type};
use kiln_model::{Code, Digest, Error, Result};

use crate::settings::{finish, script};
use crate::trace::{Record, complaint, place, prelude};

/// Lines of standard error shown with a failure.
const TAIL: usize = 10;
/// What to do about a failure on the guest.
pub(crate) const LOOK: &str = "`--on-failure shell` opens a shell on the machine where it failed";
/// How long tidying up after a killed script may take.
const TIDYING: Duration = Duration::from_secs(60);

/// Reads `shell = '…'` or `[provision.shell]`.
pub(crate) struct ShellKind;

/// A script and how it is run.
pub(crate) struct Shell {
    script: Vec<u8>,
    /// The program and its arguments.
    interpreter: Vec<String>,
    strict: bool,
    args: Vec<String>,
}

impl Kind<dyn Provisioner> for ShellKind {
    fn name(&self) -> &'static str {
        "shell"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["inline", "script", "interpreter", "strict", "args"]
    }

    fn verbatim(&self) -> &'static [&'static str] {
        &["", "inline"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let shell = match &settings.value {
            Value::String(script) => {
                Some(Shell { script: script.clone().into_bytes(), interpreter: vec!["bash".into()], strict: true, args: Vec::new() })
            }
            Value::Table(_) => read_table(settings, self.keys(), folder, problems),
            _ => wrong_type(settings, "shell", "a script, or a table with `inline` or `script`", problems),
        }?;
        if shell.script.iter().all(u8::is_ascii_whitespace) {
            problems.add(settings.place, "the script is empty").help("remove this step");
        }
        (problems.0.len() == before).then(|| Box::new(shell) as _)
    }
}

fn read_table(settings: &Node, keys: &[&str], folder: &Path, problems: &mut Problems) -> Option<Shell> {
    let mut reader = Reader::new(settings, "[provision.shell]", problems)?;
    let script = script(&mut reader, "[provision.shell]", folder, problems);
    let interpreter: Vec<String> = reader.string("interpreter", problems).unwrap_or("bash").split_whitespace().map(Into::into).collect();
    if interpreter.is_empty() {
        problems.add(reader.place(), "`interpreter` is empty");
    }
    let bash = is_bash(&interpreter);
    let place = reader.entry("strict").map_or(settings.place, |entry| entry.node.place);
    let strict = reader.boolean("strict", problems);
    if strict == Some(true) && !bash {
        problems.add(place, "`strict` works with bash alone").help("remove `strict`, or the `interpreter`");
    }
    let args = reader.strings("args", problems).unwrap_or_default().into_iter().map(|(text, _)| text.to_owned()).collect();
    finish(reader, settings, keys, problems);
    Some(Shell { script: script?, interpreter, strict: strict.unwrap_or(bash) && bash, args })
}

fn is_bash(interpreter: &[String]) -> bool {
    interpreter.first().is_some_and(|program| program == "bash" || program.ends_with("/bash"))
}

/// How a file comes into the guest.
enum Content {
    /// On standard input.
    Sent(Vec<u8>),
    /// In the command line.
    Said(String),
}

/// What one run sees of the guest's output.
struct Watch<'a> {
    step: &'a Step<'a>,
    /// Sees every line, too.
    see: OnLine<'a>,
    /// Begins what the wrapper says to us.
    mark: String,
    script: String,
    records: Vec<Record>,
    set_up: bool,
    tail: VecDeque<String>,
    complaint: Option<usize>,
}

impl Watch<'_> {
    fn line(&mut self, stream: Stream, line: &str) {
        let mut line = line;
        if stream == Stream::Stdout {
            // Not always at the beginning: the script's last line may not be
            // ended.
            if let Some((before, said)) = line.split_once(&self.mark) {
                match said.trim() {
                    "ready" => self.set_up = true,
                    record => self.records.extend(Record::parse(record)),
                }
                line = before;
                if line.is_empty() {
                    return;
                }
            }
        } else {
            self.complaint = complaint(line, &self.script).or(self.complaint);
            if self.tail.len() == TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(line.to_owned());
        }
        (self.see)(stream, line);
        self.step.reports.output(&self.step.common.name, stream, line);
    }

    fn tail(&self) -> Option<String> {
        let lines: Vec<&str> = self.tail.iter().map(String::as_str).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

impl Shell {
    /// A script of kiln's own, in strict bash.
    pub(crate) fn own(script: impl Into<String>) -> Self {
        Self { script: script.into().into_bytes(), interpreter: vec!["bash".into()], strict: true, args: Vec::new() }
    }

    /// A script of kiln's own for any POSIX shell, which looks after its
    /// failures itself.
    pub(crate) fn plain(script: impl Into<String>) -> Self {
        Self { script: script.into().into_bytes(), interpreter: vec!["sh".into()], strict: false, args: Vec::new() }
    }

    /// The files that a run needs. What may be secret, long or binary is sent
    /// ([`Content::Sent`]) in this order; a command that writes the rest needs no
    /// program for it.
    fn files(&self, folder: &str, common: &Common) -> Result<Vec<(&'static str, Content)>> {
        let program: Vec<String> = self.interpreter.iter().map(|part| quote(part)).collect();
        let program = program.join(" ");
        let args: String = self.args.iter().map(|arg| format!(" {}", quote(arg))).collect();
        let cd = if common.user.is_some() { "cd 2>/dev/null || cd /\n" } else { "" };
        let mut environment = environment(common)?;
        let mut files = Vec::new();
        if !common.env.is_empty() {
            let sent = std::mem::replace(&mut environment, format!(". {folder}/env\n"));
            files.push(("env", Content::Sent(sent.into_bytes())));
        }
        files.push(("script", Content::Sent(self.script.clone())));
        let mut options = "";
        if self.strict {
            options = " -Eeuo pipefail";
            environment.push_str(&format!("export BASH_ENV={folder}/prelude\n"));
            files.push(("prelude", Content::Said(prelude(&format!("{folder}/trace")))));
        }
        files.push(("run", Content::Said(format!("{cd}{environment}exec {program}{options} {folder}/script{args}\n"))));
        Ok(files)
    }

    /// Runs it, and lets `see` have every line that it prints.
    ///
    /// # Errors
    /// [`Code::Step`] when it fails, with the line that did; and those of the
    /// guest.
    pub(crate) async fn watched(&self, step: &Step<'_>, see: OnLine<'_>) -> Result<()> {
        let Common { name, user, timeout, .. } = step.common;
        let nonce = nonce();
        let folder = format!("/run/kiln/step-{nonce}");
        let files = self.files(&folder, step.common)?;
        let mark = format!("kiln-{nonce} ");
        let command = Command {
            line: wrapper(&folder, &mark, user.as_deref(), &files),
            stdin: files
                .into_iter()
                .filter_map(|(_, content)| if let Content::Sent(bytes) = content { Some(bytes) } else { None })
                .flatten()
                .collect(),
            timeout: *timeout,
        };
        let script = format!("{folder}/script");
        let mut watch = Watch { step, see, mark, script, records: Vec::new(), set_up: false, tail: VecDeque::new(), complaint: None };
        match step.guest.execute(&command, &mut |stream, line| watch.line(stream, line)).await {
            Ok(exit) if exit.success() => Ok(()),
            Ok(exit) => Err(self.failure(&exit, &watch)),
            Err(error) => {
                // What was killed could not tidy up after itself.
                if error.kind() == Code::Timeout {
                    let line = format!("rm -rf {folder}");
                    let _ = step.guest.execute(&Command::new(line).timeout(TIDYING), &mut |_, _| {}).await;
                }
                let error = match (error.kind(), timeout) {
                    (Code::Timeout, Some(limit)) => Error::new(Code::Timeout, format!("the script took over {limit:?} and was killed"))
                        .because(error)
                        .next("raise its `timeout`"),
                    _ => error,
                };
                Err(match watch.tail() {
                    Some(tail) => error.detail(tail),
                    None => error,
                }
                .step(name))
            }
        }
    }
    fn failure(&self, exit: &Exit, watch: &Watch<'_>) -> Error {
        let Common { name, user, .. } = watch.step.common;
        let error = if watch.set_up {
            let how = said(exit);
            let place = match exit {
                Exit::Status(status) if self.strict => {
                    place(&String::from_utf8_lossy(&self.script), *status, &watch.records, watch.complaint)
                }
                _ => None,
            };
            match place {
                Some((line, text)) if text.contains('\n') => {
                    Error::new(Code::Step, format!("line {line} of the script failed with {how}")).detail(format!("line {line}:\n{text}"))
                }
                Some((line, text)) => Error::new(Code::Step, format!("line {line} of the script failed with {how}: {text}")),
                None => Error::new(Code::Step, format!("the script failed with {how}")),
            }
        } else {
            let error = Error::new(Code::Step, "the script could not be put into the guest");
            match user {
                Some(user) => error.next(format!("`user = \"{user}\"` needs that user and sudo in the guest")),
                None => error,
            }
        };
        let error = match watch.tail() {
            Some(tail) => error.detail(tail),
            None => error,
        };
        error.step(name).next(LOOK)
    }
}

/// Something that no other run has.
pub(crate) fn nonce() -> String {
    format!("{:016x}", std::hash::RandomState::new().build_hasher().finish())
}

/// How a script ended; a shell tells of a signal by a status above 128.
fn said(exit: &Exit) -> String {
    let signal = match exit {
        Exit::Status(129) => "HUP",
        Exit::Status(130) => "INT",
        Exit::Status(134) => "ABRT",
        Exit::Status(137) => "KILL",
        Exit::Status(139) => "SEGV",
        Exit::Status(141) => "PIPE",
        Exit::Status(143) => "TERM",
        Exit::Status(127) => return "exit status 127 (command not found)".into(),
        Exit::Status(126) => return "exit status 126 (not executable)".into(),
        other => return other.to_string(),
    };
    format!("{exit} (killed by SIG{signal})")
}

/// The environment as a file to be sourced: on a command line it would show in
/// the guest's process list.
fn environment(common: &Common) -> Result<String> {
    let mut text = String::new();
    if !common.env.contains_key("DEBIAN_FRONTEND") {
        text.push_str("export DEBIAN_FRONTEND=noninteractive\n");
    }
    for (name, value) in &common.env {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || !name.chars().all(plain) || name.starts_with(|c: char| c.is_ascii_digit()) || value.contains('\0') {
            return Err(Error::new(
                Code::Usage,
                format!("`{name}` in `env` is no name of an environment variable, or its value has a NUL"),
            )
            .step(&common.name));
        }
        text.push_str(&format!("export {name}={}\n", quote(value)));
    }
    Ok(text)
}

/// What puts the files into place, runs the script and says how it went. One
/// command, and few programs in it: each costs a guest under emulation a
/// twentieth of a second.
fn wrapper(folder: &str, mark: &str, user: Option<&str>, files: &[(&str, Content)]) -> String {
    let take = files.iter().map(|(name, content)| match content {
        Content::Sent(bytes) => format!(" && head -c {} > \"$d/{name}\"", bytes.len()),
        Content::Said(text) => format!(" && printf %s {} > \"$d/{name}\"", quote(text)),
    });
    let take: String = take.collect();
    let (own, run) = match user {
        // The folder above may be entered, not listed.
        Some(user) => {
            let user = quote(user);
            (
                format!(" && chmod 711 /run/kiln && chown -R {user} \"$d\" && command -v sudo > /dev/null"),
                format!("sudo -u {user} -H -- /bin/sh \"$d/run\""),
            )
        }
        None => (String::new(), "( . \"$d/run\" )".to_owned()),
    };
    format!(
        "umask 077; d={folder}
trap 'rm -rf \"$d\"' EXIT
mkdir -p \"$d\"{take} && : > \"$d/trace\"{own} || exit 1
echo '{mark}ready'
umask 022
{run} < /dev/null
s=$?
[ $s = 0 ] || tail -n 4 \"$d/trace\" | sed 's/^/{mark}/'
exit $s"
    )
}

#[async_trait]
impl Provisioner for Shell {
    fn kind(&self) -> &'static str {
        "shell"
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("interpreter", self.interpreter.join(" ")).field("strict", self.strict.to_string());
        hasher.hidden("args", self.args.len().to_string());
        for (number, arg) in self.args.iter().enumerate() {
            hasher.hidden("arg", arg).part(format!("argument {}", number + 1), arg);
        }
        hasher.field("script", &self.script).input("script", Digest::of(&self.script));
        Ok(())
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        self.watched(step, &mut |_, _| {}).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::tests::{key, node, read, string, table, text, wrong};

    #[test]
    fn settings_and_their_problems() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        std::fs::write(here.join("setup.sh"), "true").unwrap();
        read("shell", &table(&[("script", string("setup.sh")), ("interpreter", string("/bin/sh"))]), here);
        let cases: &[(Node, &str)] = &[
            (text(" \n"), "the script is empty"),
            (node(Value::Integer(1)), "`shell` must be a script, or a table"),
            (table(&[]), "needs `inline` or `script`"),
            (table(&[("script", string("missing.sh"))]), "cannot read `missing.sh`"),
            (table(&[("script", string("setup.sh")), ("inline", string("x"))]), "exclude each other"),
            (table(&[("inline", string("x")), ("interpreter", string("python3")), ("strict", Value::Boolean(true))]), "bash alone"),
            (table(&[("inlin", string("x"))]), "did you mean `inline`?"),
            (table(&[("script", string("."))]), "cannot read"),
        ];
        for (settings, expected) in cases {
            let found = wrong("shell", settings, here);
            assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:?}");
        }
    }

    #[test]
    fn the_key_holds_what_is_run() {
        let here = tempfile::tempdir().unwrap();
        let of = |entries: &[(&str, Value)]| key(&*read("shell", &table(entries), here.path()));
        let plain = of(&[("inline", string("true"))]);
        assert_eq!(plain, key(&*read("shell", &text("true"), here.path())));
        std::fs::write(here.path().join("s"), "true").unwrap();
        assert_eq!(plain, of(&[("script", string("s"))]));
        let mut keys = vec![
            plain,
            of(&[("inline", string("false"))]),
            of(&[("inline", string("true")), ("strict", Value::Boolean(false))]),
            of(&[("inline", string("true")), ("interpreter", string("/bin/sh"))]),
            of(&[("inline", string("true")), ("args", Value::Array(vec![text("a"), text("b")]))]),
            of(&[("inline", string("true")), ("args", Value::Array(vec![text("a b")]))]),
        ];
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 6);
    }
}
