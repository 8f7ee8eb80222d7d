//! `powershell` over a real OpenSSH. There is no Windows here: a stand-in takes
//! what PowerShell would be given, writes it down, and knows a few commands.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy knows only `#[test]` functions as tests")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_model::event::Reports;
use kiln_model::provision::{Common, Step};
use kiln_model::secret::{Redactor, Secret};
use kiln_model::settings::Problems;
use kiln_model::{Code, Result};
use kiln_ssh::testing::Sshd;

use common::{Log, node, string, strings, table};
use serde_json::Value as Json;

const STAND_IN: &str = r#"#!/usr/bin/python3
import base64, json, os, re, sys, time
payload = base64.b64decode(sys.stdin.buffer.read().strip(), validate=True).decode("utf-8")
script = base64.b64decode(re.search(r"FromBase64String\('([^']*)'\)", payload)[1]).decode("utf-8")
mark = re.search(r'WriteLine\("(kiln-[0-9a-f]+ )line \$kilnLine"\)', payload)[1]
seen = {"args": sys.argv[1:-1], "bootstrap": base64.b64decode(sys.argv[-1], validate=True).decode("utf-16-le"), "payload": payload, "script": script}
seen["lines"] = " ".join(open(f"/proc/{pid}/cmdline").read() for pid in (os.getpid(), os.getppid()))
json.dump(seen, open(os.path.dirname(os.path.abspath(__file__)) + "/seen.json", "w"))
for number, line in enumerate(script.splitlines(), 1):
    command, _, rest = line.strip().partition(" ")
    if command == "Write-Output":
        print(rest, end="\r\n", flush=True)
    elif command == "throw":
        print(rest, file=sys.stderr, flush=True)
        print(f"{mark}line {number}", flush=True)
        sys.exit(1)
    elif command == "exit":
        sys.exit(int(rest))
    elif command == "Start-Sleep":
        time.sleep(float(rest))
"#;

/// How it went, what was shown, and what PowerShell got.
async fn run(script: &str, args: &[&str], common: Common, secrets: BTreeMap<String, Secret>) -> (Result<()>, Vec<String>, Option<Json>) {
    let sshd = Sshd::start();
    let program = sshd.path().join("powershell.exe");
    std::fs::write(&program, STAND_IN).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = string(program.to_str().unwrap());
    let settings = node(table(&[("inline", string(script)), ("program", program), ("args", strings(args))]));
    let mut problems = Problems::default();
    let kind = kiln_provisioners::all().into_iter().find(|kind| kind.name() == "powershell").unwrap();
    let step = kind.read(&settings, Path::new("/"), &mut problems).unwrap();
    let log = Arc::new(Log::default());
    let redactor = Redactor::default();
    secrets.values().for_each(|secret| redactor.add(secret));
    let (reports, common) = (Reports::new(log.clone(), redactor), Common { name: "step".into(), ..common });
    let done =
        step.run(&Step { guest: sshd.guest().await, common: &common, reports: &reports, secrets: &secrets, work: sshd.path() }).await;
    let seen = std::fs::read(sshd.path().join("seen.json")).ok().map(|bytes| serde_json::from_slice(&bytes).unwrap());
    let shown = log.lines();
    (done, shown, seen)
}

#[tokio::test]
async fn it_gets_script_environment_and_secrets_on_standard_input() {
    let env = [("GREETING".to_owned(), "it's $HOME\n\u{fc}".to_owned())].into();
    let secrets = BTreeMap::from([("token".to_owned(), Secret::new("s3cret-a-b"))]);
    let script = "Write-Output 'gr\u{fc}n'\nWrite-Output s3cret-a-b\n";
    let (done, shown, seen) = run(script, &["two words", "it's"], Common { env, ..Common::default() }, secrets).await;
    done.unwrap();
    assert_eq!(shown, ["'gr\u{fc}n'", "***"]);
    let seen = seen.unwrap();
    let options = ["-NoLogo", "-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass", "-OutputFormat", "Text", "-EncodedCommand"];
    assert_eq!(seen["args"], serde_json::json!(options));
    assert!(seen["bootstrap"].as_str().unwrap().contains("(-join @($input))"));
    assert_eq!(seen["script"], script);
    let payload = seen["payload"].as_str().unwrap();
    for part in [
        "SetEnvironmentVariable('GREETING', 'it''s $HOME\n\u{fc}')",
        "$Secrets['token'] = 's3cret-a-b'",
        "$kilnArguments = @('two words', 'it''s')",
        "$ErrorActionPreference = 'Stop'\n",
        "Set-StrictMode -Version Latest\n",
        "$PSNativeCommandUseErrorActionPreference = $true\n",
        "if ($global:LASTEXITCODE) { exit $global:LASTEXITCODE }",
    ] {
        assert!(payload.contains(part), "{part} in {payload}");
    }
    let lines = seen["lines"].as_str().unwrap();
    assert!(lines.contains("powershell.exe") && !lines.contains("s3cret") && !lines.contains("HOME"), "{lines}");
}

#[tokio::test]
async fn a_failure_names_its_line() {
    let common = Common::default;
    let (done, shown, _) = run("Write-Output a\r\n  throw it is broken\r\nWrite-Output b", &[], common(), BTreeMap::new()).await;
    let error = done.unwrap_err();
    assert_eq!((error.kind(), error.step_name()), (Code::Step, Some("step")));
    assert_eq!(error.to_string(), "line 2 of the script failed with exit status 1: throw it is broken");
    assert_eq!(error.details(), ["it is broken"]);
    let mut sorted = shown;
    sorted.sort();
    assert_eq!(sorted, ["a", "it is broken"]);
    let error = run("exit 7", &[], common(), BTreeMap::new()).await.0.unwrap_err();
    assert_eq!(error.to_string(), "the script failed with exit status 7");
}

#[tokio::test]
async fn time_and_users_are_minded() {
    let began = Instant::now();
    let limited = Common { timeout: Some(Duration::from_secs(2)), ..Common::default() };
    let error = run("Start-Sleep 60", &[], limited, BTreeMap::new()).await.0.unwrap_err();
    assert_eq!(error.kind(), Code::Timeout);
    assert!(began.elapsed() < Duration::from_secs(30));
    let other = Common { user: Some("nobody".into()), ..Common::default() };
    let (done, _, seen) = run("Write-Output a", &[], other, BTreeMap::new()).await;
    assert_eq!((done.unwrap_err().kind(), seen), (Code::Usage, None));
}
