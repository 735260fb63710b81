//! The controller's own inbox: one wildcard subscription, made before the first publish, and a slab of waiting attempts.
//!
//! Each attempt has a subject of its own. Its entry lives exactly as long as its mailbox; what comes later finds no entry
//! and is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::{Notify, mpsc};

use super::connection::{Incoming, NatsConnection, Subscription};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::transport::{Delivery, Mailbox, Postbox, mailbox};
use crate::wire::Reply;

/// The waiting attempts of one controller.
#[derive(Debug)]
pub(super) struct Inbox {
    /// `_INBOX.<unique>.`; an attempt's slot and generation follow.
    prefix: String,
    entries: Mutex<Slab<Entry>>,
    generation: AtomicU64,
    late: AtomicU64,
    /// An echo came.
    echoed: Notify,
    /// The last echo that was asked for did not come in time.
    silent: AtomicBool,
    /// Takes the numbers of cancellations that nobody heard.
    unheard: mpsc::Sender<u64>,
}

/// Where echoes come back: no attempt's subject is called so.
const ECHO: &str = "echo";
/// Where the server says that nobody heard a cancellation, whose number follows.
const CANCELLATION: &str = "cancel-";

#[derive(Debug)]
struct Entry {
    generation: u64,
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
            generation: AtomicU64::new(0),
            late: AtomicU64::new(0),
            echoed: Notify::new(),
            silent: AtomicBool::new(false),
            unheard,
        };
        Ok((Arc::new(inbox), subscription))
    }

    /// A new entry: the subject for the replies, and the mailbox that they reach.
    pub(super) fn enter(self: &Arc<Self>) -> (String, Mailbox) {
        let (slot, generation, _, mailbox) = self.open_entry();
        (format!("{}{slot}-{generation}", self.prefix), mailbox)
    }

    /// Where the server says that nobody heard a cancellation.
    pub(super) fn of_cancellation(&self, number: u64) -> String {
        format!("{}{CANCELLATION}{number}", self.prefix)
    }

    /// A new entry whose replies come another way: the way into its mailbox, and the mailbox.
    pub(super) fn admit(self: &Arc<Self>) -> (Postbox, Mailbox) {
        let (_, _, postbox, mailbox) = self.open_entry();
        (postbox, mailbox)
    }

    /// Hands every reply to its attempt, until the connection is closed.
    pub(super) async fn run(self: Arc<Self>, mut subscription: Subscription) {
        while let Some(message) = subscription.next().await {
            self.deliver(&message);
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
        if tokio::time::timeout(limit, echo).await.is_err() {
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

    fn deliver(&self, message: &Incoming) {
        if message.subject.strip_prefix(&self.prefix) == Some(ECHO) {
            self.silent.store(false, Ordering::Relaxed);
            self.echoed.notify_one();
            return;
        }
        if let Some(number) = message.subject.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix(CANCELLATION)) {
            // A worker may answer a cancellation here; that is of no interest.
            if let (true, Ok(number)) = (message.no_responders(), number.parse()) {
                let _ = self.unheard.try_send(number);
            }
            return;
        }
        let Some(postbox) = self.find(&message.subject) else {
            self.late.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let delivery = if message.no_responders() {
            Delivery::Failed(
                ControllerError::new(ControllerErrorCode::WorkerUnavailable, "the worker does not listen")
                    .with("noResponders", true),
            )
        } else {
            Reply::decode(&message.payload).into()
        };
        if !postbox.post(delivery) {
            self.late.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell_all(&self, delivery: impl Fn() -> Delivery) {
        for (_, entry) in self.entries.lock().iter() {
            entry.postbox.post(delivery());
        }
    }

    fn open_entry(self: &Arc<Self>) -> (usize, u64, Postbox, Mailbox) {
        let (postbox, mailbox) = mailbox();
        if self.silent.load(Ordering::Relaxed) {
            postbox.post(Delivery::Disturbed);
        }
        let generation = self.generation.fetch_add(1, Ordering::Relaxed);
        let slot = self.entries.lock().insert(Entry { generation, postbox: postbox.clone() });
        let inbox = Arc::clone(self);
        let mailbox = mailbox.on_drop(move || {
            inbox.entries.lock().try_remove(slot);
        });
        (slot, generation, postbox, mailbox)
    }

    fn find(&self, subject: &str) -> Option<Postbox> {
        let (slot, generation) = subject.strip_prefix(&self.prefix)?.split_once('-')?;
        let (slot, generation) = (slot.parse().ok()?, generation.parse::<u64>().ok()?);
        let entries = self.entries.lock();
        entries.get(slot).filter(|entry| entry.generation == generation).map(|entry| entry.postbox.clone())
    }
}
