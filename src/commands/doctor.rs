//! `kiln doctor`: what is missing on this machine, and how to install it; and
//! what a repository of a registry guarantees, as far as trying tells.

use kiln_model::reference::Reference;
use kiln_model::{Code, Error, Result};
use kiln_qemu::doctor::{Check, checks};
use serde_json::json;

use super::App;
use crate::cli::Doctor;
use crate::output::table;
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Doctor) -> Result<u8> {
    if let Some(repository) = &arguments.repository {
        return registry(app, repository).await;
    }
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

/// What a repository guarantees to channels.
async fn registry(app: &App, repository: &str) -> Result<u8> {
    let reference: Reference = repository.parse()?;
    if reference.registry.is_none() {
        let what = format!("`{repository}` is in the store, where channels are exact");
        return Err(Error::new(Code::Usage, what).next("write HOST/NAMESPACE/NAME for a repository of a registry"));
    }
    let place = app.remote(&reference)?;
    let enforced = place.tags_never_move().await?;
    let (found, guarantee) = if enforced {
        ("tags of the form kiln.… do not move", "a promotion that loses a race is refused by the registry")
    } else {
        (
            "tags of the form kiln.… can be overwritten",
            "promotions at the same time agree beforehand; one that is held up meanwhile may lose after all, which `kiln history` tells",
        )
    };
    let value = json!({ "repository": repository, "tags_enforced": enforced, "guarantee": guarantee });
    app.output.result(&value, || {
        let advice =
            if enforced { "" } else { "\n  better     let the registry forbid tags that match kiln.** to move (docs/channels.md)" };
        format!("{repository}\n  tags       {found} (tried just now, with these credentials)\n  channels   {guarantee}{advice}")
    });
    Ok(0)
}

fn row(check: &Check) -> Vec<String> {
    let mark = match (check.ok, check.needed) {
        (true, _) => "ok",
        (false, true) => "MISSING",
        (false, false) => "-",
    };
    vec![mark.to_owned(), check.name.clone(), check.found.clone()]
}
