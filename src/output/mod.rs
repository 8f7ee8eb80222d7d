//! What people and programs see: results on standard output, everything else
//! on standard error. Bars on a terminal, plain lines otherwise.

mod errors;
mod plain;
mod terminal;
mod units;

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use kiln_model::event::{Event, Reporter, Reports};
use kiln_model::secret::Redactor;
use serde::Serialize;

pub(crate) use errors::{show_error, show_mistakes, show_warnings};
pub(crate) use units::{ago, bytes, seconds};

/// Where output goes, and in which form.
#[derive(Clone)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// Whether results are wanted as JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// For a command whose events are its result: with `--json` they go to
    /// standard output as well.
    pub(crate) fn events(&self) -> Events {
        let people = self.people();
        let sink: Arc<dyn Sink> = if self.json { Arc::new(Both(Box::new(Json(Mutex::new(()))), people)) } else { Arc::from(people) };
        Events { sink, redactor: Redactor::default() }
    }

    /// For any other command: for people only.
    pub(crate) fn reports(&self) -> Reports {
        Events { sink: Arc::from(self.people()), redactor: Redactor::default() }.all()
    }

    fn people(&self) -> Box<dyn Sink> {
        if self.quiet {
            Box::new(plain::Plain::warnings_only())
        } else if std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb") {
            Box::new(terminal::Terminal::new())
        } else {
            Box::new(plain::Plain::new())
        }
    }

    /// A result: `value` with `--json`, `text` otherwise.
    pub(crate) fn result(&self, value: &impl Serialize, text: impl FnOnce() -> String) {
        if self.json { print_json(value) } else { print(&text()) }
    }
}

/// Prints a result for programs: one line of JSON.
pub(crate) fn print_json(value: &impl Serialize) {
    let text = serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    print(&text);
}

/// Prints text and a line's end to standard output. A reader that has gone
/// away (`kiln images | head -1`) is no error.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    if !text.ends_with('\n') && !text.is_empty() {
        let _ = out.write_all(b"\n");
    }
    let _ = out.flush();
}

/// Prints a line to standard error.
pub(crate) fn say(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "{text}");
}

/// An error before anything else is there.
pub(crate) fn fatal(message: &str) -> ExitCode {
    say(&format!("error: {message}"));
    ExitCode::FAILURE
}

/// Rows as columns, the first row being the heads.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Takes events; those of one bake among several with its image.
trait Sink: Send + Sync {
    fn take(&self, image: Option<&str>, event: Event);

    /// Takes back what is shown of a bake that has ended in the middle.
    fn forget(&self, _image: &str) {}
}

/// Where the events of a command go. All its parts hide the same secrets.
pub(crate) struct Events {
    sink: Arc<dyn Sink>,
    redactor: Redactor,
}

impl Events {
    /// For the whole command.
    pub(crate) fn all(&self) -> Reports {
        self.lane(None)
    }

    /// For one of several bakes: whatever it says is marked with its image.
    pub(crate) fn of(&self, image: &str) -> Reports {
        self.lane(Some(image.to_owned()))
    }

    /// One of several bakes has ended in the middle.
    pub(crate) fn forget(&self, image: &str) {
        self.sink.forget(image);
    }

    fn lane(&self, image: Option<String>) -> Reports {
        Reports::new(Arc::new(Lane { sink: self.sink.clone(), image }), self.redactor.clone())
    }
}

struct Lane {
    sink: Arc<dyn Sink>,
    image: Option<String>,
}

impl Reporter for Lane {
    fn report(&self, event: Event) {
        self.sink.take(self.image.as_deref(), event);
    }
}

/// One JSON object per line on standard output.
struct Json(Mutex<()>);

impl Sink for Json {
    fn take(&self, image: Option<&str>, event: Event) {
        #[derive(Serialize)]
        struct Line<'a> {
            #[serde(flatten)]
            event: Event,
            #[serde(skip_serializing_if = "Option::is_none")]
            image: Option<&'a str>,
        }
        let _one_at_a_time = self.0.lock();
        print_json(&Line { event, image });
    }
}

struct Both(Box<dyn Sink>, Box<dyn Sink>);

impl Sink for Both {
    fn take(&self, image: Option<&str>, event: Event) {
        self.0.take(image, event.clone());
        self.1.take(image, event);
    }

    fn forget(&self, image: &str) {
        self.0.forget(image);
        self.1.forget(image);
    }
}
