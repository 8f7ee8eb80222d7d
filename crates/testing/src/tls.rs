//! A certificate authority for one test, made by openssl.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_model::{Code, Error, Result, ResultExt as _};

const CONFIG: &str = "\
[req]
distinguished_name = name
prompt = no
x509_extensions = authority
[name]
CN = kiln tests
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
";

/// What a server and its clients need.
pub(crate) struct Certificates {
    /// The authority, to trust.
    pub(crate) authority: PathBuf,
    /// The server's.
    pub(crate) certificate: PathBuf,
    /// The server's.
    pub(crate) key: PathBuf,
}

/// Makes an authority and a certificate for loopback in `folder`.
///
/// # Errors
/// When openssl fails.
pub(crate) fn make(folder: &Path) -> Result<Certificates> {
    let config = folder.join("openssl.cnf");
    std::fs::write(&config, CONFIG).trying(|| format!("write {}", config.display()))?;
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    openssl(
        folder,
        &[&["req", "-x509", "-days", "2", "-config", "openssl.cnf", "-keyout", "ca.key", "-out", "ca.pem"], &key[..]].concat(),
    )?;
    openssl(folder, &[&["req", "-new", "-config", "openssl.cnf", "-keyout", "server.key", "-out", "server.csr"], &key[..]].concat())?;
    let sign = ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"];
    openssl(folder, &[&sign[..], &["-extfile", "openssl.cnf", "-extensions", "server", "-out", "server.pem"]].concat())?;
    Ok(Certificates { authority: folder.join("ca.pem"), certificate: folder.join("server.pem"), key: folder.join("server.key") })
}

fn openssl(folder: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(folder)
        .output()
        .map_err(|error| Error::new(Code::Missing, "cannot run openssl").because(error).next("install it: apt-get install openssl"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(Error::new(Code::Failed, format!("openssl {} failed", arguments.join(" "))).detail(said))
}
