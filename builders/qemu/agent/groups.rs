//! Control groups (cgroup v2): what makes the whole guest stand still, and what
//! finds every process that a command has started.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
/// The agent's own: it must not freeze itself.
const AGENT: &str = "/sys/fs/cgroup/kiln-agent";
/// That of its commands, with one below it for each.
const WORK: &str = "/sys/fs/cgroup/kiln-work";

/// How long processes may take to come to rest.
const FREEZING: Duration = Duration::from_secs(20);

/// Moves the agent into a group of its own.
pub(crate) fn enter() -> io::Result<()> {
    fs::create_dir_all(AGENT)?;
    fs::create_dir_all(WORK)?;
    fs::write(Path::new(AGENT).join("cgroup.procs"), "0")
}

/// Makes all processes but the agent stand still; none does after an error.
pub(crate) fn freeze() -> io::Result<()> {
    let done = others().and_then(|groups| {
        for group in &groups {
            fs::write(group.join("cgroup.freeze"), "1")?;
        }
        let end = Instant::now() + FREEZING;
        for group in &groups {
            while !at_rest(group)? {
                if Instant::now() > end {
                    return Err(io::Error::other(format!("{} does not come to rest", group.display())));
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    });
    if done.is_err() {
        let _ = thaw();
    }
    done
}

/// Lets them go on.
pub(crate) fn thaw() -> io::Result<()> {
    let mut done = Ok(());
    for group in others()? {
        // Each of them, whatever became of another.
        let thawed = fs::write(group.join("cgroup.freeze"), "0");
        done = done.and(thawed);
    }
    done
}

fn others() -> io::Result<Vec<PathBuf>> {
    let mut groups = Vec::new();
    for entry in fs::read_dir(ROOT)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.path() != Path::new(AGENT) {
            groups.push(entry.path());
        }
    }
    Ok(groups)
}

/// Whether every process in it stands still, or there is none.
fn at_rest(group: &Path) -> io::Result<bool> {
    let events = fs::read_to_string(group.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "frozen 1" || line == "populated 0"))
}

/// The group of one command. It goes when the command's last process has ended.
pub(crate) struct Group(Option<PathBuf>);

impl Group {
    /// Where there are no groups, it does nothing.
    pub(crate) fn new(channel: u32) -> Self {
        let path = Path::new(WORK).join(channel.to_string());
        Self(fs::create_dir(&path).is_ok().then_some(path))
    }

    /// What a process that is to be in it writes to.
    pub(crate) fn door(&self) -> Option<File> {
        self.0.as_ref().and_then(|path| File::options().write(true).open(path.join("cgroup.procs")).ok())
    }

    /// Kills all that is in it.
    pub(crate) fn kill(&self) {
        if let Some(path) = &self.0 {
            let _ = fs::write(path.join("cgroup.kill"), "1");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // A daemon that the command left behind keeps it.
            let _ = fs::remove_dir(path);
        }
    }
}
