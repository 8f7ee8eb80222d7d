//! `kiln doctor`: what this builder needs of the machine.

use std::process::Command;

use kiln_model::Result;
use kiln_model::machine::Context;
use kiln_process as process;

use crate::accelerator;
use crate::settings::{Accelerator, Settings};

/// One thing that was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What (`qemu-img`).
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// Whether nothing works without it.
    pub needed: bool,
    /// What was found: a version, or what is wrong.
    pub found: String,
    /// The command, or the advice, that mends it.
    pub fix: Option<String>,
}

/// Looks for everything that the QEMU builder uses.
///
/// # Errors
/// When looking itself fails (a full disk); never because something is missing.
pub async fn checks(settings: &Settings, context: &Context) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    for program in [settings.binary.as_str(), "qemu-img", "qemu-nbd"] {
        checks.push(program_check(program).await);
    }
    for (program, what) in [
        ("mmdebstrap", "for Debian bases"),
        ("mke2fs", "for Debian bases"),
        ("unshare", "for Debian bases, without root"),
        ("newuidmap", "for Debian bases, without root"),
        ("ssh", "for shells on machines"),
    ] {
        checks.push(presence(program, what));
    }
    let ovmf = crate::command::Ovmf::install(context.work.join("doctor-efi-variables.fd"));
    checks.push(Check {
        name: "OVMF (for UEFI)".into(),
        ok: ovmf.is_ok(),
        needed: false,
        found: ovmf.as_ref().map_or_else(|_| "not installed".into(), |found| found.code.display().to_string()),
        fix: ovmf.is_err().then(|| "apt-get install ovmf".into()),
    });
    if checks[0].ok {
        let chosen = accelerator::choose(Accelerator::Auto, &settings.binary, &context.work, &context.scope).await?;
        let fix = if chosen.kvm {
            None
        } else {
            // The words for somebody who insists on KVM say what to do.
            let insisted = accelerator::choose(Accelerator::Kvm, &settings.binary, &context.work, &context.scope).await;
            insisted
                .err()
                .and_then(|error| error.next_move().map(|next| next.trim_end_matches("; or set accelerator = \"auto\"").to_owned()))
        };
        checks.push(Check {
            name: "acceleration".into(),
            ok: chosen.kvm,
            needed: false,
            found: if chosen.kvm { format!("kvm: {}", chosen.why) } else { format!("none, machines are emulated: {}", chosen.why) },
            fix,
        });
    }
    Ok(checks)
}

/// Looks for a program that only some work needs.
fn presence(program: &str, what: &str) -> Check {
    let found = process::find(program);
    Check {
        name: format!("{program} ({what})"),
        ok: found.is_some(),
        needed: false,
        found: found.as_ref().map_or_else(|| "not installed".into(), |path| path.display().to_string()),
        fix: if found.is_some() { None } else { process::install_hint(program).map(Into::into) },
    }
}

async fn program_check(program: &str) -> Check {
    let check = |ok: bool, found: String| Check {
        name: program.to_owned(),
        ok,
        needed: true,
        found,
        fix: (!ok).then(|| process::install_hint(program).unwrap_or("correct `binary` in [builder.qemu]").to_owned()),
    };
    if process::find(program).is_none() {
        return check(false, "not installed".into());
    }
    let mut command = Command::new(program);
    command.arg("--version");
    match process::run_async(command).await {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            check(true, text.lines().next().unwrap_or("installed").trim().to_owned())
        }
        Err(error) => check(false, error.chain()),
    }
}
