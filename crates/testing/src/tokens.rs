//! A token server, as registries have one, and the check of what it gave out.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use base64::Engine as _;
use hyper::header::{AUTHORIZATION, HeaderMap};
use hyper::{Method, Response};

use crate::answer::{answer, error};
use crate::flow::Outgoing;

/// How the proxy wants tokens. It gives them out itself, at `/token`.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Who may do everything.
    pub user: String,
    /// By which password; also the refresh token.
    pub password: String,
    /// How long a token holds, in whole seconds.
    pub lifetime: Duration,
    /// Whether everybody may read.
    pub anonymous: bool,
}

/// What was given out.
pub(crate) struct Office {
    tokens: Tokens,
    /// When it was given out, and the scopes, in the form `name:action`.
    given: HashMap<String, (Instant, Vec<String>)>,
}

impl Office {
    pub(crate) fn new(tokens: Tokens) -> Self {
        Self { tokens, given: HashMap::new() }
    }

    /// How many tokens were given out.
    pub(crate) fn issued(&self) -> usize {
        self.given.len()
    }

    /// Answers a request to `/token`; `form` is its body.
    pub(crate) fn give(&mut self, method: &Method, query: &str, headers: &HeaderMap, form: &str) -> Response<Outgoing> {
        let pairs = pairs(if method == Method::POST { form } else { query });
        let Tokens { user, password, .. } = &self.tokens;
        let full = if method == Method::POST {
            match pairs.iter().find(|(name, _)| name == "refresh_token") {
                Some((_, token)) if token == password => true,
                _ => return error(401, &[], "UNAUTHORIZED", "wrong refresh token"),
            }
        } else {
            let sent = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
            let right = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")));
            match sent {
                Some(sent) if sent == right => true,
                Some(_) => return error(401, &[], "UNAUTHORIZED", "incorrect username or password"),
                None => false,
            }
        };
        let mut allowed = Vec::new();
        for scope in pairs.iter().filter(|(name, _)| name == "scope").flat_map(|(_, scopes)| scopes.split(' ')) {
            let mut parts = scope.splitn(3, ':');
            let (Some("repository"), Some(name), Some(actions)) = (parts.next(), parts.next(), parts.next()) else { continue };
            for action in actions.split(',').filter(|action| full || self.tokens.anonymous && *action == "pull") {
                allowed.push(format!("{name}:{action}"));
            }
        }
        let token = format!("token-{}", self.given.len());
        self.given.insert(token.clone(), (Instant::now(), allowed));
        let body = serde_json::json!({ "token": token, "expires_in": self.tokens.lifetime.as_secs() }).to_string();
        answer(200, &[("Content-Type", "application/json")], body)
    }

    /// The refusal of a request whose token does not allow it.
    pub(crate) fn check(&self, proxy: &str, method: &Method, path: &str, query: &str, headers: &HeaderMap) -> Option<Response<Outgoing>> {
        let needed = needed(method, path, query);
        let sent = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("Bearer "));
        let given = sent.and_then(|sent| self.given.get(sent)).filter(|(since, _)| since.elapsed() < self.tokens.lifetime);
        if given.is_some_and(|(_, allowed)| needed.iter().all(|(name, action)| allowed.contains(&format!("{name}:{action}")))) {
            return None;
        }
        let mut challenge = format!("Bearer realm=\"http://{proxy}/token\",service=\"kiln-tests\"");
        if !needed.is_empty() {
            let scopes: Vec<String> = needed.iter().map(|(name, action)| format!("repository:{name}:{action}")).collect();
            challenge += &format!(",scope=\"{}\"", scopes.join(" "));
        }
        Some(error(401, &[("WWW-Authenticate", &challenge)], "UNAUTHORIZED", "authentication required"))
    }
}

/// Repositories and actions that a request is about.
fn needed(method: &Method, path: &str, query: &str) -> Vec<(String, &'static str)> {
    let Some(path) = path.strip_prefix("/v2/") else { return Vec::new() };
    let kinds = ["/blobs/", "/manifests/", "/tags/", "/referrers/"];
    let Some(name) = kinds.iter().filter_map(|kind| path.rfind(kind)).max().map(|at| &path[..at]) else { return Vec::new() };
    let mut needed = vec![(name.to_owned(), "pull")];
    match *method {
        Method::GET | Method::HEAD => {}
        Method::DELETE => needed.push((name.to_owned(), "delete")),
        _ => needed.push((name.to_owned(), "push")),
    }
    needed.extend(pairs(query).into_iter().filter(|(name, _)| name == "from").map(|(_, from)| (from, "pull")));
    needed
}

/// The pairs of a query or a form.
fn pairs(text: &str) -> Vec<(String, String)> {
    text.split('&').filter_map(|pair| pair.split_once('=')).map(|(name, value)| (decoded(name), decoded(value))).collect()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
                continue;
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(first),
        }
        rest = after;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
