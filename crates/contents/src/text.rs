//! Names from a disk as text that can be shown.
//!
//! A file's name may hold anything but `/` and NUL: line ends that make two
//! rows of one, escape sequences that paint a terminal, characters that turn
//! the direction of writing so that `gpj.exe` reads as `exe.jpg`. All of them
//! are written as escapes, and `\` is doubled, so that two names never look the
//! same and the bytes can be had back.

use std::fmt::Write as _;

/// `bytes` as one line of text: `\n` and its like, `\xNN` for bytes that are no
/// UTF-8, `\u{…}` for characters that are not seen, `\\` for a backslash.
pub fn shown(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                _ if unseen(character) => drop(write!(text, "\\u{{{:x}}}", u32::from(character))),
                _ => text.push(character),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Text from inside of an image as one line: as [`shown`], but a backslash is
/// left alone, since this is prose and no name.
pub fn line(text: &str) -> String {
    text.chars().map(|c| if unseen(c) { if c.is_whitespace() { ' ' } else { '\u{fffd}' } } else { c }).collect()
}

/// Whether a character does something rather than being seen.
fn unseen(character: char) -> bool {
    character.is_control()
        || matches!(u32::from(character),
            0xad | 0x61c | 0x180e | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfeff | 0xfff9..=0xfffb | 0xe0000..=0xe0fff)
}

/// `text` as the content of an HTML element or of a quoted attribute.
pub fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ if unseen(character) => out.push('\u{fffd}'),
            _ => out.push(character),
        }
    }
    out
}

/// Bytes in binary units: `517.0 MiB`.
pub fn bytes(count: u64) -> String {
    let (mut value, mut rest, mut unit) = (count, 0, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024 {
            break;
        }
        (rest, value, unit) = (value % 1024, value / 1024, next);
    }
    if unit == "B" { format!("{value} B") } else { format!("{value}.{} {unit}", rest * 10 / 1024) }
}

/// A difference in bytes: `+1.5 MiB`, `−12 B`, `±0`.
pub fn change(before: u64, after: u64) -> String {
    match after.cmp(&before) {
        std::cmp::Ordering::Greater => format!("+{}", bytes(after - before)),
        std::cmp::Ordering::Less => format!("−{}", bytes(before - after)),
        std::cmp::Ordering::Equal => "±0".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_line_and_all_different() {
        assert_eq!(shown(b"/etc/passwd"), "/etc/passwd");
        assert_eq!(shown("/srv/Grüße 漢字".as_bytes()), "/srv/Grüße 漢字");
        assert_eq!(shown(b"a\nb\r\t\x1b[31m\x07"), "a\\nb\\r\\t\\u{1b}[31m\\u{7}");
        assert_eq!(shown(b"dev\\x2duuid \xff\xfe"), "dev\\\\x2duuid \\xff\\xfe");
        assert_eq!(shown("photo\u{202e}gpj.exe".as_bytes()), "photo\\u{202e}gpj.exe");
        assert_eq!(line("two\nlines \u{1b}[2J"), "two lines \u{fffd}[2J");
    }

    #[test]
    fn nothing_becomes_markup() {
        assert_eq!(html("<script>alert('x')</script> & \"q\""), "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;q&quot;");
    }

    #[test]
    fn numbers() {
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!((change(0, 2048).as_str(), change(12, 0).as_str(), change(1, 1).as_str()), ("+2.0 KiB", "−12 B", "±0"));
    }
}
