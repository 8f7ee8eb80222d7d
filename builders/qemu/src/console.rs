//! The guest's serial console and the firmware's debug port: their ends are
//! kept in memory, whatever a guest prints.

use std::collections::VecDeque;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_model::{Result, ResultExt as _};
use tokio::sync::watch;

/// How much is kept, in bytes.
const KEPT: usize = 64 * 1024;

/// What the end of a panic means.
pub(crate) const PANIC: &str = "the guest's kernel panicked";

/// What is printed when the machine will never get further, and what it means.
const HOPELESS: [(&str, &str); 5] = [
    ("No bootable device", "the firmware found nothing to boot on the disk"),
    ("No bootable option or device was found", "the firmware found nothing to boot on the disk"),
    // The last line of a panic, so that its trace is there to be shown.
    ("end Kernel panic", PANIC),
    ("You are in emergency mode", "the guest stopped in systemd's emergency mode"),
    ("grub rescue>", "the boot loader could not find its files"),
];

/// A console that is being read.
#[derive(Clone)]
pub(crate) struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    hopeless: watch::Receiver<Option<&'static str>>,
}

impl Console {
    /// Reads `stream` to its end, on a thread of its own: QEMU must never wait
    /// for kiln, however busy kiln is.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(crate) fn read(mut stream: UnixStream) -> Result<Self> {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let (tell, hopeless) = watch::channel(None);
        let into = kept.clone();
        let reader = std::thread::Builder::new().name("kiln-console".into()).spawn(move || {
            let mut buffer = [0; 4096];
            let mut recent = Vec::new();
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                recent.extend_from_slice(&buffer[..count]);
                if let Some(meaning) = find(&recent) {
                    tell.send_if_modified(|told| told.replace(meaning).is_none());
                }
                // A marker may lie across two reads.
                let excess = recent.len().saturating_sub(64);
                recent.drain(..excess);
                let mut kept = lock(&into);
                kept.extend(&buffer[..count]);
                let excess = kept.len().saturating_sub(KEPT);
                kept.drain(..excess);
            }
        });
        reader.trying(|| "read the guest's console".into())?;
        Ok(Self { kept, hopeless })
    }

    /// The last `count` lines, fit for a terminal; empty if nothing was printed.
    pub(crate) fn tail(&self, count: usize) -> String {
        let bytes: Vec<u8> = lock(&self.kept).iter().copied().collect();
        let text = plain(&String::from_utf8_lossy(&bytes));
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Waits until something was printed after which waiting is pointless;
    /// gives what it means. Never returns otherwise.
    pub(crate) async fn hopeless(&self) -> &'static str {
        let mut hopeless = self.hopeless.clone();
        if let Ok(meaning) = hopeless.wait_for(Option::is_some).await
            && let Some(meaning) = *meaning
        {
            return meaning;
        }
        std::future::pending().await
    }
}

fn find(bytes: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(bytes);
    HOPELESS.iter().find(|(marker, _)| text.contains(marker)).map(|(_, meaning)| *meaning)
}

/// Text without what moves a terminal's cursor or changes its colours: what a
/// guest prints must not act on the user's terminal.
fn plain(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // CSI: parameters, then one final letter.
                Some('[') => while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {},
                // OSC: up to BEL or ESC \.
                Some(']') => {
                    while let Some(c) = chars.next() {
                        if c == '\u{7}' || (c == '\u{1b}' && chars.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                Some('(' | ')' | '#') => {
                    chars.next();
                }
                _ => {}
            },
            '\n' | '\t' => clean.push(c),
            // A lone carriage return starts the line again.
            '\r' if chars.peek() != Some(&'\n') => clean.push('\n'),
            c if c.is_control() => {}
            c => clean.push(c),
        }
    }
    clean
}

fn lock(kept: &Mutex<VecDeque<u8>>) -> MutexGuard<'_, VecDeque<u8>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_but_text() {
        let text = "\u{1b}[2J\u{1b}[0;32m[  OK  ]\u{1b}[0m Started\r\n\u{1b}]0;title\u{7}next\u{8}\u{1b}(B one\rtwo\n";
        assert_eq!(plain(text), "[  OK  ] Started\nnext one\ntwo\n");
        for torn in ["\u{1b}", "\u{1b}[", "\u{1b}[1;", "\u{1b}]x", "\u{1b}("] {
            assert_eq!(plain(torn), "");
        }
    }

    #[tokio::test]
    async fn memory_is_bounded_and_panics_are_seen() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let console = Console::read(ours).unwrap();
        for n in 0..20_000 {
            writeln!(theirs, "line {n}").unwrap();
        }
        theirs.write_all(b"[ 1.0] ---[ end Kernel pa").unwrap();
        theirs.write_all(b"nic - not syncing: VFS ]---\n").unwrap();
        assert_eq!(console.hopeless().await, PANIC);
        drop(theirs);
        assert!(console.tail(30).contains("line 19999\n"));
        assert!(console.tail(30).lines().count() <= 30);
        assert!(lock(&console.kept).len() <= KEPT);
    }
}
