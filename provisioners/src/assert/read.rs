//! `[test.assert]`, from its table.

use std::time::Duration;

use kiln_model::settings::{Entry, Node, Problems, Reader, Table, Value, scalar, wrong_type};

use super::Assert;
use super::expect::{CommandDoes, FileIs, HttpGives, Item, Port, UserIs, What};
use super::sockets::Protocol;
use crate::settings::finish;

/// The keys of `[test.assert]`.
pub(super) const KEYS: [&str; 9] = ["within", "port", "service", "package", "file", "user", "group", "command", "http"];
/// How long a command may take unless it says so.
const COMMAND: Duration = Duration::from_secs(60);
/// And an answer.
const ANSWER: Duration = Duration::from_secs(20);
/// What a path may be.
const KINDS: [&str; 6] = ["file", "directory", "link", "pipe", "socket", "device"];

/// Reads one thing, of the name and the table that stands behind it.
type ReadOne = fn(&Entry, &mut Reader<'_>, &mut Problems) -> Option<What>;

pub(super) fn read(settings: &Node, keys: &[&str], problems: &mut Problems) -> Option<Assert> {
    let mut reader = Reader::new(settings, "[test.assert]", problems)?;
    let within = reader.duration("within", problems).unwrap_or_default();
    let kinds: [(&'static str, ReadOne); 8] = [
        ("port", port),
        ("service", service),
        ("package", package),
        ("file", file),
        ("user", user),
        ("group", group),
        ("command", command),
        ("http", http),
    ];
    // In the order in which they are written.
    let mut found: Vec<(usize, Item)> = Vec::new();
    for (kind, read) in kinds {
        let Some(entry) = reader.entry(kind) else { continue };
        let Value::Table(table) = &entry.node.value else {
            wrong_type::<()>(&entry.node, kind, &format!("a table of names, such as {}", example(kind)), problems);
            continue;
        };
        for one in &table.entries {
            found.extend(item(kind, one, read, problems).map(|item| (one.place.start, item)));
        }
    }
    let entries = if let Value::Table(table) = &settings.value { table.entries.len() } else { 0 };
    finish(reader, settings, keys, problems);
    found.sort_by_key(|(at, _)| *at);
    let items: Vec<Item> = found.into_iter().map(|(_, item)| item).collect();
    if items.is_empty() && (entries == 0 || problems.is_empty()) {
        problems.add(settings.place, "nothing is asserted").help("for example [test.assert.port.\"tcp:80\"] with listening = true");
    }
    Some(Assert { items, within })
}

fn example(kind: &str) -> &'static str {
    match kind {
        "port" => "port.\"tcp:80\" = { listening = true }",
        "service" => "service.nginx = { running = true, enabled = true }",
        "package" => "package.nginx = { installed = true }",
        "file" => "file.\"/etc/hostname\" = { exists = true }",
        "user" => "user.deploy = { exists = true }",
        "group" => "group.deploy = { exists = true }",
        "command" => "command.\"nginx -t\" = { exit = 0 }",
        _ => "http.\"http://localhost\" = { status = 200 }",
    }
}

fn item(kind: &'static str, entry: &Entry, read: ReadOne, problems: &mut Problems) -> Option<Item> {
    let what = format!("{kind} {}", entry.name);
    let mut reader = match &entry.node.value {
        Value::Table(_) => Reader::new(&entry.node, what, problems)?,
        _ => return wrong_type(&entry.node, &what, &format!("a table, such as {}", example(kind)), problems),
    };
    if entry.name.trim().is_empty() || entry.name.contains('\0') {
        problems.add(entry.place, format!("a {kind} has a name")).help(example(kind));
        return None;
    }
    let what = read(entry, &mut reader, problems);
    reader.finish(problems);
    Some(Item { name: entry.name.clone(), what: what? })
}

/// `tcp:80`, `udp:53`, `80`.
fn port(entry: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    let listening = reader.boolean("listening", problems).unwrap_or(true);
    let place = reader.entry("address").map(|entry| entry.node.place);
    let address = reader.string("address", problems).map(str::parse::<std::net::IpAddr>);
    let address = match (address, place) {
        (Some(Err(_)), Some(place)) => {
            problems.add(place, "this is no IP address").help("for example \"127.0.0.1\", \"0.0.0.0\" or \"::\"");
            None
        }
        (Some(Ok(address)), Some(place)) => {
            if !listening {
                problems.add(place, "where nobody listens there is no address").help("remove `address`");
            }
            Some(address)
        }
        _ => None,
    };
    let (protocol, number) = entry.name.split_once(':').unwrap_or(("tcp", &entry.name));
    let protocol = match protocol {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        _ => None,
    };
    let (Some(protocol), Some(number)) = (protocol, number.parse().ok().filter(|number| *number > 0)) else {
        problems.add(entry.place, format!("`{}` is no port", entry.name)).help("write \"tcp:80\" or \"udp:53\"");
        return None;
    };
    Some(What::Port(Port { protocol, number, listening, address }))
}

fn service(entry: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    let (running, enabled) = (reader.boolean("running", problems), reader.boolean("enabled", problems));
    if running.is_none() && enabled.is_none() {
        problems.add(entry.place, format!("nothing is asserted of service {}", entry.name)).help(example("service"));
    }
    Some(What::Service { running, enabled })
}

fn package(entry: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    let installed = reader.boolean("installed", problems).unwrap_or(true);
    let version = reader.string("version", problems).map(ToOwned::to_owned);
    if !installed && version.is_some() {
        problems.add(entry.place, format!("what is not installed has no version: package {}", entry.name)).help("remove `version`");
    }
    Some(What::Package { installed, version })
}

/// Complains about anything but `exists` beside `exists = false`.
fn alone(entry: &Entry, exists: bool, problems: &mut Problems) {
    if let (Value::Table(table), false) = (&entry.node.value, exists) {
        for other in table.entries.iter().filter(|other| other.name != "exists") {
            problems.add(other.place, format!("what does not exist has no `{}`", other.name)).help("keep `exists = false` alone");
        }
    }
}

fn texts(reader: &mut Reader<'_>, name: &'static str, problems: &mut Problems) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    if let Some(Entry { node: Node { value: Value::String(text), .. }, .. }) = reader.entry(name) {
        return vec![text.clone()];
    }
    for (text, _) in reader.strings(name, problems).unwrap_or_default() {
        if !texts.iter().any(|known| known == text) {
            texts.push(text.to_owned());
        }
    }
    texts
}

fn file(entry: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    if !entry.name.starts_with('/') {
        problems.add(entry.place, format!("`{}` is no absolute path", entry.name)).help(example("file"));
    }
    let exists = reader.boolean("exists", problems).unwrap_or(true);
    let kind = one_of(reader, "kind", &KINDS, problems);
    let place = reader.entry("mode").map(|entry| entry.node.place);
    let mode = reader.string("mode", problems).map(|text| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777));
    if let (Some(None), Some(place)) = (mode, place) {
        problems.add(place, "this is no mode").help("write octal digits as text, such as \"0644\"");
    }
    let owned = |text: Option<&str>| text.map(ToOwned::to_owned);
    let owner = owned(reader.string("owner", problems));
    let group = owned(reader.string("group", problems));
    let size = reader.size("size", problems);
    let place = reader.entry("sha256").map(|entry| entry.node.place);
    let sha256 = reader.string("sha256", problems).map(|text| text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase());
    if let (Some(text), Some(place)) = (&sha256, place)
        && (text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()))
    {
        problems.add(place, "this is no SHA-256").help("it has 64 hex digits: `sha256sum FILE`");
    }
    let links_to = owned(reader.string("links_to", problems));
    let contains = texts(reader, "contains", problems);
    alone(entry, exists, problems);
    Some(What::File(FileIs { exists, kind, mode: mode.flatten(), owner, group, size, sha256, links_to, contains }))
}

fn one_of(reader: &mut Reader<'_>, name: &'static str, known: &[&str], problems: &mut Problems) -> Option<String> {
    let place = reader.entry(name)?.node.place;
    let text = reader.string(name, problems)?;
    if known.contains(&text) {
        return Some(text.to_owned());
    }
    problems.add(place, format!("there is no {name} `{text}`")).help(format!("one of: {}", known.join(", ")));
    None
}

/// A name that a shell pattern or a field of a database cannot mistake.
fn account_name(entry: &Entry, kind: &str, problems: &mut Problems) {
    let good = |c: char| c.is_ascii_alphanumeric() || "_-$@+".contains(c) || !c.is_ascii();
    if !entry.name.chars().all(|c| good(c) || c == '.') {
        problems.add(entry.place, format!("`{}` cannot be the name of a {kind}", entry.name));
    }
}

fn user(entry: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    account_name(entry, "user", problems);
    let exists = reader.boolean("exists", problems).unwrap_or(true);
    let uid = reader.integer("uid", problems);
    let owned = |text: Option<&str>| text.map(ToOwned::to_owned);
    let group = owned(reader.string("group", problems));
    let home = owned(reader.string("home", problems));
    let shell = owned(reader.string("shell", problems));
    let groups = texts(reader, "groups", problems);
    alone(entry, exists, problems);
    Some(What::User(UserIs { exists, uid, group, groups, home, shell }))
}

fn group(entry: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    account_name(entry, "group", problems);
    let exists = reader.boolean("exists", problems).unwrap_or(true);
    let gid = reader.integer("gid", problems);
    alone(entry, exists, problems);
    Some(What::Group { exists, gid })
}

/// Whole seconds, since that is what programs take.
fn seconds(reader: &mut Reader<'_>, default: Duration, problems: &mut Problems) -> u64 {
    let place = reader.entry("timeout").map(|entry| entry.node.place);
    let limit = reader.duration("timeout", problems).unwrap_or(default);
    if let (0, Some(place)) = (limit.as_secs(), place) {
        problems.add(place, "a `timeout` is a second at least");
    }
    limit.as_secs()
}

fn command(_: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    let exit = reader.integer("exit", problems).unwrap_or(0);
    let (stdout, stderr) = (texts(reader, "stdout", problems), texts(reader, "stderr", problems));
    Some(What::Command(CommandDoes { exit, stdout, stderr, timeout: seconds(reader, COMMAND, problems) }))
}

fn http(entry: &Entry, reader: &mut Reader<'_>, problems: &mut Problems) -> Option<What> {
    let good = ["http://", "https://"].iter().any(|scheme| entry.name.len() > scheme.len() && entry.name.starts_with(scheme));
    if !good || entry.name.contains(char::is_whitespace) {
        problems.add(entry.place, format!("`{}` is no URL", entry.name)).help(example("http"));
    }
    let status = reader.integer("status", problems).unwrap_or(200);
    let body = texts(reader, "body", problems);
    let mut headers = Vec::new();
    if let Some(entry) = reader.entry("headers") {
        match &entry.node.value {
            Value::Table(Table { entries }) => {
                for header in entries {
                    match scalar(&header.node.value) {
                        Some(value) => headers.push((header.name.clone(), value)),
                        None => drop(wrong_type::<()>(&header.node, &header.name, "a string", problems)),
                    }
                }
            }
            _ => drop(wrong_type::<()>(&entry.node, "headers", "a table of strings", problems)),
        }
    }
    headers.sort();
    Some(What::Http(HttpGives { status, body, headers, timeout: seconds(reader, ANSWER, problems) }))
}
