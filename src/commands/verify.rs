//! `kiln verify`: who signed an image, and what else is attached to it; or,
//! without an image, every blob and block of the store read again. Of an AMI
//! the snapshots are read back.

use kiln_ec2::api::retry::Pace;
use kiln_ec2::publish::Region;
use kiln_ec2::publish::verify::VerifiedDisk;
use kiln_evidence::{Examined, Failure, PublicKey, Subject, What};
use kiln_model::reference::Reference;
use kiln_model::{Code, Digest, Error, Result};
use serde_json::json;

use super::App;
use crate::cli::Verify;
use crate::ec2::{self, Target};
use crate::output::{bytes, show_error, table};
use crate::{evidence, signing};

pub(super) async fn run(app: &App, arguments: &Verify) -> Result<u8> {
    match &arguments.reference {
        Some(reference) if ec2::is_target(reference) => ami(app, reference, arguments).await,
        Some(_) if arguments.keys.is_empty() => {
            Err(Error::new(Code::Usage, "no key is named that has to have signed it")
                .next("add --key FILE, once for each key that will do"))
        }
        Some(reference) => image(app, reference, arguments).await,
        None => store(app),
    }
}

async fn image(app: &App, reference: &str, arguments: &Verify) -> Result<u8> {
    let reference: Reference = reference.parse()?;
    let keys: Vec<PublicKey> = arguments.keys.iter().map(|path| signing::public_key(path)).collect::<Result<_>>()?;
    let place = app.place(&reference)?;
    let digest = place.resolve(&reference).await?;
    // Its bytes are compared with the digest on the way.
    place.manifest(&digest).await?;
    let found = evidence::find(&*place, &Subject::asked(digest, &reference), &keys).await?;
    let judged = judge(&found, &keys);
    let value = json!({
        "ok": judged.is_ok(), "reference": reference.to_string(), "digest": digest,
        "keys": keys.iter().map(PublicKey::id).collect::<Vec<_>>(),
        "evidence": found.iter().map(as_json).collect::<Vec<_>>(),
        "failed": judged.as_ref().err().map(|refusal| json!({ "what": refusal.what, "message": refusal.message })),
    });
    app.output.result(&value, || draw(&reference, &digest, &found));
    match judged {
        Ok(()) => Ok(0),
        // With `--json` the answer says it.
        Err(_) if app.output.is_json() => Ok(Code::Refused.exit_status()),
        Err(refusal) => Err(Error::new(Code::Refused, format!("{reference} is not verified: {}", refusal.message)).next(refusal.next)),
    }
}

/// Reads an AMI's snapshots back.
async fn ami(app: &App, text: &str, arguments: &Verify) -> Result<u8> {
    if !arguments.keys.is_empty() {
        return Err(Error::new(Code::Usage, "an AMI has no signature; what is signed is the image that it was made of")
            .next("verify the image with --key, and the AMI without"));
    }
    let Target::Ami { region, ami } = text.parse()? else {
        return Err(Error::new(Code::Usage, format!("`{text}` names no AMI")).next("write ec2:AMI or ec2:REGION:AMI"));
    };
    let aws = ec2::connect().await?;
    let region = Region::new(&*aws.cloud, &aws.region(region)?, Pace::default())?;
    let (store, reports) = (app.store()?, app.output.reports());
    let expected = |digest: &Digest| ec2::disks(&store, digest);
    let maps = ec2::KnownMaps::new(&store, None);
    let verified = kiln_ec2::publish::verify::verify(&region, &ami, &expected, &maps, &reports).await?;
    let sound = !verified.disks.is_empty() && verified.disks.iter().all(VerifiedDisk::is_sound);
    let known = verified.digest.is_some_and(|digest| ec2::disks(&store, &digest).is_ok_and(|disks| disks.is_some()));
    let mut value = json!(verified);
    if let Some(object) = value.as_object_mut() {
        object.insert("ok".into(), json!(sound));
        object.insert("compared_with".into(), json!(if known { "image" } else { "tags" }));
    }
    app.output.result(&value, || {
        let what = verified.reference.clone().unwrap_or_else(|| "no image that it names".to_owned());
        let mut rows = vec![["SNAPSHOT", "BLOCKS READ", "DISK DIGEST", ""].map(String::from).to_vec()];
        rows.extend(verified.disks.iter().map(|disk| {
            let judged = match (disk.is_sound(), disk.after_end, &*disk.different) {
                (true, ..) => "as it should be".to_owned(),
                (_, Some(block), _) => format!("block {block}, after the disk's end, is not zeros"),
                (_, _, [first, ..]) => format!("differs, first in block {first}"),
                _ => "not what it should be".to_owned(),
            };
            vec![disk.snapshot.clone(), disk.blocks.to_string(), disk.disk_digest.to_string(), judged]
        }));
        let against = if known { "the image in the store" } else { "its tags: the image is not in the store" };
        format!("{} in {} is {what}, compared with {against}\n{}", verified.ami, verified.region, table(&rows))
    });
    match sound {
        true => Ok(0),
        false if app.output.is_json() => Ok(Code::DigestMismatch.exit_status()),
        false => Err(Error::new(Code::DigestMismatch, format!("{text} does not hold what it should"))
            .next("deregister it, and publish the image again")),
    }
}

/// Why an image is not what it should be.
struct Refusal {
    /// In one word: `tag`, `digest`, `key`, `payload`, … or `unsigned`.
    what: &'static str,
    message: String,
    next: &'static str,
}

/// Verified is what one of the keys has signed. Others may have attached what
/// they like; but what says that one of these very keys has signed it, and is
/// not as it was signed, has been tampered with.
fn judge(found: &[Examined], keys: &[PublicKey]) -> Result<(), Refusal> {
    let ids: Vec<Digest> = keys.iter().map(PublicKey::id).collect();
    let next = "do not use it; ask whoever published it";
    let tampered = |examined: &Examined, failure: &Failure| match failure {
        Failure::Payload => true,
        Failure::Digest { .. } => examined.signers.iter().any(|signer| ids.contains(signer)),
        _ => false,
    };
    for examined in found {
        if let Some(failure) = examined.failures.iter().find(|failure| tampered(examined, failure)) {
            return Err(Refusal { what: failure.name(), message: format!("{}: {failure}", examined.what), next });
        }
    }
    let signatures: Vec<&Examined> = found.iter().filter(|examined| matches!(examined.what, What::Signature(_))).collect();
    if signatures.iter().any(|signature| signature.is_signed_by(&ids)) {
        return Ok(());
    }
    // The one that came nearest: right but for the tag.
    let nearest = signatures.iter().max_by_key(|signature| signature.signers.len());
    Err(match nearest.and_then(|signature| signature.failures.first()) {
        Some(failure) => Refusal { what: failure.name(), message: format!("its signature does not count: {failure}"), next },
        None => Refusal { what: "unsigned", message: "nobody has signed it".to_owned(), next: "`kiln sign` signs it" },
    })
}

fn as_json(examined: &Examined) -> serde_json::Value {
    let failures: Vec<_> = examined.failures.iter().map(|why| json!({ "what": why.name(), "message": why.to_string() })).collect();
    json!({
        "digest": examined.digest, "kind": examined.what.name(), "what": examined.what.to_string(), "name": examined.name,
        "signed": examined.signed, "signers": examined.signers, "ok": examined.is_sound(), "failures": failures,
    })
}

fn draw(reference: &Reference, digest: &Digest, found: &[Examined]) -> String {
    let mut text = format!("{reference} is {digest}\n");
    if found.is_empty() {
        return text + "nothing is attached to it\n";
    }
    let mut rows = vec![["EVIDENCE", "CHECKED", "SAYS"].map(String::from).to_vec()];
    rows.extend(found.iter().map(|examined| {
        let checked = match (examined.failures.first(), examined.signers.first()) {
            (Some(failure), _) => format!("does not count: {failure}"),
            (None, Some(signer)) => format!("signed by sha256:{}…", signer.short()),
            (None, None) => "not signed".to_owned(),
        };
        vec![examined.what.to_string(), checked, says(examined)]
    }));
    text.push('\n');
    text + &table(&rows)
}

/// What a piece of evidence says, in a few words.
fn says(examined: &Examined) -> String {
    match &examined.what {
        What::Provenance(provenance) => {
            let mut parts = Vec::new();
            parts.extend(provenance.repository.clone());
            parts.extend(provenance.commit.as_ref().map(|commit| format!("commit {}", commit.get(..12).unwrap_or(commit))));
            if provenance.commit.is_some() && provenance.dirty {
                parts.push("with changes".to_owned());
            }
            parts.extend(provenance.invocation.as_ref().map(|bake| format!("bake {bake}")));
            parts.join(", ")
        }
        _ => examined.name.clone().unwrap_or_default(),
    }
}

fn store(app: &App) -> Result<u8> {
    let reports = app.output.reports();
    let found = app.store()?.verify(&mut |done, total| reports.progress("verify", done, Some(total)))?;
    let damaged: Vec<_> =
        found.damaged.iter().map(|damage| json!({ "blob": damage.blob, "what": damage.error.chain(), "images": damage.images })).collect();
    for damage in &found.damaged {
        let images = if damage.images.is_empty() { "no image".to_owned() } else { damage.images.join(", ") };
        let error = Error::new(Code::Corrupt, format!("blob {}: {}", damage.blob, damage.error.chain()));
        show_error(&error.detail(format!("needed by {images}")).next("bake or import those images again"));
    }
    let value = json!({ "ok": damaged.is_empty(), "blobs": found.blobs, "bytes": found.bytes, "blocks": found.blocks, "damaged": damaged });
    app.output.result(&value, || {
        format!(
            "{} blobs ({}) and {} blocks read: {}",
            found.blobs,
            bytes(found.bytes),
            found.blocks,
            match damaged.len() {
                0 => "all sound".to_owned(),
                n => format!("{n} damaged"),
            }
        )
    });
    Ok(if damaged.is_empty() { 0 } else { Code::Corrupt.exit_status() })
}
