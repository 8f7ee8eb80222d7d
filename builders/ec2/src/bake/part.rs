//! Making one thing at AWS so that it cannot be lost.
//!
//! ```text
//!  ledger: "an instance, of this bake" ──► RunInstances ──► ledger: "i-0abc"
//!          synced                          in a task        synced
//! ```
//!
//! The undo is registered before the call is made. The call runs in a task of
//! its own, so that a bake that is dropped in the middle of it does not cut it
//! off: the undo waits for its answer, and removes what that names. When there
//! is no answer, or none that says what happened, the undo looks for what has
//! the bake's tags, for long enough that AWS knows of it everywhere.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kiln_model::Result;
use kiln_model::cleanup::Ticket;
use kiln_model::ledger::Resource;
use kiln_model::machine::Context;
use tokio::sync::watch;

use super::EC2;
use super::region::Region;
use super::remove::{Remover, Sought};
use crate::api;
use crate::api::Kind;

/// What a bake makes at EC2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// With its volumes, its network interface and its spot request.
    Instance,
    SecurityGroup,
    KeyPair,
    /// With its snapshots.
    Image,
}

impl Part {
    /// All, in the order in which they can be removed.
    pub(crate) const ALL: [Self; 4] = [Self::Instance, Self::SecurityGroup, Self::KeyPair, Self::Image];

    /// What ledgers call it.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Instance => "instance",
            Self::SecurityGroup => "security-group",
            Self::KeyPair => "key-pair",
            Self::Image => "image",
        }
    }

    pub(crate) fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.word() == word)
    }

    /// How long removing it may take.
    const fn deadline(self) -> Duration {
        Duration::from_secs(match self {
            // A shutdown that the guest drags out is cut short by AWS in the end.
            Self::Instance => 15 * 60,
            Self::SecurityGroup | Self::Image => 10 * 60,
            Self::KeyPair => 5 * 60,
        })
    }

    fn resource(self, region: &Region, id: Option<&str>) -> Resource {
        Resource::Cloud {
            builder: EC2.to_owned(),
            region: region.name.clone(),
            resource: self.word().to_owned(),
            id: id.map(ToOwned::to_owned),
        }
    }
}

/// Something that was made.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) id: String,
    /// Its undo.
    pub(crate) ticket: Ticket,
}

/// How a call that makes something ended.
#[derive(Debug, Clone)]
enum Answer {
    /// It made this.
    Made(String),
    /// It made nothing; `sure` when AWS said so.
    Failed { sure: bool },
}

/// Makes a part with `call`, which gives its id.
///
/// # Errors
/// The call's; what it may have made all the same is removed with the scope.
pub(crate) async fn make<F>(context: &Context, region: &Region, part: Part, call: F) -> Result<Made>
where
    F: Future<Output = api::Result<String>> + Send + 'static,
{
    let what = format!("{} in {}", part.word(), region.name);
    let (tell, told) = watch::channel(None);
    let task: Arc<OnceLock<tokio::task::AbortHandle>> = Arc::default();
    let remover = Remover::new(region.clone(), &context.bake);
    let handle = Arc::clone(&task);
    let ticket = context.scope.before(part.resource(region, None), &format!("remove the {what}"), part.deadline(), move || async move {
        let sought = answer(told, &handle, remover.region().settling() * 3).await;
        remover.remove(part, &sought).await
    })?;
    let (scope, of) = (Arc::clone(&context.scope), region.clone());
    let running = tokio::spawn(async move {
        let made = call.await;
        match &made {
            Ok(id) => {
                // Even if the ledger cannot be written, the undo knows the id.
                tell.send_replace(Some(Answer::Made(id.clone())));
                scope.amend(ticket, part.resource(&of, Some(id))).map(|()| made)
            }
            Err(error) => {
                tell.send_replace(Some(Answer::Failed { sure: !matches!(error.kind, Kind::Transient | Kind::Exists) }));
                Ok(made)
            }
        }
    });
    // Nothing is awaited between the registration and this.
    drop(task.set(running.abort_handle()));
    let made = match running.await {
        Ok(made) => made?,
        Err(ended) => Err(api::CallError::unanswered("(a call)", ended)),
    };
    match made {
        Ok(id) => Ok(Made { id, ticket }),
        Err(error) => Err(error.trying(format!("make the {what}"))),
    }
}

/// Waits for a call's answer; cuts it off only when that takes too long.
async fn answer(mut told: watch::Receiver<Option<Answer>>, task: &OnceLock<tokio::task::AbortHandle>, patience: Duration) -> Sought {
    let answer = match tokio::time::timeout(patience, told.wait_for(Option::is_some)).await {
        Ok(Ok(answer)) => answer.clone(),
        // The task has ended without a word, or goes on repeating its call.
        Ok(Err(_)) | Err(_) => None,
    };
    match answer {
        Some(Answer::Made(id)) => Sought::Id(id),
        Some(Answer::Failed { sure }) => Sought::OfBake { settling: !sure },
        None => {
            if let Some(task) = task.get() {
                task.abort();
            }
            Sought::OfBake { settling: true }
        }
    }
}
