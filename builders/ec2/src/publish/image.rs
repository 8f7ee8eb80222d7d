//! Snapshots into an AMI, and an AMI into what others see.
//!
//! RegisterImage has no client token, so the AMI's name makes it happen once:
//! it has the image's digest in it. Whoever finds that name taken looks whether
//! it is the same image, and then has what was wanted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::event::Reports;
use kiln_model::{Code, Digest, Error, Result};

use super::{Ami, Region, Subject, Uploaded, Wish, boot_mode, ec2_architecture};
use crate::api::ebs::Encryption;
use crate::api::error::CallExt as _;
use crate::api::images::{Audience, Image, ImageCopy, ImageState, NewDisk, NewImage};
use crate::api::{CallError, Find, Kind, Tags};
use crate::tags;

/// For how long a copy may be on its way.
const COPYING: Duration = Duration::from_secs(3 * 60 * 60);

/// An image on its way to AMIs.
#[derive(Clone)]
pub(crate) struct Work {
    pub(crate) subject: Arc<Subject>,
    pub(crate) wish: Arc<Wish>,
    pub(crate) reports: Reports,
}

impl Work {
    /// What the AMI and its snapshots are tagged with.
    pub(crate) fn tags(&self) -> Tags {
        let subject = &self.subject;
        let mut all = self.wish.tags.clone();
        let mut add = |tag: &str, value: &str| all.insert(tag.to_owned(), value.chars().take(256).collect());
        add(tags::TITLE, &subject.called());
        add(tags::NAME, &subject.name);
        add(tags::VERSION, &subject.version);
        add(tags::DIGEST, &subject.digest.to_string());
        add(tags::ARCHITECTURE, &subject.architecture);
        if let Some(commit) = &subject.commit {
            add(tags::COMMIT, commit);
        }
        if let Some(bake) = &subject.bake {
            add(tags::BAKE, bake);
        }
        all
    }

    /// For people who look at the AMI.
    pub(crate) fn description(&self) -> String {
        let text = format!("{} {}", self.subject.called(), self.subject.digest);
        text.chars().take(255).collect()
    }

    /// The AMI's name: at most 128 characters, of which the digest's tell two
    /// images of one version apart.
    pub(crate) fn name(&self) -> String {
        let subject = &self.subject;
        let end = format!("-{}-{}", subject.architecture, subject.digest.short());
        let called = format!("{}-{}", subject.name, subject.version);
        let good = |c: char| if c.is_ascii_alphanumeric() || "()[]./-'@_".contains(c) { c } else { '-' };
        let called: String = called.chars().take(128 - end.len()).map(good).collect();
        called + &end
    }

    /// The AMI of this image in a region, when it is there.
    pub(crate) async fn existing(&self, region: &Region) -> Result<Option<Ami>> {
        let Some(image) = self.by_name(region).await? else { return Ok(None) };
        self.is_same(region, &image)?;
        if image.state == ImageState::Failed {
            // AWS keeps a failed copy for a while, and its name with it.
            let removed = region.calls.make(|| region.images.deregister(&image.id)).await;
            let removed = removed.or_else(|error| if error.kind == Kind::NotFound { Ok(()) } else { Err(error) });
            removed.trying_to(|| format!("remove {}, which AWS failed to make", image.id))?;
            return Ok(None);
        }
        self.reports.note(format!("{} is there already: {} in {}", self.subject.called(), image.id, region.name));
        self.available(region, &image.id, true).await.map(Some)
    }

    async fn by_name(&self, region: &Region) -> Result<Option<Image>> {
        let find = Find::own().with("name", &self.name());
        let found = region.calls.make(|| region.images.images(&find)).await;
        let found = found.trying_to(|| format!("look for the AMI {} in {}", self.name(), region.name))?;
        // What is asked for is asked for again of what is answered.
        Ok(found.into_iter().find(|image| image.name == self.name()))
    }

    /// An AMI of this name has to be of this image, or somebody plays tricks. A
    /// copy may have no tags yet; its name then is all there is.
    fn is_same(&self, region: &Region, image: &Image) -> Result<()> {
        let digest = self.subject.digest.to_string();
        match image.tags.get(tags::DIGEST) {
            Some(other) if *other != digest => {
                let what = format!("{} in {} has the name of {} and is of {other}", image.id, region.name, self.subject.called());
                Err(Error::new(Code::Refused, what).next("deregister it, or publish under another version"))
            }
            _ => Ok(()),
        }
    }

    /// Makes the AMI of snapshots.
    pub(crate) async fn register(&self, region: &Region, snapshots: &[Uploaded]) -> Result<Ami> {
        let subject = &self.subject;
        let disk = |(number, uploaded): (usize, &Uploaded)| NewDisk {
            device: device(number),
            snapshot: uploaded.snapshot.clone(),
            gib: uploaded.gib,
            volume_type: self.wish.volume_type.clone(),
        };
        let new = NewImage {
            name: self.name(),
            description: self.description(),
            architecture: ec2_architecture(&subject.architecture)?.to_owned(),
            boot_mode: boot_mode(&subject.architecture, subject.firmware)?.to_owned(),
            disks: snapshots.iter().enumerate().map(disk).collect(),
            tags: self.tags(),
        };
        // A snapshot that was completed a moment ago may be unknown elsewhere.
        let id = match region.calls.make_of_new(|| region.images.register(&new)).await {
            Ok(id) => id,
            // The answer to an earlier call was lost, or another process was
            // quicker.
            Err(error) if error.kind == Kind::Exists => {
                let look = || async {
                    let found = region.images.images(&Find::own().with("name", &new.name)).await?;
                    Ok::<_, CallError>(found.into_iter().find(|image| image.name == new.name))
                };
                let found = region.calls.wait(region.calls.pace().lag, look).await;
                let found = found.trying_to(|| format!("look for the AMI {}", new.name))?;
                let Some(image) = found else { return Err(error.trying(format!("register {} in {}", new.name, region.name))) };
                self.is_same(region, &image)?;
                image.id
            }
            Err(error) => return Err(error.trying(format!("register {} in {}", new.name, region.name))),
        };
        self.available(region, &id, false).await
    }

    /// Copies the AMI from another region.
    pub(crate) async fn copy(&self, region: &Region, source: &Ami) -> Result<Ami> {
        self.reports.note(format!("AWS is copying {} to {}", source.ami, region.name));
        let mut copy = ImageCopy {
            // The same for every attempt of every process.
            token: Digest::of(format!("kiln copy of {} in {}", source.ami, region.name)).hex(),
            source: source.ami.clone(),
            source_region: source.region.clone(),
            name: self.name(),
            description: self.description(),
            encryption: self.wish.keys.get(&region.name).map_or(Encryption::Inherited, |key| Encryption::Key(key.clone())),
            tags: self.tags(),
        };
        for attempt in 0.. {
            let id = region.calls.make_of_new(|| region.images.copy_image(&copy)).await;
            let id = id.trying_to(|| format!("copy {} from {} to {}", source.ami, source.region, region.name))?;
            match self.available(region, &id, false).await {
                // The token stands for a copy that was removed since.
                Err(error) if attempt == 0 && error.kind() == Code::NotFound => copy.token = format!("kiln-{}", ulid::Ulid::generate()),
                done => return done,
            }
        }
        Err(Error::new(Code::Failed, format!("{} was not copied", source.ami)))
    }

    /// Waits until an AMI can be used.
    async fn available(&self, region: &Region, id: &str, existed: bool) -> Result<Ami> {
        let look = || async {
            let image = region.images.images(&Find::id(id)).await?.into_iter().next();
            Ok::<_, CallError>(image.filter(|image| image.state != ImageState::Pending))
        };
        let image = region.calls.wait(COPYING, look).await.trying_to(|| format!("look at {id} in {}", region.name))?;
        let Some(image) = image else {
            return Err(Error::new(Code::Timeout, format!("AWS has not made {id} in {} within three hours", region.name))
                .next("run the same command again: it goes on waiting"));
        };
        if image.state == ImageState::Failed {
            let why = image.reason.clone().unwrap_or_else(|| "it does not say why".to_owned());
            return Err(Error::new(Code::Infrastructure, format!("AWS could not make {id} in {}: {why}", region.name))
                .next("run the same command again: it makes another one; for an encrypted one, look at the key's policy"));
        }
        let mut disks = image.disks;
        disks.sort_by_key(|disk| (Some(&disk.device) != image.root.as_ref(), disk.device.clone()));
        let snapshots = disks.into_iter().filter_map(|disk| disk.snapshot).collect();
        let (region, arch) = (region.name.clone(), self.subject.architecture.clone());
        Ok(Ami { region, ami: image.id, name: image.name, arch, snapshots, existed })
    }

    /// Whatever an AMI gets beside its existence: each of these calls may be
    /// made any number of times.
    pub(crate) async fn finish(&self, region: &Region, ami: &Ami) -> Result<()> {
        let calls = &region.calls;
        let what = |verb: &str| format!("{verb} {} in {}", ami.ami, region.name);
        self.tag(region, ami).await?;
        if !self.wish.audience.is_empty() {
            let accounts: BTreeSet<String> = self.wish.audience.iter().filter_map(Audience::account).collect();
            let accounts: Vec<String> = accounts.into_iter().collect();
            // The snapshots first: who sees the AMI can copy it at once.
            for snapshot in ami.snapshots.iter().filter(|_| !accounts.is_empty()) {
                let shared = calls.make_of_new(|| region.images.share_snapshot(snapshot, &accounts)).await;
                shared.trying_to(|| format!("share the snapshot {snapshot} in {}", region.name))?;
            }
            let shared = calls.make_of_new(|| region.images.share_image(&ami.ami, &self.wish.audience)).await;
            shared.trying_to(|| what("share"))?;
        }
        if let Some(at) = self.wish.deprecate {
            calls.make_of_new(|| region.images.deprecate(&ami.ami, at)).await.trying_to(|| what("set the deprecation of"))?;
        }
        Ok(())
    }

    /// The tags, where they are not as they should be: a copy's snapshots have
    /// none of the disks' own.
    async fn tag(&self, region: &Region, ami: &Ami) -> Result<()> {
        let calls = &region.calls;
        let wanted = self.tags();
        let find = Find::id(&ami.ami);
        let images = calls.make_of_new(|| region.images.images(&find)).await;
        let images = images.trying_to(|| format!("look at {}", ami.ami))?;
        if !images.first().is_some_and(|image| has(&image.tags, &wanted)) {
            let id = [ami.ami.clone()];
            calls.make_of_new(|| region.images.tag(&id, &wanted)).await.trying_to(|| format!("tag {}", ami.ami))?;
        }
        for (snapshot, disk) in ami.snapshots.iter().zip(&self.subject.disks) {
            let find = Find::id(snapshot);
            let there = calls.make_of_new(|| region.images.snapshots(&find)).await;
            let there = there.trying_to(|| format!("look at the snapshot {snapshot}"))?;
            let has_disk = |tags: &Tags| tags.get(tags::DISK_DIGEST).is_some_and(|digest| *digest == disk.digest.to_string());
            // One that another version shares keeps that one's name.
            if there.first().is_some_and(|snapshot| has_disk(&snapshot.tags)) {
                continue;
            }
            let mut all = wanted.clone();
            all.insert(tags::DISK_DIGEST.to_owned(), disk.digest.to_string());
            all.insert(tags::DISK_SIZE.to_owned(), disk.map.size.to_string());
            if let Some(key) = self.wish.keys.get(&region.name) {
                all.insert(tags::KEY.to_owned(), key.clone());
            }
            let id = [snapshot.clone()];
            calls.make_of_new(|| region.images.tag(&id, &all)).await.trying_to(|| format!("tag the snapshot {snapshot}"))?;
        }
        Ok(())
    }
}

impl Audience {
    fn account(&self) -> Option<String> {
        match self {
            Self::Account(account) => Some(account.clone()),
            _ => None,
        }
    }
}

fn has(tags: &Tags, wanted: &Tags) -> bool {
    wanted.iter().all(|(tag, value)| tags.get(tag) == Some(value))
}

/// The name of a disk for EC2: `/dev/xvda` is the root, then `/dev/sdb` and on.
fn device(number: usize) -> String {
    match number {
        0 => "/dev/xvda".to_owned(),
        n => format!("/dev/sd{}", char::from(b'a' + u8::try_from(n.min(25)).unwrap_or(25))),
    }
}

#[cfg(test)]
mod tests {
    use kiln_model::image::Firmware;

    use super::*;

    fn work(name: &str, version: &str) -> Work {
        let subject = Subject {
            name: name.into(),
            version: version.into(),
            architecture: "amd64".into(),
            firmware: Firmware::BiosUefi,
            digest: Digest::of("manifest"),
            commit: Some("c0ffee".into()),
            bake: None,
            disks: Vec::new(),
        };
        Work { subject: Arc::new(subject), wish: Arc::new(Wish::default()), reports: Reports::silent() }
    }

    #[test]
    fn names_are_what_aws_takes_and_end_with_the_digest() {
        let end = format!("-amd64-{}", Digest::of("manifest").short());
        assert_eq!(work("web", "1.4.0").name(), format!("web-1.4.0{end}"));
        assert_eq!(work("shop/web", "1+x").name(), format!("shop/web-1-x{end}"));
        let long = work(&"a".repeat(255), "1").name();
        assert!(long.len() == 128 && long.ends_with(&end), "{long}");
    }

    #[test]
    fn tags_say_what_is_known() {
        let tags = work("web", "1.4.0").tags();
        let expected = ["Name", "kiln:architecture", "kiln:commit", "kiln:digest", "kiln:name", "kiln:version"];
        assert_eq!(tags.keys().map(String::as_str).collect::<Vec<_>>(), expected);
        assert_eq!(tags[tags::DIGEST], Digest::of("manifest").to_string());
    }

    #[test]
    fn devices() {
        assert_eq!([0, 1, 2, 24].map(device), ["/dev/xvda", "/dev/sdb", "/dev/sdc", "/dev/sdy"]);
    }
}
