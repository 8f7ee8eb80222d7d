//! What a registry asks for before it answers: `WWW-Authenticate` (RFC 9110,
//! 11.6.1).

use reqwest::Url;
use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// How a registry wants to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// User and password with each request.
    Basic,
    /// A token, from another server.
    Bearer {
        /// Where tokens are to be had.
        realm: Url,
        /// What the token server calls this registry.
        service: Option<String>,
        /// What the request needed.
        scope: Option<String>,
    },
}

#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    /// In lower case.
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// What `headers` ask for: tokens rather than passwords; none when it is
/// neither.
pub(crate) fn wanted(headers: &HeaderMap) -> Option<Wanted> {
    let all: Vec<Challenge> = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok()).flat_map(parse).collect();
    let bearer = all.iter().filter(|c| c.scheme == "bearer").find_map(|c| {
        let owned = |name| c.get(name).map(str::to_owned);
        Some(Wanted::Bearer { realm: c.get("realm")?.parse().ok()?, service: owned("service"), scope: owned("scope") })
    });
    bearer.or_else(|| all.iter().any(|c| c.scheme == "basic").then_some(Wanted::Basic))
}

/// Reads one field, which may hold several challenges.
fn parse(text: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let after = after.trim_start_matches([' ', '\t']);
        match (after.strip_prefix('='), found.last_mut()) {
            (Some(after), Some(challenge)) if !word.is_empty() => {
                let (value, after) = value(after.trim_start_matches([' ', '\t']));
                challenge.parameters.push((word.to_owned(), value));
                rest = after;
            }
            // Nothing that can be read: what came before still counts.
            _ if word.is_empty() => return found,
            _ => {
                found.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
                rest = after;
            }
        }
    }
}

/// A token or a quoted string, and what follows it.
fn value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, c)| c)),
            _ => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(fields: &[&str]) -> Option<Wanted> {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(WWW_AUTHENTICATE, field.parse().unwrap());
        }
        wanted(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Wanted> {
        Some(Wanted::Bearer { realm: realm.parse().unwrap(), service: service.map(Into::into), scope: scope.map(Into::into) })
    }

    #[test]
    fn what_registries_send() {
        assert_eq!(of(&[r#"Basic realm="Registry Realm""#]), Some(Wanted::Basic));
        assert_eq!(
            of(&[r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#]),
            bearer("https://auth.docker.io/token", Some("registry.docker.io"), Some("repository:a/b:pull,push"))
        );
        assert_eq!(of(&[r#"bearer  realm = "https://h/t" , error="insufficient_scope""#]), bearer("https://h/t", None, None));
        assert_eq!(of(&["Bearer realm=https://h/t?x"]), bearer("https://h/t?x", None, None));
        assert_eq!(of(&[r#"Bearer realm="https://h/t",service="a \"b\" c""#]), bearer("https://h/t", Some("a \"b\" c"), None));
    }

    #[test]
    fn several_challenges() {
        let token = bearer("https://h/t", Some("s"), None);
        assert_eq!(of(&[r#"Basic realm="x", Bearer realm="https://h/t",service="s""#]), token);
        assert_eq!(of(&[r#"Basic realm="x""#, r#"Bearer realm="https://h/t",service="s""#]), token);
        assert_eq!(of(&[r#"Negotiate abc==, Basic realm="x, Bearer""#]), Some(Wanted::Basic));
    }

    #[test]
    fn what_cannot_be_used() {
        for field in
            ["", "=", "Negotiate", "Bearer", r#"Bearer realm="not a url""#, r#"Bearer service="s""#, "\"", ",,,", "Digest realm=\"a"]
        {
            assert_eq!(of(&[field]), None, "{field}");
        }
        assert_eq!(of(&[]), None);
        // A realm that cannot be used leaves the password.
        assert_eq!(of(&[r#"Bearer realm="", Basic realm="x""#]), Some(Wanted::Basic));
    }
}
