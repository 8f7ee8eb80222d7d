//! `[builder.qemu]`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_model::home::Home;
use kiln_model::kind::Kind;
use kiln_model::machine::Builder;
use kiln_model::settings::{Node, Problems, Reader};

use crate::QemuBuilder;

/// The least memory a guest may have, in bytes: less boots no distribution.
const LEAST_MEMORY: u64 = 128 << 20;

/// The most processors that q35 takes.
const MOST_CPUS: u64 = 255;

/// What may accelerate a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accelerator {
    /// KVM where it works, TCG otherwise.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Emulation.
    Tcg,
}

/// How the machine starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
}

/// What `[builder.qemu]` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The guest's memory in bytes.
    pub memory: u64,
    /// How many processors it has.
    pub cpus: u32,
    /// What accelerates it.
    pub accelerator: Accelerator,
    /// How it starts; `None`: BIOS where the base can.
    pub boot: Option<Boot>,
    /// How long it may take until it answers; `None`: by the accelerator.
    pub boot_timeout: Option<Duration>,
    /// The emulator, by name or path.
    pub binary: String,
}

impl Default for Settings {
    fn default() -> Self {
        let host = std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
        Self {
            memory: 1 << 30,
            cpus: host.min(2),
            accelerator: Accelerator::Auto,
            boot: None,
            boot_timeout: None,
            binary: "qemu-system-x86_64".into(),
        }
    }
}

/// The kind `qemu` of `[builder.NAME]`.
pub struct QemuKind {
    diagnostics: PathBuf,
    kept: PathBuf,
}

impl QemuKind {
    /// Builders that leave screenshots in `diagnostics/` and kept disks in
    /// `kept/` below `home`.
    pub fn new(home: &Home) -> Self {
        Self { diagnostics: home.root().join("diagnostics"), kept: home.root().join("kept") }
    }

    /// A builder with settings that come from no template (`kiln run`).
    pub fn builder(&self, settings: Settings) -> QemuBuilder {
        QemuBuilder { settings, diagnostics: self.diagnostics.clone(), kept: self.kept.clone(), chosen: tokio::sync::OnceCell::new() }
    }
}

impl Kind<dyn Builder> for QemuKind {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["memory", "cpus", "accelerator", "firmware", "boot_timeout", "binary"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Builder>> {
        let settings = read(settings, folder, problems)?;
        Some(Box::new(self.builder(settings)))
    }
}

fn read(node: &Node, folder: &Path, problems: &mut Problems) -> Option<Settings> {
    let before = problems.0.len();
    let mut reader = Reader::new(node, "[builder.qemu]", problems)?;
    let mut settings = Settings::default();
    if let Some(memory) = reader.size("memory", problems) {
        if !(LEAST_MEMORY..=1 << 44).contains(&memory) {
            let place = reader.entry("memory").map_or(node.place, |entry| entry.node.place);
            problems.add(place, "`memory` must be at least 128MiB, and no more than a machine can have").help("such as \"1GiB\"");
        }
        // QEMU takes whole MiB.
        settings.memory = memory.next_multiple_of(1 << 20);
    }
    if let Some(cpus) = reader.integer("cpus", problems) {
        match u32::try_from(cpus) {
            Ok(count) if (1..=MOST_CPUS).contains(&cpus) => settings.cpus = count,
            _ => {
                let place = reader.entry("cpus").map_or(node.place, |entry| entry.node.place);
                problems.add(place, format!("`cpus` must be between 1 and {MOST_CPUS}"));
            }
        }
    }
    let accelerators = [("auto", Accelerator::Auto), ("kvm", Accelerator::Kvm), ("tcg", Accelerator::Tcg)];
    if let Some(accelerator) = choice(&mut reader, "accelerator", &accelerators, problems) {
        settings.accelerator = accelerator;
    }
    settings.boot = choice(&mut reader, "firmware", &[("bios", Boot::Bios), ("uefi", Boot::Uefi)], problems);
    settings.boot_timeout = reader.duration("boot_timeout", problems);
    if settings.boot_timeout == Some(Duration::ZERO) {
        let place = reader.entry("boot_timeout").map_or(node.place, |entry| entry.node.place);
        problems.add(place, "`boot_timeout` must be longer than nothing");
    }
    if let Some(binary) = reader.string("binary", problems) {
        // A name is looked for in PATH; a path is relative to the template.
        settings.binary = if binary.contains('/') { folder.join(binary).display().to_string() } else { binary.to_owned() };
        if binary.is_empty() {
            let place = reader.entry("binary").map_or(node.place, |entry| entry.node.place);
            problems.add(place, "`binary` is empty").help("leave it out to use qemu-system-x86_64");
        }
    }
    // `type` names the kind; whoever chose this one has read it.
    reader.finish_with(&["type"], problems);
    (problems.0.len() == before).then_some(settings)
}

fn choice<T: Copy>(reader: &mut Reader<'_>, name: &'static str, choices: &[(&str, T)], problems: &mut Problems) -> Option<T> {
    let text = reader.string(name, problems)?;
    if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
        return Some(*value);
    }
    let place = reader.entry(name).map_or(reader.place(), |entry| entry.node.place);
    let words: Vec<String> = choices.iter().map(|(word, _)| format!("\"{word}\"")).collect();
    problems.add(place, format!("`{name}` must be one of {}", words.join(", ")));
    None
}

#[cfg(test)]
mod tests {
    use kiln_model::settings::{Entry, Place, Table, Value};

    use super::*;

    fn table(entries: &[(&str, Value)]) -> Node {
        let place = Place::default();
        let entry = |(name, value): &(&str, Value)| Entry { name: (*name).into(), place, node: Node { value: value.clone(), place } };
        Node { value: Value::Table(Table { entries: entries.iter().map(entry).collect() }), place }
    }

    fn text(text: &str) -> Value {
        Value::String(text.into())
    }

    #[test]
    fn an_empty_table_means_the_defaults() {
        let mut problems = Problems::default();
        assert_eq!(read(&table(&[]), Path::new("."), &mut problems), Some(Settings::default()));
        assert!(problems.is_empty());
    }

    #[test]
    fn everything_that_can_be_said() {
        let node = table(&[
            ("type", text("qemu")),
            ("memory", text("2GiB")),
            ("cpus", Value::Integer(3)),
            ("accelerator", text("tcg")),
            ("firmware", text("uefi")),
            ("boot_timeout", text("20m")),
            ("binary", text("bin/qemu")),
        ]);
        let expected = Settings {
            memory: 2 << 30,
            cpus: 3,
            accelerator: Accelerator::Tcg,
            boot: Some(Boot::Uefi),
            boot_timeout: Some(Duration::from_secs(1200)),
            binary: "/t/bin/qemu".into(),
        };
        assert_eq!(read(&node, Path::new("/t"), &mut Problems::default()), Some(expected));
    }

    #[test]
    fn every_mistake_is_found_at_once() {
        let node = table(&[
            ("memory", text("1KiB")),
            ("cpus", Value::Integer(0)),
            ("accelerator", text("hvf")),
            ("firmware", Value::Integer(1)),
            ("boot_timeout", text("soon")),
            ("memroy", text("1GiB")),
        ]);
        let mut problems = Problems::default();
        assert_eq!(read(&node, Path::new("."), &mut problems), None);
        assert_eq!(problems.0.len(), 6, "{problems:?}");
    }
}
