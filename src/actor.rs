//! Who moves a channel or revokes an image, and what proves it.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use kiln_evidence::PrivateKey;
use kiln_evidence::dsse::Envelope;
use kiln_model::channel::{Actor, Entry, Identity, RECORD, Record};
use kiln_model::event::Reports;
use kiln_model::{Result, ResultExt as _};

use crate::cli::Password;
use crate::signing::key_if_any;

/// Whoever runs this command, with the key that proves it, if there is one.
pub(crate) struct Signer {
    name: String,
    key: Option<PrivateKey>,
}

impl Signer {
    /// With the private key that was asked for, or the site's; without one
    /// nothing is proven.
    pub(crate) fn open(key: Option<&Path>, password: &Password, reports: &Reports) -> Result<Self> {
        Ok(Self { name: user(), key: key_if_any(key, password, reports)? })
    }

    /// What records say of them. A user name on its own proves nothing, and no
    /// identity provider is asked: nothing else is claimed.
    pub(crate) fn actor(&self) -> Actor {
        let identity = match &self.key {
            Some(key) => Identity::Key { id: key.id().to_string() },
            None => Identity::Unproven,
        };
        Actor { name: self.name.clone(), identity }
    }

    /// A record, signed if there is a key.
    pub(crate) fn record(&self, record: Record) -> Result<Entry> {
        let mut entry = Entry::new(record)?;
        entry.signature = self.sign(RECORD, entry.text().as_bytes())?;
        Ok(entry)
    }

    /// The envelope over some bytes, if there is a key.
    pub(crate) fn sign(&self, kind: &str, bytes: &[u8]) -> Result<Option<serde_json::Value>> {
        let Some(key) = &self.key else { return Ok(None) };
        serde_json::to_value(Envelope::sign(kind, bytes, key)).map(Some).trying(|| "write a signature".into())
    }
}

/// Now, RFC 3339, so fine that no two are the same.
pub(crate) fn now() -> String {
    format!("{:.9}", jiff::Timestamp::now())
}

/// The name of the user that this process belongs to.
fn user() -> String {
    let variable = || ["LOGNAME", "USER"].iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
    let Ok(uid) = std::fs::metadata("/proc/self").map(|meta| meta.uid()) else { return variable().unwrap_or_else(|| "unknown".to_owned()) };
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let named = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id.parse() == Ok(uid)).then(|| name.to_owned())
    });
    named.or_else(variable).unwrap_or_else(|| format!("uid {uid}"))
}
