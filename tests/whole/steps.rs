//! What steps can do, on one guest, and what of it may stay.

use crate::context::{Kiln, Template, contains, tool};

const EVERYTHING: &str = r#"
[disk]
size = "3GiB"
[variables]
token = { env = "TOKEN_OF_TEST", sensitive = true }
greeting = "ahoy there"
[seal]
keep = ["/home/deploy/.ssh"]
[[provision]]
name = "user"
shell = '''
useradd -m -s /bin/bash deploy
mkdir -p /home/deploy/.ssh
echo 'ssh-ed25519 AAAA on purpose' > /home/deploy/.ssh/authorized_keys
chown -R deploy: /home/deploy/.ssh
size=$(df -B1 --output=size / | tail -1)
test "$size" -gt 2700000000
'''
[[provision]]
name = "as user"
user = "deploy"
secrets = ["token"]
env = { GREETING = "{{ var.greeting }}", QUOTES = "it's \"quoted\" $HOME" }
shell = '''
test "$(id -un)" = deploy
test "$GREETING" = "ahoy there"
test "$QUOTES" = "it's \"quoted\" \$HOME"
a=(1 2 3); test "${#a[@]}" = 3
stat -f -c %T /run/kiln/secrets/token
sha256sum < /run/kiln/secrets/token > ~/token.sha256
echo "the token is $(cat /run/kiln/secrets/token)"
'''
[[provision]]
name = "secret is gone"
shell = "test ! -e /run/kiln/secrets/token"
[[provision]]
name = "tree"
file = { source = "tree/", destination = "/srv/tree" }
[[provision]]
name = "flaky"
retries = 2
shell = "n=$(cat /run/tries || echo 0); echo $((n + 1)) > /run/tries; test $n -ge 2"
[[provision]]
name = "before reboot"
shell = "cp /proc/sys/kernel/random/boot_id /root/before"
[[provision]]
reboot = true
[[provision]]
name = "after reboot"
shell = "! cmp -s /proc/sys/kernel/random/boot_id /root/before"
[[provision]]
name = "python"
[provision.shell]
interpreter = "python3"
strict = false
inline = "open('/root/from-python', 'w').write('{{ not expanded }}')"
[[provision]]
name = "fetch"
file = { direction = "download", source = "/srv/tree", destination = "fetched" }
[[provision]]
name = "elsewhere"
only = { arch = ["riscv64"] }
shell = "exit 1"
[[test]]
name = "what stayed"
shell = '''
grep -q purpose /home/deploy/.ssh/authorized_keys
test "$(stat -c %a /srv/tree/run.sh)" = 750
test -L /srv/tree/link
test "$(cat /root/from-python)" = "{{ not expanded }}"
'''
"#;

#[test]
fn everything_steps_can_do_and_no_secret_stays() {
    let kiln = Kiln::shared();
    let template = Template::debian("steps", EVERYTHING);
    let script = template.write("tree/run.sh", "#!/bin/sh\n");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
    template.write("tree/sub/data", vec![9; 3 << 20]);
    std::os::unix::fs::symlink("run.sh", template.0.path().join("tree/link")).unwrap();

    let secret = "t0ken-b7f1c2d94e";
    let before = template.write("before", "");
    let result = template.0.path().join("result.json");
    let arguments = ["bake", template.path(), "--no-cache", "--json", "--result", result.to_str().unwrap(), "--tag", "latest"];
    let output = kiln.command(&arguments).env("TOKEN_OF_TEST", secret).output().unwrap();
    let ran = crate::context::Ran::of(output, &arguments);
    assert_eq!(ran.status, 0, "{ran}");
    assert!(ran.stderr.contains("attempt 3 of 3"), "{ran}");
    assert!(ran.stdout.contains("the token is ***"), "{ran}");
    assert_eq!(std::fs::read(template.0.path().join("fetched/sub/data")).unwrap().len(), 3 << 20);

    // Not in what was said, kept or baked.
    for text in [&ran.stdout, &ran.stderr, &std::fs::read_to_string(&result).unwrap()] {
        assert!(!text.contains(secret));
    }
    let raw = template.0.path().join("disk.raw");
    kiln.ok(&["export", "steps:latest", "-f", "raw", "-o", raw.to_str().unwrap()]);
    assert!(!contains(&raw, secret), "the secret is in the image");
    assert!(contains(&raw, "on purpose"), "the search finds what is there");
    let inspected = kiln.ok(&["inspect", "--json", "steps"]).stdout;
    assert!(!inspected.contains(secret));
    // What other tests keep there would take minutes to search.
    let (cache, before) = (kiln.home.join("cache"), before.display());
    let search = format!("find {} -type f -newer {before} -exec grep -lF {secret} {{}} +", cache.display());
    let found = tool("sh", &["-c", &format!("{search} || true")]);
    assert_eq!(found, "", "the secret is in the cache");
}

#[test]
fn what_a_step_put_there_is_not_silently_removed() {
    let kiln = Kiln::shared();
    let template = Template::debian(
        "lockout",
        "[[provision]]\nname = \"fine\"\nshell = 'true'\n[[provision]]\nname = \"keys\"\nshell = 'mkdir -p /root/.ssh; echo key > /root/.ssh/authorized_keys'\n",
    );
    kiln.run(&["bake", template.path()]).fails(1, &["step `keys` put /root/.ssh/authorized_keys", "keep = [\"/root/.ssh\"]"]);
    kiln.run(&["inspect", "lockout"]).fails(1, &[]);
}
