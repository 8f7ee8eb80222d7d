//! Several templates in one call.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::context::{Kiln, Ran, Template, new_word, tool, wait_until};

fn from(name: &str, base: &str) -> Template {
    Template::new(&format!(
        "[image]\nname = \"{name}\"\nversion = \"1\"\n[base]\n{base}\n[[provision]]\nname = \"say\"\nshell = 'echo hello'\n"
    ))
}

/// The messages of an image's events of one kind.
fn messages(events: &[Value], kind: &str, image: &str) -> Vec<String> {
    let own = events.iter().filter(|event| event["event"] == kind && event["image"] == image);
    own.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_circle_or_the_same_image_twice_starts_nothing() {
    let kiln = Kiln::fresh();
    let (a, b, c) = (from("a", "image = \"b\""), from("b", "image = \"c:1\""), from("c", "image = \"a\""));
    kiln.run(&["bake", a.path(), b.path(), c.path()]).fails(2, &["a:1 from b:1 from c:1 from a:1"]);
    let ran = kiln.run(&["bake", a.path(), b.path(), a.path(), "--json"]);
    ran.fails(2, &["two of the templates make a:1"]);
    assert_eq!((ran.events().len(), &ran.events()[0]["error"]["code"]), (1, &"usage".into()), "{ran}");
    // The mistakes of all are shown.
    let (d, e) = (from("d", "imag = \"b\""), from("e", "debain = \"bookworm\""));
    kiln.run(&["bake", d.path(), e.path()]).fails(2, &["imag", "debain"]);
    assert!(kiln.leftovers().is_empty());
}

#[test]
fn what_starts_from_a_failed_image_is_not_baked() {
    let kiln = Kiln::fresh();
    let (a, b, c) = (from("a", "image = \"nowhere\""), from("b", "image = \"a\""), from("c", "image = \"b:1\""));
    let other = from("other", "image = \"nowhere:2\"");
    let ran = kiln.run(&["bake", a.path(), b.path(), c.path(), other.path(), "--json"]);
    ran.fails(1, &["no image `nowhere` is in the store"]);
    let events = ran.events();
    assert!(messages(&events, "warning", "a:1").concat().contains("no image `nowhere`"), "{ran}");
    assert!(messages(&events, "warning", "other:1").concat().contains("no image `nowhere`"), "{ran}");
    assert_eq!(messages(&events, "warning", "b:1"), ["not baked: it starts from a:1, which was not baked"], "{ran}");
    assert_eq!(messages(&events, "warning", "c:1"), ["not baked: it starts from b:1, which was not baked"], "{ran}");
    let done = events.last().unwrap();
    assert_eq!((&done["event"], &done["ok"], &done["images"]), (&"done".into(), &false.into(), &Value::Array(vec![])), "{ran}");
    assert!(done["error"]["cause"].as_str().unwrap().contains("was not baked: no image `nowhere`"), "{ran}");
    assert!(kiln.leftovers().is_empty());
}

#[test]
fn an_interrupt_stops_all_of_them() {
    // Answers nothing.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = |path: &str| format!("url = \"http://{}/{path}\"\nchecksum = \"sha256:{}\"", server.local_addr().unwrap(), "0".repeat(64));
    let kiln = Kiln::fresh();
    let (a, b, c) = (from("a", &base("a")), from("b", &base("b").replace("sha256:0", "sha256:1")), from("c", "image = \"a\""));
    let arguments = ["bake", a.path(), b.path(), c.path(), "--json"];
    let child = kiln.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let connected: Vec<_> = (0..2.min(std::thread::available_parallelism().unwrap().get())).map(|_| server.accept().unwrap()).collect();
    wait_until(Duration::from_secs(10), || kiln.leftovers().len() >= 2 * connected.len());
    tool("kill", &["-INT", &child.id().to_string()]);
    let ran = Ran::of(child.wait_with_output().unwrap(), &arguments);
    assert_eq!(ran.status, 130, "{ran}");
    let events = ran.events();
    for image in ["a:1", "b:1"].iter().take(connected.len()) {
        assert!(messages(&events, "note", image).concat().contains("nothing is left behind"), "{ran}");
    }
    assert!(messages(&events, "warning", "c:1").concat().contains("not baked"), "{ran}");
    assert_eq!(events.last().unwrap()["error"]["code"], "interrupted", "{ran}");
    assert_eq!(kiln.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn one_image_starts_from_another_of_the_same_call() {
    let kiln = Kiln::shared();
    let word = new_word();
    let a = Template::debian("graph-a", &format!("[[provision]]\nname = \"first\"\nshell = 'echo {word} | tee /etc/first'\n"));
    let b = Template::new(
        "[image]\nname = \"graph-b\"\nversion = \"1\"\n[base]\nimage = \"graph-a\"\n\
         [[provision]]\nname = \"second\"\nshell = 'echo second after $(cat /etc/first)'\n",
    );
    let result = a.0.path().join("result.json");
    let ran = kiln.ok(&["bake", b.path(), a.path(), "--json", "--result", result.to_str().unwrap()]);
    let events = ran.events();
    let of = |kind: &str| -> Vec<&Value> { events.iter().filter(|event| event["event"] == kind).collect() };
    let order: Vec<&Value> = of("baked").iter().map(|event| &event["name"]).collect();
    assert_eq!(order, ["graph-a", "graph-b"], "{ran}");
    let (last, others) = events.split_last().unwrap();
    assert!(others.iter().all(|event| event["image"] == "graph-a:1" || event["image"] == "graph-b:1"), "{ran}");
    let images: Vec<&Value> = last["images"].as_array().unwrap().iter().map(|image| &image["name"]).collect();
    assert_eq!(images, ["graph-b", "graph-a"], "as the templates were named: {ran}");
    assert_eq!(serde_json::from_str::<Value>(&std::fs::read_to_string(result).unwrap()).unwrap(), *last);
    let lines: Vec<_> = of("output").iter().map(|event| (event["image"].as_str().unwrap(), event["line"].as_str().unwrap())).collect();
    assert_eq!(lines, [("graph-a:1", word.as_str()), ("graph-b:1", &format!("second after {word}"))], "{ran}");
    assert!(ran.stderr.contains("graph-b:1: base graph-a"), "{ran}");
    let inspect = |image: &str| kiln.ok(&["inspect", "--json", image]).json();
    assert_eq!(inspect("graph-b")["base_digest"], inspect("graph-a")["disks"][0]["digest"]);
}
