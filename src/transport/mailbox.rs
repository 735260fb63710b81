//! The way back of one attempt: a bounded queue from whatever carries the replies to the attempt that waits for them.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;

use crate::error::{ControllerError, ControllerErrorCode};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicUsize, Ordering};
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
    shared: Arc<Shared>,
    address: Option<Address>,
    on_drop: OnDrop,
}

/// Where a carrier posts. Clones post into the same mailbox.
#[derive(Debug)]
pub struct Postbox(Arc<Shared>);

/// What a carrier knows a mailbox by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Its place among those that wait.
    pub slot: usize,
    /// No other has had this number.
    pub number: u64,
}

/// A reader that is to be woken, and a carrier that may do so later: when it has delivered all that there is.
#[derive(Debug, Default)]
#[must_use]
pub struct Wake(Option<Waker>);

/// Runs when it is dropped.
#[derive(Default)]
pub(super) struct OnDrop(Option<Box<dyn FnOnce() + Send + Sync>>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// How many postboxes there are.
    postboxes: AtomicUsize,
    /// Told when a full mailbox has room again, and when nobody waits any more.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Delivery>,
    reader: Option<Waker>,
    /// More came than fits: nothing follows.
    overflowed: bool,
    /// Nobody waits any more.
    closed: bool,
}

/// What came of posting.
enum Posted {
    Taken(Option<Waker>),
    Full(Delivery),
    Refused(Option<Waker>),
}

/// A mailbox and the way into it.
#[must_use]
pub fn mailbox() -> (Postbox, Mailbox) {
    let shared = Arc::new(Shared { state: Mutex::default(), postboxes: AtomicUsize::new(1), changed: Notify::new() });
    (Postbox(Arc::clone(&shared)), Mailbox { shared, address: None, on_drop: OnDrop::default() })
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
    /// Notes what the carrier knows it by.
    #[must_use]
    pub fn at(mut self, address: Address) -> Self {
        self.address = Some(address);
        self
    }

    /// What the carrier knows it by, where it has such names.
    #[must_use]
    pub fn address(&self) -> Option<Address> {
        self.address
    }

    /// Has something run when the mailbox is dropped: the carrier forgets it.
    #[must_use]
    pub fn on_drop(mut self, run: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.on_drop = OnDrop::new(run);
        self
    }

    /// The next delivery; `None` when the carrier has gone. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Delivery> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    /// As [`Self::recv`], to be polled.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Delivery>> {
        let mut state = self.shared.state.lock();
        if let Some(delivery) = self.shared.take(&mut state) {
            return Poll::Ready(Some(delivery));
        }
        if self.shared.postboxes.load(Ordering::Acquire) == 0 {
            return Poll::Ready(None);
        }
        match &mut state.reader {
            Some(reader) => reader.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// The next delivery if it is there already.
    pub fn try_recv(&mut self) -> Option<Delivery> {
        self.shared.take(&mut self.shared.state.lock())
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        let (waiting, reader) = {
            let mut state = self.shared.state.lock();
            state.closed = true;
            (std::mem::take(&mut state.waiting), state.reader.take())
        };
        drop((waiting, reader));
        self.shared.changed.notify_waiters();
    }
}

// === impl Shared ===

impl Shared {
    fn take(&self, state: &mut State) -> Option<Delivery> {
        let was_full = state.waiting.len() >= CAPACITY;
        let delivery = state.waiting.pop_front();
        if was_full {
            self.changed.notify_waiters();
        }
        delivery
    }

    /// Posts, and where there is no room says so, in the place kept for that, unless the carrier is `patient`.
    fn post(&self, delivery: Delivery, patient: bool) -> Posted {
        let mut state = self.state.lock();
        if state.closed || state.overflowed {
            return Posted::Refused(None);
        }
        // To be told twice in a row says nothing more, and must not fill a mailbox that nobody looks into.
        if matches!((&delivery, state.waiting.back()), (Delivery::Disturbed, Some(Delivery::Disturbed))) {
            return Posted::Taken(state.reader.take());
        }
        if state.waiting.len() < CAPACITY {
            state.waiting.push_back(delivery);
            return Posted::Taken(state.reader.take());
        }
        if patient {
            return Posted::Full(delivery);
        }
        state.overflowed = true;
        // The word is a delivery of its own: it wakes a reader that has come to the end in the meantime.
        state.waiting.push_back(Delivery::Overflow);
        Posted::Refused(state.reader.take())
    }
}

// === impl Postbox ===

impl Postbox {
    /// Posts, without waiting. `false`: the attempt is over, or its mailbox is full. One that was full once takes nothing
    /// more, and ends with [`Delivery::Overflow`].
    pub fn post(&self, delivery: Delivery) -> bool {
        let (taken, wake) = self.post_quietly(delivery);
        wake.wake();
        taken
    }

    /// As [`Self::post`], for a carrier that has more to deliver first: the reader goes on once it is woken.
    pub fn post_quietly(&self, delivery: Delivery) -> (bool, Wake) {
        match self.0.post(delivery, false) {
            Posted::Taken(reader) => (true, Wake(reader)),
            Posted::Refused(reader) => (false, Wake(reader)),
            Posted::Full(_) => (false, Wake(None)),
        }
    }

    /// Posts as soon as it fits, for a carrier that can hold its worker back. `false`: the attempt is over, or its mailbox
    /// was full for so long that it ends with [`Delivery::Overflow`].
    pub async fn post_in_time(&self, delivery: Delivery) -> bool {
        let mut held = Some(delivery);
        let posted = async {
            loop {
                let changed = self.0.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                let Some(delivery) = held.take() else { return false };
                match self.0.post(delivery, true) {
                    Posted::Taken(reader) => {
                        Wake(reader).wake();
                        return true;
                    }
                    Posted::Full(back) => held = Some(back),
                    Posted::Refused(_) => return false,
                }
                changed.await;
            }
        };
        match tokio::time::timeout(READER_LONGEST, posted).await {
            Ok(taken) => taken,
            Err(_) => held.is_some_and(|delivery| self.post(delivery)),
        }
    }

    /// Returns when nobody waits any more.
    pub async fn closed(&self) {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.is_closed() {
                return;
            }
            changed.await;
        }
    }

    /// Whether another delivery fits now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.0.state.lock().waiting.len() < CAPACITY
    }

    /// Whether nobody waits any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.state.lock().closed
    }
}

impl Clone for Postbox {
    fn clone(&self) -> Self {
        self.0.postboxes.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Postbox {
    fn drop(&mut self) {
        if self.0.postboxes.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Under the lock: a reader that has looked before is on record, one that looks later sees the number.
            let reader = self.0.state.lock().reader.take();
            Wake(reader).wake();
        }
    }
}

// === impl Wake ===

impl Wake {
    /// Lets the reader go on, where one waits. Dropping it does the same.
    pub fn wake(self) {
        drop(self);
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        if let Some(reader) = self.0.take() {
            reader.wake();
        }
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

    #[test]
    fn the_same_news_again_takes_no_room() {
        let (postbox, mut mailbox) = mailbox();
        assert!(postbox.post(accepted()));
        assert!((0..3 * CAPACITY).all(|_| postbox.post(Delivery::Disturbed)));
        assert!(postbox.post(accepted()) && postbox.post(Delivery::Disturbed));
        let said: Vec<_> = std::iter::from_fn(|| mailbox.try_recv()).map(|said| matches!(said, Delivery::Disturbed)).collect();
        assert_eq!(said, [false, true, false, true]);
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
