//! What follows a channel: parameters that say its image's AMI.
//!
//! The channel is the truth, and everything here can be done again: whoever
//! promotes sets what differs, then looks whether the channel has moved on
//! meanwhile, and if so sets it again. Of two promotions at the same time the
//! parameters thus end where the channel does. A fan-out that broke off is
//! resumed by promoting the same image again.

use std::collections::BTreeMap;

use kiln_ec2::api::retry::Pace;
use kiln_ec2::publish::{Region, follow};
use kiln_model::channel::Follower;
use kiln_model::event::Failure;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::Place;
use kiln_store::place::{Held, images_of};
use serde_json::{Value, json};

use crate::{ec2, facts};

/// How often a channel may move on while its followers are set.
const ROUNDS: usize = 10;

/// The followers of one channel.
pub(crate) struct Followers {
    channel: Reference,
    followers: Vec<Follower>,
    regions: BTreeMap<String, Region>,
}

/// What came of setting one parameter.
struct Set {
    region: String,
    parameter: String,
    outcome: Result<(String, bool)>,
}

/// What came of setting all of them.
pub(crate) struct Followed(Vec<Set>);

impl Followers {
    /// Those that a policy names; `None` when it names none.
    pub(crate) async fn of(channel: &Reference, followers: &[Follower]) -> Result<Option<Self>> {
        if followers.is_empty() {
            return Ok(None);
        }
        let aws = ec2::connect().await.map_err(|error| {
            let next = error.next_move().unwrap_or_default().to_owned();
            Error::new(error.kind(), format!("{channel} has followers at EC2, which cannot be reached")).because(error).next(next)
        })?;
        let mut regions = BTreeMap::new();
        for follower in followers {
            if !regions.contains_key(&follower.region) {
                regions.insert(follower.region.clone(), Region::new(&*aws.cloud, &follower.region, Pace::default())?);
            }
        }
        Ok(Some(Self { channel: channel.clone(), followers: followers.to_vec(), regions }))
    }

    /// Those of a channel as it is.
    pub(crate) async fn of_channel(place: &dyn Place, channel: &Reference) -> Result<Option<Self>> {
        match facts::policy(place, channel, &[]).await? {
            Some(binding) => Self::of(channel, &binding.policy.followers).await,
            None => Ok(None),
        }
    }

    /// The channel's part of its reference.
    fn channel(&self) -> &str {
        match &self.channel.pointer {
            Pointer::Channel(channel) => channel,
            _ => "",
        }
    }

    /// The parameters to set, each with what it is about.
    fn parameters<'a>(&'a self, images: &'a [Held]) -> Result<Vec<(&'a Region, String, &'a Held)>> {
        let mut all: Vec<(&Region, String, &Held)> = Vec::new();
        for follower in &self.followers {
            let Some(region) = self.regions.get(&follower.region) else { continue };
            for image in images {
                let parameter = follower.parameter(&self.channel.name, self.channel(), &image.config.architecture);
                if all.iter().any(|(other, name, _)| other.name == region.name && *name == parameter) {
                    let what = format!("{parameter} in {} would follow {} images of {}", region.name, images.len(), self.channel);
                    return Err(Error::new(Code::Usage, what).next("write {arch} into the follower: one parameter for each architecture"));
                }
                all.push((region, parameter, image));
            }
        }
        Ok(all)
    }

    /// Refuses an image that has no AMI where a follower needs one, before the
    /// channel moves.
    pub(crate) async fn check(&self, images: &[Held]) -> Result<()> {
        let mut missing = Vec::new();
        for (region, parameter, image) in self.parameters(images)? {
            if follow::ami_of(region, &image.digest).await?.is_none() {
                missing.push((region.name.clone(), parameter));
            }
        }
        let Some((region, parameter)) = missing.first() else { return Ok(()) };
        let what = format!("{} is followed by {parameter} in {region}, where the image has no AMI", self.channel);
        let mut regions: Vec<&str> = missing.iter().map(|(region, _)| region.as_str()).collect();
        regions.dedup();
        let to: Vec<String> = regions.iter().map(|region| format!("--to ec2:{region}")).collect();
        Err(Error::new(Code::Refused, what).next(format!("`kiln publish REF {}` makes it", to.join(" "))))
    }

    /// Makes every parameter say the AMI of the image that the channel is at.
    pub(crate) async fn set(&self, place: &dyn Place) -> Result<Followed> {
        let head = |entry: Option<kiln_model::channel::Entry>| entry.map(|entry| (entry.record().seq, entry.record().image));
        let mut at = head(place.channels().head(&self.channel.name, self.channel()).await?);
        for _ in 0..ROUNDS {
            let Some((_, digest)) = at else { return Ok(Followed(Vec::new())) };
            let followed = self.set_to(place, &digest).await?;
            let now = head(place.channels().head(&self.channel.name, self.channel()).await?);
            if now == at {
                return Ok(followed);
            }
            at = now;
        }
        Err(Error::new(Code::Infrastructure, format!("{} moves faster than its followers", self.channel)).next("promote again"))
    }

    async fn set_to(&self, place: &dyn Place, digest: &Digest) -> Result<Followed> {
        let images = images_of(place, digest).await?;
        let mut done = Vec::new();
        for (region, parameter, image) in self.parameters(&images)? {
            let outcome = async {
                let ami = follow::ami_of(region, &image.digest).await?.ok_or_else(|| {
                    Error::new(Code::NotFound, format!("{} has no AMI in {}", image.digest, region.name))
                        .next(format!("`kiln publish {} --to ec2:{}` makes it", self.channel, region.name))
                })?;
                let changed = follow::point(region, &parameter, &ami).await?;
                Ok((ami, changed))
            };
            let outcome = outcome.await;
            done.push(Set { region: region.name.clone(), parameter, outcome });
        }
        Ok(Followed(done))
    }
}

/// Sets what follows a channel that has moved. What fails here is told after
/// the channel's new state, which is the truth whatever follows it.
pub(crate) async fn follow(place: &dyn Place, channel: &Reference) -> Option<Result<Followed>> {
    match Followers::of_channel(place, channel).await {
        Ok(None) => None,
        Ok(Some(followers)) => Some(followers.set(place).await),
        Err(error) => Some(Err(error)),
    }
}

impl Followed {
    /// Whether all were set.
    pub(crate) fn is_done(&self) -> bool {
        self.0.iter().all(|set| set.outcome.is_ok())
    }

    /// For programs.
    pub(crate) fn as_json(&self) -> Value {
        let one = |set: &Set| match &set.outcome {
            Ok((ami, changed)) => json!({ "region": set.region, "parameter": set.parameter, "ami": ami, "changed": changed }),
            Err(error) => json!({ "region": set.region, "parameter": set.parameter, "error": Failure::from(error) }),
        };
        self.0.iter().map(one).collect()
    }

    /// For people: a line for each.
    pub(crate) fn rows(&self) -> Vec<Vec<String>> {
        let row = |set: &Set| {
            let says = match &set.outcome {
                Ok((ami, _)) => ami.clone(),
                Err(error) => error.chain(),
            };
            vec![format!("  {}", set.region), format!("{} is {says}", set.parameter)]
        };
        self.0.iter().map(row).collect()
    }

    /// An error when one of them could not be set.
    fn into_result(self, channel: &Reference) -> Result<()> {
        let count = self.0.len();
        let mut failed: Vec<Set> = self.0.into_iter().filter(|set| set.outcome.is_err()).collect();
        let number = failed.len();
        let Some(Set { parameter, outcome: Err(first), .. }) = failed.pop() else { return Ok(()) };
        let what = format!("{channel} has {count} followers, of which {number} could not be set, {parameter} among them");
        let mut error = Error::new(Code::Infrastructure, what);
        for set in failed {
            if let Err(other) = set.outcome {
                error = error.detail(format!("{} in {}: {}", set.parameter, set.region, other.chain()));
            }
        }
        let next = first.next_move().map_or_else(String::new, |next| format!("{next}; "));
        Err(error.because(first).next(format!("{next}then promote the same image again: what is set already stays")))
    }
}

/// Adds what came of the followers to an answer.
pub(crate) fn add_to(value: &mut Value, followed: Option<&Result<Followed>>) {
    let (Some(object), Some(followed)) = (value.as_object_mut(), followed) else { return };
    let (done, said) = match followed {
        Ok(followed) => (followed.is_done(), followed.as_json()),
        Err(error) => (false, json!({ "error": Failure::from(error) })),
    };
    object.insert("followers".into(), said);
    if !done {
        object.insert("ok".into(), json!(false));
    }
}

/// The command's end: its own exit status, or the followers'. With JSON the
/// answer has said it.
pub(crate) fn end(followed: Option<Result<Followed>>, channel: &Reference, json: bool) -> Result<u8> {
    let ended = match followed {
        None => Ok(()),
        Some(followed) => followed.and_then(|followed| followed.into_result(channel)),
    };
    match ended {
        Ok(()) => Ok(0),
        Err(error) if json => Ok(error.kind().exit_status()),
        Err(error) => Err(error),
    }
}
