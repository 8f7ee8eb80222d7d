//! Systems Manager's parameter store.

use async_trait::async_trait;
use aws_sdk_ssm::types::ParameterType;

use super::failed;
use crate::api::parameters::{Parameter, Parameters};
use crate::api::{Kind, Result};

pub(super) struct Client(pub(super) aws_sdk_ssm::Client);

#[async_trait]
impl Parameters for Client {
    async fn get(&self, name: &str) -> Result<Option<Parameter>> {
        match self.0.get_parameter().name(name).send().await.map_err(|error| failed("GetParameter", error)) {
            Ok(answer) => {
                let parameter = answer.parameter();
                Ok(parameter.and_then(|one| Some(Parameter { value: one.value()?.to_owned(), version: one.version() })))
            }
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn put_image(&self, name: &str, image: &str) -> Result<()> {
        let call = self.0.put_parameter().name(name).value(image).r#type(ParameterType::String).data_type("aws:ec2:image").overwrite(true);
        call.send().await.map(drop).map_err(|error| failed("PutParameter", error))
    }
}
