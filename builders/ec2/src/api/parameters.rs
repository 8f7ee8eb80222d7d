//! Systems Manager's parameter store: names that point to AMIs, for whoever
//! starts instances.
//!
//! Source: <https://docs.aws.amazon.com/systems-manager/latest/APIReference/>.

use async_trait::async_trait;

use super::Result;

/// A parameter as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its value.
    pub value: String,
    /// How often it was written.
    pub version: i64,
}

/// The parameter store of one region.
#[async_trait]
pub trait Parameters: Send + Sync {
    /// GetParameter; `None` when there is none of that name.
    ///
    /// # Errors
    /// When it cannot be read.
    async fn get(&self, name: &str) -> Result<Option<Parameter>>;

    /// PutParameter: makes `name` say `image`, of type `String` and data type
    /// `aws:ec2:image`, which AWS checks to be an AMI that is there.
    ///
    /// # Errors
    /// When it cannot be written.
    async fn put_image(&self, name: &str, image: &str) -> Result<()>;
}
