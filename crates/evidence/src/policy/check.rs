//! Decides whether an image fulfils a policy.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::Digest;

use super::Policy;
use crate::examine::{Examined, What};
use crate::provenance::BUILD_TYPE;
use crate::verdict;

/// How far ahead the clock of the machine that baked may be.
const CLOCKS: Duration = Duration::from_secs(300);

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
fn same_repository(one: &str, two: &str) -> bool {
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

#[cfg(test)]
mod tests {
    use kiln_model::account::{Account, Source};

    use super::super::Require;
    use super::super::tests::{REPOSITORY, all, policy};
    use super::*;
    use crate::attachment::{self, Attachment, Found};
    use crate::examine::{Subject, examine};
    use crate::keys::tests::key;
    use crate::provenance::tests::account;
    use crate::statement;

    fn now() -> Timestamp {
        "2024-03-01T00:00:00Z".parse().unwrap()
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

    fn said(unmet: &[Unmet]) -> String {
        unmet.iter().map(Unmet::to_string).collect::<Vec<_>>().join("\n")
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
        let any = self::policy(Require { statements_by: Vec::new(), ..all() });
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
}
