//! Makes a bootable disk from Debian's packages, without root: mmdebstrap and
//! `mke2fs -d` in a namespace, then `layout.rs` around the root file system.
//!
//! ```text
//!  unshare ── build.sh ── mmdebstrap ──── setup.sh      site settings, initramfs
//!                │              └──────── customize.sh  units, network, GRUB
//!                └─────── mke2fs -d ──► disk ◄── layout.rs  GPT, MBR, ESP
//! ```
//!
//! For an ordinary user the namespace maps root to that user and every other
//! id to his range of subordinate ids (subuid(5)). So root's files are the
//! user's own, folders that only he may enter are no obstacle (mmdebstrap's own
//! `--mode=unshare` stops at a home of mode 0700), and the disk file can be
//! written from inside. Everything runs in a pid namespace too: when its first
//! process is killed, the kernel kills all of it.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::cleanup::remove_path;
use kiln_model::ledger::Resource;
use kiln_model::machine::Context;
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_process as process;

use super::Site;
use super::layout::{self, BootImages};
use super::suite::Maker;

/// Size of the disk: little more than what a few packages need. Whoever wants
/// more says so in `[disk]`, and the root file system grows. Whole GiB, as EBS
/// has them.
const SIZE: u64 = 2 << 30;

/// What a small server has. No recommended packages: a template adds what it
/// needs. `acl` is for Ansible, which becomes other users by it.
const PACKAGES: &str = "linux-image-amd64,grub-pc-bin,grub-efi-amd64-bin,grub2-common,\
    systemd-sysv,systemd-timesyncd,udev,dbus,libpam-systemd,libnss-myhostname,\
    e2fsprogs,fdisk,openssh-server,cloud-init,cloud-guest-utils,sudo,acl,\
    curl,ca-certificates,netbase,iproute2,iputils-ping,procps,less,vim-tiny,\
    logrotate,tzdata,xz-utils,zstd";

/// What runs in the namespace: file name, text.
const FILES: [(&str, &str); 5] = [
    ("build.sh", include_str!("debian/build.sh")),
    ("setup.sh", include_str!("debian/setup.sh")),
    ("customize.sh", include_str!("debian/customize.sh")),
    ("initramfs-hook", include_str!("debian/initramfs-hook")),
    ("mke2fs.conf", include_str!("debian/mke2fs.conf")),
];

/// Names in `PATH`, and the folders where Debian has programs for root, which
/// an ordinary user's `PATH` lacks.
const SBIN: &str = ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";

/// How long the removal of half a root directory may take.
const REMOVAL: Duration = Duration::from_secs(60);

/// Makes Debian disks with mmdebstrap.
pub(super) struct Mmdebstrap {
    /// Holds during the making, and leaves no trace in the disk.
    pub(super) site: Site,
}

#[async_trait]
impl Maker for Mmdebstrap {
    fn recipe(&self) -> String {
        let mut recipe = format!("{SIZE} {PACKAGES}");
        FILES.iter().for_each(|(name, text)| recipe.extend(["\n", name, "\n", text]));
        recipe
    }

    async fn make(&self, suite: &str, out: &Path, context: &Context) -> Result<()> {
        let namespace = Namespace::find()?;
        namespace.probe().await?;
        // Beside the disk, since a root directory is more than a tmpfs should hold.
        let work = out.with_extension("making");
        let removal = work.clone();
        let what = format!("remove {}", work.display());
        let ticket = context.scope.before(Resource::Path { path: work.clone() }, &what, REMOVAL, move || remove(removal))?;
        let images = self.root(&namespace, suite, out, &work, context).await;
        context.scope.undo(ticket).await?;
        let (images, esp) = images?;
        let disk = File::options().read(true).write(true).open(out).trying(|| format!("open {}", out.display()))?;
        let layout = tokio::task::spawn_blocking(move || layout::write(&disk, &images, esp));
        layout.await.trying(|| "make the disk bootable".into())?
    }
}

impl Mmdebstrap {
    /// Makes the root file system in the disk `out`; gives GRUB's images for it
    /// and the ESP's volume id, which is in its fstab.
    async fn root(&self, namespace: &Namespace, suite: &str, out: &Path, work: &Path, context: &Context) -> Result<(BootImages, u32)> {
        let (work, out) = (absolute(work)?, absolute(out)?);
        self.prepare(&work)?;
        let disk = File::create(&out).trying(|| format!("make {}", out.display()))?;
        disk.set_len(SIZE).trying(|| format!("make {}", out.display()))?;

        let esp_id = random_id()?;
        let esp: u32 = u32::from_str_radix(&esp_id[..8], 16).trying(|| "read a random number".into())?;
        let resolved = if suite == "bullseye" { "" } else { ",systemd-resolved" };
        let mut command = namespace.command();
        command.arg(work.join("build.sh"));
        for (name, value) in [
            ("SUITE", suite.into()),
            ("MIRROR", self.site.mirror.clone().unwrap_or_default()),
            ("INCLUDE", format!("{PACKAGES}{resolved}")),
            ("ROOT_UUID", random_id()?),
            ("ESP_UUID", format!("{:04X}-{:04X}", esp >> 16, esp & 0xffff)),
            ("ROOT_OFFSET", layout::ROOT_START.to_string()),
            ("ROOT_SIZE", (layout::root_size(SIZE) / 1024).to_string()),
        ] {
            command.env(format!("KILN_{name}"), value);
        }
        command.env("KILN_WORK", &work).env("KILN_DISK", &out).env("TMPDIR", work.join("tmp"));
        self.environment(&mut command);

        let what = format!("mmdebstrap of {suite}");
        let mut say = |stream, line: &str| context.reports.output("base", stream, line);
        let built = process::run_lines(&context.scope, command, &what, &mut say).await;
        built.map_err(|error| explain(error, suite))?;
        let image = |name: &str| {
            let path = work.join(name);
            std::fs::read(&path).trying(|| format!("read {}", path.display()))
        };
        Ok((BootImages { boot: image("boot.img")?, core: image("core.img")?, efi: image("BOOTX64.EFI")? }, esp))
    }

    /// Makes the work folder, with the scripts and apt's site settings.
    fn prepare(&self, work: &Path) -> Result<()> {
        if let Some(mirror) = &self.site.mirror {
            // It goes through sed into sources.list.
            let fits = |c: char| c.is_ascii_alphanumeric() || "-._~:/@%+,=".contains(c);
            let known = ["http://", "https://", "file:/"].iter().any(|scheme| mirror.starts_with(scheme));
            if !known || !mirror.chars().all(fits) {
                let wrong = Error::new(Code::Usage, format!("{mirror:?} cannot be a mirror of Debian"));
                return Err(wrong.next("write `[mirror]` as \"https://host/debian\""));
            }
        }
        // A bake that was killed may have left one of this name.
        remove_path(work)?;
        let write = |name: &str, text: &str| {
            let path = work.join(name);
            std::fs::write(&path, text)?;
            let mode = if text.starts_with("#!") { 0o755 } else { 0o644 };
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))
        };
        let made = std::fs::create_dir(work)
            // Not umask's choice: in the namespace, apt's own user must get through.
            .and_then(|()| std::fs::set_permissions(work, PermissionsExt::from_mode(0o755)))
            .and_then(|()| std::fs::create_dir(work.join("tmp")))
            .and_then(|()| FILES.iter().try_for_each(|(name, text)| write(name, text)));
        made.trying(|| format!("prepare {}", work.display()))?;
        if let Some(own) = &self.site.ca_certificates {
            // apt trusts this file in place of the system's, not beside it.
            let mut all = std::fs::read("/etc/ssl/certs/ca-certificates.crt").unwrap_or_default();
            all.extend(std::fs::read(own).trying(|| format!("read ca_certificates {}", own.display()))?);
            std::fs::write(work.join("ca.pem"), all).trying(|| format!("write {}", work.join("ca.pem").display()))?;
        }
        write("site.conf", &self.apt_settings(work)?).trying(|| "write apt's settings".into())
    }

    /// apt.conf(5) of the site.
    fn apt_settings(&self, work: &Path) -> Result<String> {
        let mut text = String::new();
        let mut set = |key: &str, value: &str| match value.contains(['"', '\\', '\n']) {
            true => Err(Error::new(Code::Usage, format!("{value:?} cannot be given to apt")).next("leave out quotes and backslashes")),
            false => writeln!(text, "{key} \"{value}\";").trying(|| "write apt's settings".into()),
        };
        if let Some(proxy) = &self.site.proxy {
            set("Acquire::http::Proxy", proxy)?;
            set("Acquire::https::Proxy", proxy)?;
        }
        if self.site.ca_certificates.is_some() {
            set("Acquire::https::CaInfo", &work.join("ca.pem").to_string_lossy())?;
        }
        Ok(text)
    }

    /// Nothing of the caller's environment decides what is in a base, apart
    /// from the way to the mirror.
    fn environment(&self, command: &mut Command) {
        let path = std::env::var("PATH").unwrap_or_default() + SBIN;
        let proxies = ["http_proxy", "https_proxy", "no_proxy"];
        let kept: Vec<_> = proxies.into_iter().filter(|_| self.site.proxy.is_none()).collect();
        for (name, _) in std::env::vars_os() {
            let keep = name.to_str().is_some_and(|name| kept.contains(&name));
            if !keep {
                command.env_remove(name);
            }
        }
        command.env("PATH", path).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        // Its decompressor takes about 60 MiB a thread.
        command.env("DPKG_DEB_THREADS_MAX", "2");
    }
}

/// The namespaces in which this user is root.
struct Namespace {
    unshare: PathBuf,
    root: bool,
}

impl Namespace {
    fn find() -> Result<Self> {
        let root = rustix::process::geteuid().is_root();
        let programs = ["mmdebstrap", "mke2fs", "newuidmap", "newgidmap"];
        for name in programs.into_iter().take(if root { 2 } else { 4 }) {
            program(name)?;
        }
        Ok(Self { unshare: program("unshare")?, root })
    }

    /// `unshare …`, to which a program and its arguments are to be added.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.unshare);
        if !self.root {
            // Root is the caller, the others come from subuid(5); util-linux 2.38.
            command.args(["--user", "--map-root-user", "--map-auto"]);
        }
        command.args(["--mount", "--pid", "--fork", "--kill-child"]);
        command
    }

    /// Whether they can be had, before anything is made or downloaded.
    async fn probe(&self) -> Result<()> {
        let mut command = self.command();
        command.arg("true");
        let Err(error) = process::run_async(command).await else { return Ok(()) };
        let tail = error.details().join("\n");
        let what = "a Debian base is built in a namespace of its own, and this machine does not give one";
        Err(Error::new(Code::Missing, what).because(error).next(self.way_out(&tail)))
    }

    fn way_out(&self, tail: &str) -> String {
        if self.root {
            return "kiln needs CAP_SYS_ADMIN as root: run it in a container with that capability, or as an ordinary user".into();
        }
        let user = std::env::var("USER").unwrap_or_else(|_| "$USER".into());
        let listed = |file: &str| {
            let uid = rustix::process::getuid().as_raw().to_string();
            let text = std::fs::read_to_string(file).unwrap_or_default();
            text.lines().filter_map(|line| line.split(':').next()).any(|name| name == user || name == uid)
        };
        if tail.contains("unrecognized option") {
            "install util-linux 2.38 or later, or run kiln as root".into()
        } else if !listed("/etc/subuid") || !listed("/etc/subgid") {
            format!("give this user a range of ids: `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`")
        } else {
            "allow user namespaces: `sudo sysctl kernel.unprivileged_userns_clone=1` (Debian), \
             `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu)"
                .into()
        }
    }
}

/// Removes a folder that may hold files of subordinate ids, which only the
/// namespace can remove.
///
/// # Errors
/// When it cannot be removed.
pub async fn remove(path: PathBuf) -> Result<()> {
    // The kernel may still be ending the processes of the namespace.
    for attempt in 0_u32.. {
        let Err(error) = remove_path(&path) else { break };
        let Ok(namespace) = Namespace::find() else { return Err(error) };
        let mut command = namespace.command();
        command.args(["rm", "-rf", "--one-file-system"]).arg(&path);
        match process::run_async(command).await {
            Ok(_) => break,
            Err(error) if attempt == 5 => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
    Ok(())
}

/// What to do next after the build failed, by what it said last.
fn explain(error: Error, suite: &str) -> Error {
    let tail = error.details().join("\n");
    let any = |texts: &[&str]| texts.iter().any(|text| tail.contains(text));
    if error.kind() == Code::DiskFull {
        error
    } else if any(&["does not have a Release file", "404  Not Found", "404 Not Found"]) {
        error.code(Code::Base).next(format!("check that the mirror has the suite {suite}, with {suite}-updates and {suite}-security"))
    } else if any(&["NO_PUBKEY", "keyring", "is not signed", "not live until", "is expired"]) {
        error.code(Code::Base).next("update this machine's keys and clock: `apt-get install debian-archive-keyring`, `timedatectl`")
    } else if any(&["resolving", "Could not connect", "Connection timed out", "Unable to connect", "Failed to fetch"]) {
        error.code(Code::Infrastructure).next("check the network, or set `[mirror]` or `[proxy]` in kiln's config.toml; then run it again")
    } else if any(&["Permission denied", "Operation not permitted"]) {
        error.code(Code::Base).next("put $KILN_HOME on a local file system that is not mounted nosuid, nodev or noexec")
    } else {
        error.code(Code::Base).next("see the lines above; `kiln doctor` checks what this machine lacks")
    }
}

/// Where a program is, in `PATH` or where Debian has those for root.
fn program(name: &str) -> Result<PathBuf> {
    let beside = || SBIN.split(':').filter(|folder| !folder.is_empty()).find_map(|folder| process::find(&format!("{folder}/{name}")));
    process::find(name).or_else(beside).ok_or_else(|| {
        let missing = Error::new(Code::Missing, format!("a Debian base needs the program `{name}`, which is missing on this machine"));
        missing.next("install what it takes: `apt-get install mmdebstrap e2fsprogs uidmap util-linux`")
    })
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).trying(|| format!("find {}", path.display()))
}

/// A random UUID from the kernel (random(4)).
fn random_id() -> Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").trying(|| "read a random number".into())?;
    let id = id.trim();
    if id.len() == 36 {
        Ok(id.to_owned())
    } else {
        Err(io::Error::from(io::ErrorKind::InvalidData)).trying(|| "read a random number".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(site: Site) -> Mmdebstrap {
        Mmdebstrap { site }
    }

    #[test]
    fn site_settings_reach_apt_and_not_the_recipe() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own.pem");
        std::fs::write(&own, "OWN\n").unwrap();
        let site = Site { proxy: Some("http://p:3128".into()), mirror: Some("http://m/debian".into()), ca_certificates: Some(own) };
        let (maker, work) = (with(site), folder.path().join("disk.making"));
        maker.prepare(&work).unwrap();
        let conf = std::fs::read_to_string(work.join("site.conf")).unwrap();
        assert!(conf.contains("Acquire::http::Proxy \"http://p:3128\";\nAcquire::https::Proxy"), "{conf}");
        assert!(conf.contains("ca.pem"), "{conf}");
        assert!(std::fs::read_to_string(work.join("ca.pem")).unwrap().ends_with("OWN\n"));
        assert_eq!(maker.recipe(), with(Site::default()).recipe());
        assert_eq!(std::fs::metadata(work.join("build.sh")).unwrap().permissions().mode() & 0o777, 0o755);
        let evil = Site { proxy: Some("http://p\";Evil \"1".into()), ..Site::default() };
        assert_eq!(with(evil).apt_settings(&work).unwrap_err().kind(), Code::Usage);
    }

    #[test]
    fn a_mirror_cannot_smuggle_anything_into_the_image() {
        let folder = tempfile::tempdir().unwrap();
        let try_one = |mirror: &str| {
            let maker = with(Site { mirror: Some(mirror.into()), ..Site::default() });
            maker.prepare(&folder.path().join("disk.making")).map_err(|error| error.kind())
        };
        assert_eq!(try_one("https://m:8080/debian/20260101T000000Z/"), Ok(()));
        for wrong in ["m/debian", "http://m/debian bookworm", "http://m/|e;s|x", "http://m/&", "http://m/\ndeb x"] {
            assert_eq!(try_one(wrong), Err(Code::Usage), "{wrong}");
        }
    }

    /// Builds a real base: `KILN_TEST_BASE=/some/base.raw cargo test -- --ignored`.
    #[tokio::test]
    #[ignore = "downloads 150 MB of packages and takes a minute or two"]
    async fn a_real_base() {
        let suite = std::env::var("KILN_TEST_SUITE").unwrap_or_else(|_| "bookworm".into());
        let folder = tempfile::tempdir_in(std::env::var("KILN_TEST_FOLDER").unwrap_or_else(|_| "/var/tmp".into())).unwrap();
        let (context, _) = crate::base::testing::context(folder.path(), "one");
        let out = std::env::var("KILN_TEST_BASE").map_or_else(|_| folder.path().join("disk"), PathBuf::from);
        with(Site::default()).make(&suite, &out, &context).await.unwrap();
        assert_eq!(std::fs::metadata(&out).unwrap().len(), SIZE);
        assert!(!out.with_extension("making").exists());
        let table = gpt::GptConfig::new().open(&out).unwrap();
        assert_eq!(table.partitions().len(), 3);
    }

    #[tokio::test]
    #[ignore = "needs the packages of mmdebstrap, and the network"]
    async fn dropping_it_leaves_nothing() {
        let folder = tempfile::tempdir_in(std::env::var("KILN_TEST_FOLDER").unwrap_or_else(|_| "/var/tmp".into())).unwrap();
        let (context, _) = crate::base::testing::context(folder.path(), "one");
        let out = folder.path().join("disk");
        let (maker, unpacking) = (with(Site::default()), out.with_extension("making").join("root/usr/bin"));
        let until_it_unpacks = async {
            while !unpacking.join("dpkg").exists() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            result = maker.make("bookworm", &out, &context) => result.unwrap(),
            () = until_it_unpacks => {}
        }
        let failed = context.scope.unwind().await;
        assert!(failed.is_empty(), "{failed:?}");
        assert!(!out.with_extension("making").exists());
        let mine = folder.path().to_string_lossy().into_owned();
        let left = std::fs::read_dir("/proc").unwrap().filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok());
        let left: Vec<_> = left.map(|line| String::from_utf8_lossy(&line).into_owned()).filter(|line| line.contains(&mine)).collect();
        assert_eq!(left, Vec::<String>::new());
    }

    #[test]
    fn failures_say_what_to_do() {
        for (tail, code, next) in [
            ("E: Failed to fetch http://m/x  Could not connect to m:80", Code::Infrastructure, "[mirror]"),
            ("E: The repository 'http://m nosuch Release' does not have a Release file.", Code::Base, "nosuch-updates"),
            ("W: GPG error: NO_PUBKEY 1234", Code::Base, "debian-archive-keyring"),
            ("boom", Code::Base, "kiln doctor"),
        ] {
            let error = explain(Error::new(Code::Failed, "mmdebstrap failed").detail(tail), "nosuch");
            assert_eq!(error.kind(), code, "{tail}");
            assert!(error.next_move().unwrap().contains(next), "{error:?}");
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = program("kiln-has-no-such-program").unwrap_err();
        assert_eq!(error.kind(), Code::Missing);
        assert!(error.next_move().unwrap().contains("apt-get install"));
    }

    #[test]
    fn every_script_is_valid_shell() {
        let folder = tempfile::tempdir().unwrap();
        let work = folder.path().join("x.making");
        with(Site::default()).prepare(&work).unwrap();
        for (name, _) in FILES.iter().filter(|(_, text)| text.starts_with("#!")) {
            assert!(Command::new("sh").arg("-n").arg(work.join(name)).status().unwrap().success(), "{name}");
        }
    }
}
