//! `kiln bake`: from templates to images.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_bake::graph::{Graph, Limits, Node};
use kiln_bake::template::Template;
use kiln_bake::trial::Testing;
use kiln_bake::{Options, Stores, bake, resume};
use kiln_cache::{Checkpoints, ResultFiles};
use kiln_evidence::{PrivateKey, junit};
use kiln_model::account::Witness;
use kiln_model::block::ImageSink;
use kiln_model::checkpoint::CheckpointCache;
use kiln_model::event::{Baked, Event, Failure, Reports};
use kiln_model::guest::SshAccess;
use kiln_model::history::History;
use kiln_model::home::Home;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::trial::{Results, Trial};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_store::{Place as _, RemotePlace, Store};
use tokio::task::JoinSet;

use super::plan::{again, config};
use super::push::{as_json as push_as_json, destination, push as push_image, summary as push_summary};
use super::validate::load_or_explain;
use super::{App, write_result as write_file};
use crate::cli::{Bake, OnFailure};
use crate::evidence::Attester;
use crate::image_base::unpacking;
use crate::network;
use crate::output::{Events, print, seconds, show_error};
use crate::registry::Registry;
use crate::session::{Signals, reap, within};
use crate::shared_cache::{self, SharedCache};
use crate::signing;

pub(super) async fn run(app: &App, arguments: &Bake) -> Result<u8> {
    let events = app.output.events();
    let trials = Trials::default();
    let done = bake_all(app, arguments, &events, &trials).await;
    let Ended { images, errors } = done.unwrap_or_else(|error| Ended { images: Vec::new(), errors: vec![error] });
    if let Some(path) = &arguments.junit {
        let trials = trials.lock().unwrap_or_else(PoisonError::into_inner);
        let list: Vec<(String, &Trial)> = trials.iter().map(|(title, trial)| (title.clone(), trial)).collect();
        write_file(path, junit::document(&list).as_bytes(), true)?;
    }
    let event = Event::Done { v: 1, ok: errors.is_empty(), images: images.clone(), error: errors.first().map(Failure::from) };
    events.all().event(event.clone());
    if let Some(path) = &arguments.result {
        write_result(path, &event)?;
    }
    if !app.output.is_json() {
        images.iter().for_each(|image| print(&summary(image)));
    }
    let mut errors = errors.into_iter();
    let first = errors.next();
    errors.for_each(|error| show_error(&error));
    first.map_or(Ok(0), Err)
}

/// What tests found, with what each image is called.
type Trials = Arc<Mutex<Vec<(String, Trial)>>>;

/// What came of a call.
struct Ended {
    /// In the order of the templates.
    images: Vec<Baked>,
    /// As they came: the first one decides the exit status.
    errors: Vec<Error>,
}

/// What all bakes of a call share.
struct Kitchen {
    home: Home,
    store: Arc<Store>,
    sink: Arc<dyn ImageSink>,
    cache: Arc<Checkpoints>,
    /// Where checkpoints are taken from.
    cache_from: Option<RemotePlace>,
    /// Where they are left, and with whose signature.
    cache_to: Option<(RemotePlace, PrivateKey)>,
    history: Arc<dyn History>,
    witness: Arc<dyn Witness>,
    results: Arc<dyn Results>,
    trials: Trials,
    test: bool,
    fetch: bool,
    on_failure: OnFailure,
    allow_revoked: bool,
    tags: Vec<String>,
    push: Option<(PushTo, kiln_registry::Client)>,
}

/// Where `--push` sends images to.
enum PushTo {
    /// The one image.
    Reference(Reference),
    /// Each under its own name.
    Namespace(String),
}

impl PushTo {
    fn new(text: &str, images: usize) -> Result<Self> {
        if let Some(namespace) = text.strip_suffix('/') {
            destination(&format!("{namespace}/name"))?;
            return Ok(Self::Namespace(namespace.to_owned()));
        }
        let reference = destination(text)?;
        if images > 1 {
            let error = Error::new(Code::Usage, format!("`--push {text}` names one image, and {images} are baked"));
            return Err(error.next("give a namespace, HOST/NAMESPACE/: each image is pushed there under its own name and version"));
        }
        Ok(Self::Reference(reference))
    }

    fn of(&self, image: &Baked) -> Result<Reference> {
        match self {
            Self::Reference(reference) => Ok(reference.clone()),
            Self::Namespace(namespace) => destination(&format!("{namespace}/{}", image.name)),
        }
    }
}

/// One bake to be done.
struct Job {
    template: Template,
    /// The image that it starts from, if an earlier bake of the call made it.
    pinned: Option<Digest>,
    resume: resume::Options,
    reports: Reports,
}

async fn bake_all(app: &App, arguments: &Bake, events: &Events, trials: &Trials) -> Result<Ended> {
    for tag in &arguments.tags {
        kiln_model::reference::check_tag(tag).map_err(|why| Error::new(Code::Usage, format!("`--tag {tag}`: {why}")))?;
    }
    let cache_from = arguments.cache_from.as_deref().map(|text| shared_cache::repository("--cache-from", text)).transpose()?;
    let cache_to = arguments.cache_to.as_deref().map(|text| shared_cache::repository("--cache-to", text)).transpose()?;
    let templates = load_all(app, arguments)?;
    if let Some((template, _)) = templates.iter().find(|(template, _)| cache_from.is_some() && template.trusted.is_empty()) {
        let error = Error::new(Code::Usage, format!("`--cache-from`: {} trusts no key", template.path.display()));
        return Err(error.next("name the public keys whose checkpoints it may start from: `[cache] trusted = [\"kiln.pub\"]`"));
    }
    let push = arguments.push.as_deref().map(|to| PushTo::new(to, templates.len())).transpose()?;
    let nodes: Vec<Node> = templates.iter().map(|(template, _)| Node::of(template)).collect();
    let titles: Vec<String> = nodes.iter().map(Node::title).collect();
    let mut graph = Graph::new(nodes, limits(arguments))?;
    let several = templates.len() > 1;
    let mut jobs: Vec<Option<Job>> = Vec::new();
    for ((template, resume), title) in templates.into_iter().zip(&titles) {
        let reports = if several { events.of(title) } else { events.all() };
        for secret in template.secrets.values() {
            reports.redactor().add(secret);
        }
        jobs.push(Some(Job { template, pinned: None, resume, reports }));
    }
    let store = Arc::new(app.store()?);
    for (title, tag) in titles.iter().flat_map(|title| arguments.tags.iter().map(move |tag| (title, tag))) {
        store.may_tag(title.split(':').next().unwrap_or_default(), tag)?;
    }
    // Who is asked for a passphrase is asked before anything is begun.
    let key = signing::key_of_bakes(arguments, &events.all())?;
    let cache_to = match (&cache_to, &key) {
        (None, _) => None,
        (Some(to), Some(key)) => Some((app.remote(to)?, key.clone())),
        (Some(_), None) => {
            let error = Error::new(Code::Usage, "`--cache-to` leaves nothing that is not signed, and there is no key to sign with");
            return Err(error.next("name one with --sign-key, or in the site's settings with `[signing] key`"));
        }
    };
    let witness: Arc<dyn Witness> = Arc::new(Attester::new(Store::clone(&store), key).remembering(&app.home));
    // One client: what a host bears is shared by all pushes.
    let registry = if push.is_some() { Some(network::client(&events.all())?) } else { None };
    let kitchen = Arc::new(Kitchen {
        home: app.home.clone(),
        sink: store.clone(),
        store,
        cache: Arc::new(app.checkpoints()?),
        cache_from: cache_from.as_ref().map(|from| app.remote(from)).transpose()?,
        cache_to,
        history: app.history()?,
        witness,
        results: Arc::new(ResultFiles::new(&app.home)),
        trials: trials.clone(),
        test: !arguments.no_test,
        fetch: arguments.fetch,
        on_failure: arguments.on_failure,
        allow_revoked: arguments.allow_revoked,
        tags: arguments.tags.clone(),
        push: push.zip(registry),
    });

    let signals = Signals::listen()?;
    reap(&app.home, &events.all()).await?;
    let (mut running, mut tasks) = (JoinSet::new(), HashMap::new());
    let mut baked: Vec<Option<Baked>> = vec![None; jobs.len()];
    let mut errors = Vec::new();
    loop {
        for index in graph.begin() {
            let Some(mut job) = jobs.get_mut(index).and_then(Option::take) else { continue };
            if let Some(image) = graph.base(index).and_then(|base| baked.get(base)?.as_ref()) {
                job.template.base.pin(image.digest);
                job.pinned = Some(image.digest);
            }
            let (kitchen, signals) = (kitchen.clone(), signals.clone());
            let task = running.spawn(async move { bake_one(&kitchen, job, signals).await });
            tasks.insert(task.id(), index);
        }
        let Some(ended) = running.join_next_with_id().await else { break };
        let (task, done) = match ended {
            Ok(ended) => ended,
            // The others go on, and unwind as they should.
            Err(panic) => {
                let error = Error::new(Code::Failed, "kiln itself failed: this is a bug");
                (panic.id(), Err(error.because(panic).next("`kiln reap` removes what is left behind")))
            }
        };
        let Some(index) = tasks.remove(&task) else { continue };
        let title = titles.get(index).map_or("", String::as_str);
        let lost = match done {
            Ok(image) => {
                if let Some(slot) = baked.get_mut(index) {
                    *slot = Some(image);
                }
                graph.ended(index, true)
            }
            Err(error) if several => {
                let reports = events.of(title);
                events.forget(title);
                let interrupted = matches!(error.kind(), Code::Interrupted | Code::Terminated);
                let mut lost = graph.ended(index, false);
                if interrupted {
                    lost.extend(graph.stop());
                } else {
                    reports.warn(error.chain());
                }
                // Each would say the same of the one Ctrl-C.
                if !interrupted || !errors.iter().any(|other: &Error| other.kind() == error.kind()) {
                    errors.push(if interrupted { error } else { of_image(error, title) });
                }
                lost
            }
            Err(error) => {
                errors.push(error);
                graph.ended(index, false)
            }
        };
        for index in lost {
            let Some(title) = titles.get(index) else { continue };
            let base = graph.base(index).filter(|base| baked.get(*base).is_some_and(Option::is_none));
            let why = match base.and_then(|base| titles.get(base)) {
                Some(base) => format!("not baked: it starts from {base}, which was not baked"),
                None => "not baked: interrupted before it began".to_owned(),
            };
            events.of(title).warn(why);
        }
    }
    Ok(Ended { images: baked.into_iter().flatten().collect(), errors })
}

/// All templates, so that the mistakes of all are shown.
fn load_all(app: &App, arguments: &Bake) -> Result<Vec<(Template, resume::Options)>> {
    let registry = Registry::new(&app.home, &crate::site::load()?.bases);
    let load = |path| {
        let template = load_or_explain(path, &arguments.variables, &registry)?;
        let resume = again(&arguments.anew, &template)?;
        Ok((template, resume))
    };
    let loaded: Vec<Result<_>> = arguments.templates.iter().map(|path| load(path)).collect();
    loaded.into_iter().collect()
}

/// What this machine carries: its processors, and most of the memory that is
/// free now. Two shells at a time would be one too many for a terminal.
fn limits(arguments: &Bake) -> Limits {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let bakes = if matches!(arguments.on_failure, OnFailure::Shell) { 1 } else { cores };
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok());
    Limits { bakes, memory: free.map_or(u64::MAX, |kib| kib * 1024 / 4 * 3) }
}

/// An error that says which of several images it is about.
fn of_image(error: Error, title: &str) -> Error {
    let mut told = Error::new(error.kind(), format!("{title} was not baked"));
    if let Some(step) = error.step_name() {
        told = told.step(step);
    }
    if let Some(next) = error.next_move() {
        told = told.next(next);
    }
    for detail in error.details() {
        told = told.detail(detail.clone());
    }
    told.because(error)
}

async fn bake_one(kitchen: &Kitchen, job: Job, signals: Signals) -> Result<Baked> {
    let Kitchen { home, store, sink, history, witness, .. } = kitchen;
    let Job { template, pinned, resume, reports } = job;
    // Before anything that was cached is used, too. A base that is not there is
    // the bake's to tell.
    if let Some(reference) = template.base.image() {
        network::refuse_revoked_base(store, reference, pinned, kitchen.allow_revoked, &reports).await?;
    }
    let options = Options {
        resume,
        fetch: kitchen.fetch,
        test: kitchen.test,
        on_failure: match kitchen.on_failure {
            OnFailure::Clean => kiln_bake::OnFailure::Clean,
            OnFailure::Keep => kiln_bake::OnFailure::Keep,
            OnFailure::Shell => kiln_bake::OnFailure::Shell,
        },
        open_shell: &|access| Box::pin(open_shell(access)),
    };
    let (keys, names) = signing::trusted(&template.trusted)?;
    let local = Arc::new(kitchen.cache.trusting(names));
    let cache: Arc<dyn CheckpointCache> = match &kitchen.cache_from {
        None => local.clone(),
        Some(place) => Arc::new(SharedCache::new(local.clone(), place.clone(), keys, reports.clone())),
    };
    let (unpack, title) = (unpacking(home, store), format!("{}:{}", template.name, template.version));
    let told = |trial: &Trial| kitchen.trials.lock().unwrap_or_else(PoisonError::into_inner).push((title.clone(), trial.clone()));
    let testing = Some(Testing { results: &kitchen.results, unpack: &unpack, told: &told });
    let image = |record: &_| config(store, record);
    let stores = Stores { sink, cache: &cache, history, image: &image, witness: Some(witness), testing };
    let mut baked = within(signals.clone(), home, &reports, |context| {
        let (template, options, stores) = (&template, &options, &stores);
        async move { bake(template, options, stores, &context).await }
    })
    .await?;
    for tag in &kitchen.tags {
        let new = Reference { registry: None, name: baked.name.clone(), pointer: Pointer::Tag(Some(tag.clone())) };
        let image = Reference { pointer: Pointer::Digest(baked.digest), ..new.clone() };
        if let Some(moved) = store.tag(&image, &new)? {
            reports.note(moved.to_string());
        }
    }
    leave_checkpoints(kitchen, (&template, &baked), &local, signals.clone(), &reports).await?;
    if let Some((push, client)) = &kitchen.push {
        let to = push.of(&baked)?;
        let (sent, to) = within(signals, home, &reports, |context| {
            let (to, baked) = (&to, &baked);
            async move { push_image(home, client, store, &baked.digest, to, &context.reports).await }
        })
        .await?;
        reports.note(push_summary(&sent, &to));
        let mut artifact = push_as_json(&sent, &to);
        if let Some(object) = artifact.as_object_mut() {
            object.insert("kind".into(), "registry".into());
        }
        baked.artifacts.push(artifact);
    }
    Ok(baked)
}

/// Leaves the checkpoints of a bake where others find them.
async fn leave_checkpoints(
    kitchen: &Kitchen,
    (template, baked): (&Template, &Baked),
    local: &Arc<Checkpoints>,
    signals: Signals,
    reports: &Reports,
) -> Result<()> {
    let Some((place, key)) = &kitchen.cache_to else { return Ok(()) };
    let record = kitchen.history.records(&template.name)?.into_iter().rfind(|record| record.image == baked.digest);
    let left = within(signals, &kitchen.home, reports, |context| {
        let record = &record;
        async move {
            match record {
                Some(record) => shared_cache::leave(local, place, key, (template, record), &context).await,
                None => Ok(0),
            }
        }
    });
    match left.await {
        Ok(1) => reports.note(format!("left 1 checkpoint at {}", place.label())),
        Ok(left) => reports.note(format!("left {left} checkpoints at {}", place.label())),
        Err(error) if matches!(error.kind(), Code::Interrupted | Code::Terminated) => return Err(error),
        Err(error) => reports.warn(format!("checkpoints were not left at {}: {}", place.label(), error.chain())),
    }
    Ok(())
}

/// An interactive `ssh` on the terminal of this process; what comes through a
/// pipe it reads as it is.
pub(super) async fn open_shell(access: SshAccess) -> Result<()> {
    let piped = !std::io::stdin().is_terminal();
    tokio::process::Command::new("ssh")
        .args(piped.then_some("-T"))
        .args(access.ssh_arguments())
        .status()
        .await
        .map(|_| ())
        .map_err(|error| Error::new(Code::Missing, "cannot run `ssh`").because(error).next("apt-get install openssh-client"))
}

fn write_result(path: &Path, event: &Event) -> Result<()> {
    let text = serde_json::to_string(event).trying(|| "write the result".into())?;
    std::fs::write(path, text + "\n").trying(|| format!("write {}", path.display()))
}

fn summary(image: &Baked) -> String {
    let Baked { name, version, digest, .. } = image;
    let mut text = format!("{name}:{version}\n  digest       {digest}\n");
    if let Some(disk) = image.disk_digest {
        text.push_str(&format!("  disk digest  {disk}\n"));
    }
    for artifact in &image.artifacts {
        if let (Some(id), Some(region)) = (artifact["id"].as_str(), artifact["region"].as_str()) {
            text.push_str(&format!("  in           {region}: {id}\n"));
        }
    }
    text.push_str(&format!("  took         {}\n", seconds(image.seconds)));
    if image.disk_digest.is_some() {
        text.push_str(&format!("  try it       kiln run {name}:{version}\n"));
    }
    text
}
