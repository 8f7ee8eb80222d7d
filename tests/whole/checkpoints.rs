//! Checkpoints: what need not be done again, and that going on from one gives
//! a fresh machine.

use std::collections::HashSet;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::context::{Kiln, Ran, Template, contains, new_word, with_base};

/// How often the kernel's generator was seeded anew: `base_crng.generation`,
/// read from the kernel's own memory.
const GENERATION: &str = r#"
import struct
symbols = (line.split() for line in open('/proc/kallsyms'))
address = next(int(words[0], 16) for words in symbols if words[2] == 'base_crng')
core = open('/proc/kcore', 'rb', 0)
header = core.read(64)
offset, = struct.unpack_from('<Q', header, 32)
size, count = struct.unpack_from('<HH', header, 54)
core.seek(offset)
table = core.read(size * count)
for n in range(count):
    kind, _, at, start, _, length, _, _ = struct.unpack_from('<IIQQQQQQ', table, n * size)
    if kind == 1 and start <= address < start + length:
        core.seek(at + address - start)
        words = struct.unpack('<6Q', core.read(48))
        # struct base_crng: 32 bytes of key, in some kernels the time of birth, the generation.
        print('generation', words[4] if words[4] < 1 << 24 else words[5])
"#;

/// What a step tells of the machine.
const TELL: &str = r#"
python3 /root/generation.py
echo "boot $(cat /proc/sys/kernel/random/boot_id)"
echo "hostkey $(ssh-keygen -lf /run/kiln/ssh_host_ed25519_key | cut -d' ' -f2)"
echo "client $(sha256sum < /run/kiln/authorized_keys)"
echo "now $(date +%s)"
"#;

fn template(name: &str, last: &str) -> Template {
    let template = Template::debian(
        name,
        &format!(
            "[disk]\nsize = \"3GiB\"\n[[provision]]\nname = \"script\"\n\
             file = {{ source = \"generation.py\", destination = \"/root/generation.py\" }}\n\
             [[provision]]\nname = \"slow\"\nshell = '''\nsleep 6\necho kept > /run/kept\n{TELL}'''\n\
             [[provision]]\nname = \"last\"\nshell = '''\n{last}\n{TELL}'''\n"
        ),
    );
    template.write("generation.py", GENERATION);
    template
}

/// What a step has said, by its first word.
fn said(ran: &Ran, step: &str, word: &str) -> String {
    let events = ran.events();
    let lines = events.iter().filter(|event| event["event"] == "output" && event["name"] == step);
    let found = lines.filter_map(|event| event["line"].as_str()?.strip_prefix(word)).next();
    found.unwrap_or_else(|| panic!("`{step}` does not say {word}: {ran}")).trim().to_owned()
}

/// Whether a phase was cached; none: there was no such phase.
fn phase(ran: &Ran, name: &str) -> Option<bool> {
    let events = ran.events();
    let end = events.iter().find(|event| event["event"] == "end" && event["name"] == name)?;
    end["cached"].as_bool()
}

fn baked(ran: &Ran) -> Value {
    ran.events().into_iter().find(|event| event["event"] == "baked").unwrap_or_else(|| panic!("{ran}"))
}

/// The steps, and whether each was cached.
fn steps(ran: &Ran) -> Vec<(String, bool)> {
    let baked = baked(ran);
    let steps = baked["steps"].as_array().unwrap().iter();
    steps.map(|step| (step["name"].as_str().unwrap().to_owned(), step["cached"] == Value::Bool(true))).collect()
}

fn warned(ran: &Ran, what: &str) -> bool {
    ran.events().iter().any(|event| event["event"] == "warning" && event["message"].as_str().unwrap().contains(what))
}

/// The files named `name` of all checkpoints.
fn kept(kiln: &Kiln, name: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, name: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, name, found);
            } else if path.file_name().unwrap() == name {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&kiln.home.join("cache/checkpoints"), name, &mut found);
    found
}

fn flip(path: &Path, offset: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[test]
fn an_edit_runs_what_is_new_on_a_machine_that_is_no_twin() {
    let kiln = with_base();
    let one = kiln.ok(&["bake", template("edited", "true").path(), "--json"]);
    assert_eq!(phase(&one, "boot"), Some(false), "{one}");
    assert_eq!(steps(&one), [("script".into(), false), ("slow".into(), false), ("last".into(), false)]);

    let edited = template("edited", "test -e /run/kept; curl -fsS -o /dev/null http://deb.debian.org/");
    let plan = kiln.ok(&["plan", edited.path()]);
    assert!(plan.stdout.contains("`script` changed since bake"), "{plan}");
    let two = kiln.ok(&["bake", edited.path(), "--json"]);
    assert_eq!(phase(&two, "boot"), None, "it booted: {two}");
    assert_eq!(phase(&two, "resume"), Some(true), "{two}");
    assert_eq!(steps(&two), [("script".into(), true), ("slow".into(), true), ("last".into(), false)]);

    // The same machine went on, with its memory …
    assert_eq!(said(&one, "slow", "boot "), said(&two, "last", "boot "));
    // … and is no twin: seeded anew, on time, with this bake's keys.
    let generation = |ran: &Ran, step: &str| said(ran, step, "generation ").parse::<u64>().unwrap();
    assert!(generation(&two, "last") > generation(&one, "slow"), "{one}{two}");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let theirs: u64 = said(&two, "last", "now ").parse().unwrap();
    assert!(now.abs_diff(theirs) < 120, "{theirs}, and it is {now}");
    for word in ["hostkey ", "client "] {
        assert_ne!(said(&one, "slow", word), said(&two, "last", word));
    }

    // Another template goes on from the booted base.
    let other = Template::debian(
        "other",
        "[disk]\nsize = \"3GiB\"\n[[provision]]\nname = \"say\"\nshell = 'cat /proc/sys/kernel/random/boot_id'\n",
    );
    let other = kiln.ok(&["bake", other.path(), "--json"]);
    assert_eq!((phase(&other, "boot"), phase(&other, "resume")), (None, Some(true)), "{other}");

    // Nothing changed: the same image, and nothing runs.
    let again = kiln.ok(&["bake", edited.path(), "--json"]);
    assert!(steps(&again).iter().all(|(_, cached)| *cached), "{again}");
    assert_eq!((phase(&again, "boot"), phase(&again, "resume"), phase(&again, "seal")), (None, None, None), "{again}");
    assert_eq!(baked(&two)["digest"], baked(&again)["digest"]);
    assert_ne!(baked(&one)["digest"], baked(&two)["digest"]);
    assert_eq!(kiln.leftovers(), Vec::<PathBuf>::new());
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn a_damaged_checkpoint_is_noticed_and_made_again() {
    let kiln = with_base();
    kiln.ok(&["bake", template("damaged", "true").path(), "--json"]);
    for (round, name) in ["state", "layer-1.qcow2"].iter().enumerate() {
        let files = kept(&kiln, name);
        assert!(!files.is_empty(), "no checkpoint has {name}");
        // Checkpoints share layers by hard links: flipped twice, they would be whole.
        let mut flipped = HashSet::new();
        for file in &files {
            let meta = std::fs::metadata(file).unwrap();
            if flipped.insert(meta.ino()) {
                flip(file, (meta.len() / 2).min(300_000));
            }
        }
        let ran = kiln.ok(&["bake", template("damaged", &format!("echo {round}")).path(), "--json"]);
        assert!(warned(&ran, "damaged"), "{name}: {ran}");
        // Whatever was damaged, what is kept now is whole.
        let ran = kiln.ok(&["bake", template("damaged", &format!("echo {round} again")).path(), "--json"]);
        assert!(!warned(&ran, "damaged"), "{name}: {ran}");
        assert_eq!(phase(&ran, "boot"), None, "{name}: {ran}");
    }
}

#[test]
fn no_secret_is_in_the_cache() {
    let (kiln, word) = (Kiln::shared(), new_word());
    let before = kept(&kiln, "state");
    let secret = "correct-horse-battery-staple-9271";
    let template = Template::debian(
        "secretive",
        &format!(
            "[variables]\ntoken = {{ env = \"TOKEN_OF_TEST\", sensitive = true }}\n\
         [[provision]]\nname = \"before\"\nshell = 'sleep 3; echo {word}'\n\
         [[provision]]\nname = \"use\"\nsecrets = [\"token\"]\nshell = '''\nsleep 3\ntest \"$(wc -c < /run/kiln/secrets/token)\" -gt 30\n'''\n\
         [[provision]]\nname = \"after\"\nshell = 'sleep 3'\n"
        ),
    );
    let output = kiln.command(&["bake", template.path(), "--json"]).env("TOKEN_OF_TEST", secret).output().unwrap();
    let ran = Ran::of(output, &["bake"]);
    assert_eq!(ran.status, 0, "{ran}");
    assert!(kept(&kiln, "state").iter().any(|file| !before.contains(file)), "no memory was kept at all");
    let mut files = Vec::new();
    for name in ["state", "layer-0.qcow2", "layer-1.qcow2", "layer-2.qcow2", "layer-3.qcow2", "checkpoint.json", "traces.json"] {
        files.extend(kept(&kiln, name));
    }
    files.extend(std::fs::read_dir(kiln.home.join("history")).unwrap().map(|entry| entry.unwrap().path()));
    for file in files {
        assert!(!contains(&file, secret), "{}", file.display());
    }
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn a_checkpoint_that_was_killed_is_none() {
    use std::io::{BufRead as _, BufReader};
    use std::process::Stdio;

    let kiln = with_base();
    let template = Template::debian("killed", "[disk]\nsize = \"3GiB\"\n[[provision]]\nname = \"slow\"\nshell = 'sleep 5'\n");
    let mut child = kiln.command(&["bake", template.path(), "--json"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // The booted base is kept, and then the machine after the step: the second
    // one dies while it is written.
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let began = |line: &String| line.contains("\"begin\"") && line.contains("\"checkpoint\"");
    assert!(lines.any(|line| began(&line)) && lines.any(|line| began(&line)));
    child.kill().unwrap();
    child.wait().unwrap();

    kiln.ok(&["reap"]);
    assert_eq!((kiln.leftovers(), kiln.processes()), (Vec::<PathBuf>::new(), Vec::new()));
    let listed = kiln.ok(&["prune", "--cache", "--dry-run", "--json"]).json();
    assert_eq!(listed["checkpoints"].as_array().unwrap().len(), 1, "{listed}");
    // What was kept before is used, and what was not is made again.
    let ran = kiln.ok(&["bake", template.path(), "--json"]);
    assert_eq!((phase(&ran, "boot"), phase(&ran, "resume")), (None, Some(true)), "{ran}");
    assert_eq!(steps(&ran), [("slow".into(), false)]);
    assert_eq!(kept(&kiln, "checkpoint.json").len(), 2);
    let unfinished = kiln.home.join("cache/checkpoints/.new");
    assert_eq!(std::fs::read_dir(unfinished).map_or(0, Iterator::count), 0);
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn no_two_images_of_one_checkpoint_have_an_identity_in_common() {
    let kiln = with_base();
    let template =
        |name: &str| Template::debian(name, &format!("[disk]\nsize = \"3GiB\"\n[[provision]]\nname = \"say\"\nshell = 'echo {name}'\n"));
    let user_data = kiln.home.join("user-data");
    std::fs::write(&user_data, "#cloud-config\nhostname: clone\n").unwrap();
    let identities = ["left", "right"].map(|name| {
        kiln.ok(&["bake", template(name).path()]);
        // What a machine made of the image makes for itself, where it is deployed.
        let line = "cloud-init status --wait >/dev/null; cat /etc/machine-id; cut -d' ' -f2 /etc/ssh/ssh_host_*_key.pub";
        let said = kiln.ok(&["run", name, "--user-data", user_data.to_str().unwrap(), "--exec", line]).stdout;
        said.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    assert!(identities.iter().all(|lines| lines.len() >= 2), "{identities:?}");
    assert!(identities[0].iter().all(|line| !identities[1].contains(line)), "{identities:?}");
}
