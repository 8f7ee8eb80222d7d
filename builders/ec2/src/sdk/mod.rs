//! The calls with Amazon's SDK: nothing but plain types into the SDK's and
//! back. Decisions are made elsewhere.
//!
//! Credentials and region come from where they come for the AWS command line:
//! environment, profiles, web identity (OIDC), containers, instance roles.
//! `AWS_ENDPOINT_URL` leads every call elsewhere. The SDK's own repeating is
//! off: [`crate::api::retry`] repeats, and bounds what is under way.

mod ebs;
mod images;
mod machines;
mod parameters;

use std::sync::Arc;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use jiff::Timestamp;

use crate::api::{CallError, Cloud, Ebs, Images, Kind, Machines, Parameters};

/// Longest that is waited for a connection.
const CONNECTING: Duration = Duration::from_secs(10);
/// Longest that one call may take, a block of 512 KiB on a slow line included.
const ANSWERING: Duration = Duration::from_secs(60);

/// AWS, with this user's credentials.
#[derive(Debug, Clone)]
pub struct Aws {
    config: SdkConfig,
}

impl Aws {
    /// What the environment says of credentials, region and endpoint. Asks
    /// nobody but, for a region, an instance's metadata.
    pub async fn connect() -> Self {
        let client = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
        let timeouts = TimeoutConfig::builder().connect_timeout(CONNECTING).operation_attempt_timeout(ANSWERING).build();
        let config = aws_config::defaults(BehaviorVersion::latest())
            .http_client(client)
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .load()
            .await;
        Self { config }
    }

    /// The region that the environment names.
    pub fn region(&self) -> Option<String> {
        self.config.region().map(ToString::to_string)
    }

    /// What a service's client is made from.
    fn config(&self, region: &str) -> SdkConfig {
        self.config.clone().into_builder().region(Region::new(region.to_owned())).build()
    }
}

impl Cloud for Aws {
    fn ebs(&self, region: &str) -> Arc<dyn Ebs> {
        Arc::new(ebs::Client(aws_sdk_ebs::Client::new(&self.config(region))))
    }

    fn images(&self, region: &str) -> Arc<dyn Images> {
        Arc::new(images::Client(aws_sdk_ec2::Client::new(&self.config(region))))
    }

    fn machines(&self, region: &str) -> Arc<dyn Machines> {
        Arc::new(machines::Client(aws_sdk_ec2::Client::new(&self.config(region))))
    }

    fn parameters(&self, region: &str) -> Arc<dyn Parameters> {
        Arc::new(parameters::Client(aws_sdk_ssm::Client::new(&self.config(region))))
    }
}

/// What a failed call says. The SDK's error becomes the cause only where AWS
/// did not answer: what it answers is in the code and the message.
pub(crate) fn failed<E>(action: &'static str, error: SdkError<E>) -> CallError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    if let SdkError::ServiceError(answer) = &error {
        let meta = answer.err().meta();
        let (code, message) = (meta.code().unwrap_or_default(), meta.message().unwrap_or_default());
        return CallError::answered(action, answer.raw().status().as_u16(), code, message);
    }
    let kind = match &error {
        SdkError::ConstructionFailure(_) => Kind::Invalid,
        _ => Kind::Transient,
    };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let mut credentials = false;
    while let Some(one) = cause {
        credentials |= one.is::<CredentialsError>();
        cause = one.source();
    }
    CallError::unanswered(action, error).kind(if credentials { Kind::Credentials } else { kind })
}

/// A time as AWS writes it in text.
pub(crate) fn time(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}
