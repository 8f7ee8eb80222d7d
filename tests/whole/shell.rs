//! `kiln shell`: the machine before a step.

use std::io::Write as _;
use std::process::Stdio;

use crate::context::{Kiln, Ran, Template, new_word};

const THREE: &str = "[[provision]]\nname = \"one\"\nshell = 'echo first > /etc/one'\n\
                     [[provision]]\nname = \"two\"\nshell = 'echo second > /etc/two'\n\
                     [[provision]]\nname = \"three\"\nshell = 'false'\n";

#[test]
fn a_step_that_is_not_there() {
    let template = Template::debian("shell-nowhere", THREE);
    let shell = |before: &str| Kiln::fresh().run(&["shell", template.path(), "--before", before]);
    shell("thre").fails(2, &["`--before thre`", "did you mean `three`?"]);
    for wrong in ["0", "4", "-1"] {
        assert_eq!(shell(wrong).status, 2, "{wrong}");
    }
}

#[test]
fn a_shell_before_a_step_sees_what_is_done_by_then_and_makes_no_image() {
    let (kiln, word) = (Kiln::shared(), new_word());
    let template = Template::debian("shelled", &THREE.replace("first", &word));
    let arguments = ["shell", template.path(), "--before", "2"];
    let mut command = kiln.command(&arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let typed = "cat /etc/one; test -e /etc/two || echo no two; exit 7\n";
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap(), &arguments);
    assert_eq!(ran.status, 0, "it opened, whatever its own status: {ran}");
    assert!(ran.stdout.ends_with(&format!("{word}\nno two\n")), "{ran}");
    assert!(ran.stderr.contains("and the step `one`; nothing that is done in this shell is kept"), "{ran}");
    assert!(!ran.stderr.contains("step two"), "{ran}");
    kiln.run(&["inspect", "shelled"]).fails(1, &[]);
}
