//! Attempts to workers in this very process: the same messages as over NATS, without a server and without encoding.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::mailbox::OnDrop;
use super::{Mailbox, Outgoing, Postbox, Transport, mailbox};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{Heartbeat, InferenceRequest, WorkerId};

/// How many messages wait for one worker at most; a worker takes them off at once and queues by its own bounds.
const CAPACITY: usize = 4096;

/// The carrier between one controller and the workers of its process.
#[derive(Debug)]
pub struct LocalHub {
    controller_id: Arc<str>,
    /// Sorted, so that they always hear of an end in the same order.
    ports: Arc<Mutex<BTreeMap<WorkerId, mpsc::Sender<LocalMessage>>>>,
}

/// A worker's end of the hub. Dropping it detaches the worker.
#[derive(Debug)]
pub struct LocalPort {
    worker: WorkerId,
    receiver: mpsc::Receiver<LocalMessage>,
    ports: Arc<Mutex<BTreeMap<WorkerId, mpsc::Sender<LocalMessage>>>>,
    on_detach: OnDrop,
    listener: Listener,
}

/// What a local worker says of itself, as others publish it.
#[derive(Debug)]
pub enum LocalNews {
    /// Its load, and what it is doing. Until the first it counts as ready, and its silence says nothing.
    Heartbeat(Box<Heartbeat>),
    /// It wants nothing new.
    Deregister,
}

/// Who hears the news.
#[derive(Default)]
struct Listener(Option<Box<dyn Fn(LocalNews) + Send + Sync>>);

/// What reaches a local worker.
#[derive(Debug)]
pub enum LocalMessage {
    /// An attempt.
    Request {
        /// What is asked.
        request: Arc<InferenceRequest>,
        /// 1 for the first attempt.
        attempt: u32,
        /// How long it may take, to its end.
        timeout: Duration,
        /// Who asks.
        controller_id: Arc<str>,
        /// Where the replies go.
        postbox: Postbox,
    },
    /// The end of interest in one.
    Cancel {
        /// The request.
        request_id: String,
        /// Its attempt.
        attempt: u32,
    },
}

// === impl LocalHub ===

impl LocalHub {
    /// A hub without workers.
    #[must_use]
    pub fn new(controller_id: Arc<str>) -> Self {
        Self { controller_id, ports: Arc::default() }
    }

    /// Gives a worker its end; `None` when one of this name is attached already.
    #[must_use]
    pub fn attach(&self, worker: &WorkerId) -> Option<LocalPort> {
        let (sender, receiver) = mpsc::channel(CAPACITY);
        let mut ports = self.ports.lock();
        if ports.contains_key(worker) {
            return None;
        }
        ports.insert(worker.clone(), sender);
        Some(LocalPort {
            worker: worker.clone(),
            receiver,
            ports: self.ports.clone(),
            on_detach: OnDrop::default(),
            listener: Listener::default(),
        })
    }

    /// Ends every worker's messages.
    pub fn close(&self) {
        self.ports.lock().clear();
    }
}

impl Transport for LocalHub {
    fn send<'a>(&'a self, outgoing: &'a Outgoing) -> BoxFuture<'a, Result<Mailbox, ControllerError>> {
        let (postbox, mailbox) = mailbox();
        let port = self.ports.lock().get(&outgoing.worker).cloned();
        let message = LocalMessage::Request {
            request: outgoing.request.clone(),
            attempt: outgoing.attempt,
            timeout: outgoing.timeout,
            controller_id: self.controller_id.clone(),
            postbox,
        };
        let sent = match port {
            Some(port) => port.try_send(message).map_err(|_| "takes no more messages"),
            None => Err("has left this process"),
        };
        ready(sent.map(|()| mailbox).map_err(|why| {
            ControllerError::new(ControllerErrorCode::WorkerUnavailable, format!("worker {} {why}", outgoing.worker))
                .with("noResponders", true)
        }))
        .boxed()
    }

    fn cancel(&self, outgoing: &Outgoing, _mailbox: &Mailbox) {
        if let Some(port) = self.ports.lock().get(&outgoing.worker) {
            // Full or gone: the worker stops at its deadline, or has stopped already.
            let request_id = outgoing.request.request_id.clone();
            let _ = port.try_send(LocalMessage::Cancel { request_id, attempt: outgoing.attempt });
        }
    }
}

// === impl LocalPort ===

impl LocalPort {
    /// The worker that it belongs to.
    #[must_use]
    pub fn worker(&self) -> &WorkerId {
        &self.worker
    }

    /// Has something run once the worker is detached.
    #[must_use]
    pub fn on_detach(mut self, run: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.on_detach = OnDrop::new(run);
        self
    }

    /// Has the worker's news heard.
    #[must_use]
    pub fn on_news(mut self, hear: impl Fn(LocalNews) + Send + Sync + 'static) -> Self {
        self.listener = Listener(Some(Box::new(hear)));
        self
    }

    /// Says something of the worker to its controller.
    pub fn tell(&self, news: LocalNews) {
        if let Listener(Some(hear)) = &self.listener {
            hear(news);
        }
    }

    /// The next message; `None` when the controller has gone.
    pub async fn recv(&mut self) -> Option<LocalMessage> {
        self.receiver.recv().await
    }
}

impl Drop for LocalPort {
    fn drop(&mut self) {
        self.receiver.close();
        self.ports.lock().remove(&self.worker);
    }
}

// === impl Listener ===

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}
