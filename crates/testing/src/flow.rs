//! Bodies on their way through the proxy.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming};
use tokio::sync::mpsc;

/// A body that the proxy sends, on either side.
pub(crate) enum Outgoing {
    /// Nothing.
    Empty,
    /// These bytes.
    Whole(Bytes),
    /// What comes through a [`Flow`].
    Piped(mpsc::Receiver<io::Result<Bytes>>),
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Piped(receiver) => receiver.poll_recv(context).map(|next| next.map(|bytes| bytes.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Empty)
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Empty => hyper::body::SizeHint::with_exact(0),
            Self::Whole(bytes) => hyper::body::SizeHint::with_exact(bytes.len() as u64),
            Self::Piped(_) => hyper::body::SizeHint::default(),
        }
    }
}

/// How a body ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// As if it was whole.
    Orderly,
    /// By breaking.
    Broken,
}

/// What is done to a body on its way.
#[derive(Default)]
pub(crate) struct Flow {
    /// Ends after so many bytes.
    pub(crate) end: Option<(u64, End)>,
    /// The place of a byte that is changed.
    pub(crate) flip: Option<u64>,
    /// Bytes per second.
    pub(crate) speed: Option<u64>,
    /// Counts the bytes.
    pub(crate) count: Option<Arc<AtomicU64>>,
    /// Called when it ends early.
    pub(crate) ended: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Flow {
    /// Lets `body` flow; the result is what is to be sent on.
    pub(crate) fn start(self, body: Incoming) -> Outgoing {
        // Few, so that a slow receiver slows the sender down.
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(self.run(body, sender));
        Outgoing::Piped(receiver)
    }

    async fn run(mut self, mut body: Incoming, sender: mpsc::Sender<io::Result<Bytes>>) {
        let broken = |why: &str| Err(io::Error::new(io::ErrorKind::ConnectionReset, why.to_owned()));
        let total = body.size_hint().exact();
        let flip = self.flip.map(|at| total.map_or(at, |total| at.min(total.saturating_sub(1))));
        let mut passed = 0;
        if let Some((0, end)) = self.end {
            return self.finish(end, &sender).await;
        }
        while let Some(frame) = body.frame().await {
            let bytes = match frame.map(Frame::into_data) {
                Ok(Ok(bytes)) => bytes,
                Ok(Err(_)) => continue,
                Err(error) => {
                    let _ = sender.send(broken(&error.to_string())).await;
                    return;
                }
            };
            let mut bytes = Vec::from(bytes);
            let left = self.end.map_or(u64::MAX, |(at, _)| at - passed);
            let ends = bytes.len() as u64 >= left;
            if ends {
                bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            }
            if let Some(byte) = flip.and_then(|at| bytes.get_mut(usize::try_from(at.checked_sub(passed)?).ok()?)) {
                *byte ^= 0x01;
            }
            for piece in self.pieces(bytes) {
                if let Some(speed) = self.speed {
                    tokio::time::sleep(Duration::from_secs_f64(piece.len() as f64 / speed.max(1) as f64)).await;
                }
                passed += piece.len() as u64;
                if let Some(count) = &self.count {
                    count.fetch_add(piece.len() as u64, Ordering::SeqCst);
                }
                if sender.send(Ok(piece)).await.is_err() {
                    return;
                }
            }
            if ends && let Some((_, end)) = self.end {
                return self.finish(end, &sender).await;
            }
        }
    }

    async fn finish(&mut self, end: End, sender: &mpsc::Sender<io::Result<Bytes>>) {
        if end == End::Broken {
            // What was passed on is to be sent before the connection breaks.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Some(ended) = self.ended.take() {
            ended();
        }
        if end == End::Broken {
            let _ = sender.send(Err(io::Error::new(io::ErrorKind::ConnectionReset, "cut"))).await;
        }
    }

    fn pieces(&self, bytes: Vec<u8>) -> Vec<Bytes> {
        let mut rest = Bytes::from(bytes);
        // Slowness in steps of a tenth of a second.
        let size = self.speed.map_or(usize::MAX, |speed| usize::try_from(speed / 10).unwrap_or(usize::MAX).max(1));
        let mut pieces = Vec::new();
        while rest.len() > size {
            pieces.push(rest.split_to(size));
        }
        pieces.push(rest);
        pieces
    }
}
