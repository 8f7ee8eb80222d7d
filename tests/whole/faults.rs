//! Bad luck: what fails, and that nothing stays.

use std::process::{Child, Stdio};
use std::time::Duration;

use crate::context::{Kiln, Ran, Template, share, wait_until};

const LONG: Duration = Duration::from_secs(600);

/// Nothing of a bake is left, and no image of it can be seen.
#[track_caller]
fn nothing_left(kiln: &Kiln, name: &str) {
    assert!(kiln.processes().is_empty(), "processes stay: {:?}", kiln.processes());
    assert!(kiln.leftovers().is_empty(), "left: {:?}", kiln.leftovers());
    kiln.run(&["inspect", name]).fails(1, &[]);
}

/// A home of its own that shares the base with the others, so that what is
/// left behind there is this test's.
fn own_home() -> Kiln {
    let (shared, own) = (Kiln::with_nginx(), Kiln::fresh());
    share(&shared, &own, "bases");
    own
}

/// The same, and the booted base, where the boot is not what fails.
fn own_home_with_checkpoints() -> Kiln {
    let (shared, own) = (Kiln::shared(), own_home());
    for folder in ["checkpoints", "claims"] {
        share(&shared, &own, folder);
    }
    own
}

struct Bake {
    child: Child,
    log: std::path::PathBuf,
}

impl Bake {
    fn start(kiln: &Kiln, template: &Template, more: &[&str]) -> Self {
        let log = template.0.path().join("log");
        let file = std::fs::File::create(&log).unwrap();
        let mut arguments = vec!["bake", template.path()];
        arguments.extend(more);
        let child = kiln.command(&arguments).stderr(file).stdout(Stdio::null()).spawn().unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    #[track_caller]
    fn until(&self, text: &str) {
        wait_until(LONG, || self.log().contains(text));
    }

    fn signal(&self, name: &str) {
        assert!(std::process::Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap().success());
    }

    fn end(mut self) -> Ran {
        let status = self.child.wait().unwrap();
        let output = std::process::Output { status, stdout: Vec::new(), stderr: self.log().into_bytes() };
        Ran::of(output, &["bake"])
    }
}

#[test]
fn a_script_that_fails_in_its_middle_names_the_line() {
    let kiln = own_home_with_checkpoints();
    let template =
        Template::debian("middle", "[[provision]]\nname = \"broken\"\nshell = '''\necho begun\nls /does/not/exist\necho never\n'''\n");
    let ran = kiln.run(&["bake", template.path(), "--json"]);
    ran.fails(1, &["line 2", "ls /does/not/exist", "exit status 2", "step: broken"]);
    assert!(!ran.stderr.contains("| never"), "{ran}");
    let done = ran.events().pop().unwrap();
    assert_eq!((&done["ok"], &done["error"]["code"], &done["error"]["step"]), (&false.into(), &"step".into(), &"broken".into()));
    nothing_left(&kiln, "middle");
}

#[test]
fn a_guest_that_powers_itself_off_is_told_from_one_that_panics() {
    let kiln = own_home_with_checkpoints();
    let template = Template::debian("off", "[[provision]]\nname = \"off\"\nshell = 'systemctl poweroff --force --force; sleep 600'\n");
    kiln.run(&["bake", template.path()]).fails(1, &["powered", "step: off"]);
    let template = Template::debian(
        "panic",
        "[[provision]]\nname = \"crash\"\nshell = 'echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 600'\n",
    );
    kiln.run(&["bake", template.path()]).fails(1, &["panic", "step: crash"]);
    nothing_left(&kiln, "panic");
}

#[test]
fn a_step_that_takes_too_long_is_ended() {
    let kiln = own_home_with_checkpoints();
    let template = Template::debian("slow", "[[provision]]\nname = \"slow\"\ntimeout = \"5s\"\nshell = 'sleep 900'\n");
    let begun = std::time::Instant::now();
    kiln.run(&["bake", template.path()]).fails(1, &["step: slow"]);
    assert!(begun.elapsed() < Duration::from_secs(600));
    nothing_left(&kiln, "slow");
}

#[test]
fn a_killed_qemu_is_told_and_ctrl_c_cleans_up() {
    let kiln = own_home_with_checkpoints();
    let template = Template::debian("killed", "[[provision]]\nname = \"long\"\nshell = 'echo step runs; sleep 900'\n");
    let bake = Bake::start(&kiln, &template, &[]);
    bake.until("| step runs");
    for pid in kiln.processes() {
        let _ = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status();
    }
    bake.end().fails(1, &["step: long"]);
    nothing_left(&kiln, "killed");

    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        let bake = Bake::start(&kiln, &template, &[]);
        wait_until(LONG, || !kiln.processes().is_empty());
        bake.signal(signal);
        bake.end().fails(status, &["cleaning up", "nothing is left behind"]);
        nothing_left(&kiln, "killed");
    }
}

#[test]
fn after_kill_9_no_qemu_survives_and_the_next_command_clears_up() {
    let kiln = own_home();
    let template = Template::debian("nine", "[[provision]]\nname = \"long\"\nshell = 'echo step runs; sleep 900'\n");
    for moment in ["boot ...", "| step runs"] {
        let bake = Bake::start(&kiln, &template, &[]);
        bake.until(moment);
        bake.signal("KILL");
        assert_eq!(bake.end().status, -9);
        wait_until(Duration::from_secs(20), || kiln.processes().is_empty());
        assert!(!kiln.leftovers().is_empty());
        kiln.ok(&["reap"]);
        nothing_left(&kiln, "nine");
    }
    kiln.ok(&["verify"]);
    kiln.ok(&["prune"]);
}

#[test]
fn on_failure_keep_leaves_a_disk_and_says_how_to_boot_it() {
    let kiln = own_home_with_checkpoints();
    let template = Template::debian("kept", "[[provision]]\nshell = 'echo left > /root/left; sync; false'\n");
    let ran = kiln.run(&["bake", template.path(), "--on-failure", "keep"]);
    ran.fails(1, &["qemu-system-x86_64"]);
    assert!(kiln.processes().is_empty() && kiln.leftovers().is_empty());
    assert!(std::fs::read_dir(kiln.home.join("kept")).unwrap().count() >= 1);
}
