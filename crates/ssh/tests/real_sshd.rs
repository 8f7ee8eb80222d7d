//! Against a real OpenSSH server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy knows only `#[test]` functions as tests")]

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_model::Code;
use kiln_model::event::Stream;
use kiln_model::guest::{Command, Exit, Guest, GuestExt as _};
use kiln_model::tree::Tree;
use kiln_ssh::testing::Sshd;
use kiln_ssh::{Keys, Target, connect};

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + seconds(20);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whether a process has this text among its arguments.
fn runs(text: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let state = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        line.split(|b| *b == 0).any(|part| part == text.as_bytes()) && !state.contains(") Z ")
    })
}

#[tokio::test]
async fn another_host_key_is_refused_at_once() {
    let sshd = Sshd::start();
    let other = Arc::new(Keys::generate().unwrap());
    sshd.guest().await;
    let began = Instant::now();
    let error = connect(Target { keys: Arc::clone(&other), ..sshd.target() }, seconds(30)).await.err().unwrap();
    assert_eq!(error.kind(), Code::HostKey);
    assert!(error.to_string().contains(&other.host_fingerprint()) && error.to_string().contains(&sshd.keys.host_fingerprint()), "{error}");
    assert!(began.elapsed() < seconds(20));
}

#[tokio::test]
async fn a_port_that_never_speaks_and_one_that_nobody_listens_on() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let folder = tempfile::tempdir().unwrap();
    let target = Target {
        host: "127.0.0.1".into(),
        port,
        user: "root".into(),
        keys: Arc::new(Keys::generate().unwrap()),
        folder: folder.path().into(),
    };
    let began = Instant::now();
    let error = connect(target.clone(), seconds(3)).await.err().unwrap();
    assert_eq!(error.kind(), Code::Unreachable);
    assert!(error.chain().contains("no SSH banner"), "{}", error.chain());
    assert!(began.elapsed() < seconds(20));
    drop(listener);
    let error = connect(target, seconds(1)).await.err().unwrap();
    assert!(error.chain().contains("refused"), "{}", error.chain());
}

#[tokio::test]
async fn a_guest_that_comes_up_late_is_reached_soon() {
    let keys = Arc::new(Keys::generate().unwrap());
    // Accepts without a word, as QEMU does for a guest that does not listen.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let folder = tempfile::tempdir().unwrap();
    let first = Sshd::start_with(Arc::clone(&keys));
    let target = Target { port, folder: folder.path().into(), ..first.target() };
    let connecting = tokio::spawn(async move { connect(target, seconds(30)).await });
    tokio::time::sleep(seconds(2)).await;
    // From here on every connection is carried to the real server.
    let real = first.port;
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for stream in silent.incoming() {
            let stream = stream.unwrap();
            let server = std::net::TcpStream::connect(("127.0.0.1", real)).unwrap();
            for (mut from, mut to) in
                [(stream.try_clone().unwrap(), server.try_clone().unwrap()), (server.try_clone().unwrap(), stream.try_clone().unwrap())]
            {
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            }
            held.push((stream, server));
        }
    });
    let began = Instant::now();
    let guest = connecting.await.unwrap().unwrap();
    assert!(began.elapsed() < seconds(20), "{:?}", began.elapsed());
    assert_eq!(guest.output(&Command::new("echo up")).await.unwrap().stdout, "up\n");
}

#[tokio::test]
async fn commands_end_as_they_ended() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    for (line, exit) in [
        ("exit 0", Exit::Status(0)),
        ("exit 7", Exit::Status(7)),
        ("no-such-command", Exit::Status(127)),
        ("kill -KILL $$", Exit::Signal("KILL".into())),
        ("kill -TERM $$", Exit::Signal("TERM".into())),
    ] {
        assert_eq!(guest.output(&Command::new(line)).await.unwrap().exit, exit, "{line}");
    }
    let input = vec![b'x'; 3_000_000];
    assert_eq!(
        guest.output(&Command::new("wc -c; echo \"it's $((1+1))\"; printf end").stdin(input.clone())).await.unwrap().stdout,
        "3000000\nit's 2\nend\n"
    );
    // Input that nobody reads holds nothing up.
    assert_eq!(guest.output(&Command::new("exit 3").stdin(input)).await.unwrap().exit, Exit::Status(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_come_live_and_in_order_from_several_commands_at_once() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let began = Instant::now();
    let mut seen = Vec::new();
    let line = "for i in 1 2 3; do echo $i; sleep 0.3; echo e$i >&2; sleep 0.3; done; printf '10%%\\r20%%\\rdone\\nlast'";
    let command = Command::new(line);
    let noisy = Command::new("seq 200000");
    let mut on_line = |stream, line: &str| seen.push((stream, line.to_owned(), began.elapsed()));
    let (exit, other) = tokio::join!(guest.execute(&command, &mut on_line), guest.output(&noisy));
    assert!(exit.unwrap().success());
    assert_eq!(other.unwrap().stdout.lines().count(), 200_000);
    let texts: Vec<_> = seen.iter().map(|(_, line, _)| line.as_str()).collect();
    assert_eq!(texts, ["1", "e1", "2", "e2", "3", "e3", "done", "last"]);
    assert_eq!((seen[0].0, seen[1].0), (Stream::Stdout, Stream::Stderr));
    assert!(seen[7].2 - seen[3].2 > Duration::from_millis(400), "not live: {seen:?}");
}

#[tokio::test]
async fn more_commands_at_once_than_the_server_allows() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let all = (0..30).map(|n| {
        let guest = Arc::clone(&guest);
        tokio::spawn(async move { guest.output(&Command::new(format!("sleep 0.1; echo {n}"))).await.unwrap().stdout })
    });
    for (n, task) in all.collect::<Vec<_>>().into_iter().enumerate() {
        assert_eq!(task.await.unwrap(), format!("{n}\n"));
    }
}

/// A shell with a child, a child in a process group of its own, and one in a
/// session of its own, all noisy.
const FAMILY: &str = "sh -c 'sleep SALT' & set -m; sleep SALT & set +m; setsid sleep SALT & while :; do echo noise; done";

#[tokio::test]
async fn a_limit_in_time_kills_everything_in_the_guest() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let command = Command::new(FAMILY.replace("SALT", "9101")).timeout(Duration::from_millis(800));
    let began = Instant::now();
    let error = guest.execute(&command, &mut |_, _| {}).await.unwrap_err();
    assert_eq!(error.kind(), Code::Timeout);
    assert!(error.details().is_empty(), "{error:?}");
    assert!(began.elapsed() < seconds(60));
    until("everything is killed", || !runs("9101")).await;
    assert_eq!(guest.output(&Command::new("echo fine")).await.unwrap().stdout, "fine\n");
}

#[tokio::test]
async fn dropping_the_call_kills_everything_in_the_guest() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let task = {
        let guest = Arc::clone(&guest);
        tokio::spawn(async move { guest.execute(&Command::new(FAMILY.replace("SALT", "9102")), &mut |_, _| {}).await })
    };
    until("it starts", || runs("9102")).await;
    task.abort();
    until("it is killed", || !runs("9102")).await;
    // Even at once, before its pid is known.
    let command = Command::new("exec sleep 9103");
    drop(tokio::time::timeout(Duration::from_millis(2), guest.execute(&command, &mut |_, _| {})).await);
    tokio::time::sleep(seconds(2)).await;
    assert!(!runs("9103"));
}

#[tokio::test]
async fn a_daemon_that_holds_the_output_open_holds_nothing_up() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let began = Instant::now();
    let output = guest.output(&Command::new("sleep 9104 & echo started")).await.unwrap();
    assert_eq!((output.exit, output.stdout.as_str()), (Exit::Status(0), "started\n"));
    assert!(began.elapsed() < seconds(60));
    guest.output(&Command::new("pkill -f '^sleep 9104'")).await.unwrap();
}

#[tokio::test]
async fn a_lost_connection_is_made_again() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let (command, mut on_line) = (Command::new("sleep 60"), |_: Stream, _: &str| {});
    let (result, ()) = tokio::join!(guest.execute(&command, &mut on_line), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        sshd.kill_connections();
    });
    assert_eq!(result.unwrap_err().kind(), Code::Unreachable);
    assert_eq!(guest.output(&Command::new("echo again")).await.unwrap().stdout, "again\n");
    // Lost between two commands.
    sshd.kill_connections();
    assert_eq!(guest.output(&Command::new("echo again")).await.unwrap().stdout, "again\n");
    guest.close().await;
    assert_eq!(guest.output(&Command::new("echo again")).await.unwrap().stdout, "again\n");
}

#[tokio::test]
async fn a_new_boot_is_told_by_its_id() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let id = guest.boot_id().await.unwrap();
    assert_eq!(id.len(), 36);
    let error = guest.wait_for_new_boot(&id, seconds(1)).await.unwrap_err();
    assert_eq!(error.kind(), Code::Unreachable);
    sshd.kill_connections();
    guest.wait_for_new_boot("an older one", seconds(10)).await.unwrap();
}

#[tokio::test]
async fn openssh_itself_gets_in_with_the_access_given() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let access = guest.ssh_access().unwrap();
    for file in [&access.key_file, &access.known_hosts] {
        assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let output = std::process::Command::new("ssh").args(access.ssh_arguments()).arg("echo in").output().unwrap();
    assert_eq!(output.stdout, b"in\n", "{}", String::from_utf8_lossy(&output.stderr));
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn trees_go_in_and_out_whole() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let source = sshd.path().join("source");
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(140));
    std::fs::create_dir_all(source.join("empty")).unwrap();
    std::fs::create_dir_all(source.join(&long).parent().unwrap()).unwrap();
    for (name, bits) in [("run.sh", 0o755), ("private", 0o600), ("with space ü", 0o640), (long.as_str(), 0o444), ("-dash", 0o4755)] {
        std::fs::write(source.join(name), name).unwrap();
        std::fs::set_permissions(source.join(name), std::fs::Permissions::from_mode(bits)).unwrap();
    }
    std::fs::set_permissions(source.join("empty"), std::fs::Permissions::from_mode(0o2750)).unwrap();
    std::os::unix::fs::symlink("run.sh", source.join("link")).unwrap();
    std::os::unix::fs::symlink("/nowhere", source.join("dangling")).unwrap();

    // Into a folder whose `there` is a link to a folder, which stays one.
    let there = sshd.path().join("in the guest/sub");
    std::fs::create_dir_all(there.join("real")).unwrap();
    std::os::unix::fs::symlink("real", there.join("empty")).unwrap();
    std::fs::set_permissions(&there, std::fs::Permissions::from_mode(0o711)).unwrap();
    guest.upload(&Tree::walk(&source).unwrap(), there.to_str().unwrap()).await.unwrap();
    assert!(there.join("empty").is_symlink());
    assert_eq!(mode(&there), 0o711);

    // And below one that is missing.
    let there = sshd.path().join("missing/too");
    guest.upload(&Tree::walk(&source).unwrap(), there.to_str().unwrap()).await.unwrap();
    for (name, bits) in [("run.sh", 0o755), ("private", 0o600), ("with space ü", 0o640), (long.as_str(), 0o444), ("-dash", 0o4755)] {
        assert_eq!(std::fs::read_to_string(there.join(name)).unwrap(), name);
        assert_eq!(mode(&there.join(name)), bits, "{name}");
        assert_eq!(std::fs::metadata(there.join(name)).unwrap().uid(), std::fs::metadata(sshd.path()).unwrap().uid());
    }
    assert_eq!(mode(&there.join("empty")), 0o2750);
    assert_eq!(std::fs::read_link(there.join("dangling")).unwrap(), Path::new("/nowhere"));

    std::fs::remove_file(there.join("dangling")).unwrap();
    let back = sshd.path().join("back/again");
    guest.download(there.to_str().unwrap(), &back).await.unwrap();
    assert_eq!(std::fs::read_link(back.join("link")).unwrap(), Path::new("run.sh"));
    assert_eq!(mode(&back.join("private")), 0o600);
    assert_eq!(std::fs::read_to_string(back.join(&long)).unwrap(), long);
    assert!(back.join("empty").is_dir());

    // A link that points out is refused by name.
    std::os::unix::fs::symlink("/etc/passwd", there.join("evil")).unwrap();
    let error = guest.download(there.to_str().unwrap(), &back).await.unwrap_err();
    assert_eq!(error.kind(), Code::Refused);
    assert!(error.chain().contains("evil"), "{}", error.chain());
}

#[tokio::test]
async fn a_file_goes_where_it_was_sent() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let file = sshd.path().join("one.conf");
    std::fs::write(&file, "1").unwrap();
    let tree = Tree::walk(&file).unwrap();
    let root = sshd.path().join("guest");
    let at = |name: &str| root.join(name);
    guest.upload(&tree, at("etc/two.conf").to_str().unwrap()).await.unwrap();
    guest.upload(&tree, &format!("{}/", at("conf.d").display())).await.unwrap();
    assert!(at("etc/two.conf").is_file() && at("conf.d/one.conf").is_file());
    let error = guest.upload(&tree, at("etc").to_str().unwrap()).await.unwrap_err();
    assert!(error.details()[0].contains("is a folder"), "{error:?}");
    assert!(at("etc/two.conf").is_file());
    guest.download(at("etc/two.conf").to_str().unwrap(), &at("local")).await.unwrap();
    assert_eq!(std::fs::read(at("local/two.conf")).unwrap(), b"1");
    let error = guest.download("/no/such/file", &at("local")).await.unwrap_err();
    assert!(error.details()[0].contains("/no/such"), "{error:?}");
    std::fs::write(at("file"), "x").unwrap();
    assert!(guest.upload(&tree, at("file/below").to_str().unwrap()).await.is_err());
    // It still answers.
    assert!(guest.output(&Command::new("true")).await.unwrap().exit.success());
}

#[tokio::test]
async fn large_files_go_through() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let source = sshd.path().join("large");
    let file = std::fs::File::create(&source).unwrap();
    file.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"in the middle", 40 << 20).unwrap();
    let sum = |path: &Path| std::process::Command::new("sha256sum").stdin(std::fs::File::open(path).unwrap()).output().unwrap().stdout;
    let there = sshd.path().join("there/");
    guest.upload(&Tree::walk(&source).unwrap(), &format!("{}/", there.display())).await.unwrap();
    assert_eq!(sum(&there.join("large")), sum(&source));
    guest.download(there.join("large").to_str().unwrap(), &sshd.path().join("back")).await.unwrap();
    assert_eq!(sum(&sshd.path().join("back/large")), sum(&source));
}
