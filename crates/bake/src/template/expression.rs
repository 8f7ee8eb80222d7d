//! `{{ … }}`: finding expressions in a text and evaluating them.
//!
//! Only `{{` and `}}` mean anything. An expression is cut out here and handed
//! to minijinja alone, so that no other syntax of its (`{%`, `{#`) exists and
//! bash's `${#a[@]}` is only text. What an expression refers to is known
//! before it runs, so that git is asked, and a variable's command run, only
//! when something needs it.

use std::collections::BTreeMap;
use std::ops::Range;

use kiln_model::settings::{Entry, Node, Place, Problem, Table, Value as Setting, nearest};
use minijinja::Value;
use minijinja::value::ValueKind;

use super::source::decode;
use super::variables::Scope;

/// What a text is made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'t> {
    /// Text that stays as it is.
    Text(&'t str),
    /// An expression, and where in the text it stands, braces included.
    Expression { code: &'t str, range: Range<usize> },
    /// `{{` without its end.
    Unclosed(Range<usize>),
}

/// Cuts a text into its pieces.
pub(super) fn pieces(text: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some(found) = text[at..].find("{{") {
        let start = at + found;
        if found > 0 {
            pieces.push(Piece::Text(&text[at..start]));
        }
        let inner = &text[start + 2..];
        // An apostrophe that opens no string would hide the end.
        let Some(length) = end_of(inner).or_else(|| inner.find("}}")) else {
            let line = inner.find('\n').unwrap_or(inner.len());
            pieces.push(Piece::Unclosed(start..start + 2 + line));
            return pieces;
        };
        at = start + 2 + length + 2;
        pieces.push(Piece::Expression { code: &inner[..length], range: start..at });
    }
    if at < text.len() {
        pieces.push(Piece::Text(&text[at..]));
    }
    pieces
}

/// Where the `}}` is that ends an expression: not within quotes, and not the
/// end of a table `{…}` in it.
fn end_of(inner: &str) -> Option<usize> {
    let bytes = inner.as_bytes();
    let (mut at, mut depth, mut quote) = (0, 0_u32, None);
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), b) if b == open => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') => quote = Some(bytes[at]),
            (None, b'{') => depth += 1,
            (None, b'}') if depth > 0 => depth -= 1,
            (None, b'}') if bytes.get(at + 1) == Some(&b'}') => return Some(at),
            _ => {}
        }
        at += 1;
    }
    None
}

/// Why an expression has no value.
enum Failure {
    /// Something it uses has no value, which was said already.
    Said,
    /// This is wrong with it.
    Problem(Problem),
}

impl Failure {
    fn new(message: impl Into<String>, help: Option<String>) -> Self {
        Self::Problem(Problem { message: message.into(), place: None, label: None, help })
    }
}

impl Scope<'_> {
    /// `node` with every expression in its texts replaced by its value; texts
    /// named in `verbatim` excepted (`""`: the value itself, else the entry of
    /// a table). A text that is nothing but one expression becomes what the
    /// expression gives: `cpus = "{{ var.cpus }}"` is a number.
    pub(super) fn expand(&mut self, node: &Node, verbatim: &[&str]) -> Node {
        let value = match &node.value {
            Setting::String(text) if verbatim.contains(&"") => {
                self.pass_verbatim(text, node.place);
                Setting::String(text.clone())
            }
            Setting::String(text) => self.expand_text(text, node.place),
            Setting::Array(items) => Setting::Array(items.iter().map(|item| self.expand(item, &[])).collect()),
            Setting::Table(table) => Setting::Table(self.expand_table(table, verbatim)),
            other => other.clone(),
        };
        Node { value, place: node.place }
    }

    fn expand_table(&mut self, table: &Table, verbatim: &[&str]) -> Table {
        let expand = |entry: &Entry| {
            let verbatim: &[&str] = if verbatim.contains(&entry.name.as_str()) { &[""] } else { &[] };
            Entry { node: self.expand(&entry.node, verbatim), ..entry.clone() }
        };
        Table { entries: table.entries.iter().map(expand).collect() }
    }

    /// As [`Scope::expand`], but every value stays text: `version = "{{ var.n }}"`.
    pub(super) fn expand_as_text(&mut self, node: &Node) -> Node {
        let mut expanded = self.expand(node, &[]);
        if matches!(node.value, Setting::String(_))
            && let Some(text) = kiln_model::settings::scalar(&expanded.value)
        {
            expanded.value = Setting::String(text);
        }
        expanded
    }

    fn expand_text(&mut self, text: &str, place: Place) -> Setting {
        let pieces = pieces(text);
        let whole = matches!(pieces[..], [Piece::Expression { .. }]);
        let mut out = String::new();
        let mut failed = false;
        for piece in pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Unclosed(range) => {
                    let place = self.within(place, text, range);
                    self.problems.add(place, "`{{` without its `}}`").help("to write braces as they are: {{ \"{{\" }}");
                    failed = true;
                }
                Piece::Expression { code, range } => {
                    let place = self.within(place, text, range);
                    match self.evaluate(code).and_then(|value| setting(&value)) {
                        Ok(value) if whole => return value,
                        Ok(value) => out.push_str(&kiln_model::settings::scalar(&value).unwrap_or_default()),
                        Err(failure) => {
                            failed = true;
                            if let Failure::Problem(problem) = failure {
                                self.problems.0.push(Problem { place: Some(place), ..problem });
                            }
                        }
                    }
                }
            }
        }
        if failed {
            self.poisoned.push(place);
        }
        Setting::String(out)
    }

    /// Where `range` of a text is in the source, its string standing at `place`.
    pub(super) fn within(&self, place: Place, text: &str, range: Range<usize>) -> Place {
        let found = decode(self.sources.slice(place), true).filter(|decoded| decoded.text == text).and_then(|decoded| {
            let (start, end) = (*decoded.offsets.get(range.start)?, *decoded.offsets.get(range.end)?);
            Some(Place { start: place.start + start, end: place.start + end, ..place })
        });
        found.unwrap_or(place)
    }

    /// A script body: not expanded, but looked at, since people expect it.
    fn pass_verbatim(&mut self, text: &str, place: Place) {
        for piece in pieces(text) {
            let Piece::Expression { code, range } = piece else { continue };
            if let Some(name) = code.trim().strip_prefix("var.").filter(|name| self.is_declared(name)) {
                self.verbatim.push((name.to_owned(), self.within(place, text, range)));
            }
        }
    }

    /// Counts what the expressions in `node` refer to as used, and says nothing
    /// about them: for settings that nobody reads because of another mistake.
    pub(super) fn note_uses(&mut self, node: &Node) {
        match &node.value {
            Setting::String(text) => {
                for piece in pieces(text) {
                    let Piece::Expression { code, .. } = piece else { continue };
                    let Ok(expression) = self.engine.compile_expression(code) else { continue };
                    let names = expression.undeclared_variables(true);
                    self.used.extend(names.iter().filter_map(|name| Some(name.strip_prefix("var.")?.to_owned())));
                }
            }
            Setting::Array(items) => items.iter().for_each(|item| self.note_uses(item)),
            Setting::Table(table) => table.entries.iter().for_each(|entry| self.note_uses(&entry.node)),
            _ => {}
        }
    }

    fn evaluate(&mut self, code: &str) -> Result<Value, Failure> {
        if code.starts_with('-') || code.ends_with('-') {
            return Err(Failure::new("white space control (`{{-`, `-}}`) is not supported", None));
        }
        let engine = std::sync::Arc::clone(&self.engine);
        let expression = engine.compile_expression(code).map_err(|error| {
            let why = error.detail().unwrap_or("it cannot be understood").to_owned();
            Failure::new(format!("not an expression: {why}"), Some("to write braces as they are: {{ \"{{\" }}".into()))
        })?;
        let mut references: Vec<String> = expression.undeclared_variables(true).into_iter().collect();
        references.sort_unstable();
        let mut context: BTreeMap<String, BTreeMap<String, Value>> = BTreeMap::new();
        let mut said = false;
        for reference in &references {
            let (root, rest) = reference.split_once('.').unwrap_or((reference, ""));
            // What follows the name (`var.x.y`) is for the engine to refuse.
            let name = rest.split('.').next().unwrap_or_default();
            match self.look_up(root, name) {
                Ok(value) => drop(context.entry(root.to_owned()).or_default().insert(name.to_owned(), value)),
                Err(Failure::Said) => said = true,
                Err(problem) => return Err(problem),
            }
        }
        if said {
            return Err(Failure::Said);
        }
        let context = Value::from_pairs(context.into_iter().map(|(root, names)| (root, Value::from_pairs(names))));
        expression.eval(context).map_err(|error| {
            let why = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
            Failure::new(format!("this expression has no value: {why}"), None)
        })
    }

    fn look_up(&mut self, root: &str, name: &str) -> Result<Value, Failure> {
        const ROOTS: [&str; 5] = ["var", "git", "image", "base", "time"];
        if !ROOTS.contains(&root) {
            let help = if self.is_declared(root) {
                format!("did you mean `var.{root}`?")
            } else {
                nearest(root, ROOTS)
                    .map_or("expressions see var.*, git.*, image.*, base.* and time.*".into(), |near| format!("did you mean `{near}`?"))
            };
            return Err(Failure::new(format!("`{root}` is not defined"), Some(help)));
        }
        if name.is_empty() {
            return Err(Failure::new(format!("`{root}` is not a value by itself"), Some(format!("write `{root}.NAME`"))));
        }
        match root {
            "var" => self.look_up_variable(name),
            "git" => {
                let told = match name {
                    "commit" => self.git.commit().map(Value::from),
                    "describe" => self.git.describe().map(Value::from),
                    "dirty" => self.git.dirty().map(Value::from),
                    _ => return Err(unknown(root, name, ["commit", "describe", "dirty"])),
                };
                told.map_err(|no| Failure::new(no.message, no.help))
            }
            _ => {
                let known = self.known.get(root);
                match known.and_then(|known| known.get(name)) {
                    Some(Some(value)) => Ok(value.clone()),
                    Some(None) => Err(Failure::Said),
                    None => Err(unknown(root, name, known.into_iter().flatten().map(|(name, _)| name.as_str()))),
                }
            }
        }
    }

    fn look_up_variable(&mut self, name: &str) -> Result<Value, Failure> {
        self.used.insert(name.to_owned());
        if !self.is_declared(name) {
            let near = nearest(name, self.declared()).map(|near| format!("did you mean `var.{near}`?"));
            let help = near.unwrap_or_else(|| format!("declare it: [variables] {name} = \"…\""));
            return Err(Failure::new(format!("the variable `{name}` is not declared"), Some(help)));
        }
        if self.is_sensitive(name) {
            return Err(Failure::new(
                format!("the variable `{name}` is sensitive, so no expression may use it"),
                Some(format!("give it to a step with secrets = [\"{name}\"]; the step finds it in /run/kiln/secrets/{name}")),
            ));
        }
        self.resolve(name).ok_or(Failure::Said)
    }
}

fn unknown<'k>(root: &str, name: &str, known: impl IntoIterator<Item = &'k str>) -> Failure {
    let known: Vec<&str> = known.into_iter().collect();
    let help = match nearest(name, known.iter().copied()) {
        Some(near) => Some(format!("did you mean `{root}.{near}`?")),
        None if known.is_empty() => None,
        None => Some(format!("known here: {}", known.iter().map(|k| format!("{root}.{k}")).collect::<Vec<_>>().join(", "))),
    };
    Failure::new(format!("`{root}.{name}` is not defined here"), help)
}

/// What an expression gave, as a setting.
fn setting(value: &Value) -> Result<Setting, Failure> {
    let what = match value.kind() {
        ValueKind::String => return Ok(Setting::String(value.as_str().unwrap_or_default().to_owned())),
        ValueKind::Bool => return Ok(Setting::Boolean(value.is_true())),
        ValueKind::Number => {
            let whole = if value.is_integer() { value.as_i64() } else { None };
            let number = || f64::try_from(value.clone()).map(Setting::Float);
            return whole
                .map_or_else(number, |whole| Ok(Setting::Integer(whole)))
                .map_err(|_| Failure::new("this number is too large", None));
        }
        ValueKind::Undefined | ValueKind::None => "nothing",
        ValueKind::Seq | ValueKind::Iterable => "a list",
        ValueKind::Map => "a table",
        _ => "something else",
    };
    Err(Failure::new(format!("an expression must give a text, a number or a boolean, and this gives {what}"), None))
}
