//! The way back of one attempt: a bounded queue from whatever carries the replies to the attempt that waits for them.

use tokio::sync::mpsc;

use crate::error::ControllerError;
use crate::wire::Reply;

/// How many deliveries wait in a mailbox at most. A worker answers one request with one message a token, so this is far
/// beyond what gathers while an attempt waits its turn; a stream whose reader stalls is paused before it.
const CAPACITY: usize = 1024;

/// What arrives for an attempt.
#[derive(Debug)]
pub enum Delivery {
    /// A reply.
    Reply(Reply),
    /// The attempt is over without one: nobody listens, the connection is lost, or a message could not be read.
    Failed(ControllerError),
}

/// Where an attempt receives.
#[derive(Debug)]
pub struct Mailbox {
    receiver: mpsc::Receiver<Delivery>,
    on_drop: OnDrop,
}

/// Where a carrier posts. Clones post into the same mailbox.
#[derive(Clone, Debug)]
pub struct Postbox(mpsc::Sender<Delivery>);

/// Runs when it is dropped.
#[derive(Default)]
pub(super) struct OnDrop(Option<Box<dyn FnOnce() + Send + Sync>>);

/// A mailbox and the way into it.
#[must_use]
pub fn mailbox() -> (Postbox, Mailbox) {
    let (sender, receiver) = mpsc::channel(CAPACITY);
    (Postbox(sender), Mailbox { receiver, on_drop: OnDrop::default() })
}

// === impl Mailbox ===

impl Mailbox {
    /// Has something run when the mailbox is dropped: the carrier forgets it.
    #[must_use]
    pub fn on_drop(mut self, run: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.on_drop = OnDrop::new(run);
        self
    }

    /// The next delivery; `None` when the carrier has gone, or has posted more than fits.
    pub async fn recv(&mut self) -> Option<Delivery> {
        self.receiver.recv().await
    }

    /// The next delivery if it is there already.
    pub fn try_recv(&mut self) -> Option<Delivery> {
        self.receiver.try_recv().ok()
    }
}

// === impl Postbox ===

impl Postbox {
    /// Posts, without waiting. `false`: the attempt is over, or its mailbox is full; the carrier gives up on it, and the
    /// gap shows as a missing index or as a mailbox that ends.
    pub fn post(&self, delivery: Delivery) -> bool {
        self.0.try_send(delivery).is_ok()
    }

    /// Posts the last delivery, once the mailbox has room.
    pub(super) async fn post_when_read(self, delivery: Delivery) {
        // The attempt is over: nobody needs it.
        let _ = self.0.send(delivery).await;
    }

    /// Returns when nobody waits any more.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }

    /// Whether another delivery fits now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.0.capacity() > 0
    }

    /// Whether nobody waits any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

// === impl OnDrop ===

impl OnDrop {
    pub(super) fn new(run: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(run)))
    }
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        if let Some(run) = self.0.take() {
            run();
        }
    }
}

impl std::fmt::Debug for OnDrop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnDrop")
    }
}
