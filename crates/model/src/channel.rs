//! Channels: named pointers with a history.
//!
//! A channel is a chain of [`Record`]s. A record is one line of JSON with fixed
//! keys in a fixed order; its digest is that of those bytes, and each names the
//! digest of the one before, so that nothing in the middle can be changed,
//! taken out or put in without every later record showing it. What is kept is
//! always the text itself, never the record written anew, so that a record of a
//! later kiln keeps its digest.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::error::{Code, Error, Result, ResultExt as _};

/// Version of the form of a record.
pub const VERSION: u32 = 1;
/// Media type of a record, payload type of its signature, and `artifactType` of
/// what holds it in a registry.
pub const RECORD: &str = "application/vnd.kiln.channel.v1+json";
/// The same for a channel's policy.
pub const POLICY: &str = "application/vnd.kiln.policy.v1+toml";
/// Most bytes of a record.
pub const RECORD_LIMIT: usize = 64 * 1024;

/// What a record did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The channel went on to an image.
    Promote,
    /// The channel went back to an image that it was at before.
    Rollback,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Promote => "promote",
            Self::Rollback => "rollback",
        })
    }
}

/// Who did it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The name of the user. On its own it proves nothing.
    pub name: String,
    /// What proves it.
    pub identity: Identity,
}

/// What proves who an actor is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Identity {
    /// The record is signed with this key.
    Key {
        /// The key's id.
        id: String,
    },
    /// An identity provider vouched for the key that signed the record.
    Oidc {
        /// The provider.
        issuer: String,
        /// Whom it vouched for.
        subject: String,
    },
    /// Nothing does: whoever could write the record could write any name.
    Unproven,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.identity {
            Identity::Key { id } => write!(f, "{} (key {})", self.name, id.get(..19).unwrap_or(id)),
            Identity::Oidc { issuer, subject } => write!(f, "{subject} ({issuer})"),
            Identity::Unproven => write!(f, "{} (unproven)", self.name),
        }
    }
}

/// One move of a channel. The order of the fields is that of the keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    pub v: u32,
    /// Name of the image in the store, or of the repository at a registry.
    pub name: String,
    /// Name of the channel.
    pub channel: String,
    /// 1, 2, 3, …
    pub seq: u64,
    /// Digest of the record before; none for the first.
    pub previous: Option<Digest>,
    /// Manifest digest that the channel points to from here on.
    pub image: Digest,
    /// What it was called by whoever moved the channel (`web:1.4.0`).
    pub from: String,
    /// What was done.
    pub action: Action,
    /// When, RFC 3339.
    pub time: String,
    /// Who.
    pub actor: Actor,
    /// Why.
    pub reason: Option<String>,
    /// Digests of what was attached to the image then, sorted.
    pub evidence: Vec<Digest>,
    /// Digest of the policy that the image fulfilled.
    pub policy: Option<Digest>,
}

/// A record as it is kept: its text, and what was signed of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    record: Record,
    text: String,
    /// DSSE envelope over the text, with payload type [`RECORD`].
    pub signature: Option<serde_json::Value>,
}

impl Entry {
    /// A new record, not signed yet.
    ///
    /// # Errors
    /// [`Code::Usage`] when it would be larger than [`RECORD_LIMIT`].
    pub fn new(record: Record) -> Result<Self> {
        let text = serde_json::to_string(&record).trying(|| "write a channel's record".into())?;
        if text.len() > RECORD_LIMIT {
            let error = Error::new(Code::Usage, format!("the record of {}@{} would be larger than 64 KiB", record.name, record.channel));
            return Err(error.next("give a shorter reason"));
        }
        Ok(Self { record, text, signature: None })
    }

    /// A record that was read.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when it is none, or of a version that is not known.
    pub fn parse(text: String, signature: Option<serde_json::Value>) -> Result<Self> {
        let wrong = |why: &str| Error::new(Code::Corrupt, format!("this is no record of a channel: {why}"));
        if text.len() > RECORD_LIMIT {
            return Err(wrong("it is larger than 64 KiB"));
        }
        let record: Record = serde_json::from_str(&text).map_err(|error| wrong("it is not well-formed").because(error))?;
        if record.v != VERSION {
            return Err(wrong(&format!("it has version {}, and this kiln reads version {VERSION}", record.v)));
        }
        Ok(Self { record, text, signature })
    }

    /// What it says.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its bytes, which are what is digested and signed.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its digest.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.text)
    }
}

/// A promotion that was written and is not in the chain, since another one with
/// the same number is.
#[derive(Debug, Clone, PartialEq)]
pub struct Lost {
    /// What was written.
    pub entry: Entry,
    /// Digest of the record that is in its place.
    pub to: Digest,
}

/// All that is known of a channel.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chain {
    /// The records, the oldest first; each follows the one before.
    pub entries: Vec<Entry>,
    /// Those that lost a race which nothing could prevent.
    pub lost: Vec<Lost>,
    /// What else is worth saying, such as a half line that a crash has left.
    pub notes: Vec<String>,
}

impl Chain {
    /// The newest record: where the channel is.
    pub fn head(&self) -> Option<&Entry> {
        self.entries.last()
    }

    /// `seq` and `previous` of the record that comes next.
    pub fn next(&self) -> (u64, Option<Digest>) {
        self.head().map_or((1, None), |head| (head.record.seq + 1, Some(head.digest())))
    }

    /// Where the channel has been and can go back to, the oldest first and the
    /// place where it is last: a promotion goes one on, a rollback goes back
    /// to the place that it names.
    pub fn path(&self) -> Vec<&Entry> {
        let mut path: Vec<&Entry> = Vec::new();
        for entry in &self.entries {
            let there = match entry.record.action {
                Action::Promote => None,
                Action::Rollback => path.iter().rposition(|before| before.record.image == entry.record.image),
            };
            match there {
                Some(at) => path.truncate(at + 1),
                None => path.push(entry),
            }
        }
        path
    }

    /// The images of the last `count` states, and all that a rollback from
    /// there could reach within as many steps.
    pub fn recent(&self, count: usize) -> Vec<Digest> {
        let newest = self.entries.iter().rev().take(count);
        let path = self.path();
        let mut images: Vec<Digest> = newest.chain(path.into_iter().rev().take(count)).map(|entry| entry.record.image).collect();
        images.sort();
        images.dedup();
        images
    }

    /// Checks that the records are those of `name@channel`, complete, in order,
    /// and that each names the one before.
    ///
    /// # Errors
    /// [`Code::Corrupt`] with the number of the first record that is wrong.
    pub fn check(&self, name: &str, channel: &str) -> Result<()> {
        let mut expected = (1, None);
        for entry in &self.entries {
            follows(entry, expected, name, channel)?;
            expected = (entry.record.seq + 1, Some(entry.digest()));
        }
        Ok(())
    }
}

/// Checks that a record has this number, names this one before it, and is of
/// this channel.
///
/// # Errors
/// [`Code::Corrupt`] when not.
pub fn follows(entry: &Entry, (seq, previous): (u64, Option<Digest>), name: &str, channel: &str) -> Result<()> {
    let record = entry.record();
    let broken = |why: String| {
        let what = format!("the history of {name}@{channel} is broken: {why}");
        Error::new(Code::Corrupt, what).next("somebody has changed it, or a disk has: compare it with a copy before you trust the channel")
    };
    if (record.name.as_str(), record.channel.as_str()) != (name, channel) {
        return Err(broken(format!("record {seq} is of {}@{}", record.name, record.channel)));
    }
    if record.seq != seq {
        return Err(broken(format!("record {seq} is missing; record {} is in its place", record.seq)));
    }
    if record.previous != previous {
        return Err(broken(format!("record {seq} does not follow the one before it: that one was changed, or exchanged")));
    }
    Ok(())
}

/// A channel's policy and the signature over it.
#[derive(Debug, Clone, PartialEq)]
pub struct Signed {
    /// The policy, a TOML file.
    pub text: String,
    /// DSSE envelope over it, with payload type [`POLICY`].
    pub signature: serde_json::Value,
}

impl Signed {
    /// Digest of the policy: what a record names.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.text)
    }
}

/// Something elsewhere that a channel's policy makes follow the channel, such
/// as `ssm:eu-central-1:/images/web/production/{arch}`: a parameter of AWS
/// Systems Manager, which says the AMI of the image that the channel is at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Follower {
    /// Region of AWS.
    pub region: String,
    /// The parameter's name, with `{name}`, `{channel}` and `{arch}` in it.
    pub parameter: String,
}

impl Follower {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let rest = text.strip_prefix("ssm:").ok_or("a follower is written ssm:REGION:/PARAMETER")?;
        let (region, parameter) = rest.split_once(':').ok_or("a follower is written ssm:REGION:/PARAMETER")?;
        let word = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if region.split('-').count() < 3 || !region.split('-').all(word) {
            return Err("what follows `ssm:` is no region of AWS");
        }
        let plain = parameter.replace("{name}", "n").replace("{channel}", "c").replace("{arch}", "a");
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-/".contains(&byte);
        if !plain.starts_with('/') || plain.len() < 2 || plain.len() > 1011 || !plain.bytes().all(good) {
            return Err("a parameter's name begins with `/` and is made of letters, digits, `_.-/`, {name}, {channel} and {arch}");
        }
        Ok(Self { region: region.to_owned(), parameter: parameter.to_owned() })
    }

    /// The parameter's name for an image of `architecture` (OCI's word) of
    /// `name@channel`.
    pub fn parameter(&self, name: &str, channel: &str, architecture: &str) -> String {
        self.parameter.replace("{name}", name).replace("{channel}", channel).replace("{arch}", architecture)
    }
}

impl fmt::Display for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ssm:{}:{}", self.region, self.parameter)
    }
}

/// Makes the next record of a chain as it is at that moment.
pub type Next<'a> = &'a (dyn Fn(&Chain) -> Result<Option<Entry>> + Sync);

/// A record that was appended.
#[derive(Debug, Clone, PartialEq)]
pub struct Appended {
    /// The record.
    pub entry: Entry,
    /// What else is worth saying, such as a tag that could not be moved along.
    pub notes: Vec<String>,
}

/// Keeps the records of channels: exact in a store, as good as it can be in a
/// registry, which has no compare-and-swap.
#[async_trait]
pub trait ChannelBackend: Send + Sync {
    /// All records of `name@channel`; none when there is no such channel.
    ///
    /// # Errors
    /// When they cannot be read; [`Code::Corrupt`] when the chain is broken.
    async fn history(&self, name: &str, channel: &str) -> Result<Chain>;

    /// Where `name@channel` is; `None` when there is no such channel.
    ///
    /// # Errors
    /// As [`ChannelBackend::history`].
    async fn head(&self, name: &str, channel: &str) -> Result<Option<Entry>>;

    /// Appends what `next` makes of the chain; nothing when `next` makes
    /// nothing. `next` is asked while nobody else can append, where the place
    /// allows that, so it must be quick and must not use the place itself.
    ///
    /// # Errors
    /// Those of `next`; [`Code::Refused`] when another record came first and
    /// this one is not in the chain.
    async fn append(&self, name: &str, channel: &str, next: Next<'_>) -> Result<Option<Appended>>;

    /// The channels of `name`, sorted.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn list(&self, name: &str) -> Result<Vec<String>>;

    /// The policy of `name@channel`.
    ///
    /// # Errors
    /// When it cannot be read; [`Code::Corrupt`] when it is not what was signed.
    async fn policy(&self, name: &str, channel: &str) -> Result<Option<Signed>>;

    /// Replaces the policy of `name@channel`, which may have no record yet.
    ///
    /// # Errors
    /// When it cannot be written.
    async fn set_policy(&self, name: &str, channel: &str, policy: &Signed) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(moves: &[(Action, &str)]) -> Chain {
        let mut chain = Chain::default();
        for (action, image) in moves {
            let (seq, previous) = chain.next();
            let record = Record {
                v: VERSION,
                name: "web".into(),
                channel: "production".into(),
                seq,
                previous,
                image: Digest::of(image),
                from: format!("web:{image}"),
                action: *action,
                time: "2026-01-02T03:04:05Z".into(),
                actor: Actor { name: "ann".into(), identity: Identity::Unproven },
                reason: None,
                evidence: vec![],
                policy: None,
            };
            chain.entries.push(Entry::new(record).unwrap());
        }
        chain
    }

    use Action::{Promote, Rollback};

    #[test]
    fn followers() {
        let follower = Follower::parse("ssm:eu-central-1:/images/{name}/{channel}/{arch}").unwrap();
        assert_eq!(follower.parameter("shop/web", "production", "arm64"), "/images/shop/web/production/arm64");
        assert_eq!(follower.to_string(), "ssm:eu-central-1:/images/{name}/{channel}/{arch}");
        for bad in
            ["", "ssm:", "ssm:eu-central-1", "ssm:eu-central-1:images", "ssm:EU:/x", "ssm:eu-central-1:/{other}", "sns:eu-central-1:/x"]
        {
            assert!(Follower::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_text_of_a_record_is_as_documented() {
        let chain = chain(&[(Promote, "1")]);
        let image = Digest::of("1");
        assert_eq!(
            chain.entries[0].text(),
            format!(
                r#"{{"v":1,"name":"web","channel":"production","seq":1,"previous":null,"image":"{image}","from":"web:1","action":"promote","time":"2026-01-02T03:04:05Z","actor":{{"name":"ann","identity":{{"kind":"unproven"}}}},"reason":null,"evidence":[],"policy":null}}"#
            )
        );
        let key = serde_json::to_string(&Identity::Key { id: "sha256:ab".into() }).unwrap();
        assert_eq!(key, r#"{"kind":"key","id":"sha256:ab"}"#);
    }

    #[test]
    fn a_changed_missing_or_foreign_record_is_found() {
        let whole = chain(&[(Promote, "1"), (Promote, "2"), (Promote, "3")]);
        whole.check("web", "production").unwrap();
        let mut missing = whole.clone();
        missing.entries.remove(1);
        let mut changed = whole.clone();
        let text = changed.entries[1].text().replace("web:2", "web:9");
        changed.entries[1] = Entry::parse(text, None).unwrap();
        let mut swapped = whole.clone();
        swapped.entries.swap(0, 1);
        for (broken, said) in [(missing, "record 2 is missing"), (changed, "record 3 does not follow"), (swapped, "record 1 is missing")] {
            let error = broken.check("web", "production").unwrap_err();
            assert!(error.kind() == Code::Corrupt && error.to_string().contains(said), "{error}");
        }
        assert!(whole.check("web", "staging").unwrap_err().to_string().contains("is of web@production"));
        // A text that says the same in other bytes is another record.
        let spaced = whole.entries[0].text().replace(":1,", ": 1,");
        assert_ne!(Entry::parse(spaced, None).unwrap().digest(), whole.entries[0].digest());
        assert!(Entry::parse(whole.entries[0].text().replace("\"v\":1", "\"v\":2"), None).is_err());
    }

    #[test]
    fn a_rollback_goes_back_on_the_path_and_a_promotion_goes_on() {
        let images = |chain: &Chain| chain.path().iter().map(|entry| entry.record().from.clone()).collect::<Vec<_>>();
        let there = chain(&[(Promote, "1"), (Promote, "2"), (Promote, "3"), (Rollback, "2"), (Rollback, "1"), (Promote, "4")]);
        assert_eq!(images(&there), ["web:1", "web:4"]);
        // Back to what was left by a rollback: one on.
        let again = chain(&[(Promote, "1"), (Promote, "2"), (Rollback, "1"), (Rollback, "2")]);
        assert_eq!(images(&again), ["web:1", "web:2"]);
        assert_eq!(there.recent(1), [Digest::of("4")]);
        let mut two = vec![Digest::of("4"), Digest::of("1")];
        two.sort();
        assert_eq!(there.recent(2), two);
        assert_eq!(there.recent(10).len(), 4);
    }
}
