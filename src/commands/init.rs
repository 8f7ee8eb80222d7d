//! `kiln init`: writes a commented template that bakes as it stands.

use kiln_bake::template::{FILE_NAME, INIT_TEMPLATE};
use kiln_model::{Result, ResultExt as _};

use super::{App, would_overwrite};
use crate::cli::Init;

pub(super) fn run(app: &App, arguments: &Init) -> Result<u8> {
    let path = arguments.folder.join(FILE_NAME);
    if path.exists() && !arguments.force {
        return Err(would_overwrite(&path));
    }
    std::fs::create_dir_all(&arguments.folder).trying(|| format!("make the folder {}", arguments.folder.display()))?;
    std::fs::write(&path, INIT_TEMPLATE).trying(|| format!("write {}", path.display()))?;
    let bake =
        if arguments.folder.as_os_str() == "." { "kiln bake".to_owned() } else { format!("kiln bake {}", arguments.folder.display()) };
    app.output.result(&serde_json::json!({ "template": path }), || format!("wrote {}; bake it with `{bake}`", path.display()));
    Ok(0)
}
