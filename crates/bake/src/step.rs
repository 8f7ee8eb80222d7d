//! One step on a machine: its secrets, its attempts, its limit in time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::guest::{Command, Guest, GuestExt as _, quote};
use kiln_model::machine::{Context, Machine};
use kiln_model::provision::{Case, Common, Outcome, Step};
use kiln_model::secret::Secret;
use kiln_model::{Code, Error, Result};

use crate::template::StepSpec;

/// How much longer than its own limit a step may take, for the guest to be
/// told and to answer.
const GRACE: Duration = Duration::from_secs(60);

/// Whether what these steps or tests need of this machine is there; for before
/// a machine is started for them.
pub(crate) async fn ready(specs: &[StepSpec]) -> Result<()> {
    for spec in specs {
        spec.provisioner.ready().await.map_err(|error| error.step(&spec.common.name))?;
    }
    Ok(())
}

/// Runs `spec` on `machine`, as often as its retries allow.
pub(crate) async fn run(machine: &dyn Machine, spec: &StepSpec, secrets: &BTreeMap<String, Secret>, context: &Context) -> Result<()> {
    on(machine, spec, secrets, context, Wanted::Done).await.map(drop)
}

/// Runs the test `spec` on `machine`, as often as its retries allow; gives what
/// the last attempt found.
pub(crate) async fn test(
    machine: &dyn Machine,
    spec: &StepSpec,
    secrets: &BTreeMap<String, Secret>,
    context: &Context,
) -> Result<Vec<Case>> {
    on(machine, spec, secrets, context, Wanted::Tested).await
}

/// What is wanted of a provisioner.
#[derive(Clone, Copy)]
enum Wanted {
    /// That it does it.
    Done,
    /// That it tells what it finds.
    Tested,
}

/// Does what is `wanted` of `spec`, with all that it asks for; gives what was
/// found.
async fn on(
    machine: &dyn Machine,
    spec: &StepSpec,
    secrets: &BTreeMap<String, Secret>,
    context: &Context,
    wanted: Wanted,
) -> Result<Vec<Case>> {
    let guest = machine.guest();
    let common = &spec.common;
    let attempts = async {
        place_secrets(&guest, common, secrets).await?;
        let own = secrets.iter().filter(|(name, _)| common.secrets.contains(name));
        let own: BTreeMap<String, Secret> = own.map(|(name, secret)| (name.clone(), secret.clone())).collect();
        let done = match wanted {
            Wanted::Done => attempt(spec, &guest, &own, context).await.map(|()| Vec::new()),
            Wanted::Tested => attempt_test(spec, &guest, &own, context).await,
        };
        let removed = remove_secrets(&guest, common).await;
        done.and_then(|done| removed.map(|()| done))
    };
    tokio::select! {
        // A machine that ends takes the connection with it: say the cause, not
        // the consequence.
        biased;
        error = machine.ended() => Err(error.step(common.name.as_str())),
        done = attempts => match done {
            // The connection may break a moment before the end is known.
            Err(error) if error.kind() == Code::Unreachable => {
                let ended = tokio::time::timeout(Duration::from_secs(5), machine.ended()).await;
                Err(ended.unwrap_or(error).step(common.name.as_str()))
            }
            done => done.map_err(|error| error.step(common.name.as_str())),
        },
    }
}

async fn attempt(spec: &StepSpec, guest: &Arc<dyn Guest>, secrets: &BTreeMap<String, Secret>, context: &Context) -> Result<()> {
    let common = &spec.common;
    let step = Step { guest: guest.clone(), common, reports: &context.reports, secrets, work: &context.work };
    let mut tried = 0;
    loop {
        tried += 1;
        let done = match common.timeout {
            None => spec.provisioner.run(&step).await,
            Some(limit) => tokio::time::timeout(limit + GRACE, spec.provisioner.run(&step))
                .await
                .unwrap_or_else(|_| Err(Error::new(Code::Timeout, format!("step `{}` took longer than its timeout", common.name)))),
        };
        match done {
            Err(error) if tried <= common.retries && matches!(error.kind(), Code::Step | Code::Timeout) => {
                context.reports.warn(format!("step `{}`: {}; attempt {} of {}", common.name, error.chain(), tried + 1, common.retries + 1));
            }
            done => return done,
        }
    }
}

async fn attempt_test(spec: &StepSpec, guest: &Arc<dyn Guest>, secrets: &BTreeMap<String, Secret>, context: &Context) -> Result<Vec<Case>> {
    let common = &spec.common;
    let step = Step { guest: guest.clone(), common, reports: &context.reports, secrets, work: &context.work };
    let mut tried = 0;
    loop {
        tried += 1;
        let cases = match common.timeout {
            None => spec.provisioner.test(&step).await?,
            Some(limit) => match tokio::time::timeout(limit + GRACE, spec.provisioner.test(&step)).await {
                Ok(done) => done?,
                Err(_) => {
                    let outcome = Outcome::Failed(format!("it took longer than its timeout of {limit:?}"));
                    vec![Case { name: common.name.clone(), seconds: (limit + GRACE).as_secs_f64(), outcome }]
                }
            },
        };
        let failed = cases.iter().filter(|case| case.outcome.failed()).count();
        if failed == 0 || tried > common.retries {
            return Ok(cases);
        }
        let of = cases.len();
        context.reports.warn(format!("test `{}`: {failed} of {of} failed; attempt {} of {}", common.name, tried + 1, common.retries + 1));
    }
}

/// Puts the step's secrets into `/run/kiln/secrets` (tmpfs), readable by the
/// step's user alone.
async fn place_secrets(guest: &Arc<dyn Guest>, common: &Common, secrets: &BTreeMap<String, Secret>) -> Result<()> {
    for name in &common.secrets {
        let Some(secret) = secrets.get(name) else {
            return Err(Error::new(Code::Usage, format!("step `{}` asks for the secret `{name}`, which has no value", common.name)));
        };
        let path = format!("{FOLDER}/{name}");
        guest.write(&path, 0o400, secret.expose().as_bytes()).await?;
        if let Some(user) = &common.user {
            let line = format!("chmod 711 /run/kiln {FOLDER} && chown {} {}", quote(user), quote(&path));
            let output = guest.output(&Command::new(line)).await?;
            if !output.exit.success() {
                return Err(
                    Error::new(Code::Step, format!("the secret `{name}` cannot be given to the user `{user}`")).detail(output.stderr)
                );
            }
        }
    }
    Ok(())
}

async fn remove_secrets(guest: &Arc<dyn Guest>, common: &Common) -> Result<()> {
    if common.secrets.is_empty() {
        return Ok(());
    }
    let output = guest.output(&Command::new(format!("rm -rf {FOLDER}"))).await?;
    if output.exit.success() {
        Ok(())
    } else {
        Err(Error::new(Code::Step, format!("the secrets of step `{}` could not be removed from the guest", common.name))
            .detail(output.stderr))
    }
}

const FOLDER: &str = "/run/kiln/secrets";
