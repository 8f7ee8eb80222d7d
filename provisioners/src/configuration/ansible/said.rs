//! What kiln's plugin tells of a run, and the errors made of it.

use kiln_model::{Code, Error, Result};
use serde_json::Value;

use crate::configuration::Changes;

/// The one line for a run that did nothing.
pub(super) const NOTHING: &str = "no play matched the guest, and so nothing was done";

/// One line of the plugin.
fn event(line: &str) -> Result<Value> {
    serde_json::from_str(line).map_err(|error| {
        Error::new(Code::Failed, "what kiln's own plugin told of Ansible's run cannot be read").because(error).detail(line.to_owned())
    })
}

/// What happened to one task, in the order it happened.
pub(super) struct Events(Vec<Value>);

impl Events {
    pub(super) fn read<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        lines.into_iter().map(event).collect::<Result<_>>().map(Self)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What a run in check mode would change.
    pub(super) fn changes(&self) -> Changes {
        let named = self.0.iter().filter_map(|event| event["would_change"].as_array()).flatten().filter_map(Value::as_str);
        Changes { resources: named.map(Into::into).collect() }
    }

    /// The task that ended the run: why it failed, and what it printed.
    pub(super) fn failed(&self) -> Option<(String, Option<String>)> {
        let event = self.0.iter().rev().find(|event| matches!(event["outcome"].as_str(), Some("failed" | "unreachable")))?;
        let outcome = if event["outcome"] == "failed" { "failed" } else { "could not reach the guest" };
        let text = |key: &str| event[key].as_str().unwrap_or_default();
        let message = format!("task `{}` {outcome}: {}", text("task"), text("message"));
        let printed: Vec<&str> = event["printed"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        Some((message, (!printed.is_empty()).then(|| printed.join("\n"))))
    }
}
