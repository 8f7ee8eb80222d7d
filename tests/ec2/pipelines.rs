//! The pipelines that people copy, with a cloud: an AMI for every commit.

use kiln_testing::{Aws, Moto};
use serde_json::Value;

use crate::context::with_base;
use crate::repository::{Repository, lines};

const ROLE: &str = "arn:aws:iam::123456789012:role/kiln";

/// The front as a runner sees it: it has a role to take, and no keys.
fn environment(aws: &Aws) -> Vec<(&'static str, String)> {
    aws.environment().into_iter().filter(|(name, _)| !["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"].contains(name)).collect()
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn a_tag_becomes_amis_with_the_token_of_the_job() {
    let moto = Moto::start().unwrap();
    let aws = Aws::before(&moto).unwrap();
    let mut repository = Repository::new(with_base());
    repository.environment = environment(&aws);
    // GitHub answers with JSON at a URL that has parameters already; a file
    // whose name ends like them does as well.
    repository.write("token?x=1&audience=sts.amazonaws.com", "{\"value\": \"token-of-the-job\"}");
    repository.environment.push(("ACTIONS_ID_TOKEN_REQUEST_URL", format!("file://{}", repository.path("token%3Fx=1").display())));
    repository.environment.push(("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "t".into()));

    let context = repository.github("push", "temp", ROLE, "ec2:eu-central-1 ec2:us-east-1");
    let ran = repository.run("github", context);
    assert_eq!(ran.status, 0, "{ran}");
    let steps = ["Log in", "Install", "Bake, test, sign, push", "Take the role", "Publish", "Promote", "Clean up"];
    assert_eq!(lines(&ran, "step: "), steps);
    assert!(aws.count("AssumeRoleWithWebIdentity") > 0, "{:?}", aws.calls());
    let summary = std::fs::read_to_string(repository.path("temp/github_step_summary")).unwrap();
    for region in ["eu-central-1", "us-east-1"] {
        let left = aws.left(region).unwrap();
        assert_eq!((left.images.len(), left.snapshots.len(), left.is_clean()), (1, 1, true), "{left:?}");
        assert!(summary.contains(&left.images[0]), "{summary}");
    }
    assert!(!repository.path("temp/kiln/.token").exists(), "the token stays");

    // GitLab hands the token over as a variable.
    aws.forget();
    let context = repository.gitlab(&[]);
    let ran = repository.run("gitlab", context);
    assert_eq!(ran.status, 0, "{ran}");
    assert_eq!(lines(&ran, "job: "), ["bake", "publish", "promote"]);
    assert!(aws.count("AssumeRoleWithWebIdentity") > 0, "{:?}", aws.calls());
    // The same image has its AMIs already.
    assert_eq!(aws.count("RegisterImage"), 0);
    let baked: Value = serde_json::from_str(&std::fs::read_to_string(repository.path("kiln-out/result.json")).unwrap()).unwrap();
    assert_eq!(repository.channel("shop/site/pipeline"), baked["images"][0]["digest"].as_str().unwrap());
}
