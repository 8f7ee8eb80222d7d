//! Channels of a registry: every record a tag of its own.
//!
//! ```text
//!  kiln.production.000017               record 17 of the channel `production`
//!  kiln.production.000017.3f0a5c1b9e42  a bid for it: what one promotion would write
//!  kiln.production.policy.000002        the second policy of the channel
//!  production                           a copy of the image, for other tools
//! ```
//!
//! A registry has no compare-and-swap: of two who put the same tag, the last
//! one wins, and the first one is not told. Where the registry enforces that
//! tags never move, putting the record's tag is the compare-and-swap. Elsewhere
//! those who promote at the same time agree beforehand, by *bids*: each tag of
//! a bid is written by one process alone, which needs nothing but that a tag
//! that was put is listed afterwards. The protocol is the safe agreement of
//! Borowsky and Gafni:
//!
//! 1. Put a bid as *announced*, then look at all bids for this number.
//! 2. If one of them *stands*, or the record is there: withdraw, lost. Else
//!    put the own bid as *standing*.
//! 3. Look until none is merely announced. Of those that stand, the one with
//!    the smallest digest wins: all see the same set, since whoever announces
//!    later sees one that stands.
//! 4. The winner puts the record, and reads it again.
//!
//! Whoever is killed between announcing and standing holds the others up; after
//! [`RemotePlace::patience`] they go on without it. A bid that stands whose
//! process was killed is put in the record's place by the next one: it was
//! checked and signed, and could have been the winner. Only a process that was
//! stopped in between for longer than the others' patience, or a registry that
//! lists stale tags, can make two winners. Then the record's tag has one of
//! them, the other's bid still stands, and every history tells it as lost.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::Digest;
use kiln_model::channel::{Appended, Chain, ChannelBackend, Entry, Lost, Next, POLICY, RECORD, RECORD_LIMIT, Signed, follows};
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::CREATED;
use kiln_model::reference::{check_channel, check_tag};
use kiln_registry::{Fetched, Repository};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{is_a_channel, is_a_tag, not_reserved};
use crate::artifacts::empty_config;
use crate::manifest::{MANIFEST, links};
use crate::place::remote::put_empty;
use crate::place::{Place as _, RemotePlace};
use crate::revoke::ENVELOPE;

/// Annotation of a bid: how far it is.
const BID: &str = "vnd.kiln.bid";
/// Most bytes of a policy.
const POLICY_LIMIT: u64 = 256 * 1024;
/// How often a chain is read again because it grew meanwhile.
const ATTEMPTS: usize = 8;

/// How far a bid is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    /// It was lost.
    Withdrawn,
    /// Its process has not looked at the others yet.
    Announced,
    /// It wins if none with a smaller digest stands.
    Standing,
}

impl Level {
    fn text(self) -> &'static str {
        match self {
            Self::Withdrawn => "withdrawn",
            Self::Announced => "announced",
            Self::Standing => "standing",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Withdrawn, Self::Announced, Self::Standing].into_iter().find(|level| level.text() == text)
    }
}

/// What a tag of a channel is.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Record(u64),
    Bid(u64, String),
    Policy(u64),
}

/// The tag of a record.
fn record_tag(channel: &str, seq: u64) -> String {
    format!("kiln.{channel}.{seq:06}")
}

/// The tag of a bid.
fn bid_tag(channel: &str, entry: &Entry) -> String {
    format!("{}.{}", record_tag(channel, entry.record().seq), short(entry))
}

/// The part of a record's digest that is in the tag of its bid.
fn short(entry: &Entry) -> String {
    entry.digest().short()
}

fn policy_tag(channel: &str, number: u64) -> String {
    format!("kiln.{channel}.policy.{number:06}")
}

/// Refuses a tag that means something else in this repository: the name of a
/// channel, and what kiln and cosign keep at tags.
pub(crate) async fn may_tag(repository: &Repository, tag: &str) -> Result<()> {
    not_reserved(tag)?;
    // Whatever a channel is at, it has a first record.
    if check_channel(tag).is_ok() && repository.resolve(&record_tag(tag, 1)).await?.is_some() {
        return Err(is_a_channel(&format!("{}/{}", repository.host(), repository.name()), tag));
    }
    Ok(())
}

/// Which channel a tag belongs to, and what it is there.
fn classify(tag: &str) -> Option<(&str, Kind)> {
    let mut parts = tag.strip_prefix("kiln.")?.split('.');
    let (channel, second, third, fourth) = (parts.next()?, parts.next()?, parts.next(), parts.next());
    check_channel(channel).ok()?;
    let number = |text: &str| (text.len() >= 6 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse::<u64>().ok()).flatten();
    let kind = match (second, third, fourth) {
        ("policy", Some(number_text), None) => Kind::Policy(number(number_text)?),
        (seq, None, None) => Kind::Record(number(seq)?),
        (seq, Some(bid), None) => Kind::Bid(number(seq)?, bid.to_owned()),
        _ => return None,
    };
    Some((channel, kind))
}

/// The manifest of a record, or of a bid for it. The record's bytes are in it
/// (`data`), so that one request reads it.
fn manifest(entry: &Entry, level: Option<Level>) -> Result<(Vec<u8>, Vec<Vec<u8>>)> {
    let record = entry.record();
    let mut blobs = vec![entry.text().as_bytes().to_vec()];
    if let Some(signature) = &entry.signature {
        blobs.push(serde_json::to_vec(signature).trying(|| "write a signature".into())?);
    }
    let layer = |(kind, bytes): (&str, &Vec<u8>)| json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len(), "data": STANDARD.encode(bytes) });
    let mut annotations = BTreeMap::from([
        (CREATED, record.time.clone()),
        ("org.opencontainers.image.title", format!("{}@{} {}", record.name, record.channel, record.seq)),
    ]);
    if let Some(level) = level {
        annotations.insert(BID, level.text().to_owned());
    }
    let layers: Vec<Value> = [RECORD, ENVELOPE].into_iter().zip(&blobs).map(layer).collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": RECORD, "config": empty_config(), "layers": layers,
        "annotations": annotations,
    });
    Ok((serde_json::to_vec(&manifest).trying(|| "write a record".into())?, blobs))
}

/// What there is of one number.
struct View {
    /// The record, if it is there.
    record: Option<Entry>,
    /// The bids of others.
    bids: Vec<(Entry, Level)>,
}

/// How a race for a number ended.
enum Race {
    Won,
    /// To this record, which is in its place.
    Lost(Box<Entry>),
}

impl RemotePlace {
    /// Reads a manifest of a record or bid.
    async fn entry(&self, fetched: &Fetched) -> Result<(Entry, Option<Level>)> {
        let links = links(&fetched.bytes)?;
        let mut parts: HashMap<&str, Vec<u8>> = HashMap::new();
        for layer in &links.layers {
            if layer.size > 4 * RECORD_LIMIT as u64 {
                return Err(Error::new(Code::Corrupt, "it is too large to be a record of a channel"));
            }
            let inside = layer.other.get("data").and_then(Value::as_str).and_then(|text| STANDARD.decode(text).ok());
            let bytes = match inside.filter(|bytes| Digest::of(bytes) == layer.digest) {
                Some(bytes) => bytes,
                None => self.repository.blob(&layer.digest, layer.size).await?,
            };
            parts.insert(&layer.media_type, bytes);
        }
        let text = parts.remove(RECORD).and_then(|bytes| String::from_utf8(bytes).ok());
        let text = text.ok_or_else(|| Error::new(Code::Corrupt, "it has no record of a channel in it"))?;
        let signature = parts.remove(ENVELOPE).map(|bytes| serde_json::from_slice(&bytes));
        let signature = signature.transpose().map_err(|error| Error::new(Code::Corrupt, "its signature is damaged").because(error))?;
        Ok((Entry::parse(text, signature)?, links.annotations.get(BID).and_then(|text| Level::parse(text))))
    }

    /// What a tag holds; nothing when it is gone.
    async fn at(&self, tag: &str) -> Result<Option<(Entry, Option<Level>)>> {
        let Some(fetched) = self.repository.manifest(tag).await? else { return Ok(None) };
        let read = self.entry(&fetched).await;
        read.map(Some).trying(|| format!("read {}:{tag}", self.label()))
    }

    /// What several tags hold, in their order; those that are gone left out.
    async fn at_all(&self, tags: Vec<String>) -> Result<Vec<(Entry, Option<Level>)>> {
        let mut tasks = JoinSet::new();
        for (place, tag) in tags.into_iter().enumerate() {
            let remote = self.clone();
            tasks.spawn(async move {
                let _permit = remote.repository.limit().acquire().await;
                remote.at(&tag).await.map(|found| (place, found))
            });
        }
        let mut found = Vec::new();
        while let Some(done) = tasks.join_next().await {
            let (place, entry) = done.trying(|| "ask the registry".into())??;
            found.extend(entry.map(|entry| (place, entry)));
        }
        found.sort_by_key(|(place, _)| *place);
        Ok(found.into_iter().map(|(_, entry)| entry).collect())
    }

    /// All records of a channel, of these tags, and what was lost.
    async fn read(&self, tags: &[String], name: &str, channel: &str) -> Result<Chain> {
        let (mut records, mut bids): (Vec<u64>, Vec<(u64, &str)>) = (Vec::new(), Vec::new());
        for tag in tags {
            match classify(tag).filter(|(of, _)| *of == channel) {
                Some((_, Kind::Record(seq))) => records.push(seq),
                Some((_, Kind::Bid(seq, _))) => bids.push((seq, tag)),
                _ => {}
            }
        }
        records.sort_unstable();
        let read = self.at_all(records.iter().map(|seq| record_tag(channel, *seq)).collect()).await?;
        let mut chain = Chain { entries: read.into_iter().map(|(entry, _)| entry).collect(), ..Chain::default() };
        if chain.entries.len() != records.len() {
            return Err(Error::new(Code::Infrastructure, format!("{} changes while it is read", self.label())).next("try again"));
        }
        chain.check(name, channel)?;
        let places: HashMap<u64, &Entry> = chain.entries.iter().map(|entry| (entry.record().seq, entry)).collect();
        let others = |(seq, tag): &&(u64, &str)| places.get(seq).is_some_and(|entry| **tag != bid_tag(channel, entry));
        let others: Vec<String> = bids.iter().filter(others).map(|(_, tag)| (*tag).to_owned()).collect();
        let mut lost = Vec::new();
        for (entry, level) in self.at_all(others).await? {
            if let (Some(Level::Standing), Some(winner)) = (level, places.get(&entry.record().seq)) {
                lost.push(Lost { to: winner.digest(), entry });
            }
        }
        lost.sort_by_key(|lost| (lost.entry.record().seq, lost.entry.digest()));
        chain.lost = lost;
        Ok(chain)
    }

    /// What there is of the number of `own`, which is left out.
    async fn view(&self, channel: &str, own: &Entry) -> Result<View> {
        let (seq, mine) = (own.record().seq, short(own));
        let tags = self.repository.tags().await?;
        let mut bids = Vec::new();
        let mut there = false;
        for tag in tags {
            match classify(&tag).filter(|(of, _)| *of == channel) {
                Some((_, Kind::Record(number))) => there |= number == seq,
                Some((_, Kind::Bid(number, bid))) if number == seq && bid != mine => bids.push(tag),
                _ => {}
            }
        }
        if there && let Some((record, _)) = self.at(&record_tag(channel, seq)).await? {
            return Ok(View { record: Some(record), bids: Vec::new() });
        }
        let bids = self.at_all(bids).await?.into_iter();
        Ok(View { record: None, bids: bids.map(|(entry, level)| (entry, level.unwrap_or(Level::Standing))).collect() })
    }

    async fn bid(&self, channel: &str, entry: &Entry, level: Level) -> Result<()> {
        let (manifest, _) = manifest(entry, Some(level))?;
        self.repository.put_manifest(&bid_tag(channel, entry), MANIFEST, &manifest).await.map(|_| ())
    }

    /// Puts the record's tag, and tells whose record is there.
    async fn put_record(&self, channel: &str, entry: &Entry) -> Result<Race> {
        let tag = record_tag(channel, entry.record().seq);
        let (manifest, _) = manifest(entry, None)?;
        let refused = match self.repository.put_manifest(&tag, MANIFEST, &manifest).await {
            Ok(_) => None,
            Err(error) if error.kind() == Code::Refused => Some(error),
            Err(error) => return Err(error),
        };
        match (self.at(&tag).await?, refused) {
            (Some((there, _)), _) if there.digest() == entry.digest() => Ok(Race::Won),
            (Some((there, _)), _) => Ok(Race::Lost(Box::new(there))),
            (None, Some(error)) => Err(error),
            (None, None) => Err(Error::new(Code::Infrastructure, format!("{} does not show {tag}, which it has taken", self.label()))
                .next("look at the channel's history before you try again")),
        }
    }

    /// Races for the number of `entry`.
    async fn race(&self, channel: &str, entry: &Entry) -> Result<Race> {
        put_empty(self).await?;
        for blob in manifest(entry, None)?.1 {
            self.put_blob(&blob).await?;
        }
        self.bid(channel, entry, Level::Announced).await?;
        let ended = self.agree(channel, entry).await?;
        if matches!(ended, Race::Lost(_)) {
            // A registry that lets no tag move keeps it as announced: nobody
            // counts that once the record is there. After an error a bid stays
            // as it is, since its record may have been put, or will be.
            drop(self.bid(channel, entry, Level::Withdrawn).await);
        }
        Ok(ended)
    }

    async fn agree(&self, channel: &str, entry: &Entry) -> Result<Race> {
        let view = self.view(channel, entry).await?;
        if let Some(record) = view.record {
            return Ok(Race::Lost(Box::new(record)));
        }
        if view.bids.iter().any(|(_, level)| *level == Level::Standing) {
            self.bid(channel, entry, Level::Withdrawn).await?;
            return self.decided(channel, entry, false).await;
        }
        match self.bid(channel, entry, Level::Standing).await {
            Ok(()) => self.decided(channel, entry, true).await,
            // Tags never move here: putting the record decides.
            Err(error) if error.kind() == Code::Refused => self.put_record(channel, entry).await,
            Err(error) => Err(error),
        }
    }

    /// Waits until it is known who has won, and sees to it that the winner's
    /// record is there.
    async fn decided(&self, channel: &str, own: &Entry, stands: bool) -> Result<Race> {
        let mut announced: HashMap<Digest, Instant> = HashMap::new();
        let mut winning: Option<(Digest, Instant)> = None;
        let (mut pause, mut deserted) = (Duration::from_millis(20), false);
        loop {
            let view = self.view(channel, own).await?;
            if let Some(record) = view.record {
                return Ok(if record.digest() == own.digest() { Race::Won } else { Race::Lost(Box::new(record)) });
            }
            let undecided = view.bids.iter().any(|(bid, level)| {
                *level == Level::Announced && announced.entry(bid.digest()).or_insert_with(Instant::now).elapsed() < self.patience
            });
            if !undecided {
                let standing = view.bids.iter().filter(|(_, level)| *level == Level::Standing).map(|(bid, _)| bid);
                let winner = standing.chain(stands.then_some(own)).min_by_key(|bid| bid.digest());
                match winner {
                    Some(winner) if winner.digest() == own.digest() => return self.put_record(channel, own).await,
                    Some(winner) => {
                        let since = match winning {
                            Some((digest, since)) if digest == winner.digest() => since,
                            _ => winning.insert((winner.digest(), Instant::now())).1,
                        };
                        // Its process is gone: what it was about to do is done for it.
                        if since.elapsed() > self.patience {
                            return Ok(match self.put_record(channel, winner).await? {
                                Race::Won => Race::Lost(Box::new(winner.clone())),
                                lost @ Race::Lost(_) => lost,
                            });
                        }
                    }
                    // Who withdraws has seen a record: the next look shows it.
                    None if deserted => {
                        let what = format!("another promotion of {}@{channel} began and gave up; nothing was changed", self.label());
                        return Err(Error::new(Code::Infrastructure, what).next("try again"));
                    }
                    None => deserted = true,
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(Duration::from_millis(500));
        }
    }

    /// Points the tag of the channel's name to the image, for other tools. It
    /// is a copy, so that it cannot be kept up to date is only worth saying.
    async fn follow(&self, name: &str, channel: &str) -> Result<()> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let Some(image) = self.head(name, channel).await?.map(|head| head.record().image) else { return Ok(()) };
            // Another may have been faster: whoever comes last looks last.
            if last == Some(image) {
                return Ok(());
            }
            let there = self.repository.manifest(&image.to_string()).await?;
            let there = there.ok_or_else(|| Error::new(Code::NotFound, format!("no image {image} is at {}", self.label())))?;
            self.repository.put_manifest(channel, &there.media_type, &there.bytes).await?;
            last = Some(image);
        }
        Ok(())
    }

    /// The record with the greatest number of these tags.
    fn newest(tags: &[String], channel: &str) -> Option<u64> {
        let record = |tag: &String| match classify(tag)? {
            (of, Kind::Record(seq)) if of == channel => Some(seq),
            _ => None,
        };
        tags.iter().filter_map(record).max()
    }

    fn refused(&self, name: &str, entry: &Entry, won: &Entry) -> Error {
        let (own, record) = (entry.record(), won.record());
        let what = format!(
            "{name}@{} was moved by somebody else first: record {} by {} points to {}; this one, to {}, is not in the history",
            record.channel, record.seq, record.actor, record.image, own.image
        );
        let error = Error::new(Code::Refused, what).next(format!(
            "look at `kiln history {}@{}`, and try again if it is still right",
            self.label(),
            record.channel
        ));
        match &record.reason {
            Some(reason) => error.detail(format!("their reason: {reason}")),
            None => error,
        }
    }
}

#[async_trait]
impl ChannelBackend for RemotePlace {
    async fn history(&self, name: &str, channel: &str) -> Result<Chain> {
        self.read(&self.repository.tags().await?, name, channel).await
    }

    async fn head(&self, name: &str, channel: &str) -> Result<Option<Entry>> {
        let tags = self.repository.tags().await?;
        let Some(newest) = Self::newest(&tags, channel) else { return Ok(None) };
        let numbers = newest.saturating_sub(1).max(1)..=newest;
        let mut read = self.at_all(numbers.map(|seq| record_tag(channel, seq)).collect()).await?.into_iter().map(|(entry, _)| entry);
        let (Some(first), second) = (read.next(), read.next()) else { return Ok(None) };
        match second {
            Some(second) => {
                follows(&second, (newest, Some(first.digest())), name, channel)?;
                Ok(Some(second))
            }
            None if newest == 1 => {
                follows(&first, (1, None), name, channel)?;
                Ok(Some(first))
            }
            None => {
                let what = format!("the history of {name}@{channel} is broken: record {} is missing", newest - 1);
                Err(Error::new(Code::Corrupt, what)
                    .next("somebody has removed it; compare the history with a copy before you trust the channel"))
            }
        }
    }

    async fn append(&self, name: &str, channel: &str, next: Next<'_>) -> Result<Option<Appended>> {
        check_channel(channel).map_err(|why| Error::new(Code::Usage, format!("`{channel}` cannot name a channel: {why}")))?;
        let tags = self.repository.tags().await?;
        let chain = self.read(&tags, name, channel).await?;
        if chain.entries.is_empty() && tags.iter().any(|tag| tag == channel) {
            return Err(is_a_tag(&self.label(), channel));
        }
        let Some(entry) = next(&chain)? else { return Ok(None) };
        follows(&entry, chain.next(), name, channel)?;
        check_tag(&bid_tag(channel, &entry))
            .map_err(|why| Error::new(Code::Usage, format!("`{channel}` cannot name a channel here: {why}")))?;
        match self.race(channel, &entry).await? {
            Race::Lost(won) => Err(self.refused(&self.label(), &entry, &won)),
            Race::Won => {
                let mut notes = Vec::new();
                if let Err(error) = self.follow(name, channel).await {
                    notes.push(format!("the tag `{channel}`, a copy for other tools, does not follow the channel: {}", error.chain()));
                }
                Ok(Some(Appended { entry, notes }))
            }
        }
    }

    async fn list(&self, _: &str) -> Result<Vec<String>> {
        let tags = self.repository.tags().await?;
        let record = |tag: &String| match classify(tag)? {
            (channel, Kind::Record(_)) => Some(channel.to_owned()),
            _ => None,
        };
        let mut channels: Vec<String> = tags.iter().filter_map(record).collect();
        channels.sort();
        channels.dedup();
        Ok(channels)
    }

    async fn policy(&self, name: &str, channel: &str) -> Result<Option<Signed>> {
        let numbers = self.policies(channel).await?;
        let Some(newest) = numbers.last() else { return Ok(None) };
        let tag = policy_tag(channel, *newest);
        let wrong = |why: &str| {
            Error::new(Code::Corrupt, format!("the policy of {}@{channel} ({tag}) cannot be used: {why}", self.label()))
                .next(format!("set it again: `kiln policy set {}@{channel} FILE --key KEY`", self.label()))
        };
        let fetched = self.repository.manifest(&tag).await?.ok_or_else(|| wrong("it is gone"))?;
        let (mut text, mut signature) = (None, None);
        for layer in links(&fetched.bytes).map_err(|error| wrong("it is no artifact").because(error))?.layers {
            let bytes = self
                .repository
                .blob(&layer.digest, layer.size.min(POLICY_LIMIT))
                .await
                .trying(|| format!("read the policy of {name}@{channel}"))?;
            match layer.media_type.as_str() {
                POLICY => text = String::from_utf8(bytes).ok(),
                ENVELOPE => signature = serde_json::from_slice(&bytes).ok(),
                _ => {}
            }
        }
        match (text, signature) {
            (Some(text), Some(signature)) => Ok(Some(Signed { text, signature })),
            (None, _) => Err(wrong("it has no text")),
            (_, None) => Err(wrong("it is not signed")),
        }
    }

    async fn set_policy(&self, name: &str, channel: &str, policy: &Signed) -> Result<()> {
        check_channel(channel).map_err(|why| Error::new(Code::Usage, format!("`{channel}` cannot name a channel: {why}")))?;
        let number = self.policies(channel).await?.last().map_or(1, |newest| newest + 1);
        let tag = policy_tag(channel, number);
        let signature = serde_json::to_vec(&policy.signature).trying(|| "write a signature".into())?;
        put_empty(self).await?;
        let mut layers = Vec::new();
        for (kind, bytes) in [(POLICY, policy.text.as_bytes()), (ENVELOPE, &signature)] {
            let digest = self.put_blob(bytes).await?;
            layers.push(json!({ "mediaType": kind, "digest": digest, "size": bytes.len() }));
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": POLICY, "config": empty_config(), "layers": layers,
            "annotations": { "org.opencontainers.image.title": format!("policy of {name}@{channel}") },
        });
        let manifest = serde_json::to_vec(&manifest).trying(|| "write a policy".into())?;
        self.repository.put_manifest(&tag, MANIFEST, &manifest).await?;
        let there = self.repository.resolve(&tag).await?;
        if there != Some(Digest::of(&manifest)) {
            let what = format!("somebody else has set the policy of {}@{channel} at the same time", self.label());
            return Err(Error::new(Code::Refused, what).next("look at it with `kiln policy show`"));
        }
        Ok(())
    }
}

impl RemotePlace {
    /// Whether this repository refuses to move a tag of the form that records
    /// have. The protocol tells it nowhere, so it is tried, on a tag of its own.
    ///
    /// # Errors
    /// When nothing can be written there.
    pub async fn tags_never_move(&self) -> Result<bool> {
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let tag = format!("kiln.doctor.try-{time:x}-{}", std::process::id());
        put_empty(self).await?;
        let layer = self.put_blob(tag.as_bytes()).await?;
        let manifest = |number: u32| {
            let manifest = json!({
                "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.kiln.doctor.v1", "config": empty_config(),
                "layers": [{ "mediaType": "text/plain", "digest": layer, "size": tag.len() }],
                "annotations": { "vnd.kiln.doctor": number.to_string() },
            });
            serde_json::to_vec(&manifest).trying(|| "write a manifest".into())
        };
        let (first, second) = (manifest(1)?, manifest(2)?);
        self.repository.put_manifest(&tag, MANIFEST, &first).await?;
        let put = self.repository.put_manifest(&tag, MANIFEST, &second).await;
        let there = self.repository.resolve(&tag).await;
        for manifest in [&first, &second] {
            // Not every registry removes.
            drop(self.repository.delete_manifest(&Digest::of(manifest)).await);
        }
        match put {
            Ok(_) => Ok(there? == Some(Digest::of(&first))),
            Err(error) if error.kind() == Code::Refused => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The numbers of a channel's policies, sorted.
    async fn policies(&self, channel: &str) -> Result<Vec<u64>> {
        let tags = self.repository.tags().await?;
        let policy = |tag: &String| match classify(tag)? {
            (of, Kind::Policy(number)) if of == channel => Some(number),
            _ => None,
        };
        let mut numbers: Vec<u64> = tags.iter().filter_map(policy).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_of_channels() {
        assert_eq!(classify("kiln.production.000017"), Some(("production", Kind::Record(17))));
        assert_eq!(classify("kiln.production.1000017"), Some(("production", Kind::Record(1_000_017))));
        assert_eq!(classify("kiln.production.000017.3f0a5c1b9e42"), Some(("production", Kind::Bid(17, "3f0a5c1b9e42".into()))));
        assert_eq!(classify("kiln.production.policy.000002"), Some(("production", Kind::Policy(2))));
        for other in ["1.4.0", "kiln.production", "kiln.production.17", "kiln.v1.000017", "kiln.a.000001.b.c", "production"] {
            assert_eq!(classify(other), None, "{other}");
        }
        assert!(record_tag("production", 17) == "kiln.production.000017" && policy_tag("x", 2) == "kiln.x.policy.000002");
    }
}
