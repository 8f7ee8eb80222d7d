//! Site settings: `/etc/kiln/config.toml` and the user's own. They hold during
//! a bake only, and enter neither keys nor images.

use std::path::PathBuf;

use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_qemu::base::Site;
use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    proxy: Option<Proxy>,
    mirror: Option<Mirror>,
    ca_certificates: Option<PathBuf>,
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

/// Reads the site's settings; the user's own come last and win.
pub(crate) fn load() -> Result<Site> {
    let mut site = Site::default();
    for path in paths() {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).trying(|| format!("read {}", path.display())),
        };
        let file: File = toml::from_str(&text).map_err(|error| {
            Error::new(Code::Usage, format!("{} is wrong: {}", path.display(), error.message()))
                .detail(error.to_string())
                .next("it may hold `ca_certificates`, `[proxy] url` and `[mirror] debian`")
        })?;
        site.proxy = file.proxy.map(|proxy| proxy.url).or(site.proxy);
        site.mirror = file.mirror.map(|mirror| mirror.debian).or(site.mirror);
        site.ca_certificates = file.ca_certificates.or(site.ca_certificates);
    }
    Ok(site)
}

fn paths() -> Vec<PathBuf> {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = env("XDG_CONFIG_HOME").or_else(|| env("HOME").map(|home| home.join(".config")));
    std::iter::once(PathBuf::from("/etc/kiln/config.toml")).chain(user.map(|folder| folder.join("kiln/config.toml"))).collect()
}
