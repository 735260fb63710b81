//! The way back of one attempt: a bounded queue from whatever carries the replies to the attempt that waits for them.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::error::{ControllerError, ControllerErrorCode};
use crate::sync::Mutex;
use crate::wire::{Reply, Undecodable};

/// How many deliveries wait in a mailbox at most. A worker answers one request with one message a token, so this is far
/// beyond what gathers while an attempt waits its turn; only a reader that stalls lets it fill up, or a test of races.
const CAPACITY: usize = if cfg!(feature = "shuttle") { 3 } else { 1024 };

/// How long a carrier that can wait does so for a reader that stalls.
const READER_LONGEST: Duration = Duration::from_secs(30);

/// What arrives for an attempt.
#[derive(Debug)]
pub enum Delivery {
    /// A reply.
    Reply(Reply),
    /// The attempt is over without one: nobody listens, the connection is lost, or a message could not be read.
    Failed(ControllerError),
    /// Our own connection was lost, and is back or may be soon: parts of the answer may be missing, through no fault of the
    /// worker's.
    Disturbed,
    /// More came than fits: whoever reads did not keep up, and the rest is lost.
    Overflow,
}

/// Where an attempt receives.
#[derive(Debug)]
pub struct Mailbox {
    address: Option<String>,
    receiver: mpsc::Receiver<Delivery>,
    on_drop: OnDrop,
}

/// Where a carrier posts. Clones post into the same mailbox.
#[derive(Clone, Debug)]
pub struct Postbox {
    sender: mpsc::Sender<Delivery>,
    /// The place that is kept for [`Delivery::Overflow`]; `None` once that is posted.
    last: Arc<Mutex<Option<mpsc::OwnedPermit<Delivery>>>>,
}

/// Runs when it is dropped.
#[derive(Default)]
pub(super) struct OnDrop(Option<Box<dyn FnOnce() + Send + Sync>>);

/// A mailbox and the way into it.
#[must_use]
pub fn mailbox() -> (Postbox, Mailbox) {
    let (sender, receiver) = mpsc::channel(CAPACITY + 1);
    let last = Arc::new(Mutex::new(sender.clone().try_reserve_owned().ok()));
    (Postbox { sender, last }, Mailbox { address: None, receiver, on_drop: OnDrop::default() })
}

// === impl Delivery ===

/// What a message means to the attempt that it answers.
impl From<Result<Reply, Undecodable>> for Delivery {
    fn from(reply: Result<Reply, Undecodable>) -> Self {
        match reply {
            Ok(reply) => Self::Reply(reply),
            Err(error) => Self::Failed(
                ControllerError::new(ControllerErrorCode::WorkerUnavailable, format!("the worker broke the protocol: {error}"))
                    .with("protocolError", error.to_string()),
            ),
        }
    }
}

// === impl Mailbox ===

impl Mailbox {
    /// Gives it the name under which the worker answers.
    #[must_use]
    pub fn at(mut self, address: String) -> Self {
        self.address = Some(address);
        self
    }

    /// The name under which the worker answers, where the carrier has such names.
    #[must_use]
    pub fn address(&self) -> Option<&str> {
        self.address.as_deref()
    }

    /// Has something run when the mailbox is dropped: the carrier forgets it.
    #[must_use]
    pub fn on_drop(mut self, run: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.on_drop = OnDrop::new(run);
        self
    }

    /// The next delivery; `None` when the carrier has gone.
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
    /// Posts, without waiting. `false`: the attempt is over, or its mailbox is full. One that was full once takes nothing
    /// more, and ends with [`Delivery::Overflow`].
    pub fn post(&self, delivery: Delivery) -> bool {
        // Held until it is posted: nothing comes after the word that more came than fits.
        let mut last = self.last.lock();
        if last.is_none() {
            return false;
        }
        match self.sender.try_send(delivery) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                // The word is a delivery of its own: it wakes a reader that has come to the end in the meantime.
                if let Some(place) = last.take() {
                    place.send(Delivery::Overflow);
                }
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    /// Posts as soon as it fits, for a carrier that can hold its worker back. `false`: the attempt is over, or its mailbox
    /// was full for so long that it ends with [`Delivery::Overflow`].
    pub async fn post_in_time(&self, delivery: Delivery) -> bool {
        match tokio::time::timeout(READER_LONGEST, self.sender.reserve()).await {
            Ok(Ok(place)) => {
                place.send(delivery);
                true
            }
            Ok(Err(_)) => false,
            Err(_) => self.post(delivery),
        }
    }

    /// Returns when nobody waits any more.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }

    /// Whether another delivery fits now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.sender.capacity() > 0
    }

    /// Whether nobody waits any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
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

#[cfg(all(test, feature = "shuttle"))]
mod races;

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn accepted() -> Delivery {
        Delivery::Reply(Reply::Accepted { queue_position: 0 })
    }

    #[tokio::test(start_paused = true)]
    async fn who_can_wait_waits_for_room() {
        let (postbox, mut mailbox) = mailbox();
        let posting = tokio::spawn(async move {
            for _ in 0..3 * CAPACITY {
                assert!(postbox.post_in_time(accepted()).await);
            }
        });
        for _ in 0..3 * CAPACITY {
            assert!(matches!(mailbox.recv().await, Some(Delivery::Reply(_))));
        }
        posting.await.unwrap();
        assert!(mailbox.recv().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stalls_for_too_long_loses_the_rest_and_is_told_so() {
        let (postbox, mut mailbox) = mailbox();
        for _ in 0..CAPACITY {
            assert!(postbox.post_in_time(accepted()).await);
        }
        let began = tokio::time::Instant::now();
        assert!(!postbox.post_in_time(accepted()).await);
        assert_eq!(began.elapsed(), READER_LONGEST);
        for _ in 0..CAPACITY {
            assert!(matches!(mailbox.try_recv(), Some(Delivery::Reply(_))));
        }
        assert!(matches!(mailbox.try_recv(), Some(Delivery::Overflow)));
        drop(mailbox);
        assert!(!postbox.post_in_time(accepted()).await);
    }
}
