//! `kiln rollback`: takes a channel back to where it was.

use kiln_model::channel::{Action, Chain, Entry, Record, VERSION};
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::Place;
use kiln_store::revoke::revoked;

use super::App;
use super::promote::{expectation, tell, unexpected};
use crate::actor::{Signer, now};
use crate::cli::Rollback;
use crate::followers;

pub(super) async fn run(app: &App, arguments: &Rollback) -> Result<u8> {
    let to: Reference = arguments.channel.parse()?;
    let channel = super::history::channel_of(&to)?;
    let expected = arguments.expect.as_deref().map(expectation).transpose()?;
    let signer = Signer::open(arguments.key.as_deref(), &arguments.password, &app.output.reports())?;
    let place = app.place(&to)?;
    let chain = place.channels().history(&to.name, channel).await?;
    if chain.entries.is_empty() {
        // Says which channels there are.
        place.resolve(&to).await?;
    }
    let back = match &arguments.to {
        Some(reference) => named(app, &*place, &to, &chain, reference, arguments.allow_revoked).await?,
        None => before(app, &*place, &to, &chain, arguments.allow_revoked).await?,
    };
    let store = app.store()?;
    store.protect(&back.record().image)?;
    if let Err(error) = place.manifest(&back.record().image).await {
        let what =
            format!("{} ({}), to which {to} would go back, is not at {} any more", back.record().from, back.record().image, place.label());
        return Err(Error::new(error.kind(), what).because(error).next("bring it back, or name another state with --to"));
    }
    let next = |now_there: &Chain| -> Result<Option<Entry>> {
        let head = now_there.head().map(|head| head.record().image);
        if let Some(expected) = &expected
            && *expected != head
        {
            return Err(unexpected(&to, now_there, expected.as_ref()));
        }
        // What goes back was decided by looking at this state.
        if now_there.head().map(Entry::digest) != chain.head().map(Entry::digest) {
            return Err(unexpected(&to, now_there, chain.head().map(|head| &head.record().image)));
        }
        if head == Some(back.record().image) {
            return Ok(None);
        }
        let (seq, previous) = now_there.next();
        let record = Record {
            v: VERSION,
            name: to.name.clone(),
            channel: channel.to_owned(),
            seq,
            previous,
            image: back.record().image,
            from: back.record().from.clone(),
            action: Action::Rollback,
            time: now(),
            actor: signer.actor(),
            reason: arguments.reason.clone(),
            evidence: back.record().evidence.clone(),
            policy: None,
        };
        signer.record(record).map(Some)
    };
    let appended = place.channels().append(&to.name, channel, &next).await?;
    // Nothing that follows the channel holds it back.
    let followed = followers::follow(&*place, &to).await;
    match appended {
        Some(appended) => tell(app, &to, chain.head(), &appended, followed),
        None => {
            let mut said = serde_json::json!({ "channel": to.to_string(), "changed": false, "digest": back.record().image });
            followers::add_to(&mut said, followed.as_ref());
            app.output.result(&said, || format!("{to} is {} already", back.record().from));
            followers::end(followed, &to, app.output.is_json())
        }
    }
}

/// The last state before this one whose image was not revoked.
async fn before(app: &App, place: &dyn Place, to: &Reference, chain: &Chain, allow_revoked: bool) -> Result<Entry> {
    let path = chain.path();
    let head = chain.head().map(|head| head.record().image);
    let mut passed = Vec::new();
    for entry in path.iter().rev().filter(|entry| Some(entry.record().image) != head) {
        let record = entry.record();
        match is_revoked(place, &record.image, allow_revoked).await? {
            None => {
                passed.iter().for_each(|note: &String| app.output.reports().note(note));
                return Ok((*entry).clone());
            }
            Some(why) => passed.push(format!("{} is passed over: {why}", record.from)),
        }
    }
    let mut error = Error::new(Code::NotFound, format!("{to} has no state before this one to go back to"))
        .next("promote another image, or name one that the channel was at with --to");
    for note in passed {
        error = error.detail(note);
    }
    Err(error)
}

/// The state that `--to` names: a reference, or the number of a record.
async fn named(app: &App, place: &dyn Place, to: &Reference, chain: &Chain, text: &str, allow_revoked: bool) -> Result<Entry> {
    let number = text.parse::<u64>().ok();
    let digest = match number {
        Some(_) => None,
        None => {
            let mut reference: Reference = text.parse()?;
            // `web:1.4.0` means the one at the place of the channel.
            if reference.registry.is_none() && to.registry.is_some() {
                reference = Reference { registry: to.registry.clone(), name: to.name.clone(), ..reference };
            }
            Some(app.place(&reference)?.resolve(&reference).await?)
        }
    };
    let wanted = |entry: &&Entry| Some(entry.record().seq) == number || Some(entry.record().image) == digest;
    let Some(entry) = chain.entries.iter().rev().find(wanted) else {
        let Pointer::Channel(channel) = &to.pointer else { return Err(Error::new(Code::Usage, format!("{to} is no channel"))) };
        let next = format!("`kiln promote {text} --to {channel}` goes on to it; `kiln history {to}` lists where the channel was");
        return Err(Error::new(Code::Usage, format!("{to} was never at {text}")).next(next));
    };
    match is_revoked(place, &entry.record().image, allow_revoked).await? {
        None => Ok(entry.clone()),
        Some(why) => {
            Err(Error::new(Code::Refused, format!("{to} cannot go back to {text}: {why}")).next("--allow-revoked goes there all the same"))
        }
    }
}

async fn is_revoked(place: &dyn Place, digest: &Digest, allow: bool) -> Result<Option<String>> {
    if allow {
        return Ok(None);
    }
    match revoked(place, digest).await {
        Ok(None) => Ok(None),
        Ok(Some(revoked)) if revoked.image == *digest => Ok(Some(format!("it was revoked: {}", revoked.why))),
        Ok(Some(revoked)) => Ok(Some(format!("it was baked from {}, which was revoked: {}", revoked.image, revoked.why))),
        // Whoever goes back to it is told that it is gone.
        Err(error) if error.kind() == Code::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
