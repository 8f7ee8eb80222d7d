//! `kiln test`: a template's tests on an image that is there. Bakes nothing,
//! and changes neither the image nor its names.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_bake::plan::Plan;
use kiln_bake::template::{FILE_NAME, Template};
use kiln_bake::trial::{self, Testing, Tried};
use kiln_cache::ResultFiles;
use kiln_evidence::{PrivateKey, junit};
use kiln_model::history::Record;
use kiln_model::machine::Context;
use kiln_model::provision::Outcome;
use kiln_model::reference::Reference;
use kiln_model::trial::{Results, Trial};
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::{Place, Store};
use serde_json::{Value, json};

use super::plan::config;
use super::validate::load_or_explain;
use super::{App, write_result};
use crate::cli::Test;
use crate::evidence::attest_trial;
use crate::image_base::{self, unpacking};
use crate::network;
use crate::output::{seconds, table};
use crate::registry::Registry;
use crate::session::with_context;
use crate::signing;

pub(super) async fn run(app: &App, arguments: &Test) -> Result<u8> {
    let reports = app.output.reports();
    let registry = Registry::new(&app.home, &crate::site::load()?.bases);
    let (template, reference) = template(arguments, &registry)?;
    for secret in template.secrets.values() {
        reports.redactor().add(secret);
    }
    if template.tests.is_empty() {
        return Err(Error::new(Code::Usage, format!("{} has no tests", template.path.display()))
            .next("docs/tests.md describes them: [[test]] with `shell`, `assert` or `testinfra`"));
    }
    let key = signing::key_if_any(arguments.sign_key.as_deref(), &arguments.password, &reports)?;
    let asked = Asked { app, arguments, template: &template, reference: reference.as_ref(), key: key.as_ref() };
    let done = with_context(&app.home, &reports, |context| {
        let asked = &asked;
        async move { asked.test(&context).await }
    })
    .await?;
    let Done { image, trial, attached } = done;
    let title = format!("{}:{}", image.config.name, image.config.version);
    if let Some(path) = &arguments.junit {
        write_result(path, junit::document(&[(title.clone(), &trial)]).as_bytes(), true)?;
    }
    app.output.result(&as_json(&image, &trial, attached.as_ref()), || draw(&title, &image.image, &trial));
    if !trial.failed() {
        return Ok(0);
    }
    // With `--json` the answer says it.
    if app.output.is_json() {
        return Ok(Code::Test.exit_status());
    }
    let next = format!("it is marked as failed; `kiln run {}@{}` boots it", image.config.name, image.image);
    Err(trial::failure(&title, &trial, next))
}

/// The template, and the image when that was named: whatever is a file, or a
/// folder with a template in it, is a template.
fn template(arguments: &Test, registry: &Registry) -> Result<(Template, Option<Reference>)> {
    let path = Path::new(&arguments.subject);
    let load = |path: &Path| load_or_explain(path, &arguments.variables, registry);
    if path.is_file() || path.join(FILE_NAME).is_file() {
        if arguments.template.is_some() {
            return Err(Error::new(Code::Usage, format!("`{}` is a template, and --template names another one", arguments.subject))
                .next("name an image (NAME:TAG) to test it with the tests of --template"));
        }
        return Ok((load(path)?, None));
    }
    let reference: Reference = arguments.subject.parse().map_err(|error: Error| {
        let next = "name an image, a template, or the folder of a kiln.toml";
        Error::new(Code::Usage, format!("`{}` is neither a template nor an image", arguments.subject)).because(error).next(next)
    })?;
    let which = "name the template whose tests it is to pass: --template FILE";
    let path = match &arguments.template {
        Some(path) => path.clone(),
        None if Path::new(FILE_NAME).is_file() => PathBuf::from(FILE_NAME),
        None => return Err(Error::new(Code::Usage, format!("there is no {FILE_NAME} here with tests for {reference}")).next(which)),
    };
    let template = load(&path)?;
    if arguments.template.is_none()
        && template.name != reference.name.rsplit('/').next().unwrap_or_default()
        && template.name != reference.name
    {
        return Err(Error::new(Code::Usage, format!("the {FILE_NAME} here is of `{}`, not of {reference}", template.name)).next(which));
    }
    Ok((template, Some(reference)))
}

/// What is to be done.
struct Asked<'a> {
    app: &'a App,
    arguments: &'a Test,
    template: &'a Template,
    reference: Option<&'a Reference>,
    key: Option<&'a PrivateKey>,
}

/// What was done.
struct Done {
    image: Tried,
    trial: Trial,
    /// Digest of the result, if it is new.
    attached: Option<Digest>,
}

impl Asked<'_> {
    async fn test(&self, context: &Context) -> Result<Done> {
        let Self { app, arguments, template, reference, key } = self;
        let store = app.store()?;
        let image = match reference {
            Some(reference) => self.named(&store, reference, context).await?,
            None => self.made(&store)?,
        };
        // Until the result is attached `prune` must not take it away.
        store.protect(&image.image)?;
        let results: std::sync::Arc<dyn Results> = std::sync::Arc::new(ResultFiles::new(&app.home));
        let unpack = unpacking(&app.home, &store);
        let testing = Testing { results: &results, unpack: &unpack, told: &|_| {} };
        let trial = trial::test(template, &image, arguments.again, &testing, context).await?;
        let place: Box<dyn Place> = match reference {
            Some(reference) => app.place(reference)?,
            None => Box::new(store),
        };
        let title = format!("{}:{}", image.config.name, image.config.version);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let attached = attest_trial(&*place, &image.image, &title, (&trial, now), *key).await?;
        Ok(Done { image, trial, attached })
    }

    /// The image that a reference means; one at a registry comes into the store.
    async fn named(&self, store: &Store, reference: &Reference, context: &Context) -> Result<Tried> {
        let allow = self.arguments.allow_revoked;
        let digest = network::bring(&self.app.home, store, reference, Some(allow), &context.reports).await?;
        image_base::refuse_revoked(store, reference, &digest, allow, &context.reports).await?;
        let config = store.image(&digest)?.config;
        let disk = config.as_base().ok_or_else(|| Error::new(Code::Usage, format!("{reference} has no disk that could be tested")))?;
        Ok(Tried { image: digest, disk, config })
    }

    /// The image that a bake of the template has made of exactly this.
    fn made(&self, store: &Store) -> Result<Tried> {
        let template = self.template;
        let title = format!("{}:{}", template.name, template.version);
        let path = template.path.display();
        let never = |why: String| Error::new(Code::NotFound, why).next(format!("`kiln bake {path}` makes it, and tests it"));
        let Some(base) = template.base.known()? else {
            return Err(never(format!("{title} was never baked: its base was not fetched yet")));
        };
        let plan = Plan::new(template, Some(base))?;
        let same = |record: &&Record| Some(record.seal) == plan.seal;
        for record in self.app.history()?.records(&template.name)?.iter().rev().filter(same) {
            if let (Some(config), Some(disk)) = (config(store, record)?, record.tested_disk()) {
                return Ok(Tried { image: record.image, disk, config });
            }
        }
        Err(never(format!("no image of the store was made of {path} as it is now")))
    }
}

fn as_json(image: &Tried, trial: &Trial, attached: Option<&Digest>) -> Value {
    json!({
        "ok": !trial.failed(), "name": image.config.name, "version": image.config.version, "digest": image.image,
        "disk_digest": image.config.disks.iter().find(|disk| disk.root).map(|disk| disk.digest),
        "suite": trial.suite, "result": trial.verdict().name(), "tests": trial.tests, "seconds": trial.seconds, "attached": attached,
    })
}

fn draw(title: &str, image: &Digest, trial: &Trial) -> String {
    let mut rows = vec![["TEST", "CASE", "RESULT", "TIME", ""].map(String::from).to_vec()];
    for test in &trial.tests {
        for case in &test.cases {
            let (result, why) = match &case.outcome {
                Outcome::Passed => ("passed", String::new()),
                Outcome::Skipped(why) => ("skipped", first_line(why)),
                Outcome::Failed(why) => ("FAILED", first_line(why)),
            };
            let time = if test.cached { "cached".to_owned() } else { seconds(case.seconds) };
            rows.push(vec![test.name.clone(), case.name.clone(), result.to_owned(), time, why]);
        }
    }
    let count = |wanted: fn(&Outcome) -> bool| trial.names(wanted).len();
    let (passed, failed) = (count(|outcome| *outcome == Outcome::Passed), count(Outcome::failed));
    let skipped = match count(|outcome| matches!(outcome, Outcome::Skipped(_))) {
        0 => String::new(),
        skipped => format!(", {skipped} skipped"),
    };
    format!("{}\n{title} {image}: {passed} passed, {failed} failed{skipped} in {}\n", table(&rows), seconds(trial.seconds))
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
