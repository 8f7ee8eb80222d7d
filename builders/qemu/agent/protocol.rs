//! What kiln and its agent say to each other. Both sides compile this file.
//!
//! **The stream.** One virtio-serial port: bytes in both directions, in order,
//! without an end. The host gives a new agent 16 random bytes as an argument,
//! and both sides drop what comes before these: words of an agent that a reboot
//! cut off. After a checkpoint was resumed nothing of the kind is needed: the
//! agent's last word before it was the answer to [`Kind::Quiesce`], and neither
//! side had anything under way.
//!
//! **Frames** follow, in both directions, numbers little-endian:
//!
//! ```text
//!  kind u8   channel u32   length u32   payload (at most PAYLOAD)
//! ```
//!
//! A channel is one request, with a number that the host does not use again.
//!
//! | host → agent | payload | answered by |
//! |---|---|---|
//! | `Execute` | line for `/bin/sh -c` | `Stdout`, `Stderr`, `Taken`, then `Exit` |
//! | `Stdin`, `StdinEnd` | bytes; none | `Taken`: how many bytes the command has read |
//! | `Kill` | | `Exit` |
//! | `Quiesce`, `Thaw` | | `Answer`: empty |
//! | `Refresh` | [`Refresh`] | `Answer`: empty |
//!
//! Any request may be answered by `Failed` (text) instead.
//!
//! **Flow.** The host has no more than [`WINDOW`] bytes of a command's input
//! under way, so that the agent can always take what comes. The host takes what
//! the agent sends as fast as it can use it.

/// Changes with anything that is said differently. The memory of a checkpoint
/// holds the agent of the kiln that made it.
pub(crate) const VERSION: u32 = 1;

/// Tells one agent's words from those of the one before.
pub(crate) type Nonce = [u8; 16];

/// Length of a frame's head.
pub(crate) const HEAD: usize = 9;

/// The longest payload.
pub(crate) const PAYLOAD: usize = 1 << 16;

/// How many bytes of a command's input may be under way.
pub(crate) const WINDOW: usize = 1 << 18;

macro_rules! kinds {
    ($($name:ident = $number:literal, $doc:literal;)*) => {
        /// What a frame is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Kind { $(#[doc = $doc] $name = $number),* }

        impl Kind {
            fn of(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    Execute = 1, "Run a command.";
    Stdin = 2, "Bytes for it.";
    StdinEnd = 3, "There are no more.";
    Kill = 4, "Kill it, with everything that it started.";
    Quiesce = 5, "Stand still, and write what is in memory.";
    Thaw = 6, "Go on.";
    Refresh = 7, "Take new entropy, the time and new keys, and go on.";
    Stdout = 32, "Bytes of a command's standard output.";
    Stderr = 33, "Bytes of its standard error.";
    Taken = 34, "How much of its input it has read (u32).";
    Exit = 35, "It has ended: 0 and its status, or 1 and its signal (u32 each).";
    Answer = 36, "It is done.";
    Failed = 37, "Why it is not.";
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) channel: u32,
    pub(crate) payload: Vec<u8>,
}

/// A frame's bytes. What does not fit a payload is the caller's to split.
pub(crate) fn frame(kind: Kind, channel: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEAD + payload.len());
    bytes.push(kind as u8);
    bytes.extend_from_slice(&channel.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Kind, channel and length of payload of a frame; none if it is no frame.
pub(crate) fn head(bytes: &[u8; HEAD]) -> Option<(Kind, u32, usize)> {
    let [kind, a, b, c, d, e, f, g, h] = *bytes;
    let length = u32::from_le_bytes([e, f, g, h]) as usize;
    (length <= PAYLOAD).then_some((Kind::of(kind)?, u32::from_le_bytes([a, b, c, d]), length))
}

/// Two numbers, as [`Kind::Exit`] has them.
pub(crate) fn pair(first: u32, second: u32) -> Vec<u8> {
    [first.to_le_bytes(), second.to_le_bytes()].concat()
}

/// Reads one number off the front.
pub(crate) fn number(bytes: &mut &[u8]) -> Option<u32> {
    let (first, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*first))
}

/// What makes a resumed guest another one than its siblings.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Refresh {
    /// Random bytes of the host: more than the kernel's pool holds.
    pub(crate) seed: [u8; 512],
    /// The time, in nanoseconds since 1970.
    pub(crate) now: u64,
    /// Path, mode and bytes of files to write.
    pub(crate) files: Vec<(String, u32, Vec<u8>)>,
}

impl Refresh {
    /// As a payload.
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut bytes = self.seed.to_vec();
        bytes.extend_from_slice(&self.now.to_le_bytes());
        let mut put = |value: &[u8]| {
            bytes.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend_from_slice(value);
        };
        for (path, mode, content) in &self.files {
            put(path.as_bytes());
            put(&mode.to_le_bytes());
            put(content);
        }
        bytes
    }

    /// None if there is less than there should be.
    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let (seed, rest) = payload.split_first_chunk::<512>()?;
        let (now, mut rest) = rest.split_first_chunk::<8>()?;
        let mut take = || {
            let length = number(&mut rest)? as usize;
            let (value, after) = rest.split_at_checked(length)?;
            rest = after;
            Some(value)
        };
        let mut files = Vec::new();
        while let Some(path) = take() {
            let (path, mut mode) = (String::from_utf8(path.to_vec()).ok()?, take()?);
            files.push((path, number(&mut mode)?, take()?.to_vec()));
        }
        Some(Self { seed: *seed, now: u64::from_le_bytes(*now), files })
    }
}
