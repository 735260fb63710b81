//! Attempts over NATS. The only folder that names `async_nats`.
//!
//! Nothing is published while the connection is down, so nothing runs later for a caller long gone.

mod connection;
mod inbox;
mod older;
mod service;

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

pub use connection::{Incoming, Link, NatsConnection, Subscription};
use inbox::Inbox;
pub use service::{Asked, WorkerService};

use super::{Mailbox, Outgoing, Transport};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{Cancel, WorkerId, header, subject};

/// How many cancellations wait to be published; beyond it they are left to the workers' own deadlines.
const CANCEL_CAPACITY: usize = 4096;

/// The carrier between one controller and the workers that listen on NATS.
#[derive(Debug)]
pub struct NatsTransport {
    connection: NatsConnection,
    controller_id: Arc<str>,
    inbox: Arc<Inbox>,
    cancels: mpsc::Sender<(WorkerId, Cancel)>,
    grace: Duration,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

// === impl NatsTransport ===

impl NatsTransport {
    /// Opens the controller's inbox on a connection.
    ///
    /// `grace` is how long calls wait for another server while the connection is down. With one server there is nothing
    /// to wait for, and they fail at once.
    ///
    /// # Errors
    /// NATS_ERROR: the connection is closed.
    pub async fn open(connection: NatsConnection, controller_id: Arc<str>, grace: Duration) -> Result<Self, ControllerError> {
        let (inbox, subscription) = Inbox::open(&connection).await?;
        let (cancels, queued) = mpsc::channel(CANCEL_CAPACITY);
        let grace = if connection.servers() > 1 { grace } else { Duration::ZERO };
        let tasks = [
            tokio::spawn(Arc::clone(&inbox).run(subscription)),
            tokio::spawn(publish_cancels(connection.clone(), controller_id.clone(), queued)),
            tokio::spawn(watch_link(connection.clone(), Arc::clone(&inbox), grace)),
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

    async fn publish(&self, outgoing: Outgoing) -> Result<Mailbox, ControllerError> {
        self.wait_for_server().await;
        if outgoing.older {
            return older::publish(&self.connection, &self.inbox, &outgoing).await;
        }
        let payload = serde_json::to_vec(&*outgoing.request).map_err(|error| {
            ControllerError::new(ControllerErrorCode::InternalError, format!("cannot encode the request: {error}"))
        })?;
        let mut headers = HeaderMap::new();
        headers.insert(header::REQUEST_ID, header_value(&outgoing.request.request_id)?);
        headers.insert(header::ATTEMPT, outgoing.attempt.to_string());
        headers.insert(header::CONTROLLER_ID, header_value(&self.controller_id)?);
        headers.insert(header::TIMEOUT_MS, outgoing.timeout.as_millis().max(1).to_string());
        if let Some(traceparent) = &outgoing.traceparent
            && let Ok(value) = header_value(traceparent)
        {
            headers.insert(header::TRACEPARENT, value);
        }
        let (reply, mailbox) = self.inbox.enter();
        let to = subject::inference(self.connection.prefix(), &outgoing.worker);
        self.connection.publish_request(to, reply, headers, Bytes::from(payload)).await?;
        Ok(mailbox)
    }

    /// Gives another server the time that it may take, while the connection is down.
    async fn wait_for_server(&self) {
        if !self.connection.is_connected() && !self.grace.is_zero() {
            let mut link = self.connection.link();
            // Still down after it: publishing says so.
            let _ = tokio::time::timeout(self.grace, link.wait_for(|link| link.connected)).await;
        }
    }
}

impl Transport for NatsTransport {
    fn send(&self, outgoing: Outgoing) -> BoxFuture<'_, Result<Mailbox, ControllerError>> {
        self.publish(outgoing).boxed()
    }

    fn cancel(&self, worker: &WorkerId, request_id: &str, attempt: u32) {
        let cancel = Cancel { request_id: request_id.to_owned(), attempt };
        // Full: the worker stops at its deadline.
        let _ = self.cancels.try_send((worker.clone(), cancel));
    }
}

/// Says whose attempt is meant: two controllers may have requests of one name at one worker.
async fn publish_cancels(connection: NatsConnection, controller_id: Arc<str>, mut queued: mpsc::Receiver<(WorkerId, Cancel)>) {
    while let Some((worker, cancel)) = queued.recv().await {
        let Ok(payload) = serde_json::to_vec(&cancel) else { continue };
        let mut headers = HeaderMap::new();
        if let Ok(name) = header_value(&controller_id) {
            headers.insert(header::CONTROLLER_ID, name);
        }
        // While the connection is down nobody is told; the worker stops when it misses our heartbeats, or at its deadline.
        let _ = connection.publish_with_headers(subject::cancel(connection.prefix(), &worker), headers, payload.into()).await;
    }
}

/// Ends the attempts in flight once the connection has been down for longer than the grace.
async fn watch_link(connection: NatsConnection, inbox: Arc<Inbox>, grace: Duration) {
    let mut link = connection.link();
    loop {
        if link.wait_for(|link| !link.connected && link.connects > 0).await.is_err() {
            return;
        }
        let back = tokio::time::timeout(grace, link.wait_for(|link| link.connected)).await.is_ok_and(|state| state.is_ok());
        if !back {
            inbox.fail_all();
            if link.wait_for(|link| link.connected).await.is_err() {
                return;
            }
        }
    }
}

/// A header's value; one with a line break would be another header.
fn header_value(text: &str) -> Result<async_nats::HeaderValue, ControllerError> {
    text.parse().map_err(|_| ControllerError::validation("request_id", "has characters that cannot stand in a header"))
}
