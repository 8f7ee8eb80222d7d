//! The cleanup scope of a bake: every undo is registered (and written to the
//! ledger) before the act, and run in reverse order however the bake ends.

use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::Poll;
use std::time::Duration;

use crate::error::{Code, Error, Result};
use crate::ledger::{Intent, Ledger, Resource};

/// Does nothing before it is polled; and goes on where it was when whoever
/// polled it stops waiting and another takes over.
type Undo = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

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
        self.lock().push(Pending { intent, what: what.to_owned(), deadline, undo: Box::pin(async move { undo().await }) });
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

    /// Runs one undo now. When this future is dropped before its end, the undo
    /// is among those that are left, and goes on where it was.
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

    /// Takes undos out of the scope until it is decided whether their resources
    /// stay; `None` when one of them is not there any more, since it is being
    /// undone. What is withheld is undone by nobody here, and stays in the ledger.
    pub fn withhold(&self, tickets: &[Ticket]) -> Option<Withheld> {
        let mut all = self.lock();
        let there = |ticket: &Ticket| all.iter().any(|pending| pending.intent == ticket.0);
        if !tickets.iter().all(there) {
            return None;
        }
        let (held, left) = std::mem::take(&mut *all).into_iter().partition(|pending| tickets.contains(&Ticket(pending.intent)));
        *all = left;
        Some(Withheld(held))
    }

    /// What was withheld stays: its undos are forgotten.
    ///
    /// # Errors
    /// When the ledger cannot be written.
    pub fn stays(&self, withheld: Withheld) -> Result<()> {
        withheld.0.into_iter().try_for_each(|pending| self.ledger.strike(pending.intent))
    }

    /// What was withheld is undone with the rest.
    pub fn give_back(&self, withheld: Withheld) {
        withheld.0.into_iter().for_each(|pending| self.put_back(pending));
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
        let mut under_way = UnderWay { scope: self, pending: Some(pending) };
        let deadline = under_way.pending.as_ref().map_or(Duration::ZERO, |pending| pending.deadline);
        let undone = tokio::time::timeout(deadline, std::future::poll_fn(|context| under_way.poll(context))).await;
        let Some(Pending { intent, what, .. }) = under_way.pending.take() else { return Ok(()) };
        match undone {
            Ok(Ok(())) => self.ledger.strike(intent),
            Ok(Err(error)) => Err(Error::new(Code::Failed, format!("clean-up failed: {what}")).because(error).next("run `kiln reap`")),
            Err(_) => {
                Err(Error::new(Code::Timeout, format!("clean-up took over {} s: {what}", deadline.as_secs())).next("run `kiln reap`"))
            }
        }
    }

    fn put_back(&self, pending: Pending) {
        let mut all = self.lock();
        let at = all.iter().position(|other| other.intent > pending.intent).unwrap_or(all.len());
        all.insert(at, pending);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Pending>> {
        self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Undos of which it is being decided whether they are needed.
pub struct Withheld(Vec<Pending>);

/// An undo that is running; dropped before its end, it is left to others.
struct UnderWay<'a> {
    scope: &'a Scope,
    pending: Option<Pending>,
}

impl UnderWay<'_> {
    fn poll(&mut self, context: &mut std::task::Context<'_>) -> Poll<Result<()>> {
        match &mut self.pending {
            Some(pending) => pending.undo.as_mut().poll(context),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.scope.put_back(pending);
        }
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

    #[tokio::test]
    async fn what_is_withheld_is_decided_upon_once() {
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
        let order = Arc::new(Mutex::new(Vec::new()));
        let tickets: Vec<Ticket> = (0..4)
            .map(|n| {
                let order = order.clone();
                let undo = move || async move {
                    order.lock().unwrap().push(n);
                    Ok(())
                };
                scope.before(Resource::Path { path: format!("/{n}").into() }, "x", Duration::from_secs(1), undo).unwrap()
            })
            .collect();
        let stays = scope.withhold(&tickets[..1]).unwrap();
        let goes = scope.withhold(&tickets[1..3]).unwrap();
        assert!(scope.withhold(&tickets[2..]).is_none(), "one of them is withheld already");
        scope.stays(stays).unwrap();
        scope.give_back(goes);
        assert!(scope.unwind().await.is_empty());
        assert_eq!(*order.lock().unwrap(), [3, 2, 1]);
        assert!(scope.withhold(&tickets[3..]).is_none(), "it is undone");
        scope.close();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_undo_that_was_dropped_half_way_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
        let order = Arc::new(Mutex::new(Vec::new()));
        let (half, full) = (Arc::new(tokio::sync::Notify::new()), Arc::new(tokio::sync::Notify::new()));
        let mut tickets = Vec::new();
        for n in 0..3 {
            let (order, half, full) = (order.clone(), half.clone(), full.clone());
            let path = Resource::Path { path: format!("/{n}").into() };
            let undo = move || async move {
                if n == 1 {
                    half.notify_one();
                    full.notified().await;
                }
                order.lock().unwrap().push(n);
                Ok(())
            };
            tickets.push(scope.before(path, "x", Duration::from_secs(5), undo).unwrap());
        }
        tokio::select! {
            done = scope.undo(tickets[1]) => panic!("{done:?}"),
            () = half.notified() => {}
        }
        full.notify_one();
        assert!(scope.unwind().await.is_empty());
        assert_eq!(*order.lock().unwrap(), [2, 1, 0]);
        scope.close();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_undo_that_hangs_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
        scope.before(Resource::Path { path: "/x".into() }, "x", Duration::from_secs(5), std::future::pending).unwrap();
        assert_eq!(scope.unwind().await[0].kind(), Code::Timeout);
    }
}
