//! `kiln publish`: an image as an AMI.

use std::collections::BTreeMap;

use kiln_ec2::api::images::Audience;
use kiln_ec2::api::retry::Pace;
use kiln_ec2::publish::{Ami, Published, Publisher, Wish};
use kiln_model::reference::{Pointer, Reference};
use kiln_model::settings::parse_duration;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_store::Store;
use kiln_store::place::images_of;
use serde_json::json;

use super::App;
use crate::cli::Publish;
use crate::ec2::{self, KnownMaps, Target};
use crate::followers::{self, Followed};
use crate::image_base::refuse_revoked;
use crate::network;
use crate::output::{bytes, table};
use crate::session::with_context;

pub(super) async fn run(app: &App, arguments: &Publish) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let wish = wish(arguments)?;
    // Before anything is pulled.
    let aws = ec2::connect().await?;
    let place = app.place(&reference)?;
    let digest = place.resolve(&reference).await?;
    refuse_revoked(&*place, &reference, &digest, arguments.allow_revoked, &app.output.reports()).await?;
    let store = app.store()?;
    let (published, digests) = with_context(&app.home, &app.output.reports(), |context| {
        let (place, store, aws, wish, reference) = (&*place, &store, &aws, &wish, &reference);
        async move {
            let maps = KnownMaps::new(store, reference.registry.as_ref().map(|_| place));
            let publisher = Publisher {
                cloud: &*aws.cloud,
                pace: Pace::default(),
                maps: &maps,
                folder: app.home.root().join("ec2").join("uploads"),
                reports: context.reports.clone(),
            };
            let mut all: Option<Published> = None;
            let mut digests = Vec::new();
            for image in images_of(place, &digest).await? {
                let exact = Reference { pointer: Pointer::Digest(image.digest), ..reference.clone() };
                let here = network::bring(&app.home, store, &exact, None, &context.reports).await?;
                let subject = ec2::subject(store, &here)?;
                let published = publisher.publish(&subject, wish).await?;
                fix(store, &here)?;
                digests.push(here);
                match &mut all {
                    None => all = Some(published),
                    Some(all) => add(all, published),
                }
            }
            let all = all.ok_or_else(|| Error::new(Code::NotFound, format!("{reference} has no image")))?;
            Ok((all, digests))
        }
    })
    .await?;
    // What follows a channel may have waited for just this.
    let followed = match reference.pointer {
        Pointer::Channel(_) => followers::follow(&*place, &reference).await,
        _ => None,
    };
    let mut value = json!(published);
    if let Some(object) = value.as_object_mut() {
        object.insert("ok".into(), json!(true));
        object.insert("reference".into(), json!(reference.to_string()));
        object.insert("digest".into(), json!(digest));
        object.insert("images".into(), json!(digests));
    }
    followers::add_to(&mut value, followed.as_ref());
    app.output.result(&value, || {
        let rows = followed.as_ref().and_then(|followed| followed.as_ref().ok()).map(Followed::rows);
        summary(&reference, &published) + &table(&rows.unwrap_or_default())
    });
    followers::end(followed, &reference, app.output.is_json())
}

fn add(all: &mut Published, more: Published) {
    all.amis.extend(more.amis);
    all.blocks_written += more.blocks_written;
    all.blocks_sent += more.blocks_sent;
    all.parents.extend(more.parents);
}

/// From now on the image's version is that image for ever.
fn fix(store: &Store, digest: &Digest) -> Result<()> {
    let config = store.image(digest)?.config;
    let version = Reference { registry: None, name: config.name, pointer: Pointer::Tag(Some(config.version)) };
    // Another image may have that version here by now.
    if store.resolve(&version).is_ok_and(|at| at == *digest) {
        store.fix(&version, "published")?;
    }
    Ok(())
}

/// What the command line asks for.
fn wish(arguments: &Publish) -> Result<Wish> {
    let mut regions = Vec::new();
    for to in &arguments.to {
        match to.parse()? {
            Target::Region(region) => regions.push(region),
            Target::Ami { .. } => {
                return Err(Error::new(Code::Usage, format!("nothing can be published to `{to}`")).next("write ec2:REGION"));
            }
        }
    }
    let mut keys = BTreeMap::new();
    for arn in &arguments.keys {
        let wrong = || Error::new(Code::Usage, format!("`{arn}` is no ARN of a KMS key")).next("write arn:aws:kms:REGION:ACCOUNT:key/ID");
        let parts: Vec<&str> = arn.split(':').collect();
        let ["arn", _, "kms", region, _, key] = &*parts else { return Err(wrong()) };
        if !key.starts_with("key/") {
            return Err(wrong());
        }
        if keys.insert((*region).to_owned(), arn.clone()).is_some() {
            return Err(Error::new(Code::Usage, format!("two KMS keys of {region} are named")));
        }
    }
    let deprecate = arguments.deprecate_after.as_ref().map(|text| {
        let wrong = || Error::new(Code::Usage, format!("`--deprecate-after {text}` is no length of time")).next("write 90d or 12h");
        let after = parse_duration(text).ok_or_else(wrong)?;
        jiff::Timestamp::now().checked_add(after).trying(|| format!("deprecate the AMI after {text}"))
    });
    Ok(Wish {
        regions,
        audience: audience(arguments)?,
        keys,
        tags: arguments.tags.iter().cloned().collect(),
        deprecate: deprecate.transpose()?,
        volume_type: arguments.volume_type.clone(),
    })
}

fn audience(arguments: &Publish) -> Result<Vec<Audience>> {
    let mut audience = Vec::new();
    for account in &arguments.accounts {
        if account.len() != 12 || !account.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(Error::new(Code::Usage, format!("`{account}` is no account of AWS")).next("write its number, of 12 digits"));
        }
        audience.push(Audience::Account(account.clone()));
    }
    for arn in &arguments.organizations {
        // arn:aws:organizations::111122223333:organization/o-… or :ou/o-…/ou-…
        let parts: Vec<&str> = arn.split(':').collect();
        audience.push(match &*parts {
            ["arn", _, "organizations", _, _, what] if what.starts_with("organization/") => Audience::Organization(arn.clone()),
            ["arn", _, "organizations", _, _, what] if what.starts_with("ou/") => Audience::Unit(arn.clone()),
            _ => {
                return Err(Error::new(Code::Usage, format!("`{arn}` is no ARN of an organisation or a unit of one"))
                    .next("write arn:aws:organizations::ACCOUNT:organization/ID"));
            }
        });
    }
    if arguments.public {
        audience.push(Audience::All);
    }
    Ok(audience)
}

fn summary(reference: &Reference, published: &Published) -> String {
    let mut rows = vec![["REGION", "AMI", "ARCH", "SNAPSHOT", ""].map(String::from).to_vec()];
    rows.extend(published.amis.iter().map(|ami: &Ami| {
        let was = if ami.existed { "was there" } else { "" };
        vec![ami.region.clone(), ami.ami.clone(), ami.arch.clone(), ami.snapshots.join(" "), was.to_owned()]
    }));
    let sent = bytes(published.blocks_sent * kiln_model::block::BLOCK);
    let based = if published.parents.is_empty() { String::new() } else { format!(", based on {}", published.parents.join(" ")) };
    format!("{reference} is published ({} blocks, {sent} sent{based})\n{}", published.blocks_sent, table(&rows))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn wish_of(more: &[&str]) -> Result<Wish> {
        let arguments = ["kiln", "publish", "web:1", "--to", "ec2:eu-central-1"].iter().chain(more);
        match Cli::try_parse_from(arguments).unwrap().command {
            Command::Publish(arguments) => wish(&arguments),
            _ => unreachable!(),
        }
    }

    #[test]
    fn what_is_asked_for() {
        let organization = "arn:aws:organizations::111122223333:organization/o-abc";
        let unit = "arn:aws:organizations::111122223333:ou/o-abc/ou-def";
        let key = "arn:aws:kms:eu-central-1:111122223333:key/1";
        let wish = wish_of(&[
            "--to",
            "ec2:us-east-1",
            "--share-account",
            "111122223333",
            "--share-organization",
            organization,
            "--share-organization",
            unit,
            "--kms-key",
            key,
            "--tag",
            "team=shop",
        ])
        .unwrap();
        assert_eq!(wish.regions, ["eu-central-1", "us-east-1"]);
        let account = Audience::Account("111122223333".into());
        assert_eq!(wish.audience, [account, Audience::Organization(organization.into()), Audience::Unit(unit.into())]);
        assert_eq!(wish.keys["eu-central-1"], key);
        assert_eq!(wish.tags["team"], "shop");
    }

    #[test]
    fn mistakes_of_the_command_line() {
        for more in [
            &["--to", "eu-central-1"][..],
            &["--to", "ec2:ami-1"],
            &["--share-account", "1"],
            &["--share-organization", "o-abc"],
            &["--kms-key", "alias/x"],
            &["--kms-key", "arn:aws:kms:eu-central-1:1:alias/x"],
            &["--deprecate-after", "soon"],
        ] {
            assert_eq!(wish_of(more).unwrap_err().kind(), Code::Usage, "{more:?}");
        }
    }
}
