//! `kiln reap`: removes what killed bakes have left behind. On this machine by
//! their ledgers; with `--ec2`, also by the tags of what is in a region, whose
//! ledgers may be on machines that are gone.

use kiln_ec2::api::retry::Pace;
use kiln_ec2::bake::{Leftovers, Reaped, reap_region};
use kiln_ec2::publish::check_region;
use kiln_model::ledger;
use kiln_model::settings::parse_duration;
use kiln_model::{Code, Error, Result};

use super::App;
use crate::cli::Reap;
use crate::output::table;
use crate::{ec2_bake, session};

pub(super) async fn run(app: &App, arguments: &Reap) -> Result<u8> {
    let older_than = parse_duration(&arguments.older_than).ok_or_else(|| {
        Error::new(Code::Usage, format!("`--older-than {}` is not a length of time", arguments.older_than)).next("such as 90m or 6h")
    })?;
    if let Some(region) = &arguments.ec2 {
        check_region(region)?;
    }
    let removed = if arguments.dry_run { 0 } else { session::reap(&app.home, &app.output.reports()).await? };
    let Some(region) = &arguments.ec2 else {
        app.output.result(&serde_json::json!({ "removed": removed }), || match removed {
            0 => "nothing was left behind".to_owned(),
            n => format!("removed {n}"),
        });
        return Ok(0);
    };
    let which =
        Leftovers { bake: arguments.bake.clone(), older_than, running: ledger::running(&app.home.ledger())?, dry_run: arguments.dry_run };
    let reaped = reap_region(&ec2_bake::cloud().await?, Pace::default(), region, &which).await?;
    let value = serde_json::json!({ "removed": removed, "region": region, "dry_run": arguments.dry_run, "bakes": reaped });
    app.output.result(&value, || draw(region, &reaped, arguments.dry_run));
    Ok(0)
}

fn draw(region: &str, reaped: &[Reaped], dry_run: bool) -> String {
    if reaped.is_empty() {
        return format!("nothing was left behind in {region}");
    }
    let mut rows = vec![["BAKE", "WHAT", "IDS", ""].map(String::from).to_vec()];
    for Reaped { bake, left, spared } in reaped {
        let done = match spared {
            Some(why) => format!("left alone: {why}"),
            None if dry_run => "would be removed".to_owned(),
            None => "removed".to_owned(),
        };
        for (kind, ids) in left {
            rows.push(vec![bake.clone(), kind.clone(), ids.join(", "), done.clone()]);
        }
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_was_found_is_told() {
        assert_eq!(draw("eu-central-1", &[], false), "nothing was left behind in eu-central-1");
        let left = BTreeMap::from([("instance".to_owned(), vec!["i-1".to_owned(), "i-2".to_owned()])]);
        let one = Reaped { bake: "01J".into(), left: left.clone(), spared: None };
        let two = Reaped { bake: "01K".into(), left, spared: Some("it is running on this machine".into()) };
        let text = draw("eu-central-1", &[one.clone(), two], false);
        assert!(text.contains("i-1, i-2") && text.contains("removed") && text.contains("left alone: it is running"), "{text}");
        assert!(draw("eu-central-1", &[one], true).contains("would be removed"));
    }
}
