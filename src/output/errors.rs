//! Errors for people.

use std::fmt;

use kiln_model::error::Error;
use kiln_model::settings::{Problem, Source};
use miette::{Diagnostic, GraphicalReportHandler, LabeledSpan, NamedSource, Severity, SourceCode};

use super::say;

/// Shows what went wrong, why, and what to do next.
pub(crate) fn show_error(error: &Error) {
    let head = console::style("error:").red().bold().for_stderr();
    let dim = |text: &str| console::style(text.to_owned()).dim().for_stderr().to_string();
    say(&format!("{head} {}", error.chain()));
    for detail in error.details() {
        for line in detail.trim_end().lines() {
            say(&format!("  {} {line}", dim("│")));
        }
    }
    if let Some(step) = error.step_name() {
        say(&format!("  {} {step}", dim("step:")));
    }
    if let Some(next) = error.next_move() {
        say(&format!("  {} {next}", console::style("next:").cyan().bold().for_stderr()));
    }
}

/// Shows every mistake of a template, each at its line.
pub(crate) fn show_mistakes(sources: &[Source], problems: &[Problem]) {
    for problem in problems {
        say(&draw(sources, problem, Severity::Error));
    }
    let count = if problems.len() == 1 { "one mistake".to_owned() } else { format!("{} mistakes", problems.len()) };
    say(&format!("{} {count}; nothing was started", console::style("error:").red().bold().for_stderr()));
}

/// Shows what is probably not meant.
pub(crate) fn show_warnings(sources: &[Source], problems: &[Problem]) {
    for problem in problems {
        say(&draw(sources, problem, Severity::Warning));
    }
}

fn draw(sources: &[Source], problem: &Problem, severity: Severity) -> String {
    let source = problem.place.and_then(|place| sources.get(place.source));
    let drawn = Drawn { problem, severity, source: source.map(|source| NamedSource::new(&source.name, source.text.clone())) };
    let mut text = String::new();
    let handler = if console::colors_enabled_stderr() {
        GraphicalReportHandler::new()
    } else {
        GraphicalReportHandler::new_themed(miette::GraphicalTheme::unicode_nocolor())
    };
    match handler.render_report(&mut text, &drawn) {
        Ok(()) => text.trim_end().to_owned(),
        Err(_) => problem.message.clone(),
    }
}

/// A problem in the form that miette draws.
struct Drawn<'a> {
    problem: &'a Problem,
    severity: Severity,
    source: Option<NamedSource<String>>,
}

impl fmt::Debug for Drawn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Drawn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem.message)
    }
}

impl std::error::Error for Drawn<'_> {}

impl Diagnostic for Drawn<'_> {
    fn severity(&self) -> Option<Severity> {
        Some(self.severity)
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.problem.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|source| source as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let place = self.problem.place?;
        let label = LabeledSpan::new(self.problem.label.clone(), place.start, place.end.saturating_sub(place.start).max(1));
        Some(Box::new(std::iter::once(label)))
    }
}
