//! `kiln save`: images as an OCI archive.

use kiln_model::reference::Reference;
use kiln_model::{Code, Error, Result, ResultExt as _};
use serde_json::json;

use super::App;
use crate::cli::Save;
use crate::output::bytes;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Save) -> Result<u8> {
    let images = arguments.references.iter().map(|text| text.parse::<Reference>()).collect::<Result<Vec<_>>>()?;
    if let Some(remote) = images.iter().find(|image| image.registry.is_some()) {
        return Err(
            Error::new(Code::Usage, format!("{remote} is at a registry, not in the store")).next(format!("`kiln pull {remote}` first"))
        );
    }
    let store = app.store()?;
    let saved = with_context(&app.home, &app.output.reports(), |context| {
        let (file, force) = (arguments.output.clone(), arguments.force);
        async move {
            let save = move || kiln_store::transfer::save_to(&store, &images, &file, force, &context.reports);
            tokio::task::spawn_blocking(save).await.trying(|| "write the archive".into())?
        }
    })
    .await?;
    let mut value = json!(saved);
    if let Some(object) = value.as_object_mut() {
        object.insert("file".into(), json!(arguments.output));
    }
    app.output.result(&value, || {
        let images = saved.digests.len();
        format!("wrote {} ({images} image{}, {})", arguments.output.display(), if images == 1 { "" } else { "s" }, bytes(saved.bytes))
    });
    Ok(0)
}
