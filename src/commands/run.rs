//! `kiln run`: boots an image on a throwaway overlay.

use std::io::IsTerminal as _;
use std::path::Path;

use kiln_model::base::Base;
use kiln_model::event::{Phase, Stream};
use kiln_model::guest::{Command, Exit};
use kiln_model::kind::Kind as _;
use kiln_model::machine::{Context, Machine, Port, Start};
use kiln_model::reference::{Pointer, Reference};
use kiln_model::settings::{Entry, Node, Place, Problems, Table, Value};
use kiln_model::{Code, Error, Result, ResultExt as _};

use super::App;
use super::bake::open_shell;
use crate::cli::Run;
use crate::image_base;
use crate::network;
use crate::output::say;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Run) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let reports = app.output.reports();
    let user_data = match &arguments.user_data {
        Some(path) => Some(std::fs::read(path).trying(|| format!("read {}", path.display()))?),
        None => None,
    };
    let start = Start {
        disk_size: None,
        ports: arguments.ports.iter().map(|(host, guest)| Port { host: *host, guest: *guest }).collect(),
        user_data,
        checkpoints: false,
        disk_digest: None,
    };
    let builder = builder(app, arguments)?;
    with_context(&app.home, &reports, |context| {
        let (builder, start) = (&builder, &start);
        async move {
            let store = app.store()?;
            let allow = arguments.allow_revoked;
            let digest = network::bring(&app.home, &store, &reference, Some(allow), &context.reports).await?;
            image_base::refuse_revoked(&store, &reference, &digest, allow, &context.reports).await?;
            let image = Reference { registry: None, pointer: Pointer::Digest(digest), ..reference.clone() };
            let (base, _in_use) = image_base::unpack(&app.home, &store, &image, &context).await?;
            let base = Base { label: reference.to_string(), ..base };
            let span = context.reports.begin(Phase::Boot, "boot");
            let machine = builder.start(&base, start, &context).await?;
            let _ = span.end(false);
            let done = match &arguments.exec {
                Some(command) => exec(&*machine, command).await,
                None => stay(&*machine, &base, arguments, &context).await,
            };
            machine.kill().await;
            done
        }
    })
    .await
}

/// The builder, with what the command line says in place of a template.
fn builder(app: &App, arguments: &Run) -> Result<Box<dyn kiln_model::machine::Builder>> {
    let place = Place::default();
    let text = |text: &str| Value::String(text.to_owned());
    let settings = [
        ("memory", Some(text(&arguments.memory))),
        ("accelerator", Some(text(&arguments.accelerator))),
        ("firmware", arguments.firmware.as_deref().map(text)),
        ("cpus", arguments.cpus.map(|cpus| Value::Integer(cpus.into()))),
    ];
    let entries = settings
        .into_iter()
        .filter_map(|(name, value)| Some(Entry { name: name.to_owned(), place, node: Node { value: value?, place } }))
        .collect();
    let mut problems = Problems::default();
    let node = Node { value: Value::Table(Table { entries }), place };
    kiln_qemu::QemuKind::new(&app.home).read(&node, Path::new("."), &mut problems).ok_or_else(|| {
        let list: Vec<_> = problems.0.into_iter().map(|problem| problem.message).collect();
        Error::new(Code::Usage, list.join("; "))
    })
}

/// Runs one command once the guest has booted, and carries its status.
async fn exec(machine: &dyn Machine, command: &str) -> Result<u8> {
    let guest = machine.guest();
    kiln_bake::settle(&*guest).await?;
    let command = Command::new(command);
    let mut show = |stream, line: &str| match stream {
        Stream::Stdout => write_line(&mut std::io::stdout().lock(), line),
        Stream::Stderr => write_line(&mut std::io::stderr().lock(), line),
    };
    let exit = tokio::select! {
        biased;
        error = machine.ended() => return Err(error),
        exit = guest.execute(&command, &mut show) => exit?,
    };
    Ok(match exit {
        Exit::Status(status) => u8::try_from(status).unwrap_or(255),
        // As a shell has it: 128 and the signal's number, where it is a known one.
        Exit::Signal(name) => {
            128 + match name.as_str() {
                "HUP" => 1,
                "INT" => 2,
                "KILL" => 9,
                "SEGV" => 11,
                "TERM" => 15,
                _ => 0,
            }
        }
    })
}

/// Whoever reads may have gone away; the command's status still counts.
fn write_line(out: &mut dyn std::io::Write, line: &str) {
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// A shell for a person; without a terminal, the machine until it ends.
async fn stay(machine: &dyn Machine, base: &Base, arguments: &Run, context: &Context) -> Result<u8> {
    for (host, guest) in &arguments.ports {
        context.reports.note(format!("127.0.0.1:{host} leads to port {guest} of {}", base.label));
    }
    let Some(access) = machine.guest().ssh_access() else {
        return Err(Error::new(Code::Unreachable, "this machine cannot be reached by SSH"));
    };
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        tokio::select! {
            error = machine.ended() => Err(error),
            done = open_shell(access) => done.map(|()| 0),
        }
    } else {
        say(&format!("running; reach it with: ssh {}", access.ssh_arguments().join(" ")));
        say("ends with Ctrl-C, or when the guest powers off");
        let _ = machine.ended().await;
        Ok(0)
    }
}
