//! What surrounds work that creates things: the ledger, the folder, the
//! signals, and the clean-up however it ends.

use std::future::Future;
use std::sync::Arc;

use kiln_model::cleanup::Scope;
use kiln_model::event::Reports;
use kiln_model::home::Home;
use kiln_model::ledger::{self, Ledger, Resource};
use kiln_model::machine::Context;
use kiln_model::{Code, Error, Result, ResultExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::ec2_bake;

/// Runs `work` with a context of its own. Whatever it made is undone when it
/// ends, fails, or is interrupted. What killed bakes have left is removed first.
pub(crate) async fn with_context<T, F>(home: &Home, reports: &Reports, work: impl FnOnce(Context) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let signals = Signals::listen()?;
    reap(home, reports).await?;
    within(signals, home, reports, work).await
}

/// As [`with_context`], for one of several that hear the same `signals`;
/// whoever begins them has reaped before.
pub(crate) async fn within<T, F>(mut signals: Signals, home: &Home, reports: &Reports, work: impl FnOnce(Context) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let bake = new_id();
    let scope = Arc::new(Scope::new(Ledger::create(&home.ledger(), &bake)?));
    let folder = home.work().join(&bake);
    scope.before_path(&folder)?;
    make_private(&folder)?;
    let context = Context { bake, scope: scope.clone(), reports: reports.clone(), work: folder };

    let result = tokio::select! {
        // Dropping the future stops the work where it is; the scope knows what to undo.
        interrupted = signals.next() => {
            reports.warn(format!("{interrupted}: cleaning up (again to leave at once)"));
            Err(interrupted)
        }
        result = work(context) => result,
    };

    let failed = tokio::select! {
        failed = scope.unwind() => failed,
        again = signals.next() => vec![again.next("what is left is removed by `kiln reap`, or by the next bake")],
    };
    let clean = failed.is_empty();
    for error in failed {
        reports.warn(error.chain());
    }
    scope.close();
    if let Err(error) = &result
        && matches!(error.kind(), Code::Interrupted | Code::Terminated)
        && clean
    {
        reports.note("cleaned up: nothing is left behind");
    }
    result
}

/// Removes what killed bakes have left; gives how much that was.
pub(crate) async fn reap(home: &Home, reports: &Reports) -> Result<usize> {
    let mut removed = 0;
    for orphan in ledger::orphans(&home.ledger())? {
        let mut clean = true;
        for resource in &orphan.left {
            let done = match resource {
                Resource::Process { pid, start, .. } => kiln_process::reap_process(*pid, *start).map(drop),
                // A half-built base may hold files of subordinate ids.
                Resource::Path { path } => kiln_qemu::base::remove_half_built(path.clone()).await,
                Resource::Cloud { builder, region, resource, id } if builder == kiln_ec2::bake::EC2 => {
                    let done = ec2_bake::reap(home, &orphan.bake, region, resource, id.as_deref()).await;
                    done.map(drop).trying(|| format!("remove the {resource} that was left behind in {region}"))
                }
                Resource::Cloud { builder, region, resource, .. } => Err(Error::new(
                    Code::Missing,
                    format!("a {resource} in {region} was left behind, and this kiln knows no builder `{builder}`"),
                )),
            };
            match done {
                Ok(()) => removed += 1,
                Err(error) => {
                    clean = false;
                    reports.warn(format!("bake {}: {}", orphan.bake, error.chain()));
                }
            }
        }
        if clean {
            let left = orphan.left.len();
            if left > 0 {
                reports.note(format!("removed {left} left behind by the killed bake {}", orphan.bake));
            }
            orphan.settle()?;
        }
    }
    Ok(removed)
}

fn make_private(folder: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().mode(0o700).create(folder).trying(|| format!("make the folder {}", folder.display()))
}

fn new_id() -> String {
    ulid::Ulid::generate().to_string()
}

/// Ctrl-C and SIGTERM as errors. Each clone hears all of them from the first
/// on, also those that came before somebody listened to it.
#[derive(Clone)]
pub(crate) struct Signals {
    came: watch::Receiver<Vec<Code>>,
    heard: usize,
}

impl Signals {
    /// Listens from now on.
    pub(crate) fn listen() -> Result<Self> {
        let on = |kind| signal(kind).trying(|| "listen for signals".into());
        let (mut interrupt, mut terminate) = (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
        let (tell, came) = watch::channel(Vec::new());
        tokio::spawn(async move {
            loop {
                let code = tokio::select! {
                    _ = interrupt.recv() => Code::Interrupted,
                    _ = terminate.recv() => Code::Terminated,
                    () = tell.closed() => return,
                };
                tell.send_modify(|came| came.push(code));
            }
        });
        Ok(Self { came, heard: 0 })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Error {
        let heard = self.heard;
        let code = match self.came.wait_for(|came| came.len() > heard).await {
            Ok(came) => came.get(heard).copied(),
            // Nobody tells any more: the program ends.
            Err(_) => None,
        };
        let Some(code) = code else { return std::future::pending().await };
        self.heard += 1;
        Error::new(code, if code == Code::Terminated { "terminated" } else { "interrupted" })
    }
}
