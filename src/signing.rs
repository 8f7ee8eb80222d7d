//! Keys in files, and the passphrases that open them.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use kiln_evidence::{PrivateKey, PublicKey};
use kiln_model::event::Reports;
use kiln_model::secret::Secret;
use kiln_model::{Code, Error, Result, ResultExt as _};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::cli::{Bake, Password};

/// The environment variable with a passphrase.
const VARIABLE: &str = "KILN_KEY_PASSWORD";

/// Most bytes of a key's file.
const LIMIT: u64 = 64 * 1024;

/// Where a passphrase comes from: a file, the environment, or a person.
#[derive(Debug, Clone, Default)]
pub(crate) struct Passphrase {
    file: Option<PathBuf>,
}

impl Passphrase {
    pub(crate) fn of(arguments: &Password) -> Self {
        Self { file: arguments.password_file.clone() }
    }

    /// The passphrase of a key that is there.
    fn open(&self, key: &Path) -> Result<Secret> {
        match self.given()? {
            Some(passphrase) => Ok(passphrase),
            None => ask(&format!("Passphrase of {}: ", key.display())),
        }
    }

    /// The passphrase for a new key; a person is asked twice.
    pub(crate) fn choose(&self, key: &Path) -> Result<Secret> {
        let chosen = match self.given()? {
            Some(passphrase) => passphrase,
            None => {
                let first = ask(&format!("Passphrase for {}: ", key.display()))?;
                if !first.expose().is_empty() && ask("The same again: ")? != first {
                    return Err(Error::new(Code::Usage, "the two passphrases differ; no key was made"));
                }
                first
            }
        };
        if chosen.expose().is_empty() {
            return Err(Error::new(Code::Usage, "the passphrase is empty; no key was made"));
        }
        Ok(chosen)
    }

    fn given(&self) -> Result<Option<Secret>> {
        if let Some(path) = &self.file {
            let text = read(path)?;
            return Ok(Some(Secret::new(text.lines().next().unwrap_or_default())));
        }
        match std::env::var(VARIABLE) {
            Ok(value) => Ok(Some(Secret::new(value))),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => Err(Error::new(Code::Usage, format!("{VARIABLE} is not UTF-8"))),
        }
    }
}

/// The key that bakes sign with: the one that was asked for, or the site's.
/// None: they do not sign.
pub(crate) fn key_of_bakes(arguments: &Bake, reports: &Reports) -> Result<Option<PrivateKey>> {
    key_if_any(arguments.sign_key.as_deref(), &arguments.password, reports)
}

/// The key that was asked for, or the site's, if there is one.
pub(crate) fn key_if_any(key: Option<&Path>, password: &Password, reports: &Reports) -> Result<Option<PrivateKey>> {
    match with_site(key, password)? {
        Some((path, passphrase)) => private_key(&path, &passphrase, reports).map(Some),
        None => Ok(None),
    }
}

/// The key to sign with: the one that was asked for, or the site's.
pub(crate) fn key_to_sign(key: Option<&Path>, password: &Password, reports: &Reports) -> Result<PrivateKey> {
    let Some((path, passphrase)) = with_site(key, password)? else {
        return Err(Error::new(Code::Usage, "there is no key to sign with")
            .next("name one with --key, or in the site's settings with `[signing] key`; `kiln keygen` makes one"));
    };
    private_key(&path, &passphrase, reports)
}

fn with_site(key: Option<&Path>, password: &Password) -> Result<Option<(PathBuf, Passphrase)>> {
    if let Some(key) = key {
        return Ok(Some((key.to_owned(), Passphrase::of(password))));
    }
    Ok(crate::site::load()?.signing.map(|site| (site.key, Passphrase { file: password.password_file.clone().or(site.password_file) })))
}

/// Reads a private key.
fn private_key(path: &Path, passphrase: &Passphrase, reports: &Reports) -> Result<PrivateKey> {
    let text = read(path)?;
    if !PrivateKey::is_encrypted(&text).trying(|| format!("use {} as a private key", path.display()))? {
        let mode = std::fs::metadata(path).map_or(0, |meta| meta.permissions().mode());
        if mode & 0o077 != 0 {
            reports.warn(format!("{} is not encrypted, and others can read it", path.display()));
        }
    }
    let open = || {
        let passphrase = passphrase.open(path)?;
        reports.redactor().add(&passphrase);
        Ok(passphrase)
    };
    PrivateKey::from_pem(&text, open).trying(|| format!("use {} as a private key", path.display()))
}

/// The keys that a template trusts, and their names.
pub(crate) fn trusted(paths: &[PathBuf]) -> Result<(Vec<PublicKey>, Vec<String>)> {
    let keys: Vec<PublicKey> = paths.iter().map(|path| public_key(path)).collect::<Result<_>>()?;
    let names = keys.iter().map(|key| key.id().to_string()).collect();
    Ok((keys, names))
}

/// Reads a public key.
pub(crate) fn public_key(path: &Path) -> Result<PublicKey> {
    PublicKey::from_pem(&read(path)?).trying(|| format!("use {} as a public key", path.display()))
}

fn read(path: &Path) -> Result<String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LIMIT).read_to_string(&mut text));
    read.map_err(|error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Failed };
        Error::new(code, format!("cannot read {}", path.display())).because(error)
    })?;
    Ok(text)
}

/// Writes a new file; one that is there stays as it is.
pub(crate) fn write_new(path: &Path, mode: u32, text: &str) -> Result<()> {
    let open = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file = open.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => Error::new(Code::Usage, format!("{} is there already", path.display()))
            .next("name another file with --output; a key is never overwritten, since what it signed would be lost with it"),
        _ => Error::new(Code::Failed, format!("cannot write {}", path.display())).because(error),
    })?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.inspect_err(|_| drop(std::fs::remove_file(path))).trying(|| format!("write {}", path.display()))
}

/// Asks a person at the terminal, showing nothing of what is typed.
fn ask(question: &str) -> Result<Secret> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/tty");
    let terminal = open.ok().and_then(|file| Some((tcgetattr(&file).ok()?, file)));
    let Some((before, mut terminal)) = terminal else {
        return Err(Error::new(Code::Usage, "the private key needs its passphrase, and there is no terminal to ask at")
            .next(format!("set {VARIABLE}, or name a file that holds it with --password-file")));
    };
    let failed = || "ask for the passphrase".to_owned();
    let mut silent = before.clone();
    // Ctrl-C is read as a letter too: ended by it, this process would leave the
    // terminal silent.
    silent.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
    let restore = Restore { terminal: terminal.try_clone().trying(failed)?, before };
    // Whoever sees the question can answer it unseen.
    tcsetattr(&terminal, OptionalActions::Flush, &silent).trying(failed)?;
    terminal.write_all(question.as_bytes()).trying(failed)?;
    let line = read_line(&mut terminal);
    drop(restore);
    terminal.write_all(b"\n").trying(failed)?;
    line
}

/// Gives a terminal back as it was.
struct Restore {
    terminal: File,
    before: Termios,
}

impl Drop for Restore {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

/// Reads a line, letter by letter.
fn read_line(terminal: &mut impl std::io::Read) -> Result<Secret> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        let read = terminal.read(&mut byte).trying(|| "read the passphrase".into())?;
        match byte[0] {
            _ if read == 0 => return Err(Error::new(Code::Interrupted, "no passphrase was given")),
            b'\r' | b'\n' => break,
            // Ctrl-C, and Ctrl-D before anything else.
            3 => return Err(Error::new(Code::Interrupted, "interrupted")),
            4 if line.is_empty() => return Err(Error::new(Code::Interrupted, "no passphrase was given")),
            4 => break,
            // Backspace takes a whole character.
            8 | 127 => while line.pop().is_some_and(|last: u8| last & 0xc0 == 0x80) {},
            // Ctrl-U takes all of it.
            21 => line.clear(),
            other => line.push(other),
        }
    }
    String::from_utf8(line).map(Secret::new).map_err(|_| Error::new(Code::Usage, "the passphrase is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_meant() {
        let typed = |bytes: &[u8]| read_line(&mut &*bytes).map(|secret| secret.expose().to_owned());
        assert_eq!(typed(b"word\nrest").unwrap(), "word");
        assert_eq!(typed("wör\x7f\x7förd\r".as_bytes()).unwrap(), "wörd");
        assert_eq!(typed(b"wrong\x15right\n").unwrap(), "right");
        assert_eq!(typed(b"\n").unwrap(), "");
        for ended in [&b"wo\x03"[..], b"\x04", b""] {
            assert_eq!(typed(ended).unwrap_err().kind(), Code::Interrupted);
        }
    }
}
