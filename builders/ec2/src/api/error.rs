//! Why a call failed: AWS's own code, and what kind of failure that is.
//!
//! The kinds are what a caller can act on; the codes are EC2's
//! (<https://docs.aws.amazon.com/ec2/latest/devguide/errors-overview.html>),
//! those of the EBS direct APIs and of Systems Manager.

use std::fmt;

use kiln_model::{Code, Error};

/// What a call gives.
pub type Result<T, E = CallError> = std::result::Result<T, E>;

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Too many calls: the same call will do later.
    Throttled,
    /// AWS failed, or the connection did: the same call may do again. Whether
    /// this one was carried out is not known.
    Transient,
    /// There is no such thing, or not yet: what was made a moment ago is not
    /// known everywhere at once.
    NotFound,
    /// Something of that name, or with that client token, is there already.
    Exists,
    /// What is named is in a state that does not allow it, at present or at all.
    State,
    /// A quota or the capacity is exhausted.
    Limit,
    /// The credentials are missing, wrong or expired.
    Credentials,
    /// This user may not do it.
    Denied,
    /// The call was wrong.
    Invalid,
    /// Anything else.
    Other,
}

/// A failed call.
#[derive(Debug)]
pub struct CallError {
    /// What was called, as AWS names it (`StartSnapshot`).
    pub action: &'static str,
    /// AWS's code (`InvalidAMIID.NotFound`); empty when AWS did not answer.
    pub code: String,
    /// What AWS says about it.
    pub message: String,
    /// What kind of failure it is.
    pub kind: Kind,
    /// What failed on the way, when AWS did not answer.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl CallError {
    /// What AWS answered to `action`; `status` is that of HTTP.
    pub fn answered(action: &'static str, status: u16, code: &str, message: &str) -> Self {
        Self { action, code: code.to_owned(), message: message.to_owned(), kind: classify(status, code), source: None }
    }

    /// AWS did not answer, or not in its own words.
    pub fn unanswered(action: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { action, code: String::new(), message: "no answer".to_owned(), kind: Kind::Transient, source: Some(source.into()) }
    }

    /// The same failure as another kind.
    #[must_use]
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// As an error for people: what was tried, this as the cause, and what to
    /// do next.
    pub fn trying(self, what: impl fmt::Display) -> Error {
        let (code, next) = match self.kind {
            Kind::Throttled | Kind::Transient => (Code::Infrastructure, "run the same command again: it goes on where it stopped"),
            Kind::Limit => (Code::Infrastructure, "ask AWS for a higher quota, or remove what is not needed: `kiln prune ec2:REGION`"),
            Kind::NotFound => (Code::NotFound, "check the region, and which account the credentials are of"),
            Kind::Credentials => {
                (Code::Failed, "give credentials as for the AWS command line: environment, profile, web identity or instance role")
            }
            Kind::Denied => (Code::Failed, "docs/ec2.md lists the permissions that kiln needs"),
            Kind::Exists | Kind::State | Kind::Invalid | Kind::Other => (Code::Failed, "docs/ec2.md tells what kiln asks of AWS"),
        };
        Error::new(code, format!("cannot {what}")).because(self).next(next)
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.action)?;
        if !self.code.is_empty() {
            write!(f, "{}: ", self.code)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for CallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Says what a call was for.
pub trait CallExt<T> {
    /// As [`CallError::trying`].
    ///
    /// # Errors
    /// The call's failure.
    fn trying_to(self, what: impl FnOnce() -> String) -> kiln_model::Result<T>;
}

impl<T> CallExt<T> for Result<T> {
    fn trying_to(self, what: impl FnOnce() -> String) -> kiln_model::Result<T> {
        self.map_err(|error| error.trying(what()))
    }
}

/// The kind of a failure from its code, or else from its HTTP status.
fn classify(status: u16, code: &str) -> Kind {
    match code {
        "RequestLimitExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "ThrottledException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "TooManyRequestsException"
        | "SlowDown"
        | "EC2ThrottledException"
        | "SnapshotCreationPerVolumeRateExceeded"
        | "TooManyUpdates" => Kind::Throttled,
        "InternalError"
        | "InternalFailure"
        | "InternalServerError"
        | "InternalServerException"
        | "ServiceUnavailable"
        | "Unavailable"
        | "RequestTimeout"
        | "RequestTimeoutException"
        | "ServiceUnavailableException" => Kind::Transient,
        "ResourceNotFoundException" | "ParameterNotFound" | "InvalidKeyPair.NotFound" => Kind::NotFound,
        "ParameterAlreadyExists" | "InvalidAMIName.Duplicate" | "IdempotentParameterMismatch" | "ConflictException" => Kind::Exists,
        "IncorrectState" | "IncorrectInstanceState" | "DependencyViolation" | "InvalidAMIID.Unavailable" => Kind::State,
        "InsufficientInstanceCapacity"
        | "InsufficientCapacity"
        | "MaxSpotInstanceCountExceeded"
        | "ConcurrentLimitExceededException"
        | "ServiceQuotaExceededException"
        | "ParameterLimitExceeded"
        | "ParameterMaxVersionLimitExceeded" => Kind::Limit,
        "AuthFailure"
        | "ExpiredToken"
        | "ExpiredTokenException"
        | "InvalidClientTokenId"
        | "UnrecognizedClientException"
        | "SignatureDoesNotMatch"
        | "MissingAuthenticationToken"
        | "RequestExpired"
        | "InvalidSignatureException" => Kind::Credentials,
        "UnauthorizedOperation" | "AccessDenied" | "AccessDeniedException" | "OptInRequired" | "Blocked" => Kind::Denied,
        "ValidationException" | "ValidationError" | "MissingParameter" => Kind::Invalid,
        code if code.ends_with(".NotFound") || code.ends_with(".Unknown") => Kind::NotFound,
        code if code.ends_with(".Duplicate") => Kind::Exists,
        code if code.ends_with(".InUse") => Kind::State,
        code if code.ends_with("LimitExceeded") => Kind::Limit,
        code if code.starts_with("Invalid") || code.starts_with("Unsupported") => Kind::Invalid,
        _ => match status {
            429 => Kind::Throttled,
            500..=599 => Kind::Transient,
            404 => Kind::NotFound,
            401 => Kind::Credentials,
            403 => Kind::Denied,
            400 => Kind::Invalid,
            _ => Kind::Other,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_kinds_and_kinds_have_exit_codes() {
        for (status, code, kind, exit) in [
            (503, "RequestLimitExceeded", Kind::Throttled, Code::Infrastructure),
            (400, "RequestThrottledException", Kind::Throttled, Code::Infrastructure),
            (400, "InvalidAMIID.NotFound", Kind::NotFound, Code::NotFound),
            (400, "InvalidGroup.Duplicate", Kind::Exists, Code::Failed),
            (400, "InvalidSnapshot.InUse", Kind::State, Code::Failed),
            (400, "VcpuLimitExceeded", Kind::Limit, Code::Infrastructure),
            (403, "UnauthorizedOperation", Kind::Denied, Code::Failed),
            (401, "AuthFailure", Kind::Credentials, Code::Failed),
            (400, "InvalidParameterValue", Kind::Invalid, Code::Failed),
            (502, "", Kind::Transient, Code::Infrastructure),
            (429, "SomethingNew", Kind::Throttled, Code::Infrastructure),
        ] {
            let failure = CallError::answered("Call", status, code, "because");
            assert_eq!(failure.kind, kind, "{code}");
            let error = failure.trying("do it");
            assert_eq!(error.kind(), exit, "{code}");
            assert!(error.chain().starts_with("cannot do it: Call: "), "{}", error.chain());
        }
    }
}
