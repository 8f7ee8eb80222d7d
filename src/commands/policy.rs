//! `kiln policy`: what a channel requires of an image.
//!
//! A policy is a signed file beside the channel, never part of a template: who
//! bakes must not approve.

use kiln_evidence::Policy as Rules;
use kiln_model::channel::Signed;
use kiln_model::reference::Reference;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_store::place::images_of;
use serde_json::json;

use super::App;
use super::history::channel_of;
use crate::cli::{Policy, PolicyCheck, PolicySet, PolicyShow};
use crate::facts::{self, Candidate, public_keys};
use crate::signing::key_to_sign;

pub(super) async fn run(app: &App, arguments: &Policy) -> Result<u8> {
    match arguments {
        Policy::Show(arguments) => show(app, arguments).await,
        Policy::Set(arguments) => set(app, arguments).await,
        Policy::Check(arguments) => check(app, arguments).await,
    }
}

async fn show(app: &App, arguments: &PolicyShow) -> Result<u8> {
    let channel: Reference = arguments.channel.parse()?;
    channel_of(&channel)?;
    let place = app.place(&channel)?;
    let Some(policy) = facts::policy(&*place, &channel, &public_keys(&arguments.policy_keys)?).await? else {
        return Err(Error::new(Code::NotFound, format!("{channel} has no policy"))
            .next(format!("`kiln policy set {channel} FILE --key KEY` gives it one")));
    };
    let value = json!({ "channel": channel.to_string(), "digest": policy.digest, "key": policy.signer, "policy": policy.text });
    app.output.result(&value, || {
        let verified = if arguments.policy_keys.is_empty() { "says that it is signed with" } else { "is signed with" };
        format!("{}\n# {} {verified} the key {}", policy.text.trim_end(), policy.digest, policy.signer)
    });
    Ok(0)
}

async fn set(app: &App, arguments: &PolicySet) -> Result<u8> {
    let channel: Reference = arguments.channel.parse()?;
    let of = channel_of(&channel)?;
    let path = arguments.file.display().to_string();
    let text = std::fs::read_to_string(&arguments.file).trying(|| format!("read {path}"))?;
    let rules = Rules::parse(&path, &text)?;
    if !rules.is_for(&channel.name, of) {
        let other = rules.channel.unwrap_or_default();
        return Err(Error::new(Code::Usage, format!("{path} is for {other}, not for {}@{of}", channel.name)));
    }
    let key = key_to_sign(arguments.key.as_deref(), &arguments.password, &app.output.reports())?;
    let place = app.place(&channel)?;
    if let Some(there) = place.channels().policy(&channel.name, of).await? {
        let own = [key.public().clone()];
        let signature = serde_json::to_vec(&there.signature).trying(|| "read a signature".into())?;
        if !arguments.replace_key
            && let Err(why) = Rules::signers(&there.text, &signature, &own)
        {
            let what = format!("the policy that {channel} has was not signed with this key: {why}");
            return Err(Error::new(Code::Refused, what)
                .next("sign with the same key, or add --replace-key if this key is to answer for it from now on"));
        }
    }
    if rules.channel.is_none() {
        app.output.reports().note(format!(
            "it does not say `channel = \"{}@{of}\"`, so whoever may write there could put it beside another channel",
            channel.name
        ));
    }
    let signature = serde_json::from_slice(&Rules::sign(&text, &key)?).trying(|| "sign the policy".into())?;
    let digest = Digest::of(&text);
    place.channels().set_policy(&channel.name, of, &Signed { text, signature }).await?;
    app.output.result(&json!({ "channel": channel.to_string(), "digest": digest, "key": key.id() }), || {
        format!("{channel} has a new policy\n  digest  {digest}\n  key     {}", key.id())
    });
    Ok(0)
}

async fn check(app: &App, arguments: &PolicyCheck) -> Result<u8> {
    let channel: Reference = arguments.channel.parse()?;
    channel_of(&channel)?;
    let asked: Reference = arguments.image.as_deref().unwrap_or(&arguments.channel).parse()?;
    let place = app.place(&channel)?;
    let digest = app.place(&asked)?.resolve(&asked).await?;
    let images = images_of(&*place, &digest).await?;
    let policy = facts::policy(&*place, &channel, &public_keys(&arguments.policy_keys)?).await?;
    let conditions = facts::conditions(&arguments.require)?;
    let rules: Vec<&Rules> = policy.iter().map(|policy| &policy.policy).chain(&conditions).collect();
    if rules.is_empty() {
        return Err(Error::new(Code::NotFound, format!("{channel} has no policy")).next("add conditions such as --require-tests"));
    }
    let store = app.store()?;
    let candidate = Candidate { place: &*place, store: &store, asked: &asked, digest, images: &images, channel: &channel };
    let unmet = candidate.unmet(&rules).await?;
    if !unmet.is_empty() {
        return Err(facts::refusal(
            &format!("{asked} is not what {channel} requires"),
            &unmet,
            "`kiln verify REF --key FILE` shows what is attached to it",
        ));
    }
    let value = json!({ "channel": channel.to_string(), "image": asked.to_string(), "digest": digest, "policy": policy.as_ref().map(|policy| policy.digest) });
    app.output.result(&value, || format!("{asked} is what {channel} requires\n  digest  {digest}"));
    Ok(0)
}
