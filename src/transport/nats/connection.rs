//! The connection to NATS, as controllers and workers use it: never a publish into the void, state that can be asked and
//! watched, errors that say what to do.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, HeaderMap, ServerAddr, StatusCode, Subject};
use bytes::Bytes;
use futures_util::StreamExt;
use percent_encoding::percent_decode_str;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::config::NatsConfig;
use crate::error::{ControllerError, ControllerErrorCode};

/// How many messages wait in one subscription. What comes beyond it is dropped, and [`Link::losses`] counts: thousands of
/// streams whose worker says all at once get there, and others hardly do. Memory is taken for those that wait alone.
const SUBSCRIPTION_CAPACITY: usize = 1 << 18;
/// Headers count as well: our names and values, with separators, are far below this many bytes.
const HEADERS: usize = 1024;
/// The first wait before a reconnect; it grows by as much each time, up to the longest.
const RECONNECT_STEP: Duration = Duration::from_millis(50);
const RECONNECT_LONGEST: Duration = Duration::from_secs(2);
/// How long the server may take to confirm what it was sent.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// How long the last messages may take to leave when a connection is closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// How many requests wait for others that leave with them, and how many leave together.
const GATHERED: usize = 2048;
const TOGETHER: usize = 256;
/// How often the state that events told is compared with the client's own.
const COMPARE_EVERY: Duration = Duration::from_millis(500);

/// A connection. Clones share it; it closes with [`NatsConnection::close`] or when the last clone goes.
#[derive(Clone, Debug)]
pub struct NatsConnection {
    client: Client,
    link: watch::Receiver<Link>,
    prefix: Arc<str>,
    servers: usize,
    gathered: mpsc::Sender<Parcel>,
    /// They end with the last clone, and let go of the client then.
    _tasks: Arc<[AbortOnDropHandle<()>; 2]>,
}

/// A message with headers and a subject for answers.
pub(super) struct Message {
    pub(super) subject: Subject,
    pub(super) reply: Subject,
    pub(super) headers: HeaderMap,
    pub(super) payload: Bytes,
}

/// What is gathered before it goes out.
enum Parcel {
    Message(Message),
    /// Told when all before it has been handed to the client.
    Mark(oneshot::Sender<()>),
}

/// The state of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Whether messages go out.
    pub connected: bool,
    /// How often it was made: 1 from the start on, one more with each reconnect.
    pub connects: u64,
    /// How often it was told that messages came faster than they were taken, and some of them are lost.
    pub losses: u64,
}

/// The messages of one subject. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription(async_nats::Subscriber);

/// One message.
pub struct Incoming {
    /// Its subject.
    pub subject: String,
    /// Where an answer goes.
    pub reply: Option<String>,
    /// Its body.
    pub payload: Bytes,
    headers: Option<HeaderMap>,
    status: Option<StatusCode>,
}

// === impl NatsConnection ===

impl NatsConnection {
    /// Connects.
    ///
    /// # Errors
    /// NATS_ERROR: no server answers within `connectTimeoutMs`, it refuses us, or a file of the configuration cannot be read.
    pub async fn connect(config: &NatsConfig, client_name: &str) -> Result<Self, ControllerError> {
        let urls = config.server_url.as_slice();
        let limit = Duration::from_millis(config.connect_timeout_ms);
        // One that does not answer leaves time for the others.
        let share = limit / u32::try_from(urls.len()).unwrap_or(u32::MAX).max(1);
        let (states, link) = watch::channel(Link::default());
        let states = Arc::new(states);
        let told = Arc::clone(&states);
        let options = options(config, client_name)
            .await?
            .event_callback(move |event| {
                note(&told, &event);
                std::future::ready(())
            })
            .connection_timeout(share);
        let failed = |why: String, advice: &str| {
            let servers = config.server_url.shown();
            ControllerError::new(ControllerErrorCode::NatsError, format!("cannot connect to NATS at {servers}: {why}; {advice}"))
        };
        match tokio::time::timeout(limit, options.connect(urls)).await {
            Ok(Ok(client)) => {
                let (gathered, parcels) = mpsc::channel(GATHERED);
                let tasks = [tokio::spawn(compare(client.clone(), states)), tokio::spawn(send_together(client.clone(), parcels))];
                Ok(Self {
                    client,
                    link,
                    prefix: config.subject_prefix.as_str().into(),
                    servers: urls.len(),
                    gathered,
                    _tasks: Arc::new(tasks.map(AbortOnDropHandle::new)),
                })
            }
            Ok(Err(error)) => Err(failed(error.to_string(), advice(error.kind()))),
            Err(_) => Err(failed(format!("no answer within {} ms", limit.as_millis()), advice(ConnectErrorKind::TimedOut))),
        }
    }

    /// Whether messages go out now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// The state, to be watched. Set by events, so a change may come a moment after [`Self::is_connected`] tells it, and
    /// within a second where the event itself was lost.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    /// The largest message, in bytes.
    #[must_use]
    pub fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    /// What stands in front of every subject.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The address that the server sees this process at; empty where it does not say.
    #[must_use]
    pub fn own_address(&self) -> String {
        self.client.server_info().client_ip
    }

    /// How many servers it may use.
    #[must_use]
    pub fn servers(&self) -> usize {
        self.servers
    }

    /// Publishes a message.
    ///
    /// # Errors
    /// NATS_ERROR at once while disconnected (nothing is kept for later), PAYLOAD_TOO_LARGE.
    pub async fn publish(&self, subject: String, payload: Bytes) -> Result<(), ControllerError> {
        self.ready_for(payload.len())?;
        self.client.publish(subject, payload).await.map_err(|error| lost(&error))
    }

    /// Publishes a message with headers and a subject for answers.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub(super) async fn publish_request(&self, message: Message) -> Result<(), ControllerError> {
        self.ready_for(message.payload.len() + HEADERS)?;
        send(&self.client, message).await.map_err(|error| lost(&error))
    }

    /// The same, together with what others have ready for it, in the order of these calls.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub(super) async fn publish_together(&self, message: Message) -> Result<(), ControllerError> {
        self.ready_for(message.payload.len() + HEADERS)?;
        self.gathered.send(Parcel::Message(message)).await.map_err(|_| lost(&"it was closed"))
    }

    /// Returns when what was gathered has been handed to the client.
    async fn handed_over(&self) {
        let (done, told) = oneshot::channel();
        if self.gathered.send(Parcel::Mark(done)).await.is_ok() {
            let _ = told.await;
        }
    }

    /// Subscribes. The subscription survives reconnects.
    ///
    /// # Errors
    /// NATS_ERROR: the connection is closed.
    pub async fn subscribe(&self, subject: String) -> Result<Subscription, ControllerError> {
        self.client.subscribe(subject).await.map(Subscription).map_err(|error| lost(&error))
    }

    /// Returns when everything published before has reached the server, and every subscription made before is known there.
    ///
    /// # Errors
    /// NATS_ERROR: the connection is down.
    pub async fn flush(&self) -> Result<(), ControllerError> {
        // The client's own flush ends when the bytes have left this process. A server takes a client's words in their order,
        // so an echo says that it has taken all that came before.
        self.handed_over().await;
        let subject = self.client.new_inbox();
        let mut echo = self.subscribe(subject.clone()).await?;
        self.publish(subject, Bytes::new()).await?;
        match tokio::time::timeout(FLUSH_LIMIT, echo.next()).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(lost(&"it was closed")),
            Err(_) => Err(lost(&"the server does not answer")),
        }
    }

    /// Sends what is left, then closes. Takes a bounded time.
    pub async fn close(&self) {
        if self.is_connected() {
            let sent = async {
                self.handed_over().await;
                self.client.flush().await
            };
            let _ = tokio::time::timeout(CLOSE_LIMIT, sent).await;
        }
        let _ = self.client.drain().await;
    }

    /// The client itself, for the other files of this folder.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// What has to be true before a message of this size is handed to the client.
    pub(super) fn ready_for(&self, size: usize) -> Result<(), ControllerError> {
        if !self.is_connected() {
            return Err(ControllerError::new(
                ControllerErrorCode::NatsError,
                "the connection to NATS is down; it is being restored",
            ));
        }
        let limit = self.max_payload();
        if size > limit {
            return Err(ControllerError::new(
                ControllerErrorCode::PayloadTooLarge,
                format!("the message has {size} bytes, NATS takes {limit}; shorten it or raise max_payload of the NATS server"),
            )
            .with("size", size)
            .with("limit", limit));
        }
        Ok(())
    }
}

// === impl Subscription ===

impl Subscription {
    /// The next message; `None` when the connection is closed.
    pub async fn next(&mut self) -> Option<Incoming> {
        let message = self.0.next().await?;
        Some(Incoming {
            subject: message.subject.into_string(),
            reply: message.reply.map(async_nats::Subject::into_string),
            payload: message.payload,
            headers: message.headers,
            status: message.status,
        })
    }

    /// Unsubscribes. The server has taken it once a later [`NatsConnection::flush`] returns.
    pub async fn close(mut self) {
        let _ = self.0.unsubscribe().await;
    }
}

// === impl Incoming ===

impl Incoming {
    /// A header's first value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str)
    }

    /// Whether this is the server's word that nobody listens on the subject of a request.
    #[must_use]
    pub fn no_responders(&self) -> bool {
        self.status == Some(StatusCode::NO_RESPONDERS)
    }
}

/// What to do about it.
fn advice(kind: ConnectErrorKind) -> &'static str {
    match kind {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            "the server wants to know who we are: give nats.user and nats.password, nats.credentialsFile, or a login in nats.serverUrl"
        }
        ConnectErrorKind::Tls => "correct nats.tls: the files that it names, or whether the server speaks TLS at all",
        _ => {
            "start a nats-server there, or correct nats.serverUrl; a controller may also have a server of its own (nats.mode: \
             embedded), or none (local and HTTP workers only)"
        }
    }
}

async fn options(config: &NatsConfig, client_name: &str) -> Result<ConnectOptions, ControllerError> {
    let mut options = ConnectOptions::new()
        .name(client_name)
        .ping_interval(Duration::from_millis(config.ping_interval_ms))
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .reconnect_delay_callback(|attempt| {
            let step = RECONNECT_STEP.saturating_mul(u32::try_from(attempt).unwrap_or(u32::MAX)).min(RECONNECT_LONGEST);
            step.mul_f64(0.5 + fastrand::f64() / 2.0)
        });
    if let (Some(user), Some(password)) = (&config.user, &config.password) {
        options = options.user_and_password(user.clone(), password.clone());
    } else if let Some((user, password)) = config.server_url.as_slice().iter().find_map(|url| login(url)) {
        // As NATS' own tools have it: what stands alone is a token.
        options = match password {
            Some(password) => options.user_and_password(user, password),
            None => options.token(user),
        };
    }
    if let Some(path) = &config.credentials_file {
        options = options.credentials_file(path).await.map_err(|error| {
            ControllerError::new(ControllerErrorCode::NatsError, format!("nats.credentialsFile {path}: {error}"))
        })?;
    }
    let tls = &config.tls;
    for (key, path) in [("caFile", &tls.ca_file), ("certFile", &tls.cert_file), ("keyFile", &tls.key_file)] {
        if let Some(path) = path
            && let Err(error) = std::fs::metadata(path)
        {
            return Err(ControllerError::new(ControllerErrorCode::NatsError, format!("nats.tls.{key} {path}: {error}")));
        }
    }
    if let Some(path) = &config.tls.ca_file {
        options = options.add_root_certificates(path.into()).require_tls(true);
    }
    if let (Some(certificate), Some(key)) = (&config.tls.cert_file, &config.tls.key_file) {
        options = options.add_client_certificate(certificate.into(), key.into()).require_tls(true);
    }
    Ok(options)
}

/// The user and the password that a URL brings along.
fn login(url: &str) -> Option<(String, Option<String>)> {
    let address: ServerAddr = url.parse().ok()?;
    let plain = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
    Some((plain(address.username()?), address.password().map(plain)))
}

fn note(states: &watch::Sender<Link>, event: &Event) {
    match event {
        // The first Connected is the start, each further one a reconnect.
        Event::Connected => states.send_modify(|link| *link = Link { connected: true, connects: link.connects + 1, ..*link }),
        Event::Disconnected | Event::Closed => states.send_modify(|link| link.connected = false),
        Event::SlowConsumer(_) => {
            tracing::warn!("a NATS subscription fell behind and lost messages");
            states.send_modify(|link| link.losses += 1);
        }
        Event::ServerError(error) => tracing::warn!(%error, "NATS server error"),
        Event::ClientError(error) => tracing::warn!(%error, "NATS client error"),
        Event::LameDuckMode | Event::Draining => {}
    }
}

async fn send(client: &Client, message: Message) -> Result<(), async_nats::PublishError> {
    let Message { subject, reply, headers, payload } = message;
    client.publish_with_reply_and_headers(subject, reply, headers, payload).await
}

/// Publishes messages, those of all who are ready to send one in one go: a write and a wake-up of the server for each would
/// cost both sides as much again.
async fn send_together(client: Client, mut gathered: mpsc::Receiver<Parcel>) {
    let mut parcels = Vec::with_capacity(TOGETHER);
    while gathered.recv_many(&mut parcels, TOGETHER).await > 0 {
        // Whoever can go on at once does so first.
        tokio::task::yield_now().await;
        while parcels.len() < TOGETHER
            && let Ok(parcel) = gathered.try_recv()
        {
            parcels.push(parcel);
        }
        for parcel in parcels.drain(..) {
            match parcel {
                // The client would keep it for a connection to come, and a worker would do it for nobody. Whoever waits for the
                // answer learns of the loss as of any other.
                Parcel::Message(_) if client.connection_state() != State::Connected => {}
                Parcel::Message(message) => {
                    let _ = send(&client, message).await;
                }
                Parcel::Mark(done) => {
                    let _ = done.send(());
                }
            }
        }
    }
}

/// Makes good for events that the client dropped: it keeps a limited number of them, and a subscription that falls behind
/// makes one for each message. What differs twice in a row, with nothing told in between, is set right.
async fn compare(client: Client, states: Arc<watch::Sender<Link>>) {
    let statistics = client.statistics();
    let mut differed = None;
    loop {
        tokio::time::sleep(COMPARE_EVERY).await;
        let own = Link {
            connected: client.connection_state() == State::Connected,
            connects: statistics.connects.load(Ordering::Relaxed),
            losses: 0,
        };
        // Losses are told as they come, and by nothing else.
        let told = Link { losses: 0, ..*states.borrow() };
        differed = next_link(told, own, differed).unwrap_or_else(|corrected| {
            states.send_modify(|link| *link = Link { losses: link.losses, ..corrected });
            None
        });
    }
}

/// What to remember until the next look, or the link as it has to be told.
fn next_link(told: Link, own: Link, differed: Option<(Link, Link)>) -> Result<Option<(Link, Link)>, Link> {
    match told == own {
        true => Ok(None),
        false if differed == Some((told, own)) => Err(own),
        false => Ok(Some((told, own))),
    }
}

pub(super) fn lost(error: &dyn std::fmt::Display) -> ControllerError {
    ControllerError::new(ControllerErrorCode::NatsError, format!("the connection to NATS is down: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Link = Link { connected: true, connects: 1, losses: 0 };
    const DOWN: Link = Link { connected: false, connects: 1, losses: 0 };
    const BACK: Link = Link { connected: true, connects: 2, losses: 0 };

    #[test]
    fn each_loss_is_news_and_survives_a_reconnect() {
        let (states, mut link) = watch::channel(UP);
        link.mark_unchanged();
        note(&states, &Event::SlowConsumer(1));
        assert!(link.has_changed().unwrap_or(false));
        note(&states, &Event::Disconnected);
        note(&states, &Event::Connected);
        assert_eq!(*link.borrow(), Link { losses: 1, ..BACK });
    }

    #[test]
    fn a_lost_event_is_made_good_at_the_second_look() {
        for (told, own) in [(UP, DOWN), (UP, BACK), (DOWN, BACK)] {
            let differed = next_link(told, own, None);
            assert_eq!(differed, Ok(Some((told, own))));
            assert_eq!(next_link(told, own, Some((told, own))), Err(own));
        }
    }

    #[test]
    fn an_event_on_its_way_is_waited_for() {
        assert_eq!(next_link(UP, UP, Some((DOWN, UP))), Ok(None));
        assert_eq!(next_link(UP, BACK, Some((UP, DOWN))), Ok(Some((UP, BACK))));
        assert_eq!(next_link(DOWN, BACK, Some((UP, BACK))), Ok(Some((DOWN, BACK))));
    }
}
