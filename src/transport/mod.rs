//! WHAT carries an attempt to a worker and its answer back: a trait, and one file for each kind of carrier.
//!
//! A transport delivers: it sends a request, hands over the replies in the order of their arrival, and says when nobody
//! listens or its own connection is down. It knows nothing of retries, breakers or limits on time.

pub mod http;
mod local;
mod mailbox;
pub mod nats;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

pub use local::{LocalHub, LocalMessage, LocalNews, LocalPort};
pub use mailbox::{Address, Delivery, Mailbox, Postbox, Wake, mailbox};

use crate::error::ControllerError;
use crate::wire::{InferenceRequest, WorkerId};

/// One attempt, ready to go.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Who gets it.
    pub worker: WorkerId,
    /// What is asked; `stream` and `request_id` are final.
    pub request: Arc<InferenceRequest>,
    /// 1 for the first attempt.
    pub attempt: u32,
    /// How long it may take, to its end.
    pub timeout: Duration,
    /// The caller's W3C trace context.
    pub traceparent: Option<Arc<str>>,
    /// The worker speaks the older dialect: it cannot be told to stop.
    pub older: bool,
}

/// A carrier of attempts.
pub trait Transport: Send + Sync + 'static {
    /// Sends an attempt. The mailbox it gives receives the replies; dropping the mailbox frees everything that was kept
    /// for them, and late replies vanish.
    ///
    /// # Errors
    /// NATS_ERROR while our own connection is down, PAYLOAD_TOO_LARGE beyond the carrier's limit, WORKER_UNAVAILABLE where
    /// nobody listens.
    fn send<'a>(&'a self, outgoing: &'a Outgoing) -> BoxFuture<'a, Result<Mailbox, ControllerError>>;

    /// Tells the worker to stop an attempt that was sent, and whose replies come to this mailbox. Never waits and never
    /// fails: a worker that does not hear it stops at its deadline.
    fn cancel(&self, outgoing: &Outgoing, mailbox: &Mailbox);
}
