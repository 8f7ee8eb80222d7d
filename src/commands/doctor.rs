//! `kiln doctor`: what is missing on this machine, and how to install it.

use kiln_model::{Code, Result};
use kiln_qemu::doctor::{Check, checks};
use serde_json::json;

use super::App;
use crate::output::table;
use crate::session::with_context;

pub(super) async fn run(app: &App) -> Result<u8> {
    let settings = kiln_qemu::Settings::default();
    let found = with_context(&app.home, &app.output.reports(), |context| async move { checks(&settings, &context).await }).await?;
    let good = found.iter().all(|check| check.ok || !check.needed);
    let list: Vec<_> = found
        .iter()
        .map(|check| json!({ "name": check.name, "ok": check.ok, "needed": check.needed, "found": check.found, "fix": check.fix }))
        .collect();
    app.output.result(&json!({ "ok": good, "home": app.home.root(), "checks": list }), || {
        let home = vec!["ok".to_owned(), "KILN_HOME".to_owned(), app.home.root().display().to_string()];
        let rows: Vec<_> = std::iter::once(home).chain(found.iter().map(row)).collect();
        let fixes: Vec<_> =
            found.iter().filter(|check| !check.ok).filter_map(|check| Some(format!("{}: {}", check.name, check.fix.as_ref()?))).collect();
        let fixes = if fixes.is_empty() { String::new() } else { format!("\nto mend it\n  {}\n", fixes.join("\n  ")) };
        table(&rows) + &fixes
    });
    Ok(if good { 0 } else { Code::Missing.exit_status() })
}

fn row(check: &Check) -> Vec<String> {
    let mark = match (check.ok, check.needed) {
        (true, _) => "ok",
        (false, true) => "MISSING",
        (false, false) => "-",
    };
    vec![mark.to_owned(), check.name.clone(), check.found.clone()]
}
