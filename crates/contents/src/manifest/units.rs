//! What systemd is told to start, from what is on the disk: links in the
//! `.wants` folders of `/etc`, links to `/dev/null`, drop-ins. The same for an
//! image and for a machine, since both are asked for their files alone.

use std::collections::BTreeMap;

use super::{Node, NodeKind};

/// Where units are, the ones that count more first.
const FOLDERS: [&str; 4] = ["/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];
const ETC: &str = FOLDERS[0];

const SUFFIXES: [&str; 10] = [".service", ".socket", ".target", ".timer", ".mount", ".automount", ".path", ".slice", ".swap", ".scope"];

/// A unit's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnitState {
    /// It cannot be started.
    Masked,
    /// Something in `/etc` wants it.
    Enabled,
    /// It is there, and starts when something else asks for it.
    Present,
}

impl UnitState {
    /// In a word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Masked => "masked",
            Self::Enabled => "enabled",
            Self::Present => "present",
        }
    }

    pub(super) fn of_word(word: &str) -> Option<Self> {
        [Self::Masked, Self::Enabled, Self::Present].into_iter().find(|state| state.word() == word)
    }
}

/// A unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its state.
    pub state: UnitState,
    /// What wants it, by links in `/etc`.
    pub wanted_by: Vec<String>,
    /// Its drop-ins in `/etc`.
    pub drop_ins: Vec<String>,
}

impl Unit {
    /// In words: `enabled by multi-user.target, with override.conf`.
    pub fn words(&self) -> String {
        let mut text = self.state.word().to_owned();
        if self.state == UnitState::Enabled {
            text += &format!(" by {}", self.wanted_by.join(", "));
        }
        if !self.drop_ins.is_empty() {
            text += &format!(", with {}", self.drop_ins.join(", "));
        }
        text
    }
}

/// The units among these files.
pub fn read(nodes: &BTreeMap<Vec<u8>, Node>) -> BTreeMap<String, Unit> {
    let mut units: BTreeMap<String, Unit> = BTreeMap::new();
    let fresh = || Unit { state: UnitState::Present, wanted_by: Vec::new(), drop_ins: Vec::new() };
    // Units themselves; what is in a folder that counts more hides the others.
    for folder in FOLDERS {
        for (name, node) in below(nodes, folder) {
            if is_unit(name) && node.kind != NodeKind::Directory && !units.contains_key(name) {
                let masked = masks(node);
                units.insert(name.to_owned(), Unit { state: if masked { UnitState::Masked } else { UnitState::Present }, ..fresh() });
            }
        }
    }
    for (path, node) in below(nodes, ETC) {
        let Some((folder, name)) = path.split_once('/') else { continue };
        if let Some((by, _)) = folder.rsplit_once('.').filter(|(_, kind)| ["wants", "requires", "upholds"].contains(kind)) {
            if is_unit(name) && node.kind == NodeKind::Link {
                let unit = units.entry(name.to_owned()).or_insert_with(fresh);
                unit.wanted_by.push(by.to_owned());
                if unit.state == UnitState::Present {
                    unit.state = UnitState::Enabled;
                }
            }
        } else if let Some(of) = folder.strip_suffix(".d").filter(|of| is_unit(of))
            && name.ends_with(".conf")
            && node.kind != NodeKind::Directory
        {
            units.entry(of.to_owned()).or_insert_with(fresh).drop_ins.push(name.to_owned());
        }
    }
    units
}

/// Whether it stands for a unit that must not be started.
pub fn masks(node: &Node) -> bool {
    node.kind == NodeKind::Link && node.target == b"/dev/null" || node.kind == NodeKind::File && node.size == 0
}

pub(crate) fn is_unit(name: &str) -> bool {
    !name.contains('/') && SUFFIXES.iter().any(|suffix| name.len() > suffix.len() && name.ends_with(suffix))
}

/// What is below a folder, by its path within it; names that are no text are
/// no units.
fn below<'a>(nodes: &'a BTreeMap<Vec<u8>, Node>, folder: &str) -> impl Iterator<Item = (&'a str, &'a Node)> {
    let from = format!("{folder}/").into_bytes();
    let prefix = from.clone();
    let inside = nodes.range(from..).map_while(move |(path, node)| Some((path.strip_prefix(prefix.as_slice())?, node)));
    inside.filter_map(|(path, node)| Some((std::str::from_utf8(path).ok()?, node)))
}
