//! Attempts over NATS. The only folder that names `async_nats`.
//!
//! Nothing is published while the connection is down, so nothing runs later for a caller long gone.

mod cancels;
mod connection;
mod inbox;
mod older;
mod service;
mod survey;

use std::sync::Arc;
use std::time::Duration;

use async_nats::{HeaderMap, HeaderName, HeaderValue, Subject};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;

use cancels::Cancels;
use connection::Message;
pub use connection::{Incoming, Link, NatsConnection, Subscription};
use inbox::Inbox;
pub use service::{Asked, WorkerService};
pub use survey::{ServerFacts, Sighting, Survey, survey};

use super::{Address, Mailbox, Outgoing, Transport};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{header, subject};

/// How often an echo is asked of the server while attempts wait, and how long it may take: together less than the default of
/// `acceptTimeoutMs`, so that a link that swallows everything is known before workers seem to be silent.
const ECHO_EVERY: Duration = Duration::from_millis(500);
const ECHO_LIMIT: Duration = Duration::from_secs(1);
/// Where so many attempts wait, more are likely to be sent now, and it is worth a turn of the runtime that they leave together.
const MANY: usize = 8;
const REQUEST_ID: HeaderName = HeaderName::from_static(header::REQUEST_ID);
const ATTEMPT: HeaderName = HeaderName::from_static(header::ATTEMPT);
const CONTROLLER_ID: HeaderName = HeaderName::from_static(header::CONTROLLER_ID);
const TIMEOUT_MS: HeaderName = HeaderName::from_static(header::TIMEOUT_MS);
const TRACEPARENT: HeaderName = HeaderName::from_static(header::TRACEPARENT);
const REPLY_TO: HeaderName = HeaderName::from_static(header::REPLY_TO);
/// How often the attempts are told of losses at most.
const LOSSES_EVERY: Duration = Duration::from_millis(100);
/// A trace context has 55 characters in its first version, and may have more in later ones.
const TRACEPARENT_LONGEST: usize = 256;

/// The carrier between one controller and the workers that listen on NATS.
#[derive(Debug)]
pub struct NatsTransport {
    connection: NatsConnection,
    controller_id: HeaderValue,
    inbox: Arc<Inbox>,
    cancels: Cancels,
    grace: Duration,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

// === impl NatsTransport ===

impl NatsTransport {
    /// Whether messages go out now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connection.is_connected()
    }

    /// Opens the controller's inbox on a connection.
    ///
    /// `grace` is how long calls wait for another server while the connection is down. With one server there is nothing
    /// to wait for, and they fail at once.
    ///
    /// # Errors
    /// NATS_ERROR: the connection is closed.
    pub async fn open(connection: NatsConnection, controller_id: Arc<str>, grace: Duration) -> Result<Self, ControllerError> {
        let (unheard, news) = cancels::unheard();
        let (inbox, subscription) = Inbox::open(&connection, unheard).await?;
        let controller_id = header_value(&controller_id)?;
        let (cancels, publisher) = Cancels::new(connection.clone(), controller_id.clone(), inbox.clone(), news);
        let grace = if connection.servers() > 1 { grace } else { Duration::ZERO };
        let tasks = [
            tokio::spawn(Arc::clone(&inbox).run(subscription)),
            tokio::spawn(publisher),
            tokio::spawn(watch_link(connection.clone(), Arc::clone(&inbox), grace)),
            tokio::spawn(feel_pulse(connection.clone(), Arc::clone(&inbox))),
        ];
        Ok(Self { connection, controller_id, inbox, cancels, grace, _tasks: tasks.map(AbortOnDropHandle::new).into() })
    }

    /// How many attempts wait for replies.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inbox.waiting()
    }

    /// How many replies came for attempts that were over.
    #[must_use]
    pub fn late_replies(&self) -> u64 {
        self.inbox.late()
    }

    async fn publish(&self, outgoing: &Outgoing) -> Result<Mailbox, ControllerError> {
        // In boxes, so that the rare ways do not make the usual one larger.
        if !self.connection.is_connected() {
            self.wait_for_server().boxed().await;
        }
        if outgoing.older {
            return older::publish(&self.connection, &self.inbox, outgoing).boxed().await;
        }
        let payload = outgoing.request.encode().map_err(|error| {
            ControllerError::new(ControllerErrorCode::InternalError, format!("cannot encode the request: {error}"))
        })?;
        let headers = self.headers(outgoing)?;
        let (address, mailbox) = self.inbox.enter();
        let (to, reply) = self.subjects(outgoing, address)?;
        let message = Message { subject: to, reply, headers, payload };
        if self.inbox.waiting() < MANY {
            self.connection.publish_request(message).await?;
        } else {
            self.connection.publish_together(message).await?;
        }
        Ok(mailbox)
    }

    fn headers(&self, outgoing: &Outgoing) -> Result<HeaderMap, ControllerError> {
        let timeout_ms = u64::try_from(outgoing.timeout.as_millis()).unwrap_or(u64::MAX).max(1);
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, header_value(&outgoing.request.request_id)?);
        headers.insert(ATTEMPT, HeaderValue::from(outgoing.attempt));
        headers.insert(CONTROLLER_ID, self.controller_id.clone());
        headers.insert(TIMEOUT_MS, HeaderValue::from(timeout_ms));
        // One that is no trace context is left out, as W3C's specification wants it.
        if let Some(traceparent) = outgoing.traceparent.as_ref().filter(|text| text.len() <= TRACEPARENT_LONGEST)
            && let Ok(value) = header_value(traceparent)
        {
            headers.insert(TRACEPARENT, value);
        }
        Ok(headers)
    }

    /// Where the request goes, and where its answer does; both in one piece of memory.
    fn subjects(&self, outgoing: &Outgoing, reply_to: Address) -> Result<(Subject, Subject), ControllerError> {
        let mut both = subject::inference(self.connection.prefix(), &outgoing.worker);
        let first = both.len();
        self.inbox.write_subject(reply_to, &mut both);
        let both = Bytes::from(both);
        let subject = |bytes| Subject::from_utf8(bytes).map_err(|error| connection::lost(&error));
        Ok((subject(both.slice(..first))?, subject(both.slice(first..))?))
    }

    /// Gives another server the time that it may take, while the connection is down.
    async fn wait_for_server(&self) {
        if !self.grace.is_zero() {
            let mut link = self.connection.link();
            // Still down after it: publishing says so.
            let _ = tokio::time::timeout(self.grace, link.wait_for(|link| link.connected)).await;
        }
    }
}

impl Transport for NatsTransport {
    fn send<'a>(&'a self, outgoing: &'a Outgoing) -> BoxFuture<'a, Result<Mailbox, ControllerError>> {
        self.publish(outgoing).boxed()
    }

    fn cancel(&self, outgoing: &Outgoing, mailbox: &Mailbox) {
        self.cancels.send(outgoing, mailbox);
    }
}

/// Asks the server for an echo now and then, as long as somebody waits for a worker.
async fn feel_pulse(connection: NatsConnection, inbox: Arc<Inbox>) {
    let mut beats = tokio::time::interval(ECHO_EVERY);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        if inbox.waiting() > 0 && connection.is_connected() {
            inbox.listen_for_echo(&connection, ECHO_LIMIT).await;
        }
    }
}

/// Tells the attempts in flight that the connection was lost, or messages were, and ends them once the connection has been
/// down for longer than the grace.
async fn watch_link(connection: NatsConnection, inbox: Arc<Inbox>, grace: Duration) {
    let mut link = connection.link();
    let (mut connects, mut losses) = (1, 0);
    loop {
        // The news of the first connection may still be on its way; one that was down and is up again counts as down.
        let is_lost = |link: &Link| link.connects > connects || (link.connects > 0 && !link.connected);
        match link.wait_for(|link| is_lost(link) || link.losses > losses).await.map(|link| *link) {
            Err(_) => return,
            Ok(now) => {
                inbox.disturb_all();
                losses = now.losses;
                if !is_lost(&now) {
                    // A flood is told of message by message, and to tell everybody each time would make it worse.
                    let _ = tokio::time::timeout(LOSSES_EVERY, link.wait_for(is_lost)).await;
                    continue;
                }
            }
        }
        let back = tokio::time::timeout(grace, link.wait_for(|link| link.connected)).await.is_ok_and(|state| state.is_ok());
        if !back {
            inbox.fail_all();
            if link.wait_for(|link| link.connected).await.is_err() {
                return;
            }
        }
        connects = link.borrow_and_update().connects;
    }
}

/// A header's value; one with a line break would be another header.
fn header_value(text: &str) -> Result<HeaderValue, ControllerError> {
    text.parse().map_err(|_| ControllerError::validation("request_id", "has characters that cannot stand in a header"))
}
