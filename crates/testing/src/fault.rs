//! What the proxy does, and to which requests.

/// Which requests a [`Fault`] is for: by default the first one.
#[derive(Debug, Clone)]
pub struct On {
    method: Option<String>,
    path: Option<String>,
    skip: usize,
    times: usize,
}

impl On {
    /// Any request.
    pub fn any() -> Self {
        Self { method: None, path: None, skip: 0, times: 1 }
    }

    /// Requests with this method.
    pub fn method(method: &str) -> Self {
        Self { method: Some(method.into()), ..Self::any() }
    }

    /// And whose path (with its query) holds this.
    #[must_use]
    pub fn path(mut self, part: &str) -> Self {
        self.path = Some(part.into());
        self
    }

    /// Not the first so many of them.
    #[must_use]
    pub fn skip(mut self, requests: usize) -> Self {
        self.skip = requests;
        self
    }

    /// So many of them.
    #[must_use]
    pub fn times(mut self, requests: usize) -> Self {
        self.times = requests;
        self
    }

    /// All of them.
    #[must_use]
    pub fn always(self) -> Self {
        self.times(usize::MAX)
    }

    /// Whether it is for this request; counts it.
    pub(crate) fn hits(&mut self, method: &str, path: &str) -> bool {
        let fits = self.method.as_ref().is_none_or(|m| m == method) && self.path.as_ref().is_none_or(|part| path.contains(part.as_str()));
        if !fits || self.times == 0 {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        if self.times != usize::MAX {
            self.times -= 1;
        }
        true
    }
}

/// What happens to a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The connection is reset, and the registry sees nothing.
    Reset,
    /// So many bytes of the request's body are passed on, then both
    /// connections break. With [`crate::Proxy::resumable`], the registry keeps
    /// those bytes, and its session goes on.
    CutRequest(u64),
    /// The registry does what it is asked, then the connection is reset in
    /// place of the answer.
    LoseAnswer,
    /// The connection is reset after so many bytes of the answer's body.
    CutAnswer(u64),
    /// The connection is closed in order after so many bytes of the answer's
    /// body.
    EndAnswer(u64),
    /// Nothing of the answer comes, and the connection stays open.
    Hang,
    /// The byte at this place of the answer's body is another one. Beyond its
    /// end, the last.
    FlipAnswer(u64),
    /// The byte at this place of the request's body is another one.
    FlipRequest(u64),
    /// The answer's body comes with so many bytes per second.
    SlowAnswer(u64),
    /// The request's body is taken with so many bytes per second.
    SlowRequest(u64),
    /// This answer comes, and the registry sees nothing.
    Answer {
        /// Its status.
        status: u16,
        /// Its headers.
        headers: Vec<(String, String)>,
        /// Its body.
        body: Vec<u8>,
    },
    /// The upload session that the request is for is gone: the registry is told
    /// to forget it, and the answer says so.
    LoseSession,
    /// `Range` is not passed on: the answer is the whole.
    IgnoreRange,
    /// Redirected to the same path below this address.
    Redirect(String),
}

impl Fault {
    /// This status, without a body.
    pub fn status(status: u16) -> Self {
        Self::answer(status, &[], "")
    }

    /// This status, with `Retry-After`.
    pub fn retry_after(status: u16, value: &str) -> Self {
        Self::answer(status, &[("Retry-After", value)], "")
    }

    /// This answer.
    pub fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Self {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self::Answer { status, headers, body: body.into() }
    }
}

/// How a registry that does not let tags be moved says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Immutable {
    /// 409.
    Conflict,
    /// 412, as Harbor.
    Precondition,
    /// 400 with `TAG_INVALID`, as ECR.
    BadRequest,
}
