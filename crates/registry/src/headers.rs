//! The header fields that tell where something is and how far it has come.

use reqwest::header::{self, HeaderMap, HeaderName};

/// A header as text; none when it is not there or not text.
pub(crate) fn text(headers: &HeaderMap, name: impl Into<HeaderName>) -> Option<&str> {
    headers.get(name.into())?.to_str().ok().map(str::trim)
}

/// What `Content-Range` says of an answer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// The first byte's place.
    pub(crate) first: Option<u64>,
    /// The size of the whole.
    pub(crate) total: Option<u64>,
}

/// Reads `bytes 100-199/200`, `bytes 100-199/*`, `bytes */200`.
pub(crate) fn content_range(text: &str) -> ContentRange {
    let Some((range, total)) = text.trim().strip_prefix("bytes ").and_then(|t| t.split_once('/')) else { return ContentRange::default() };
    ContentRange { first: range.split_once('-').and_then(|(first, _)| first.trim().parse().ok()), total: total.trim().parse().ok() }
}

/// How many bytes an upload session holds, from its `Range` (`0-1023`: 1024).
///
/// `0-0` is what registries answer both for nothing and for one byte; it is
/// read as nothing, since a byte sent twice is refused and then sent right.
pub(crate) fn upload_offset(text: &str) -> Option<u64> {
    let text = text.trim();
    let (first, last) = text.strip_prefix("bytes=").unwrap_or(text).split_once('-')?;
    let last: u64 = last.trim().parse().ok()?;
    match first.trim() {
        "0" if last == 0 => Some(0),
        "0" => last.checked_add(1),
        _ => None,
    }
}

/// The target of `Link: <…>; rel="next"` (RFC 8288).
pub(crate) fn next_link(headers: &HeaderMap) -> Option<String> {
    headers.get_all(header::LINK).iter().filter_map(|value| value.to_str().ok()).find_map(next_of)
}

fn next_of(mut text: &str) -> Option<String> {
    loop {
        text = text.trim_start_matches([' ', '\t', ',']);
        let (target, rest) = text.strip_prefix('<')?.split_once('>')?;
        // Parameters end at a comma outside quotes.
        let mut quoted = false;
        let end = rest
            .char_indices()
            .find(|(_, c)| {
                quoted ^= *c == '"';
                *c == ',' && !quoted
            })
            .map_or(rest.len(), |(at, _)| at);
        let next = rest[..end].split(';').filter_map(|parameter| parameter.split_once('=')).any(|(name, value)| {
            let value = value.trim().trim_matches('"');
            name.trim().eq_ignore_ascii_case("rel") && value.split_ascii_whitespace().any(|rel| rel.eq_ignore_ascii_case("next"))
        });
        if next {
            return Some(target.trim().to_owned());
        }
        text = &rest[end..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(content_range("bytes 100-199/200"), ContentRange { first: Some(100), total: Some(200) });
        assert_eq!(content_range("bytes 0-0/*"), ContentRange { first: Some(0), total: None });
        assert_eq!(content_range(" bytes */200 "), ContentRange { first: None, total: Some(200) });
        for wrong in ["", "bytes", "100-199/200", "items 1-2/3", "bytes -"] {
            assert_eq!(content_range(wrong), ContentRange::default(), "{wrong}");
        }
    }

    #[test]
    fn upload_offsets() {
        for (text, expected) in [
            ("0-1023", Some(1024)),
            ("bytes=0-1023", Some(1024)),
            (" 0 - 9 ", Some(10)),
            ("0-0", Some(0)),
            ("0-1", Some(2)),
            ("5-9", None),
            ("", None),
            ("0", None),
            ("0--1", None),
            ("0-18446744073709551615", None),
        ] {
            assert_eq!(upload_offset(text), expected, "{text}");
        }
    }

    #[test]
    fn links_to_the_next_page() {
        for (text, expected) in [
            (r#"</v2/a/tags/list?last=b&n=2>; rel="next""#, Some("/v2/a/tags/list?last=b&n=2")),
            ("</a>;rel=next", Some("/a")),
            (r#"</first>; rel="first", </next>; title="a, b"; rel="next""#, Some("/next")),
            (r#"</a>; rel="prev next""#, Some("/a")),
            (r#"</a>; REL="NEXT""#, Some("/a")),
            (r#"</a>; rel="prev""#, None),
            ("</a>", None),
            ("/a; rel=next", None),
            ("", None),
            ("<", None),
        ] {
            assert_eq!(next_of(text).as_deref(), expected, "{text}");
        }
        let mut headers = HeaderMap::new();
        headers.append(header::LINK, "</x>; rel=\"prev\"".parse().unwrap());
        headers.append(header::LINK, "</y>; rel=\"next\"".parse().unwrap());
        assert_eq!(next_link(&headers).as_deref(), Some("/y"));
    }
}
