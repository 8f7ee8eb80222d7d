//! `kiln load`: the images of an OCI archive into the store.

use std::fs::File;

use kiln_model::{Code, Error, Result, ResultExt as _};

use super::App;
use crate::cli::Load;
use crate::output::bytes;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Load) -> Result<u8> {
    let path = arguments.file.clone();
    let mut file = File::open(&path).map_err(|error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Failed };
        Error::new(code, format!("cannot open {}", path.display())).because(error)
    })?;
    let size = file.metadata().trying(|| format!("read {}", path.display()))?.len();
    let store = app.store()?;
    let loaded = with_context(&app.home, &app.output.reports(), |context| async move {
        let reports = context.reports.clone();
        let load = move || kiln_store::transfer::load(&store, &mut file, size, &reports);
        let loaded =
            tokio::task::spawn_blocking(load).await.trying(|| "load the archive".into())?.trying(|| format!("load {}", path.display()))?;
        loaded.moved.iter().for_each(|moved| context.reports.note(moved.to_string()));
        Ok(loaded)
    })
    .await?;
    app.output.result(&loaded, || {
        let line = |image: &kiln_store::transfer::LoadedImage| {
            let name = image.names.first().map_or_else(|| image.digest.to_string(), Clone::clone);
            format!("{name} is {}\n", image.digest)
        };
        let images: String = loaded.images.iter().map(line).collect();
        format!("{images}{} stored, {} were there", bytes(loaded.bytes_stored), bytes(loaded.bytes_skipped))
    });
    Ok(0)
}
