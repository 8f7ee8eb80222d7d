//! What is known of an image, and the policies that decide on it.
//!
//! Deciding is `kiln_evidence`'s and asks nobody; here everything that it has
//! to be told is collected, from where the image and the channel are.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_evidence::dsse::Envelope;
use kiln_evidence::policy::{Base, Require, SIGNED, check};
use kiln_evidence::{Facts, Policy, PublicKey, Subject, Unmet};
use kiln_model::channel::Signed;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::settings::parse_duration;
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::place::{Held, Place};

use crate::cli::Conditions;
use crate::evidence::{find, mark};
use crate::signing::public_key;

/// A channel's policy, read and checked.
pub(crate) struct Binding {
    pub(crate) policy: Policy,
    /// What a record names.
    pub(crate) digest: Digest,
    /// Id of the key that signed it, as the envelope has it.
    pub(crate) signer: String,
    pub(crate) text: String,
}

/// The policy of a channel. It has to be signed, with one of `keys` when some
/// are given.
pub(crate) async fn policy(place: &dyn Place, channel: &Reference, keys: &[PublicKey]) -> Result<Option<Binding>> {
    let Pointer::Channel(of) = &channel.pointer else { return Ok(None) };
    let Some(Signed { text, signature }) = place.channels().policy(&channel.name, of).await? else {
        if keys.is_empty() {
            return Ok(None);
        }
        return Err(Error::new(Code::Refused, format!("{channel} has no policy"))
            .next("without --policy-key a channel without a policy is good; `kiln policy set` gives it one"));
    };
    let wrong = |why: String| {
        Error::new(Code::Refused, format!("the policy of {channel} cannot be used: {why}"))
            .next(format!("whoever answers for it sets it again: `kiln policy set {channel} FILE --key KEY`"))
    };
    let policy = Policy::parse(&format!("of {channel}"), &text)?;
    let envelope: Envelope = serde_json::from_value(signature).map_err(|error| wrong(format!("its signature is none: {error}")))?;
    if envelope.payload_type() != SIGNED || envelope.payload().map_err(|failure| wrong(failure.to_string()))? != text.as_bytes() {
        return Err(wrong("it is not what was signed".to_owned()));
    }
    let signer = signer(&envelope).ok_or_else(|| wrong("it is not signed".to_owned()))?;
    if !keys.is_empty() {
        envelope.verify(keys).map_err(|failure| wrong(failure.to_string()))?;
    }
    if !policy.is_for(&channel.name, of) {
        let other = policy.channel.clone().unwrap_or_default();
        return Err(wrong(format!("it is for {other}")));
    }
    let digest = Digest::of(&text);
    Ok(Some(Binding { policy, digest, signer, text }))
}

/// The key that an envelope says it was signed with.
pub(crate) fn signer(envelope: &Envelope) -> Option<String> {
    let value = serde_json::to_value(envelope).ok()?;
    Some(value.pointer("/signatures/0/keyid")?.as_str()?.to_owned())
}

/// The conditions of a command line as a policy.
pub(crate) fn conditions(given: &Conditions) -> Result<Option<Policy>> {
    let mut keys = BTreeMap::new();
    for path in &given.signature {
        keys.insert(path.display().to_string(), public_key(path)?);
    }
    let age = |text: &String| {
        parse_duration(text)
            .ok_or_else(|| Error::new(Code::Usage, format!("`--require-age {text}` is no length of time")).next("write 30d or 12h"))
    };
    let require = Require {
        signed_by: keys.keys().cloned().collect(),
        statements_by: Vec::new(),
        tests_passed: given.tests,
        hygiene_clean: given.hygiene,
        converged: given.converged,
        source: given.source.clone(),
        max_age: given.age.as_ref().map(age).transpose()?,
        base_current: given.current_base,
        came_through: given.channels.clone(),
    };
    Ok((require != Require::default()).then_some(Policy { channel: None, keys, require, followers: Vec::new() }))
}

/// An image to be decided on.
pub(crate) struct Candidate<'a> {
    /// Where it and the channel are.
    pub(crate) place: &'a dyn Place,
    /// The store of this machine, which may know the base.
    pub(crate) store: &'a dyn Place,
    /// What it was called.
    pub(crate) asked: &'a Reference,
    /// Digest of the manifest that the channel would point to.
    pub(crate) digest: Digest,
    /// The image, or one for each architecture.
    pub(crate) images: &'a [Held],
    /// The channel.
    pub(crate) channel: &'a Reference,
}

impl Candidate<'_> {
    /// Every condition that does not hold, of all these policies.
    pub(crate) async fn unmet(&self, policies: &[&Policy]) -> Result<Vec<Unmet>> {
        let mut unmet: Vec<Unmet> = Vec::new();
        for image in self.images {
            // Whatever a policy asks for: what its own tests have found wanting
            // goes nowhere.
            if let Some(why) = self.mark(image).await? {
                unmet.push(Unmet { condition: "tests", why });
            }
            for policy in policies {
                let facts = self.facts(policy, image).await?;
                let architecture = |mut condition: Unmet| {
                    if self.images.len() > 1 {
                        condition.why = format!("{} ({})", condition.why, image.config.architecture);
                    }
                    condition
                };
                unmet.extend(check(policy, &facts).into_iter().map(architecture));
            }
        }
        unmet.dedup();
        Ok(unmet)
    }

    /// Why an image is marked as failed. What is attached to an index is about
    /// all of its images.
    async fn mark(&self, image: &Held) -> Result<Option<String>> {
        let own = mark(self.place, &image.digest).await?;
        if own.is_some() || image.digest == self.digest { Ok(own) } else { mark(self.place, &self.digest).await }
    }

    async fn facts(&self, policy: &Policy, image: &Held) -> Result<Facts> {
        let keys = policy.public_keys();
        let mut evidence = find(self.place, &Subject::asked(image.digest, self.asked), &keys).await?;
        // What is attached to an index is about all of its images.
        if image.digest != self.digest {
            evidence.extend(find(self.place, &Subject::asked(self.digest, self.asked), &keys).await?);
        }
        let mut channels = Vec::new();
        for channel in &policy.require.came_through {
            let history = self.place.channels().history(&self.channel.name, channel).await?;
            if history.entries.iter().any(|entry| entry.record().image == self.digest) {
                channels.push(channel.clone());
            }
        }
        let base = if policy.require.base_current { self.base(image).await? } else { Base::Unknown("nobody asked".into()) };
        let created = image.manifest.annotations.get(kiln_model::image::CREATED);
        Ok(Facts { now: jiff::Timestamp::now(), evidence, baked: created.and_then(|text| text.parse().ok()), base, channels })
    }

    /// Whether the image's base is still the newest of its name.
    async fn base(&self, image: &Held) -> Result<Base> {
        let Some(disk) = image.config.base else { return Ok(Base::Unknown("it does not say what it was baked from".into())) };
        let mut newer = Vec::new();
        for digest in self.store.with_disk(&disk).await? {
            let Ok(bases) = kiln_store::place::images_of(self.store, &digest).await else { continue };
            for base in bases {
                let name = base.config.name;
                let mut pointers = vec![Pointer::Tag(None)];
                pointers.extend(self.store.channels().list(&name).await?.into_iter().map(Pointer::Channel));
                for pointer in pointers {
                    let reference = Reference { registry: None, name: name.clone(), pointer };
                    let Ok(newest) = self.store.resolve(&reference).await else { continue };
                    let images = kiln_store::place::images_of(self.store, &newest).await?;
                    if images.iter().any(|image| image.config.as_base() == Some(disk)) {
                        return Ok(Base::Current);
                    }
                    newer.push(format!("{reference} is {newest} now"));
                }
            }
        }
        newer.dedup();
        Ok(match newer.is_empty() {
            true => Base::Unknown(format!("no image of this store has the disk {disk} that it was baked from")),
            false => Base::Outdated(newer.join(", ")),
        })
    }
}

/// The refusal that names every condition.
pub(crate) fn refusal(what: &str, unmet: &[Unmet], next: &str) -> Error {
    let count = if unmet.len() == 1 { "one condition does not hold".to_owned() } else { format!("{} conditions do not hold", unmet.len()) };
    let list: Vec<String> = unmet.iter().map(ToString::to_string).collect();
    Error::new(Code::Refused, format!("{what}: {count}: {}", list.join("; "))).detail(list.join("\n")).next(next)
}

/// Public keys of files.
pub(crate) fn public_keys<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<PublicKey>> {
    paths.iter().map(|path| public_key(path.as_ref())).collect()
}
