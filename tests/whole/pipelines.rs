//! The pipelines that people copy: parsed, and their commands run, with real
//! guests and a real registry.

use std::process::Command;

use serde_json::Value;

use crate::context::with_base;
use crate::repository::{Repository, lines};

#[test]
#[ignore = "takes minutes; tests/ec2 runs it in every run, with a cloud"]
fn the_github_pipeline_bakes_pushes_and_promotes() {
    let repository = Repository::new(with_base());
    // Publishing needs a cloud: tests/ec2 does that.
    let ran = repository.run("github", repository.github("push", "temp", "", ""));
    assert_eq!(ran.status, 0, "{ran}");
    assert_eq!(lines(&ran, "step: "), ["Log in", "Install", "Bake, test, sign, push", "Promote", "Clean up"]);
    let baked: Value = serde_json::from_str(&std::fs::read_to_string(repository.path("temp/kiln/result.json")).unwrap()).unwrap();
    let digest = baked["images"][0]["digest"].as_str().unwrap();
    assert_eq!(repository.channel("shop/site/pipeline"), digest);
    let public = repository.path("kiln.pub");
    let at = format!("{}/shop/site/pipeline:v1.0.0", repository.registry.address());
    repository.kiln.ok(&["verify", &at, "--key", public.to_str().unwrap()]);

    // The job's summary tells it, and the key is nowhere.
    let summary = std::fs::read_to_string(repository.path("temp/github_step_summary")).unwrap();
    for said in ["pipeline:v1.0.0", digest, "| slow |", "| word |"] {
        assert!(summary.contains(said), "no {said} in {summary}");
    }
    let key = repository.key();
    let line = key.lines().nth(1).unwrap();
    assert!(!ran.stdout.contains(line) && !ran.stderr.contains(line));
    let left = Command::new("grep").args(["-rlF", line]).arg(repository.path("temp")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");

    // Another runner, that starts with nothing, and a pull request that breaks
    // the test: it goes on from the checkpoint, fails, leaves nothing, says why.
    let other = Repository { kiln: with_base(), ..repository };
    let text = std::fs::read_to_string(other.path("image/kiln.toml")).unwrap();
    other.write("image/kiln.toml", &text.replace("grep -q", "grep -q no"));
    other.git(&["commit", "-qam", "y"]);
    let ran = other.run("github", other.github("pull_request", "again", "", ""));
    assert_eq!(ran.status, 3, "{ran}");
    assert_eq!(lines(&ran, "step: "), ["Log in", "Install", "Bake, test, sign, push", "Clean up"]);
    let events = std::fs::read_to_string(other.path("again/kiln/events.jsonl")).unwrap();
    assert!(events.contains("took the checkpoint of step"), "{events}");
    let summary = std::fs::read_to_string(other.path("again/github_step_summary")).unwrap();
    assert!(summary.contains("**Failed in step `word`** (test)"), "{summary}");
}

#[test]
#[ignore = "takes minutes; tests/ec2 runs it in every run, with a cloud"]
fn the_gitlab_pipeline_bakes_pushes_and_promotes() {
    let repository = Repository::new(with_base());
    let ran = repository.run("gitlab", repository.gitlab(&["publish"]));
    assert_eq!(ran.status, 0, "{ran}");
    assert_eq!(lines(&ran, "job: "), ["bake", "promote"]);
    let baked: Value = serde_json::from_str(&std::fs::read_to_string(repository.path("kiln-out/result.json")).unwrap()).unwrap();
    assert_eq!(repository.channel("shop/site/pipeline"), baked["images"][0]["digest"].as_str().unwrap());
    assert!(ran.stdout.contains("### pipeline:v1.0.0"), "{ran}");
    assert!(!repository.path("kiln-out/.token").exists(), "the token stays");
}
