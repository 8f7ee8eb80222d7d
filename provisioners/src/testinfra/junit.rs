//! What pytest writes with `--junitxml`: as much of XML as that takes.

use kiln_model::provision::{Case, Outcome};

use super::HOST;

/// A tag: its name, its attributes, and whether it begins or ends something.
struct Tag {
    name: String,
    attributes: Vec<(String, String)>,
    closes: bool,
    empty: bool,
}

impl Tag {
    fn attribute(&self, name: &str) -> &str {
        self.attributes.iter().find(|(own, _)| own == name).map_or("", |(_, value)| value)
    }
}

/// A piece of a document.
enum Piece {
    Tag(Tag),
    Text(String),
}

/// The cases of a report; `None` when it is none.
pub(super) fn cases(text: &str) -> Option<Vec<Case>> {
    let mut cases: Vec<Case> = Vec::new();
    // Inside of which of a case's children the text is.
    let mut inside: Option<String> = None;
    let mut ended = false;
    let mut rest = text;
    while let Some(piece) = next(&mut rest)? {
        match piece {
            Piece::Text(text) => {
                if let (Some(_), Some(Case { outcome: Outcome::Failed(why), .. })) = (&inside, cases.last_mut()) {
                    let text = text.trim();
                    if !text.is_empty() && text != why.as_str() {
                        why.push('\n');
                        why.push_str(text);
                    }
                }
            }
            Piece::Tag(tag) => match (tag.name.as_str(), tag.closes) {
                ("testcase", false) => cases.push(case(&tag)),
                (name @ ("failure" | "error" | "skipped"), false) => {
                    let last = cases.last_mut()?;
                    let said = tag.attribute("message").to_owned();
                    match (&mut last.outcome, name) {
                        // Of a failure and an error while tidying up both count.
                        (Outcome::Failed(why), "failure" | "error") => {
                            why.push('\n');
                            why.push_str(&said);
                        }
                        (outcome, "skipped") => *outcome = Outcome::Skipped(said),
                        (outcome, _) => *outcome = Outcome::Failed(said),
                    }
                    inside = (!tag.empty && name != "skipped").then(|| name.to_owned());
                }
                (name, true) => {
                    if inside.as_deref() == Some(name) {
                        inside = None;
                    }
                    ended |= name.starts_with("testsuite");
                }
                ("testsuites" | "testsuite", false) => ended |= tag.empty,
                _ => {}
            },
        }
    }
    ended.then_some(cases)
}

fn case(tag: &Tag) -> Case {
    // The host is always the same one.
    let name = tag.attribute("name").replace(&format!("[ssh://{HOST}]"), "").replace(&format!("ssh://{HOST}-"), "");
    let class = tag.attribute("classname");
    let name = if class.is_empty() { name } else { format!("{class}: {name}") };
    Case { name, seconds: tag.attribute("time").parse().unwrap_or(0.0), outcome: Outcome::Passed }
}

/// The next piece; `Some(None)` at the end, `None` where it is no XML.
fn next(rest: &mut &str) -> Option<Option<Piece>> {
    loop {
        if rest.is_empty() {
            return Some(None);
        }
        let Some(inner) = rest.strip_prefix('<') else {
            let end = rest.find('<').unwrap_or(rest.len());
            let text = plain(&rest[..end]);
            *rest = &rest[end..];
            return Some(Some(Piece::Text(text)));
        };
        if let Some(data) = inner.strip_prefix("![CDATA[") {
            let end = data.find("]]>")?;
            let text = data[..end].to_owned();
            *rest = &data[end + 3..];
            return Some(Some(Piece::Text(text)));
        }
        for (begin, close) in [("!--", "-->"), ("?", "?>"), ("!", ">")] {
            if let Some(other) = inner.strip_prefix(begin) {
                let end = other.find(close)?;
                *rest = &other[end + close.len()..];
                break;
            }
        }
        if !rest.starts_with('<') || rest.len() != inner.len() + 1 {
            continue;
        }
        return tag(inner, rest).map(|tag| Some(Piece::Tag(tag)));
    }
}

fn tag<'a>(inner: &'a str, rest: &mut &'a str) -> Option<Tag> {
    let (closes, mut inner) = match inner.strip_prefix('/') {
        Some(inner) => (true, inner),
        None => (false, inner),
    };
    let end = inner.find(|c: char| c.is_whitespace() || c == '/' || c == '>')?;
    let mut tag = Tag { name: inner[..end].to_owned(), attributes: Vec::new(), closes, empty: false };
    inner = &inner[end..];
    loop {
        inner = inner.trim_start();
        if let Some(after) = inner.strip_prefix("/>") {
            (*rest, tag.empty) = (after, true);
            return Some(tag);
        }
        if let Some(after) = inner.strip_prefix('>') {
            *rest = after;
            return Some(tag);
        }
        let (name, value) = inner.split_once('=')?;
        let value = value.trim_start();
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let end = value[1..].find(quote)? + 1;
        tag.attributes.push((name.trim().to_owned(), plain(&value[1..end])));
        inner = &value[end + 1..];
    }
}

/// Text with its references replaced.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        plain.push_str(&rest[..at]);
        rest = &rest[at..];
        let reference = rest.find(';').map(|end| (&rest[1..end], end));
        let c = reference.and_then(|(name, _)| match name {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            _ => {
                let number = name.strip_prefix('#')?;
                let number = match number.strip_prefix('x') {
                    Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                    None => number.parse().ok()?,
                };
                char::from_u32(number)
            }
        });
        match (c, reference) {
            (Some(c), Some((_, end))) => {
                plain.push(c);
                rest = &rest[end + 1..];
            }
            _ => {
                plain.push('&');
                rest = &rest[1..];
            }
        }
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As pytest 8 writes it.
    const REPORT: &str = r#"<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="5" time="9.1" timestamp="2024-05-01T10:00:00" hostname="h"><testcase classname="test_web" name="test_up[ssh://kiln]" time="1.25" /><testcase classname="test_web" name="test_user[ssh://kiln-root]" time="0.5"><failure message="AssertionError: assert &quot;a&quot; == 'b'&#10;  - b&#10;  + a">def test_user(host):
&gt;       assert host.user("root").name == "b"
E       AssertionError</failure></testcase><testcase classname="test_web" name="test_later" time="0.0"><skipped type="pytest.skip" message="not yet">/x/test_web.py:9: not yet</skipped></testcase><testcase classname="test_web" name="test_fixture" time="0.1"><error message="failed on setup"><![CDATA[E  1 < 2]]></error></testcase><!-- a > b --><testcase classname="" name="bare" time=""/></testsuite></testsuites>"#;

    #[test]
    fn a_report_of_pytest() {
        let cases = cases(REPORT).unwrap();
        let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(
            names,
            ["test_web: test_up", "test_web: test_user[ssh://kiln-root]", "test_web: test_later", "test_web: test_fixture", "bare"]
                .map(|name| name.replace("ssh://kiln-", ""))
        );
        assert_eq!((cases[0].seconds, &cases[0].outcome), (1.25, &Outcome::Passed));
        let Outcome::Failed(why) = &cases[1].outcome else { panic!("{cases:?}") };
        assert!(why.starts_with("AssertionError: assert \"a\" == 'b'\n  - b\n  + a\ndef test_user(host):\n>       assert"), "{why}");
        assert_eq!(cases[2].outcome, Outcome::Skipped("not yet".into()));
        assert_eq!(cases[3].outcome, Outcome::Failed("failed on setup\nE  1 < 2".into()));
    }

    #[test]
    fn what_is_torn_is_no_report() {
        assert!(cases("").is_none());
        assert!(cases("<testsuites").is_none());
        assert!(cases("<testsuites><testcase name='a'/>").is_none());
        assert!(cases("<!-- ").is_none());
        assert_eq!(cases("<testsuites></testsuites>"), Some(Vec::new()));
        // Wherever it was cut, nothing panics.
        for end in 0..REPORT.len() {
            if let Some(cut) = REPORT.get(..end) {
                drop(cases(cut));
            }
        }
    }
}
