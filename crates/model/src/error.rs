//! One error type: a stable code to act on, what was tried and on what, what
//! to do next, and the cause in [`std::error::Error::source`].

use std::fmt;

/// What `Result` means in kiln.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What kind of thing went wrong; stable, and decides the exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// The command line or the template is wrong.
    Usage,
    /// A named thing (image, tag, file) is not there.
    NotFound,
    /// A program or a device that kiln needs is missing on this machine.
    Missing,
    /// The base cannot be used: not a disk, damaged, or refused.
    Base,
    /// Bytes are not those that a digest names.
    DigestMismatch,
    /// A stored object is damaged.
    Corrupt,
    /// The disk is full.
    DiskFull,
    /// The guest never came up, or could not be reached.
    Unreachable,
    /// The guest answered with another host key than the one given to it.
    HostKey,
    /// The machine ended (powered off, panicked, killed) while it was needed.
    MachineEnded,
    /// A provisioning step failed.
    Step,
    /// Something took longer than it was given.
    Timeout,
    /// The sealed disk still holds what must not be cloned.
    Hygiene,
    /// A test failed, or differences were found.
    Test,
    /// Refused by policy, or a race was lost.
    Refused,
    /// The infrastructure failed; trying again may help.
    Infrastructure,
    /// Ctrl-C.
    Interrupted,
    /// SIGTERM.
    Terminated,
    /// Anything else that failed.
    Failed,
}

impl Code {
    /// The process's exit status for this code.
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Test => 3,
            Self::Refused => 4,
            Self::Infrastructure | Self::DiskFull => 75,
            Self::Interrupted => 130,
            Self::Terminated => 143,
            _ => 1,
        }
    }

    /// The name that other programs see (`error.code` in the `done` event).
    pub const fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::Missing => "missing",
            Self::Base => "base",
            Self::DigestMismatch => "digest_mismatch",
            Self::Corrupt => "corrupt",
            Self::DiskFull => "disk_full",
            Self::Unreachable => "unreachable",
            Self::HostKey => "host_key",
            Self::MachineEnded => "machine_ended",
            Self::Step => "step",
            Self::Timeout => "timeout",
            Self::Hygiene => "hygiene",
            Self::Test => "test",
            Self::Refused => "refused",
            Self::Infrastructure => "infrastructure",
            Self::Interrupted => "interrupted",
            Self::Terminated => "terminated",
            Self::Failed => "failed",
        }
    }
}

/// An error for people and programs. The message says what was tried and on
/// what; it never repeats its cause.
pub struct Error(Box<Inner>);

struct Inner {
    code: Code,
    message: String,
    step: Option<String>,
    next: Option<String>,
    details: Vec<String>,
    source: Option<Cause>,
}

impl Error {
    /// An error with `message`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { code, message: message.into(), step: None, next: None, details: Vec::new(), source: None }))
    }

    /// Says what to do next.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.0.next.get_or_insert(next.into());
        self
    }

    /// Names the step in which it happened, unless one is named already.
    #[must_use]
    pub fn step(mut self, step: impl Into<String>) -> Self {
        self.0.step.get_or_insert(step.into());
        self
    }

    /// Adds a block of context to show below the message, such as the tail of
    /// a log; may have several lines.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.0.details.push(detail.into());
        self
    }

    /// Sets the cause. A full disk anywhere among the causes becomes
    /// [`Code::DiskFull`], since the next move is then always the same.
    #[must_use]
    pub fn because(mut self, source: impl Into<Cause>) -> Self {
        let source = source.into();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*source);
        while let Some(error) = cause {
            let full = error
                .downcast_ref::<std::io::Error>()
                .is_some_and(|io| matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded));
            if full {
                self.0.code = Code::DiskFull;
                self.0
                    .next
                    .get_or_insert("free some space (`kiln prune` removes what nothing needs), then run the same command again".into());
            }
            cause = error.source();
        }
        self.0.source = Some(source);
        self
    }

    /// Gives the same error another code.
    #[must_use]
    pub fn code(mut self, code: Code) -> Self {
        self.0.code = code;
        self
    }

    /// The code to act on.
    pub fn kind(&self) -> Code {
        self.0.code
    }

    /// The step in which it happened.
    pub fn step_name(&self) -> Option<&str> {
        self.0.step.as_deref()
    }

    /// What to do next.
    pub fn next_move(&self) -> Option<&str> {
        self.0.next.as_deref()
    }

    /// The blocks of context.
    pub fn details(&self) -> &[String] {
        &self.0.details
    }

    /// The message and all its causes in one line.
    pub fn chain(&self) -> String {
        let mut text = self.0.message.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let part = error.to_string();
            if !text.ends_with(&part) {
                text.push_str(": ");
                text.push_str(&part);
            }
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.code, self.chain())?;
        for detail in &self.0.details {
            write!(f, "\n{detail}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

/// Turns any error into kiln's, saying what was tried.
pub trait ResultExt<T> {
    /// Fails with [`Code::Failed`] (or [`Code::DiskFull`]) and what was tried.
    ///
    /// # Errors
    /// The error wrapped.
    fn trying(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Cause>> ResultExt<T> for std::result::Result<T, E> {
    fn trying(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let error = error.into();
            match error.downcast::<Error>() {
                Ok(own) => {
                    let (code, step) = (own.kind(), own.0.step.clone());
                    let (next, details) = (own.0.next.clone(), own.0.details.clone());
                    let mut outer = Error::new(code, format!("cannot {}", what()));
                    (outer.0.step, outer.0.next, outer.0.details) = (step, next, details);
                    outer.0.source = Some(own);
                    outer
                }
                Err(other) => Error::new(Code::Failed, format!("cannot {}", what())).because(other),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised_through_layers() {
        let io = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = Err::<(), _>(io).trying(|| "write a pack".into()).unwrap_err();
        let error = Err::<(), _>(error).trying(|| "store the image".into()).unwrap_err();
        assert_eq!(error.kind(), Code::DiskFull);
        assert_eq!(error.kind().exit_status(), 75);
        assert!(error.chain().starts_with("cannot store the image: cannot write a pack: "), "{}", error.chain());
    }

    #[test]
    fn the_first_step_named_stays() {
        let error = Error::new(Code::Step, "x").step("inner").step("outer");
        assert_eq!(error.step_name(), Some("inner"));
    }
}
