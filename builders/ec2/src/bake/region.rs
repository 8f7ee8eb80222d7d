//! One region as a bake uses it: the calls, made until they succeed, and what
//! is asked of them again and again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::image::CloudImage;
use kiln_model::machine::Context;
use kiln_model::{Code, Error, Result};

use super::EC2;
use crate::api::error::CallExt as _;
use crate::api::images::{Image, ImageState};
use crate::api::machines::{Instance, InstanceState};
use crate::api::retry::{Calls, Pace};
use crate::api::{CallError, Cloud, Find, Images, Kind, Machines, Tags};
use crate::tags;

/// Most calls at once of one bake: it has little to ask at a time.
const AT_ONCE: usize = 8;

/// One region.
#[derive(Clone)]
pub(crate) struct Region {
    pub(crate) name: String,
    pub(crate) machines: Arc<dyn Machines>,
    pub(crate) images: Arc<dyn Images>,
    pub(crate) calls: Arc<Calls>,
    pub(crate) cloud: Arc<dyn Cloud>,
}

impl Region {
    pub(crate) fn new(cloud: &Arc<dyn Cloud>, name: &str, pace: Pace) -> Self {
        Self {
            name: name.to_owned(),
            machines: cloud.machines(name),
            images: cloud.images(name),
            calls: Arc::new(Calls::new(pace, AT_ONCE)),
            cloud: Arc::clone(cloud),
        }
    }

    /// Another region of the same cloud.
    pub(crate) fn other(&self, name: &str) -> Self {
        Self::new(&self.cloud, name, *self.calls.pace())
    }

    /// How long something that was perhaps made may not be found yet.
    pub(crate) fn settling(&self) -> Duration {
        self.calls.pace().lag / 12
    }

    /// The image of this id; `None` when there is none.
    pub(crate) async fn image(&self, id: &str) -> Result<Option<Image>> {
        let find = Find::id(id);
        match self.calls.make(|| self.images.images(&find)).await {
            Ok(images) => Ok(images.into_iter().find(|image| image.id == id)),
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            Err(error) => Err(error.trying(format!("ask for {id} in {}", self.name))),
        }
    }

    /// Whether an image is there and can be used.
    pub(crate) async fn has_image(&self, id: &str) -> Result<bool> {
        Ok(self.image(id).await?.is_some_and(|image| image.state == ImageState::Available))
    }

    /// Waits until an image that is being made can be used.
    pub(crate) async fn image_made(&self, id: &str, limit: Duration) -> Result<Image> {
        let find = Find::id(id);
        let look = || async {
            let images = self.images.images(&find).await?;
            Ok::<_, CallError>(images.into_iter().find(|image| image.id == id && image.state != ImageState::Pending))
        };
        let found = self.calls.wait(limit, look).await.trying_to(|| format!("wait for {id} in {}", self.name))?;
        match found {
            Some(image) if image.state == ImageState::Available => Ok(image),
            Some(image) => {
                let error = Error::new(Code::Infrastructure, format!("AWS could not make the image {id} in {}", self.name));
                Err(error.detail(image.reason.unwrap_or_default()).next("run the same command again"))
            }
            None => Err(Error::new(Code::Timeout, format!("{id} in {} was not ready within {} s", self.name, limit.as_secs()))
                .next("raise `capture_timeout` in [builder.ec2]: large disks take long the first time")),
        }
    }

    /// Waits until an instance is in one of these states.
    pub(crate) async fn instance_in(&self, id: &str, states: &[InstanceState], limit: Duration) -> Result<Option<Instance>> {
        let find = Find::id(id);
        let look = || async {
            let instances = self.machines.instances(&find).await?;
            Ok::<_, CallError>(instances.into_iter().find(|instance| instance.id == id && states.contains(&instance.state)))
        };
        self.calls.wait(limit, look).await.trying_to(|| format!("wait for the instance {id}"))
    }
}

/// An image as records name it.
pub(crate) fn cloud_image(region: &str, image: &Image) -> CloudImage {
    let root = image.root.as_deref();
    let mut disks: Vec<_> = image.disks.iter().collect();
    disks.sort_by_key(|disk| Some(disk.device.as_str()) != root);
    let gib = disks.first().and_then(|disk| disk.gib).unwrap_or(0);
    CloudImage {
        builder: EC2.to_owned(),
        region: region.to_owned(),
        id: image.id.clone(),
        size: u64::from(gib) << 30,
        snapshots: disks.iter().filter_map(|disk| disk.snapshot.clone()).collect(),
    }
}

/// The tags of what a bake makes, as long as it is not finished.
pub(crate) fn unfinished(own: &BTreeMap<String, String>, context: &Context, title: &str) -> Tags {
    let mut all = own.clone();
    all.entry(tags::TITLE.to_owned()).or_insert_with(|| title.to_owned());
    all.insert(tags::BAKE.to_owned(), context.bake.clone());
    all.insert(tags::UNFINISHED.to_owned(), "true".to_owned());
    all
}
