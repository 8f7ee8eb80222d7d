//! `kiln import`: an image of a disk file.

use std::collections::BTreeMap;

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
        name: reference.name.clone(),
        version: version.clone(),
        architecture: host_architecture().to_owned(),
        firmware: Firmware::BiosUefi,
        credentials: false,
        disks: Vec::new(),
        base: None,
        steps: Vec::new(),
        commit: None,
        labels: arguments.labels.iter().cloned().collect(),
    };
    let store = app.store()?;
    let (named, record) = with_context(&app.home, &app.output.reports(), |context| {
        let config = &config;
        async move {
            let disk = kiln_disk::qemu_img::probe(&arguments.file).await?;
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
