//! `kiln plan`: what a bake would do, step by step, and why. Starts nothing.

use std::time::{Duration, SystemTime};

use kiln_bake::explain::{Estimate, Explanation, Line, Origin, explain, span};
use kiln_bake::plan::Plan;
use kiln_bake::resume::{self, Earlier, decide};
use kiln_bake::template::Template;
use kiln_cache::ResultFiles;
use kiln_model::history::Record;
use kiln_model::image::Config;
use kiln_model::trial::Results as _;
use kiln_model::{Code, Digest, Key, Result};
use kiln_store::Store;

use super::App;
use super::validate::load_or_explain;
use crate::cli::{self, Anew};
use crate::output::{seconds, table};
use crate::registry::Registry;
use crate::signing;

pub(super) fn run(app: &App, arguments: &cli::Plan) -> Result<u8> {
    let registry = Registry::new(&app.home, &crate::site::load()?.bases);
    let template = load_or_explain(&arguments.template.template, &arguments.template.variables, &registry)?;
    let options = again(&arguments.anew, &template)?;
    // Which disk a base got anew will have is not known before.
    let base = if options.fresh { None } else { template.base.known()? };
    let plan = Plan::new(&template, base)?;
    let (store, cache, records) = (app.store()?, app.checkpoints()?, app.history()?.records(&template.name)?);
    let cache = cache.trusting(signing::trusted(&template.trusted)?.1);
    let results = ResultFiles::new(&app.home);
    let passed = |disk: &Digest, test: &Key| results.passed(disk, test).map(|tested| tested.is_some());
    let image = |record: &Record| config(&store, record);
    let earlier = Earlier { cache: &cache, records: &records, image: &image, passed: &passed, now: SystemTime::now() };
    let decision = decide(&template, &plan, &options, &earlier)?;
    let explanation = explain(&template, &plan, &options, &earlier, &decision)?;
    app.output.result(&explanation, || draw(&explanation));
    Ok(0)
}

/// What the command line wants done anew; a step that it names must be there.
pub(super) fn again(anew: &Anew, template: &Template) -> Result<resume::Options> {
    let options = resume::Options { no_cache: anew.no_cache, fresh: anew.fresh, from: anew.from.clone(), ..resume::Options::default() };
    options.first(template).map(|_| options)
}

/// The config of a record's image, if the store has it whole.
pub(super) fn config(store: &Store, record: &Record) -> Result<Option<Config>> {
    match store.image(&record.image) {
        Ok(image) => Ok(Some(image.config)),
        Err(error) if matches!(error.kind(), Code::NotFound | Code::Corrupt) => Ok(None),
        Err(error) => Err(error),
    }
}

fn draw(explanation: &Explanation) -> String {
    let Explanation { name, version, base, start, steps, seal, tests, image, estimate } = explanation;
    let digest = base.digest.map_or_else(|| "which is fetched first".to_owned(), |digest| format!("sha256:{}", digest.short()));
    let mut rows = vec![["", "STEP", "KIND", "BAKE", "TIME", "WHY"].map(String::from).to_vec()];
    for (number, step) in steps.iter().enumerate() {
        rows.push(row((number + 1).to_string(), &step.name, step.kind, &step.line));
    }
    rows.push(row(String::new(), "seal", "", seal));
    rows.extend(tests.iter().map(|tests| row(String::new(), "tests", "", tests)));
    let kept = start.age_seconds.map(|age| format!(", kept {} ago", span(Duration::from_secs(age)))).unwrap_or_default();
    let from = match start.from {
        Origin::Image if image.is_some() && tests.as_ref().is_none_or(|tests| tests.cached) => "nothing has changed".to_owned(),
        Origin::Image => "no step runs".to_owned(),
        Origin::Checkpoint => format!("goes on after step {}{kept}", start.done),
        Origin::BootedBase => format!("starts on the booted base{kept}"),
        Origin::Base => "boots the base".to_owned(),
    };
    let result = image.map(|image| format!("; the image is {image}")).unwrap_or_default();
    format!("{name}:{version} on {}, {digest}\n\n{}\n{from}{}{result}\n", base.label, table(&rows), total(*estimate))
}

fn row(number: String, name: &str, kind: &str, line: &Line) -> Vec<String> {
    let age = line.age_seconds.map(|age| format!(", {} old", span(Duration::from_secs(age)))).unwrap_or_default();
    let what = if line.cached { format!("cached{age}") } else { "run".to_owned() };
    let time = match line.estimate_seconds {
        _ if line.cached => String::new(),
        Some(estimate) => seconds(estimate),
        None => "?".to_owned(),
    };
    let why = line.reason.as_ref().map(ToString::to_string).unwrap_or_default();
    vec![number, name.to_owned(), kind.to_owned(), what, time, why]
}

fn total(Estimate { seconds: known, complete }: Estimate) -> String {
    match (known > 0.0, complete) {
        (true, true) => format!("; takes about {}", seconds(known)),
        (true, false) => format!("; takes {} at least, and not everything was timed before", seconds(known)),
        (false, true) => String::new(),
        (false, false) => "; nothing of it was timed before".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use kiln_bake::explain::{BaseLine, Cause, Changes, Reason, Since, Start, StepLine};

    use super::*;

    fn line(cached: bool, seconds: f64, cause: Option<Cause>) -> Line {
        let since = Since { bake: "01JD6YH2V0M5SXN1T4F5Z1Y0QG".into(), ago: Duration::from_secs(120) };
        let since = matches!(cause, Some(Cause::Parts(_))).then_some(since);
        Line {
            key: None,
            cached,
            age_seconds: cached.then_some(6 * 86_400),
            estimate_seconds: Some(seconds),
            reason: cause.map(|cause| Reason { causes: vec![cause], since }),
        }
    }

    fn explanation() -> Explanation {
        let step = |name: &str, kind, line| StepLine { name: name.into(), kind, line };
        let changed = Changes { changed: vec!["site/index.html".into()], ..Changes::default() };
        Explanation {
            name: "web".into(),
            version: "1.5.0".into(),
            base: BaseLine { label: "debian bookworm".into(), digest: Some(Digest::of("base")) },
            start: Start { key: None, from: Origin::Checkpoint, done: 1, age_seconds: Some(6 * 86_400), estimate_seconds: Some(1.0) },
            steps: vec![
                step("packages", "shell", line(true, 0.0, None)),
                step("site", "file", line(false, 0.4, Some(Cause::Parts(changed)))),
                step("license", "shell", line(false, 3.1, Some(Cause::After { step: 2 }))),
            ],
            seal: line(false, 4.2, Some(Cause::After { step: 2 })),
            tests: Some(line(false, 22.0, Some(Cause::AfterSeal))),
            image: None,
            estimate: Estimate { seconds: 30.7, complete: true },
        }
    }

    #[test]
    fn a_plan_for_people() {
        // As docs/template.md shows it.
        let expected = "\
web:1.5.0 on debian bookworm, sha256:cae662172fd4

   STEP      KIND   BAKE             TIME   WHY
1  packages  shell  cached, 6 d old
2  site      file   run              0.4 s  `site/index.html` changed since bake 01JD6YH2V0M5SXN1T4F5Z1Y0QG (2 min ago)
3  license   shell  run              3.1 s  after step 2, which runs
   seal             run              4.2 s  after step 2, which runs
   tests            run              22 s   after the seal, which runs

goes on after step 1, kept 6 d ago; takes about 31 s
";
        assert_eq!(draw(&explanation()), expected);
    }

    #[test]
    fn the_end_of_it() {
        let last = |change: &dyn Fn(&mut Explanation)| {
            let mut explanation = explanation();
            change(&mut explanation);
            draw(&explanation).lines().last().map(str::to_owned).unwrap_or_default()
        };
        let part = |e: &mut Explanation| e.estimate.complete = false;
        assert!(last(&part).ends_with("; takes 31 s at least, and not everything was timed before"));
        let nothing = |e: &mut Explanation| e.estimate = Estimate { seconds: 0.0, complete: false };
        assert!(last(&nothing).ends_with("; nothing of it was timed before"));
        let there = |e: &mut Explanation| {
            (e.start.from, e.image, e.estimate.seconds, e.tests) = (Origin::Image, Some(Digest::of("image")), 0.0, None);
        };
        assert_eq!(last(&there), format!("nothing has changed; the image is {}", Digest::of("image")));
        let booted = |e: &mut Explanation| e.start.from = Origin::BootedBase;
        assert!(last(&booted).starts_with("starts on the booted base, kept 6 d ago; "));
        assert!(last(&|e| (e.start.from, e.start.age_seconds) = (Origin::Base, None)).starts_with("boots the base; "));
    }
}
