//! What runs on the machine: a shell script that reads and writes nothing, in
//! words that a minimal Debian knows (sh, GNU find, coreutils).
//!
//! Each section of its answer begins with a NUL, a word that nobody on the
//! machine can know beforehand, the section's name and a NUL, so that no file
//! name and no file can pass for one.

use kiln_model::guest::quote;

use super::own;
use super::pattern::Pattern;
use crate::manifest::VOLATILE;

/// What is asked of a machine.
#[derive(Debug)]
pub struct Asking<'a> {
    /// A word made for this one time, of letters and digits.
    pub nonce: &'a str,
    /// Only files whose inode changed after this are read, in seconds since 1970.
    pub since: Option<i64>,
    /// What may change, and is not read.
    pub mutable: &'a [Pattern],
}

/// The command for the machine's shell, whichever that is, that takes the
/// script on its standard input: as root where that goes without a password.
pub fn command() -> String {
    let choose = "if [ \"$(id -u)\" = 0 ]; then exec sh -s; \
        elif sudo -n true 2>/dev/null; then exec sudo -n sh -s; else exec sh -s; fi";
    format!("sh -c {}", quote(choose))
}

/// The script.
pub fn script(asking: &Asking<'_>) -> String {
    let path = |path: &str| format!("-path {}", quote(&literal(path)));
    let volatile: Vec<String> = VOLATILE.iter().map(|folder| path(folder)).collect();
    let volatile = volatile.join(" -o ");
    let unread = own::unread().map(ToOwned::to_owned).chain(asking.mutable.iter().filter_map(Pattern::plain));
    let unread: String = unread.map(|folder| format!(" -o {}", path(&folder))).collect();
    let newer = asking.since.map(|since| format!("-newerct @{since} ")).unwrap_or_default();
    TEMPLATE
        .replace("@NONCE@", asking.nonce)
        .replace("@VOLATILE@", &format!("\\( {volatile} \\) -prune"))
        .replace("@UNREAD@", &format!("\\( {volatile}{unread} \\) -prune"))
        .replace("@NEWER@", &newer)
}

/// A path as `find -path` takes it.
fn literal(path: &str) -> String {
    path.chars().flat_map(|c| "*?[]\\".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

/// A function, so that a script of which a part got lost does nothing.
const TEMPLATE: &str = r#"look() {
LC_ALL=C
PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
export LC_ALL PATH
section() { printf '\000@NONCE@ %s\000' "$1"; }
section host
id -u; uname -n; date +%s
for tool in find sha256sum xargs grep tail; do
  command -v "$tool" >/dev/null 2>&1 || { section unfit; echo "$tool"; return 0; }
done
find --version 2>/dev/null | grep -q GNU || { section unfit; echo 'GNU find'; return 0; }
cpus=$(nproc 2>/dev/null) || cpus=2
section release; cat /etc/kiln-release 2>/dev/null
section mounts; cat /proc/self/mountinfo
section passwd; cat /etc/passwd 2>/dev/null
section dpkg
cat /var/lib/dpkg/status 2>/dev/null
for file in /var/lib/dpkg/status.d/*; do
  case $file in *.md5sums) ;; *) [ ! -f "$file" ] || { echo; cat "$file"; } ;; esac
done
section apk; cat /lib/apk/db/installed 2>/dev/null || cat /usr/lib/apk/db/installed 2>/dev/null
section rpm
if [ -e /usr/lib/sysimage/rpm/rpmdb.sqlite ] || [ -e /var/lib/rpm/rpmdb.sqlite ]; then
  rpm -qa --qf '%{NAME}\t%{ARCH}\t%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}\n' 2>/dev/null
fi
section lists; [ ! -d /var/lib/dpkg/info ] || grep -H '' /var/lib/dpkg/info/*.list 2>/dev/null
section apt; tail -c 262144 /var/log/apt/history.log 2>/dev/null
section dpkg-log; tail -c 262144 /var/log/dpkg.log 2>/dev/null
section masks
find /run/systemd/system /run/systemd/system.control /run/systemd/transient \
  -maxdepth 1 -type l -lname /dev/null -printf '%f\0' 2>/dev/null
section nodes
find / -xdev @VOLATILE@ -printf '%y %m %U %G %s %T@ %C@\0%p\0%l\0' -o -printf '%y %m %U %G %s %T@ %C@\0%p\0%l\0' 2>/dev/null
section closed
find / -xdev @VOLATILE@ -o -type d \( ! -readable -o ! -executable \) -print0 2>/dev/null
section digests
find / -xdev @UNREAD@ -o -type f @NEWER@-print0 2>/dev/null | xargs -0 -r -P "$cpus" -n 200 sha256sum -- 2>/dev/null
if command -v getfattr >/dev/null 2>&1; then
  section attributes
  find / -xdev @VOLATILE@ -o -print0 2>/dev/null | xargs -0 -r -n 500 getfattr -h -d -m - -e hex --absolute-names -- 2>/dev/null
fi
section end
}
look </dev/null
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_begin_with_the_word_whatever_it_begins_with() {
        for nonce in ["01M80P4V23", "77", "abc"] {
            let script = script(&Asking { nonce, since: None, mutable: &[] });
            let line = script.lines().find(|line| line.starts_with("section()")).unwrap();
            for shell in ["sh", "bash"] {
                let output = std::process::Command::new(shell).args(["-c", &format!("{line}\nsection host")]).output().unwrap();
                assert_eq!(output.stdout, format!("\0{nonce} host\0").into_bytes(), "{shell}");
            }
        }
    }

    #[test]
    fn it_is_valid_shell_and_names_nothing_that_writes() {
        let mutable = [Pattern::new("/var/lib/it's [an] app").unwrap(), Pattern::new("/etc/*.db").unwrap()];
        for since in [None, Some(1_700_000_000)] {
            let script = script(&Asking { nonce: "abc123", since, mutable: &mutable });
            let output = std::process::Command::new("sh").arg("-n").arg("-c").arg(&script).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(script.contains("-newerct @1700000000 "), since.is_some());
            assert!(script.contains(r"-path '/var/lib/it'\''s \[an\] app'") && !script.contains(".db'"), "{script}");
            assert!(!script.contains('@') || since.is_some() || script.contains("%T@"), "{script}");
            let writes = script.replace("/dev/null", "").replace("2>", "");
            for word in [" > /", ">>", "rm ", "touch ", "mktemp", "tee "] {
                assert!(!writes.contains(word), "{word}");
            }
        }
    }
}
