//! Paths that may change: absolute, with `*` and `?` within a part, and
//! everything below what they name.

/// A path or a pattern of paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(pub(super) Vec<Vec<u8>>);

impl Pattern {
    /// Reads one; says why it is none.
    ///
    /// # Errors
    /// When it is not absolute, is the root, or has parts `.` or `..`.
    pub fn new(text: &str) -> Result<Self, String> {
        let parts: Vec<Vec<u8>> = text.split('/').filter(|part| !part.is_empty()).map(|part| part.as_bytes().to_vec()).collect();
        let good =
            text.starts_with('/') && !parts.is_empty() && !text.contains('\0') && !parts.iter().any(|part| part == b"." || part == b"..");
        if good { Ok(Self(parts)) } else { Err(format!("`{text}` is no absolute path without `.` and `..`")) }
    }

    /// Whether it names `path` or a folder above it.
    pub fn holds(&self, path: &[u8]) -> bool {
        self.0.len() <= depth(path) && self.matches(path)
    }

    /// Whether it names this very path.
    pub fn names(&self, path: &[u8]) -> bool {
        self.0.len() == depth(path) && self.matches(path)
    }

    /// The path, when it has nothing in it that stands for something else.
    pub fn plain(&self) -> Option<String> {
        let path = self.0.iter().map(|part| String::from_utf8_lossy(part)).fold(String::new(), |path, part| path + "/" + &part);
        (!path.contains(['*', '?'])).then_some(path)
    }

    fn matches(&self, path: &[u8]) -> bool {
        self.0.iter().zip(parts(path)).all(|(pattern, name)| part_matches(pattern, name))
    }
}

fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty())
}

fn depth(path: &[u8]) -> usize {
    parts(path).count()
}

/// Whether a part of a path matches one of a pattern. Goes back to the last
/// `*` alone, so that no pattern takes long.
fn part_matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut back) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => match back {
                Some((star, at)) => {
                    back = Some((star, at + 1));
                    (p, n) = (star + 1, at + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pattern_holds() {
        for (pattern, path, expected) in [
            ("/var/lib/app", "/var/lib/app", true),
            ("/var/lib/app/", "/var/lib/app/deep/er", true),
            ("/var/lib/app", "/var/lib/apple", false),
            ("/var/lib/app", "/var/lib", false),
            ("/etc/app/*.db", "/etc/app/a.db", true),
            ("/etc/app/*.db", "/etc/app/.db", true),
            ("/etc/app/*.db", "/etc/app/a.db/inside", true),
            ("/etc/app/*.db", "/etc/app/a.dbx", false),
            ("/etc/app/*.db", "/etc/app/deep/a.db", false),
            ("/home/*/.cache", "/home/eve/.cache/x", true),
            ("/a?c", "/abc", true),
            ("/a?c", "/ac", false),
            ("/*a*b*", "/xaxbx", true),
            ("/*a*b*", "/xbxa", false),
            ("/a*", "/a\nb", true),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().holds(path.as_bytes()), expected, "{pattern} {path}");
        }
        let pattern = Pattern::new("/var//lib/").unwrap();
        assert!(pattern.names(b"/var/lib") && !pattern.names(b"/var/lib/x"));
        assert_eq!((pattern.plain().as_deref(), Pattern::new("/a/*").unwrap().plain()), (Some("/var/lib"), None));
        assert!(part_matches(&b"*a".repeat(30), &b"a".repeat(200)), "and it takes no time");
    }

    #[test]
    fn what_is_no_pattern() {
        for text in ["", "/", "//", "etc", "/etc/../x", "/./x", "/a\0"] {
            assert!(Pattern::new(text).is_err(), "{text:?}");
        }
    }
}
