use super::*;
use kiln_model::ledger::Ledger;

fn sh(script: &str) -> Command {
    let mut command = piped("sh");
    command.arg("-c").arg(script);
    command
}

fn alive(pid: u32) -> bool {
    start_time(pid).is_some() && !is_zombie(pid)
}

fn until(mut condition: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < limit, "still not so after 20 s");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn output_and_failure() {
    assert_eq!(run(sh("echo out; echo err >&2")).unwrap().stdout, b"out\n");
    let error = run(sh("echo because >&2; exit 3")).unwrap_err();
    assert_eq!(error.to_string(), "sh failed (exit status 3)");
    assert_eq!(error.details(), ["because"]);
    let error = run(sh("echo No space left on device >&2; exit 1")).unwrap_err();
    assert_eq!(error.kind(), Code::DiskFull);
}

#[test]
fn a_missing_program_says_how_to_install_it() {
    let error = run(Command::new("/nonexistent/qemu-img")).unwrap_err();
    assert_eq!(error.kind(), Code::Missing);
    assert!(error.next_move().unwrap().contains("apt-get install qemu-system-x86 qemu-utils"));
}

#[test]
fn killing_takes_the_whole_group() {
    let child = spawn(sh("sleep 1000 & echo $!; wait"), "test", Vec::new()).unwrap();
    let mut line = String::new();
    BufReader::new(child.take_stdout().unwrap()).read_line(&mut line).unwrap();
    let grandchild: u32 = line.trim().parse().unwrap();
    assert!(alive(grandchild));
    child.kill();
    assert_eq!(describe(child.wait()), "killed by SIGKILL");
    until(|| !alive(grandchild));
}

#[test]
fn dropping_kills_and_a_leader_that_ends_takes_its_group_along() {
    let child = spawn(sh("sleep 1000"), "test", Vec::new()).unwrap();
    let pid = child.pid();
    drop(child);
    until(|| !alive(pid));

    let child = spawn(sh("sleep 1000 2>/dev/null & echo $!"), "test", Vec::new()).unwrap();
    let mut line = String::new();
    BufReader::new(child.take_stdout().unwrap()).read_line(&mut line).unwrap();
    until(|| !alive(line.trim().parse().unwrap()));
    assert!(child.wait().success());
}

#[test]
fn reaping_needs_pid_and_start_together() {
    let child = spawn(sh("sleep 1000"), "test", Vec::new()).unwrap();
    assert!(!reap_process(child.pid(), child.start() + 1).unwrap());
    assert!(!reap_process(child.pid(), 0).unwrap());
    assert!(!reap_process(0, 1).unwrap());
    assert!(alive(child.pid()));
    assert!(reap_process(child.pid(), child.start()).unwrap());
    child.wait();
    assert!(!reap_process(child.pid(), child.start()).unwrap());
}

#[test]
fn children_die_with_the_spawner_not_with_the_thread_that_asked() {
    let child = thread::spawn(|| spawn(sh("sleep 1000"), "test", Vec::new()).unwrap()).join().unwrap();
    // PDEATHSIG follows the spawning thread: had the asking thread forked, the
    // child would be dead by the time this one is up and answers.
    assert_eq!(run(sh("echo hi")).unwrap().stdout, b"hi\n");
    assert!(alive(child.pid()));
}

#[test]
fn inherited_descriptors_keep_their_numbers() {
    let (mut read, write) = io::pipe().unwrap();
    let fd = OwnedFd::from(write);
    // dash redirects to single digits only, so that the path is used instead.
    let script = format!("echo hello > /proc/self/fd/{}", fd.as_raw_fd());
    let child = spawn(sh(&script), "test", vec![fd]).unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello\n");
    assert!(child.wait().success());
}

#[tokio::test]
async fn lines_come_live_and_the_ledger_is_struck() {
    let folder = tempfile::tempdir().unwrap();
    let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
    let mut seen = Vec::new();
    run_lines(&scope, sh("echo one; echo two >&2; printf three"), "test", &mut |stream, line| seen.push((stream, line.to_owned())))
        .await
        .unwrap();
    seen.sort_by_key(|(_, line)| line.clone());
    assert_eq!(seen[0], (Stream::Stdout, "one".into()));
    assert_eq!(seen[2], (Stream::Stderr, "two".into()));
    let error = run_lines(&scope, sh("echo why >&2; exit 4"), "test", &mut |_, _| {}).await.unwrap_err();
    assert_eq!(error.details(), ["why"]);
    scope.close();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn unwinding_ends_what_was_registered() {
    let folder = tempfile::tempdir().unwrap();
    let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
    let (child, _) = spawn_registered(&scope, sh("sleep 1000"), "test", Vec::new()).unwrap();
    assert!(scope.unwind().await.is_empty());
    assert!(child.status().is_some());
}
