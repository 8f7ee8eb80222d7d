//! A child process that ends with the test, however that ends.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kiln_model::{Result, ResultExt as _};

/// Watches over a program: ends it, and removes its folder, when whoever holds
/// the other end of its standard input is gone, however that went. It says the
/// program's process id first.
const WATCH: &str = r#"
exec 3<&0
log=$1 folder=$2
shift 2
"$@" >>"$log" 2>&1 </dev/null 3<&- &
server=$!
trap 'kill -9 "$server" 2>/dev/null' EXIT
trap 'exit 1' HUP INT TERM
echo "$server"
exec >/dev/null
last=$(cat <&3)
kill -9 "$server" 2>/dev/null
wait
[ "$last" = keep ] || rm -rf "$folder"
"#;

/// A program that runs as long as this, and no longer than this process.
#[derive(Debug)]
pub(crate) struct Watched {
    pid: u32,
    watcher: Child,
}

impl Watched {
    /// Starts it. What it says goes to `log`; `folder` is removed when this
    /// process dies.
    pub(crate) fn start(program: &Path, arguments: &[&str], log: &Path, folder: &Path) -> Result<Self> {
        let what = || format!("start {}", program.display());
        std::fs::write(log, "").trying(|| format!("write {}", log.display()))?;
        let mut command = Command::new("sh");
        command.args(["-c", WATCH, "kiln-watch"]).arg(log).arg(folder).arg(program).args(arguments);
        // A group of its own: Ctrl-C is for the test, whose end this notices.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut watcher = command.spawn().trying(what)?;
        let mut line = String::new();
        if let Some(stdout) = watcher.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).trying(what)?;
        }
        let pid = line.trim().parse().trying(what)?;
        Ok(Self { pid, watcher })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it still runs.
    pub(crate) fn runs(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.pid)).exists()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.watcher.stdin.take() {
            let _ = stdin.write_all(b"keep\n");
        }
        let _ = self.watcher.wait();
    }
}
