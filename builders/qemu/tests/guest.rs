//! Real guests: what this builder promises, on a base that boots.
//!
//! Ignored by default, since each takes the time of a boot. To run them:
//!
//! ```sh
//! KILN_TEST_BASE=/path/to/base.raw cargo test -p kiln-qemu --test guest -- --ignored --test-threads 1
//! ```
//!
//! The base is read only. It must read systemd credentials (Debian 12 and
//! later do) and start under BIOS and UEFI.

// A test fails by panicking, and says why on standard error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_model::Code;
use kiln_model::base::{Base, DiskFile, DiskFormat};
use kiln_model::block::Content;
use kiln_model::cleanup::Scope;
use kiln_model::event::{Event, Reporter, Reports};
use kiln_model::guest::{Command, GuestExt as _};
use kiln_model::home::Home;
use kiln_model::image::Firmware;
use kiln_model::ledger::Ledger;
use kiln_model::machine::{Builder as _, Context, Machine, Start};
use kiln_model::secret::Redactor;
use kiln_qemu::{Accelerator, Boot, QemuBuilder, QemuKind, Settings};

struct Print;

impl Reporter for Print {
    fn report(&self, event: Event) {
        eprintln!("{event:?}");
    }
}

struct Bake {
    _folder: tempfile::TempDir,
    home: Home,
    context: Context,
}

impl Bake {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(Some(folder.path().join("home, with a comma"))).unwrap();
        let work = home.work().join("b");
        std::fs::create_dir(&work).unwrap();
        let context = Context {
            bake: "01TEST".into(),
            scope: Arc::new(Scope::new(Ledger::create(&home.ledger(), "01TEST").unwrap())),
            reports: Reports::new(Arc::new(Print), Redactor::default()),
            work,
        };
        Self { _folder: folder, home, context }
    }

    fn builder(&self, settings: Settings) -> QemuBuilder {
        QemuKind::new(&self.home).builder(settings)
    }

    async fn start(&self, base: &Base, start: &Start) -> Box<dyn Machine> {
        let since = Instant::now();
        let machine = self.builder(Settings::default()).start(base, start, &self.context).await.unwrap();
        eprintln!("started in {:.1} s", since.elapsed().as_secs_f64());
        if std::env::var_os("KILN_TEST_TIMES").is_some() {
            eprintln!("{}", said(&*machine, "cat /proc/uptime; systemd-analyze; journalctl -u ssh -o short-monotonic --no-pager").await);
        }
        machine
    }

    /// Nothing may be left in the ledger, nor a process.
    fn end(self) {
        self.context.scope.close();
        assert_eq!(std::fs::read_dir(self.home.ledger()).unwrap().count(), 0, "the ledger still holds something");
    }
}

fn base() -> Base {
    let path = PathBuf::from(std::env::var("KILN_TEST_BASE").expect("KILN_TEST_BASE names a raw base"));
    let size = std::fs::metadata(&path).unwrap().len();
    base_on(DiskFile { path, format: DiskFormat::Raw, size })
}

fn base_on(disk: DiskFile) -> Base {
    Base { label: "test".into(), disk: disk.into(), firmware: Firmware::BiosUefi, architecture: "amd64".into(), credentials: Some(true) }
}

async fn said(machine: &dyn Machine, line: &str) -> String {
    let output = machine.guest().output(&Command::new(line)).await.unwrap();
    assert!(output.exit.success(), "{line}: {output:?}");
    output.stdout.trim().to_owned()
}

const MINUTES: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a guest"]
async fn a_machine_from_its_start_to_its_blocks() {
    let bake = Bake::new();
    let base = base();
    let before = std::fs::metadata(&base.file().unwrap().path).unwrap().modified().unwrap();
    let size = base.size() + (1 << 30);
    let machine = bake.start(&base, &Start { disk_size: Some(size), ..Start::default() }).await;
    assert_eq!(said(&*machine, "id -un").await, "root");
    let blocks: u64 = said(&*machine, "df -B1 --output=size / | tail -1").await.parse().unwrap();
    assert!(blocks > base.size(), "the root file system has {blocks} bytes of a disk of {size}");
    said(&*machine, "head -c 20000000 /dev/urandom > /root/noise; echo kept > /etc/kept; fstrim -a; sync").await;

    let boot = machine.guest().boot_id().await.unwrap();
    let since = Instant::now();
    let _ = machine.guest().output(&Command::new("systemctl --no-block reboot")).await;
    eprintln!("asked in {:.1} s", since.elapsed().as_secs_f64());
    machine.guest().wait_for_new_boot(&boot, MINUTES).await.unwrap();
    eprintln!("rebooted in {:.1} s, up for {}", since.elapsed().as_secs_f64(), said(&*machine, "cat /proc/uptime").await);
    assert_eq!(said(&*machine, "cat /etc/kept").await, "kept");

    let since = Instant::now();
    let stopped = machine.stop(MINUTES).await.unwrap();
    eprintln!("stopped in {:.1} s", since.elapsed().as_secs_f64());
    let since = Instant::now();
    let files = stopped.files().await.unwrap().expect("an ext4 root");
    assert!(String::from_utf8(files.read("/usr/lib/os-release").unwrap()).unwrap().contains("ID=debian"));
    assert_eq!(files.read("/etc/kept").unwrap(), b"kept\n");
    assert!(files.list("/root").unwrap().contains(&"noise".into()));
    eprintln!("files in {:.2} s", since.elapsed().as_secs_f64());

    let mut blocks = stopped.blocks().await.unwrap();
    assert_eq!(blocks.size(), size);
    let extents = tokio::task::spawn_blocking(move || blocks.extents()).await.unwrap().unwrap();
    let total = |content| extents.iter().filter(|e| e.content == content).map(|e| e.length).sum::<u64>() >> 20;
    let (data, backing, zero) = (total(Content::Data), total(Content::Backing), total(Content::Zero));
    eprintln!("MiB: {data} data, {backing} backing, {zero} zero, in {} extents", extents.len());
    assert!(data > 19 && data < 400 && backing > 100 && zero > 1024, "{data} {backing} {zero}");
    assert_eq!(extents.iter().map(|e| e.length).sum::<u64>(), size);

    // The stopped disk is something to start from, and so on.
    let again = base_on(stopped.disk().unwrap());
    let machine = bake.start(&again, &Start::default()).await;
    assert_eq!(said(&*machine, "cat /etc/kept; ls /root").await, "kept\nnoise");
    machine.kill().await;
    drop(files);
    drop(stopped);
    assert_eq!(std::fs::metadata(&base.file().unwrap().path).unwrap().modified().unwrap(), before);
    bake.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a guest"]
async fn uefi_and_the_seed_are_ways_too() {
    let bake = Bake::new();
    let base = Base { credentials: Some(false), ..base() };
    let builder = bake.builder(Settings { boot: Some(Boot::Uefi), ..Settings::default() });
    let since = Instant::now();
    let machine = builder.start(&base, &Start::default(), &bake.context).await.unwrap();
    eprintln!("started with UEFI and a seed in {:.1} s", since.elapsed().as_secs_f64());
    said(&*machine, "test -d /sys/firmware/efi && test -s /run/kiln/ssh_host_ed25519_key").await;
    machine.kill().await;

    // The user's own data beside the way in.
    let data = b"#cloud-config\nbootcmd: [ [ sh, -c, 'echo mine > /run/mine' ] ]\n".to_vec();
    let start = Start { user_data: Some(data), ..Start::default() };
    let machine = bake.builder(Settings::default()).start(&base, &start, &bake.context).await.unwrap();
    assert_eq!(said(&*machine, "cat /run/mine").await, "mine");
    machine.kill().await;
    bake.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a guest"]
async fn ends_that_nobody_asked_for() {
    let bake = Bake::new();
    let base = base();
    let machine = bake.start(&base, &Start::default()).await;
    let guest = machine.guest();
    let asked = tokio::spawn(async move { guest.output(&Command::new("systemctl poweroff; sleep 1000")).await });
    let error = tokio::time::timeout(MINUTES, machine.ended()).await.unwrap();
    assert_eq!((error.kind(), error.to_string().as_str()), (Code::MachineEnded, "the guest powered itself off"));
    eprintln!("{error:?}");
    machine.kill().await;
    asked.abort();

    let machine = bake.start(&base, &Start::default()).await;
    let guest = machine.guest();
    let asked = tokio::spawn(async move { guest.output(&Command::new("sysctl kernel.sysrq=1; echo c > /proc/sysrq-trigger")).await });
    let error = tokio::time::timeout(MINUTES, machine.ended()).await.unwrap();
    assert_eq!((error.kind(), error.to_string().as_str()), (Code::MachineEnded, "the guest's kernel panicked"));
    assert!(error.details().iter().any(|detail| detail.contains("sysrq")), "{error:?}");
    machine.kill().await;
    asked.abort();

    let machine = bake.start(&base, &Start::default()).await;
    let pid = qemu_pid(&bake);
    assert!(kiln_process::reap_process(pid, kiln_process::start_time(pid).unwrap()).unwrap());
    let error = tokio::time::timeout(MINUTES, machine.ended()).await.unwrap();
    assert_eq!((error.kind(), error.to_string().as_str()), (Code::MachineEnded, "QEMU ended unexpectedly (killed by SIGKILL)"));
    machine.kill().await;
    bake.end();
}

/// The pid that the ledger has of the newest process.
fn qemu_pid(bake: &Bake) -> u32 {
    let text = std::fs::read_to_string(bake.home.ledger().join("01TEST.jsonl")).unwrap();
    let line = text.lines().rfind(|line| line.contains("\"QEMU\"") && !line.contains("\"pid\":0")).unwrap();
    let value: serde_json::Value = serde_json::from_str(line).unwrap();
    u32::try_from(value["resource"]["pid"].as_u64().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a guest"]
async fn a_disk_that_stays_boots_by_the_words_that_are_printed() {
    let bake = Bake::new();
    let machine = bake.start(&base(), &Start::default()).await;
    said(&*machine, "echo kept > /etc/kept").await;
    let words = machine.keep().await.unwrap();
    eprintln!("{words}");
    let line = |begin: &str| words.lines().find_map(|line| line.strip_prefix(begin)).unwrap().trim().to_owned();
    let mut boot = kiln_process::piped("sh");
    boot.args(["-c", &line("boot it:")]);
    let qemu = kiln_process::spawn(boot, "the printed command", Vec::new()).unwrap();
    let drain = qemu.take_stdout().unwrap();
    std::thread::spawn(move || std::io::copy(&mut { drain }, &mut std::io::sink()));
    let limit = Instant::now() + MINUTES * 2;
    let answer = loop {
        assert!(Instant::now() < limit && qemu.status().is_none(), "{}", qemu.stderr_tail());
        let mut ssh = std::process::Command::new("sh");
        ssh.args(["-c", &format!("{} cat /etc/kept", line("log in:").replace("ssh -p", "timeout 30 ssh -o ConnectTimeout=20 -p"))]);
        let output = tokio::task::spawn_blocking(move || ssh.output()).await.unwrap().unwrap();
        if output.status.success() {
            break output.stdout;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    assert_eq!(answer, b"kept\n");
    qemu.kill();
    bake.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a guest"]
async fn another_host_key_is_refused() {
    // The base answers with keys of its own when nobody gives it any: here the
    // credential is spoilt on its way, by a host key that the image brings along.
    let bake = Bake::new();
    let base = base();
    let machine = bake.start(&base, &Start::default()).await;
    let script = "ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/own && install -m 700 -d /root/.ssh && cp /run/kiln/authorized_keys /root/.ssh/ && \
        printf 'HostKey /etc/ssh/own\\n' > /etc/ssh/sshd_config.d/000-own.conf && \
        sed -i 's/^HostKey.*//' /etc/ssh/sshd_config.d/00-kiln.conf && \
        printf 'f+ /etc/ssh/sshd_config.d/00-kiln.conf 0644 root root - UseDNS=no\\n' > /etc/tmpfiles.d/zz.conf && \
        mkdir -p /etc/systemd/system/ssh.service.d && \
        printf '[Service]\\nExecStartPre=/bin/sed -i s,^HostKey.*,, /etc/ssh/sshd_config.d/00-kiln.conf\\n' > /etc/systemd/system/ssh.service.d/own.conf && sync";
    said(&*machine, script).await;
    let stopped = machine.stop(MINUTES).await.unwrap();
    let error =
        bake.builder(Settings::default()).start(&base_on(stopped.disk().unwrap()), &Start::default(), &bake.context).await.err().unwrap();
    assert_eq!(error.kind(), Code::HostKey, "{error:?}");
    eprintln!("{error:?}");
    drop(stopped);
    bake.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a guest"]
async fn what_never_boots_is_told_with_console_and_screenshot() {
    let bake = Bake::new();
    let screenshot = |error: &kiln_model::Error| {
        let path = error.details().iter().find_map(|detail| detail.strip_prefix("screenshot: ")).map(PathBuf::from).unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"\x89PNG"), "{}", path.display());
        assert!(path.starts_with(bake.home.root()));
    };
    let quick = Settings { boot_timeout: Some(Duration::from_secs(20)), ..Settings::default() };

    // Nothing to boot: the firmware says so at once.
    let empty = raw(bake.home.root(), "empty.raw", &[]);
    let since = Instant::now();
    let error = bake.builder(quick.clone()).start(&empty, &Start::default(), &bake.context).await.err().unwrap();
    eprintln!("{error:?}\nafter {:.1} s", since.elapsed().as_secs_f64());
    assert_eq!(error.kind(), Code::Unreachable);
    assert!(since.elapsed() < Duration::from_secs(18));
    screenshot(&error);

    // A boot sector that halts: nothing is said, and the time runs out.
    let mut sector = vec![0xfa, 0xf4, 0xeb, 0xfd];
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    let halted = raw(bake.home.root(), "halted.raw", &sector);
    let error = bake.builder(quick).start(&halted, &Start::default(), &bake.context).await.err().unwrap();
    eprintln!("{error:?}");
    assert_eq!(error.kind(), Code::Unreachable);
    screenshot(&error);

    // A port that is taken, an accelerator that does not work, UEFI on BIOS.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ports = vec![kiln_model::machine::Port { host: listener.local_addr().unwrap().port(), guest: 80 }];
    let error = bake.builder(Settings::default()).start(&empty, &Start { ports, ..Start::default() }, &bake.context).await.err().unwrap();
    assert_eq!(error.kind(), Code::Usage, "{error:?}");
    let kvm = Settings { accelerator: Accelerator::Kvm, ..Settings::default() };
    if let Some(error) = bake.builder(kvm).start(&empty, &Start::default(), &bake.context).await.err() {
        eprintln!("{error:?}\n{:?}", error.next_move());
    }
    let checks = kiln_qemu::doctor::checks(&Settings::default(), &bake.context).await.unwrap();
    eprintln!("{checks:#?}");
    assert!(checks.iter().filter(|check| check.needed).all(|check| check.ok));
    bake.end();
}

fn raw(folder: &Path, name: &str, bytes: &[u8]) -> Base {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(64 << 20).unwrap();
    base_on(DiskFile { path, format: DiskFormat::Raw, size: 64 << 20 })
}
