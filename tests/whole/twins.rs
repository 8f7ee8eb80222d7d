//! Bakes at the same moment.

use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;

use crate::context::{Kiln, Ran, Template, new_word, with_base};

#[test]
fn two_bakes_of_the_same_at_the_same_moment_do_the_work_once() {
    let (kiln, word) = (Kiln::shared(), new_word());
    let steps = format!("[[provision]]\nname = \"one\"\nshell = 'echo {word}'\n[[provision]]\nname = \"two\"\nshell = 'echo two'\n");
    let template = Template::debian("twins", &steps);
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
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn twenty_bakes_of_four_templates_do_no_work_twice() {
    let kiln = with_base();
    let templates: Vec<Template> =
        (0..4).map(|n| Template::debian(&format!("crowd-{n}"), &format!("[[provision]]\nname = \"one\"\nshell = 'echo {n}'\n"))).collect();
    let all: Vec<_> = (0..20).map(|n| ["bake", templates[n % 4].path(), "--json"]).collect();
    let start = |arguments: &[&str; 3]| kiln.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let children: Vec<_> = all.iter().map(start).collect();
    let wait = |child: std::process::Child| std::thread::spawn(move || child.wait_with_output().unwrap());
    let waiting: Vec<_> = children.into_iter().map(wait).collect();
    let ran: Vec<Ran> = waiting.into_iter().zip(&all).map(|(waiting, arguments)| Ran::of(waiting.join().unwrap(), arguments)).collect();
    let mut digests: Vec<String> = Vec::new();
    let (mut boots, mut steps) = (0, 0);
    for ran in &ran {
        assert_eq!(ran.status, 0, "{ran}");
        let events = ran.events();
        let ended = |phase: &str, name: &str| {
            events
                .iter()
                .filter(|event| event["event"] == "end" && event["phase"] == phase && event["name"] == name && event["cached"] == false)
                .count()
        };
        boots += ended("boot", "boot");
        steps += ended("step", "one");
        digests.push(events.last().unwrap()["images"][0]["digest"].as_str().unwrap().to_owned());
    }
    digests.sort_unstable();
    digests.dedup();
    assert_eq!((boots, steps, digests.len()), (1, 4, 4));
    assert_eq!(kiln.ok(&["images", "--json"]).json().as_array().map(Vec::len), Some(4));
    assert_eq!(kiln.leftovers(), Vec::<PathBuf>::new());
}
