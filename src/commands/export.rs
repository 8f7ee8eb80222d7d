//! `kiln export`: an image's disk as a file.

use kiln_disk::qemu_img::{Target, convert};
use kiln_model::base::{DiskFile, DiskFormat};
use kiln_model::reference::Reference;
use kiln_model::{Result, ResultExt as _};

use super::{App, would_overwrite};
use crate::cli::Export;
use crate::output::bytes;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Export) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let target: Target = arguments.format.parse()?;
    let output = std::path::absolute(&arguments.output).trying(|| format!("write {}", arguments.output.display()))?;
    if output.exists() && !arguments.force {
        return Err(would_overwrite(&arguments.output));
    }
    let store = app.store()?;
    let record = store.record(&store.resolve(&reference)?)?;
    let (disk_digest, size) = (record.digest, record.map.size);
    with_context(&app.home, &app.output.reports(), |context| {
        let output = &output;
        async move {
            // Under another name until it is whole, in the folder where it is to be.
            let part = output.with_file_name(format!(".{}.{}", output.file_name().unwrap_or_default().to_string_lossy(), context.bake));
            let ticket = context.scope.before_path(&part)?;
            let raw = if target == Target::Raw { part.clone() } else { context.work.join("disk.raw") };
            let (to, reports) = (raw.clone(), context.reports.clone());
            let written = tokio::task::spawn_blocking(move || {
                store.materialise(&record, &to, &mut |done, total| reports.progress("export", done, Some(total)))
            });
            written.await.trying(|| "write the disk".into())??;
            if target != Target::Raw {
                let source = DiskFile { path: raw, format: DiskFormat::Raw, size };
                convert(&context.scope, &source, target, &part, &mut |_| {}).await?;
            }
            std::fs::rename(&part, output).trying(|| format!("write {}", output.display()))?;
            context.scope.forget(ticket)
        }
    })
    .await?;
    let on_disk = std::fs::metadata(&output).map_or(0, |meta| std::os::unix::fs::MetadataExt::blocks(&meta) * 512);
    let value = serde_json::json!({ "file": output, "format": target.name(), "disk_digest": disk_digest, "bytes": on_disk });
    app.output.result(&value, || format!("wrote {} ({}, {} on disk)", arguments.output.display(), target.name(), bytes(on_disk)));
    Ok(0)
}
