//! JUnit XML: what CI systems read results of tests from.

use std::fmt::Write as _;

use jiff::Timestamp;
use kiln_model::provision::{Case, Outcome};
use kiln_model::trial::{Tested, Trial};

/// A document of several trials, each with what the image is called.
pub fn document(trials: &[(String, &Trial)]) -> String {
    let mut suites = String::new();
    let mut all = Count::default();
    for (title, trial) in trials {
        for test in &trial.tests {
            suite(&mut suites, title, test);
            all.add(test);
        }
    }
    let seconds: f64 = trials.iter().map(|(_, trial)| trial.seconds).sum();
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"kiln\" {all} time=\"{seconds:.3}\">\n{suites}</testsuites>\n")
}

/// How many there are, as attributes.
#[derive(Default)]
struct Count {
    all: usize,
    failed: usize,
    skipped: usize,
}

impl Count {
    fn add(&mut self, test: &Tested) {
        for case in &test.cases {
            self.all += 1;
            match case.outcome {
                Outcome::Passed => {}
                Outcome::Skipped(_) => self.skipped += 1,
                Outcome::Failed(_) => self.failed += 1,
            }
        }
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tests=\"{}\" failures=\"{}\" errors=\"0\" skipped=\"{}\"", self.all, self.failed, self.skipped)
    }
}

/// A test is a suite, and its class is the image, so that a page of results
/// lists them under it.
fn suite(text: &mut String, title: &str, test: &Tested) {
    let mut count = Count::default();
    count.add(test);
    let time = i64::try_from(test.finished).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    let time = time.map(|time| time.strftime("%Y-%m-%dT%H:%M:%S").to_string()).unwrap_or_default();
    let name = escape(&format!("{title} {}", test.name));
    let _ = writeln!(text, "  <testsuite name=\"{name}\" {count} time=\"{:.3}\" timestamp=\"{time}\">", test.seconds);
    for case in &test.cases {
        one(text, title, test, case);
    }
    text.push_str("  </testsuite>\n");
}

fn one(text: &mut String, title: &str, test: &Tested, case: &Case) {
    let class = escape(&format!("{title}.{}", test.name));
    let head = format!("    <testcase classname=\"{class}\" name=\"{}\" time=\"{:.3}\"", escape(&case.name), case.seconds);
    let first = |why: &str| escape(why.lines().next().unwrap_or_default());
    let _ = match &case.outcome {
        Outcome::Passed => writeln!(text, "{head}/>"),
        Outcome::Skipped(why) => writeln!(text, "{head}><skipped message=\"{}\"/></testcase>", first(why)),
        Outcome::Failed(why) => {
            writeln!(text, "{head}><failure message=\"{}\" type=\"failure\">{}</failure></testcase>", first(why), escape(why))
        }
    };
}

/// Text as it may stand anywhere in XML 1.0; what may stand nowhere in it
/// becomes U+FFFD.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // In an attribute a bare line end would become a space.
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push_str("&#9;"),
            '\r' => escaped.push_str("&#13;"),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provenance::tests::trial;

    #[test]
    fn a_document_field_by_field() {
        let mut trial = trial("web", &[("page", true), ("<port>", false)]);
        let skipped = Case { name: "later".into(), seconds: 0.0, outcome: Outcome::Skipped("not here".into()) };
        trial.tests[0].cases.push(skipped);
        trial.tests[1].cases[0].outcome = Outcome::Failed("found \"\u{1b}[31m\" & more\nsecond \0 line".into());
        let text = document(&[("web:1".to_owned(), &trial)]);
        let expected = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="kiln" tests="3" failures="1" errors="0" skipped="1" time="40.000">
  <testsuite name="web:1 page" tests="2" failures="0" errors="0" skipped="1" time="1.000" timestamp="2023-11-15T22:13:20">
    <testcase classname="web:1.page" name="page" time="0.500"/>
    <testcase classname="web:1.page" name="later" time="0.000"><skipped message="not here"/></testcase>
  </testsuite>
  <testsuite name="web:1 &lt;port&gt;" tests="1" failures="1" errors="0" skipped="0" time="1.000" timestamp="2023-11-15T22:13:20">
    <testcase classname="web:1.&lt;port&gt;" name="&lt;port&gt;" time="0.500"><failure message="found &quot;�[31m&quot; &amp; more" type="failure">found &quot;�[31m&quot; &amp; more&#10;second � line</failure></testcase>
  </testsuite>
</testsuites>
"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn nothing_is_a_document_too() {
        assert!(document(&[]).contains("tests=\"0\" failures=\"0\""));
    }
}
