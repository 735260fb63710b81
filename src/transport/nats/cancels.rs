//! Cancellations on their way out, and again where nobody heard them.
//!
//! NATS drops what nobody has subscribed to. A worker whose connection is not back yet when ours is would go on for callers
//! long gone until their time is over, and be spared meanwhile for the load that it reports. So a cancellation asks the
//! server for word where nobody listens, and is sent again then, for a while. Whoever listens gets it once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_nats::{HeaderMap, HeaderValue, Subject};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::connection::{Message, NatsConnection};
use super::inbox::Inbox;
use super::{CONTROLLER_ID, REPLY_TO};
use crate::error::ControllerErrorCode;
use crate::transport::{Mailbox, Outgoing};
use crate::wire::{Cancel, subject};

/// How many wait to be published, and how many are remembered until they are known to be heard; beyond it they are left to
/// the workers' own deadlines.
const CAPACITY: usize = 4096;
/// How soon one that did not go out is tried again, once the connection seems to be there.
const RETRY: Duration = Duration::from_millis(5);
/// Within which the server has said that nobody listens.
const WORD: Duration = Duration::from_secs(2);
/// When one that nobody heard is sent again: at first, at most, and for how long. NATS clients try to connect again every
/// two seconds or more often, unless they are told otherwise.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(10);

/// Where cancellations are left.
#[derive(Debug)]
pub(super) struct Cancels {
    prefix: Box<str>,
    controller_id: HeaderValue,
    inbox: Arc<Inbox>,
    queue: mpsc::Sender<Cancellation>,
}

#[derive(Debug)]
struct Cancellation {
    to: Subject,
    headers: HeaderMap,
    payload: Bytes,
    /// Since it went out for the first time.
    since: Option<Instant>,
    pause: Duration,
}

/// Publishes them.
struct Publisher {
    connection: NatsConnection,
    inbox: Arc<Inbox>,
    sent: Sent,
    again: BTreeMap<(Instant, u64), Cancellation>,
}

/// Those that went out lately, by number. A place is empty once its cancellation is known to be unheard.
#[derive(Default)]
struct Sent {
    first: u64,
    places: VecDeque<(Instant, Option<Cancellation>)>,
}

/// The way in which the inbox tells the number of one that nobody heard.
pub(super) fn unheard() -> (mpsc::Sender<u64>, mpsc::Receiver<u64>) {
    mpsc::channel(CAPACITY)
}

// === impl Cancels ===

impl Cancels {
    /// The place for cancellations, and what publishes them until that place is gone.
    pub(super) fn new(
        connection: NatsConnection,
        controller_id: HeaderValue,
        inbox: Arc<Inbox>,
        unheard: mpsc::Receiver<u64>,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (queue, queued) = mpsc::channel(CAPACITY);
        let prefix = connection.prefix().into();
        let publisher = Publisher { connection, inbox: Arc::clone(&inbox), sent: Sent::default(), again: BTreeMap::new() };
        (Self { prefix, controller_id, inbox, queue }, publisher.run(queued, unheard))
    }

    /// Leaves one, without waiting. No room: the worker stops at its deadline.
    pub(super) fn send(&self, outgoing: &Outgoing, mailbox: &Mailbox) {
        let cancel = Cancel { request_id: outgoing.request.request_id.clone(), attempt: outgoing.attempt };
        // Two controllers may have requests of one name at one worker, and one controller may, one soon after the other.
        let mut headers = HeaderMap::new();
        headers.insert(CONTROLLER_ID, self.controller_id.clone());
        if let Some(address) = mailbox.address() {
            let mut subject = String::new();
            self.inbox.write_subject(address, &mut subject);
            headers.insert(REPLY_TO, subject);
        }
        let Ok(payload) = serde_json::to_vec(&cancel) else { return };
        let to = subject::cancel(&self.prefix, &outgoing.worker).into();
        let _ = self.queue.try_send(Cancellation { to, headers, payload: payload.into(), since: None, pause: FIRST_PAUSE });
    }
}

// === impl Publisher ===

impl Publisher {
    async fn run(mut self, mut queued: mpsc::Receiver<Cancellation>, mut unheard: mpsc::Receiver<u64>) {
        loop {
            let next = self.next();
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(number) = unheard.recv() => self.is_unheard(number),
                () = due => self.catch_up().await,
                cancellation = queued.recv() => match cancellation {
                    Some(cancellation) => self.publish(cancellation).await,
                    None => return,
                },
            }
        }
    }

    /// Publishes one. While the connection is down it waits: a request that had left before, or goes out late, would run for
    /// nobody afterwards.
    async fn publish(&mut self, mut cancellation: Cancellation) {
        let Cancellation { to, headers, payload, .. } = &cancellation;
        let word = Subject::from(self.inbox.of_cancellation(self.sent.next()));
        let publish = async || {
            let message =
                Message { subject: to.clone(), reply: word.clone(), headers: headers.clone(), payload: payload.clone() };
            // Behind the request, which may be on its way there.
            self.connection.publish_together(message).await
        };
        while let Err(error) = publish().await {
            if error.code() != ControllerErrorCode::NatsError {
                return;
            }
            if self.connection.link().wait_for(|link| link.connected).await.is_err() {
                return;
            }
            // The link's news may be older than the loss.
            tokio::time::sleep(RETRY).await;
        }
        let now = Instant::now();
        cancellation.since.get_or_insert(now);
        self.sent.push(cancellation, now);
    }

    /// Nobody listened: the worker has gone for good, or is about to be back.
    fn is_unheard(&mut self, number: u64) {
        let Some(mut cancellation) = self.sent.take(number) else { return };
        let (now, pause) = (Instant::now(), cancellation.pause);
        let is_over = cancellation.since.is_none_or(|since| now + pause > since + PATIENCE);
        if !is_over && self.again.len() < CAPACITY {
            cancellation.pause = (2 * pause).min(LONGEST_PAUSE);
            self.again.insert((now + pause, number), cancellation);
        }
    }

    /// When there is something to do again.
    fn next(&self) -> Option<Instant> {
        let again = self.again.first_key_value().map(|((at, _), _)| *at);
        again.into_iter().chain(self.sent.expiry()).min()
    }

    async fn catch_up(&mut self) {
        let now = Instant::now();
        self.sent.expire(now);
        while let Some(entry) = self.again.first_entry().filter(|entry| entry.key().0 <= now) {
            let cancellation = entry.remove();
            self.publish(cancellation).await;
        }
    }
}

// === impl Sent ===

impl Sent {
    /// The number that the next one gets.
    fn next(&self) -> u64 {
        self.first + self.places.len() as u64
    }

    fn push(&mut self, cancellation: Cancellation, now: Instant) {
        if self.places.len() == CAPACITY {
            self.drop_first();
        }
        self.places.push_back((now, Some(cancellation)));
    }

    fn take(&mut self, number: u64) -> Option<Cancellation> {
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.places.get_mut(index)?.1.take()
    }

    fn expiry(&self) -> Option<Instant> {
        self.places.front().map(|(at, _)| *at + WORD)
    }

    fn expire(&mut self, now: Instant) {
        while self.expiry().is_some_and(|at| at <= now) {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        self.places.pop_front();
        self.first += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cancellation(name: &str) -> Cancellation {
        Cancellation {
            to: name.to_owned().into(),
            headers: HeaderMap::new(),
            payload: Bytes::new(),
            since: None,
            pause: FIRST_PAUSE,
        }
    }

    #[test]
    fn those_sent_are_found_by_their_numbers_once_and_for_a_while() {
        let (mut sent, now) = (Sent::default(), Instant::now());
        for name in ["a", "b"] {
            sent.push(cancellation(name), now);
        }
        assert_eq!(sent.take(1).map(|one| one.to), Some("b".into()));
        assert!(sent.take(1).is_none() && sent.take(2).is_none());
        sent.expire(now + WORD);
        assert!(sent.take(0).is_none() && sent.expiry().is_none());
        assert_eq!(sent.next(), 2);
    }

    #[test]
    fn the_oldest_of_those_sent_goes_when_there_is_no_room() {
        let (mut sent, now) = (Sent::default(), Instant::now());
        for number in 0..=CAPACITY {
            sent.push(cancellation(&number.to_string()), now);
        }
        assert_eq!((sent.places.len(), sent.next()), (CAPACITY, CAPACITY as u64 + 1));
        assert!(sent.take(0).is_none());
        assert_eq!(sent.take(1).map(|one| one.to), Some("1".into()));
    }
}
