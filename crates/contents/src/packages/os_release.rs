//! os-release: which distribution an image says it is.
//!
//! Source: os-release(5). Values are quoted as a shell would have them.

use kiln_model::Result;
use kiln_model::machine::Files;

/// What an image says of its distribution; empty where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Distribution {
    /// `debian`.
    pub id: String,
    /// `12`.
    pub version: String,
    /// `bookworm`.
    pub codename: String,
    /// `Debian GNU/Linux 12 (bookworm)`.
    pub name: String,
}

impl Distribution {
    /// `debian-12`, as package URLs have it.
    pub fn label(&self) -> String {
        let version = if self.version.is_empty() { &self.codename } else { &self.version };
        if self.id.is_empty() || version.is_empty() { self.id.clone() } else { format!("{}-{version}", self.id) }
    }
}

pub(super) fn read(files: &dyn Files) -> Result<Distribution> {
    // The first is usually a link to the second, and links are not followed.
    match super::first_file(files, &["/etc/os-release", "/usr/lib/os-release"])? {
        Some(path) => Ok(parse(&String::from_utf8_lossy(&files.read(path)?))),
        None => Ok(Distribution::default()),
    }
}

fn parse(text: &str) -> Distribution {
    let mut found = Distribution::default();
    for line in text.lines() {
        let Some((name, value)) = line.trim().split_once('=') else { continue };
        let field = match name {
            "ID" => &mut found.id,
            "VERSION_ID" => &mut found.version,
            "VERSION_CODENAME" => &mut found.codename,
            "PRETTY_NAME" => &mut found.name,
            _ => continue,
        };
        *field = unquoted(value);
    }
    found
}

fn unquoted(value: &str) -> String {
    let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
    let inner = quote.and_then(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value);
    if quote == Some('\'') {
        return inner.to_owned();
    }
    let mut out = String::new();
    let mut characters = inner.chars();
    while let Some(character) = characters.next() {
        out.extend(if character == '\\' { characters.next() } else { Some(character) });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_in_any_way() {
        let text = "# comment\nID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME='bookworm'\nPRETTY_NAME=\"a \\\"b\\\" \\$c\"\nbroken\n";
        let found = parse(text);
        assert_eq!((found.id.as_str(), found.label().as_str(), found.name.as_str()), ("debian", "debian-12", "a \"b\" $c"));
        assert_eq!(parse("ID=debian\nVERSION_CODENAME=trixie\n").label(), "debian-trixie");
        assert_eq!(parse("ID=arch\n").label(), "arch");
        assert_eq!(parse("").label(), "");
    }
}
