//! What several tools read their settings and outputs with.

use std::path::{Path, PathBuf};

use kiln_model::settings::{Problems, Reader};

/// What a script of kiln's own says begins with this.
const OWN: &str = "kiln: ";

/// A path that must be given, and exist.
pub(super) fn required_path(reader: &mut Reader<'_>, name: &'static str, folder: &Path, problems: &mut Problems) -> Option<PathBuf> {
    if reader.entry(name).is_none() {
        reader.missing(name, problems);
    }
    reader.existing_path(name, folder, problems)
}

/// Whether a name is made of letters, digits and `_`, so that no tool and no
/// shell takes it for anything else.
pub(super) fn is_word(name: &str) -> bool {
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The last part of a path.
pub(super) fn last_part(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What a script of kiln's own says about a failure.
pub(super) fn told(line: &str) -> Option<String> {
    line.strip_prefix(OWN).map(ToOwned::to_owned)
}
