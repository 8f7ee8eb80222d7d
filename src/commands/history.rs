//! `kiln history`: where a channel was, when, by whom and why.

use std::collections::HashSet;
use std::time::SystemTime;

use kiln_evidence::PublicKey;
use kiln_evidence::dsse::Envelope;
use kiln_model::channel::{Chain, Entry, Identity, RECORD};
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Result};
use serde_json::{Value, json};

use super::App;
use crate::cli::History;
use crate::output::{ago, table};

pub(super) async fn run(app: &App, arguments: &History) -> Result<u8> {
    let reference: Reference = arguments.channel.parse()?;
    let channel = channel_of(&reference)?;
    let keys = crate::facts::public_keys(&arguments.keys)?;
    let place = app.place(&reference)?;
    let chain = place.channels().history(&reference.name, channel).await?;
    if chain.entries.is_empty() {
        // Says which channels there are.
        place.resolve(&reference).await?;
    }
    if !keys.is_empty() {
        check_signatures(&chain, &keys, &reference)?;
    }
    let revoked = if reference.registry.is_none() { app.store()?.revoked_images()? } else { HashSet::new() };
    let reports = app.output.reports();
    chain.notes.iter().for_each(|note| reports.warn(note));
    for lost in &chain.lost {
        let record = lost.entry.record();
        reports.warn(format!(
            "record {} has a rival that is not in the history: {} by {}, {}",
            record.seq, record.from, record.actor, record.time
        ));
    }
    let lost: Vec<Value> = chain
        .lost
        .iter()
        .map(|lost| {
            let mut value = record_json(&lost.entry);
            if let Some(object) = value.as_object_mut() {
                object.insert("lost_to".into(), json!(lost.to));
            }
            value
        })
        .collect();
    let value = json!({
        "channel": reference.to_string(), "image": chain.head().map(|head| head.record().image),
        "records": chain.entries.iter().rev().map(|entry| listed(entry, &revoked)).collect::<Vec<_>>(), "lost": lost,
    });
    app.output.result(&value, || text(&chain, &revoked));
    Ok(0)
}

/// The channel that a reference names.
pub(super) fn channel_of(reference: &Reference) -> Result<&str> {
    match &reference.pointer {
        Pointer::Channel(channel) => Ok(channel),
        _ => {
            let name = Reference { pointer: Pointer::Tag(None), ..reference.clone() };
            Err(Error::new(Code::Usage, format!("{reference} is no channel")).next(format!("write {name}@CHANNEL")))
        }
    }
}

/// A record as programs see it.
pub(super) fn record_json(entry: &Entry) -> Value {
    let mut value = json!(entry.record());
    if let Some(object) = value.as_object_mut() {
        object.insert("digest".into(), json!(entry.digest()));
        object.insert("signed".into(), json!(entry.signature.is_some()));
    }
    value
}

fn listed(entry: &Entry, revoked: &HashSet<Digest>) -> Value {
    let mut value = record_json(entry);
    if let (true, Some(object)) = (revoked.contains(&entry.record().image), value.as_object_mut()) {
        object.insert("revoked".into(), json!(true));
    }
    value
}

fn text(chain: &Chain, revoked: &HashSet<Digest>) -> String {
    let now = SystemTime::now();
    let mut rows = vec![["", "RECORD", "WHEN", "WHAT", "IMAGE", "DIGEST", "BY", "REASON"].map(String::from).to_vec()];
    for (number, entry) in chain.entries.iter().rev().enumerate() {
        let record = entry.record();
        let time = record.time.parse::<jiff::Timestamp>().ok();
        let when = time.and_then(|time| now.duration_since(time.into()).ok()).map_or_else(|| record.time.clone(), ago);
        let mark = match (revoked.contains(&record.image), number) {
            (true, _) => "revoked",
            (false, 0) => "now",
            _ => "",
        };
        rows.push(vec![
            mark.to_owned(),
            record.seq.to_string(),
            when,
            record.action.to_string(),
            record.from.clone(),
            format!("sha256:{}", record.image.short()),
            record.actor.to_string(),
            record.reason.clone().unwrap_or_default().replace(['\n', '\r'], " "),
        ]);
    }
    table(&rows)
}

/// Checks that every record that says a key was signed with that key, and that
/// the key is one of `keys`.
fn check_signatures(chain: &Chain, keys: &[PublicKey], reference: &Reference) -> Result<()> {
    for entry in &chain.entries {
        check_signature(entry, keys).map_err(|why| {
            let seq = entry.record().seq;
            Error::new(Code::Refused, format!("record {seq} of {reference} is not proven: {why}"))
                .next("name every key that may move this channel with --key")
        })?;
    }
    Ok(())
}

/// Why a record is not proven by one of `keys`.
fn check_signature(entry: &Entry, keys: &[PublicKey]) -> Result<(), String> {
    let actor = &entry.record().actor;
    let (Some(signature), Identity::Key { id }) = (&entry.signature, &actor.identity) else {
        return Err(format!("it is not signed; it says {actor}"));
    };
    let envelope: Envelope = serde_json::from_value(signature.clone()).map_err(|error| error.to_string())?;
    let (payload, signers) = envelope.verify(keys).map_err(|failure| failure.to_string())?;
    if envelope.payload_type() != RECORD || payload != entry.text().as_bytes() {
        return Err("its signature is of something else".to_owned());
    }
    if !signers.iter().any(|signer| signer.to_string() == *id) {
        return Err(format!("it says {actor}, and another key has signed it"));
    }
    Ok(())
}
