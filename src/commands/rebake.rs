//! `kiln rebake`: bakes an image again from its provenance, and tells file by
//! file what comes out different, and of which step.
//!
//! The status is 0 when nothing differs but what differs after every bake
//! (caches, logs, records of package managers), and 3 when something does not
//! reproduce.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_bake::plan::Plan;
use kiln_bake::template::{Inputs, Template, load};
use kiln_bake::{Options, Stores, bake, resume};
use kiln_contents::diff::{Difference, diff};
use kiln_disk::files::Pool;
use kiln_evidence::provenance::{BUILD_TYPE, Provenance};
use kiln_evidence::{Examined, Failure, OtherFile, PublicKey, Subject, What};
use kiln_model::block::ImageSink;
use kiln_model::checkpoint::CheckpointCache;
use kiln_model::event::{Baked, Reports};
use kiln_model::history::History;
use kiln_model::machine::Context;
use kiln_model::reference::Reference;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_store::{Image, Publish, Store};

use super::diff::{side, some_files};
use super::sbom::{files, in_store};
use super::validate::{inputs, summary};
use super::{App, would_overwrite, write_result};
use crate::cli::Rebake;
use crate::output::{show_mistakes, show_warnings};
use crate::rebake::base::StoredBase;
use crate::rebake::origin::{Origins, Watched};
use crate::rebake::scratch::Scratch;
use crate::rebake::source::{self, Found};
use crate::rebake::{NoHistory, NothingKept, answer};
use crate::registry::Registry;
use crate::session::with_context;
use crate::{evidence, network, signing};

pub(super) async fn run(app: &App, arguments: &Rebake) -> Result<u8> {
    if let Some(path) = arguments.html.as_ref().filter(|path| path.exists() && !arguments.force) {
        return Err(would_overwrite(path));
    }
    let reference: Reference = arguments.reference.parse()?;
    let reports = app.output.reports();
    let store = Arc::new(app.store()?);
    let image = in_store(app, &store, &reference).await?;
    let keys: Vec<PublicKey> = arguments.keys.iter().map(|path| signing::public_key(path)).collect::<Result<_>>()?;
    let attached = evidence::find(&*app.place(&reference)?, &Subject::asked(image.digest, &reference), &keys).await?;
    let (examined, provenance) = choose(&attached, &reference, !keys.is_empty())?;
    if image.disk_digest().is_none() || provenance.base.is_none() {
        let what = format!("{reference} was baked at a cloud, and what is to be compared is a disk that the store has");
        return Err(Error::new(Code::Usage, what).next("bake it with the builder `qemu`"));
    }

    let work = Work { app, arguments, store: &store, image: &image, provenance, reports: &reports };
    let done = with_context(&app.home, &reports, |context| {
        let work = &work;
        async move { work.bake_again(context).await }
    })
    .await?;

    if let Some(path) = &arguments.html {
        write_result(path, kiln_contents::page(&answer::with_origins(&done)).as_bytes(), arguments.force)?;
        reports.note(format!("wrote {}", path.display()));
    }
    let status = if done.reproduces() { 0 } else { Code::Test.exit_status() };
    app.output.result(&answer::as_json(&done, examined), || answer::draw(&done, examined, &arguments.reference));
    Ok(status)
}

/// The provenance to go by: the newest that counts. With keys given that is one
/// that they have signed; without, whatever is not broken, since no key says
/// whom to believe.
fn choose<'a>(attached: &'a [Examined], reference: &Reference, with_keys: bool) -> Result<(&'a Examined, &'a Provenance)> {
    let mut why = None;
    for examined in attached.iter().rev() {
        let What::Provenance(provenance) = &examined.what else { continue };
        let broken = examined.failures.iter().find(|failure| with_keys || !matches!(failure, Failure::Key { .. }));
        match broken {
            Some(failure) => why = why.or_else(|| Some(failure.to_string())),
            None if with_keys && examined.signers.is_empty() => why = why.or_else(|| Some("nobody has signed it".to_owned())),
            None if provenance.build_type != BUILD_TYPE => {
                why = why.or_else(|| Some(format!("it is of another kind of build, {}", provenance.build_type)))
            }
            None => return Ok((examined, provenance)),
        }
    }
    Err(match why {
        Some(why) => Error::new(Code::Refused, format!("the provenance of {reference} does not count: {why}"))
            .next("name the key that signed it with --key; `kiln verify` shows what is attached"),
        None => Error::new(Code::NotFound, format!("{reference} has no provenance, which says how it was baked"))
            .next("an image that was imported has none; one that was baked gets it when the same bake runs again"),
    })
}

/// What an image is baked again of.
struct Work<'a> {
    app: &'a App,
    arguments: &'a Rebake,
    store: &'a Arc<Store>,
    image: &'a Image,
    provenance: &'a Provenance,
    reports: &'a Reports,
}

/// What came of it.
pub(crate) struct Done {
    pub(crate) difference: Difference,
    pub(crate) origins: Origins,
    pub(crate) source: Found,
    /// Files that are not what they were, and were allowed to be.
    pub(crate) others: Vec<OtherFile>,
    /// Disk digest of the base then, and now.
    pub(crate) bases: (Digest, Digest),
    /// Steps whose key is not what it was although the base is.
    pub(crate) other_keys: Vec<String>,
    pub(crate) baked: Baked,
    /// What it is kept as.
    pub(crate) kept: Option<(String, Digest)>,
}

impl Done {
    /// Whether the machine was started from the same disk.
    pub(crate) fn same_base(&self) -> bool {
        self.bases.0 == self.bases.1
    }

    /// Whether nothing differs but what differs after every bake.
    pub(crate) fn reproduces(&self) -> bool {
        let Difference { same_disk, packages, files, from, to, .. } = &self.difference;
        let read = from.distribution.is_some() || to.distribution.is_some() || !files.is_empty();
        let real = files.iter().any(|group| answer::matters(group.group));
        *same_disk || (read && packages.is_empty() && !real)
    }
}

impl Work<'_> {
    async fn bake_again(&self, context: Context) -> Result<Done> {
        let Self { app, arguments, store, image, provenance, reports } = self;
        let here = std::env::current_dir().trying(|| "find the current folder".into())?;
        let found = {
            let (provenance, given, work) = ((*provenance).clone(), arguments.template.clone(), context.work.clone());
            blocking("find the template", move || source::find(&provenance, given.as_deref(), &here, &work)).await?
        };
        reports.note(format!("the template is that of {}", found.describe()));
        let registry = Registry::new(&app.home, &crate::site::load()?.bases);
        let mut template = self.load(&found, &registry)?;
        for secret in template.secrets.values() {
            reports.redactor().add(secret);
        }
        let others = self.other_files(&template)?;
        // What is on the disk is to be what it was, also where a version is made
        // of something that has moved on.
        (template.name, template.version) = provenance.recipe.image.clone();
        template.commit.clone_from(&provenance.commit);
        template.tests.clear();

        let base = provenance.base.ok_or_else(|| Error::new(Code::Usage, "the provenance names no disk of a base"))?;
        self.choose_base(&mut template, base)?;
        if let Some(reference) = template.base.image() {
            network::refuse_revoked_base(store, reference, None, true, reports).await?;
        }
        let origins = Arc::new(Mutex::new(Origins::default()));
        watch(&mut template, &origins);

        let scratch = Arc::new(Scratch::new((*store).clone(), &context.work.join("store"), store.record(&image.digest)?)?);
        let sink: Arc<dyn ImageSink> = scratch.clone();
        let cache: Arc<dyn CheckpointCache> = Arc::new(app.checkpoints()?.trusting(signing::trusted(&template.trusted)?.1));
        let cache: Arc<dyn CheckpointCache> = if arguments.boot { Arc::new(NothingKept(cache)) } else { cache };
        let history: Arc<dyn History> = Arc::new(NoHistory);
        let options = Options {
            resume: resume::Options { no_cache: true, machine: true, ..resume::Options::default() },
            test: false,
            fetch: false,
            on_failure: kiln_bake::OnFailure::Clean,
            open_shell: &|_| Box::pin(async { Ok(()) }),
        };
        let stores = Stores { sink: &sink, cache: &cache, history: &history, image: &|_| Ok(None), witness: None, testing: None };
        let baked = bake(&template, &options, &stores, &context).await?;

        let again = scratch.store().image(&baked.digest)?;
        let now = again.config.base.unwrap_or(base);
        let other_keys = if now == base { self.other_keys(&baked) } else { Vec::new() };
        let difference = self.compare(&scratch, &again).await?;
        let kept = if arguments.keep { Some(self.keep(&scratch, &again).await?) } else { None };
        let origins = std::mem::take(&mut *origins.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Done { difference, origins, source: found, others, bases: (base, now), other_keys, baked, kept })
    }

    /// The template, with the values that its variables had.
    fn load(&self, found: &Found, registry: &Registry) -> Result<Template> {
        let recipe = &self.provenance.recipe;
        let mut inputs = inputs(&self.arguments.variables);
        let known = recipe.variables.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?)));
        // What is given now comes last, and counts.
        inputs.vars = known.chain(inputs.vars).collect();
        if !recipe.architecture.is_empty() {
            inputs.arch.clone_from(&recipe.architecture);
        }
        if inputs.builder.is_none() && !recipe.builder.is_empty() {
            inputs.builder = Some(recipe.builder.clone());
        }
        if let Some(started) = recipe.started {
            inputs.now = started.into();
        }
        let inputs: Inputs = inputs;
        match load(&found.template, &inputs, &registry.kinds()) {
            Ok(template) => {
                show_warnings(&template.sources, &template.warnings);
                Ok(template)
            }
            Err(mistakes) => {
                show_mistakes(&mistakes.sources, &mistakes.problems.0);
                let missing: Vec<&str> =
                    recipe.variables.iter().filter(|(_, value)| value.is_none()).map(|(name, _)| name.as_str()).collect();
                let error = summary(&mistakes);
                if missing.is_empty() {
                    return Err(error);
                }
                let next = format!(
                    "the provenance holds no value of {}: give it as it was given to the first bake, in the environment, a file or with --var",
                    missing.join(", ")
                );
                Err(Error::new(error.kind(), "the template is not what it was at the bake").because(error).next(next))
            }
        }
    }

    /// The files that are not what they were. Without leave that is an error.
    fn other_files(&self, template: &Template) -> Result<Vec<OtherFile>> {
        let plan = Plan::new(template, None)?;
        let clean = |text: &str| self.reports.redactor().clean(text);
        let others = self.provenance.recipe.others(&source::files(&template.files, &plan, &clean));
        let list = others.iter().map(source::words).collect::<Vec<_>>().join("\n");
        match (others.is_empty(), self.arguments.allow_changed) {
            (true, _) => {}
            (false, true) => self.reports.warn(format!("not what the image was baked from:\n{list}")),
            (false, false) => {
                let what = format!(
                    "{} of the files that the image was baked from {}",
                    count(others.len()),
                    if others.len() == 1 { "is not what it was" } else { "are not what they were" }
                );
                return Err(Error::new(Code::Usage, what)
                    .detail(list)
                    .next("name the folder as it was with --template, or bake with what is there: --allow-changed"));
            }
        }
        Ok(others)
    }

    /// Starts from the very disk that was started from then, where it is still
    /// there.
    fn choose_base(&self, template: &mut Template, was: Digest) -> Result<()> {
        // A name that leads nowhere any more is no reason to stop, as long as
        // the store has its disk.
        let known = template.base.known().ok().flatten();
        if known == Some(was) {
            return Ok(());
        }
        let label = template.base.label();
        if let Some(stored) = StoredBase::find(&self.app.home, self.store, &was, &label)? {
            self.reports.note(format!("{label} is another disk by now; the one of then is still in the store, and is used"));
            template.base = Box::new(stored);
        } else {
            self.reports.warn(format!("the base {label} is not the disk that the image was baked from (sha256:{}…), which is not here any more: what differs between the two is told as the base's", was.short()));
        }
        Ok(())
    }

    /// Steps of which something else than a file or the base has changed.
    fn other_keys(&self, baked: &Baked) -> Vec<String> {
        let was: BTreeMap<&str, _> = self.provenance.recipe.steps.iter().map(|step| (step.name.as_str(), step.key)).collect();
        let other = |step: &&kiln_model::event::StepReport| was.get(step.name.as_str()).copied().flatten() != Some(step.key);
        baked.steps.iter().filter(other).map(|step| step.name.clone()).collect()
    }

    async fn compare(&self, scratch: &Arc<Scratch>, again: &Image) -> Result<Difference> {
        let (store, scratch, first, again) = ((*self.store).clone(), scratch.clone(), self.image.clone(), again.clone());
        let reference = self.arguments.reference.clone();
        blocking("compare the two images", move || {
            let (listing, pool) = (store.images(true)?, Pool::default());
            let (old, new) = (files(&store, &first.digest, &pool)?, files(scratch.store(), &again.digest, &pool)?);
            let a = side(&store, &listing, &first, &reference)?;
            let b = side(scratch.store(), &listing, &again, &format!("{reference} baked again"))?;
            diff((&a, some_files(old.as_ref())), (&b, some_files(new.as_ref())))
        })
        .await
    }

    /// Keeps the image that was baked again, under a name that nobody uses.
    async fn keep(&self, scratch: &Arc<Scratch>, again: &Image) -> Result<(String, Digest)> {
        let (store, scratch, again) = ((*self.store).clone(), scratch.clone(), again.clone());
        let (first, base) = (store.record(&self.image.digest)?, again.config.base);
        blocking("keep the image", move || {
            let record = scratch.store().record(&again.digest)?;
            let mut source = scratch.store().disk_source(&record)?;
            let mut parents = vec![first];
            parents.extend(base.map(|base| store.base(&base)).transpose()?.flatten());
            let record = store.write_disk(&record.name, &mut *source, None, &parents, &mut |_, _| ())?;
            let mut config = again.config.clone();
            config.name = format!("rebake/{}", config.name);
            let annotations = &again.manifest.annotations;
            let named = store.publish_as(&Publish { config: &config, disks: &[record], annotations, tags: &[] })?;
            Ok((format!("{}:{}", config.name, config.version), named.digest))
        })
        .await
    }
}

/// Makes every step tell what it touches; no machine after one is kept.
fn watch(template: &mut Template, origins: &Arc<Mutex<Origins>>) {
    let steps = std::mem::take(&mut template.steps);
    template.steps = steps
        .into_iter()
        .map(|mut step| {
            step.checkpoint = false;
            step.provisioner = Box::new(Watched { inner: step.provisioner, origins: origins.clone() });
            step
        })
        .collect();
}

fn count(n: usize) -> String {
    if n == 1 { "one".into() } else { n.to_string() }
}

/// Runs what would block for long beside what hears Ctrl-C.
async fn blocking<T: Send + 'static>(what: &str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.trying(|| what.to_owned())?
}

#[cfg(test)]
mod tests {
    use kiln_evidence::attachment::{self, Attachment};
    use kiln_evidence::statement::{PROVENANCE, Statement};
    use kiln_evidence::{Found, PrivateKey, examine};
    use serde_json::json;

    use super::*;

    fn attached(attachments: Vec<Attachment>, keys: &[PublicKey]) -> Vec<Examined> {
        let found: Vec<Found> = attachments.into_iter().map(|attachment| Found { digest: Digest::of("x"), attachment }).collect();
        examine(&Subject::new(Digest::of("image")), &found, keys)
    }

    fn of_kind(build_type: &str, image: &str, key: Option<&PrivateKey>) -> Attachment {
        let predicate = json!({ "buildDefinition": { "buildType": build_type } });
        attachment::statement(&Statement::new(&Digest::of(image), None, PROVENANCE, predicate), key).unwrap()
    }

    #[test]
    fn provenance_has_to_be_sound_and_signed_where_a_key_is_named() {
        let (ours, theirs) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let reference: Reference = "web:1".parse().unwrap();
        let keys = [ours.public().clone()];
        let both = || vec![of_kind(BUILD_TYPE, "image", Some(&ours)), of_kind(BUILD_TYPE, "image", Some(&theirs))];
        // Without a key the newest, whoever signed it.
        let all = attached(both(), &[]);
        assert_eq!(choose(&all, &reference, false).unwrap().0.digest, all[1].digest);
        // With one, that one's.
        let all = attached(both(), &keys);
        assert_eq!(choose(&all, &reference, true).unwrap().0.signers, [ours.id()]);

        let refused = |attachments: Vec<Attachment>, with_keys: bool| {
            let all = attached(attachments, if with_keys { &keys } else { &[] });
            let error = choose(&all, &reference, with_keys).unwrap_err();
            (error.kind(), error.to_string())
        };
        assert_eq!(refused(vec![], false).0, Code::NotFound);
        assert!(refused(vec![of_kind(BUILD_TYPE, "image", None)], true).1.contains("nobody has signed it"));
        assert_eq!(refused(vec![of_kind(BUILD_TYPE, "image", Some(&theirs))], true).0, Code::Refused);
        assert_eq!(refused(vec![of_kind(BUILD_TYPE, "another image", None)], false).0, Code::Refused);
        assert!(refused(vec![of_kind("https://example.org/other", "image", None)], false).1.contains("another kind of build"));
    }
}
