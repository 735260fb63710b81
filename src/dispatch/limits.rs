//! The limits on time of one attempt: four timers, each with a name.
//!
//! Accept: from sending to any sign of the worker. First token: from sending to it. Idle: between tokens. Total: from
//! sending to the end. An attempt never gets more than what is left of its request. Pure: the clock comes in.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::RequestRoutingConfig;
use crate::error::{ControllerError, ControllerErrorCode};

/// Workers are told whole milliseconds, and may drop what is past them a little before our own timer fires.
const ROUNDING: Duration = Duration::from_millis(5);

/// How the answer is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// In one piece.
    Buffered,
    /// As it comes.
    Streaming,
}

/// The limits of the configuration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    accept: Duration,
    buffered: Duration,
    first_token: Duration,
    idle: Duration,
    stream: Duration,
    loading: Duration,
    attempts: u32,
}

/// When a request ends at the latest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    /// How long that was from the beginning.
    pub(super) span: Duration,
    /// The caller set it: that it passes says nothing about a worker.
    pub(super) by_caller: bool,
}

/// The timers of one attempt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timers {
    accept: Option<(Instant, Duration)>,
    first_token: Option<(Instant, Duration)>,
    idle: Duration,
    idle_at: Option<Instant>,
    total: (Instant, Duration),
    deadline: Deadline,
    /// How long the worker may take to load the model.
    load_limit: Duration,
    loading: Loading,
}

/// What is known of the worker's model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loading {
    /// The worker has not said that it loads it.
    Unknown,
    /// It loads it, for all that is known since then.
    Since(Instant),
    /// It has loaded it, and used up the time for that.
    Over,
}

/// A limit that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Accept,
    FirstToken,
    Idle,
    Total,
}

// === impl Limits ===

impl Limits {
    pub(super) fn new(config: &RequestRoutingConfig, attempts: u32) -> Self {
        Self {
            accept: Duration::from_millis(config.accept_timeout_ms),
            buffered: Duration::from_millis(config.timeout_ms),
            first_token: Duration::from_millis(config.streaming_timeout_ms),
            idle: Duration::from_millis(config.stream_idle_timeout_ms),
            stream: Duration::from_millis(config.stream_total_timeout_ms),
            loading: Duration::from_millis(config.model_load_timeout_ms),
            attempts,
        }
    }

    /// When a request that begins now ends: buffered at `timeoutMs` for each attempt it may take, streaming at
    /// `streamTotalTimeoutMs`, or when the caller says.
    pub(super) fn deadline(&self, mode: Mode, by_caller: Option<Duration>, now: Instant) -> Deadline {
        let own = match mode {
            Mode::Buffered => self.buffered.saturating_mul(self.attempts),
            Mode::Streaming => self.stream,
        };
        let span = by_caller.unwrap_or(own);
        Deadline { at: later(now, span), span, by_caller: by_caller.is_some() }
    }

    /// The timers of an attempt that is sent now. `loading`: the worker is loading the model, and gets the time for it.
    pub(super) fn timers(&self, mode: Mode, loading: bool, deadline: Deadline, now: Instant) -> Timers {
        let from_now = |limit| (later(now, limit), limit);
        let total = from_now(if mode == Mode::Buffered { self.buffered } else { self.stream });
        let mut timers = Timers {
            accept: Some(from_now(self.accept)),
            first_token: (mode == Mode::Streaming).then(|| from_now(self.first_token)),
            idle: if mode == Mode::Streaming { self.idle } else { total.1 },
            idle_at: None,
            total,
            deadline,
            load_limit: self.loading,
            loading: Loading::Unknown,
        };
        if loading {
            timers.begin_loading(now);
        }
        timers
    }
}

// === impl Timers ===

impl Timers {
    /// How long the attempt may take to its end, from now on.
    pub(super) fn left(&self, now: Instant) -> Duration {
        self.total.0.min(self.deadline.at).saturating_duration_since(now)
    }

    /// Whether the limits still allow for the loading of the model.
    pub(super) fn is_loading(&self) -> bool {
        matches!(self.loading, Loading::Since(_))
    }

    /// Whether the worker may still turn out to load the model: it says so in its heartbeats, which may come after the request
    /// was sent.
    pub(super) fn may_begin_loading(&self) -> bool {
        self.loading == Loading::Unknown && self.idle_at.is_none()
    }

    /// The worker loads the model: until it has, the attempt that was `sent` has the time for that and not less.
    pub(super) fn begin_loading(&mut self, sent: Instant) {
        self.loading = Loading::Since(sent);
        let (from_sent, extra) = ((later(sent, self.load_limit), self.load_limit), self.load_limit);
        self.accept = self.accept.map(|_| from_sent);
        self.first_token = self.first_token.map(|_| from_sent);
        self.total = (later(self.total.0, extra), self.total.1 + extra);
        if !self.deadline.by_caller {
            (self.deadline.at, self.deadline.span) = (later(self.deadline.at, extra), self.deadline.span + extra);
        }
    }

    /// The model is loaded: the time for it that was not needed is nobody's, so that the other limits begin now.
    pub(super) fn loaded(&mut self, now: Instant) {
        let Loading::Since(since) = self.loading else { return };
        self.loading = Loading::Over;
        let most = self.load_limit;
        let unused = most.saturating_sub(now.saturating_duration_since(since));
        let sooner = |(at, span): (Instant, Duration)| (at.checked_sub(unused).unwrap_or(at), span.saturating_sub(unused));
        self.total = (sooner(self.total).0, self.total.1.saturating_sub(most));
        if !self.deadline.by_caller {
            (self.deadline.at, self.deadline.span) = sooner((self.deadline.at, self.deadline.span));
        }
    }

    /// The same for a worker that does not say when it takes a request.
    pub(super) fn without_accept(self) -> Self {
        Self { accept: None, ..self }
    }

    /// The worker gave a sign of itself.
    pub(super) fn heard(&mut self) {
        self.accept = None;
    }

    /// A token came.
    pub(super) fn token(&mut self, now: Instant) {
        self.accept = None;
        self.first_token = None;
        self.idle_at = Some(later(now, self.idle));
    }

    /// The next limit to pass.
    pub(super) fn next(&self) -> (Instant, Limit) {
        let total = (self.total.0.min(self.deadline.at), Limit::Total);
        [
            self.accept.map(|(at, _)| (at, Limit::Accept)),
            self.first_token.map(|(at, _)| (at, Limit::FirstToken)),
            self.idle_at.map(|at| (at, Limit::Idle)),
        ]
        .into_iter()
        .flatten()
        .fold(total, |soonest, next| if next.0 < soonest.0 { next } else { soonest })
    }

    /// The error of a limit that passed.
    pub(super) fn passed(&self, limit: Limit) -> ControllerError {
        let (what, span) = match limit {
            Limit::Accept => ("the worker gave no sign of itself", self.accept.map_or(Duration::ZERO, |(_, span)| span)),
            Limit::FirstToken => ("no token came", self.first_token.map_or(Duration::ZERO, |(_, span)| span)),
            Limit::Idle => ("no further token came", self.idle),
            Limit::Total if self.is_requests_own() => ("the request was not finished", self.deadline.span),
            Limit::Total => ("the answer was not complete", self.total.1),
        };
        timeout(limit, what, span)
    }

    /// Whether the request as a whole is over, and this attempt with it.
    pub(super) fn request_is_over(&self, now: Instant) -> bool {
        self.is_requests_own() && self.deadline.at <= now + ROUNDING
    }

    /// Whether it is the request as a whole that ends first, rather than this attempt.
    pub(super) fn is_requests_own(&self) -> bool {
        self.deadline.at <= self.total.0
    }

    /// Whether the caller gave less time than the configuration does: then the worker is not to blame for a late end.
    pub(super) fn shortened_by_caller(&self) -> bool {
        self.deadline.by_caller && self.is_requests_own()
    }
}

// === impl Limit ===

impl Limit {
    /// The limit as `context.limit` names it.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::FirstToken => "first_token",
            Self::Idle => "idle",
            Self::Total => "total",
        }
    }
}

/// WORKER_TIMEOUT with the limit's name.
pub(super) fn timeout(limit: Limit, what: &str, span: Duration) -> ControllerError {
    let millis = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    ControllerError::new(ControllerErrorCode::WorkerTimeout, format!("{what} within {millis} ms"))
        .with("limit", limit.as_str())
        .with("timeoutMs", millis)
}

/// So much later, or as late as the clock can say.
fn later(at: Instant, span: Duration) -> Instant {
    at.checked_add(span).unwrap_or_else(|| at + Duration::from_secs(86_400 * 365))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::new(&RequestRoutingConfig::default(), 3)
    }

    fn millis(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn each_limit_passes_in_its_turn() {
        let now = Instant::now();
        let deadline = limits().deadline(Mode::Streaming, None, now);
        let mut timers = limits().timers(Mode::Streaming, false, deadline, now);
        assert_eq!(timers.next(), (now + millis(2_000), Limit::Accept));
        timers.heard();
        assert_eq!(timers.next(), (now + millis(60_000), Limit::FirstToken));
        timers.token(now + millis(10_000));
        assert_eq!(timers.next(), (now + millis(40_000), Limit::Idle));
        timers.token(now + millis(590_000));
        assert_eq!(timers.next(), (now + millis(600_000), Limit::Total));
    }

    #[test]
    fn a_buffered_answer_has_no_limit_between_tokens() {
        let now = Instant::now();
        let deadline = limits().deadline(Mode::Buffered, None, now);
        assert_eq!(deadline.at, now + millis(90_000));
        let mut timers = limits().timers(Mode::Buffered, false, deadline, now);
        timers.token(now);
        assert_eq!(timers.next(), (now + millis(30_000), Limit::Total));
        assert!(!timers.is_requests_own());
    }

    #[test]
    fn an_attempt_gets_what_is_left_of_its_request() {
        let now = Instant::now();
        let deadline = limits().deadline(Mode::Buffered, Some(millis(500)), now);
        let timers = limits().timers(Mode::Buffered, false, deadline, now + millis(400));
        assert_eq!(timers.left(now + millis(400)), millis(100));
        assert_eq!(timers.next(), (now + millis(500), Limit::Total));
        assert!(timers.shortened_by_caller());
        assert_eq!(timers.passed(Limit::Total).context()["timeoutMs"], 500);
    }

    #[test]
    fn a_model_that_is_being_loaded_gets_its_time() {
        let now = Instant::now();
        let deadline = limits().deadline(Mode::Streaming, None, now);
        let timers = limits().timers(Mode::Streaming, true, deadline, now);
        assert_eq!(timers.next(), (now + millis(120_000), Limit::Accept));
        assert_eq!(timers.left(now), millis(720_000));
    }

    #[test]
    fn the_other_limits_begin_when_the_model_is_loaded() {
        let now = Instant::now();
        let deadline = limits().deadline(Mode::Buffered, None, now);
        let mut timers = limits().timers(Mode::Buffered, true, deadline, now);
        timers.heard();
        assert_eq!(timers.next(), (now + millis(150_000), Limit::Total));
        timers.loaded(now + millis(20_000));
        assert!(!timers.is_loading());
        assert_eq!(timers.next(), (now + millis(50_000), Limit::Total));
        assert_eq!(timers.passed(Limit::Total).context()["timeoutMs"], 30_000);
        assert!(!timers.is_requests_own());
        timers.loaded(now + millis(30_000));
        assert_eq!(timers.left(now), millis(50_000));
    }

    #[test]
    fn a_limit_that_passed_while_the_model_was_loaded_begins_anew() {
        let now = Instant::now();
        let deadline = limits().deadline(Mode::Buffered, None, now);
        let mut timers = limits().timers(Mode::Buffered, false, deadline, now);
        timers.heard();
        assert_eq!(timers.next(), (now + millis(30_000), Limit::Total));
        timers.begin_loading(now); // as it turns out then
        timers.loaded(now + millis(40_000));
        assert_eq!(timers.next(), (now + millis(70_000), Limit::Total));
        assert!(!timers.is_requests_own());
    }

    #[test]
    fn a_model_that_turns_out_to_be_loading_gets_its_time_from_the_sending_on() {
        let now = Instant::now();
        let deadline = limits().deadline(Mode::Streaming, None, now);
        let mut timers = limits().timers(Mode::Streaming, false, deadline, now);
        timers.heard();
        assert!(timers.may_begin_loading());
        timers.begin_loading(now);
        assert_eq!(timers.next(), (now + millis(120_000), Limit::FirstToken));
        assert!(timers.is_loading() && !timers.may_begin_loading());
        timers.loaded(now + millis(70_000));
        assert!(!timers.may_begin_loading());
        assert_eq!(timers.left(now), millis(670_000));
    }
}
