//! The controller's own inbox: one wildcard subscription, made before the first publish, and a slab of waiting attempts.
//!
//! Each attempt has a subject of its own. Its entry lives exactly as long as its mailbox; what comes later finds no entry
//! and is counted.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::{Notify, mpsc};

use super::connection::{Incoming, NatsConnection, Subscription};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::transport::{Address, Delivery, Mailbox, Postbox, Wake, mailbox};
use crate::wire::Reply;

/// The waiting attempts of one controller.
#[derive(Debug)]
pub(super) struct Inbox {
    /// `_INBOX.<unique>.`; an attempt's slot and number follow.
    prefix: String,
    entries: Mutex<Slab<Entry>>,
    numbers: AtomicU64,
    late: AtomicU64,
    /// An echo came.
    echoed: Notify,
    /// The last echo that was asked for did not come in time.
    silent: AtomicBool,
    /// How many messages were handed on.
    delivered: AtomicU64,
    /// Takes the numbers of cancellations that nobody heard.
    unheard: mpsc::Sender<u64>,
}

/// How many messages are delivered at most before those who wait for them go on.
const TOGETHER: usize = 256;
/// Where echoes come back: no attempt's subject is called so.
const ECHO: &str = "echo";
/// Where the server says that nobody heard a cancellation, whose number follows.
const CANCELLATION: &str = "cancel-";

#[derive(Debug)]
struct Entry {
    number: u64,
    postbox: Postbox,
}

// === impl Inbox ===

impl Inbox {
    /// Subscribes to a new inbox.
    pub(super) async fn open(
        connection: &NatsConnection,
        unheard: mpsc::Sender<u64>,
    ) -> Result<(Arc<Self>, Subscription), ControllerError> {
        let prefix = format!("{}.", connection.client().new_inbox());
        let subscription = connection.subscribe(format!("{prefix}*")).await?;
        let inbox = Self {
            prefix,
            entries: Mutex::default(),
            numbers: AtomicU64::new(0),
            late: AtomicU64::new(0),
            echoed: Notify::new(),
            silent: AtomicBool::new(false),
            delivered: AtomicU64::new(0),
            unheard,
        };
        Ok((Arc::new(inbox), subscription))
    }

    /// A new entry, and the mailbox that its replies reach.
    pub(super) fn enter(self: &Arc<Self>) -> (Address, Mailbox) {
        let (address, _, mailbox) = self.open_entry();
        (address, mailbox.at(address))
    }

    /// Writes the subject for the replies to an entry.
    pub(super) fn write_subject(&self, of: Address, into: &mut String) {
        into.reserve(self.prefix.len() + 32);
        // Writing into a String cannot fail.
        let _ = write!(into, "{}{}-{}", self.prefix, of.slot, of.number);
    }

    /// Where the server says that nobody heard a cancellation.
    pub(super) fn of_cancellation(&self, number: u64) -> String {
        format!("{}{CANCELLATION}{number}", self.prefix)
    }

    /// A new entry whose replies come another way: the way into its mailbox, and the mailbox.
    pub(super) fn admit(self: &Arc<Self>) -> (Postbox, Mailbox) {
        let (_, postbox, mailbox) = self.open_entry();
        (postbox, mailbox)
    }

    /// Hands every reply to its attempt, until the connection is closed. What has come together is delivered before those
    /// who wait for it go on, so that they find all of it at once.
    pub(super) async fn run(self: Arc<Self>, mut subscription: Subscription) {
        let mut waiting = Vec::with_capacity(TOGETHER);
        while let Some(message) = subscription.next().await {
            waiting.push(self.deliver(&message));
            while waiting.len() < TOGETHER
                && let Some(Some(message)) = subscription.next().now_or_never()
            {
                waiting.push(self.deliver(&message));
            }
            waiting.drain(..).for_each(Wake::wake);
        }
        self.fail_all();
    }

    /// Ends every waiting attempt: our own connection is lost.
    pub(super) fn fail_all(&self) {
        self.tell_all(|| {
            Delivery::Failed(ControllerError::new(
                ControllerErrorCode::NatsError,
                "the connection to NATS was lost while the request was running",
            ))
        });
    }

    /// Tells every waiting attempt that its answer may have lost parts with our own connection.
    pub(super) fn disturb_all(&self) {
        self.tell_all(|| Delivery::Disturbed);
    }

    /// Whether what is sent to the server comes back. Where it does not, the attempts are told as if the connection were lost:
    /// a link that swallows everything looks like workers that say nothing, long before its pings tell.
    pub(super) async fn listen_for_echo(&self, connection: &NatsConnection, limit: Duration) {
        let echo = async {
            connection.publish(format!("{}{ECHO}", self.prefix), Bytes::new()).await.ok()?;
            self.echoed.notified().await;
            Some(())
        };
        tokio::pin!(echo);
        if tokio::time::timeout(limit / 2, &mut echo).await.is_ok() {
            return;
        }
        // Behind many others an echo takes its time, and those are signs of life as well.
        let before = self.delivered.load(Ordering::Relaxed);
        if tokio::time::timeout(limit / 2, echo).await.is_err() && self.delivered.load(Ordering::Relaxed) == before {
            self.silent.store(true, Ordering::Relaxed);
            self.disturb_all();
        }
    }

    /// How many attempts wait.
    pub(super) fn waiting(&self) -> usize {
        self.entries.lock().len()
    }

    /// How many replies came for attempts that were over.
    pub(super) fn late(&self) -> u64 {
        self.late.load(Ordering::Relaxed)
    }

    fn deliver(&self, message: &Incoming) -> Wake {
        self.delivered.fetch_add(1, Ordering::Relaxed);
        if message.subject.strip_prefix(&self.prefix) == Some(ECHO) {
            self.silent.store(false, Ordering::Relaxed);
            self.echoed.notify_one();
            return Wake::default();
        }
        if let Some(number) = message.subject.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix(CANCELLATION)) {
            // A worker may answer a cancellation here; that is of no interest.
            if let (true, Ok(number)) = (message.no_responders(), number.parse()) {
                let _ = self.unheard.try_send(number);
            }
            return Wake::default();
        }
        let Some(postbox) = self.find(&message.subject) else {
            self.late.fetch_add(1, Ordering::Relaxed);
            return Wake::default();
        };
        let delivery = if message.no_responders() {
            Delivery::Failed(
                ControllerError::new(ControllerErrorCode::WorkerUnavailable, "the worker does not listen")
                    .with("noResponders", true),
            )
        } else {
            Reply::decode(&message.payload).into()
        };
        let (taken, wake) = postbox.post_quietly(delivery);
        if !taken {
            self.late.fetch_add(1, Ordering::Relaxed);
        }
        wake
    }

    fn tell_all(&self, delivery: impl Fn() -> Delivery) {
        for (_, entry) in self.entries.lock().iter() {
            entry.postbox.post(delivery());
        }
    }

    fn open_entry(self: &Arc<Self>) -> (Address, Postbox, Mailbox) {
        let (postbox, mailbox) = mailbox();
        if self.silent.load(Ordering::Relaxed) {
            postbox.post(Delivery::Disturbed);
        }
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let slot = self.entries.lock().insert(Entry { number, postbox: postbox.clone() });
        let inbox = Arc::clone(self);
        let mailbox = mailbox.on_drop(move || {
            let entry = inbox.entries.lock().try_remove(slot);
            drop(entry);
        });
        (Address { slot, number }, postbox, mailbox)
    }

    fn find(&self, subject: &str) -> Option<Postbox> {
        let (slot, number) = subject.strip_prefix(&self.prefix)?.split_once('-')?;
        let (slot, number) = (slot.parse().ok()?, number.parse::<u64>().ok()?);
        let entries = self.entries.lock();
        entries.get(slot).filter(|entry| entry.number == number).map(|entry| entry.postbox.clone())
    }
}
