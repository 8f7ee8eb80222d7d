//! Two bakes at the same moment.

use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;

use crate::checkpoints::with_base;
use crate::context::{Ran, Template};

#[test]
fn two_bakes_of_the_same_at_the_same_moment_do_the_work_once() {
    let kiln = with_base();
    let template =
        Template::debian("twins", "[[provision]]\nname = \"one\"\nshell = 'echo one'\n[[provision]]\nname = \"two\"\nshell = 'echo two'\n");
    let arguments = ["bake", template.path(), "--json"];
    let start = || kiln.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let ran = [start(), start()].map(|child| Ran::of(child.wait_with_output().unwrap(), &arguments));
    assert!(ran.iter().all(|ran| ran.status == 0), "{}{}", ran[0], ran[1]);
    let events = ran.each_ref().map(Ran::events);
    let count = |which: &dyn Fn(&Value) -> bool| events.each_ref().map(|events| events.iter().filter(|event| which(event)).count());
    let mut steps = count(&|event| event["event"] == "end" && event["phase"] == "step" && event["cached"] == false);
    let waited = count(&|event| {
        event["event"] == "note" && event["message"].as_str().unwrap() == "another bake is making this very image: waiting for it"
    });
    // Whoever ran no step is the one that waited.
    assert_eq!(steps.map(|steps| usize::from(steps == 0)), waited, "{}{}", ran[0], ran[1]);
    steps.sort_unstable();
    assert_eq!(steps, [0, 2], "{}{}", ran[0], ran[1]);
    let digests = events.each_ref().map(|events| events.last().unwrap()["images"][0]["digest"].clone());
    assert!(digests[0].is_string() && digests[0] == digests[1], "{}{}", ran[0], ran[1]);
    assert_eq!(kiln.leftovers(), Vec::<PathBuf>::new());
}
