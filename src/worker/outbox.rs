//! The way out: one task that hands every waiting answer to its carrier.
//!
//! While the connection to NATS is down it waits and the answers grow in their own, bounded, place; when the connection is
//! back they go out. A full mailbox of this process holds up its own answer alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::answer::{Answer, Target};
use crate::error::ControllerErrorCode;
use crate::transport::Delivery;
use crate::transport::nats::NatsConnection;
use crate::wire::Reply;

/// How soon a full mailbox is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// The answers that have something to send; each stands here at most once.
#[derive(Default)]
pub(super) struct Outbox {
    waiting: Mutex<Waiting>,
    wake: Notify,
    idle: Notify,
}

#[derive(Default)]
struct Waiting {
    answers: VecDeque<Arc<Answer>>,
    /// More is coming at once: the task need not wake for what is there.
    gathering: usize,
    /// The task is at work on one, or has put some aside.
    at_work: bool,
}

/// Something is being added to an outbox, all of it at once.
pub(super) struct Gathering<'a>(&'a Outbox);

/// What became of an answer's messages.
enum Sent {
    All,
    /// The connection is down.
    Down(VecDeque<Reply>),
    /// The mailbox is full.
    Full(VecDeque<Reply>),
}

// === impl Gathering ===

impl Drop for Gathering<'_> {
    fn drop(&mut self) {
        self.0.waiting.lock().gathering -= 1;
        self.0.wake.notify_one();
    }
}

// === impl Outbox ===

impl Outbox {
    /// An answer has something to send.
    pub(super) fn add(&self, answer: Arc<Answer>) {
        let mut waiting = self.waiting.lock();
        waiting.answers.push_back(answer);
        if waiting.gathering == 0 {
            drop(waiting);
            self.wake.notify_one();
        }
    }

    /// Until the guard is dropped, what is added wakes nobody: waking for each of many costs more than sending them.
    pub(super) fn gather(&self) -> Gathering<'_> {
        self.waiting.lock().gathering += 1;
        Gathering(self)
    }

    /// Returns when everything has gone to its carrier.
    pub(super) async fn drained(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            {
                let waiting = self.waiting.lock();
                if waiting.answers.is_empty() && !waiting.at_work {
                    return;
                }
            }
            idle.await;
        }
    }

    /// Sends for ever.
    pub(super) async fn run(self: Arc<Self>, connection: Option<NatsConnection>) {
        let mut aside: Vec<Arc<Answer>> = Vec::new();
        let mut retry_at = Instant::now();
        loop {
            let Some(answer) = self.next(!aside.is_empty()) else {
                if aside.is_empty() {
                    self.wake.notified().await;
                } else {
                    // Others may go out meanwhile; without a wake of its own, so that this does not spin.
                    let _ = tokio::time::timeout_at(retry_at, self.wake.notified()).await;
                    if Instant::now() >= retry_at {
                        self.waiting.lock().answers.extend(aside.drain(..));
                    }
                }
                continue;
            };
            match send(&answer).await {
                Sent::All => {
                    if answer.settle(VecDeque::new()) {
                        self.add(answer);
                    }
                }
                Sent::Full(unsent) => {
                    answer.settle(unsent);
                    if aside.is_empty() {
                        retry_at = Instant::now() + RETRY;
                    }
                    aside.push(answer);
                }
                Sent::Down(unsent) => {
                    answer.settle(unsent);
                    self.add(answer);
                    if let Some(connection) = &connection {
                        let mut link = connection.link();
                        if link.wait_for(|link| link.connected).await.is_err() {
                            return;
                        }
                        // The link's news may be older than the loss.
                        tokio::time::sleep(RETRY).await;
                    }
                }
            }
        }
    }

    fn next(&self, aside: bool) -> Option<Arc<Answer>> {
        let mut waiting = self.waiting.lock();
        let next = waiting.answers.pop_front();
        waiting.at_work = aside || next.is_some();
        if !waiting.at_work {
            self.idle.notify_waiters();
        }
        next
    }
}

async fn send(answer: &Answer) -> Sent {
    let mut replies = answer.take();
    while let Some(reply) = replies.pop_front() {
        match answer.target() {
            Target::Local(postbox) if postbox.is_closed() => return Sent::All,
            Target::Local(postbox) if postbox.has_room() => drop(postbox.post(Delivery::Reply(reply))),
            Target::Local(_) => {
                replies.push_front(reply);
                return Sent::Full(replies);
            }
            Target::Nats(asked) => {
                let payload = reply.encode(answer.request_id()).into();
                let sent = if reply.is_terminal() { asked.finish(payload).await } else { asked.answer(payload).await };
                match sent.map_err(|error| error.code()) {
                    Ok(()) => {}
                    Err(ControllerErrorCode::PayloadTooLarge) => {
                        replies.clear();
                        replies.push_back(answer.too_large());
                    }
                    Err(_) => {
                        replies.push_front(reply);
                        return Sent::Down(replies);
                    }
                }
            }
        }
    }
    Sent::All
}
