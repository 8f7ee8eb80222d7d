//! `[variables]`: what is declared, what is given, and the value that follows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use kiln_model::secret::Secret;
use kiln_model::settings::{Entry, Node, Place, Problem, Problems, Reader, Value as Setting, nearest, scalar};
use minijinja::{Environment, UndefinedBehavior, Value};

use super::command;
use super::git::Git;
use super::given::{Given, Origin};
use super::source::Sources;
use super::{Inputs, given};

/// What a variable may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    String,
    Integer,
    Number,
    Boolean,
}

const TYPES: [&str; 4] = ["string", "integer", "number", "boolean"];

impl Type {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "string" => Self::String,
            "integer" => Self::Integer,
            "number" => Self::Number,
            "boolean" => Self::Boolean,
            _ => return None,
        })
    }

    fn of(value: &Setting) -> Option<Self> {
        match value {
            Setting::String(_) | Setting::Datetime(_) => Some(Self::String),
            Setting::Integer(_) => Some(Self::Integer),
            Setting::Float(_) => Some(Self::Number),
            Setting::Boolean(_) => Some(Self::Boolean),
            Setting::Array(_) | Setting::Table(_) => None,
        }
    }

    pub(super) fn phrase(self) -> &'static str {
        match self {
            Self::String => "a string",
            Self::Integer => "an integer",
            Self::Number => "a number",
            Self::Boolean => "a boolean (true or false)",
        }
    }

    /// A value that came as text.
    fn parse(self, text: &str) -> Option<Value> {
        match self {
            Self::String => Some(Value::from(text)),
            Self::Integer => text.trim().parse::<i64>().ok().map(Value::from),
            Self::Number => text.trim().parse::<f64>().ok().filter(|number| number.is_finite()).map(Value::from),
            Self::Boolean => text.trim().parse::<bool>().ok().map(Value::from),
        }
    }

    /// A value that came from TOML.
    fn take(self, value: &Setting) -> Option<Value> {
        match (self, value) {
            (Self::String, Setting::String(text) | Setting::Datetime(text)) => Some(Value::from(text.as_str())),
            (Self::Integer, Setting::Integer(number)) => Some(Value::from(*number)),
            // Exact up to 2^53, which is what a TOML number promises anyway.
            #[allow(clippy::cast_precision_loss)]
            (Self::Number, Setting::Integer(number)) => Some(Value::from(*number as f64)),
            (Self::Number, Setting::Float(number)) => Some(Value::from(*number)),
            (Self::Boolean, Setting::Boolean(truth)) => Some(Value::from(*truth)),
            _ => None,
        }
    }
}

/// Where a declared variable takes its value from when none is given.
#[derive(Debug, Clone, Copy)]
enum From {
    Env,
    File,
    Command,
}

/// A declared variable.
pub(super) struct Variable {
    place: Place,
    kind: Type,
    pub(super) sensitive: bool,
    from: Option<(From, Node)>,
    default: Option<Node>,
    state: State,
}

/// How far the search for a value is.
enum State {
    Open,
    Busy,
    /// `None`: it has none, and a problem says why.
    Done(Option<Value>),
}

/// What expressions see, and what is learnt by evaluating them.
pub(super) struct Scope<'a> {
    pub(super) inputs: &'a Inputs,
    pub(super) folder: PathBuf,
    pub(super) sources: Sources,
    /// Mistakes of expressions and variables. Apart from those of the readers,
    /// which are filtered by `poisoned`.
    pub(super) problems: Problems,
    /// Texts whose expansion failed.
    pub(super) poisoned: Vec<Place>,
    /// Variables that something refers to.
    pub(super) used: BTreeSet<String>,
    /// `{{ var.NAME }}` in script bodies, where it is only text.
    pub(super) verbatim: Vec<(String, Place)>,
    pub(super) engine: Arc<Environment<'static>>,
    pub(super) git: Git,
    /// `image.*`, `base.*`, `time.*`; a value that is `None` could not be had,
    /// and that was said.
    pub(super) known: BTreeMap<&'static str, BTreeMap<String, Option<Value>>>,
    variables: BTreeMap<String, Variable>,
    given: BTreeMap<String, Given>,
}

impl<'a> Scope<'a> {
    pub(super) fn new(inputs: &'a Inputs, folder: &Path, sources: Sources) -> Self {
        let mut engine = Environment::new();
        engine.set_undefined_behavior(UndefinedBehavior::Strict);
        for function in ["debug", "dict", "namespace", "range"] {
            engine.remove_global(function);
        }
        Self {
            inputs,
            folder: folder.to_owned(),
            sources,
            problems: Problems::default(),
            poisoned: Vec::new(),
            used: BTreeSet::new(),
            verbatim: Vec::new(),
            engine: Arc::new(engine),
            git: Git::new(folder),
            known: BTreeMap::from([("image", BTreeMap::new()), ("base", BTreeMap::new()), ("time", time(inputs))]),
            variables: BTreeMap::new(),
            given: BTreeMap::new(),
        }
    }

    /// Lets expressions see `ROOT.NAME`; `None`: it has no value, as was said.
    pub(super) fn know(&mut self, root: &'static str, name: &str, value: Option<&str>) {
        self.known.entry(root).or_default().insert(name.to_owned(), value.map(Value::from));
    }

    pub(super) fn is_declared(&self, name: &str) -> bool {
        self.variables.contains_key(name)
    }

    pub(super) fn is_sensitive(&self, name: &str) -> bool {
        self.variables.get(name).is_some_and(|variable| variable.sensitive)
    }

    /// Where a variable is declared.
    pub(super) fn place_of(&self, name: &str) -> Option<Place> {
        self.variables.get(name).map(|variable| variable.place)
    }

    pub(super) fn declared(&self) -> impl Iterator<Item = &str> {
        self.variables.keys().map(String::as_str)
    }

    /// Reads `[variables]`.
    pub(super) fn declare(&mut self, node: &Node) {
        let Setting::Table(table) = &node.value else {
            self.problems.add(node.place, format!("[variables] must be a table, not {}", node.value.kind()));
            return;
        };
        for entry in &table.entries {
            let mut letters = entry.name.bytes();
            let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            if !(letters.next().is_some_and(|b| word(b) && !b.is_ascii_digit()) && letters.all(word)) {
                self.problems.add(entry.place, "a variable's name is made of letters, digits and `_`, and does not begin with a digit");
                continue;
            }
            let variable = declare(entry, &mut self.problems);
            self.variables.insert(entry.name.clone(), variable);
        }
    }

    /// Takes what was given: the environment, then var-files, then `--var`,
    /// the later over the earlier.
    pub(super) fn take_given(&mut self) {
        let all = given::collect(self.inputs, &self.variables, &mut self.sources, &mut self.problems);
        for (name, given) in all {
            let Some(variable) = self.variables.get(&name) else {
                // Another program's, perhaps: the environment is everyone's.
                if given.origin != Origin::Environment {
                    let problem = self.problems.add(given.place, format!("the variable `{name}` is not declared"));
                    let near = nearest(&name, self.variables.keys().map(String::as_str));
                    problem.help(
                        near.map_or_else(
                            || "the template's [variables] declare what may be given".into(),
                            |n| format!("did you mean `{n}`?"),
                        ),
                    );
                }
                continue;
            };
            if variable.sensitive && given.origin == Origin::Argument {
                self.problems
                    .add(
                        given.place,
                        format!("`--var` cannot give the sensitive variable `{name}`: everyone on this machine can read a command line"),
                    )
                    .help(format!(
                        "declare it with env = …, file = … or command = …, set KILN_VAR_{name}, or write it to a --var-file with mode 0600"
                    ));
                // One mistake is enough: that it has no value follows from it.
                self.give_up(&name);
                continue;
            }
            if variable.sensitive && given.origin == Origin::OpenFile {
                self.problems
                    .add(given.place, format!("the sensitive variable `{name}` is in a file that others can read"))
                    .help("make it yours alone: chmod 600 FILE");
                self.give_up(&name);
                continue;
            }
            self.given.insert(name, given);
        }
    }

    fn give_up(&mut self, name: &str) {
        if let Some(variable) = self.variables.get_mut(name) {
            variable.state = State::Done(None);
        }
    }

    /// A variable's value. `None`: it has none, and a problem says why.
    pub(super) fn resolve(&mut self, name: &str) -> Option<Value> {
        let variable = self.variables.get_mut(name)?;
        match std::mem::replace(&mut variable.state, State::Busy) {
            State::Done(value) => {
                variable.state = State::Done(value.clone());
                return value;
            }
            State::Busy => {
                let place = variable.place;
                variable.state = State::Done(None);
                self.problems.add(place, format!("the variable `{name}` needs itself to be known"));
                return None;
            }
            State::Open => {}
        }
        let value = self.search(name);
        let variable = self.variables.get_mut(name)?;
        // A cycle was found on the way: it was said, so it stays without value.
        let value = if matches!(variable.state, State::Busy) { value } else { None };
        variable.state = State::Done(value.clone());
        value
    }

    /// The variables that something uses and that are not sensitive. The value
    /// of one that was fetched from the environment, a file or a command is left
    /// out: somebody may have forgotten to say that it is sensitive.
    pub(super) fn shown(&self) -> BTreeMap<String, Option<String>> {
        let open = |(name, variable): &(&String, &Variable)| !variable.sensitive && self.used.contains(*name);
        let shown = |(name, variable): (&String, &Variable)| {
            let written = variable.from.is_none() || self.given.contains_key(name);
            let value = match &variable.state {
                State::Done(Some(value)) if written => Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned)),
                _ => None,
            };
            (name.clone(), value)
        };
        self.variables.iter().filter(open).map(shown).collect()
    }

    /// A sensitive variable's value, for the steps that name it.
    pub(super) fn resolve_secret(&mut self, name: &str) -> Option<Secret> {
        let value = self.resolve(name)?;
        Some(Secret::new(value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
    }

    fn search(&mut self, name: &str) -> Option<Value> {
        let variable = self.variables.get(name)?;
        let (kind, sensitive, place) = (variable.kind, variable.sensitive, variable.place);
        let (from, default) = (variable.from.clone(), variable.default.clone());
        if let Some(given) = self.given.get(name) {
            let value = match &given.value {
                Setting::String(text) if given.origin != Origin::OpenFile && given.origin != Origin::PrivateFile => kind.parse(text),
                value => kind.take(value),
            };
            let (place, found) = (given.value_place, given.value.kind());
            return self.checked(name, value, place, (kind, sensitive), found);
        }
        if let Some((from, node)) = from
            && let Some(text) = self.fetch(name, from, &node, sensitive, default.is_some())?
        {
            return self.checked(name, kind.parse(&text), node.place, (kind, sensitive), "something else");
        }
        if let Some(node) = default {
            let before = self.poisoned.len();
            let expanded = self.expand(&node, &[]);
            if self.poisoned.len() > before {
                return None;
            }
            let value = match kind {
                Type::String => scalar(&expanded.value).map(Value::from),
                _ => kind.take(&expanded.value),
            };
            return self.checked(name, value, node.place, (kind, sensitive), expanded.value.kind());
        }
        let environment = format!("KILN_VAR_{name}");
        let problem = self.problems.add(place, format!("the variable `{name}` has no value"));
        problem.help(if sensitive {
            format!("set {environment}, or write it to a --var-file with mode 0600")
        } else {
            format!("give it with --var {name}=…, a --var-file, or {environment}")
        });
        None
    }

    /// Complains about a value of the wrong type, or a secret that is empty.
    fn checked(&mut self, name: &str, value: Option<Value>, place: Place, (kind, sensitive): (Type, bool), found: &str) -> Option<Value> {
        match value {
            Some(value) if sensitive && value.as_str() == Some("") => {
                self.problems.add(place, format!("the sensitive variable `{name}` is empty"));
                None
            }
            Some(value) => Some(value),
            None => {
                let problem = self.problems.add(place, format!("the variable `{name}` must be {}", kind.phrase()));
                if !sensitive {
                    problem.label(format!("this is {found}"));
                }
                None
            }
        }
    }

    /// Gets a value from where the declaration says. The outer `None`: a
    /// problem was said; the inner one: an environment variable is not set and
    /// there is a default to take.
    fn fetch(&mut self, name: &str, from: From, node: &Node, sensitive: bool, has_default: bool) -> Option<Option<String>> {
        let Setting::String(written) = &node.value else { return None };
        let fail = |scope: &mut Self, message: String, help: Option<String>| {
            scope.problems.0.push(Problem { message, place: Some(node.place), label: None, help });
            None
        };
        match from {
            From::Env => match self.inputs.environment.iter().rev().find(|(key, _)| key == written) {
                Some((_, value)) => Some(Some(value.clone())),
                None if has_default => Some(None),
                None => fail(
                    self,
                    format!("the variable `{name}` has no value: {written} is not set in the environment"),
                    Some(format!("set {written} or KILN_VAR_{name}")),
                ),
            },
            From::File => {
                let before = self.poisoned.len();
                let expanded = self.expand_as_text(node);
                let path = scalar(&expanded.value).filter(|_| self.poisoned.len() == before)?;
                let path = self.folder.join(path);
                match std::fs::read_to_string(&path) {
                    Ok(text) => Some(Some(trim(&text).to_owned())),
                    Err(error) => fail(self, format!("cannot read `{}` for the variable `{name}`: {error}", path.display()), None),
                }
            }
            From::Command => match command::run(written, &self.folder, command::LIMIT) {
                Ok(text) => Some(Some(trim(&text).to_owned())),
                Err(failure) => {
                    // What a command that fetches a secret writes may hold it.
                    let shown = (!sensitive && !failure.stderr.is_empty()).then(|| format!("it said: {}", failure.stderr));
                    fail(self, format!("the variable `{name}` has no value: {}", failure.message), shown)
                }
            },
        }
    }

    /// Complains about every variable that nothing refers to.
    pub(super) fn find_unused(&mut self) {
        for (name, variable) in &self.variables {
            if self.used.contains(name) {
                continue;
            }
            let problem = self.problems.add(variable.place, format!("the variable `{name}` is not used"));
            if self.verbatim.iter().any(|(used, _)| used == name) {
                let upper = name.to_uppercase();
                problem.help(format!(
                    "script bodies are never expanded; pass it with env = {{ {upper} = \"{{{{ var.{name} }}}}\" }} and write \"${upper}\""
                ));
            } else if variable.sensitive {
                problem.help(format!("give it to a step with secrets = [\"{name}\"], or remove it"));
            } else {
                problem.help("use it, or remove it");
            }
        }
    }
}

/// Files and commands end in a newline that is not meant; a text of several
/// lines (a private key) needs its last one.
fn trim(text: &str) -> &str {
    let trimmed = text.trim_end_matches(['\n', '\r']);
    if trimmed.contains('\n') { text } else { trimmed }
}

fn declare(entry: &Entry, problems: &mut Problems) -> Variable {
    let mut variable = Variable { place: entry.place, kind: Type::String, sensitive: false, from: None, default: None, state: State::Open };
    let before = problems.0.len();
    if let Some(kind) = Type::of(&entry.node.value) {
        variable.kind = kind;
        variable.default = Some(entry.node.clone());
        return variable;
    }
    let what = format!("the variable `{}`", entry.name);
    if let Some(mut reader) = Reader::new(&entry.node, &what, problems) {
        variable.sensitive = reader.boolean("sensitive", problems).unwrap_or_default();
        reader.string("description", problems);
        let kind = reader.entry("type").and_then(|kind| read_type(&kind.node, problems));
        if let Some(default) = reader.entry("default") {
            let of = Type::of(&default.node.value);
            if of.is_none() {
                kiln_model::settings::wrong_type::<()>(&default.node, "default", "a string, a number or a boolean", problems);
            }
            if variable.sensitive {
                problems
                    .add(default.place, format!("{what} is sensitive, so its value cannot stand in the template"))
                    .help("take it from env = …, file = … or command = …");
            }
            variable.kind = of.unwrap_or(Type::String);
            variable.default = Some(default.node.clone());
        }
        variable.kind = kind.unwrap_or(variable.kind);
        let sources = [("env", From::Env), ("file", From::File), ("command", From::Command)];
        for (name, from) in sources {
            let Some(source) = reader.entry(name) else { continue };
            if variable.from.is_some() {
                problems.add(source.place, format!("{what} can have one of env, file and command"));
            } else if !matches!(source.node.value, Setting::String(_)) {
                kiln_model::settings::wrong_type::<()>(&source.node, name, "a string", problems);
            } else {
                variable.from = Some((from, source.node.clone()));
            }
        }
        reader.finish(problems);
    }
    if problems.0.len() > before {
        variable.state = State::Done(None);
    }
    variable
}

fn read_type(node: &Node, problems: &mut Problems) -> Option<Type> {
    let Setting::String(text) = &node.value else {
        return kiln_model::settings::wrong_type(node, "type", "a string", problems);
    };
    let kind = Type::named(text);
    if kind.is_none() {
        let near =
            nearest(text, TYPES).map_or_else(|| format!("known types: {}", TYPES.join(", ")), |near| format!("did you mean `{near}`?"));
        problems.add(node.place, format!("`{text}` is no type")).help(near);
    }
    kind
}

/// `time.*`, in UTC, the same in every expression of one bake.
fn time(inputs: &Inputs) -> BTreeMap<String, Option<Value>> {
    let now = Timestamp::try_from(inputs.now).unwrap_or_default();
    let show = |format: &str| Some(Value::from(now.to_zoned(TimeZone::UTC).strftime(format).to_string()));
    BTreeMap::from([
        ("date".to_owned(), show("%Y-%m-%d")),
        ("rfc3339".to_owned(), show("%Y-%m-%dT%H:%M:%SZ")),
        ("stamp".to_owned(), show("%Y%m%dT%H%M%SZ")),
        ("unix".to_owned(), Some(Value::from(now.as_second()))),
    ])
}
