//! Settings with their places in the text: what templates are read through,
//! so that every mistake points at its line, all of them at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A stretch of a source text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Which source, counted in the order of reading.
    pub source: usize,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A source text that was read.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its name, for people (a path as the user gave it, or `--var`).
    pub name: String,
    /// Its text.
    pub text: String,
}

/// A mistake in a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, in one sentence.
    pub message: String,
    /// Where; underlined. None: nowhere in a text (a missing `--var`).
    pub place: Option<Place>,
    /// A few words to write below the underlined text.
    pub label: Option<String>,
    /// What to do about it.
    pub help: Option<String>,
}

/// All mistakes found so far.
#[derive(Debug, Clone, Default)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// Adds one.
    pub fn add(&mut self, place: Place, message: impl Into<String>) -> &mut Problem {
        self.push(Problem { message: message.into(), place: Some(place), label: None, help: None })
    }

    /// Adds one that is nowhere in a text.
    pub fn add_nowhere(&mut self, message: impl Into<String>) -> &mut Problem {
        self.push(Problem { message: message.into(), place: None, label: None, help: None })
    }

    /// Whether none was found.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn push(&mut self, problem: Problem) -> &mut Problem {
        self.0.push(problem);
        let last = self.0.len() - 1;
        &mut self.0[last]
    }
}

impl Problem {
    /// Says what to do about it.
    pub fn help(&mut self, help: impl Into<String>) -> &mut Self {
        self.help = Some(help.into());
        self
    }

    /// Says a few words below the underlined text.
    pub fn label(&mut self, label: impl Into<String>) -> &mut Self {
        self.label = Some(label.into());
        self
    }
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The value.
    pub value: Value,
    /// Where it stands.
    pub place: Place,
}

/// A value of a template.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Text.
    String(String),
    /// A whole number.
    Integer(i64),
    /// A number.
    Float(f64),
    /// True or false.
    Boolean(bool),
    /// A date or time, as written.
    Datetime(String),
    /// Several values.
    Array(Vec<Node>),
    /// Named values.
    Table(Table),
}

impl Value {
    /// What it is, for "expected a string, found an integer".
    pub fn kind(&self) -> &'static str {
        match self {
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Boolean(_) => "a boolean",
            Self::Datetime(_) => "a date",
            Self::Array(_) => "an array",
            Self::Table(_) => "a table",
        }
    }
}

/// Named values in the order they were written.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Table {
    /// The entries.
    pub entries: Vec<Entry>,
}

/// One entry of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its key.
    pub name: String,
    /// Where the key stands.
    pub place: Place,
    /// Its value.
    pub node: Node,
}

impl Table {
    /// The entry of that name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }
}

/// Reads a table key by key and complains about whatever it did not ask for.
pub struct Reader<'a> {
    table: &'a Table,
    place: Place,
    what: String,
    known: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    /// Reads `node`, which must be a table; `what` names it for messages
    /// (`[disk]`).
    pub fn new(node: &'a Node, what: impl Into<String>, problems: &mut Problems) -> Option<Self> {
        match &node.value {
            Value::Table(table) => Some(Self { table, place: node.place, what: what.into(), known: Vec::new() }),
            other => {
                problems.add(node.place, format!("{} must be a table, not {}", what.into(), other.kind()));
                None
            }
        }
    }

    /// The place of the whole table.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The entry `name`, whatever it holds.
    pub fn entry(&mut self, name: &'static str) -> Option<&'a Entry> {
        self.known.push(name);
        self.table.get(name)
    }

    /// Complains that `name` is missing.
    pub fn missing(&self, name: &str, problems: &mut Problems) {
        problems.add(self.place, format!("{} needs `{name}`", self.what));
    }

    /// A string.
    pub fn string(&mut self, name: &'static str, problems: &mut Problems) -> Option<&'a str> {
        let entry = self.entry(name)?;
        string_in(&entry.node, name, problems)
    }

    /// A string that must be there.
    pub fn required_string(&mut self, name: &'static str, problems: &mut Problems) -> Option<&'a str> {
        if self.table.get(name).is_none() {
            self.known.push(name);
            self.missing(name, problems);
            return None;
        }
        self.string(name, problems)
    }

    /// True or false.
    pub fn boolean(&mut self, name: &'static str, problems: &mut Problems) -> Option<bool> {
        let entry = self.entry(name)?;
        match entry.node.value {
            Value::Boolean(value) => Some(value),
            _ => wrong_type(&entry.node, name, "a boolean (true or false)", problems),
        }
    }

    /// A whole number that is not negative.
    pub fn integer(&mut self, name: &'static str, problems: &mut Problems) -> Option<u64> {
        let entry = self.entry(name)?;
        match entry.node.value {
            Value::Integer(value) => match u64::try_from(value) {
                Ok(value) => Some(value),
                Err(_) => {
                    problems.add(entry.node.place, format!("`{name}` must not be negative"));
                    None
                }
            },
            _ => wrong_type(&entry.node, name, "an integer", problems),
        }
    }

    /// A size in bytes: `"4GiB"`, `"512 MiB"`, `"10GB"`, or a plain number of bytes.
    pub fn size(&mut self, name: &'static str, problems: &mut Problems) -> Option<u64> {
        let entry = self.entry(name)?;
        match &entry.node.value {
            Value::Integer(value) if *value >= 0 => Some(value.unsigned_abs()),
            Value::String(text) => match parse_size(text) {
                Some(size) => Some(size),
                None => {
                    problems
                        .add(entry.node.place, format!("`{name}` is not a size"))
                        .help("write a number and a unit, such as \"4GiB\" or \"512MiB\"");
                    None
                }
            },
            _ => wrong_type(&entry.node, name, "a size such as \"4GiB\"", problems),
        }
    }

    /// A length of time: `"90s"`, `"5m"`, `"1h30m"`, `"7d"`.
    pub fn duration(&mut self, name: &'static str, problems: &mut Problems) -> Option<Duration> {
        let entry = self.entry(name)?;
        match &entry.node.value {
            Value::String(text) => match parse_duration(text) {
                Some(duration) => Some(duration),
                None => {
                    problems
                        .add(entry.node.place, format!("`{name}` is not a length of time"))
                        .help("write numbers with units, such as \"90s\", \"5m\" or \"1h30m\"");
                    None
                }
            },
            _ => wrong_type(&entry.node, name, "a length of time such as \"5m\"", problems),
        }
    }

    /// Strings, each with its place.
    pub fn strings(&mut self, name: &'static str, problems: &mut Problems) -> Option<Vec<(&'a str, Place)>> {
        let entry = self.entry(name)?;
        match &entry.node.value {
            Value::Array(items) => {
                Some(items.iter().filter_map(|item| string_in(item, name, problems).map(|text| (text, item.place))).collect())
            }
            _ => wrong_type(&entry.node, name, "an array of strings", problems),
        }
    }

    /// A table of scalars as strings.
    pub fn string_map(&mut self, name: &'static str, problems: &mut Problems) -> Option<BTreeMap<String, String>> {
        let entry = self.entry(name)?;
        let Value::Table(table) = &entry.node.value else {
            return wrong_type(&entry.node, name, "a table of strings", problems);
        };
        let mut map = BTreeMap::new();
        for entry in &table.entries {
            if let Some(text) = scalar(&entry.node.value) {
                map.insert(entry.name.clone(), text);
            } else {
                wrong_type::<()>(&entry.node, &entry.name, "a string", problems);
            }
        }
        Some(map)
    }

    /// A path to something that must exist, relative to `folder`.
    pub fn existing_path(&mut self, name: &'static str, folder: &Path, problems: &mut Problems) -> Option<PathBuf> {
        let entry = self.entry(name)?;
        let text = string_in(&entry.node, name, problems)?;
        existing_path(text, entry.node.place, folder, problems)
    }

    /// Ends the reading: everything not asked for is an unknown key.
    pub fn finish(self, problems: &mut Problems) {
        self.finish_with(&[], problems);
    }

    /// As [`Reader::finish`], with keys that others read.
    pub fn finish_with(self, others: &[&'static str], problems: &mut Problems) {
        for entry in &self.table.entries {
            let known = self.known.iter().chain(others);
            if !known.clone().any(|k| *k == entry.name) {
                unknown_key(&self.what, entry, known.copied(), problems);
            }
        }
    }
}

/// Complains about a key that nobody reads, naming the nearest known one.
pub fn unknown_key<'k>(what: &str, entry: &Entry, known: impl IntoIterator<Item = &'k str>, problems: &mut Problems) {
    let known: Vec<&str> = known.into_iter().collect();
    let problem = problems.add(entry.place, format!("unknown key `{}` in {what}", entry.name));
    if let Some(near) = nearest(&entry.name, known.iter().copied()) {
        problem.help(format!("did you mean `{near}`?"));
    } else if !known.is_empty() {
        problem.help(format!("known keys: {}", known.join(", ")));
    }
}

/// The known name nearest to a misspelt one, if one is near.
pub fn nearest<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let best = known.into_iter().map(|k| (strsim::damerau_levenshtein(name, k), k)).min()?;
    (best.0 <= 1 + name.chars().count() / 3 && best.0 < best.1.chars().count()).then_some(best.1)
}

/// A path that must exist, relative to `folder`.
pub fn existing_path(text: &str, place: Place, folder: &Path, problems: &mut Problems) -> Option<PathBuf> {
    let path = folder.join(text);
    match std::fs::symlink_metadata(&path) {
        Ok(_) => Some(path),
        Err(error) => {
            let problem = problems.add(place, format!("cannot read `{text}`: {}", plain_io(&error)));
            problem.help(format!("looked for {}", path.display()));
            None
        }
    }
}

fn plain_io(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file or folder".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

fn string_in<'n>(node: &'n Node, name: &str, problems: &mut Problems) -> Option<&'n str> {
    match &node.value {
        Value::String(text) => Some(text),
        _ => wrong_type(node, name, "a string", problems),
    }
}

/// Complains about a value of the wrong type.
pub fn wrong_type<T>(node: &Node, name: &str, expected: &str, problems: &mut Problems) -> Option<T> {
    problems.add(node.place, format!("`{name}` must be {expected}")).label(format!("this is {}", node.value.kind()));
    None
}

/// A scalar as text.
pub fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) | Value::Datetime(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(truth) => Some(truth.to_string()),
        Value::Array(_) | Value::Table(_) => None,
    }
}

/// Bytes in `"4GiB"`, `"4G"` (the same), `"10GB"` (powers of ten), `"512"`.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let factor: u64 = match text[digits..].trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// A length of time in `"90s"`, `"250ms"`, `"1h30m"`, `"7d"`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = rest[digits..].trim_start();
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let millis = match &rest[..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "w" => 604_800_000,
            _ => return None,
        };
        total = total.checked_add(Duration::from_millis(number.checked_mul(millis)?))?;
        rest = rest[letters..].trim_start();
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(&str, Value)]) -> Node {
        let place = Place::default();
        let entries =
            entries.iter().map(|(name, value)| Entry { name: (*name).into(), place, node: Node { value: value.clone(), place } }).collect();
        Node { value: Value::Table(Table { entries }), place }
    }

    #[test]
    fn unknown_keys_name_the_nearest_known_one() {
        let mut problems = Problems::default();
        let node = table(&[("memroy", Value::String("1GiB".into())), ("zzz", Value::Integer(1))]);
        let mut reader = Reader::new(&node, "[builder.qemu]", &mut problems).unwrap();
        assert_eq!(reader.size("memory", &mut problems), None);
        reader.finish(&mut problems);
        assert_eq!(problems.0[0].help.as_deref(), Some("did you mean `memory`?"));
        assert_eq!(problems.0[1].help.as_deref(), Some("known keys: memory"));
    }

    #[test]
    fn sizes_and_durations() {
        assert_eq!(parse_size("4GiB"), Some(4 << 30));
        assert_eq!(parse_size("4 G"), Some(4 << 30));
        assert_eq!(parse_size("10GB"), Some(10_000_000_000));
        for wrong in ["", "GiB", "4 furlongs", "-1G", "99999999999T"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        for wrong in ["", "5", "m", "5 lightyears", "-1s"] {
            assert_eq!(parse_duration(wrong), None, "{wrong}");
        }
    }
}
