//! Keys: ECDSA on P-256 with SHA-256, the kind that cosign and every TLS
//! library know.
//!
//! A private key is kept as encrypted PKCS#8 in PEM (PBES2: scrypt and
//! AES-256-CBC), a public key as SubjectPublicKeyInfo in PEM, so that `openssl`
//! reads both. A key's id is the SHA-256 of its public key's DER form, the same
//! that `openssl pkey -pubin -outform DER | sha256sum` prints.

use std::fmt;

use kiln_model::secret::Secret;
use kiln_model::{Code, Digest, Error, Result};
use p256::SecretKey;
use p256::ecdsa::signature::hazmat::PrehashVerifier as _;
use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::ecdsa::{Signature, SigningKey, VerifyingKey};
use p256::elliptic_curve::Generate as _;
use pkcs8::der::{Decode as _, SecretDocument};
use pkcs8::{DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _, EncryptedPrivateKeyInfoRef, LineEnding, PrivateKeyInfoRef};

/// Checks signatures.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    id: Digest,
}

impl PublicKey {
    /// Reads a public key in PEM.
    ///
    /// # Errors
    /// [`Code::Usage`] when it is something else, or a key on another curve.
    pub fn from_pem(text: &str) -> Result<Self> {
        let block = Block::find(text, &["PUBLIC KEY"])?;
        let key = VerifyingKey::from_public_key_pem(&block.text).map_err(|error| {
            Error::new(Code::Usage, "this is no public key of the kind that kiln uses, ECDSA on the curve P-256")
                .because(error)
                .next("`kiln keygen` makes a pair of keys")
        })?;
        Self::of(key)
    }

    fn of(key: VerifyingKey) -> Result<Self> {
        let der = key.to_public_key_der().map_err(|error| broken("a public key cannot be written down").because(error))?;
        Ok(Self { key, id: Digest::of(der.as_bytes()) })
    }

    /// The key in PEM, as `openssl` writes it.
    ///
    /// # Errors
    /// Never, unless kiln itself is broken.
    pub fn to_pem(&self) -> Result<String> {
        self.key.to_public_key_pem(LineEnding::LF).map_err(|error| broken("a public key cannot be written down").because(error))
    }

    /// Its id: the SHA-256 of its DER form.
    pub fn id(&self) -> Digest {
        self.id
    }

    /// Whether `signature` (ASN.1 DER, as everywhere) is this key's over
    /// `message`.
    pub fn accepts(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::from_der(signature).is_ok_and(|signature| self.key.verify(message, &signature).is_ok())
    }

    /// As [`PublicKey::accepts`], for a message of which only the SHA-256 is
    /// known.
    pub fn accepts_digest(&self, message: &Digest, signature: &[u8]) -> bool {
        Signature::from_der(signature).is_ok_and(|signature| self.key.verify_prehash(message.as_bytes(), &signature).is_ok())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id)
    }
}

/// Makes signatures.
#[derive(Clone)]
pub struct PrivateKey {
    key: SigningKey,
    public: PublicKey,
}

impl PrivateKey {
    /// A new key from the system's random numbers.
    ///
    /// # Errors
    /// When there are none.
    pub fn generate() -> Result<Self> {
        let key =
            SigningKey::try_generate().map_err(|error| Error::new(Code::Failed, "cannot get random numbers for a key").because(error))?;
        Self::of(key)
    }

    fn of(key: SigningKey) -> Result<Self> {
        let public = PublicKey::of(*key.verifying_key())?;
        Ok(Self { key, public })
    }

    /// Whether a private key in PEM needs a passphrase.
    ///
    /// # Errors
    /// [`Code::Usage`] when it is no private key that kiln reads.
    pub fn is_encrypted(text: &str) -> Result<bool> {
        Ok(Block::find(text, &PRIVATE)?.label == ENCRYPTED)
    }

    /// Reads a private key in PEM: PKCS#8, encrypted or not, or the older form
    /// of `openssl ecparam -genkey`. `passphrase` is asked for only when one is
    /// needed.
    ///
    /// # Errors
    /// [`Code::Refused`] when the passphrase is wrong; [`Code::Usage`] when it
    /// is no private key that kiln reads.
    pub fn from_pem(text: &str, passphrase: impl FnOnce() -> Result<Secret>) -> Result<Self> {
        let block = Block::find(text, &PRIVATE)?;
        let unreadable = |error: &dyn fmt::Display| {
            Error::new(Code::Usage, format!("the private key cannot be read: {error}")).next("`kiln keygen` makes a pair of keys")
        };
        let (_, document) = SecretDocument::from_pem(&block.text).map_err(|error| unreadable(&error))?;
        let secret = match block.label {
            SEC1 => SecretKey::from_sec1_der(document.as_bytes()).map_err(|_| other_curve())?,
            PLAIN => {
                let info = PrivateKeyInfoRef::from_der(document.as_bytes()).map_err(|error| unreadable(&error))?;
                SecretKey::try_from(info).map_err(|_| other_curve())?
            }
            _ => {
                let info = EncryptedPrivateKeyInfoRef::from_der(document.as_bytes()).map_err(|error| unreadable(&error))?;
                let opened = info.decrypt(passphrase()?.expose().as_bytes()).map_err(|error| match error {
                    pkcs8::Error::EncryptedPrivateKey(pkcs8::pkcs5::Error::DecryptFailed) | pkcs8::Error::Asn1(_) => wrong_passphrase(),
                    other => unreadable(&other)
                        .next("`openssl pkcs8 -topk8 -v2 aes-256-cbc -scrypt -in OLD -out NEW` encrypts it in a way that kiln reads"),
                })?;
                // One wrong passphrase in 256 looks right until here.
                let info = PrivateKeyInfoRef::from_der(opened.as_bytes()).map_err(|_| wrong_passphrase())?;
                SecretKey::try_from(info).map_err(|_| other_curve())?
            }
        };
        Self::of(SigningKey::from(secret))
    }

    /// The key as encrypted PKCS#8 in PEM.
    ///
    /// # Errors
    /// [`Code::Usage`] when the passphrase is empty; when there are no random
    /// numbers.
    pub fn to_encrypted_pem(&self, passphrase: &Secret) -> Result<Secret> {
        if passphrase.expose().is_empty() {
            return Err(Error::new(Code::Usage, "a private key is not kept without a passphrase"));
        }
        let pem = self.key.to_pkcs8_encrypted_pem(passphrase.expose().as_bytes(), LineEnding::LF);
        let pem = pem.map_err(|error| Error::new(Code::Failed, "the private key cannot be encrypted").because(error))?;
        Ok(Secret::new(pem.as_str()))
    }

    /// What is public of it.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Its id, which is its public key's.
    pub fn id(&self) -> Digest {
        self.public.id
    }

    /// The signature over `message`, ASN.1 DER. The same message gives the same
    /// signature (RFC 6979), so signing again adds nothing new.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature: Signature = self.key.sign(message);
        signature.to_der().as_bytes().to_vec()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({})", self.public.id)
    }
}

const ENCRYPTED: &str = "ENCRYPTED PRIVATE KEY";
const PLAIN: &str = "PRIVATE KEY";
const SEC1: &str = "EC PRIVATE KEY";
const PRIVATE: [&str; 3] = [ENCRYPTED, PLAIN, SEC1];

/// One block of a PEM file.
struct Block<'l> {
    label: &'l str,
    text: String,
}

impl<'l> Block<'l> {
    /// The first block with one of these labels. `openssl ecparam -genkey`
    /// writes the curve's name as a block of its own before the key.
    fn find(text: &str, labels: &[&'l str]) -> Result<Self> {
        let mut seen = Vec::new();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let Some(label) = line.trim().strip_prefix("-----BEGIN ").and_then(|rest| rest.strip_suffix("-----")) else { continue };
            let end = format!("-----END {label}-----");
            let Some(known) = labels.iter().find(|known| **known == label) else {
                seen.push(label.to_owned());
                continue;
            };
            let mut block = format!("{}\n", line.trim());
            for line in lines.by_ref() {
                if line.starts_with("Proc-Type:") {
                    return Err(Error::new(Code::Usage, "the private key is encrypted in OpenSSL's old way, which is weak and not read")
                        .next("`openssl pkcs8 -topk8 -v2 aes-256-cbc -scrypt -in OLD -out NEW` encrypts it anew"));
                }
                block.push_str(line.trim());
                block.push('\n');
                if line.trim() == end {
                    return Ok(Self { label: known, text: block });
                }
            }
            return Err(Error::new(Code::Usage, format!("the file is cut short: there is no `{end}`")));
        }
        let wanted = if labels.contains(&ENCRYPTED) { "private key" } else { "public key" };
        let error = Error::new(Code::Usage, format!("there is no {wanted} in PEM here"));
        Err(match seen.first().map(String::as_str) {
            Some("ENCRYPTED SIGSTORE PRIVATE KEY" | "ENCRYPTED COSIGN PRIVATE KEY") => error.next(
                "this is a key in cosign's own wrapping, which kiln does not read; `cosign import-key-pair` takes keys the other way round",
            ),
            Some(PLAIN | SEC1 | ENCRYPTED) => error.next("this is a private key; the public one is beside it, and ends in .pub"),
            Some("PUBLIC KEY") => error.next("this is a public key; the private one is needed to sign"),
            Some(other) => error.next(format!("the file holds a `{other}`")),
            None => error.next("`kiln keygen` makes a pair of keys"),
        })
    }
}

fn wrong_passphrase() -> Error {
    Error::new(Code::Refused, "the passphrase of the private key is wrong")
}

fn other_curve() -> Error {
    Error::new(Code::Usage, "the private key is of another kind: kiln signs with ECDSA on the curve P-256")
        .next("`kiln keygen` makes a pair of keys, and so does `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256`")
}

fn broken(what: &str) -> Error {
    Error::new(Code::Failed, what)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A key that is the same in every run.
    pub(crate) fn key(number: u8) -> PrivateKey {
        PrivateKey::of(SigningKey::from_slice(&[number; 32]).unwrap()).unwrap()
    }

    fn secret(text: &str) -> Secret {
        Secret::new(text)
    }

    /// Runs openssl; it has to succeed.
    #[track_caller]
    pub(crate) fn openssl(arguments: &[&str]) -> Vec<u8> {
        let output = Command::new("openssl").args(arguments).stdin(Stdio::null()).output().expect("openssl has to be installed");
        assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    #[test]
    fn openssl_reads_our_keys_and_agrees_about_the_id() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let key = PrivateKey::generate().unwrap();
        let pem = key.to_encrypted_pem(&secret("correct horse")).unwrap();
        assert!(pem.expose().starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----\n"));
        std::fs::write(at("key"), pem.expose()).unwrap();
        std::fs::write(at("pub"), key.public().to_pem().unwrap()).unwrap();
        let public = openssl(&["pkey", "-in", &at("key"), "-passin", "pass:correct horse", "-pubout"]);
        assert_eq!(String::from_utf8(public).unwrap(), key.public().to_pem().unwrap());
        assert_eq!(Digest::of(openssl(&["pkey", "-pubin", "-in", &at("pub"), "-outform", "DER"])), key.id());
        let text = String::from_utf8(openssl(&["asn1parse", "-in", &at("key")])).unwrap();
        assert!(text.contains("PBES2") && text.contains("scrypt") && text.contains("aes-256-cbc"), "{text}");
        std::fs::write(at("message"), "hello").unwrap();
        std::fs::write(at("signature"), key.sign(b"hello")).unwrap();
        openssl(&["dgst", "-sha256", "-verify", &at("pub"), "-signature", &at("signature"), &at("message")]);
    }

    #[test]
    fn keys_that_openssl_makes_are_read_in_every_form() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", &at("plain")]);
        openssl(&["ec", "-in", &at("plain"), "-param_enc", "named_curve", "-out", &at("sec1")]);
        openssl(&["pkcs8", "-topk8", "-in", &at("plain"), "-out", &at("pbkdf2"), "-v2", "aes-256-cbc", "-passout", "pass:word"]);
        openssl(&["pkcs8", "-topk8", "-in", &at("plain"), "-out", &at("scrypt"), "-scrypt", "-passout", "pass:word"]);
        openssl(&["pkey", "-in", &at("plain"), "-pubout", "-out", &at("pub")]);
        let public = PublicKey::from_pem(&std::fs::read_to_string(at("pub")).unwrap()).unwrap();
        for (name, encrypted) in [("plain", false), ("sec1", false), ("pbkdf2", true), ("scrypt", true)] {
            let text = std::fs::read_to_string(at(name)).unwrap();
            assert_eq!(PrivateKey::is_encrypted(&text).unwrap(), encrypted, "{name}");
            let key = PrivateKey::from_pem(&text, || Ok(secret("word"))).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert_eq!(key.id(), public.id(), "{name}");
            std::fs::write(at("message"), "hello").unwrap();
            openssl(&["dgst", "-sha256", "-sign", &at("plain"), "-out", &at("signature"), &at("message")]);
            assert!(public.accepts(b"hello", &std::fs::read(at("signature")).unwrap()));
        }
        openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-out", &at("with-parameters")]);
        let text = std::fs::read_to_string(at("with-parameters")).unwrap();
        assert!(text.contains("EC PARAMETERS"));
        PrivateKey::from_pem(&text, || panic!("no passphrase is needed")).unwrap();
    }

    #[test]
    fn what_is_wrong_with_a_key_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let pem = key(7).to_encrypted_pem(&secret("right")).unwrap();
        // Some wrong passphrases decrypt to something.
        for number in 0..3 {
            let error = PrivateKey::from_pem(pem.expose(), || Ok(secret(&format!("wrong {number}")))).unwrap_err();
            assert_eq!(error.kind(), Code::Refused, "{error:?}");
            assert_eq!(error.to_string(), "the passphrase of the private key is wrong");
        }
        assert_eq!(PrivateKey::from_pem(pem.expose(), || Ok(secret("right"))).unwrap().id(), key(7).id());
        assert!(key(7).to_encrypted_pem(&secret("")).is_err());

        openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-out", &at("p384")]);
        openssl(&["genpkey", "-algorithm", "ED25519", "-out", &at("ed25519")]);
        openssl(&["pkey", "-in", &at("p384"), "-pubout", "-out", &at("p384.pub")]);
        let read = |name: &str| std::fs::read_to_string(at(name)).unwrap();
        let no = || panic!("no passphrase is needed");
        for name in ["p384", "ed25519"] {
            let error = PrivateKey::from_pem(&read(name), no).unwrap_err();
            assert!(error.to_string().contains("P-256"), "{error}");
        }
        assert!(PublicKey::from_pem(&read("p384.pub")).unwrap_err().to_string().contains("P-256"));
        let swapped = PrivateKey::from_pem(&key(7).public().to_pem().unwrap(), no).unwrap_err();
        assert!(swapped.next_move().unwrap().contains("public key"), "{swapped:?}");
        let swapped = PublicKey::from_pem(pem.expose()).unwrap_err();
        assert!(swapped.next_move().unwrap().contains(".pub"), "{swapped:?}");
        let cut = &pem.expose()[..pem.expose().len() - 30];
        assert!(PrivateKey::from_pem(cut, no).unwrap_err().to_string().contains("cut short"));
        for text in ["", "x", "-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAA==\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n"] {
            assert_eq!(PrivateKey::from_pem(text, no).unwrap_err().kind(), Code::Usage);
        }
    }

    #[test]
    fn a_private_key_is_never_shown() {
        let shown = format!("{:?}", key(7));
        assert_eq!(shown, format!("PrivateKey({})", key(7).id()));
    }
}
