//! `kiln keygen`: a pair of keys to sign with.

use std::path::{Path, PathBuf};

use kiln_evidence::PrivateKey;
use kiln_model::{Code, Error, Result};

use super::App;
use crate::cli::Keygen;
use crate::signing::{Passphrase, write_new};

pub(super) fn run(app: &App, arguments: &Keygen) -> Result<u8> {
    let (private, public) = (&arguments.output, public_path(&arguments.output));
    // Before somebody has thought of a passphrase.
    for path in [private, &public] {
        if path.exists() {
            return Err(Error::new(Code::Usage, format!("{} is there already", path.display()))
                .next("name another file with --output; a key is never overwritten, since what it signed would be lost with it"));
        }
    }
    let passphrase = Passphrase::of(&arguments.password).choose(private)?;
    let key = PrivateKey::generate()?;
    write_new(private, 0o600, key.to_encrypted_pem(&passphrase)?.expose())?;
    write_new(&public, 0o644, &key.public().to_pem()?).inspect_err(|_| drop(std::fs::remove_file(private)))?;
    let value = serde_json::json!({ "private_key": private, "public_key": public, "id": key.id() });
    app.output.result(&value, || {
        format!(
            "{}  private key, encrypted; keep it and its passphrase\n{}  public key, for everybody\nid {}",
            private.display(),
            public.display(),
            key.id()
        )
    });
    Ok(0)
}

/// `kiln.pub` beside `kiln.key`.
fn public_path(private: &Path) -> PathBuf {
    if private.extension().is_some_and(|extension| extension == "key") {
        return private.with_extension("pub");
    }
    let mut name = private.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}
