//! `kiln drift`: what a machine has become since it was baked.
//!
//! The machine is reached by the system's `ssh` with the user's own settings,
//! since that is how people reach it; its host key has to be known. A script
//! runs there that only reads. The status is 0 when nothing differs, and 3 when
//! something does.

use std::collections::HashMap;
use std::process::Stdio;

use kiln_contents::drift::{Asking, Drift as Found, Host, Pattern, Rules, command, compare, removed_packages, script, table};
use kiln_contents::manifest::{Installed, Manifest};
use kiln_contents::packages;
use kiln_disk::files::{DiskFiles, Pool};
use kiln_disk::overlay::OverlayDisk;
use kiln_disk::qemu_img;
use kiln_model::image::host_architecture;
use kiln_model::machine::Context;
use kiln_model::reference::Reference;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_ssh::way_in;
use kiln_store::place::images_of;
use kiln_store::{Held, Place, Store};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{App, sbom};
use crate::cli::Drift;
use crate::manifest;
use crate::session::with_context;

/// Most bytes of a machine's answer.
const ANSWER_LIMIT: u64 = 2 << 30;
/// What ssh exits with when it, and not what it ran, has failed.
const SSH_FAILED: i32 = 255;

/// What is printed with `--json`.
#[derive(Serialize)]
struct Answer<'a> {
    reference: &'a str,
    digest: Digest,
    machine: &'a str,
    hostname: &'a str,
    #[serde(flatten)]
    found: &'a Found,
}

pub(super) async fn run(app: &App, arguments: &Drift) -> Result<u8> {
    let reference: Reference = arguments.reference.parse()?;
    let place = app.place(&reference)?;
    let image = image(&*place, &reference).await?;
    let mut mutable = Vec::new();
    for text in image.config.mutable.iter().chain(&arguments.mutable) {
        mutable.push(Pattern::new(text).map_err(|why| Error::new(Code::Usage, why).next("write a path such as /var/lib/app"))?);
    }
    let store = app.store()?;
    let baked = baked(app, &*place, &store, &image).await?;
    let machine = match (&arguments.host, &arguments.disk) {
        (Some(host), _) => escaped(host),
        (None, Some(disk)) => disk.display().to_string(),
        (None, None) => return Err(Error::new(Code::Usage, "neither --host nor --disk is given")),
    };
    let reports = app.output.reports();
    let since = if arguments.quick { created(&image) } else { None };
    if arguments.quick && since.is_none() {
        reports.warn("the image does not say when it was made, so every file is read");
    }
    let host = with_context(&app.home, &reports, |context| {
        let mutable = &mutable;
        async move {
            match &arguments.host {
                Some(host) => over_ssh(host, arguments, since, mutable, &context).await,
                None => on_disk(arguments, &context).await,
            }
        }
    })
    .await?;
    if let Some((name, version)) =
        host.release.as_ref().filter(|(name, version)| (name, version) != (&image.config.name, &image.config.version))
    {
        reports.warn(format!(
            "{machine} says it is {}:{}, and not {}:{}",
            escaped(name),
            escaped(version),
            image.config.name,
            image.config.version
        ));
    }
    let removed = removed_files(&store, &image.digest, &removed_packages(&baked, &host)).await?;
    let known = [(way_in::SSHD_DROP_IN, Digest::of(way_in::SSHD))];
    let found = compare(&baked, &host, &Rules { mutable: &mutable, known: &known, removed });
    let answer =
        Answer { reference: &arguments.reference, digest: image.digest, machine: &machine, hostname: &escaped(&host.name), found: &found };
    app.output.result(&answer, || {
        format!("{machine}, from {} ({})\n{}", arguments.reference, image.digest.short(), table(&found, arguments.all))
    });
    Ok(if found.differs { Code::Test.exit_status() } else { 0 })
}

fn escaped(text: &str) -> String {
    kiln_contents::text::shown(text.as_bytes())
}

/// The image that a reference means; of several, that of this architecture.
async fn image(place: &dyn Place, reference: &Reference) -> Result<Held> {
    let digest = place.resolve(reference).await?;
    let mut images = images_of(place, &digest).await?;
    let own = images.iter().position(|image| image.config.architecture == host_architecture()).unwrap_or(0);
    Ok(images.swap_remove(own))
}

/// What the image was made of: as it is attached to it, or from its disk.
async fn baked(app: &App, place: &dyn Place, store: &Store, image: &Held) -> Result<Manifest> {
    if let Some(manifest) = manifest::attached(place, &image.digest).await? {
        return Ok(manifest);
    }
    if !store.has_image(&image.digest) {
        let what = format!("no manifest is attached to {} in {}", image.digest, place.label());
        return Err(Error::new(Code::NotFound, what).next("kiln makes one from the disk of an image in the store: `kiln pull` it first"));
    }
    app.output.reports().note("no manifest is attached to the image: it is made from its disk");
    let (store, digest, cache) = (store.clone(), image.digest, manifest::cache(&app.home));
    let made = tokio::task::spawn_blocking(move || manifest::of_store(&store, &digest, &Pool::default(), Some(&cache)));
    let made = made.await.trying(|| "read the image's disk".into())??;
    made.ok_or_else(|| {
        let what = format!(
            "the file system of image {} cannot be read: it is none of ext2, ext3 and ext4, or inside of LVM or encryption",
            image.digest
        );
        Error::new(Code::Failed, what)
    })
}

/// When the image was made, in seconds since 1970.
fn created(image: &Held) -> Option<i64> {
    let text = image.manifest.annotations.get(kiln_model::image::CREATED)?;
    Some(text.parse::<jiff::Timestamp>().ok()?.as_second())
}

/// The files of packages that are gone, where the image's disk is here to ask.
async fn removed_files(store: &Store, digest: &Digest, gone: &[Installed]) -> Result<HashMap<Vec<u8>, String>> {
    if gone.is_empty() || !store.has_image(digest) {
        return Ok(HashMap::new());
    }
    let (store, digest) = (store.clone(), *digest);
    let names: Vec<String> = gone.iter().map(|package| package.name.clone()).collect();
    let read = move || -> Result<HashMap<Vec<u8>, String>> {
        let Some(files) = sbom::files(&store, &digest, &Pool::default())? else { return Ok(HashMap::new()) };
        let mut inventory = packages::read(&files)?;
        packages::read_files(&files, &mut inventory, &|package| names.contains(&package.name))?;
        let gone = inventory.packages.into_iter().filter(|package| names.contains(&package.name));
        Ok(gone.flat_map(|package| package.files.into_iter().map(move |path| (path, package.name.clone()))).collect())
    };
    tokio::task::spawn_blocking(read).await.trying(|| "read the image's disk".into())?
}

/// What a machine says of itself.
async fn over_ssh(host: &str, arguments: &Drift, since: Option<i64>, mutable: &[Pattern], context: &Context) -> Result<Host> {
    let nonce = context.bake.clone();
    let script = script(&Asking { nonce: &nonce, since, mutable });
    let mut ssh = tokio::process::Command::new("ssh");
    ssh.args(ssh_arguments(host, arguments)?).arg(command());
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let missing = |error| Error::new(Code::Missing, "cannot run `ssh`").because(error).next("apt-get install openssh-client");
    let mut child = ssh.spawn().map_err(missing)?;
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
        return Err(Error::new(Code::Failed, "ssh has no pipes"));
    };
    context.reports.note(format!("looking at {}: every file is read there, which may take minutes", escaped(host)));
    let (mut answer, mut said) = (Vec::new(), Vec::new());
    let (mut stdout, mut stderr) = (stdout.take(ANSWER_LIMIT), stderr.take(1 << 20));
    let send = async {
        // A machine that refuses has gone before it has read everything.
        drop(stdin.write_all(script.as_bytes()).await);
        drop(stdin);
    };
    let what = || format!("read the answer of {}", escaped(host));
    let (_, read, _) = tokio::join!(send, stdout.read_to_end(&mut answer), stderr.read_to_end(&mut said));
    read.trying(what)?;
    let status = child.wait().await.trying(what)?;
    let said = String::from_utf8_lossy(&said).into_owned();
    if status.code() == Some(SSH_FAILED) || answer.is_empty() {
        return Err(unreachable(host, &said));
    }
    let answer = tokio::task::spawn_blocking(move || Host::of_answer(&answer, &nonce, since));
    answer.await.trying(what)?.map_err(|error| if said.trim().is_empty() { error } else { error.detail(safe(&said)) })
}

/// What another program said, without what would act on a terminal.
fn safe(said: &str) -> String {
    said.trim().lines().map(kiln_contents::text::line).collect::<Vec<_>>().join("\n")
}

/// For whoever tries again later: the machine was not looked at.
fn unreachable(host: &str, said: &str) -> Error {
    let next = if said.contains("Host key verification failed") || said.contains("HOST IDENTIFICATION HAS CHANGED") {
        "put its host key into known_hosts after checking it, or name a file that has it with --known-hosts"
    } else if said.contains("Permission denied") {
        "name a key that the machine accepts with -i, or load it into ssh-agent: no password is asked for"
    } else {
        "see that `ssh` reaches it with the same name"
    };
    Error::new(Code::Infrastructure, format!("{} cannot be reached by ssh", escaped(host))).detail(safe(said)).next(next)
}

fn ssh_arguments(host: &str, arguments: &Drift) -> Result<Vec<String>> {
    let (name, port) = address(host).ok_or_else(|| {
        Error::new(Code::Usage, format!("`{}` names no machine", escaped(host))).next("write HOST, USER@HOST or USER@HOST:PORT")
    })?;
    // What people are not asked here, and what is never switched off.
    let mut options =
        vec!["BatchMode=yes".to_owned(), "ConnectTimeout=30".into(), "ServerAliveInterval=15".into(), "ServerAliveCountMax=8".into()];
    options.push("StrictHostKeyChecking=yes".to_owned());
    if let Some(file) = &arguments.known_hosts {
        options.push(format!("UserKnownHostsFile=\"{}\"", file.display()));
        options.push("GlobalKnownHostsFile=/dev/null".to_owned());
    }
    let mut all: Vec<String> = vec!["-T".into(), "-C".into()];
    all.extend(options.into_iter().flat_map(|option| ["-o".to_owned(), option]));
    if let Some(port) = port {
        all.extend(["-p".to_owned(), port.to_string()]);
    }
    if let Some(key) = &arguments.identity {
        all.extend(["-i".to_owned(), key.display().to_string(), "-o".into(), "IdentitiesOnly=yes".into()]);
    }
    if let Some(jump) = &arguments.jump {
        if address(jump).is_none() {
            return Err(Error::new(Code::Usage, format!("`{}` names no machine", escaped(jump))));
        }
        all.extend(["-J".to_owned(), jump.clone()]);
    }
    all.extend(["--".to_owned(), name]);
    Ok(all)
}

/// `[USER@]HOST[:PORT]`; a bare IPv6 address, or one in brackets.
fn address(text: &str) -> Option<(String, Option<u16>)> {
    let (user, host) = text.rsplit_once('@').map_or((None, text), |(user, host)| (Some(user), host));
    let (host, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']')?;
            (host, if after.is_empty() { None } else { Some(after.strip_prefix(':')?) })
        }
        None if host.matches(':').count() == 1 => host.split_once(':').map(|(host, port)| (host, Some(port)))?,
        None => (host, None),
    };
    let port = port.map(|port| port.parse::<u16>().ok().filter(|port| *port > 0).ok_or(())).transpose().ok()?;
    let good = |text: &str| !text.is_empty() && !text.starts_with('-') && !text.chars().any(|c| c.is_whitespace() || c.is_control());
    (good(host) && user.is_none_or(good)).then(|| (user.map_or(host.to_owned(), |user| format!("{user}@{host}")), port))
}

/// What is on a copy of a machine's disk.
async fn on_disk(arguments: &Drift, context: &Context) -> Result<Host> {
    let path = arguments.disk.clone().unwrap_or_default();
    let disk = qemu_img::probe(&path).await?;
    let (folder, scope, shown) = (context.work.clone(), context.scope.clone(), path.display().to_string());
    let read = move || -> Result<Host> {
        let serial = std::cell::Cell::new(0_u32);
        let open = || {
            serial.set(serial.get() + 1);
            let folder = folder.join(format!("disk-{}", serial.get()));
            std::fs::create_dir_all(&folder).trying(|| "make a folder".into())?;
            DiskFiles::open(Box::new(OverlayDisk::open(&disk, u32::MAX, &folder, Some(&scope))?))
        };
        let unreadable = || {
            let what =
                format!("the file system of {shown} cannot be read: it is none of ext2, ext3 and ext4, or inside of LVM or encryption");
            Error::new(Code::Failed, what)
        };
        let manifest = manifest::of_disk(&open, None)?.ok_or_else(unreadable)?;
        let files = open()?.ok_or_else(unreadable)?;
        Host::of_disk(&files, manifest)
    };
    tokio::task::spawn_blocking(read).await.trying(|| format!("read {}", path.display()))?
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn machines_by_their_addresses() {
        for (text, expected) in [
            ("web-1", Some(("web-1", None))),
            ("root@web-1:2222", Some(("root@web-1", Some(2222)))),
            ("root@[2001:db8::1]:22", Some(("root@2001:db8::1", Some(22)))),
            ("2001:db8::1", Some(("2001:db8::1", None))),
            ("", None),
            ("-oProxyCommand=x", None),
            ("root@-oProxyCommand=x", None),
            ("web-1:0", None),
            ("web-1:http", None),
            ("two words", None),
            ("@web", None),
        ] {
            let found = address(text);
            assert_eq!(found.as_ref().map(|(name, port)| (name.as_str(), *port)), expected, "{text}");
        }
    }
}
