//! Site settings: `/etc/kiln/config.toml` and the user's own. They hold during
//! a bake only, and enter neither keys nor images.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_qemu::base::Site;
use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    proxy: Option<Proxy>,
    mirror: Option<Mirror>,
    ca_certificates: Option<PathBuf>,
    cache: Option<Cache>,
    registry: Option<Registry>,
    signing: Option<Signing>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registry {
    plain_http: bool,
}

/// With which key bakes sign.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Signing {
    /// Private key.
    pub(crate) key: PathBuf,
    /// File with its passphrase.
    pub(crate) password_file: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cache {
    /// As in a template: `"20GiB"`.
    budget: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proxy {
    url: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mirror {
    debian: String,
}

/// What the site says.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    /// What getting a base takes.
    pub(crate) bases: Site,
    /// Bytes that checkpoints may take; none: the cache decides.
    pub(crate) cache_budget: Option<u64>,
    /// Whether registries may be spoken to in plain http.
    pub(crate) plain_http: bool,
    /// With which key bakes sign; none: they do not.
    pub(crate) signing: Option<Signing>,
}

/// What the command line asked for, for all of this process.
static PLAIN_HTTP: AtomicBool = AtomicBool::new(false);

/// Lets registries be spoken to in plain http (`--plain-http`).
pub(crate) fn allow_plain_http() {
    PLAIN_HTTP.store(true, Ordering::Relaxed);
}

/// Reads the site's settings; the user's own come last and win.
pub(crate) fn load() -> Result<Settings> {
    let mut settings = Settings { plain_http: PLAIN_HTTP.load(Ordering::Relaxed), ..Settings::default() };
    for path in paths() {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).trying(|| format!("read {}", path.display())),
        };
        let file: File = toml::from_str(&text).map_err(|error| {
            Error::new(Code::Usage, format!("{} is wrong: {}", path.display(), error.message()))
                .detail(error.to_string())
                .next("it may hold `ca_certificates`, `[proxy] url`, `[mirror] debian`, `[cache] budget`, `[registry] plain_http`, and `[signing] key` and `password_file`")
        })?;
        if let Some(cache) = file.cache {
            let wrong = || {
                Error::new(Code::Usage, format!("{}: `[cache] budget` is no size: {}", path.display(), cache.budget))
                    .next("write a number and a unit, as in \"20GiB\"")
            };
            settings.cache_budget = Some(kiln_model::settings::parse_size(&cache.budget).ok_or_else(wrong)?);
        }
        settings.plain_http |= file.registry.is_some_and(|registry| registry.plain_http);
        settings.signing = file.signing.or(settings.signing.take());
        let site = &mut settings.bases;
        site.proxy = file.proxy.map(|proxy| proxy.url).or(site.proxy.take());
        site.mirror = file.mirror.map(|mirror| mirror.debian).or(site.mirror.take());
        site.ca_certificates = file.ca_certificates.or(site.ca_certificates.take());
    }
    Ok(settings)
}

fn paths() -> Vec<PathBuf> {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = env("XDG_CONFIG_HOME").or_else(|| env("HOME").map(|home| home.join(".config")));
    std::iter::once(PathBuf::from("/etc/kiln/config.toml")).chain(user.map(|folder| folder.join("kiln/config.toml"))).collect()
}
