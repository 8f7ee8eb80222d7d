//! What all provisioners read their settings with.

use std::path::Path;

use kiln_model::settings::{Node, Problems, Reader, Value};

/// The keys of `[[provision]]` that are common to all provisioners.
const COMMON: [&str; 10] = ["name", "env", "secrets", "user", "timeout", "retries", "only", "cache", "include", "checkpoint"];

/// Ends the reading of a provisioner's own table, whose keys are `own`. A
/// common key that strayed into it is not just unknown: its place is one level
/// up.
pub(crate) fn finish(reader: Reader<'_>, node: &Node, own: &[&str], problems: &mut Problems) {
    let strayed = |name: &str| COMMON.contains(&name) && !own.contains(&name);
    let mut found = Vec::new();
    if let Value::Table(table) = &node.value {
        for entry in &table.entries {
            if let Some(name) = COMMON.iter().find(|name| strayed(name) && entry.name == **name) {
                found.push(*name);
                problems
                    .add(entry.place, format!("`{name}` is common to all provisioners"))
                    .label("does not belong in this table")
                    .help(format!("move `{name}` above, into [[provision]]"));
            }
        }
    }
    // Only those that were complained about: the others would be offered as
    // corrections of misspelt keys.
    reader.finish_with(&found, problems);
}

/// A script that stands in the template as `inline`, or in the file that
/// `script` names; `table` is what people call the table of both.
pub(crate) fn script(reader: &mut Reader<'_>, table: &str, folder: &Path, problems: &mut Problems) -> Option<Vec<u8>> {
    let inline = reader.string("inline", problems);
    let file = reader.entry("script").map(|entry| entry.node.place);
    let path = reader.existing_path("script", folder, problems);
    match (inline, file) {
        (Some(_), Some(place)) => {
            problems.add(place, "`inline` and `script` exclude each other").help("keep one of them");
            None
        }
        (Some(text), None) => Some(text.as_bytes().to_vec()),
        (None, Some(place)) => path.and_then(|path| {
            std::fs::read(&path).map_err(|error| problems.add(place, format!("cannot read {}: {error}", path.display())).place).ok()
        }),
        (None, None) => {
            problems.add(reader.place(), format!("{table} needs `inline` or `script`"));
            None
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use kiln_model::provision::Provisioner;
    use kiln_model::settings::{Entry, Node, Place, Problems, Table, Value};

    pub(crate) fn text(text: &str) -> Node {
        Node { value: Value::String(text.into()), place: Place::default() }
    }

    pub(crate) fn node(value: Value) -> Node {
        Node { value, place: Place::default() }
    }

    pub(crate) fn table(entries: &[(&str, Value)]) -> Node {
        let place = Place::default();
        let entries = entries.iter().map(|(name, value)| Entry { name: (*name).into(), place, node: node(value.clone()) }).collect();
        node(Value::Table(Table { entries }))
    }

    pub(crate) fn string(text: &str) -> Value {
        Value::String(text.into())
    }

    /// Reads settings of a kind that must be right.
    pub(crate) fn read(kind: &str, settings: &Node, folder: &Path) -> Box<dyn Provisioner> {
        let mut problems = Problems::default();
        let kind = crate::all().into_iter().find(|k| k.name() == kind).unwrap();
        let provisioner = kind.read(settings, folder, &mut problems);
        assert!(problems.is_empty(), "{:?}", problems.0);
        provisioner.unwrap()
    }

    /// Reads settings of a kind that must be wrong; gives messages and helps.
    pub(crate) fn wrong(kind: &str, settings: &Node, folder: &Path) -> Vec<String> {
        let mut problems = Problems::default();
        let kind = crate::all().into_iter().find(|k| k.name() == kind).unwrap();
        assert!(kind.read(settings, folder, &mut problems).is_none());
        assert!(!problems.is_empty());
        problems.0.into_iter().map(|problem| format!("{} | {}", problem.message, problem.help.unwrap_or_default())).collect()
    }

    /// Reads settings of a kind of test that must be right.
    pub(crate) fn read_test(kind: &str, settings: &Node, folder: &Path) -> Box<dyn Provisioner> {
        let mut problems = Problems::default();
        let kind = crate::tests().into_iter().find(|k| k.name() == kind).unwrap();
        let provisioner = kind.read(settings, folder, &mut problems);
        assert!(problems.is_empty(), "{:?}", problems.0);
        provisioner.unwrap()
    }

    /// Reads settings of a kind of test that must be wrong; gives messages and
    /// helps.
    pub(crate) fn wrong_test(kind: &str, settings: &Node, folder: &Path) -> Vec<String> {
        let mut problems = Problems::default();
        let kind = crate::tests().into_iter().find(|k| k.name() == kind).unwrap();
        assert!(kind.read(settings, folder, &mut problems).is_none());
        problems.0.into_iter().map(|problem| format!("{} | {}", problem.message, problem.help.unwrap_or_default())).collect()
    }

    /// The key of a step alone.
    pub(crate) fn key(provisioner: &dyn Provisioner) -> kiln_model::Key {
        let mut hasher = kiln_model::key::KeyHasher::new("step");
        provisioner.key(&mut hasher).unwrap();
        hasher.finish()
    }

    /// What its key is made of, by name.
    pub(crate) fn parts(provisioner: &dyn Provisioner) -> Vec<String> {
        let mut hasher = kiln_model::key::KeyHasher::new("step");
        provisioner.key(&mut hasher).unwrap();
        hasher.finish_with_parts().1.into_iter().map(|part| part.name).collect()
    }

    #[test]
    fn what_a_key_is_made_of_has_names_for_people() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("site")).unwrap();
        std::fs::write(folder.path().join("site/index.html"), "x").unwrap();
        let of = |kind: &str, entries: &[(&str, Value)]| parts(&*read(kind, &table(entries), folder.path())).join(", ");
        let arguments = Value::Array(vec![text("a"), text("b")]);
        assert_eq!(of("shell", &[("inline", string("x")), ("args", arguments)]), "interpreter, strict, argument 1, argument 2, script");
        let (source, to) = (("source", string("site/")), ("destination", string("/srv")));
        assert_eq!(of("file", &[source, to.clone()]), "destination, site, site/index.html");
        assert_eq!(of("file", &[("content", string("x")), to, ("mode", string("0644"))]), "destination, mode, content");
        let (source, to) = (("source", string("site/index.html")), ("destination", string("/srv/")));
        assert_eq!(of("file", &[source, to]), "destination, name of the file, index.html");
        assert_eq!(of("reboot", &[]), "command");
    }

    #[test]
    fn a_common_key_in_the_table_of_any_kind_is_to_be_moved() {
        let folder = tempfile::tempdir().unwrap();
        let bodies: [(&str, &[(&str, Value)]); 3] = [
            ("shell", &[("inline", string("true"))]),
            ("file", &[("content", string("x")), ("destination", string("/x"))]),
            ("reboot", &[]),
        ];
        for (kind, body) in bodies {
            for name in super::COMMON {
                let own = crate::all().into_iter().find(|k| k.name() == kind).unwrap().keys().contains(&name);
                let mut entries = body.to_vec();
                entries.push((name, string("5m")));
                if own {
                    read(kind, &table(&entries), folder.path());
                } else {
                    let found = wrong(kind, &table(&entries), folder.path());
                    assert_eq!(found, [format!("`{name}` is common to all provisioners | move `{name}` above, into [[provision]]")]);
                }
            }
        }
    }
}
