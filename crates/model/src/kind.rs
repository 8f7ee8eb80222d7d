//! Kinds: what turns a part of a template into a builder, a base or a step.
//! Registered in one place, `src/registry.rs`.

use std::path::Path;

use crate::settings::{Node, Problems};

/// A kind of `T`: of [`crate::provision::Provisioner`],
/// [`crate::machine::Builder`] or [`crate::base::BaseSource`].
pub trait Kind<T: ?Sized>: Send + Sync {
    /// The key that names it: `shell` in `[[provision]]`, `qemu` in
    /// `[builder.qemu]`, `debian` in `[base]`.
    fn name(&self) -> &'static str;

    /// The keys it reads beside or below its name, for error messages.
    fn keys(&self) -> &'static [&'static str];

    /// Those of its settings that are script bodies, never expanded; `""`
    /// stands for its bare value (`shell = '…'`).
    fn verbatim(&self) -> &'static [&'static str] {
        &[]
    }

    /// Reads its settings: for a provisioner the value of its key, for a
    /// builder its table (an empty one if the template has none), for a base
    /// the whole `[base]` table. Relative paths are relative to `folder`. No
    /// side effects but looking whether inputs exist. Every mistake goes into
    /// `problems`; if there was one, the answer is `None`.
    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<T>>;
}
