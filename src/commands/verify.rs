//! `kiln verify`: every blob and block read again.

use kiln_model::{Code, Error, Result};
use serde_json::json;

use super::App;
use crate::output::{bytes, show_error};

pub(super) fn run(app: &App) -> Result<u8> {
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
