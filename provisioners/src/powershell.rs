//! `powershell`: runs a script on a Windows guest, or wherever PowerShell is.
//!
//! Windows has no POSIX shell, so this goes through a stock OpenSSH client over
//! the bake's own pinned connection. The command line is the same for every
//! script, and the same to `cmd.exe`, PowerShell and sh: a program of one line
//! that reads the real one from standard input. Neither the script nor what is
//! secret ever shows in a list of processes, and no file is left.

use std::collections::VecDeque;
use std::path::Path;
use std::process::Stdio;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use kiln_model::event::Stream;
use kiln_model::guest::SshAccess;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Common, Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, Value, wrong_type};
use kiln_model::{Code, Digest, Error, Result};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWriteExt as _, BufReader};
use tokio::sync::mpsc;

use crate::settings::{finish, script};
use crate::shell::nonce;

/// Lines of standard error shown with a failure.
const TAIL: usize = 10;
/// What `ssh` ends with when it could not do its own part.
const SSH_FAILED: i32 = 255;
/// Reads the real program, in base64, from standard input and runs it.
const BOOTSTRAP: &str = "& ([ScriptBlock]::Create([Text.Encoding]::UTF8.GetString([Convert]::FromBase64String((-join @($input)).Trim()))))";

/// Reads `powershell = '…'` or `[provision.powershell]`.
pub(crate) struct PowershellKind;

/// A script and how it is run.
#[derive(Debug)]
struct Powershell {
    script: String,
    program: String,
    strict: bool,
    args: Vec<String>,
}

impl Kind<dyn Provisioner> for PowershellKind {
    fn name(&self) -> &'static str {
        "powershell"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["inline", "script", "program", "strict", "args"]
    }

    fn verbatim(&self) -> &'static [&'static str] {
        &["", "inline"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let powershell = match &settings.value {
            Value::String(script) => {
                Some(Powershell { script: script.clone(), program: "powershell".into(), strict: true, args: Vec::new() })
            }
            Value::Table(_) => read_table(settings, self.keys(), folder, problems),
            _ => wrong_type(settings, "powershell", "a script, or a table with `inline` or `script`", problems),
        }?;
        if powershell.script.trim().is_empty() {
            problems.add(settings.place, "the script is empty").help("remove this step");
        }
        (problems.0.len() == before).then(|| Box::new(powershell) as _)
    }
}

fn read_table(settings: &Node, keys: &[&str], folder: &Path, problems: &mut Problems) -> Option<Powershell> {
    let mut reader = Reader::new(settings, "[provision.powershell]", problems)?;
    let file = reader.entry("script").map_or(settings.place, |entry| entry.node.place);
    let script = script(&mut reader, "[provision.powershell]", folder, problems).and_then(|script| {
        let text = String::from_utf8(script);
        text.map_err(|_| problems.add(file, "the script is not in UTF-8").help("save it as UTF-8").place).ok()
    });
    let place = reader.entry("program").map_or(settings.place, |entry| entry.node.place);
    let program = reader.string("program", problems).unwrap_or("powershell").to_owned();
    // No quoting means the same to `cmd.exe`, PowerShell and sh.
    if program.is_empty() || !program.chars().all(|c| c.is_ascii_alphanumeric() || ":\\/._-".contains(c)) {
        problems
            .add(place, format!("`{program}` cannot be called by every shell"))
            .help("write \"powershell\", \"pwsh\", or a path without spaces");
    }
    let strict = reader.boolean("strict", problems).unwrap_or(true);
    let args = reader.strings("args", problems).unwrap_or_default().into_iter().map(|(text, _)| text.to_owned()).collect();
    finish(reader, settings, keys, problems);
    // A mark of the order of bytes would be the script's first character.
    Some(Powershell { script: script?.trim_start_matches('\u{feff}').to_owned(), program, strict, args })
}

/// A text of PowerShell's that means just these characters. It knows several
/// kinds of single quotes.
fn quote(text: &str) -> String {
    let mut quoted = String::from("'");
    for c in text.chars() {
        if matches!(c, '\'' | '\u{2018}'..='\u{201b}') {
            quoted.push(c);
        }
        quoted.push(c);
    }
    quoted.push('\'');
    quoted
}

/// What `-EncodedCommand` takes.
fn encoded(command: &str) -> String {
    BASE64_STANDARD.encode(command.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
}

impl Powershell {
    fn line(&self) -> String {
        format!(
            "{} -NoLogo -NoProfile -NonInteractive -ExecutionPolicy Bypass -OutputFormat Text -EncodedCommand {}",
            self.program,
            encoded(BOOTSTRAP)
        )
    }

    /// The real program. The script is a block of its own, so that its line
    /// numbers are the user's; `mark` begins the line that names one.
    fn payload(&self, step: &Step<'_>, mark: &str) -> Result<String> {
        let mut text = String::from(
            "$ProgressPreference = 'SilentlyContinue'
try { [Console]::OutputEncoding = New-Object Text.UTF8Encoding $false } catch { }
$OutputEncoding = [Console]::OutputEncoding\n",
        );
        for (name, value) in &step.common.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                let said = format!("`{name}` in `env` is no name of an environment variable, or its value has a NUL");
                return Err(Error::new(Code::Usage, said).step(&step.common.name));
            }
            text.push_str(&format!("[Environment]::SetEnvironmentVariable({}, {})\n", quote(name), quote(value)));
        }
        text.push_str("$Secrets = @{}\n");
        for (name, secret) in step.secrets {
            text.push_str(&format!("$Secrets[{}] = {}\n", quote(name), quote(secret.expose())));
        }
        let args: Vec<String> = self.args.iter().map(|arg| quote(arg)).collect();
        text.push_str(&format!("$kilnArguments = @({})\n", args.join(", ")));
        text.push_str("$global:LASTEXITCODE = 0\ntry {\n");
        text.push_str(&format!(
            "  $kilnScript = [ScriptBlock]::Create([Text.Encoding]::UTF8.GetString([Convert]::FromBase64String('{}')))\n",
            BASE64_STANDARD.encode(&self.script)
        ));
        if self.strict {
            // The last one is known since PowerShell 7.3: a native program that
            // fails is an error at its line.
            text.push_str("  $ErrorActionPreference = 'Stop'\n  Set-StrictMode -Version Latest\n");
            text.push_str("  $PSNativeCommandUseErrorActionPreference = $true\n");
        }
        text.push_str(&format!(
            "  & $kilnScript @kilnArguments
}} catch {{
  $kilnLine = 0
  foreach ($kilnFrame in ([string]$_.ScriptStackTrace -split \"`n\")) {{
    if ($kilnFrame -match '<No file>: line (\\d+)') {{ $kilnLine = $Matches[1]; break }}
  }}
  $kilnStatus = 1
  for ($kilnCause = $_.Exception; $kilnCause; $kilnCause = $kilnCause.InnerException) {{
    if ($kilnCause -is [Management.Automation.ParseException]) {{ $kilnLine = $kilnCause.Errors[0].Extent.StartLineNumber }}
    if ($kilnCause.GetType().Name -eq 'NativeCommandExitException' -and $kilnCause.ExitCode) {{ $kilnStatus = $kilnCause.ExitCode }}
  }}
  [Console]::Error.WriteLine(($_ | Out-String).Trim())
  [Console]::Out.WriteLine(\"{mark}line $kilnLine\")
  exit $kilnStatus
}}
"
        ));
        if self.strict {
            text.push_str("if ($global:LASTEXITCODE) { exit $global:LASTEXITCODE }\n");
        }
        text.push_str("exit 0\n");
        Ok(text)
    }

    fn failure(&self, status: i32, seen: &Seen) -> Error {
        let error = match seen.line.and_then(|line| Some((line, self.script.lines().nth(line.checked_sub(1)?)?.trim()))) {
            Some((line, text)) => Error::new(Code::Step, format!("line {line} of the script failed with exit status {status}: {text}")),
            None if status == 127 => Error::new(Code::Step, format!("there is no `{}` in the guest", self.program)),
            None => Error::new(Code::Step, format!("the script failed with exit status {status}")),
        };
        error.next(crate::shell::LOOK)
    }
}

/// What of the output matters here.
#[derive(Default)]
struct Seen {
    tail: VecDeque<String>,
    /// The line that failed.
    line: Option<usize>,
}

impl Seen {
    fn take(&mut self, step: &Step<'_>, mark: &str, stream: Stream, line: &str) {
        if let (Stream::Stdout, Some(said)) = (stream, line.strip_prefix(mark)) {
            self.line = said.strip_prefix("line ").and_then(|number| number.trim().parse().ok());
            return;
        }
        if stream == Stream::Stderr {
            if self.tail.len() == TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(line.to_owned());
        }
        step.reports.output(&step.common.name, stream, line);
    }

    fn with_tail(&self, error: Error) -> Error {
        let lines: Vec<&str> = self.tail.iter().map(String::as_str).collect();
        if lines.is_empty() { error } else { error.detail(lines.join("\n")) }
    }
}

/// Sends on what comes line by line, until it ends or nobody listens.
async fn lines(from: impl AsyncRead + Unpin, stream: Stream, to: mpsc::Sender<(Stream, String)>) {
    let (mut from, mut line) = (BufReader::new(from), Vec::new());
    while from.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
        line.clear();
        if to.send((stream, text)).await.is_err() {
            return;
        }
    }
}

/// Runs a command through a stock `ssh`; gives its exit status.
async fn over_ssh(access: &SshAccess, line: &str, input: Vec<u8>, on_line: &mut (dyn FnMut(Stream, &str) + Send)) -> Result<i32> {
    let failed = |error: std::io::Error| Error::new(Code::Failed, format!("cannot run ssh: {error}")).next("install an OpenSSH client");
    let mut child = tokio::process::Command::new("ssh")
        .args(["-T", "-o", "BatchMode=yes"])
        .args(access.ssh_arguments())
        .arg(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (sender, mut receiver) = mpsc::channel(64);
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async move {
        // What ends without reading it all says why in its own way.
        if let Some(stdin) = &mut stdin {
            let _ = stdin.write_all(&input).await;
        }
        drop(stdin);
    };
    let read = async move {
        let out = async {
            if let Some(stdout) = stdout {
                lines(stdout, Stream::Stdout, sender.clone()).await
            }
        };
        let err = async {
            if let Some(stderr) = stderr {
                lines(stderr, Stream::Stderr, sender.clone()).await
            }
        };
        tokio::join!(out, err);
    };
    let show = async {
        while let Some((stream, line)) = receiver.recv().await {
            on_line(stream, &line);
        }
    };
    let ((), (), (), status) = tokio::join!(write, read, show, child.wait());
    status.map_err(failed)?.code().ok_or_else(|| Error::new(Code::Failed, "ssh was killed"))
}

#[async_trait]
impl Provisioner for Powershell {
    fn kind(&self) -> &'static str {
        "powershell"
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("program", &self.program).field("strict", self.strict.to_string());
        hasher.hidden("args", self.args.len().to_string());
        for (number, arg) in self.args.iter().enumerate() {
            hasher.hidden("arg", arg).part(format!("argument {}", number + 1), arg);
        }
        hasher.field("script", &self.script).input("script", Digest::of(&self.script));
        Ok(())
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        let Common { name, user, timeout, .. } = step.common;
        if user.is_some() {
            let error = Error::new(Code::Usage, "`user` cannot be had with `powershell`: it runs as the user of the connection");
            return Err(error.step(name).next("remove `user`"));
        }
        let Some(access) = step.guest.ssh_access() else {
            return Err(
                Error::new(Code::Unreachable, "`powershell` needs a guest that OpenSSH can reach, and this one cannot be").step(name)
            );
        };
        let mark = format!("kiln-{} ", nonce());
        let mut input = BASE64_STANDARD.encode(self.payload(step, &mark)?).into_bytes();
        input.push(b'\n');
        let (line, mut seen) = (self.line(), Seen::default());
        let mut on_line = |stream, line: &str| seen.take(step, &mark, stream, line);
        let running = over_ssh(&access, &line, input, &mut on_line);
        let done = match timeout {
            Some(limit) => tokio::time::timeout(*limit, running).await.unwrap_or_else(|_| {
                Err(Error::new(Code::Timeout, format!("the script took over {limit:?}, and its connection was closed"))
                    .next("raise its `timeout`"))
            }),
            None => running.await,
        };
        let error = match done {
            Ok(0) => return Ok(()),
            Ok(SSH_FAILED) if seen.line.is_none() => Error::new(Code::Unreachable, "ssh could not reach the guest, or lost it"),
            Ok(status) => self.failure(status, &seen),
            Err(error) => error,
        };
        Err(seen.with_tail(error).step(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::tests::{key, node, parts, read, string, table, text, wrong};

    #[test]
    fn settings_and_their_problems() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        std::fs::write(here.join("setup.ps1"), "\u{feff}Get-Date\r\n").unwrap();
        std::fs::write(here.join("utf-16.ps1"), b"\xff\xfeG\0").unwrap();
        read("powershell", &table(&[("script", string("setup.ps1")), ("program", string("C:\\tools\\pwsh.exe"))]), here);
        let cases: &[(Node, &str)] = &[
            (text(" \n"), "the script is empty"),
            (node(Value::Integer(1)), "`powershell` must be a script, or a table"),
            (table(&[]), "needs `inline` or `script`"),
            (table(&[("script", string("missing.ps1"))]), "cannot read `missing.ps1`"),
            (table(&[("script", string("setup.ps1")), ("inline", string("x"))]), "exclude each other"),
            (table(&[("script", string("utf-16.ps1"))]), "the script is not in UTF-8 | save it as UTF-8"),
            (table(&[("inline", string("x")), ("program", string("C:\\Program Files\\pwsh"))]), "a path without spaces"),
            (table(&[("inlin", string("x"))]), "did you mean `inline`?"),
        ];
        for (settings, expected) in cases {
            let found = wrong("powershell", settings, here);
            assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:?}");
        }
    }

    #[test]
    fn the_key_holds_what_is_run() {
        let here = tempfile::tempdir().unwrap();
        let of = |entries: &[(&str, Value)]| key(&*read("powershell", &table(entries), here.path()));
        let plain = of(&[("inline", string("Get-Date"))]);
        assert_eq!(plain, key(&*read("powershell", &text("Get-Date"), here.path())));
        std::fs::write(here.path().join("s.ps1"), "\u{feff}Get-Date").unwrap();
        assert_eq!(plain, of(&[("script", string("s.ps1"))]));
        let mut keys = vec![
            plain,
            of(&[("inline", string("Get-Item"))]),
            of(&[("inline", string("Get-Date")), ("strict", Value::Boolean(false))]),
            of(&[("inline", string("Get-Date")), ("program", string("pwsh"))]),
            of(&[("inline", string("Get-Date")), ("args", Value::Array(vec![text("a"), text("b")]))]),
            of(&[("inline", string("Get-Date")), ("args", Value::Array(vec![text("a b")]))]),
        ];
        let all = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), all);
        assert_eq!(parts(&*read("powershell", &text("x"), here.path())), ["program", "strict", "script"]);
    }

    #[test]
    fn quotes_of_every_kind_are_doubled() {
        assert_eq!(quote("it's $HOME `n \"x\""), "'it''s $HOME `n \"x\"'");
        assert_eq!(quote("\u{2019}"), "'\u{2019}\u{2019}'");
        assert_eq!(encoded("hi"), "aABpAA==");
    }
}
