//! From TOML text to the model's tree of nodes with their places.

use std::ops::Range;
use std::path::{Path, PathBuf};

use kiln_model::Digest;
use kiln_model::settings::{Entry, Node, Place, Problems, Source, Table, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Every text that was read, in the order of reading; and which files of
/// templates there were among them.
#[derive(Default)]
pub(super) struct Sources(pub(super) Vec<Source>, pub(super) Vec<(PathBuf, Digest)>);

impl Sources {
    /// Adds a text; its number is what places name it by.
    pub(super) fn add(&mut self, name: impl Into<String>, text: impl Into<String>) -> usize {
        self.0.push(Source { name: name.into(), text: text.into() });
        self.0.len() - 1
    }

    /// Remembers that `text` is all of a template or an included file.
    pub(super) fn template(&mut self, path: &Path, text: &str) {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        self.1.push((path, Digest::of(text)));
    }

    /// What is written at `place`.
    pub(super) fn slice(&self, place: Place) -> &str {
        self.0.get(place.source).and_then(|source| source.text.get(place.start..place.end)).unwrap_or_default()
    }

    /// `kiln.toml:12`, for a second place that a message mentions.
    pub(super) fn line(&self, place: Place) -> String {
        let Some(source) = self.0.get(place.source) else { return String::new() };
        let before = source.text.as_bytes().get(..place.start).unwrap_or_default();
        format!("{}:{}", source.name, 1 + before.iter().filter(|b| **b == b'\n').count())
    }
}

/// Parses `text`, which is source number `source`. `None` when it is no TOML;
/// then every syntax error is among the problems.
pub(super) fn parse(source: usize, text: &str, problems: &mut Problems) -> Option<Node> {
    let (root, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        let before = problems.0.len();
        let converter = Converter { source, text };
        let root = converter.table(root.get_ref(), problems);
        let place = Place { source, start: 0, end: 0 };
        return (problems.0.len() == before).then_some(Node { value: Value::Table(root), place });
    }
    // What the parser says after the first error of a line comes from its
    // guessing how the line was meant.
    let mut last_line = None;
    for error in errors {
        let place = clamp(source, text, error.span().unwrap_or(text.len()..text.len()));
        let line = text[..place.start].bytes().filter(|b| *b == b'\n').count();
        if last_line == Some(line) {
            continue;
        }
        last_line = Some(line);
        syntax_error(place, text, error.message().trim_end(), problems);
    }
    None
}

/// Says a syntax error in words for people who do not know the grammar.
fn syntax_error(place: Place, text: &str, message: &str, problems: &mut Problems) {
    let written = &text[place.start..place.end];
    let place = visible(place, text);
    if message.contains("multi-line") && place.end >= text.trim_end().len() {
        // The parser names the end of the file; what is wrong is far above it.
        let delimiter = if message.contains("literal") { "'''" } else { "\"\"\"" };
        let start = text.rfind(delimiter).unwrap_or(place.start);
        let place = Place { start, end: (start + 3).min(text.len()), ..place };
        problems.add(place, "this text never ends").help(format!("close it with {delimiter}"));
    } else if message.contains("must be quoted") && written.is_empty() {
        problems.add(place, "a value is missing");
    } else if message.contains("must be quoted") {
        problems.add(place, "a text must be quoted").help(format!("write {written:?}"));
    } else if message.contains("escape") {
        problems.add(place, "this is no escape of TOML").help("between ''' and ''' a backslash is only a backslash");
    } else {
        let problem = problems.add(place, message.trim_end_matches(", expected nothing"));
        if message.contains("duplicate key") {
            problem.label("already defined above");
        }
    }
}

/// An empty place made visible: the character there, or at a line's end the
/// whole line.
fn visible(place: Place, text: &str) -> Place {
    if place.start < place.end {
        return place;
    }
    match text[place.start..].chars().next() {
        Some(c) if !c.is_whitespace() => Place { end: place.start + c.len_utf8(), ..place },
        _ => {
            let before = text[..place.start].trim_end();
            let start = before.rfind('\n').map_or(0, |at| at + 1);
            let start = start + (before[start..].len() - before[start..].trim_start().len());
            Place { start, end: before.len(), ..place }
        }
    }
}

/// A place within `text`, on character boundaries, whatever the parser said.
fn clamp(source: usize, text: &str, span: Range<usize>) -> Place {
    let floor = |mut at: usize| {
        at = at.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let start = floor(span.start);
    Place { source, start, end: floor(span.end.max(start)).max(start) }
}

struct Converter<'t> {
    source: usize,
    text: &'t str,
}

impl Converter<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        clamp(self.source, self.text, span)
    }

    fn table(&self, table: &DeTable<'_>, problems: &mut Problems) -> Table {
        let mut entries: Vec<Entry> = table
            .iter()
            .map(|(key, value)| Entry { name: key.get_ref().to_string(), place: self.place(key.span()), node: self.node(value, problems) })
            .collect();
        // A header that reopens a table moves it to the end of the map.
        entries.sort_by_key(|entry| entry.place.start);
        Table { entries }
    }

    fn node(&self, value: &Spanned<DeValue<'_>>, problems: &mut Problems) -> Node {
        let place = self.place(value.span());
        let value = match value.get_ref() {
            DeValue::String(text) => Value::String(self.string(text, place)),
            DeValue::Integer(number) => {
                let parsed = i64::from_str_radix(number.as_str(), number.radix());
                Value::Integer(parsed.unwrap_or_else(|_| {
                    problems.add(place, "this integer is too large");
                    0
                }))
            }
            DeValue::Float(number) => Value::Float(number.as_str().parse().unwrap_or_else(|_| {
                problems.add(place, "this is not a number");
                0.0
            })),
            DeValue::Boolean(truth) => Value::Boolean(*truth),
            DeValue::Datetime(date) => Value::Datetime(date.to_string()),
            DeValue::Array(items) => Value::Array(items.iter().map(|item| self.node(item, problems)).collect()),
            DeValue::Table(table) => Value::Table(self.table(table, problems)),
        };
        Node { value, place }
    }

    /// Line ends of a checkout under Windows must reach neither bash nor a key;
    /// TOML leaves their normalisation to us. A `\r` written as an escape stays.
    fn string(&self, text: &str, place: Place) -> String {
        let raw = &self.text[place.start..place.end];
        if raw.contains('\r')
            && decode(raw, false).is_some_and(|decoded| decoded.text == text)
            && let Some(normal) = decode(raw, true)
        {
            return normal.text;
        }
        text.to_owned()
    }
}

/// A string's value, and where each of its bytes is in the raw text.
pub(super) struct Decoded {
    pub(super) text: String,
    /// For each byte of `text` the offset in the raw string at which what it
    /// came from begins, and one more for the end.
    pub(super) offsets: Vec<usize>,
}

impl Decoded {
    fn push(&mut self, c: char, raw_offset: usize) {
        self.text.push(c);
        self.offsets.resize(self.text.len(), raw_offset);
    }
}

/// Decodes a TOML string as it is written, quotes included. `None` when it is
/// not one that was understood.
pub(super) fn decode(raw: &str, normalise: bool) -> Option<Decoded> {
    let quote = raw.chars().next().filter(|q| matches!(q, '"' | '\''))?;
    let triple = quote.to_string().repeat(3);
    let multi = raw.len() >= 6 && raw.starts_with(&triple) && raw.ends_with(&triple);
    let width = if multi { 3 } else { 1 };
    let end = raw.len().checked_sub(width)?;
    let mut at = width;
    if multi {
        at += if raw[at..].starts_with("\r\n") { 2 } else { usize::from(raw[at..].starts_with('\n')) };
    }
    let mut decoded = Decoded { text: String::new(), offsets: Vec::new() };
    while at < end {
        let rest = raw.get(at..end)?;
        let c = rest.chars().next()?;
        if c == '\\' && quote == '"' {
            at += escape(rest, at, &mut decoded)?;
        } else if normalise && rest.starts_with("\r\n") {
            decoded.push('\n', at);
            at += 2;
        } else {
            decoded.push(c, at);
            at += c.len_utf8();
        }
    }
    decoded.offsets.push(end);
    Some(decoded)
}

/// Decodes the escape that `rest` begins with; how many bytes it takes.
fn escape(rest: &str, at: usize, decoded: &mut Decoded) -> Option<usize> {
    let letter = rest[1..].chars().next()?;
    let digits = match letter {
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => 0,
    };
    let simple = match letter {
        'b' => '\u{8}',
        't' => '\t',
        'n' => '\n',
        'f' => '\u{c}',
        'r' => '\r',
        'e' => '\u{1b}',
        '"' => '"',
        '\\' => '\\',
        'x' | 'u' | 'U' => char::from_u32(u32::from_str_radix(rest.get(2..2 + digits)?, 16).ok()?)?,
        ' ' | '\t' | '\r' | '\n' => {
            // A backslash at a line's end swallows all white space after it.
            return Some(rest.len() - rest[1..].trim_start_matches([' ', '\t', '\r', '\n']).len());
        }
        _ => return None,
    };
    decoded.push(simple, at);
    Some(2 + digits)
}
