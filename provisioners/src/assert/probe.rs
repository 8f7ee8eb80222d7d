//! One script that looks at everything, and what it says.
//!
//! Each fact is a line that begins with a mark which nothing else prints, the
//! number of the item and the name of the fact; bytes come in base64.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::guest::quote;

use super::expect::{Item, What};

/// Most bytes of a file, an output or a body that are looked at.
pub(super) const LIMIT: usize = 1 << 20;

/// What python3 does where there is no curl: the answer's head and body, as
/// curl would write them.
const PYTHON: &str = "\
import sys, urllib.request, urllib.error
class Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *a): return None
opener = urllib.request.build_opener(Stay, urllib.request.ProxyHandler({}))
try: answer = opener.open(sys.argv[1], timeout=float(sys.argv[2]))
except urllib.error.HTTPError as error: answer = error
except Exception as error: sys.exit(str(error))
open(sys.argv[3], 'w').write('HTTP/1.1 %d\\r\\n' % answer.code + str(answer.headers))
open(sys.argv[4], 'wb').write(answer.read())
";

fn mark(nonce: &str) -> String {
    format!("probe-{nonce}")
}

/// The script, for any POSIX shell. It runs few programs, since each costs a
/// guest under emulation a twentieth of a second.
pub(super) fn script(nonce: &str, items: &[(usize, &Item)]) -> String {
    let mut text = format!(
        "m={}\nd=$(mktemp -d) || exit 1\ntrap 'rm -rf \"$d\"' EXIT\n\
         say() {{ printf '%s %s %s %s\\n' \"$m\" \"$1\" \"$2\" \"$3\"; }}\n\
         send() {{ head -c {LIMIT} \"$3\" | base64 | sed \"s/^/$m $1 $2 /\"; }}\n\
         have() {{ command -v \"$1\" > /dev/null 2>&1; }}\n",
        mark(nonce)
    );
    if items.iter().any(|(_, item)| matches!(item.what, What::Port(_))) {
        text.push_str("for t in tcp tcp6 udp udp6; do [ ! -r /proc/net/$t ] || sed \"s/^/$m - sockets $t /\" /proc/net/$t; done\n");
    }
    for (at, item) in items {
        text.push_str(&probe(*at, item));
    }
    text.push_str("exit 0\n");
    text
}

fn probe(at: usize, item: &Item) -> String {
    let name = quote(&item.name);
    match &item.what {
        What::Port(_) => String::new(),
        What::Service { .. } => format!(
            "have systemctl && systemctl show -p LoadState -p ActiveState -p SubState -p UnitFileState {name} 2> /dev/null \
             | sed \"s/^/$m {at} service /\"\n"
        ),
        What::Package { .. } => format!(
            "if have dpkg-query; then v=$(dpkg-query -W -f '${{db:Status-Status}} ${{Version}}\\n' {name} 2> /dev/null)\n\
             case $v in 'installed '*) say {at} package \"${{v#installed }}\" ;; *) say {at} package '' ;; esac\n\
             elif have rpm; then v=$(rpm -q --qf '%{{VERSION}}-%{{RELEASE}}\\n' {name} 2> /dev/null) || v=; say {at} package \"$v\"\n\
             elif have apk; then v=$(apk info -ev {name} 2> /dev/null) || v=; n={name}; say {at} package \"${{v#\"$n\"-}}\"\n\
             else say {at} unmanaged ''; fi\n"
        ),
        What::File(is) => {
            let mut text = format!(
                "f={name}; if [ -e \"$f\" ] || [ -L \"$f\" ]; then say {at} file \"$(stat -c '%F|%a|%U|%G|%s' \"$f\")\"\n\
                 if [ -L \"$f\" ]; then say {at} link \"$(readlink \"$f\")\"\n\
                 [ ! -e \"$f\" ] || say {at} target \"$(stat -L -c '%F|%a|%U|%G|%s' \"$f\")\"; fi\n"
            );
            if is.sha256.is_some() {
                text.push_str(&format!("[ ! -f \"$f\" ] || {{ v=$(sha256sum < \"$f\"); say {at} sha256 \"${{v%% *}}\"; }}\n"));
            }
            if !is.contains.is_empty() {
                text.push_str(&format!("[ ! -f \"$f\" ] || send {at} bytes \"$f\"\n"));
            }
            text + "fi\n"
        }
        What::User(_) => format!(
            "u={name}; if v=$(getent passwd \"$u\" 2> /dev/null || grep \"^$u:\" /etc/passwd); then say {at} passwd \"$v\"\n\
             say {at} groups \"$(id -Gn \"$u\")\"; fi\n"
        ),
        What::Group { .. } => {
            format!("g={name}; if v=$(getent group \"$g\" 2> /dev/null || grep \"^$g:\" /etc/group); then say {at} group \"$v\"; fi\n")
        }
        What::Command(does) => {
            let mut text = format!(
                "timeout {} sh -c {name} > \"$d/out\" 2> \"$d/err\" < /dev/null; say {at} exit $?\n[ ! -s \"$d/err\" ] || send {at} stderr \"$d/err\"\n",
                does.timeout
            );
            text.push_str(&format!("[ ! -s \"$d/out\" ] || send {at} stdout \"$d/out\"\n"));
            text
        }
        What::Http(gives) => {
            let seconds = gives.timeout;
            let mut text = format!(
                ": > \"$d/head\"; : > \"$d/body\"\n\
                 if have curl; then curl -q -sS --max-time {seconds} -D \"$d/head\" -o \"$d/body\" {name} 2> \"$d/err\"; s=$?\n\
                 elif have python3; then python3 -c {} {name} {seconds} \"$d/head\" \"$d/body\" 2> \"$d/err\"; s=$?\n\
                 else say {at} unasked ''; s=-; fi\n\
                 if [ $s = 0 ]; then send {at} head \"$d/head\"\n",
                quote(PYTHON)
            );
            if !gives.body.is_empty() {
                text.push_str(&format!("send {at} body \"$d/body\"\n"));
            }
            text + &format!("elif [ $s != - ]; then read -r v < \"$d/err\"; say {at} unanswered \"$v\"; fi\n")
        }
    }
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Facts {
    mark: String,
    all: Vec<(usize, String, String)>,
    sockets: Vec<String>,
}

/// A unit, in systemd's words. Without systemd they are empty.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) load: String,
    pub(super) active: String,
    pub(super) sub: String,
    pub(super) file: String,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Package {
    NoManager,
    Missing,
    Installed(String),
}

/// A path: what it is itself, and the rest of what it leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct File {
    pub(super) kind: String,
    pub(super) mode: Option<u32>,
    pub(super) owner: String,
    pub(super) group: String,
    pub(super) size: Option<u64>,
    pub(super) sha256: String,
    pub(super) links_to: String,
    pub(super) bytes: Vec<u8>,
}

/// A command that has ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ran {
    pub(super) exit: u64,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Http {
    NoProgram,
    Failed(String),
    Answer { status: u64, headers: Vec<(String, String)>, body: Vec<u8> },
}

impl Facts {
    pub(super) fn new(nonce: &str) -> Self {
        Self { mark: mark(nonce), ..Self::default() }
    }

    /// Takes one line that the script printed.
    pub(super) fn take(&mut self, line: &str) {
        let mut words = line.splitn(4, ' ');
        if words.next() != Some(&self.mark) {
            return;
        }
        let (Some(at), Some(name)) = (words.next(), words.next()) else { return };
        let value = words.next().unwrap_or_default().to_owned();
        match at.parse() {
            Ok(at) => self.all.push((at, name.to_owned(), value)),
            Err(_) if name == "sockets" => self.sockets.push(value),
            Err(_) => {}
        }
    }

    pub(super) fn sockets(&self) -> &[String] {
        &self.sockets
    }

    fn values<'a>(&'a self, at: usize, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.all.iter().filter(move |(of, fact, _)| *of == at && fact == name).map(|(.., value)| value.as_str())
    }

    /// A fact that is one line.
    pub(super) fn text<'a>(&'a self, at: usize, name: &'a str) -> Option<&'a str> {
        self.values(at, name).next()
    }

    fn bytes(&self, at: usize, name: &str) -> Vec<u8> {
        let text: String = self.values(at, name).flat_map(|line| line.chars().filter(|c| !c.is_whitespace())).collect();
        STANDARD.decode(text).unwrap_or_default()
    }

    pub(super) fn service(&self, at: usize) -> Service {
        let field = |name: &str| {
            let mut lines = self.values(at, "service");
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default().to_owned()
        };
        Service { load: field("LoadState"), active: field("ActiveState"), sub: field("SubState"), file: field("UnitFileState") }
    }

    pub(super) fn package(&self, at: usize) -> Package {
        match self.text(at, "package") {
            None => Package::NoManager,
            Some("") => Package::Missing,
            Some(version) => Package::Installed(version.to_owned()),
        }
    }

    pub(super) fn file(&self, at: usize) -> Option<File> {
        let own = self.text(at, "file")?;
        let kind = match own.split('|').next().unwrap_or_default() {
            kind if kind.starts_with("regular") => "file",
            "directory" => "directory",
            "symbolic link" => "link",
            "fifo" => "pipe",
            "socket" => "socket",
            kind if kind.contains("special") => "device",
            _ => "something else",
        };
        // Of a link that leads nowhere nothing but that is known.
        let (links_to, target) = match self.text(at, "link") {
            Some(link) => (link.to_owned(), self.text(at, "target")),
            None => (String::new(), Some(own)),
        };
        let fields: Vec<&str> = target.unwrap_or_default().split('|').collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or_default().to_owned();
        Some(File {
            kind: kind.to_owned(),
            mode: u32::from_str_radix(&field(1), 8).ok(),
            owner: field(2),
            group: field(3),
            size: field(4).parse().ok(),
            sha256: self.text(at, "sha256").unwrap_or_default().to_owned(),
            links_to,
            bytes: self.bytes(at, "bytes"),
        })
    }

    pub(super) fn ran(&self, at: usize) -> Option<Ran> {
        let exit = self.text(at, "exit")?.parse().ok()?;
        Some(Ran { exit, stdout: self.bytes(at, "stdout"), stderr: self.bytes(at, "stderr") })
    }

    pub(super) fn http(&self, at: usize) -> Http {
        if self.text(at, "unasked").is_some() {
            return Http::NoProgram;
        }
        let head = String::from_utf8_lossy(&self.bytes(at, "head")).into_owned();
        // Of several answers (100 Continue) the last one counts; each begins a
        // line, which the name of a server (SimpleHTTP/0.6) does not.
        let last = if head.starts_with("HTTP/") { Some(0) } else { None };
        let last = head.rfind("\nHTTP/").map(|at| at + 1).or(last).map(|at| &head[at..]);
        let status = last.and_then(|head| head.split_whitespace().nth(1)?.parse().ok());
        let (Some(status), Some(last)) = (status, last) else {
            return Http::Failed(self.text(at, "unanswered").filter(|why| !why.is_empty()).unwrap_or("nothing was said").to_owned());
        };
        let headers = last.lines().skip(1).filter_map(|line| line.split_once(':'));
        let headers = headers.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect();
        Http::Answer { status, headers, body: self.bytes(at, "body") }
    }
}
