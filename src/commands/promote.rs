//! `kiln promote`: moves a channel on to an image that fulfils its policy.

use kiln_model::channel::{Action, Chain, Entry, Record, VERSION};
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::place::{Held, images_of};
use serde_json::{Value, json};

use super::App;
use super::history::record_json;
use crate::actor::{Signer, now};
use crate::cli::Promote;
use crate::facts::{self, Candidate, public_keys};
use crate::followers::{self, Followed, Followers};
use crate::image_base::refuse_revoked;
use crate::network;
use crate::output::table;

pub(super) async fn run(app: &App, arguments: &Promote) -> Result<u8> {
    let from: Reference = arguments.reference.parse()?;
    let to = target(&from, &arguments.to)?;
    let Pointer::Channel(channel) = &to.pointer else { return Err(no_channel(&arguments.to)) };
    let expected = arguments.expect.as_deref().map(expectation).transpose()?;
    let signer = Signer::open(arguments.key.as_deref(), &arguments.password, &app.output.reports())?;
    let source = app.place(&from)?;
    let digest = source.resolve(&from).await?;
    let place = app.place(&to)?;
    // Until the record is written `prune` must not take it away.
    let store = app.store()?;
    store.protect(&digest)?;
    refuse_revoked(&*source, &from, &digest, arguments.allow_revoked, &app.output.reports()).await?;
    let repository = |reference: &Reference| reference.registry.as_ref().map(|host| (host.clone(), reference.name.clone()));
    if repository(&from) != repository(&to) {
        network::carry(&app.home, &app.registry()?, &store, &digest, (&from, &to), &app.output.reports()).await?;
        // It may have been revoked there.
        refuse_revoked(&*place, &from, &digest, arguments.allow_revoked, &app.output.reports()).await?;
    }
    let images = images_of(&*place, &digest).await?;
    let policy = facts::policy(&*place, &to, &public_keys(&arguments.policy_keys)?).await?;
    let conditions = facts::conditions(&arguments.require)?;
    let rules: Vec<_> = policy.iter().map(|policy| &policy.policy).chain(&conditions).collect();
    let candidate = Candidate { place: &*place, store: &store, asked: &from, digest, images: &images, channel: &to };
    let unmet = candidate.unmet(&rules).await?;
    if !unmet.is_empty() {
        let next = format!("`kiln verify {from} --key FILE` shows what is attached to it; bake, test or sign what is missing");
        return Err(facts::refusal(&format!("{from} is not promoted to {to}"), &unmet, &next));
    }
    let followers = match &policy {
        Some(policy) => Followers::of(&to, &policy.policy.followers).await?,
        None => None,
    };
    if let Some(followers) = &followers {
        followers.check(&images).await?;
    }
    let mut evidence: Vec<Digest> = place.attached(&digest).await?.into_iter().map(|attached| attached.digest).collect();
    evidence.sort();
    let policy = policy.map(|policy| policy.digest);
    if from.registry.is_none() || to.registry.is_none() {
        fix(&store, &images)?;
    }

    let name = to.name.clone();
    let from = called(&from, &images);
    let next = |chain: &Chain| -> Result<Option<Entry>> {
        let head = chain.head().map(|head| head.record().image);
        if let Some(expected) = &expected
            && *expected != head
        {
            return Err(unexpected(&to, chain, expected.as_ref()));
        }
        if head == Some(digest) {
            return Ok(None);
        }
        let (seq, previous) = chain.next();
        let record = Record {
            v: VERSION,
            name: name.clone(),
            channel: channel.clone(),
            seq,
            previous,
            image: digest,
            from: from.clone(),
            action: Action::Promote,
            time: now(),
            actor: signer.actor(),
            reason: arguments.reason.clone(),
            evidence: evidence.clone(),
            policy,
        };
        signer.record(record).map(Some)
    };
    let before = place.channels().head(&name, channel).await?;
    let appended = place.channels().append(&name, channel, &next).await?;
    let followed = match &followers {
        Some(followers) => Some(followers.set(&*place).await),
        None => None,
    };
    let Some(appended) = appended else {
        let mut said = json!({ "channel": to.to_string(), "changed": false, "digest": digest });
        followers::add_to(&mut said, followed.as_ref());
        let rows = rows(followed.as_ref());
        app.output.result(&said, || format!("{to} is {from} already\n  digest  {digest}\n{}", table(&rows)));
        return followers::end(followed, &to, app.output.is_json());
    };
    tell(app, &to, before.as_ref(), &appended, followed)
}

/// What followers say, for people.
fn rows(followed: Option<&Result<Followed>>) -> Vec<Vec<String>> {
    followed.and_then(|followed| followed.as_ref().ok()).map(Followed::rows).unwrap_or_default()
}

/// What a channel is now, and was, and what came of its followers.
pub(super) fn tell(
    app: &App,
    to: &Reference,
    before: Option<&Entry>,
    appended: &kiln_model::channel::Appended,
    followed: Option<Result<Followed>>,
) -> Result<u8> {
    let reports = app.output.reports();
    appended.notes.iter().for_each(|note| reports.warn(note));
    let record = appended.entry.record();
    let mut value = json!({ "channel": to.to_string(), "changed": true, "digest": record.image });
    if let Some(object) = value.as_object_mut() {
        object.insert("was".into(), before.map_or(Value::Null, |before| json!(before.record().image)));
        object.insert("record".into(), record_json(&appended.entry));
    }
    followers::add_to(&mut value, followed.as_ref());
    app.output.result(&value, || {
        let mut all = vec![
            vec!["  digest".to_owned(), record.image.to_string()],
            vec!["  record".to_owned(), format!("{} by {}", record.seq, record.actor)],
        ];
        if let Some(before) = before {
            all.push(vec!["  was".to_owned(), format!("{} {}", before.record().from, before.record().image)]);
        }
        all.extend(rows(followed.as_ref()));
        format!("{to} is {} now\n{}", record.from, table(&all))
    });
    followers::end(followed, to, app.output.is_json())
}

/// The channel that `--to` names: `production`, of what is promoted, or with a
/// name or a repository of its own.
fn target(from: &Reference, to: &str) -> Result<Reference> {
    if !to.contains(['@', ':', '/']) {
        return format!("{}@{to}", Reference { pointer: Pointer::Tag(None), ..from.clone() }).parse();
    }
    to.parse()
}

fn no_channel(to: &str) -> Error {
    Error::new(Code::Usage, format!("`{to}` is no channel"))
        .next("write --to CHANNEL, --to NAME@CHANNEL or --to HOST/NAMESPACE/NAME@CHANNEL")
}

/// The digest that a channel is expected to be at; none for one that is new.
pub(super) fn expectation(text: &str) -> Result<Option<Digest>> {
    if text == "none" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        Error::new(Code::Usage, format!("`--expect {text}`: this is no digest"))
            .next("write the digest that the channel is at (sha256:…), or `none` for a channel that is not there yet")
    })
}

/// The channel is elsewhere than was expected.
pub(super) fn unexpected(to: &Reference, chain: &Chain, expected: Option<&Digest>) -> Error {
    let expected = expected.map_or_else(|| "no such channel was expected".to_owned(), |digest| format!("{digest} was expected"));
    let what = match chain.head().map(Entry::record) {
        Some(head) => format!("{to} is at {} since record {} by {}; {expected}", head.image, head.seq, head.actor),
        None => format!("there is no channel {to} yet; {expected}"),
    };
    Error::new(Code::Refused, what).next(format!("look at `kiln history {to}`, and try again if it is still right"))
}

/// What the image is called in the record: its version where the reference
/// leaves that open.
fn called(from: &Reference, images: &[Held]) -> String {
    match (&from.pointer, images.first()) {
        (Pointer::Tag(None), Some(image)) => {
            let pointer = Pointer::Tag(Some(image.config.version.clone()));
            Reference { pointer, ..from.clone() }.to_string()
        }
        _ => from.to_string(),
    }
}

/// From now on the image's version is that image for ever.
fn fix(store: &kiln_store::Store, images: &[Held]) -> Result<()> {
    for image in images {
        let version =
            Reference { registry: None, name: image.config.name.clone(), pointer: Pointer::Tag(Some(image.config.version.clone())) };
        match store.resolve(&version) {
            Ok(there) if there == image.digest => store.fix(&version, "promoted")?,
            Ok(_) => {}
            Err(error) if error.kind() == Code::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
