//! `kiln import`: an image of a disk file.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use kiln_disk::qemu_img;
use kiln_model::base::{DiskFile, DiskFormat};
use kiln_model::image::{Config, Firmware, host_architecture};
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Error, Result};

use super::App;
use crate::cli::Import;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Import) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let (None, Pointer::Tag(Some(version))) = (&reference.registry, &reference.pointer) else {
        return Err(Error::new(Code::Usage, format!("`{reference}` names no version")).next("write NAME:VERSION"));
    };
    let config = Config {
        labels: arguments.labels.iter().cloned().collect(),
        ..Config::new(reference.name.clone(), version.clone(), host_architecture(), Firmware::BiosUefi)
    };
    let store = app.store()?;
    let (named, record) = with_context(&app.home, &app.output.reports(), |context| {
        let config = &config;
        async move {
            let disk = recognised(&arguments.file, arguments.format.as_deref()).await?;
            let (config, reports) = (config.clone(), context.reports.clone());
            let import =
                move || store.import(&disk, &config, &BTreeMap::new(), &mut |done, total| reports.progress("import", done, Some(total)));
            tokio::task::spawn_blocking(import).await.map_err(|error| Error::new(Code::Failed, "cannot import the disk").because(error))?
        }
    })
    .await?;
    let reports = app.output.reports();
    for moved in &named.moved {
        reports.note(moved.to_string());
    }
    let value = serde_json::json!({ "digest": named.digest, "disk_digest": record.digest, "tag": reference.to_string() });
    app.output.result(&value, || format!("{reference} is {}", named.digest));
    Ok(0)
}

/// The disk in a file. A raw one whose content looks like nothing (a volume of
/// LVM, plain data) is taken when it is said to be one, or is named like one.
async fn recognised(path: &Path, format: Option<&str>) -> Result<DiskFile> {
    if format == Some("raw") {
        return qemu_img::probe_raw(path).await;
    }
    let unknown = File::open(path).and_then(|file| Ok(qemu_img::recognise(&file, file.metadata()?.len())));
    if format.is_none() && matches!(unknown, Ok(Err(why)) if why.unknown) {
        if path.extension().is_some_and(|extension| extension == "raw" || extension == "img") {
            return qemu_img::probe_raw(path).await;
        }
        let next = "give a qcow2, or a raw disk; --format raw takes any file as one";
        return Err(Error::new(Code::Base, format!("{} is not a disk", path.display())).next(next));
    }
    let disk = qemu_img::probe(path).await?;
    if format == Some("qcow2") && disk.format != DiskFormat::Qcow2 {
        return Err(Error::new(Code::Base, format!("{} is not a qcow2", path.display())));
    }
    Ok(disk)
}
