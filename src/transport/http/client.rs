//! The HTTP client: connections that are kept for the next request, and what it means when there is none.

use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::http::Extensions;
use hyper::http::uri::Scheme;
use hyper::{Request, Response, Uri};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::{HttpConnector, HttpInfo};
use hyper_util::client::legacy::{Builder, Client as Pool, Error, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::answer::protocol_error;
use super::server::Work;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::transport::{Delivery, Postbox};
use crate::wire::Reply;

/// Connections that are kept for each server while nobody uses them, and for how long. Servers that close them after five
/// seconds are common: a request that meets such an end is sent again, and costs twice the time.
const IDLE_MOST: usize = 256;
const IDLE_LONGEST: Duration = Duration::from_secs(4);
/// How many connections a request is sent on at most, while each turns out to be closed.
const TRIES: u32 = 4;
/// A kept connection that was closed shows it at once; one that ends later may have had the request.
const CLOSED_WITHIN: Duration = Duration::from_secs(1);
/// So much of a head, or of a body that nobody reads, is kept at most.
const BUFFER: usize = 128 * 1024;
/// A connection whose other end has vanished is noticed after a minute: so long it is quiet, and then asked so often.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_RETRIES: u32 = 3;

/// Sends requests. It asks no proxy and follows no redirection.
pub(super) struct Client {
    plain: Pool<HttpConnector, Payload>,
    /// Where a server wants it: the certificates of the machine are read for it.
    secure: Option<Pool<HttpsConnector<HttpConnector>, Payload>>,
    connect_limit: Duration,
    answered: Answered,
}

/// The body of a request. Once there is a connection and the body is written to it, whoever waits is told so, once.
#[derive(Clone)]
pub(super) struct Payload {
    bytes: Bytes,
    begun: Begun,
}

/// Who waits for a body to be written, until it is.
type Begun = Arc<Mutex<Option<(Postbox, Arc<Work>)>>>;

/// The connections that have brought an answer, by their ports on this machine, a bit each.
struct Answered(Box<[AtomicU64; 1024]>);

// === impl Client ===

impl Client {
    /// A client whose connections take at most so long to be made.
    ///
    /// # Errors
    /// TLS is wanted, and the machine has no certificates.
    pub(super) fn new(connect_limit: Duration, with_tls: bool) -> io::Result<Self> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_keepalive(Some(KEEPALIVE));
        connector.set_keepalive_interval(Some(KEEPALIVE));
        connector.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        connector.set_connect_timeout(Some(connect_limit));
        let mut secure = None;
        if with_tls {
            let mut connector = connector.clone();
            connector.enforce_http(false);
            let tls = hyper_rustls::HttpsConnectorBuilder::new().with_native_roots()?.https_only().enable_http1();
            secure = Some(builder().build(tls.wrap_connector(connector)));
        }
        Ok(Self { plain: builder().build(connector), secure, connect_limit, answered: Answered::default() })
    }

    /// Sends a request. Where a kept connection turns out to be closed before anything came back, another one is taken: servers
    /// close them when they like, and what is on its way then is not meant.
    pub(super) async fn send(&self, request: Request<Payload>) -> Result<Response<Incoming>, Error> {
        let mut tries = TRIES;
        loop {
            tries -= 1;
            let began = Instant::now();
            match self.send_once(request.clone()).await {
                Ok(response) => {
                    if let Some(port) = port(response.extensions()) {
                        self.answered.note(port);
                    }
                    return Ok(response);
                }
                Err(error) if tries > 0 && self.was_kept(&error) && began.elapsed() < CLOSED_WITHIN => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a connection that had brought an answer before ended without another one.
    fn was_kept(&self, error: &Error) -> bool {
        let closed = find::<hyper::Error>(error).is_some_and(hyper::Error::is_incomplete_message)
            || find::<io::Error>(error).is_some_and(|error| is_end(error.kind()));
        let mut extras = Extensions::new();
        if let Some(connection) = error.connect_info() {
            connection.get_extras(&mut extras);
        }
        closed && port(&extras).is_some_and(|port| self.answered.forget(port))
    }

    fn send_once(&self, request: Request<Payload>) -> ResponseFuture {
        match &self.secure {
            Some(secure) if request.uri().scheme() == Some(&Scheme::HTTPS) => secure.request(request),
            _ => self.plain.request(request),
        }
    }

    /// What it means that there is no response.
    pub(super) fn failure(&self, error: &Error, server: &Uri) -> ControllerError {
        let unavailable = |what: String| ControllerError::new(ControllerErrorCode::WorkerUnavailable, what);
        let where_ = server.authority().map_or_else(String::new, |authority| format!(" at {authority}"));
        if is_our_lack(error) {
            let what = format!("this controller has no files, ports or network for a connection: {}", innermost(error));
            return ControllerError::new(ControllerErrorCode::ControllerNotReady, what);
        }
        if error.is_connect() {
            let what = match find::<io::Error>(error).map(io::Error::kind) {
                _ if is_refused(error) => format!("nobody listens{where_}"),
                Some(io::ErrorKind::TimedOut) => {
                    let millis = u64::try_from(self.connect_limit.as_millis()).unwrap_or(u64::MAX);
                    let what = format!("the worker{where_} took no connection within {millis} ms");
                    return ControllerError::new(ControllerErrorCode::WorkerTimeout, what)
                        .with("limit", "accept")
                        .with("timeoutMs", millis);
                }
                _ => format!("no connection to the worker{where_}: {}", innermost(error)),
            };
            return unavailable(what).with("noResponders", true);
        }
        if find::<hyper::Error>(error).is_some_and(hyper::Error::is_parse) {
            return protocol_error("what it sent is no HTTP response");
        }
        unavailable(format!("the worker{where_} closed the connection before it answered"))
    }
}

fn builder() -> Builder {
    let mut builder = Pool::builder(TokioExecutor::new());
    builder
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_LONGEST)
        .pool_max_idle_per_host(IDLE_MOST)
        .http1_max_buf_size(BUFFER);
    builder
}

/// Whether nobody listens at the server's address.
pub(super) fn is_refused(error: &Error) -> bool {
    error.is_connect() && find::<io::Error>(error).is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Whether a connection failed for want of something on this machine, of which no server can be blamed.
pub(super) fn is_our_lack(error: &Error) -> bool {
    error.is_connect() && find::<io::Error>(error).is_some_and(is_lack)
}

fn is_lack(error: &io::Error) -> bool {
    // ENFILE and EMFILE, the same numbers on Linux and macOS, have no kind of their own.
    matches!(error.raw_os_error(), Some(23 | 24))
        || matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::NetworkDown)
}

fn is_end(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe)
}

/// Where a connection begins on this machine.
fn port(of: &Extensions) -> Option<u16> {
    of.get::<HttpInfo>().map(|info| info.local_addr().port())
}

/// The cause of this type.
fn find<T: std::error::Error + 'static>(error: &Error) -> Option<&T> {
    causes(error).find_map(|cause| cause.downcast_ref())
}

fn innermost(error: &Error) -> String {
    causes(error).last().map_or_else(|| error.to_string(), ToString::to_string)
}

fn causes(error: &Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |&cause| cause.source())
}

// === impl Answered ===

impl Default for Answered {
    fn default() -> Self {
        Self(Box::new([const { AtomicU64::new(0) }; 1024]))
    }
}

impl Answered {
    fn note(&self, port: u16) {
        self.0[usize::from(port / 64)].fetch_or(1 << (port % 64), Ordering::Relaxed);
    }

    /// Whether it was known. A later connection from the same port is another one.
    fn forget(&self, port: u16) -> bool {
        let bit = 1 << (port % 64);
        self.0[usize::from(port / 64)].fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }
}

// === impl Payload ===

impl Payload {
    /// A body, and who is to know when it is on its way.
    pub(super) fn new(bytes: Vec<u8>, postbox: Postbox, work: Arc<Work>) -> Self {
        Self { bytes: bytes.into(), begun: Arc::new(Mutex::new(Some((postbox, work)))) }
    }

    /// None at all.
    pub(super) fn empty() -> Self {
        Self { bytes: Bytes::new(), begun: Arc::default() }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let begun = self.begun.lock().take();
        if let Some((postbox, work)) = begun {
            work.take();
            postbox.post(Delivery::Reply(Reply::Accepted { queue_position: 0 }));
        }
        let bytes = std::mem::take(&mut self.bytes);
        Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_known_until_it_is_forgotten() {
        let answered = Answered::default();
        for port in [0, 63, 64, u16::MAX] {
            assert!(!answered.forget(port));
            answered.note(port);
            assert!(answered.forget(port) && !answered.forget(port), "{port}");
        }
    }

    #[test]
    fn what_this_machine_lacks_is_no_servers_fault() {
        for number in [23, 24] {
            assert!(is_lack(&io::Error::from_raw_os_error(number)), "{number}");
        }
        for kind in [io::ErrorKind::AddrNotAvailable, io::ErrorKind::NetworkDown] {
            assert!(is_lack(&kind.into()), "{kind}");
        }
        for kind in [io::ErrorKind::ConnectionRefused, io::ErrorKind::HostUnreachable, io::ErrorKind::TimedOut] {
            assert!(!is_lack(&kind.into()), "{kind}");
        }
    }
}
