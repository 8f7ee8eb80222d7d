//! `kiln reap`: removes what killed bakes have left behind.

use kiln_model::Result;

use super::App;
use crate::session;

pub(super) async fn run(app: &App) -> Result<u8> {
    let removed = session::reap(&app.home, &app.output.reports()).await?;
    app.output.result(&serde_json::json!({ "removed": removed }), || match removed {
        0 => "nothing was left behind".to_owned(),
        n => format!("removed {n}"),
    });
    Ok(0)
}
