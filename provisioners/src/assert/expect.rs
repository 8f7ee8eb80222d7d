//! What may be asserted, and how it is compared with what was found.

use kiln_model::provision::Outcome;

use super::probe::{Facts, File, Http, LIMIT, Package, Ran, Service};
use super::sockets::{self, Protocol};

/// One thing of a machine, and what is to be true of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Item {
    /// What it is called: a port, a path, a unit.
    pub(super) name: String,
    pub(super) what: What,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum What {
    Port(Port),
    Service { running: Option<bool>, enabled: Option<bool> },
    Package { installed: bool, version: Option<String> },
    File(FileIs),
    User(UserIs),
    Group { exists: bool, gid: Option<u64> },
    Command(CommandDoes),
    Http(HttpGives),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Port {
    pub(super) protocol: Protocol,
    pub(super) number: u16,
    pub(super) listening: bool,
    pub(super) address: Option<std::net::IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct FileIs {
    pub(super) exists: bool,
    pub(super) kind: Option<String>,
    pub(super) mode: Option<u32>,
    pub(super) owner: Option<String>,
    pub(super) group: Option<String>,
    pub(super) size: Option<u64>,
    pub(super) sha256: Option<String>,
    pub(super) links_to: Option<String>,
    pub(super) contains: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct UserIs {
    pub(super) exists: bool,
    pub(super) uid: Option<u64>,
    pub(super) group: Option<String>,
    pub(super) groups: Vec<String>,
    pub(super) home: Option<String>,
    pub(super) shell: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct CommandDoes {
    pub(super) exit: u64,
    pub(super) stdout: Vec<String>,
    pub(super) stderr: Vec<String>,
    /// Seconds.
    pub(super) timeout: u64,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct HttpGives {
    pub(super) status: u64,
    pub(super) body: Vec<String>,
    pub(super) headers: Vec<(String, String)>,
    /// Seconds.
    pub(super) timeout: u64,
}

/// The cases of one item.
struct Cases<'a> {
    of: &'a str,
    all: Vec<(String, Outcome)>,
}

impl Cases<'_> {
    fn add(&mut self, what: &str, wrong: Option<String>) {
        let outcome = wrong.map_or(Outcome::Passed, Outcome::Failed);
        self.all.push((format!("{} {what}", self.of), outcome));
    }

    /// One that is as it should be when both are the same.
    fn same(&mut self, what: &str, expected: Option<String>, found: &str) {
        if let Some(expected) = expected {
            self.add(what, (expected != found).then(|| format!("expected {expected}, found {found}")));
        }
    }

    /// A text that has to be in another.
    fn contains(&mut self, what: &str, expected: &str, found: &[u8], cut: bool) {
        let there = expected.is_empty() || found.windows(expected.len()).any(|window| window == expected.as_bytes());
        let wrong = (!there).then(|| {
            let more = if cut { format!(", of which the first {} MiB were looked at", LIMIT >> 20) } else { String::new() };
            format!("expected `{expected}` in it, found {}{more}", excerpt(found))
        });
        self.add(&format!("{what} `{}`", shorten(expected, 40)), wrong);
    }
}

/// The beginning of what was found, in one line.
fn excerpt(found: &[u8]) -> String {
    let text = String::from_utf8_lossy(found);
    let text = text.trim_end();
    if text.is_empty() { "nothing".to_owned() } else { format!("`{}`", shorten(text, 200)) }
}

/// A text in one line of not more than `limit` characters.
fn shorten(text: &str, limit: usize) -> String {
    let text = text.replace('\n', "\\n");
    if text.chars().count() <= limit { text } else { text.chars().take(limit).chain("…".chars()).collect() }
}

fn yes_no(yes: bool, what: &str) -> String {
    if yes { what.to_owned() } else { format!("not {what}") }
}

impl Item {
    /// What its cases begin with: `port tcp:80`.
    pub(super) fn name(&self) -> String {
        let kind = match &self.what {
            What::Port(_) => "port",
            What::Service { .. } => "service",
            What::Package { .. } => "package",
            What::File(_) => "file",
            What::User(_) => "user",
            What::Group { .. } => "group",
            What::Command(_) => "command",
            What::Http(_) => "http",
        };
        format!("{kind} {}", self.name)
    }

    /// All that it expects, as a text for its key.
    pub(super) fn expected(&self) -> String {
        format!("{:?}", self.what)
    }

    /// What is expected beside what was found, case by case.
    pub(super) fn compare(&self, at: usize, facts: &Facts) -> Vec<(String, Outcome)> {
        let of = self.name();
        let mut cases = Cases { of: &of, all: Vec::new() };
        match &self.what {
            What::Port(port) => listening(port, facts, &mut cases),
            What::Service { running, enabled } => service(*running, *enabled, &facts.service(at), &mut cases),
            What::Package { installed, version } => package(*installed, version.as_deref(), &facts.package(at), &mut cases),
            What::File(is) => file(is, facts.file(at), &mut cases),
            What::User(is) => user(is, facts, at, &mut cases),
            What::Group { exists, gid } => {
                let found = facts.text(at, "group").map(|line| line.split(':').nth(2).unwrap_or_default().to_owned());
                cases.same("exists", Some(yes_no(*exists, "there")), &yes_no(found.is_some(), "there"));
                cases.same("gid", gid.map(|gid| gid.to_string()), found.as_deref().unwrap_or("no such group"));
            }
            What::Command(does) => command(does, facts.ran(at), &mut cases),
            What::Http(gives) => http(gives, facts.http(at), &mut cases),
        }
        cases.all
    }
}

fn listening(port: &Port, facts: &Facts, cases: &mut Cases<'_>) {
    let open = sockets::listening(facts.sockets(), port.protocol, port.number);
    let all: Vec<String> = open.iter().map(ToString::to_string).collect();
    let wrong = match (port.listening, open.is_empty()) {
        (true, true) => Some(format!("expected a listener, found none at this port{}", others(facts, port.protocol))),
        (false, false) => Some(format!("expected no listener, found one on {}", all.join(" and "))),
        _ => None,
    };
    cases.add(if port.listening { "listening" } else { "not listening" }, wrong);
    if let Some(address) = &port.address {
        let wrong = (!open.contains(address)).then(|| match all.as_slice() {
            [] => format!("expected {address}, found no listener"),
            _ => format!("expected {address}, found {}", all.join(" and ")),
        });
        cases.add("address", wrong);
    }
}

/// The ports that are open, for whoever looked at the wrong one.
fn others(facts: &Facts, protocol: Protocol) -> String {
    let ports: Vec<String> = sockets::ports(facts.sockets(), protocol).into_iter().map(|port| port.to_string()).collect();
    if ports.is_empty() { String::new() } else { format!("; open are {}", ports.join(", ")) }
}

fn service(running: Option<bool>, enabled: Option<bool>, found: &Service, cases: &mut Cases<'_>) {
    let Service { load, active, sub, file } = found;
    let missing = match load.as_str() {
        "" => Some("no systemd in the guest".to_owned()),
        "not-found" => Some("no such unit".to_owned()),
        _ => None,
    };
    let mut add = |what: &str, wanted: Option<bool>, is: bool, found: String| {
        if let Some(wanted) = wanted {
            let there = missing.is_none() && is;
            let found = missing.clone().unwrap_or(found);
            let wrong = (wanted != there || missing.as_deref() == Some("no systemd in the guest"))
                .then(|| format!("expected {}, found {found}", yes_no(wanted, what)));
            cases.add(if wanted { what.to_owned() } else { format!("not {what}") }.as_str(), wrong);
        }
    };
    add("running", running, matches!(active.as_str(), "active" | "reloading"), format!("{active} ({sub})"));
    // As `systemctl is-enabled` has it.
    let on = matches!(file.as_str(), "enabled" | "enabled-runtime" | "alias" | "static" | "indirect" | "generated");
    add("enabled", enabled, on, if file.is_empty() { "a unit without a file".into() } else { file.clone() });
}

fn package(installed: bool, version: Option<&str>, found: &Package, cases: &mut Cases<'_>) {
    let said = match found {
        Package::NoManager => "neither dpkg, rpm nor apk in the guest".to_owned(),
        Package::Missing => "not installed".to_owned(),
        Package::Installed(version) => format!("installed ({version})"),
    };
    let there = matches!(found, Package::Installed(_));
    let wrong =
        (there != installed || *found == Package::NoManager).then(|| format!("expected {}, found {said}", yes_no(installed, "installed")));
    cases.add(if installed { "installed" } else { "not installed" }, wrong);
    if let Some(wanted) = version {
        let good = matches!(found, Package::Installed(version) if is_version(version, wanted));
        let found = if let Package::Installed(version) = found { version } else { &said };
        cases.add("version", (!good).then(|| format!("expected {wanted}, found {found}")));
    }
}

/// Whether a version is the wanted one, or begins with it: `1.22` is `1.22.1-9`,
/// and not `1.221`. An epoch may be left out.
fn is_version(version: &str, wanted: &str) -> bool {
    let begins = |version: &str| {
        let rest = version.strip_prefix(wanted);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(|c: char| !c.is_ascii_alphanumeric()))
    };
    begins(version) || version.split_once(':').is_some_and(|(_, version)| begins(version))
}

fn file(is: &FileIs, found: Option<File>, cases: &mut Cases<'_>) {
    cases.same("exists", Some(yes_no(is.exists, "there")), &yes_no(found.is_some(), "there"));
    if !is.exists {
        return;
    }
    let File { kind, mode, owner, group, size, sha256, links_to, bytes } = found.unwrap_or_default();
    let or = |text: &str, none: &str| if text.is_empty() { none.to_owned() } else { text.to_owned() };
    let size_text = size.map(|size| size.to_string()).unwrap_or_default();
    cases.same("kind", is.kind.clone(), &kind);
    let octal = |mode: u32| format!("{mode:04o}");
    cases.same("mode", is.mode.map(octal), &or(&mode.map(octal).unwrap_or_default(), "nothing"));
    cases.same("owner", is.owner.clone(), &or(&owner, "nothing"));
    cases.same("group", is.group.clone(), &or(&group, "nothing"));
    cases.same("size", is.size.map(|size| size.to_string()), &or(&size_text, "nothing"));
    cases.same("sha256", is.sha256.clone(), &or(&sha256, "nothing"));
    cases.same("links_to", is.links_to.clone(), &or(&links_to, "no link"));
    let cut = size.is_some_and(|size| size > LIMIT as u64);
    for wanted in &is.contains {
        cases.contains("contains", wanted, &bytes, cut);
    }
}

fn user(is: &UserIs, facts: &Facts, at: usize, cases: &mut Cases<'_>) {
    let found = facts.text(at, "passwd");
    cases.same("exists", Some(yes_no(is.exists, "there")), &yes_no(found.is_some(), "there"));
    if !is.exists {
        return;
    }
    let field = |at: usize| found.and_then(|line| line.split(':').nth(at)).map_or_else(|| "no such user".to_owned(), ToOwned::to_owned);
    cases.same("uid", is.uid.map(|uid| uid.to_string()), &field(2));
    cases.same("home", is.home.clone(), &field(5));
    cases.same("shell", is.shell.clone(), &field(6));
    let mut groups: Vec<&str> = facts.text(at, "groups").unwrap_or_default().split_whitespace().collect();
    cases.same("group", is.group.clone(), groups.first().copied().unwrap_or("no such user"));
    groups.sort_unstable();
    let all = if groups.is_empty() { "none".to_owned() } else { groups.join(", ") };
    for wanted in &is.groups {
        let wrong = (!groups.contains(&wanted.as_str())).then(|| format!("expected {wanted}, found {all}"));
        cases.add(&format!("in group {wanted}"), wrong);
    }
}

fn command(does: &CommandDoes, found: Option<Ran>, cases: &mut Cases<'_>) {
    let Some(Ran { exit, stdout, stderr }) = found else {
        cases.add("exit", Some(format!("expected {}, found that it did not run", does.exit)));
        return;
    };
    let how = match exit {
        // `timeout` says so, and nothing else does as a rule.
        124 => format!("124 (took over {} s)", does.timeout),
        127 => "127 (no such command)".to_owned(),
        exit => exit.to_string(),
    };
    let said = [&stderr, &stdout].into_iter().find(|bytes| !bytes.is_empty()).map(|bytes| format!(": {}", excerpt(bytes)));
    let wrong = (exit != does.exit).then(|| format!("expected {}, found {how}{}", does.exit, said.unwrap_or_default()));
    cases.add("exit", wrong);
    for wanted in &does.stdout {
        cases.contains("stdout", wanted, &stdout, stdout.len() >= LIMIT);
    }
    for wanted in &does.stderr {
        cases.contains("stderr", wanted, &stderr, stderr.len() >= LIMIT);
    }
}

fn http(gives: &HttpGives, found: Http, cases: &mut Cases<'_>) {
    let found = match found {
        Http::Answer { status, headers, body } => Ok((status, headers, body)),
        Http::NoProgram => Err("neither curl nor python3 in the guest, and one of them has to ask".to_owned()),
        Http::Failed(why) => Err(format!("no answer ({})", shorten(why.trim(), 200))),
    };
    match found {
        Err(why) => {
            cases.add("status", Some(format!("expected {}, found {why}", gives.status)));
            let rest = gives.body.iter().map(|wanted| format!("body `{}`", shorten(wanted, 40)));
            let rest: Vec<String> = rest.chain(gives.headers.iter().map(|(name, _)| format!("header {name}"))).collect();
            for what in rest {
                cases.add(&what, Some("there was no answer".to_owned()));
            }
        }
        Ok((status, headers, body)) => {
            cases.same("status", Some(gives.status.to_string()), &status.to_string());
            for wanted in &gives.body {
                cases.contains("body", wanted, &body, body.len() >= LIMIT);
            }
            for (name, wanted) in &gives.headers {
                let values: Vec<&str> =
                    headers.iter().filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect();
                let found = if values.is_empty() { "no such header".to_owned() } else { format!("`{}`", values.join(", ")) };
                let good = values.iter().any(|value| value.contains(wanted.as_str()));
                cases.add(&format!("header {name}"), (!good).then(|| format!("expected `{wanted}` in it, found {found}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_version;

    #[test]
    fn versions_by_their_beginning() {
        for (version, wanted, good) in [
            ("1.22.1-9", "1.22.1-9", true),
            ("1.22.1-9", "1.22", true),
            ("1.22.1-9", "1.22.1", true),
            ("1.221", "1.22", false),
            ("1:9.2p1-2", "9.2p1", true),
            ("1:9.2p1-2", "1:9.2p1", true),
            ("9.2p1-2", "9.2", false),
            ("2.0", "2.0.1", false),
        ] {
            assert_eq!(is_version(version, wanted), good, "{version} as {wanted}");
        }
    }
}
