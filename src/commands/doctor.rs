//! `kiln doctor`: what is missing on this machine, and how to install it.

use kiln_model::{Code, Result};
use serde_json::json;

use super::App;
use crate::output::table;

pub(super) async fn run(app: &App) -> Result<u8> {
    let checks = kiln_qemu::doctor().await;
    let good = checks.iter().all(|check| check.ok);
    let value = json!({
        "ok": good, "home": app.home.root(),
        "checks": checks.iter().map(|check| json!({ "name": check.name, "ok": check.ok, "found": check.found, "fix": check.fix })).collect::<Vec<_>>(),
    });
    app.output.result(&value, || {
        let row = |check: &kiln_qemu::Check| {
            let mark = if check.ok { "ok" } else { "MISSING" };
            let fix = check.fix.as_deref().filter(|_| !check.ok).map(|fix| format!("fix: {fix}")).unwrap_or_default();
            vec![mark.to_owned(), check.name.to_owned(), check.found.clone(), fix]
        };
        let mut rows = vec![vec!["ok".to_owned(), "KILN_HOME".to_owned(), app.home.root().display().to_string()]];
        rows.extend(checks.iter().map(row));
        table(&rows)
    });
    Ok(if good { 0 } else { Code::Missing.exit_status() })
}
