//! The template stage: `kiln.toml` and everything given beside it (variables,
//! var-files, environment, builder) become a [`Template`] in which no variable
//! is left and every input was found, or else all [`Mistakes`] at once.
//!
//! ```text
//!  text ──► source ──► Node tree ──► expression ──► steps, tables ──► Template
//!           (places)                 (variables, git)  (kinds read)
//! ```
//!
//! Every problem carries its [`Place`]; the binary draws it. A string whose
//! expression failed is *poisoned*: what a kind says about it afterwards is
//! dropped, so that one mistake is reported once.

mod command;
mod common;
mod expression;
mod git;
mod given;
mod init;
mod load;
mod source;
mod steps;
mod tables;
#[cfg(test)]
mod tests;
mod variables;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_model::account::Input;
use kiln_model::base::BaseSource;
use kiln_model::image::host_architecture;
use kiln_model::kind::Kind;
use kiln_model::machine::Builder;
use kiln_model::provision::{Common, Provisioner};
use kiln_model::secret::Secret;
use kiln_model::settings::{Place, Problem, Problems, Source};

pub(crate) use git::repository;
pub use init::INIT_TEMPLATE;

/// Kinds for tests of what works with a template.
#[cfg(test)]
pub(crate) mod testing {
    pub(crate) use super::tests::fakes::Fakes;
}

/// What a template is called when only its folder is named.
pub const FILE_NAME: &str = "kiln.toml";

/// How long a cached step may be used unless the template says otherwise: an
/// image must not freeze last month's security fixes.
pub const MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The kinds that are registered; the first builder named `qemu` (or else the
/// first at all) is used by a template that names none.
#[derive(Clone, Copy)]
pub struct Kinds<'a> {
    /// What may name a step.
    pub provisioners: &'a [Box<dyn Kind<dyn Provisioner>>],
    /// What may name a test.
    pub tests: &'a [Box<dyn Kind<dyn Provisioner>>],
    /// What may be a `[builder.NAME]`'s type.
    pub builders: &'a [Box<dyn Kind<dyn Builder>>],
    /// What may stand in `[base]`.
    pub bases: &'a [Box<dyn Kind<dyn BaseSource>>],
}

/// What is given beside the template. No `Debug`: it holds the environment,
/// and with it secrets.
#[derive(Clone)]
pub struct Inputs {
    /// `--var NAME=VALUE`, in order; the last one of a name counts.
    pub vars: Vec<(String, String)>,
    /// `--var-file FILE`, in order; later files win.
    pub var_files: Vec<PathBuf>,
    /// The process's environment; `KILN_VAR_*` is picked from it, and what
    /// `env = "NAME"` names.
    pub environment: Vec<(String, String)>,
    /// `--builder NAME`.
    pub builder: Option<String>,
    /// The architecture to bake for, in OCI's words.
    pub arch: String,
    /// What `time.*` shows.
    pub now: SystemTime,
}

impl Default for Inputs {
    /// Nothing given, this machine's architecture, now.
    fn default() -> Self {
        Self {
            vars: Vec::new(),
            var_files: Vec::new(),
            environment: Vec::new(),
            builder: None,
            arch: host_architecture().to_owned(),
            now: SystemTime::now(),
        }
    }
}

/// All mistakes of a template, sorted by place, and the texts they point into.
#[derive(Debug, Clone)]
pub struct Mistakes {
    /// The texts that were read; [`Place::source`] is an index into them.
    pub sources: Vec<Source>,
    /// The mistakes.
    pub problems: Problems,
}

/// A template, resolved.
pub struct Template {
    /// The file, as it was named.
    pub path: PathBuf,
    /// Its folder, absolute.
    pub folder: PathBuf,
    /// Image name.
    pub name: String,
    /// Image version, a valid tag.
    pub version: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The template itself, and then every file that it includes, by their
    /// paths from its folder.
    pub files: Vec<Input>,
    /// The variables that it uses and that are not sensitive. Without a value:
    /// it was fetched from the environment, a file or a command.
    pub variables: BTreeMap<String, Option<String>>,
    /// Commit of the repository that holds the template, if there is one.
    pub commit: Option<String>,
    /// The base.
    pub base: Box<dyn BaseSource>,
    /// `[disk] size` in bytes. None: the bake decides from the base's size.
    pub disk_size: Option<u64>,
    /// The builder.
    pub builder: Box<dyn Builder>,
    /// The builder's name in the template (`[builder.NAME]`).
    pub builder_name: String,
    /// Architecture, in OCI's words.
    pub architecture: String,
    /// The steps, in order, those that `only` excludes left out.
    pub steps: Vec<StepSpec>,
    /// The tests, likewise.
    pub tests: Vec<StepSpec>,
    /// `[seal] keep`: absolute paths in the guest.
    pub keep: Vec<String>,
    /// `[drift] mutable`: paths in the guest, and patterns of paths.
    pub mutable: Vec<String>,
    /// `[cache] max_age`, already applied to the steps.
    pub max_age: Cache,
    /// `[cache] trusted`: files of the public keys whose checkpoints may be
    /// taken from a registry.
    pub trusted: Vec<PathBuf>,
    /// The secrets that steps and tests use, by name.
    pub secrets: BTreeMap<String, Secret>,
    /// What is probably not meant, though no mistake.
    pub warnings: Vec<Problem>,
    /// The texts that warnings point into.
    pub sources: Vec<Source>,
}

/// A step or test, resolved.
pub struct StepSpec {
    /// The common keys.
    pub common: Common,
    /// What it does.
    pub provisioner: Box<dyn Provisioner>,
    /// Whether and how long what it made may be used again.
    pub cache: Cache,
    /// Whether a checkpoint may be kept after it (`checkpoint = false`).
    pub checkpoint: bool,
    /// On which boots of the finished image a test runs.
    pub boot: Boot,
    /// What the machine of a test is given as user data.
    pub user_data: Option<Vec<u8>>,
    /// Where it stands in the template.
    pub place: Place,
}

/// On which boots of the finished image a test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Boot {
    /// On its first one.
    #[default]
    First,
    /// After a reboot of the same machine.
    Again,
    /// On both.
    Both,
}

impl Boot {
    /// As a template has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Again => "again",
            Self::Both => "both",
        }
    }

    pub(crate) fn is_first(self) -> bool {
        self != Self::Again
    }

    pub(crate) fn is_again(self) -> bool {
        self != Self::First
    }
}

/// Whether and how long a cached step may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Never: it runs in every bake.
    Never,
    /// As long as it is not older than this.
    For(Duration),
    /// However old it is.
    Forever,
}

impl Cache {
    /// Whether something that old may be used.
    pub fn allows(self, age: Duration) -> bool {
        match self {
            Self::Never => false,
            Self::For(limit) => age <= limit,
            Self::Forever => true,
        }
    }
}

/// Reads the template at `path`, a file or a folder that holds a `kiln.toml`.
///
/// Reads files, the environment in `inputs`, and, only where the template asks
/// for it, runs `git` and variables' commands. Changes nothing.
///
/// # Errors
/// Every mistake that was found.
pub fn load(path: &Path, inputs: &Inputs, kinds: &Kinds<'_>) -> Result<Template, Mistakes> {
    load::load(path, inputs, kinds)
}
