//! Reads a policy's TOML, and names everything that is wrong with it.

use std::collections::BTreeMap;

use kiln_model::channel::Follower;
use kiln_model::reference::{check_channel, check_name};
use kiln_model::settings::{nearest, parse_duration};
use kiln_model::{Code, Error, Result};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Policy, Require};
use crate::keys::PublicKey;

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
    use super::super::tests::{REPOSITORY, all, policy};
    use super::*;
    use crate::keys::tests::key;

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
    fn followers_are_read_and_may_be_all_there_is() {
        let read = Policy::parse("p", "followers = [\"ssm:eu-central-1:/images/web/{arch}\"]").unwrap();
        assert_eq!(read.followers.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ssm:eu-central-1:/images/web/{arch}"]);
        let error = Policy::parse("p", "\nfollowers = [\"sns:x\"]").unwrap_err();
        assert!(error.details()[0].starts_with("p:2: `sns:x` cannot follow a channel: "), "{:?}", error.details());
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
}
