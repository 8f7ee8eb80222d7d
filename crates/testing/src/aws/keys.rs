//! Key pairs by their ids, which moto knows and does not look for.

use super::ec2::{Done, wrong};
use super::query::{Filter, Query};
use super::server::Shared;

impl Shared {
    /// Those with these ids, if ids are named; all of them have to be there.
    pub(super) async fn describe_keys(&self, region: &str, query: &Query) -> Done {
        let ids = query.list("KeyPairId");
        if ids.is_empty() {
            return self.pass(region, query).await;
        }
        let mut filters = query.filters();
        filters.push(Filter { name: "key-pair-id".into(), values: ids.iter().map(|id| (*id).to_owned()).collect() });
        let said = self.pass(region, &query.without("KeyPairId").filtered(&filters)).await?;
        match ids.iter().find(|id| !said.items("keySet").iter().any(|key| key.at("keyPairId") == **id)) {
            Some(id) => wrong("InvalidKeyPair.NotFound", format!("The key pair ID '{id}' does not exist")),
            None => Ok(said),
        }
    }

    /// One that is named by its id has to be there; by its name, it need not.
    pub(super) async fn delete_key(&self, region: &str, query: &Query) -> Done {
        let Some(id) = query.get("KeyPairId") else { return self.pass(region, query).await };
        let named = self.describe_keys(region, &Query::new("DescribeKeyPairs").with("KeyPairId.1", id)).await?;
        let name = named.at("keySet/item/keyName").to_owned();
        self.pass(region, &Query::new("DeleteKeyPair").with("KeyName", name)).await
    }
}
