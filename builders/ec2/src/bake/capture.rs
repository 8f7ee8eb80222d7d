//! From a stopped instance to AMIs in all their regions.

use std::time::SystemTime;

use kiln_model::cleanup::Ticket;
use kiln_model::image::CloudImage;
use kiln_model::machine::{Context, Naming};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use tokio::task::JoinSet;

use super::part::{Made, Part, make};
use super::region::{Region, cloud_image, unfinished};
use super::settings::Settings;
use super::start::{Running, earlier};
use crate::api::ebs::Encryption;
use crate::api::error::CallExt as _;
use crate::api::images::{Audience, ImageCopy};
use crate::api::machines::NewCapture;
use crate::api::{Find, Kind, Tags};
use crate::tags;

/// Most characters of an AMI's name.
const NAME: usize = 128;

/// An AMI that is not finished.
struct Draft {
    region: Region,
    made: Made,
    image: CloudImage,
}

/// The AMIs that were made of an instance.
pub(crate) struct Captured {
    /// That of the instance's own region.
    first: Draft,
    copies: Vec<Draft>,
    name: String,
    description: String,
    tags: Tags,
}

impl Captured {
    /// Makes the AMI, and waits until it can be used.
    pub(crate) async fn make(running: &Running, settings: &Settings, naming: &Naming, context: &Context) -> Result<Self> {
        let region = &running.region;
        let name = image_name(&naming.name, &naming.version, &context.bake);
        let description = format!("{} {}, baked by kiln", naming.name, naming.version);
        let mut tags = unfinished(&settings.tags, context, &format!("{} {}", naming.name, naming.version));
        tags.insert(tags::NAME.to_owned(), naming.name.clone());
        tags.insert(tags::VERSION.to_owned(), naming.version.clone());
        let architecture = super::base::architecture(&running.image.architecture);
        tags.insert(tags::ARCHITECTURE.to_owned(), architecture.to_owned());
        if let Some(commit) = &naming.commit {
            tags.insert(tags::COMMIT.to_owned(), commit.clone());
        }
        let capture =
            NewCapture { instance: running.instance.id.clone(), name: name.clone(), description: description.clone(), tags: tags.clone() };
        let of = region.clone();
        let call = async move {
            match of.calls.make_of_new(|| of.machines.create_image(&capture)).await {
                // An earlier try was carried out, though its answer was lost.
                Err(error) if error.kind == Kind::Exists => {
                    let find = Find::own().with("name", &capture.name);
                    let look = || async { of.images.images(&find).await.map(|found| found.into_iter().map(|image| image.id).collect()) };
                    earlier(&of, error, look).await
                }
                made => made,
            }
        };
        let made = make(context, region, Part::Image, call).await?;
        let image = region.image_made(&made.id, settings.capture_timeout).await?;
        let image = cloud_image(&region.name, &image);
        let first = Draft { region: region.clone(), made, image };
        Ok(Self { first, copies: Vec::new(), name, description, tags })
    }

    pub(crate) fn first(&self) -> &CloudImage {
        &self.first.image
    }

    /// Where the root disk can be read, and the snapshot that has it.
    pub(crate) fn root_snapshot(&self) -> Result<(&Region, String)> {
        let id = &self.first.image.id;
        let snapshot = self.first.image.snapshots.first().cloned();
        let snapshot = snapshot.ok_or_else(|| Error::new(Code::Failed, format!("AWS does not tell which snapshot {id} starts from")))?;
        Ok((&self.first.region, snapshot))
    }

    /// Copies it to all regions at once, and lets others use all of them.
    pub(crate) async fn spread(&mut self, settings: &Settings, context: &Context) -> Result<Vec<CloudImage>> {
        // Dropped with this future, it aborts only the waiting: each copy is
        // made in a task of its own.
        let mut copying = JoinSet::new();
        let elsewhere = settings.copy_to.iter().filter(|name| **name != self.first.region.name);
        for (number, name) in elsewhere.enumerate() {
            let region = self.first.region.other(name);
            let copy = ImageCopy {
                token: format!("kiln-{}-{name}", context.bake),
                source: self.first.image.id.clone(),
                source_region: self.first.region.name.clone(),
                name: self.name.clone(),
                description: self.description.clone(),
                encryption: settings.kms_keys.get(name).cloned().map_or(Encryption::Inherited, Encryption::Key),
                tags: self.tags.clone(),
            };
            let (context, limit) = (context.clone(), settings.capture_timeout);
            copying.spawn(async move {
                let of = region.clone();
                let call = async move { of.calls.make_of_new(|| of.images.copy_image(&copy)).await };
                let made = make(&context, &region, Part::Image, call).await?;
                let image = region.image_made(&made.id, limit).await?;
                let image = cloud_image(&region.name, &image);
                Ok::<_, Error>((number, Draft { region, made, image }))
            });
        }
        let mut copies = Vec::new();
        while let Some(copied) = copying.join_next().await {
            copies.push(copied.trying(|| "copy the image".to_owned())??);
        }
        copies.sort_by_key(|(number, _)| *number);
        self.copies = copies.into_iter().map(|(_, draft)| draft).collect();
        for draft in self.all() {
            share(draft, settings).await?;
        }
        Ok(self.all().map(|draft| draft.image.clone()).collect())
    }

    /// Takes the tag from all of them that says they are unfinished.
    pub(crate) async fn finish(&self) -> Result<()> {
        let key = [tags::UNFINISHED.to_owned()];
        for Draft { region, image, .. } in self.all() {
            let ids: Vec<String> = std::iter::once(&image.id).chain(&image.snapshots).cloned().collect();
            let done = region.calls.make_of_new(|| region.machines.untag(&ids, &key)).await;
            done.trying_to(|| format!("mark {} in {} as finished", image.id, region.name))?;
        }
        Ok(())
    }

    /// Their undos.
    pub(crate) fn tickets(&self) -> Vec<Ticket> {
        self.all().map(|draft| draft.made.ticket).collect()
    }

    /// Says on them which image they are.
    pub(crate) async fn recorded(&self, digest: &Digest, context: &Context) {
        let digest = Tags::from([(tags::DIGEST.to_owned(), digest.to_string())]);
        for Draft { region, image, .. } in self.all() {
            let ids: Vec<String> = std::iter::once(&image.id).chain(&image.snapshots).cloned().collect();
            // The image is where it should be; this is only said on it.
            if let Err(error) = region.calls.make_of_new(|| region.images.tag(&ids, &digest)).await {
                context.reports.warn(error.trying(format!("write the digest to {} in {}", image.id, region.name)).chain());
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = &Draft> {
        std::iter::once(&self.first).chain(&self.copies)
    }
}

/// Lets others use an image, and says until when it counts as current.
async fn share(Draft { region, image, .. }: &Draft, settings: &Settings) -> Result<()> {
    let Region { images, calls, .. } = region;
    if !settings.share.is_empty() {
        let done = calls.make_of_new(|| images.share_image(&image.id, &settings.share)).await;
        done.trying_to(|| format!("share {} in {}", image.id, region.name))?;
        let accounts: Vec<String> = settings
            .share
            .iter()
            .filter_map(|with| match with {
                Audience::Account(account) => Some(account.clone()),
                _ => None,
            })
            .collect();
        for snapshot in image.snapshots.iter().filter(|_| !accounts.is_empty()) {
            let done = calls.make_of_new(|| images.share_snapshot(snapshot, &accounts)).await;
            done.trying_to(|| format!("share {snapshot} in {}", region.name))?;
        }
    }
    if let Some(after) = settings.deprecate_after {
        let at = jiff::Timestamp::try_from(SystemTime::now() + after).trying(|| "tell when the image is deprecated".to_owned())?;
        let done = calls.make_of_new(|| images.deprecate(&image.id, at)).await;
        done.trying_to(|| format!("deprecate {} in {}", image.id, region.name))?;
    }
    Ok(())
}

/// The name of an AMI, of which an account has one in each region: the bake's
/// id makes it so. What EC2 does not take is replaced.
fn image_name(name: &str, version: &str, bake: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c) { c } else { '_' };
    let mut text: String = format!("{name}-{version}").chars().map(allowed).collect();
    text.truncate(NAME - bake.len() - 1);
    format!("{text}-{bake}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_as_ec2_takes() {
        let bake = "01JD6YH2V0M5SXN1T4F5Z1Y0QG";
        assert_eq!(image_name("shop/web", "1.4.0", bake), format!("shop/web-1.4.0-{bake}"));
        assert_eq!(image_name("web", "1+é", bake), format!("web-1__-{bake}"));
        let long = image_name(&"x".repeat(300), "1", bake);
        assert!(long.len() == NAME && long.ends_with(bake), "{long}");
    }
}
