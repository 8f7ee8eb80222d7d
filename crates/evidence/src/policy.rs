//! Policies: what has to be true of an image before a channel may point to it.
//!
//! ```toml
//! channel = "web@production"          # optional: where this policy holds
//! followers = ["ssm:eu-central-1:/images/web/production/{arch}"]   # optional
//!
//! [keys]
//! release = '''
//! -----BEGIN PUBLIC KEY-----
//! …
//! -----END PUBLIC KEY-----
//! '''
//!
//! [require]
//! signed_by = ["release"]             # signed by one of these keys
//! statements_by = ["ci"]              # whose statements count; else those of all [keys]
//! tests_passed = true
//! hygiene_clean = true
//! converged = true
//! source = ["https://github.com/acme/shop"]
//! max_age = "30d"
//! base_current = true
//! came_through = ["staging"]
//! ```
//!
//! A policy says whose word counts: what is claimed of tests, hygiene and source
//! counts when one of its keys has signed it. Only a policy that names no key
//! at all believes what nobody has signed.
//!
//! Deciding has no side effects and asks nobody: [`check`] is told everything as
//! [`Facts`], so that whoever promotes and whoever consumes decide alike.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::channel::Follower;
use kiln_model::reference::{check_channel, check_name};
use kiln_model::settings::{nearest, parse_duration};
use kiln_model::{Code, Digest, Error, Result};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::dsse::Envelope;
use crate::examine::{Examined, What};
use crate::failure::Failure;
use crate::keys::{PrivateKey, PublicKey};
use crate::provenance::BUILD_TYPE;
use crate::verdict;

/// Payload type of a signed policy.
pub const SIGNED: &str = "application/vnd.kiln.policy.v1+toml";

/// How far ahead the clock of the machine that baked may be.
const CLOCKS: Duration = Duration::from_secs(300);

/// A policy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// `name@channel` where it holds, when it says so.
    pub channel: Option<String>,
    /// The keys that it knows, by name.
    pub keys: BTreeMap<String, PublicKey>,
    /// What it requires.
    pub require: Require,
    /// What follows the channel.
    pub followers: Vec<Follower>,
}

/// What a policy requires.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Require {
    /// A signature by one of these keys, by name. Empty: none is required.
    pub signed_by: Vec<String>,
    /// Statements count when one of these keys signed them, by name. Empty:
    /// one of all the policy's keys.
    pub statements_by: Vec<String>,
    /// That the tests have passed.
    pub tests_passed: bool,
    /// That the hygiene check found nothing.
    pub hygiene_clean: bool,
    /// That one run of the tools that configured it was proved to be enough.
    pub converged: bool,
    /// Provenance from one of these repositories, by URL. Empty: from anywhere.
    pub source: Vec<String>,
    /// That it was baked not longer ago.
    pub max_age: Option<Duration>,
    /// That its base is the newest there is.
    pub base_current: bool,
    /// Channels that have pointed to it, all of them.
    pub came_through: Vec<String>,
}

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Now.
    pub now: Timestamp,
    /// What is attached to it, examined with [`Policy::public_keys`].
    pub evidence: Vec<Examined>,
    /// When it was baked, as its manifest says. What the signatures are of.
    pub baked: Option<Timestamp>,
    /// Whether its base is current.
    pub base: Base,
    /// The channels of its name that point to it or have done so.
    pub channels: Vec<String>,
}

/// Whether an image's base is the newest there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// It is.
    Current,
    /// It is not; says what is newer.
    Outdated(String),
    /// That cannot be told; says why.
    Unknown(String),
}

/// A condition that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet {
    /// The condition, as a policy names it.
    pub condition: &'static str,
    /// Why it does not hold.
    pub why: String,
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.condition, self.why)
    }
}

impl Policy {
    /// Reads a policy; `name` is what people know the file by.
    ///
    /// # Errors
    /// [`Code::Usage`] with every mistake and its line.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut parser = Parser { text, mistakes: Vec::new() };
        let policy = parser.policy();
        let mut mistakes = parser.mistakes;
        if mistakes.is_empty() {
            return Ok(policy);
        }
        mistakes.sort();
        let line = |at: usize| 1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count();
        let list: Vec<String> = mistakes.iter().map(|(at, what)| format!("{name}:{}: {what}", line(*at))).collect();
        let count = if list.len() == 1 { "a mistake".to_owned() } else { format!("{} mistakes", list.len()) };
        Err(Error::new(Code::Usage, format!("the policy {name} has {count}"))
            .detail(list.join("\n"))
            .next("docs/evidence.md describes policies"))
    }

    /// Whether it holds for `name@channel`: it says so, or says nothing.
    pub fn is_for(&self, name: &str, channel: &str) -> bool {
        self.channel.as_ref().is_none_or(|own| *own == format!("{name}@{channel}"))
    }

    /// All its keys, to examine evidence with.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.keys.values().cloned().collect()
    }

    /// Ids of the keys with these names, or of all keys when there are none.
    fn ids(&self, names: &[String]) -> Vec<Digest> {
        let wanted = |(name, _): &(&String, &PublicKey)| names.is_empty() || names.contains(name);
        self.keys.iter().filter(wanted).map(|(_, key)| key.id()).collect()
    }

    /// The signature over a policy's text: a DSSE envelope in JSON.
    ///
    /// # Errors
    /// Never, unless kiln itself is broken.
    pub fn sign(text: &str, key: &PrivateKey) -> Result<Vec<u8>> {
        let envelope = Envelope::sign(SIGNED, text.as_bytes(), key).to_json();
        envelope.map_err(|failure| Error::new(Code::Failed, "the policy cannot be signed").because(failure))
    }

    /// Which of `keys` have signed a policy's text.
    ///
    /// # Errors
    /// Why the signature does not count.
    pub fn signers(text: &str, signature: &[u8], keys: &[PublicKey]) -> Result<Vec<Digest>, Failure> {
        let envelope = Envelope::parse(signature)?;
        let (payload, signers) = envelope.verify(keys)?;
        if envelope.payload_type() != SIGNED {
            return Err(Failure::malformed("what is signed is no policy"));
        }
        if payload == text.as_bytes() { Ok(signers) } else { Err(Failure::Payload) }
    }
}

/// Every condition of `policy` that does not hold.
pub fn check(policy: &Policy, facts: &Facts) -> Vec<Unmet> {
    let mut unmet = Vec::new();
    let require = &policy.require;
    let mut add = |condition, why: Option<String>| unmet.extend(why.map(|why| Unmet { condition, why }));
    if !require.signed_by.is_empty() {
        add("signed_by", unsigned(policy, facts));
    }
    let trusted = policy.ids(&require.statements_by);
    let statements = Statements { trusted: &trusted, all: &facts.evidence };
    if require.tests_passed {
        add("tests_passed", statements.unless_passed());
    }
    if require.hygiene_clean {
        let result = |what: &What| if let What::Hygiene(result) = what { Some(result.clone()) } else { None };
        add("hygiene_clean", statements.unless("CLEAN", "hygiene report", result));
    }
    if require.converged {
        let result = |what: &What| if let What::Convergence(result) = what { Some(result.clone()) } else { None };
        add("converged", statements.unless("CONVERGED", "proof of convergence", result));
    }
    if !require.source.is_empty() {
        add("source", foreign(&require.source, &statements));
    }
    if let Some(limit) = require.max_age {
        add("max_age", too_old(limit, facts));
    }
    if require.base_current {
        add(
            "base_current",
            match &facts.base {
                Base::Current => None,
                Base::Outdated(why) => Some(why.clone()),
                Base::Unknown(why) => Some(format!("it cannot be told: {why}")),
            },
        );
    }
    let missed: Vec<&str> = require.came_through.iter().filter(|wanted| !facts.channels.contains(wanted)).map(String::as_str).collect();
    if !missed.is_empty() {
        add("came_through", Some(format!("it never was in {}", missed.join(", "))));
    }
    unmet
}

/// Why there is no signature by the keys that are wanted.
fn unsigned(policy: &Policy, facts: &Facts) -> Option<String> {
    let wanted = policy.ids(&policy.require.signed_by);
    let signatures: Vec<&Examined> = facts.evidence.iter().filter(|examined| matches!(examined.what, What::Signature(_))).collect();
    if signatures.iter().any(|signature| signature.is_signed_by(&wanted)) {
        return None;
    }
    let names = policy.require.signed_by.join(" or ");
    let mut others: Vec<String> = signatures
        .iter()
        .map(|signature| match signature.failures.first() {
            Some(failure) => failure.to_string(),
            None => {
                let by = policy.keys.iter().find(|(_, key)| signature.signers.contains(&key.id()));
                format!("it was signed by {}", by.map_or("another key", |(name, _)| name))
            }
        })
        .collect();
    others.dedup();
    Some(match others.is_empty() {
        true => format!("it has no signature; one by {names} is required"),
        false => format!("no signature by {names}: {}", others.join("; ")),
    })
}

/// The statements about an image, and whose count.
struct Statements<'a> {
    trusted: &'a [Digest],
    all: &'a [Examined],
}

impl Statements<'_> {
    /// Whether a statement counts, or why not.
    fn counts(&self, examined: &Examined) -> Result<(), String> {
        match examined.failures.first() {
            Some(failure) => Err(failure.to_string()),
            None if self.trusted.is_empty() || examined.is_signed_by(self.trusted) => Ok(()),
            None if !examined.signed => Err("nobody has signed it".to_owned()),
            None => Err("another key than those whose statements count has signed it".to_owned()),
        }
    }

    /// Why what they say of something is not `good`: all that count have to
    /// agree.
    fn unless(&self, good: &str, noun: &str, result: impl Fn(&What) -> Option<String>) -> Option<String> {
        let (mut found, mut ignored) = (false, None);
        for examined in self.all {
            let Some(says) = result(&examined.what) else { continue };
            match self.counts(examined) {
                Ok(()) if says == good => found = true,
                Ok(()) => return Some(format!("the {noun} says {}", says.to_lowercase())),
                Err(why) => ignored = Some(why),
            }
        }
        match ignored {
            _ if found => None,
            Some(why) => Some(format!("the {noun} does not count: {why}")),
            None => Some(format!("it has no {noun}")),
        }
    }
}

impl Statements<'_> {
    /// Why the tests have not passed: of each suite the newest result that
    /// counts has to say that they did.
    fn unless_passed(&self) -> Option<String> {
        let results = self.all.iter().filter_map(|examined| match &examined.what {
            What::Tests(verdict) => Some((verdict, self.counts(examined))),
            _ => None,
        });
        let (mut counted, mut ignored) = (Vec::new(), None);
        for (verdict, counts) in results {
            match counts {
                Ok(()) => counted.push(verdict),
                Err(why) => ignored = Some(why),
            }
        }
        let newest = verdict::newest(counted);
        match (newest.iter().find(|verdict| !verdict.passed()), ignored) {
            (Some(bad), _) => Some(format!("the result of tests says {bad}")),
            (None, _) if !newest.is_empty() => None,
            (None, Some(why)) => Some(format!("the result of tests does not count: {why}")),
            (None, None) => Some("it has no result of tests".to_owned()),
        }
    }
}

/// Why no provenance is from one of the repositories.
fn foreign(wanted: &[String], statements: &Statements<'_>) -> Option<String> {
    let mut why = None;
    for examined in statements.all {
        let What::Provenance(provenance) = &examined.what else { continue };
        let problem = match (statements.counts(examined), &provenance.repository) {
            (Err(not), _) => format!("its provenance does not count: {not}"),
            _ if provenance.build_type != BUILD_TYPE => format!("its provenance is of another kind of build, {}", provenance.build_type),
            (_, None) => "its provenance names no repository".to_owned(),
            (_, Some(is)) if !wanted.iter().any(|wanted| same_repository(wanted, is)) => format!("it was baked from {is}"),
            (_, Some(is)) if provenance.dirty => format!("it was baked from {is}, with changes that are in no commit"),
            _ => return None,
        };
        why = Some(problem);
    }
    Some(why.unwrap_or_else(|| "it has no provenance".to_owned()))
}

fn too_old(limit: Duration, facts: &Facts) -> Option<String> {
    let Some(baked) = facts.baked else { return Some("nothing says when it was baked".to_owned()) };
    let age = facts.now.duration_since(baked);
    if age.is_negative() {
        return (age.unsigned_abs() > CLOCKS).then(|| format!("it says that it was baked in the future, at {baked}"));
    }
    let days = |length: Duration| match length.as_secs() {
        seconds if seconds >= 2 * 86_400 => format!("{} days", seconds / 86_400),
        seconds if seconds >= 2 * 3600 => format!("{} hours", seconds / 3600),
        seconds => format!("{seconds} seconds"),
    };
    (age.unsigned_abs() > limit).then(|| format!("it was baked {} ago, and may be {} old", days(age.unsigned_abs()), days(limit)))
}

/// Whether two URLs name the same repository: by `https`, `ssh` or as `scp` has
/// it, with or without `.git`.
pub fn same_repository(one: &str, two: &str) -> bool {
    plain_repository(one) == plain_repository(two)
}

/// `host/path` of a repository's URL.
fn plain_repository(url: &str) -> String {
    let url = url.trim().trim_start_matches("git+");
    let rest = match url.split_once("://") {
        Some((_, rest)) => rest.to_owned(),
        None => url.replacen(':', "/", 1),
    };
    let rest = rest.trim_end_matches('/').trim_end_matches(".git");
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host).to_lowercase();
    format!("{host}/{}", path.trim_start_matches('/'))
}

/// Reads a policy, and collects everything that is wrong with it.
struct Parser<'a> {
    text: &'a str,
    mistakes: Vec<(usize, String)>,
}

const TOP: [&str; 4] = ["channel", "followers", "keys", "require"];
const REQUIRE: [&str; 9] =
    ["signed_by", "statements_by", "tests_passed", "hygiene_clean", "converged", "source", "max_age", "base_current", "came_through"];

impl Parser<'_> {
    fn wrong(&mut self, at: usize, what: impl Into<String>) {
        self.mistakes.push((at, what.into()));
    }

    fn policy(&mut self) -> Policy {
        let (root, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            self.wrong(error.span().map_or(self.text.len(), |span| span.start), error.message().trim_end().to_owned());
        }
        let mut policy = Policy::default();
        let root = root.into_inner();
        if !self.mistakes.is_empty() {
            return policy;
        }
        for (name, value) in &root {
            let at = name.span().start;
            match name.get_ref().as_ref() {
                "channel" => policy.channel = self.channel(value),
                "followers" => policy.followers = self.followers(value),
                "keys" => policy.keys = self.keys(value),
                "require" => policy.require = self.require(value),
                other => self.unknown(at, "the policy", other, &TOP),
            }
        }
        let require = &policy.require;
        let named: Vec<&String> = require.signed_by.iter().chain(&require.statements_by).collect();
        let unknown: Vec<String> = named.into_iter().filter(|name| !policy.keys.contains_key(*name)).cloned().collect();
        let at = root.get("require").map_or(0, |value| value.span().start);
        // A key that is there and was not understood is one mistake, not two.
        let keys = root.get("keys").and_then(|keys| if let DeValue::Table(table) = keys.get_ref() { Some(table) } else { None });
        for name in unknown.into_iter().filter(|name| keys.is_none_or(|keys| !keys.contains_key(name.as_str()))) {
            self.wrong(self.place(&name).unwrap_or(at), format!("there is no key `{name}` in [keys]"));
        }
        let nothing = Require { statements_by: Vec::new(), ..require.clone() } == Require::default();
        if nothing && policy.followers.is_empty() && self.mistakes.is_empty() {
            self.wrong(at, "it requires nothing; an empty policy is no policy");
        }
        policy
    }

    /// Where a quoted name stands in `[require]`.
    fn place(&self, name: &str) -> Option<usize> {
        let require = self.text.find("[require]")?;
        let forms = [format!("\"{name}\""), format!("'{name}'")];
        forms.iter().filter_map(|form| self.text[require..].find(form)).min().map(|at| require + at)
    }

    fn unknown(&mut self, at: usize, what: &str, name: &str, known: &[&str]) {
        let help = nearest(name, known.iter().copied())
            .map_or_else(|| format!("known: {}", known.join(", ")), |near| format!("did you mean `{near}`?"));
        self.wrong(at, format!("unknown key `{name}` in {what}; {help}"));
    }

    fn string<'v>(&mut self, what: &str, value: &'v Spanned<DeValue<'_>>) -> Option<&'v str> {
        match value.get_ref() {
            DeValue::String(text) => Some(text),
            _ => {
                self.wrong(value.span().start, format!("`{what}` must be a string"));
                None
            }
        }
    }

    /// One string, or several.
    fn strings(&mut self, what: &str, value: &Spanned<DeValue<'_>>) -> Vec<(usize, String)> {
        let items: Vec<&Spanned<DeValue<'_>>> = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            DeValue::String(_) => vec![value],
            _ => {
                self.wrong(value.span().start, format!("`{what}` must be a string or an array of strings"));
                return Vec::new();
            }
        };
        if items.is_empty() {
            self.wrong(value.span().start, format!("`{what}` is empty; leave it out if nothing is required"));
        }
        items.into_iter().filter_map(|item| Some((item.span().start, self.string(what, item)?.to_owned()))).collect()
    }

    /// A condition that is either there or not: `false` would look as if the
    /// opposite were required.
    fn truth(&mut self, what: &str, value: &Spanned<DeValue<'_>>) -> bool {
        match value.get_ref() {
            DeValue::Boolean(true) => true,
            DeValue::Boolean(false) => {
                self.wrong(value.span().start, format!("`{what} = false` requires nothing; leave it out"));
                false
            }
            _ => {
                self.wrong(value.span().start, format!("`{what}` must be true"));
                false
            }
        }
    }

    fn channel(&mut self, value: &Spanned<DeValue<'_>>) -> Option<String> {
        let text = self.string("channel", value)?;
        let good = text.split_once('@').is_some_and(|(name, channel)| check_name(name).is_ok() && check_channel(channel).is_ok());
        if !good {
            self.wrong(value.span().start, format!("`{text}` is no channel; write NAME@CHANNEL"));
        }
        good.then(|| text.to_owned())
    }

    fn followers(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<Follower> {
        let mut followers = Vec::new();
        for (at, text) in self.strings("followers", value) {
            match Follower::parse(&text) {
                Ok(follower) => followers.push(follower),
                Err(why) => self.wrong(at, format!("`{text}` cannot follow a channel: {why}")),
            }
        }
        followers
    }

    fn keys(&mut self, value: &Spanned<DeValue<'_>>) -> BTreeMap<String, PublicKey> {
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong(value.span().start, "[keys] must be a table of public keys by name");
            return BTreeMap::new();
        };
        let mut keys = BTreeMap::new();
        for (name, value) in table {
            let Some(text) = self.string(name.get_ref(), value) else { continue };
            match PublicKey::from_pem(text) {
                Ok(key) => drop(keys.insert(name.get_ref().to_string(), key)),
                Err(error) => self.wrong(value.span().start, format!("the key `{}`: {error}", name.get_ref())),
            }
        }
        keys
    }

    fn require(&mut self, value: &Spanned<DeValue<'_>>) -> Require {
        let mut require = Require::default();
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong(value.span().start, "[require] must be a table");
            return require;
        };
        let texts = |all: Vec<(usize, String)>| all.into_iter().map(|(_, text)| text).collect();
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            match name {
                "signed_by" => require.signed_by = texts(self.strings(name, value)),
                "statements_by" => require.statements_by = texts(self.strings(name, value)),
                "tests_passed" => require.tests_passed = self.truth(name, value),
                "hygiene_clean" => require.hygiene_clean = self.truth(name, value),
                "converged" => require.converged = self.truth(name, value),
                "source" => require.source = texts(self.strings(name, value)),
                "base_current" => require.base_current = self.truth(name, value),
                "max_age" => {
                    if let Some(text) = self.string(name, value) {
                        require.max_age = parse_duration(text);
                        if require.max_age.is_none() {
                            self.wrong(value.span().start, format!("`{text}` is no length of time; write \"30d\" or \"12h\""));
                        }
                    }
                }
                "came_through" => {
                    let channels = self.strings(name, value);
                    for (at, channel) in &channels {
                        if let Err(why) = check_channel(channel) {
                            self.wrong(*at, format!("`{channel}` is no channel: {why}"));
                        }
                    }
                    require.came_through = texts(channels);
                }
                other => self.unknown(key.span().start, "[require]", other, &REQUIRE),
            }
        }
        require
    }
}

#[cfg(test)]
mod tests {
    use kiln_model::account::{Account, Source};

    use super::*;
    use crate::attachment::{self, Attachment, Found};
    use crate::examine::{Subject, examine};
    use crate::keys::tests::key;
    use crate::provenance::tests::account;
    use crate::statement;

    const REPOSITORY: &str = "https://github.com/acme/shop";

    fn now() -> Timestamp {
        "2024-03-01T00:00:00Z".parse().unwrap()
    }

    fn policy(require: Require) -> Policy {
        let keys = [("release", 1), ("ci", 2)].map(|(name, number)| (name.to_owned(), key(number).public().clone()));
        Policy { channel: None, keys: BTreeMap::from(keys), require, followers: Vec::new() }
    }

    /// What is known of an image that `release` and `ci` have signed.
    fn facts_of(policy: &Policy, account: &Account, signer: u8, speaker: Option<u8>) -> Facts {
        let mut attached: Vec<Attachment> = vec![attachment::signature_bundle("web:1.4.0", &account.image, &key(signer)).unwrap()];
        let speaker = speaker.map(key);
        attached.extend(statement::of(account).iter().map(|statement| attachment::statement(statement, speaker.as_ref()).unwrap()));
        let found: Vec<Found> = attached.into_iter().map(|attachment| Found { digest: Digest::of("x"), attachment }).collect();
        Facts {
            now: now(),
            evidence: examine(&Subject::new(account.image), &found, &policy.public_keys()),
            baked: Some("2024-02-20T00:00:00Z".parse().unwrap()),
            base: Base::Current,
            channels: vec!["staging".into()],
        }
    }

    fn all() -> Require {
        Require {
            signed_by: vec!["release".into()],
            statements_by: vec!["ci".into()],
            tests_passed: true,
            hygiene_clean: true,
            converged: true,
            source: vec![REPOSITORY.into()],
            max_age: Some(Duration::from_secs(30 * 86_400)),
            base_current: true,
            came_through: vec!["staging".into()],
        }
    }

    fn said(unmet: &[Unmet]) -> String {
        unmet.iter().map(Unmet::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn followers_are_read_and_may_be_all_there_is() {
        let read = Policy::parse("p", "followers = [\"ssm:eu-central-1:/images/web/{arch}\"]").unwrap();
        assert_eq!(read.followers.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ssm:eu-central-1:/images/web/{arch}"]);
        let error = Policy::parse("p", "\nfollowers = [\"sns:x\"]").unwrap_err();
        assert!(error.details()[0].starts_with("p:2: `sns:x` cannot follow a channel: "), "{:?}", error.details());
    }

    #[test]
    fn an_image_with_everything_passes() {
        let policy = policy(all());
        assert_eq!(check(&policy, &facts_of(&policy, &account(), 1, Some(2))), []);
    }

    #[test]
    fn every_condition_that_fails_is_named() {
        let policy = policy(all());
        let facts = Facts {
            now: now(),
            evidence: Vec::new(),
            baked: None,
            base: Base::Outdated("debian-base:12 is sha256:ab… now".into()),
            channels: Vec::new(),
        };
        assert_eq!(
            said(&check(&policy, &facts)),
            "signed_by: it has no signature; one by release is required\n\
             tests_passed: it has no result of tests\n\
             hygiene_clean: it has no hygiene report\n\
             converged: it has no proof of convergence\n\
             source: it has no provenance\n\
             max_age: nothing says when it was baked\n\
             base_current: debian-base:12 is sha256:ab… now\n\
             came_through: it never was in staging"
        );
    }

    #[test]
    fn whose_word_counts() {
        let policy = policy(all());
        // Signed by the wrong one of the known keys; statements by the wrong one.
        let unmet = check(&policy, &facts_of(&policy, &account(), 2, Some(1)));
        let names: Vec<_> = unmet.iter().map(|unmet| unmet.condition).collect();
        assert_eq!(names, ["signed_by", "tests_passed", "hygiene_clean", "converged", "source"]);
        assert_eq!(unmet[0].why, "no signature by release: it was signed by ci");
        assert!(unmet[1].why.contains("another key than those whose statements count"), "{}", unmet[1]);
        // By nobody, and by a stranger.
        assert!(check(&policy, &facts_of(&policy, &account(), 1, None))[0].why.contains("nobody has signed it"));
        let stranger = check(&policy, &facts_of(&policy, &account(), 9, Some(9)));
        assert_eq!(stranger.len(), 5);
        assert!(stranger[0].why.contains(&key(9).id().to_string()), "{}", stranger[0]);
        // Without `statements_by` every key of the policy will do.
        let any = super::tests::policy(Require { statements_by: Vec::new(), ..all() });
        assert_eq!(check(&any, &facts_of(&any, &account(), 1, Some(1))), []);
        assert_eq!(check(&any, &facts_of(&any, &account(), 1, None)).len(), 4);
        // A policy that names no key has nobody to ask.
        let open = Policy { require: Require { tests_passed: true, ..Require::default() }, ..Policy::default() };
        assert_eq!(check(&open, &facts_of(&open, &account(), 1, None)), []);
    }

    #[test]
    fn what_the_statements_say_counts() {
        let policy = policy(Require { signed_by: Vec::new(), ..all() });
        let unmet = |account: &Account| said(&check(&policy, &facts_of(&policy, account, 1, Some(2))));
        let source = account().source.unwrap();
        let from = |change: &dyn Fn(&mut Source)| {
            let mut source = source.clone();
            change(&mut source);
            unmet(&Account { source: Some(source), ..account() })
        };
        assert_eq!(
            from(&|source| source.repository = Some("https://evil.example/shop".into())),
            "source: it was baked from https://evil.example/shop"
        );
        assert_eq!(from(&|source| source.repository = None), "source: its provenance names no repository");
        assert!(from(&|source| source.dirty = true).contains("with changes that are in no commit"));
        assert_eq!(from(&|source| source.repository = Some("ssh://git@github.com/acme/shop.git".into())), "");
        let mut unchecked = account();
        unchecked.hygiene.as_mut().unwrap().checked = false;
        assert_eq!(unmet(&unchecked), "hygiene_clean: the hygiene report says unchecked");
        assert_eq!(unmet(&Account { tests: None, ..account() }), "tests_passed: it has no result of tests");
        // The newest counts of each suite, and of two at the same time the worse.
        let mut facts = facts_of(&policy, &account(), 1, Some(2));
        let passed = facts.evidence.iter().find(|examined| examined.what.name() == "test-result").unwrap().clone();
        let with = |result: &str, suite: &str, later: i64| {
            let What::Tests(verdict) = passed.what.clone() else { unreachable!() };
            let finished = verdict.finished.map(|time| time + jiff::SignedDuration::from_secs(later));
            let failed = if result == "FAILED" { vec!["port".to_owned()] } else { Vec::new() };
            let what = What::Tests(verdict::Verdict { result: result.into(), suite: suite.into(), finished, failed });
            Examined { what, ..passed.clone() }
        };
        facts.evidence.push(with("FAILED", "web", 0));
        assert_eq!(said(&check(&policy, &facts)), "tests_passed: the result of tests says failed (port)");
        facts.evidence.push(with("PASSED", "web", 1));
        assert_eq!(check(&policy, &facts), []);
        facts.evidence.push(with("FAILED", "smoke", -1));
        facts.evidence.push(Examined { signers: Vec::new(), ..with("PASSED", "smoke", 1) });
        assert_eq!(said(&check(&policy, &facts)), "tests_passed: the result of tests says failed (port)", "a stranger's word is none");
        facts.evidence.push(with("WARNED", "smoke", 2));
        assert_eq!(said(&check(&policy, &facts)), "tests_passed: the result of tests says warned");
    }

    #[test]
    fn age_is_counted_from_the_bake() {
        let policy = policy(Require { max_age: Some(Duration::from_secs(86_400)), ..Require::default() });
        let at = |baked: &str| {
            let facts = Facts { baked: Some(baked.parse().unwrap()), ..facts_of(&policy, &account(), 1, None) };
            said(&check(&policy, &facts))
        };
        assert_eq!(at("2024-02-29T00:00:00Z"), "");
        assert_eq!(at("2024-02-27T00:00:00Z"), "max_age: it was baked 3 days ago, and may be 24 hours old");
        assert_eq!(at("2024-03-01T00:04:00Z"), "");
        assert!(at("2034-03-01T00:00:00Z").contains("in the future"));
    }

    #[test]
    fn a_repository_has_several_urls() {
        for same in [
            "https://github.com/acme/shop",
            "https://github.com/acme/shop.git",
            "https://github.com/acme/shop/",
            "git+https://GitHub.com/acme/shop",
            "ssh://git@github.com/acme/shop.git",
            "git@github.com:acme/shop.git",
        ] {
            assert!(same_repository(same, REPOSITORY), "{same}");
        }
        for other in
            ["https://github.com/acme/shop2", "https://github.com.evil.example/acme/shop", "https://evil.example/github.com/acme/shop"]
        {
            assert!(!same_repository(other, REPOSITORY), "{other}");
        }
    }

    fn pem(number: u8) -> String {
        key(number).public().to_pem().unwrap()
    }

    #[test]
    fn a_policy_is_read() {
        let text = format!(
            "channel = 'web@production'\n[keys]\nrelease = '''\n{}'''\nci = '''{}'''\n[require]\nsigned_by = 'release'\nstatements_by = ['ci']\n\
             tests_passed = true\nhygiene_clean = true\nconverged = true\nsource = ['{REPOSITORY}']\nmax_age = '30d'\nbase_current = true\ncame_through = 'staging'\n",
            pem(1),
            pem(2)
        );
        let read = Policy::parse("policy.toml", &text).unwrap();
        assert_eq!(read, Policy { channel: Some("web@production".into()), ..policy(all()) });
        assert!(read.is_for("web", "production") && !read.is_for("web", "staging") && !read.is_for("db", "production"));
    }

    #[test]
    fn all_mistakes_are_named_at_their_lines() {
        let text = "channel = 'web'\nx = 1\n[keys]\nrelease = 'no key'\n[require]\nsigned_by = ['release', 'relaese']\ntests_passed = false\n\
                    max_age = 'soon'\nsource = []\ncame_through = ['v1']\nbase_curent = true\nhygiene_clean = 1\n";
        let error = Policy::parse("policy.toml", text).unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (Code::Usage, "the policy policy.toml has 10 mistakes".to_owned()));
        let lines: Vec<&str> = error.details()[0].lines().collect();
        for (line, said) in [
            (1, "`web` is no channel"),
            (2, "unknown key `x` in the policy"),
            (4, "the key `release`: there is no public key"),
            (6, "there is no key `relaese` in [keys]"),
            (7, "`tests_passed = false` requires nothing"),
            (8, "`soon` is no length of time"),
            (9, "`source` is empty"),
            (10, "`v1` is no channel"),
            (11, "unknown key `base_curent` in [require]; did you mean `base_current`?"),
            (12, "`hygiene_clean` must be true"),
        ] {
            assert!(lines.iter().any(|shown| shown.starts_with(&format!("policy.toml:{line}: {said}"))), "{line} {said}: {lines:#?}");
        }
        let error = Policy::parse("p", "[require]\n").unwrap_err();
        assert!(error.details()[0].contains("requires nothing"), "{error:?}");
        assert!(Policy::parse("p", "[require\nx").unwrap_err().details()[0].starts_with("p:1: "));
    }

    #[test]
    fn a_signed_policy_is_that_text_and_no_other() {
        let signature = Policy::sign("text", &key(1)).unwrap();
        let keys = [key(1).public().clone()];
        assert_eq!(Policy::signers("text", &signature, &keys), Ok(vec![key(1).id()]));
        assert_eq!(Policy::signers("test", &signature, &keys), Err(Failure::Payload));
        assert!(matches!(Policy::signers("text", &signature, &[key(2).public().clone()]), Err(Failure::Key { .. })));
        let other = Envelope::sign("text/plain", b"text", &key(1)).to_json().unwrap();
        assert!(matches!(Policy::signers("text", &other, &keys), Err(Failure::Malformed(_))));
    }
}
