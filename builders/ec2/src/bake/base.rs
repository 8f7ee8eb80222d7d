//! `[base] ami`: an AMI by its id, or the newest that a filter finds.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use kiln_model::base::{Base, BaseDisk, BaseSource};
use kiln_model::image::{CloudImage, Firmware, cloud_identity};
use kiln_model::machine::Context;
use kiln_model::{Code, Digest, Error, Result};

use super::region::{Region, cloud_image};
use super::settings::{Ami, Chosen};
use super::{Around, EC2};
use crate::api::error::CallExt as _;
use crate::api::images::{Image, ImageState};
use crate::api::{Find, Kind};

/// Gets an AMI: asks what it is, and fetches nothing.
pub(crate) struct AmiSource {
    ami: Ami,
    around: Around,
    /// Where the builder is.
    builder_region: Option<String>,
    found: Mutex<Option<CloudImage>>,
}

impl AmiSource {
    pub(crate) fn new(ami: Ami, around: Around) -> Self {
        Self { ami, around, builder_region: None, found: Mutex::default() }
    }

    fn region(&self) -> Result<&str> {
        self.ami.region.as_deref().or(self.builder_region.as_deref()).ok_or_else(|| {
            Error::new(Code::Usage, "it is not known in which region the base is")
                .next("bake it with [builder.ec2], whose `region` is meant; or say `region` in `ami`")
        })
    }

    async fn find(&self, region: &Region) -> Result<Image> {
        let label = self.label();
        let asked = match &self.ami.chosen {
            Chosen::Id(id) => Find { owners: self.ami.owners.clone(), ..Find::id(id) },
            Chosen::Filter(filter) => {
                let all = Find { owners: self.ami.owners.clone(), ..Find::default() };
                filter.iter().fold(all, |find, (name, value)| find.with(name, value))
            }
        };
        let found = match region.calls.make(|| region.images.images(&asked)).await {
            Err(error) if error.kind == Kind::NotFound => Vec::new(),
            found => found.trying_to(|| format!("look for the base {label}"))?,
        };
        let none = || Error::new(Code::Base, format!("{label} is not in {}, or not for this account", region.name));
        match &self.ami.chosen {
            Chosen::Id(_) => {
                let image = found.into_iter().next().ok_or_else(|| none().next("check id, region and account"))?;
                match image.state {
                    ImageState::Available => Ok(image),
                    _ => {
                        Err(Error::new(Code::Base, format!("{label} cannot be used, or not yet")).detail(image.reason.unwrap_or_default()))
                    }
                }
            }
            Chosen::Filter(_) => newest(found).ok_or_else(|| none().next("check filter, owners and region")),
        }
    }
}

/// The newest that can be used; of two that are as old, always the same.
fn newest(found: Vec<Image>) -> Option<Image> {
    let usable = found.into_iter().filter(|image| image.state == ImageState::Available);
    usable.max_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)))
}

#[async_trait]
impl BaseSource for AmiSource {
    fn label(&self) -> String {
        match &self.ami.chosen {
            Chosen::Id(id) => id.clone(),
            Chosen::Filter(filter) => match filter.get("name") {
                Some(name) => format!("ami {name}"),
                None => {
                    let said: Vec<String> = filter.iter().map(|(name, value)| format!("{name}={value}")).collect();
                    format!("ami {}", said.join(","))
                }
            },
        }
    }

    fn known(&self) -> Result<Option<Digest>> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(CloudImage::identity);
        Ok(found.or_else(|| match &self.ami.chosen {
            Chosen::Id(id) => Some(cloud_identity(EC2, id)),
            // Which one is the newest, AWS alone knows.
            Chosen::Filter(_) => None,
        }))
    }

    fn builder_is_at(&mut self, region: &str) {
        self.builder_region = Some(region.to_owned());
    }

    async fn fetch(&self, _fresh: bool, context: &Context) -> Result<Base> {
        let cloud = (self.around.access)().await?;
        let region = Region::new(&cloud, self.region()?, self.around.pace);
        let image = self.find(&region).await?;
        let found = cloud_image(&region.name, &image);
        let label = match &self.ami.chosen {
            Chosen::Id(id) => format!("{id} ({})", image.name),
            Chosen::Filter(_) => {
                context.reports.note(format!("the base is {}, {}", image.id, image.name));
                format!("{} ({})", image.id, image.name)
            }
        };
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found.clone());
        Ok(Base {
            label,
            disk: BaseDisk::Cloud(vec![found]),
            firmware: firmware(image.boot_mode.as_deref()),
            architecture: architecture(&image.architecture).to_owned(),
            credentials: None,
        })
    }

    fn remember(&self, _: &Base, _: &Digest) -> Result<()> {
        Ok(())
    }
}

/// How an AMI of that boot mode starts. Without one, an instance starts as its
/// type does by default: by BIOS on x86.
pub(crate) fn firmware(boot_mode: Option<&str>) -> Firmware {
    match boot_mode {
        Some("uefi") => Firmware::Uefi,
        Some("uefi-preferred") => Firmware::BiosUefi,
        _ => Firmware::Bios,
    }
}

/// EC2's name of an architecture in OCI's words.
pub(crate) fn architecture(name: &str) -> &str {
    match name {
        "x86_64" => "amd64",
        "i386" => "386",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, day: &str, state: ImageState) -> Image {
        Image {
            id: id.into(),
            name: String::new(),
            owner: "1".into(),
            state,
            reason: None,
            created: Some(format!("2026-11-{day}T00:00:00Z").parse().unwrap()),
            architecture: "x86_64".into(),
            boot_mode: None,
            root: None,
            disks: Vec::new(),
            tags: crate::api::Tags::new(),
            deprecated: None,
        }
    }

    #[test]
    fn the_newest_that_can_be_used() {
        let images = vec![
            image("ami-1", "01", ImageState::Available),
            image("ami-3", "03", ImageState::Available),
            image("ami-2", "03", ImageState::Available),
            image("ami-9", "09", ImageState::Pending),
        ];
        assert_eq!(newest(images).unwrap().id, "ami-3");
        assert!(newest(Vec::new()).is_none());
    }

    #[test]
    fn words_of_ec2_and_of_kiln() {
        assert_eq!([None, Some("legacy-bios"), Some("uefi")].map(firmware), [Firmware::Bios, Firmware::Bios, Firmware::Uefi]);
        assert_eq!((architecture("x86_64"), architecture("arm64")), ("amd64", "arm64"));
    }
}
