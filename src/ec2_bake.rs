//! Baking on EC2, as this machine does it: its address, its ledgers, its store.

use std::net::IpAddr;
use std::sync::Arc;

use kiln_ec2::api::Cloud;
use kiln_ec2::api::retry::Pace;
use kiln_ec2::bake::{Around, Boxed, reap_ledger};
use kiln_ec2::publish::{Publisher, Wish};
use kiln_http::{Manner, Settings, Url};
use kiln_model::event::Reports;
use kiln_model::home::Home;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_store::Store;

use crate::ec2::{self, KnownMaps};

/// Tells whoever asks the address that it is asked from.
const WHO_AM_I: &str = "https://checkip.amazonaws.com/";

/// What the volumes of a published base are, unless a template says otherwise.
const VOLUME_TYPE: &str = "gp3";

/// Most bytes of its answer: an address is shorter.
const ANSWER: u64 = 256;

/// What the builder `ec2` and the base `ami` need.
pub(crate) fn around(home: &Home, http: Settings) -> Around {
    let access = || -> Boxed<Result<Arc<dyn Cloud>>> { Box::pin(cloud()) };
    let own_address = move || -> Boxed<Result<IpAddr>> {
        let http = http.clone();
        Box::pin(async move { own_address(&http).await })
    };
    let kept = home.clone();
    let publish = move |disk: Digest, region: String, reports: Reports| -> Boxed<Result<String>> {
        let home = kept.clone();
        Box::pin(async move { publish(&home, &disk, region, reports).await })
    };
    Around::new(Arc::new(access), Arc::new(own_address), home).publishing(Arc::new(publish))
}

/// Publishes a base: the store's image of this disk.
async fn publish(home: &Home, disk: &Digest, region: String, reports: Reports) -> Result<String> {
    let store = Store::open(&home.store())?;
    let gone = || Error::new(Code::NotFound, format!("no image of the store has the disk {disk} any more"));
    let image = store.images_with(disk)?.into_iter().next().ok_or_else(gone)?;
    let cloud = cloud().await?;
    let publisher = Publisher {
        cloud: &*cloud,
        pace: Pace::default(),
        maps: &KnownMaps::new(&store, None),
        folder: home.root().join("ec2").join("uploads"),
        reports,
    };
    let wish = Wish { regions: vec![region], volume_type: VOLUME_TYPE.to_owned(), ..Wish::default() };
    let published = publisher.publish(&ec2::subject(&store, &image)?, &wish).await?;
    let ami = published.amis.into_iter().next();
    ami.map(|ami| ami.ami).ok_or_else(|| Error::new(Code::Failed, "nothing was published, and no error told why"))
}

/// AWS, for whoever shares it among several regions.
pub(crate) async fn cloud() -> Result<Arc<dyn Cloud>> {
    Ok(Arc::from(ec2::connect().await?.cloud))
}

/// The address by which the Internet sees this machine.
async fn own_address(http: &Settings) -> Result<IpAddr> {
    let what = || format!("find this machine's own address at {WHO_AM_I}");
    let url: Url = WHO_AM_I.parse().trying(what)?;
    let answer = kiln_http::client(http, &url, Manner::Simple)?.get(url).send().await.and_then(|answer| answer.error_for_status());
    let answer = answer.trying(what)?;
    if answer.content_length().is_some_and(|length| length > ANSWER) {
        return Err(Error::new(Code::Failed, format!("{WHO_AM_I} gave something else than an address")));
    }
    let text = answer.text().await.trying(what)?;
    text.trim().parse().trying(what)
}

/// Removes what a dead bake's ledger names at EC2. Gives false where it is to
/// stay: the bake died after its image was recorded in the store, and before it
/// could say so in its ledger.
pub(crate) async fn reap(home: &Home, bake: &str, region: &str, resource: &str, id: Option<&str>) -> Result<bool> {
    if let Some(id) = id
        && is_recorded(home, id)?
    {
        return Ok(false);
    }
    reap_ledger(&cloud().await?, Pace::default(), bake, region, resource, id).await.map(|()| true)
}

/// Whether an image of the store is this one at EC2.
fn is_recorded(home: &Home, id: &str) -> Result<bool> {
    let store = Store::open(&home.store())?;
    let listing = store.images(false)?;
    Ok(listing.images.iter().any(|image| image.config.cloud.iter().any(|cloud| cloud.id == id)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kiln_model::image::{CloudImage, Config, Firmware};
    use kiln_store::Publish;

    use super::*;

    #[test]
    fn an_image_that_the_store_records_is_no_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(Some(folder.path().to_owned())).unwrap();
        assert!(!is_recorded(&home, "ami-1").unwrap());
        let image =
            CloudImage { builder: "ec2".into(), region: "eu-central-1".into(), id: "ami-1".into(), size: 1 << 30, snapshots: vec![] };
        let config = Config { cloud: vec![image], ..Config::new("web", "1", "amd64", Firmware::Bios) };
        let store = Store::open(&home.store()).unwrap();
        store.publish_as(&Publish { config: &config, disks: &[], annotations: &BTreeMap::new(), tags: &[] }).unwrap();
        assert!(is_recorded(&home, "ami-1").unwrap());
        assert!(!is_recorded(&home, "ami-2").unwrap());
    }

    #[cfg(not(feature = "ec2"))]
    #[tokio::test]
    async fn without_ec2_a_ledger_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(Some(folder.path().to_owned())).unwrap();
        let error = reap(&home, "01J", "eu-central-1", "instance", Some("i-1")).await.unwrap_err();
        assert_eq!(error.kind(), Code::Usage);
        assert!(error.to_string().contains("without EC2"), "{error}");
    }
}
