//! Reading a template from top to bottom.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kiln_model::account::Input;
use kiln_model::secret::Secret;
use kiln_model::settings::{Entry, Node, Place, Problem, Problems, Table, Value, unknown_key};

use super::source::{self, Sources};
use super::steps::Section;
use super::variables::Scope;
use super::{FILE_NAME, Inputs, Kinds, Mistakes, Template};

/// The tables of a template.
const TABLES: [&str; 10] = ["image", "base", "disk", "variables", "builder", "provision", "test", "seal", "drift", "cache"];
/// Names that a later version will give a meaning.
pub(super) const RESERVED: [&str; 4] = ["matrix", "locals", "when", "publish"];
/// What people may look for here but find in `/etc/kiln/config.toml`.
const SITE: [&str; 3] = ["proxy", "mirror", "ca_certificates"];

/// What reading a template needs at hand.
pub(super) struct Loader<'a> {
    pub(super) scope: Scope<'a>,
    pub(super) kinds: Kinds<'a>,
    /// Mistakes found by readers, kinds among them.
    pub(super) problems: Problems,
    pub(super) warnings: Vec<Problem>,
    /// Name and kind of each `[builder.NAME]`.
    pub(super) builders: Vec<(String, String)>,
    /// Name and kind of the one that is used.
    pub(super) chosen: (String, String),
    /// An include could not be read, so what it would have used is not known.
    pub(super) incomplete: bool,
}

pub(super) fn load(path: &Path, inputs: &Inputs, kinds: &Kinds<'_>) -> Result<Template, Mistakes> {
    let path = if path.is_dir() { path.join(FILE_NAME) } else { path.to_owned() };
    let mut sources = Sources::default();
    let mut problems = Problems::default();
    let Some(root) = read(&path, &path, &mut sources, &mut problems) else {
        return Err(Mistakes { sources: sources.0, problems });
    };
    let folder = folder_of(&path);
    let scope = Scope::new(inputs, &folder, sources);
    let (warnings, chosen) = (Vec::new(), Default::default());
    let mut loader = Loader { scope, kinds: *kinds, problems, warnings, builders: Vec::new(), chosen, incomplete: false };

    check_tables(&root, &mut loader.problems);
    if let Some(variables) = root.get("variables") {
        loader.scope.declare(&variables.node);
    }
    loader.scope.take_given();
    let name = loader.image_name(root.get("image"));
    let mut base = loader.base(root.get("base"), &folder);
    let (version, labels) = loader.version_and_labels(root.get("image"));
    let builder = loader.builder(root.get("builder"), &folder);
    if let (Some(base), Some(region)) = (&mut base, builder.as_ref().and_then(|builder| builder.region())) {
        base.builder_is_at(region);
    }
    let disk_size = loader.disk(root.get("disk"));
    let keep = loader.keep(root.get("seal"));
    let mutable = loader.mutable(root.get("drift"));
    let (max_age, trusted) = loader.cache(root.get("cache"), &folder);
    let steps = loader.steps(&root, &path, Section::Provision, max_age);
    let tests = loader.steps(&root, &path, Section::Test, max_age);
    let names: BTreeSet<&String> = steps.iter().chain(&tests).flat_map(|step| &step.common.secrets).collect();
    let secrets = names.into_iter().filter_map(|name| Some((name.clone(), loader.secret_value(name)?))).collect();
    if !loader.incomplete {
        loader.scope.find_unused();
    }
    loader.warn();

    let commit = loader.scope.git.commit().ok();
    let architecture = inputs.arch.clone();
    let (builder_name, _) = loader.chosen.clone();
    let variables = loader.scope.shown();
    let files = std::mem::take(&mut loader.scope.sources.1);
    let files = files.into_iter().map(|(path, digest)| Input { name: relative(&path, &folder), digest }).collect();
    let (problems, warnings, sources) = loader.finish();
    match (name, version, base, builder) {
        (Some(name), Some(version), Some(base), Some(builder)) if problems.is_empty() => Ok(Template {
            path,
            folder,
            name,
            version,
            labels,
            files,
            variables,
            commit,
            base,
            disk_size,
            builder,
            builder_name,
            architecture,
            steps,
            tests,
            keep,
            mutable,
            max_age,
            trusted,
            secrets,
            warnings,
            sources,
        }),
        _ => Err(Mistakes { sources, problems }),
    }
}

/// Reads and parses a file; `name` is what people know it by. `None`: a problem
/// says why.
pub(super) fn read(path: &Path, name: &Path, sources: &mut Sources, problems: &mut Problems) -> Option<Table> {
    let name = name.display().to_string();
    let text = match std::fs::read(path).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => {
            let valid = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            let source = sources.add(name, text);
            problems.add(
                Place { source, start: valid, end: valid + char::REPLACEMENT_CHARACTER.len_utf8() },
                "a template is UTF-8, and this is not",
            );
            return None;
        }
        Err(error) => {
            let problem = problems.add_nowhere(format!("cannot read the template `{name}`: {error}"));
            if error.kind() == std::io::ErrorKind::NotFound {
                problem.help("name a template or a folder that holds a kiln.toml; `kiln init` writes a first one");
            }
            return None;
        }
    };
    let source = sources.add(name, text.clone());
    sources.template(path, &text);
    match source::parse(source, &text, problems)?.value {
        Value::Table(table) => Some(table),
        _ => None,
    }
}

/// The absolute folder of a file: what the template names is found wherever
/// kiln is called from.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

/// A path as it is written from `folder`; what is elsewhere altogether is named
/// by its last part alone, since where it lies on this machine is nobody's
/// business.
fn relative(path: &Path, folder: &Path) -> String {
    match path.strip_prefix(folder) {
        Ok(below) => below.display().to_string(),
        Err(_) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    }
}

fn check_tables(root: &Table, problems: &mut Problems) {
    for entry in &root.entries {
        let name = entry.name.as_str();
        if TABLES.contains(&name) {
            continue;
        }
        if RESERVED.contains(&name) {
            reserved(entry, problems);
        } else if SITE.contains(&name) {
            problems
                .add(entry.place, format!("`{name}` is a setting of the site, not of a template"))
                .help("write it to /etc/kiln/config.toml or to your own configuration");
        } else {
            unknown_key("the template", entry, TABLES, problems);
        }
    }
    for name in ["image", "base"] {
        if root.get(name).is_none() {
            problems.add_nowhere(format!("the template has no [{name}]")).help(match name {
                "image" => "write [image] with name = \"…\"",
                _ => "write [base] with what to start from, such as debian = \"bookworm\"",
            });
        }
    }
}

pub(super) fn reserved(entry: &Entry, problems: &mut Problems) {
    problems.add(entry.place, format!("`{}` is reserved for a later version of kiln", entry.name));
}

impl Loader<'_> {
    /// The table of an entry with its texts expanded, as a node to read.
    pub(super) fn expanded(&mut self, entry: &Entry) -> Node {
        self.scope.expand(&entry.node, &[])
    }

    fn secret_value(&mut self, name: &str) -> Option<Secret> {
        let secret = self.scope.resolve_secret(name)?;
        if secret.expose().trim().chars().count() < 4 {
            self.warnings.push(Problem {
                message: format!("`{name}` is too short to be hidden in logs should a step print it"),
                place: self.scope.place_of(name),
                label: None,
                help: None,
            });
        }
        Some(secret)
    }

    /// `{{ var.x }}` in a script body is text, and seldom meant so.
    fn warn(&mut self) {
        for (name, place) in std::mem::take(&mut self.scope.verbatim) {
            if self.scope.used.contains(&name) {
                self.warnings.push(Problem {
                    message: "script bodies are never expanded, so these braces reach the guest as they are".into(),
                    place: Some(place),
                    label: None,
                    help: Some(format!("pass the value with env = {{ {} = \"{{{{ var.{name} }}}}\" }}", name.to_uppercase())),
                });
            }
        }
    }

    /// All problems in the order of their places, those left out that only
    /// follow from a failed expression.
    fn finish(self) -> (Problems, Vec<Problem>, Vec<kiln_model::settings::Source>) {
        let poisoned = self.scope.poisoned;
        let follows = |place: Place| poisoned.iter().any(|p| p.source == place.source && p.start <= place.start && place.end <= p.end);
        let mut all = self.scope.problems.0;
        all.extend(self.problems.0.into_iter().filter(|problem| !problem.place.is_some_and(follows)));
        all.sort_by_key(|problem| problem.place.map(|place| (place.source, place.start, place.end)));
        all.dedup();
        (Problems(all), self.warnings, self.scope.sources.0)
    }
}
