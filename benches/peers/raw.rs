//! The bare transport: async-nats with a wildcard inbox of its own.
//!
//! The bound for every client: requests that were encoded beforehand, answers of which one byte is read, and nothing that
//! decides anything. What it has to do is find the caller of each message. Headers, which a worker is promised, are sent
//! where they are asked for, made beforehand, too.

use std::error::Error;
use std::sync::Arc;

use async_nats::{Client, HeaderMap, HeaderName, HeaderValue, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use mlx_serving_router::wire::{WorkerId, subject};
use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::load::{self, Side};
use crate::setup::Setup;

/// A name as long as a controller's.
const REQUEST_ID: &str = "00000000-0000-4000-8000-000000000000";
/// Where a message says its type: behind `{"requestId":"…","type":"`.
const TYPE_AT: usize = 14 + REQUEST_ID.len() + 10;

#[derive(Clone)]
struct Raw {
    client: Client,
    subject: Subject,
    inbox: Arc<Inbox>,
    /// By session.
    buffered: Arc<[Bytes]>,
    streaming: Arc<[Bytes]>,
    headers: Option<HeaderMap>,
    tokens: u64,
}

struct Inbox {
    prefix: String,
    waiting: Mutex<Slab<mpsc::UnboundedSender<Bytes>>>,
}

/// The entry of one request; leaves the inbox when it is dropped.
struct Entry<'a> {
    inbox: &'a Inbox,
    slot: usize,
    replies: mpsc::UnboundedReceiver<Bytes>,
}

/// The headers of a request, as a controller sends them.
pub fn headers() -> HeaderMap {
    [("Request-Id", REQUEST_ID), ("Attempt", "1"), ("Controller-Id", REQUEST_ID), ("Timeout-Ms", "30000")]
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from(value)))
        .into_iter()
        .collect()
}

/// Connects and takes rounds; requests have these headers.
pub async fn run(setup: Setup, headers: Option<HeaderMap>) -> Result<(), Box<dyn Error>> {
    let client = async_nats::ConnectOptions::new().subscription_capacity(65_536).connect(&setup.url).await?;
    let inbox = Arc::new(Inbox { prefix: format!("{}.", client.new_inbox()), waiting: Mutex::default() });
    let replies = client.subscribe(format!("{}*", inbox.prefix)).await?;
    client.flush().await?;
    tokio::spawn(deliver(Arc::clone(&inbox), replies));
    let raw = Raw {
        client,
        subject: subject::inference("", &WorkerId::new(&setup.worker)?).into(),
        inbox,
        buffered: bodies(&setup, false)?,
        streaming: bodies(&setup, true)?,
        headers,
        tokens: setup.tokens,
    };
    load::serve(raw).await
}

fn bodies(setup: &Setup, stream: bool) -> Result<Arc<[Bytes]>, Box<dyn Error>> {
    let body = |number| {
        let request = setup.request(number).map(|request| {
            let request_id = REQUEST_ID.to_owned();
            mlx_serving_router::wire::InferenceRequest { request_id, stream, ..request }
        })?;
        Ok(Bytes::from(serde_json::to_vec(&request)?))
    };
    (0..setup.sessions).map(body).collect()
}

async fn deliver(inbox: Arc<Inbox>, mut replies: Subscriber) {
    while let Some(message) = replies.next().await {
        let slot = message.subject.get(inbox.prefix.len()..).and_then(|slot| slot.parse().ok());
        if let Some(caller) = slot.and_then(|slot: usize| inbox.waiting.lock().get(slot).cloned()) {
            // A caller that is gone has left its entry.
            let _ = caller.send(message.payload);
        }
    }
}

// === impl Raw ===

impl Raw {
    async fn publish<'a>(&'a self, bodies: &[Bytes], number: u64) -> Result<Entry<'a>, String> {
        let (sender, replies) = mpsc::unbounded_channel();
        let slot = self.inbox.waiting.lock().insert(sender);
        let entry = Entry { inbox: &self.inbox, slot, replies };
        let reply = format!("{}{slot}", self.inbox.prefix);
        let session = usize::try_from(number % bodies.len() as u64).unwrap_or(0);
        let body = bodies.get(session).cloned().unwrap_or_default();
        let subject = self.subject.clone();
        match self.headers.clone() {
            None => self.client.publish_with_reply(subject, reply, body).await,
            Some(headers) => self.client.publish_with_reply_and_headers(subject, reply, headers, body).await,
        }
        .map_err(|error| error.to_string())?;
        Ok(entry)
    }
}

impl Side for Raw {
    async fn buffered(&self, number: u64) -> Result<(), String> {
        let mut entry = self.publish(&self.buffered, number).await?;
        loop {
            match entry.next().await? {
                b'a' => {}
                b'r' => return Ok(()),
                other => return Err(unexpected(other)),
            }
        }
    }

    async fn streaming(&self, number: u64) -> Result<(Instant, u64), String> {
        let mut entry = self.publish(&self.streaming, number).await?;
        let (mut first, mut tokens) = (None, 0);
        loop {
            match (entry.next().await?, first) {
                (b'a', _) => {}
                (b't', _) => {
                    tokens += 1;
                    first.get_or_insert_with(Instant::now);
                }
                (b'd', Some(first)) if tokens == self.tokens => return Ok((first, tokens)),
                (other, _) => return Err(unexpected(other)),
            }
        }
    }
}

fn unexpected(kind: u8) -> String {
    format!("a message of type {:?}… out of turn", char::from(kind))
}

// === impl Entry ===

impl Entry<'_> {
    /// The first letter of the next message's type.
    async fn next(&mut self) -> Result<u8, String> {
        let message = self.replies.recv().await.ok_or("the connection is closed")?;
        message.get(TYPE_AT).copied().ok_or_else(|| "a message without a type: is the worker there?".to_owned())
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.inbox.waiting.lock().try_remove(self.slot);
    }
}
