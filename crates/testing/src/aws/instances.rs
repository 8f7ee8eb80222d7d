//! Instances: moto's, which get from one state to the next at once. Here they
//! take a while, and in between they are what AWS says they are.

use std::time::Instant;

use super::ec2::{Done, wrong};
use super::query::{Filter, Query};
use super::server::{Shared, lock};
use super::xml::Element;

/// The state on the way, and its number, after a call.
fn on_the_way(action: &str) -> &'static str {
    match action {
        "StopInstances" => "stopping",
        "TerminateInstances" => "shutting-down",
        _ => "pending",
    }
}

fn code(state: &str) -> &'static str {
    match state {
        "pending" => "0",
        "running" => "16",
        "shutting-down" => "32",
        "terminated" => "48",
        "stopping" => "64",
        _ => "80",
    }
}

impl Shared {
    /// Starts, stops or ends instances.
    pub(super) async fn move_instances(&self, region: &str, query: &Query) -> Done {
        if let ("RunInstances", Some(image)) = (query.action(), query.get("ImageId")) {
            self.available(region, image)?;
        }
        if query.action() == "StopInstances" {
            for id in query.list("InstanceId") {
                let instance = self.instance(region, id).await?;
                let state = instance.at("instanceState/name");
                if !["running", "stopping", "stopped"].contains(&state) {
                    return wrong("IncorrectInstanceState", format!("The instance '{id}' is {state}, from which it cannot be stopped."));
                }
            }
        }
        let said = self.pass(region, query).await?;
        let mut state = lock(&self.state);
        let until = Instant::now() + state.settling;
        for item in said.items("instancesSet") {
            state.moves.insert(item.at("instanceId").to_owned(), (until, on_the_way(query.action())));
        }
        drop(state);
        Ok(said)
    }

    /// What moto says, with the states that instances are in on the way.
    pub(super) async fn describe_instances(&self, region: &str, query: &Query) -> Done {
        let (states, others): (Vec<Filter>, Vec<Filter>) =
            query.filters().into_iter().partition(|filter| filter.name == "instance-state-name");
        let mut said = self.pass(region, &query.filtered(&others)).await?;
        {
            let state = lock(&self.state);
            correct(&mut said, &|id| {
                let (until, name) = state.moves.get(id)?;
                (Instant::now() < *until).then_some(*name)
            });
        }
        said.keep(&|item| {
            let name = item.at("instanceState/name");
            name.is_empty() || states.iter().all(|filter| filter.fits(name))
        });
        said.keep(&|item| item.child("instancesSet").is_none_or(|set| !set.children.is_empty()));
        Ok(said)
    }

    /// One instance.
    pub(super) async fn instance(&self, region: &str, id: &str) -> Done {
        let said = self.describe_instances(region, &Query::new("DescribeInstances").with("InstanceId.1", id)).await?;
        let mut instances = said.items("reservationSet").iter().flat_map(|reservation| reservation.items("instancesSet"));
        match instances.next() {
            Some(instance) => Ok(instance.clone()),
            None => wrong("InvalidInstanceID.NotFound", format!("The instance ID '{id}' does not exist")),
        }
    }
}

/// Puts right, at any depth, what state an instance is in.
fn correct(element: &mut Element, now: &dyn Fn(&str) -> Option<&'static str>) {
    if let Some(name) = element.child("instanceId").and_then(|id| now(id.text.trim()))
        && let Some(state) = element.child_mut("instanceState")
    {
        state.set("name", name);
        state.set("code", code(name));
    }
    element.children.iter_mut().for_each(|child| correct(child, now));
}
