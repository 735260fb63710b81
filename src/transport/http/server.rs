//! One server: its addresses, its key, what it calls its models, and whether it gave a sign of life lately.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use hyper::Uri;
use hyper::header::{HeaderMap, HeaderValue, SERVER};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::StaticWorker;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{RelayedTo, WorkerId};

/// For so long a server is not asked for an endpoint that it said it has not.
const LACKS_FOR: Duration = Duration::from_secs(60);

pub(super) struct Server {
    pub(super) worker: WorkerId,
    pub(super) chat: Uri,
    pub(super) text: Uri,
    pub(super) models: Uri,
    pub(super) health: Uri,
    embeddings: Uri,
    responses: Uri,
    /// What is known of endpoints that it may have or not. No longer than its list of models, twice.
    known: Mutex<Vec<Known>>,
    /// The bearer token that it wants.
    pub(super) key: Option<HeaderValue>,
    /// The server's own names of models that are called otherwise here.
    names: BTreeMap<String, String>,
    /// It notices only when it writes that a caller has left.
    notices_late: AtomicBool,
    /// Something came from it since it was looked at last.
    heard: AtomicBool,
    /// Attempts that it has taken and that still run.
    working: AtomicUsize,
    /// The status by which it refused the key last; 0 since it answered well.
    key_refused: AtomicU64,
    /// Something is wrong with it: it is to be looked at soon.
    doubt: Notify,
}

/// An endpoint of a server, for one model.
struct Known {
    to: RelayedTo,
    model: String,
    /// It has answered there in this life.
    has: bool,
    /// When it said that there is none.
    lacks_since: Option<Instant>,
}

/// An attempt, which is its server's work from when its request is on its way until nothing is left of it.
pub(super) struct Work {
    server: Arc<Server>,
    is_taken: AtomicBool,
}

// === impl Server ===

impl Server {
    /// # Errors
    /// REQUEST_VALIDATION_FAILED names the key that no address or header can be made of.
    pub(super) fn new(config: &StaticWorker, key: &str) -> Result<Self, ControllerError> {
        let worker =
            WorkerId::new(&config.worker_id).map_err(|error| ControllerError::validation(&format!("{key}.workerId"), error))?;
        let base = config.url.trim_end_matches('/');
        // Clients are often given the address with it.
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let uri = |path: &str| {
            Uri::try_from(format!("{base}{path}"))
                .map_err(|error| ControllerError::validation(&format!("{key}.url"), format!("is no address: {error}")))
        };
        let bearer = |token: &String| {
            let value = HeaderValue::try_from(format!("Bearer {token}"));
            let value = value.map_err(|_| ControllerError::validation(&format!("{key}.apiKey"), "cannot stand in a header"));
            value.map(|mut value| {
                value.set_sensitive(true);
                value
            })
        };
        let named = config.served().into_iter().flatten().filter(|(name, own)| name != own);
        Ok(Self {
            worker,
            chat: uri("/v1/chat/completions")?,
            text: uri("/v1/completions")?,
            models: uri("/v1/models")?,
            health: uri("/health")?,
            embeddings: uri(RelayedTo::Embeddings.path())?,
            responses: uri(RelayedTo::Responses.path())?,
            known: Mutex::default(),
            key: config.api_key.as_ref().map(bearer).transpose()?,
            names: named.map(|(name, own)| (name.to_owned(), own.to_owned())).collect(),
            notices_late: AtomicBool::new(true),
            heard: AtomicBool::new(false),
            working: AtomicUsize::new(0),
            key_refused: AtomicU64::new(0),
            doubt: Notify::new(),
        })
    }

    /// What it calls a model.
    pub(super) fn own_name<'a>(&'a self, model: &'a str) -> &'a str {
        self.names.get(model).map_or(model, String::as_str)
    }

    /// Where such a request goes.
    pub(super) fn relays(&self, to: RelayedTo) -> &Uri {
        match to {
            RelayedTo::Embeddings => &self.embeddings,
            RelayedTo::Responses => &self.responses,
        }
    }

    /// It said that it has no such endpoint for this model. Of one that has answered there before, it is about something else.
    pub(super) fn lacks(&self, to: RelayedTo, model: &str) {
        let is_news = self.note_endpoint(to, model, |known| {
            let is_news = !known.has && !known.is_lacking();
            known.lacks_since = Some(Instant::now()).filter(|_| !known.has);
            is_news
        });
        if is_news {
            let worker_id = self.worker.as_str();
            tracing::info!(worker_id, endpoint = to.path(), model_id = model, "the worker has no such endpoint for this model");
        }
    }

    /// It has it.
    pub(super) fn has(&self, to: RelayedTo, model: &str) {
        self.note_endpoint(to, model, |known| (known.has, known.lacks_since) = (true, None));
    }

    fn note_endpoint<T>(&self, to: RelayedTo, model: &str, note: impl FnOnce(&mut Known) -> T) -> T {
        let mut all = self.known.lock();
        let place = all.iter().position(|known| known.is_of(to, model)).unwrap_or_else(|| {
            // What time has made worthless goes first.
            all.retain(|known| known.has || known.is_lacking());
            all.push(Known { to, model: model.to_owned(), has: false, lacks_since: None });
            all.len() - 1
        });
        note(&mut all[place])
    }

    /// It may have been started anew, with anything.
    pub(super) fn may_have_all(&self) {
        self.known.lock().clear();
    }

    /// Whether it said lately that it has it not.
    pub(super) fn is_lacking(&self, to: RelayedTo, model: &str) -> bool {
        self.known.lock().iter().any(|known| known.is_of(to, model) && known.is_lacking())
    }

    /// Whether an answer is to be asked for as a stream, be it wanted in one piece: so that its work ends when nobody wants it any
    /// more. That is so with Python's own `http.server`, which `mlx_lm.server` is made of. Others watch their connections.
    pub(super) fn notices_late(&self) -> bool {
        self.notices_late.load(Ordering::Relaxed)
    }

    /// Its answers begin with these headers.
    pub(super) fn is_known_by(&self, headers: &HeaderMap) {
        let name = headers.get(SERVER).map_or(&b""[..], HeaderValue::as_bytes);
        let late = name.starts_with(b"BaseHTTP/") || name.starts_with(b"SimpleHTTP/");
        if self.notices_late() != late {
            self.notices_late.store(late, Ordering::Relaxed);
        }
    }

    /// Something came from it.
    pub(super) fn heard(&self) {
        // Looked at first: a line of memory that many threads write is slow.
        if !self.heard.load(Ordering::Relaxed) {
            self.heard.store(true, Ordering::Relaxed);
        }
    }

    /// Whether something came since this was asked last, or it has work of ours.
    pub(super) fn shows_life(&self) -> bool {
        self.heard.swap(false, Ordering::Relaxed) || self.working.load(Ordering::Relaxed) > 0
    }

    /// It began to answer a request.
    pub(super) fn took_key(&self) {
        if self.key_refused.load(Ordering::Relaxed) != 0 {
            self.key_refused.store(0, Ordering::Relaxed);
        }
    }

    /// An attempt ended so.
    pub(super) fn note(&self, error: &ControllerError) {
        if error.code() == ControllerErrorCode::WorkerUnavailable {
            self.doubt.notify_one();
        }
        if let Some(status @ (401 | 403)) = error.context().get("httpStatus").and_then(serde_json::Value::as_u64)
            // Said once, and not for every request.
            && self.key_refused.swap(status, Ordering::Relaxed) != status
        {
            let worker_id = self.worker.as_str();
            tracing::error!(worker_id, status, "the worker refuses the key that it was given: workers.static[].apiKey");
        }
    }

    /// Returns when an attempt met something that makes a look at the server worth while.
    pub(super) async fn doubted(&self) {
        self.doubt.notified().await;
    }
}

// === impl Known ===

impl Known {
    fn is_of(&self, to: RelayedTo, model: &str) -> bool {
        self.to == to && self.model == model
    }

    fn is_lacking(&self) -> bool {
        self.lacks_since.is_some_and(|since| since.elapsed() < LACKS_FOR)
    }
}

// === impl Work ===

impl Work {
    pub(super) fn new(server: Arc<Server>) -> Arc<Self> {
        Arc::new(Self { server, is_taken: AtomicBool::new(false) })
    }

    /// The request is on its way.
    pub(super) fn take(&self) {
        if !self.is_taken.swap(true, Ordering::Relaxed) {
            self.server.working.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if *self.is_taken.get_mut() {
            self.server.working.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used)]

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_a_server_lacks_is_forgotten_in_time() {
        let config = serde_json::from_str(r#"{"workerId": "a", "url": "http://127.0.0.1:1"}"#).expect("an entry");
        let server = Server::new(&config, "").expect("a server");
        server.lacks(RelayedTo::Embeddings, "m");
        let lacks = |to, model| server.is_lacking(to, model);
        assert!(lacks(RelayedTo::Embeddings, "m"));
        assert!(!lacks(RelayedTo::Embeddings, "n") && !lacks(RelayedTo::Responses, "m"));
        tokio::time::advance(LACKS_FOR).await;
        assert!(!lacks(RelayedTo::Embeddings, "m"));
        server.lacks(RelayedTo::Embeddings, "m");
        assert_eq!(server.known.lock().len(), 1);
        server.has(RelayedTo::Embeddings, "m");
        assert!(!lacks(RelayedTo::Embeddings, "m"));
        // It has answered there.
        server.lacks(RelayedTo::Embeddings, "m");
        assert!(!lacks(RelayedTo::Embeddings, "m"));
        server.may_have_all();
        server.lacks(RelayedTo::Embeddings, "m");
        assert!(lacks(RelayedTo::Embeddings, "m"));
    }
}
