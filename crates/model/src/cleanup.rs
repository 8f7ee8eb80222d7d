//! The cleanup scope of a bake: every undo is registered (and written to the
//! ledger) before the act, and run in reverse order however the bake ends.

use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use crate::error::{Code, Error, Result};
use crate::ledger::{Intent, Ledger, Resource};

type Undo = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<()>> + Send>> + Send>;

/// Names one registered undo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(Intent);

struct Pending {
    intent: Intent,
    what: String,
    deadline: Duration,
    undo: Undo,
}

/// What a bake has to undo. Lives outside the bake's own future, so that
/// dropping that future (Ctrl-C, an error, a panic) leaves it whole.
pub struct Scope {
    ledger: Ledger,
    pending: Mutex<Vec<Pending>>,
}

impl Scope {
    /// A scope that writes to `ledger`.
    pub fn new(ledger: Ledger) -> Self {
        Self { ledger, pending: Mutex::new(Vec::new()) }
    }

    /// Registers `undo` for `resource`, which is about to be made.
    ///
    /// `deadline` is how long the undo may take.
    ///
    /// # Errors
    /// When the ledger cannot be written: then nothing may be made.
    pub fn before<F, Fut>(&self, resource: Resource, what: &str, deadline: Duration, undo: F) -> Result<Ticket>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        let intent = self.ledger.intend(resource)?;
        self.lock().push(Pending { intent, what: what.to_owned(), deadline, undo: Box::new(|| Box::pin(undo())) });
        Ok(Ticket(intent))
    }

    /// Registers a file or folder that is about to be made; its undo removes it.
    ///
    /// # Errors
    /// As [`Scope::before`].
    pub fn before_path(&self, path: &std::path::Path) -> Result<Ticket> {
        let owned = path.to_owned();
        self.before(
            Resource::Path { path: path.to_owned() },
            &format!("remove {}", path.display()),
            Duration::from_secs(60),
            move || async move { remove_path(&owned) },
        )
    }

    /// Records what is known by now of a registered resource.
    ///
    /// # Errors
    /// When the ledger cannot be written.
    pub fn amend(&self, ticket: Ticket, resource: Resource) -> Result<()> {
        self.ledger.amend(ticket.0, resource)
    }

    /// Runs one undo now.
    ///
    /// # Errors
    /// Those of the undo; it then stays in the ledger for `kiln reap`.
    pub async fn undo(&self, ticket: Ticket) -> Result<()> {
        let pending = {
            let mut all = self.lock();
            all.iter().position(|p| p.intent == ticket.0).map(|at| all.remove(at))
        };
        match pending {
            Some(pending) => self.run(pending).await,
            None => Ok(()),
        }
    }

    /// Forgets an undo: the resource is gone by itself, or is meant to stay.
    ///
    /// # Errors
    /// When the ledger cannot be written.
    pub fn forget(&self, ticket: Ticket) -> Result<()> {
        self.lock().retain(|p| p.intent != ticket.0);
        self.ledger.strike(ticket.0)
    }

    /// Runs every undo that is left, newest first; gives what failed.
    pub async fn unwind(&self) -> Vec<Error> {
        let mut failed = Vec::new();
        loop {
            let Some(pending) = self.lock().pop() else { break };
            if let Err(error) = self.run(pending).await {
                failed.push(error);
            }
        }
        failed
    }

    /// Ends the ledger.
    pub fn close(&self) {
        self.ledger.close();
    }

    async fn run(&self, pending: Pending) -> Result<()> {
        let Pending { intent, what, deadline, undo } = pending;
        match tokio::time::timeout(deadline, undo()).await {
            Ok(Ok(())) => self.ledger.strike(intent),
            Ok(Err(error)) => Err(Error::new(Code::Failed, format!("clean-up failed: {what}")).because(error).next("run `kiln reap`")),
            Err(_) => {
                Err(Error::new(Code::Timeout, format!("clean-up took over {} s: {what}", deadline.as_secs())).next("run `kiln reap`"))
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Pending>> {
        self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Removes a file or a folder with all it holds; one that is gone is fine.
///
/// # Errors
/// When something is there and cannot be removed.
pub fn remove_path(path: &std::path::Path) -> Result<()> {
    use crate::error::ResultExt as _;
    let done = match std::fs::symlink_metadata(path) {
        Err(error) => Err(error),
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
    };
    match done {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.trying(|| format!("remove {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn undoes_in_reverse_order_and_a_failure_stops_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
        let order = Arc::new(Mutex::new(Vec::new()));
        for n in 0..3 {
            let order = order.clone();
            scope
                .before(Resource::Path { path: format!("/{n}").into() }, "x", Duration::from_secs(1), move || async move {
                    order.lock().unwrap().push(n);
                    if n == 1 { Err(Error::new(Code::Failed, "no")) } else { Ok(()) }
                })
                .unwrap();
        }
        assert_eq!(scope.unwind().await.len(), 1);
        assert_eq!(*order.lock().unwrap(), [2, 1, 0]);
        scope.close();
        drop(scope);
        let left = crate::ledger::orphans(folder.path()).unwrap();
        assert_eq!(left[0].left, [Resource::Path { path: "/1".into() }]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_undo_that_hangs_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
        scope.before(Resource::Path { path: "/x".into() }, "x", Duration::from_secs(5), std::future::pending).unwrap();
        assert_eq!(scope.unwind().await[0].kind(), Code::Timeout);
    }
}
