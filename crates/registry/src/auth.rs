//! Proving to a registry who one is: passwords and tokens.
//!
//! A registry says with its first 401 what it wants; from then on each request
//! carries it from the start. Tokens are kept by scope until shortly before
//! they end, and got by one task while the others that want the same wait.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_http::{Failed, is_loopback, shown};
use kiln_model::secret::Secret;
use kiln_model::{Code, Error};
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use crate::challenge::{Wanted, wanted};
use crate::config::{Login, Proof};
use crate::host::{Host, named};

/// What a token lives when its server does not say (the specification's word).
const LIFETIME: u64 = 60;
/// An answer of a token server is smaller than this many bytes.
const ANSWER: u64 = 1 << 20;

/// What a request needs to be allowed to do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scope(Vec<String>);

impl Scope {
    /// `actions` (`pull`, `pull,push`) on `repository`.
    pub(crate) fn on(repository: &str, actions: &str) -> Self {
        Self(vec![format!("repository:{repository}:{actions}")])
    }

    /// And besides `actions` on `repository`.
    pub(crate) fn and(mut self, repository: &str, actions: &str) -> Self {
        self.0.push(format!("repository:{repository}:{actions}"));
        self
    }

    /// Whether `other`, a scope in a registry's words, is in this one.
    fn holds(&self, other: &str) -> bool {
        let parts = |text: &str| text.rsplit_once(':').map(|(resource, actions)| (resource.to_owned(), actions.to_owned()));
        let Some((resource, actions)) = parts(other) else { return false };
        let own = self.0.iter().filter_map(|text| parts(text)).filter(|(name, _)| *name == resource);
        let own: Vec<String> = own.flat_map(|(_, actions)| actions.split(',').map(str::to_owned).collect::<Vec<_>>()).collect();
        actions.split(',').all(|action| own.iter().any(|own| own == action))
    }
}

#[derive(Clone)]
struct Token {
    value: Secret,
    /// When it is to be renewed.
    until: Instant,
}

/// What is known of how one host wants to be asked. Holds tokens, and has no
/// `Debug`.
#[derive(Default)]
pub(crate) struct Auth {
    wanted: Mutex<Option<Wanted>>,
    /// What registries ask for beside the scope that we know.
    besides: Mutex<HashMap<Scope, Vec<String>>>,
    tokens: tokio::sync::Mutex<HashMap<Scope, Token>>,
}

impl Auth {
    fn wanted(&self) -> Option<Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The `Authorization` for requests that need `scope`; none when the host
    /// has not asked for any, or nobody says who one is there.
    ///
    /// # Errors
    /// When a helper, a file or the token server fails.
    pub(crate) async fn header(&self, host: &Host, repository: &str, scope: &Scope) -> Result<Option<HeaderValue>, Failed> {
        let Some(wanted) = self.wanted() else { return Ok(None) };
        let login = host.login(repository).await?;
        let text = match (&wanted, login.as_ref().map(|login| &login.proof)) {
            (Wanted::Basic, Some(Proof::Password(user, password))) => basic(user, password),
            (Wanted::Basic, _) => return Ok(None),
            (Wanted::Bearer { .. }, Some(Proof::Token(token))) => format!("Bearer {}", token.expose()),
            (Wanted::Bearer { realm, service, .. }, _) => {
                let mut tokens = self.tokens.lock().await;
                let now = Instant::now();
                tokens.retain(|_, token| token.until > now);
                let token = match tokens.get(scope) {
                    Some(token) => token.clone(),
                    None => {
                        let token = self.token(host, realm, service.as_deref(), scope, login.as_ref()).await?;
                        tokens.insert(scope.clone(), token.clone());
                        token
                    }
                };
                format!("Bearer {}", token.value.expose())
            }
        };
        let mut value = HeaderValue::from_str(&text)
            .map_err(|_| Error::new(Code::Failed, format!("the credentials for {} hold what no header can hold", host.name())))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// Learns from a 401 to a request that carried `sent`; tells whether asking
    /// again can help.
    pub(crate) async fn learn(&self, headers: &HeaderMap, scope: &Scope, sent: Option<&HeaderValue>) -> bool {
        let Some(asked) = wanted(headers) else { return false };
        let besides = match &asked {
            Wanted::Bearer { scope: Some(asked), .. } => {
                let unknown = asked.split_ascii_whitespace().filter(|part| !scope.holds(part));
                unknown.map(str::to_owned).collect()
            }
            _ => Vec::new(),
        };
        if !besides.is_empty() {
            self.besides.lock().unwrap_or_else(PoisonError::into_inner).insert(scope.clone(), besides);
        }
        let basic = asked == Wanted::Basic;
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(asked);
        let Some(sent) = sent.and_then(|sent| sent.to_str().ok()) else { return true };
        // Refused with a token: a newer one may do, unless another task has got
        // one in the meantime. The same password will not.
        if let Some(sent) = sent.strip_prefix("Bearer ") {
            let mut tokens = self.tokens.lock().await;
            if tokens.get(scope).is_some_and(|token| token.value.expose() == sent) {
                tokens.remove(scope);
            }
            return true;
        }
        !basic
    }

    async fn token(&self, host: &Host, realm: &Url, service: Option<&str>, scope: &Scope, login: Option<&Login>) -> Result<Token, Failed> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }

        let what = format!("get a token for {} from {}", host.name(), shown(realm));
        let failed = |code, why: &str| Error::new(code, format!("cannot {what}: {why}"));
        // What proves who one is goes over no line that anyone can read.
        if realm.scheme() != "https" && !is_loopback(realm) && !host.may_be_plain() {
            return Err(Failed::Final(
                failed(Code::Failed, "that address is plain http, and kiln sends no credentials over it")
                    .next("ask whoever runs the registry to serve its tokens by https"),
            ));
        }
        let besides = self.besides.lock().unwrap_or_else(PoisonError::into_inner).get(scope).cloned().unwrap_or_default();
        let scopes = || scope.0.iter().chain(&besides);
        let client = host.client_for(realm)?;
        let request = match login.map(|login| &login.proof) {
            Some(Proof::Refresh(token)) => {
                let mut form = Url::parse("form:").map_err(|_| failed(Code::Failed, "no form"))?;
                form.query_pairs_mut()
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("client_id", "kiln")
                    .append_pair("service", service.unwrap_or_default())
                    .append_pair("scope", &scopes().map(String::as_str).collect::<Vec<_>>().join(" "))
                    .append_pair("refresh_token", token.expose());
                let form = form.query().unwrap_or_default().to_owned();
                client.post(realm.clone()).header(reqwest::header::CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
            }
            proof => {
                let mut url = realm.clone();
                {
                    let mut query = url.query_pairs_mut();
                    if let Some(service) = service {
                        query.append_pair("service", service);
                    }
                    for scope in scopes() {
                        query.append_pair("scope", scope);
                    }
                    if let Some(Proof::Password(user, _)) = proof {
                        query.append_pair("account", user);
                    }
                }
                let request = client.get(url);
                match proof {
                    Some(Proof::Password(user, password)) => request.basic_auth(user, Some(password.expose())),
                    _ => request,
                }
            }
        };
        let answer = host.receive(request, &what, ANSWER).await?;
        if answer.status != StatusCode::OK {
            return Err(host.sort(&what, &named(&answer.url), &answer, login));
        }
        let unusable = || failed(Code::Failed, "it answered with something that holds no token");
        let answer: Answer = serde_json::from_slice(&answer.bytes).map_err(|_| unusable())?;
        let value = answer.token.or(answer.access_token).filter(|token| !token.is_empty()).ok_or_else(unusable)?;
        let value = Secret::new(value);
        host.keep_secret(&value);
        // Renewed early: a request may take a while until it arrives.
        let lifetime = answer.expires_in.unwrap_or(LIFETIME);
        let until = Instant::now() + Duration::from_secs(lifetime.saturating_sub((lifetime / 5).min(30)).min(1 << 20));
        Ok(Token { value, until })
    }
}

fn basic(user: &str, password: &Secret) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{}", password.expose())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_hold_what_registries_ask_for_in_their_words() {
        let scope = Scope::on("a/b", "pull,push").and("c", "pull");
        for (text, expected) in [
            ("repository:a/b:pull", true),
            ("repository:a/b:push,pull", true),
            ("repository:c:pull", true),
            ("repository:c:push", false),
            ("repository:x/a/b:pull", false),
            ("registry:catalog:*", false),
            ("", false),
        ] {
            assert_eq!(scope.holds(text), expected, "{text}");
        }
    }
}
