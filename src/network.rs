//! Registries, as this machine reaches them.

use kiln_model::event::Reports;
use kiln_model::home::Home;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Result};
use kiln_registry::{Client, Options, Repository};
use kiln_store::transfer::{self, Known, Names, Remote, Sending};
use kiln_store::{Place as _, RemotePlace, Store};

use crate::image_base::refuse_revoked;

/// A client with what the site says of its network. One for each command, since
/// what a host bears is shared by all that it does.
pub(crate) fn client(reports: &Reports) -> Result<Client> {
    let site = crate::site::load()?;
    let http = kiln_http::Settings { proxy: site.bases.proxy, ca_certificates: site.bases.ca_certificates };
    Client::new(Options { http, plain_http: site.plain_http, reports: reports.clone(), ..Options::default() })
}

/// The repository that a reference is in.
pub(crate) fn repository(client: &Client, reference: &Reference) -> Result<Repository> {
    match &reference.registry {
        Some(host) => client.repository(host, &reference.name),
        None => Err(Error::new(Code::Usage, format!("`{reference}` names no registry")).next("write HOST/NAMESPACE/NAME:TAG")),
    }
}

/// What this machine remembers of who holds which blobs.
pub(crate) fn known(home: &Home) -> Known {
    Known::new(&home.cache().join("registries"))
}

/// The names that an image gets in the store when it was asked for like this.
pub(crate) fn names(reference: &Reference) -> Names {
    match &reference.pointer {
        Pointer::Tag(Some(tag)) => Names::Tag(tag.clone()),
        _ => Names::Version,
    }
}

/// The image that a reference at a registry leads to.
pub(crate) async fn open(client: &Client, reference: &Reference) -> Result<Remote> {
    let repository = repository(client, reference)?;
    let digest = RemotePlace::new(repository.clone()).resolve(reference).await?;
    Remote::open(&repository, &digest).await
}

/// An image as the store has it, brought there first when it is at a registry.
/// One that is named by its digest and is there takes no network. With
/// `allow_revoked` said, one that was revoked there is refused, or only warned
/// about.
pub(crate) async fn bring(
    home: &Home,
    store: &Store,
    reference: &Reference,
    allow_revoked: Option<bool>,
    reports: &Reports,
) -> Result<Digest> {
    if reference.registry.is_none() {
        return store.resolve(reference);
    }
    if let Pointer::Digest(digest) = &reference.pointer
        && store.has_image(digest)
    {
        return Ok(*digest);
    }
    let place = RemotePlace::new(repository(&client(reports)?, reference)?);
    let digest = place.resolve(reference).await?;
    if let Some(allow) = allow_revoked {
        refuse_revoked(&place, reference, &digest, allow, reports).await?;
    }
    if store.has_image(&digest) {
        return Ok(digest);
    }
    let image = Remote::open(place.repository(), &digest).await?;
    // An index leads to the image of this architecture.
    if !store.has_image(&image.digest()) {
        reports.note(format!("pulling {reference}"));
        let pulled = transfer::pull(&image, store, &names(reference), &known(home), reports).await?;
        pulled.moved.iter().for_each(|moved| reports.note(moved.to_string()));
    }
    Ok(image.digest())
}

/// Refuses a base that was revoked, where it is known without pulling it what
/// it is: in the store, or at its registry. `pinned` is what another template
/// of the same call has baked. A base that is not there is the bake's to tell.
pub(crate) async fn refuse_revoked_base(
    store: &Store,
    reference: &Reference,
    pinned: Option<Digest>,
    allow: bool,
    reports: &Reports,
) -> Result<()> {
    let here = match (&reference.registry, &reference.pointer) {
        _ if pinned.is_some() => pinned,
        (None, _) => store.resolve(reference).ok(),
        (Some(_), Pointer::Digest(digest)) => store.has_image(digest).then_some(*digest),
        (Some(_), _) => None,
    };
    match here {
        Some(digest) => refuse_revoked(store, reference, &digest, allow, reports).await,
        None if reference.registry.is_none() => Ok(()),
        None => {
            let place = RemotePlace::new(repository(&client(reports)?, reference)?);
            match place.resolve(reference).await {
                Ok(digest) => refuse_revoked(&place, reference, &digest, allow, reports).await,
                Err(error) if error.kind() == Code::NotFound => Ok(()),
                Err(error) => Err(error),
            }
        }
    }
}

/// Copies an image that is at `from`, with what is attached to it, to where
/// `to` is, under its own version. What is there already is not copied.
pub(crate) async fn carry(
    home: &Home,
    client: &Client,
    store: &Store,
    digest: &Digest,
    (from, to): (&Reference, &Reference),
    reports: &Reports,
) -> Result<()> {
    let known = known(home);
    if to.registry.is_none() {
        let image = Remote::open(&repository(client, from)?, digest).await?;
        transfer::pull(&image, store, &Names::Version, &known, reports).await?;
        return Ok(());
    }
    let target = repository(client, to)?;
    if from.registry.is_none() {
        let version = store.image(digest)?.config.version;
        transfer::push(store, digest, &Sending { repository: &target, tag: Some(&version), known: &known, reports }).await?;
    } else {
        let source = repository(client, from)?;
        let version = Remote::open(&source, digest).await?.config().version.clone();
        transfer::copy(&source, digest, &Sending { repository: &target, tag: Some(&version), known: &known, reports }).await?;
    }
    Ok(())
}
