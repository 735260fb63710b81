//! What can go wrong with a request: one error type, one code for each way.
//!
//! Codes are decided where the cause is known and never read back from the words of a message. This module knows the
//! table of the codes (who retries, what a breaker counts, which HTTP status) and nothing of how requests run.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The stable code of a [`ControllerError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ControllerErrorCode {
    /// Nobody is online, or all that were online have been tried and failed.
    NoWorkersAvailable,
    /// Workers serve the model, but every breaker refuses.
    NoHealthyWorkers,
    /// Workers are online, but none serves the model.
    ModelNotFound,
    /// The worker fell silent past the limit, was replaced under the request, or was named by the caller and is offline.
    WorkerOffline,
    /// The worker that the caller named has its breaker open.
    CircuitBreakerOpen,
    /// Nobody listens, the connection broke, or the worker failed inside.
    WorkerUnavailable,
    /// One of the limits on time passed; `context.limit` names it.
    WorkerTimeout,
    /// The worker refused for want of room.
    WorkerOverloaded,
    /// The worker could not load the model.
    ModelLoadFailed,
    /// `maxRetries` is used up.
    AllRetriesExhausted,
    /// The stream broke after tokens were delivered and could not be continued.
    StreamInterrupted,
    /// The request is at fault.
    RequestValidationFailed,
    /// The session id is not 1 to 256 printable characters.
    InvalidSessionId,
    /// The request does not fit into one message of the transport.
    PayloadTooLarge,
    /// The admission queue is full, or the request waited there too long.
    QueueFull,
    /// The caller went away.
    Cancelled,
    /// The controller's own connection to NATS is down.
    NatsError,
    /// The controller is not started, draining, or stopped.
    ControllerNotReady,
    /// A defect of this program.
    InternalError,
}

/// What an attempt that ended with a code tells the worker's circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerEffect {
    /// A failure for both signals.
    Failure,
    /// A failure for the rate window alone; a run of them opens nothing.
    RateOnly,
    /// Nothing: the worker is not to blame.
    Ignored,
}

// === impl ControllerErrorCode ===

impl ControllerErrorCode {
    /// Every code, in the order of the documentation.
    pub const ALL: [Self; 19] = [
        Self::NoWorkersAvailable,
        Self::NoHealthyWorkers,
        Self::ModelNotFound,
        Self::WorkerOffline,
        Self::CircuitBreakerOpen,
        Self::WorkerUnavailable,
        Self::WorkerTimeout,
        Self::WorkerOverloaded,
        Self::ModelLoadFailed,
        Self::AllRetriesExhausted,
        Self::StreamInterrupted,
        Self::RequestValidationFailed,
        Self::InvalidSessionId,
        Self::PayloadTooLarge,
        Self::QueueFull,
        Self::Cancelled,
        Self::NatsError,
        Self::ControllerNotReady,
        Self::InternalError,
    ];

    /// The code as it is written everywhere: `WORKER_TIMEOUT`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoWorkersAvailable => "NO_WORKERS_AVAILABLE",
            Self::NoHealthyWorkers => "NO_HEALTHY_WORKERS",
            Self::ModelNotFound => "MODEL_NOT_FOUND",
            Self::WorkerOffline => "WORKER_OFFLINE",
            Self::CircuitBreakerOpen => "CIRCUIT_BREAKER_OPEN",
            Self::WorkerUnavailable => "WORKER_UNAVAILABLE",
            Self::WorkerTimeout => "WORKER_TIMEOUT",
            Self::WorkerOverloaded => "WORKER_OVERLOADED",
            Self::ModelLoadFailed => "MODEL_LOAD_FAILED",
            Self::AllRetriesExhausted => "ALL_RETRIES_EXHAUSTED",
            Self::StreamInterrupted => "STREAM_INTERRUPTED",
            Self::RequestValidationFailed => "REQUEST_VALIDATION_FAILED",
            Self::InvalidSessionId => "INVALID_SESSION_ID",
            Self::PayloadTooLarge => "PAYLOAD_TOO_LARGE",
            Self::QueueFull => "QUEUE_FULL",
            Self::Cancelled => "CANCELLED",
            Self::NatsError => "NATS_ERROR",
            Self::ControllerNotReady => "CONTROLLER_NOT_READY",
            Self::InternalError => "INTERNAL_ERROR",
        }
    }

    /// The code of this name, if there is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == name)
    }

    /// The code that a worker's `error` message means: synonyms are mapped, whatever is unknown is the worker's failure.
    #[must_use]
    pub fn from_worker(name: Option<&str>) -> Self {
        match name {
            Some("QUEUE_FULL" | "RESOURCE_LIMIT_EXCEEDED" | "QUEUE_ERROR") => Self::WorkerOverloaded,
            // Only what a worker can know; a word about the controller's own affairs would escape the breaker.
            Some(name) => match Self::parse(name) {
                Some(
                    code @ (Self::ModelNotFound
                    | Self::WorkerTimeout
                    | Self::WorkerOverloaded
                    | Self::ModelLoadFailed
                    | Self::RequestValidationFailed
                    | Self::PayloadTooLarge
                    | Self::Cancelled),
                ) => code,
                _ => Self::WorkerUnavailable,
            },
            None => Self::WorkerUnavailable,
        }
    }

    /// Whether the same request may succeed when it is sent again later.
    #[must_use]
    pub const fn retryable(self) -> bool {
        matches!(
            self,
            Self::WorkerOffline
                | Self::WorkerUnavailable
                | Self::WorkerTimeout
                | Self::WorkerOverloaded
                | Self::ModelLoadFailed
                | Self::NoWorkersAvailable
                | Self::NoHealthyWorkers
                | Self::CircuitBreakerOpen
                | Self::AllRetriesExhausted
                | Self::QueueFull
                | Self::NatsError
                | Self::ControllerNotReady
        )
    }

    /// What an attempt with this end means for the worker's breaker.
    #[must_use]
    pub const fn breaker_effect(self) -> BreakerEffect {
        match self {
            Self::WorkerOffline | Self::WorkerUnavailable | Self::WorkerTimeout | Self::StreamInterrupted => {
                BreakerEffect::Failure
            }
            Self::WorkerOverloaded => BreakerEffect::RateOnly,
            _ => BreakerEffect::Ignored,
        }
    }

    /// Whether an attempt with this end failed by its worker, rather than by the request, its caller or this controller.
    #[must_use]
    pub fn is_workers_failure(self) -> bool {
        self.breaker_effect() != BreakerEffect::Ignored || self == Self::ModelLoadFailed || self == Self::ModelNotFound
    }

    /// The HTTP status of an answer that carries this error. 499 (the client closed the request) is never sent.
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::ModelNotFound => 404,
            Self::WorkerTimeout => 504,
            Self::WorkerOverloaded | Self::QueueFull => 429,
            Self::RequestValidationFailed | Self::InvalidSessionId => 400,
            Self::PayloadTooLarge => 413,
            Self::Cancelled => 499,
            Self::InternalError | Self::StreamInterrupted => 500,
            Self::NoWorkersAvailable
            | Self::NoHealthyWorkers
            | Self::WorkerOffline
            | Self::CircuitBreakerOpen
            | Self::WorkerUnavailable
            | Self::ModelLoadFailed
            | Self::AllRetriesExhausted
            | Self::NatsError
            | Self::ControllerNotReady => 503,
        }
    }
}

impl fmt::Display for ControllerErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failed request: a code for programs, a message for people, and the facts in between.
///
/// The context's keys are camelCase, as on the wire and in HTTP answers. It never holds a prompt or a token.
#[derive(Clone, Debug)]
pub struct ControllerError(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    code: ControllerErrorCode,
    message: String,
    context: Map<String, Value>,
    timestamp_ms: u64,
    cause: Option<ControllerError>,
    /// The message is what a worker wrote.
    workers_words: bool,
    /// The worker has no such endpoint, for this model at least; another one may have it.
    lacks_endpoint: bool,
}

/// The most bytes of what a worker wrote that are kept.
const WORKERS_WORDS_LONGEST: usize = 1_000;

// === impl ControllerError ===

impl ControllerError {
    /// A new error with an empty context, stamped with the present time.
    pub fn new(code: ControllerErrorCode, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            code,
            message: message.into(),
            context: Map::new(),
            timestamp_ms: epoch_ms(),
            cause: None,
            workers_words: false,
            lacks_endpoint: false,
        }))
    }

    /// An error in the words of a worker, the first thousand bytes of them. They may quote the prompt: the caller sees them, the
    /// log does not.
    #[must_use]
    pub fn in_workers_words(code: ControllerErrorCode, mut words: String) -> Self {
        let end = (0..=WORKERS_WORDS_LONGEST.min(words.len())).rev().find(|end| words.is_char_boundary(*end));
        words.truncate(end.unwrap_or(0));
        let mut error = Self::new(code, if words.is_empty() { "the worker gave no reason".to_owned() } else { words });
        error.0.workers_words = true;
        error
    }

    /// A worker has no such endpoint, or not for this model. Nobody's failure, and no answer yet where others may have it.
    #[must_use]
    pub fn no_endpoint(path: &'static str, words: Option<String>) -> Self {
        let mut error = match words {
            Some(words) => Self::in_workers_words(ControllerErrorCode::ModelNotFound, words),
            None => Self::new(ControllerErrorCode::ModelNotFound, format!("the worker has no {path}")),
        };
        error.0.lacks_endpoint = true;
        error.with("endpoint", path)
    }

    /// Whether it is one of [`Self::no_endpoint`].
    #[must_use]
    pub fn lacks_endpoint(&self) -> bool {
        self.0.lacks_endpoint
    }

    /// A bad field of a request: names it and says what would be right.
    pub fn validation(field: &str, message: impl fmt::Display) -> Self {
        Self::new(ControllerErrorCode::RequestValidationFailed, format!("{field}: {message}")).with("field", field)
    }

    /// Adds a fact under a camelCase key, in place of an earlier one.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.context.insert(key.to_owned(), value.into());
        self
    }

    /// Adds a fact unless the key is taken: the innermost place knows best.
    #[must_use]
    pub fn or_with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.context.entry(key).or_insert_with(|| value.into());
        self
    }

    /// Names the error that led to this one.
    #[must_use]
    pub fn caused_by(mut self, cause: ControllerError) -> Self {
        self.0.cause = Some(cause);
        self
    }

    /// The code.
    #[must_use]
    pub fn code(&self) -> ControllerErrorCode {
        self.0.code
    }

    /// What happened, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The message as a log may have it: without what a worker wrote.
    #[must_use]
    pub fn message_for_log(&self) -> &str {
        let quotes = std::iter::successors(Some(self), |error| error.cause()).any(|error| error.0.workers_words);
        if quotes { "in the words of its worker, which the request's metadata has" } else { &self.0.message }
    }

    /// The facts, under camelCase keys.
    #[must_use]
    pub fn context(&self) -> &Map<String, Value> {
        &self.0.context
    }

    /// When it happened, in milliseconds since the epoch.
    #[must_use]
    pub fn timestamp_ms(&self) -> u64 {
        self.0.timestamp_ms
    }

    /// The error that led to this one: the last attempt's, where attempts were made.
    #[must_use]
    pub fn cause(&self) -> Option<&ControllerError> {
        self.0.cause.as_ref()
    }

    /// How long to wait before another try, in milliseconds, where the error knows (`context.retryAfterMs`).
    #[must_use]
    pub fn retry_after_ms(&self) -> Option<i64> {
        self.0.context.get("retryAfterMs").and_then(Value::as_i64)
    }

    /// The HTTP status of the answer: that of the last attempt's error where all retries are used up.
    #[must_use]
    pub fn http_status(&self) -> u16 {
        match (self.code(), self.cause()) {
            (ControllerErrorCode::AllRetriesExhausted, Some(last)) => last.http_status(),
            (code, _) => code.http_status(),
        }
    }

    /// `{"error": {"code", "message", "context", "timestamp", "retryable"}}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({"error": {
            "code": self.code(),
            "message": self.message(),
            "context": self.context(),
            "timestamp": self.timestamp_ms(),
            "retryable": self.code().retryable(),
        }})
    }
}

impl fmt::Display for ControllerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.code, self.0.message)
    }
}

impl std::error::Error for ControllerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause().map(|cause| cause as _)
    }
}

/// The wall clock, in milliseconds since the epoch. For people and messages; never for a decision.
#[must_use]
pub fn epoch_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_serde_writes() {
        for code in ControllerErrorCode::ALL {
            assert_eq!(serde_json::to_value(code).ok(), Some(Value::from(code.as_str())));
            assert_eq!(ControllerErrorCode::parse(code.as_str()), Some(code));
        }
    }

    #[test]
    fn a_workers_synonyms_mean_overloaded_and_the_unknown_is_its_failure() {
        for name in ["QUEUE_FULL", "RESOURCE_LIMIT_EXCEEDED", "QUEUE_ERROR", "WORKER_OVERLOADED"] {
            assert_eq!(ControllerErrorCode::from_worker(Some(name)), ControllerErrorCode::WorkerOverloaded);
        }
        assert_eq!(ControllerErrorCode::from_worker(Some("NATS_ERROR")), ControllerErrorCode::WorkerUnavailable);
        assert_eq!(ControllerErrorCode::from_worker(Some("FLUX")), ControllerErrorCode::WorkerUnavailable);
        assert_eq!(ControllerErrorCode::from_worker(None), ControllerErrorCode::WorkerUnavailable);
    }

    #[test]
    fn a_workers_words_are_bounded_and_not_for_the_log() {
        let error = ControllerError::in_workers_words(ControllerErrorCode::WorkerUnavailable, "ä".repeat(WORKERS_WORDS_LONGEST));
        assert_eq!(error.message().len(), WORKERS_WORDS_LONGEST);
        let odd = ControllerError::in_workers_words(ControllerErrorCode::WorkerUnavailable, format!("a{}", "ä".repeat(600)));
        assert_eq!(odd.message().len(), WORKERS_WORDS_LONGEST - 1);
        let told = ControllerError::new(ControllerErrorCode::AllRetriesExhausted, format!("it said {}", error.message()));
        assert!(told.message_for_log().contains('ä'));
        assert!(!told.caused_by(error).message_for_log().contains('ä'));
    }

    #[test]
    fn exhausted_retries_answer_with_the_last_errors_status() {
        let last = ControllerError::new(ControllerErrorCode::WorkerTimeout, "late");
        let error = ControllerError::new(ControllerErrorCode::AllRetriesExhausted, "tried").caused_by(last);
        assert_eq!(error.http_status(), 504);
    }
}
