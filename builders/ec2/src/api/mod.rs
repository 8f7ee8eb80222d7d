//! What AWS can do for kiln, as traits of plain types: no type of the SDK is
//! in any signature. One object stands for one service in one region;
//! [`Cloud`] gives them.
//!
//! Each method is one call, made once. Repeating it when AWS throttles, or
//! when it does not know yet what it made a moment ago, is [`retry`]'s, which
//! is also where the number of calls under way is bounded.

pub mod ebs;
pub mod error;
pub mod images;
pub mod machines;
pub mod parameters;
pub mod retry;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use ebs::Ebs;
pub use error::{CallError, Kind, Result};
pub use images::Images;
pub use machines::Machines;
pub use parameters::Parameters;

/// Tags of a resource.
pub type Tags = BTreeMap<String, String>;

/// The services of every region, with this user's credentials.
pub trait Cloud: Send + Sync {
    /// The EBS direct APIs of `region`.
    fn ebs(&self, region: &str) -> Arc<dyn Ebs>;

    /// Images and snapshots of `region`.
    fn images(&self, region: &str) -> Arc<dyn Images>;

    /// Instances of `region`, and what they need.
    fn machines(&self, region: &str) -> Arc<dyn Machines>;

    /// The parameter store of `region`.
    fn parameters(&self, region: &str) -> Arc<dyn Parameters>;
}

/// Which resources a describing call gives: all that satisfy everything said
/// here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Find {
    /// These ones; an id that is not there is an error of [`Kind::NotFound`].
    pub ids: Vec<String>,
    /// Of these owners: `self`, `amazon`, or account numbers.
    pub owners: Vec<String>,
    /// Filters in the service's words, such as `tag:kiln:digest`, each with
    /// the values of which one has to match (`*` and `?` stand for any).
    pub filters: Vec<(String, Vec<String>)>,
}

impl Find {
    /// The one with this id.
    pub fn id(id: &str) -> Self {
        Self { ids: vec![id.to_owned()], ..Self::default() }
    }

    /// What this account owns.
    pub fn own() -> Self {
        Self { owners: vec!["self".to_owned()], ..Self::default() }
    }

    /// Only what satisfies this filter too.
    #[must_use]
    pub fn with(mut self, filter: &str, value: &str) -> Self {
        self.filters.push((filter.to_owned(), vec![value.to_owned()]));
        self
    }
}
