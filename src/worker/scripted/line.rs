//! What carries a scripted worker: the subjects of NATS, or a port of this process. Either way the same reaches it, and
//! what it says reaches its controllers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::performance::Said;
use crate::config::NatsConfig;
use crate::error::{ControllerError, ControllerErrorCode, epoch_ms};
use crate::transport::nats::{Incoming, Link, NatsConnection, Subscription};
use crate::transport::{Delivery, LocalMessage, LocalNews, LocalPort, Postbox};
use crate::wire::{Cancel, Deregistration, Heartbeat, InferenceRequest, Registration, Reply, WorkerId, header, subject};
use crate::worker::cancels::Cancellation;
use crate::worker::membership::publish;

/// How long an attempt may take that does not say.
const UNSAID: Duration = Duration::from_secs(600);
/// A year: a longer `Timeout-Ms` means as much.
const LONGEST_MS: u64 = 31_536_000_000;
/// How soon a mailbox that is full is tried again.
const FULL: Duration = Duration::from_millis(1);

/// What reaches the worker.
#[derive(Debug)]
pub(super) enum Event {
    /// A request.
    Request(Arrival),
    /// A request that cannot be read.
    Unreadable(Way),
    /// The end of interest in one.
    Cancel(Cancellation),
    /// Somebody wants to know who is there.
    Call,
}

/// A request and its way back.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) request: Arc<InferenceRequest>,
    pub(super) attempt: u32,
    pub(super) controller_id: Arc<str>,
    pub(super) timeout: Duration,
    pub(super) way: Way,
}

/// The way back of one request.
#[derive(Clone, Debug)]
pub(super) enum Way {
    Nats { connection: Box<NatsConnection>, subject: String },
    Local(Postbox),
}

/// The carrier.
pub(super) enum Line {
    Nats(Box<NatsLine>),
    Local { port: LocalPort, listens: bool, controller_id: Option<Arc<str>> },
}

/// The carrier of a worker on NATS.
pub(super) struct NatsLine {
    connection: NatsConnection,
    worker: WorkerId,
    link: watch::Receiver<Link>,
    connects: u64,
    /// None: nobody listens.
    requests: Option<Subscription>,
    cancels: Subscription,
    reregister: Subscription,
    hello: Subscription,
}

// === impl Line ===

impl Line {
    /// Connects and subscribes.
    pub(super) async fn nats(config: &NatsConfig, worker: &WorkerId) -> Result<Self, ControllerError> {
        let connection = NatsConnection::connect(config, &format!("scripted worker {worker}")).await?;
        let mut link = connection.link();
        let connects = link.borrow_and_update().connects.max(1);
        let prefix = connection.prefix().to_owned();
        let line = NatsLine {
            requests: Some(connection.subscribe(subject::inference(&prefix, worker)).await?),
            cancels: connection.subscribe(subject::cancel(&prefix, worker)).await?,
            reregister: connection.subscribe(subject::reregister(&prefix, worker)).await?,
            hello: connection.subscribe(subject::controller_hello(&prefix)).await?,
            worker: worker.clone(),
            link,
            connects,
            connection,
        };
        line.connection.flush().await?;
        Ok(Self::Nats(Box::new(line)))
    }

    pub(super) fn local(port: LocalPort) -> Self {
        Self::Local { port, listens: true, controller_id: None }
    }

    /// What reaches the worker next; none when there is nobody left. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Event> {
        match self {
            Self::Nats(line) => line.next().await,
            Self::Local { port, listens, controller_id } => loop {
                match port.recv().await? {
                    LocalMessage::Request { postbox, .. } if !*listens => {
                        let error = ControllerError::new(ControllerErrorCode::WorkerUnavailable, "the worker does not listen");
                        postbox.post(Delivery::Failed(error.with("noResponders", true)));
                    }
                    LocalMessage::Request { request, attempt, timeout, controller_id: asks, postbox } => {
                        *controller_id = Some(asks.clone());
                        tokio::spawn(keep_open(postbox.clone()));
                        let way = Way::Local(postbox);
                        return Some(Event::Request(Arrival { request, attempt, controller_id: asks, timeout, way }));
                    }
                    LocalMessage::Cancel { request_id, attempt } => {
                        let cancel = Cancel { request_id, attempt };
                        let controller = controller_id.clone();
                        return Some(Event::Cancel(Cancellation { cancel, controller, reply_to: None }));
                    }
                }
            },
        }
    }

    /// Says who is there. A worker of this process was registered when it got its port.
    pub(super) async fn register(&self, registration: &Registration) -> Result<(), ControllerError> {
        match self {
            Self::Nats(line) => {
                publish(&line.connection, subject::register(line.connection.prefix()), registration).await?;
                line.connection.flush().await
            }
            Self::Local { .. } => Ok(()),
        }
    }

    /// A sign of life; one that does not go out is lost.
    pub(super) async fn heartbeat(&self, heartbeat: Heartbeat) {
        match self {
            Self::Nats(line) => {
                let _ = publish(&line.connection, subject::heartbeat(line.connection.prefix()), &heartbeat).await;
            }
            Self::Local { port, .. } => port.tell(LocalNews::Heartbeat(Box::new(heartbeat))),
        }
    }

    /// Says that it wants nothing new. Returns when that is known to the server.
    pub(super) async fn deregister(&self) {
        match self {
            Self::Nats(line) => {
                let message = Deregistration { worker_id: line.worker.clone(), timestamp: epoch_ms() };
                let _ = publish(&line.connection, subject::deregister(line.connection.prefix()), &message).await;
                let _ = line.connection.flush().await;
            }
            Self::Local { port, .. } => port.tell(LocalNews::Deregister),
        }
    }

    /// Takes requests, or nobody listens for them any more. Returns when the server has taken it.
    pub(super) async fn listen(&mut self, listens: bool) {
        match self {
            Self::Nats(line) => line.listen(listens).await,
            Self::Local { listens: now, .. } => *now = listens,
        }
    }

    /// Leaves without a word. Returns when nobody listens any more.
    pub(super) async fn vanish(self) {
        if let Self::Nats(mut line) = self {
            line.listen(false).await;
            line.connection.close().await;
        }
    }
}

/// A worker that says nothing more is silent, dead or alive: nobody is told that no answer can come.
async fn keep_open(postbox: Postbox) {
    postbox.closed().await;
}

// === impl NatsLine ===

impl NatsLine {
    /// Requests go before cancellations that are there at the same time: they were sent in that order.
    async fn next(&mut self) -> Option<Event> {
        loop {
            let requested = async {
                match &mut self.requests {
                    Some(requests) => requests.next().await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                biased;
                message = requested => read(&self.connection, message?),
                message = self.cancels.next() => cancelled(&message?),
                message = self.reregister.next() => message.map(|_| Event::Call),
                message = self.hello.next() => message.map(|_| Event::Call),
                changed = self.link.changed() => {
                    changed.ok()?;
                    let now = *self.link.borrow_and_update();
                    let is_back = now.connected && now.connects > self.connects;
                    self.connects = self.connects.max(now.connects);
                    is_back.then_some(Event::Call)
                }
            };
            if event.is_some() {
                return event;
            }
        }
    }

    async fn listen(&mut self, listens: bool) {
        match (listens, self.requests.take()) {
            (true, None) => {
                let subject = subject::inference(self.connection.prefix(), &self.worker);
                self.requests = self.connection.subscribe(subject).await.ok();
            }
            (false, Some(requests)) => requests.close().await,
            (_, as_it_is) => self.requests = as_it_is,
        }
        if self.connection.is_connected() {
            let _ = self.connection.flush().await;
        }
    }
}

/// A request; none where nobody waits for its answer.
fn read(connection: &NatsConnection, message: Incoming) -> Option<Event> {
    let way = Way::Nats { connection: Box::new(connection.clone()), subject: message.reply.clone()? };
    let number = |name: &str| message.header(name).and_then(|text| text.parse::<u64>().ok());
    let Ok(mut request) = serde_json::from_slice::<InferenceRequest>(&message.payload) else {
        return Some(Event::Unreadable(way));
    };
    if request.request_id.is_empty() {
        request.request_id = message.header(header::REQUEST_ID).unwrap_or_default().to_owned();
    }
    Some(Event::Request(Arrival {
        request: Arc::new(request),
        attempt: number(header::ATTEMPT).and_then(|attempt| u32::try_from(attempt).ok()).unwrap_or(1),
        controller_id: message.header(header::CONTROLLER_ID).unwrap_or_default().into(),
        timeout: number(header::TIMEOUT_MS).map_or(UNSAID, |ms| Duration::from_millis(ms.min(LONGEST_MS))),
        way,
    }))
}

fn cancelled(message: &Incoming) -> Option<Event> {
    Cancellation::read(message).map(Event::Cancel)
}

// === impl Way ===

impl Way {
    /// The subject, where it is one.
    pub(super) fn address(&self) -> Option<&str> {
        match self {
            Self::Nats { subject, .. } => Some(subject),
            Self::Local(_) => None,
        }
    }

    /// Sends a message; one that does not go out is lost. Where nobody takes them off, it waits for room.
    pub(super) async fn send(&self, request_id: &str, said: Said) {
        match self {
            Self::Nats { connection, subject } => {
                let payload = match said {
                    Said::Reply(reply) => Bytes::from(reply.encode(request_id)),
                    Said::Raw(bytes) => bytes,
                };
                let _ = connection.publish(subject.clone(), payload).await;
            }
            Self::Local(postbox) => {
                while !postbox.has_room() && !postbox.is_closed() {
                    tokio::time::sleep(FULL).await;
                }
                postbox.post(match said {
                    Said::Reply(reply) => Delivery::Reply(reply),
                    Said::Raw(bytes) => Reply::decode(&bytes).into(),
                });
            }
        }
    }
}
