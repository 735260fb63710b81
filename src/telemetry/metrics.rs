//! Numbers for Prometheus: one registry for each controller.
//!
//! Counters and histograms are kept here; gauges are handed in when the text is asked for, so that they never drift.
//! Labels come from the fleet (worker ids, the models it serves) and from this program (codes, states), never from
//! callers, and their number is bounded: a worker that is gone takes its series along.

use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::config::RetryConfig;
use crate::error::ControllerErrorCode;
use crate::wire::{Usage, WorkerId};

/// The content type of [`Metrics::text`]: OpenMetrics, which Prometheus and the readers of its own format understand.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// In front of every name.
const PREFIX: &str = "mlx_router";
/// The label of models beyond the first thousand, and of models that nobody serves.
const UNKNOWN_MODEL: &str = "unknown";
/// Models with series of their own.
const MODELS_MAX: usize = 1_000;
/// The states that a breaker can change to.
const BREAKER_STATES: [&str; 4] = ["CLOSED", "OPEN", "HALF_OPEN", "FORCED_OPEN"];
/// The code of a success.
const OK: &str = "OK";

/// The numbers of one controller.
pub struct Metrics {
    registry: Registry,
    models: Mutex<HashMap<Box<str>, Arc<OfModel>>>,
    /// The fleet, with the count of attempts that went well.
    workers: Mutex<HashMap<WorkerId, Counter>>,
    requests: Family<ModelCode, Counter>,
    duration: Family<Model, Histogram, fn() -> Histogram>,
    first_token: Family<Model, Histogram, fn() -> Histogram>,
    tokens: Family<ModelKind, Counter>,
    attempts: Family<WorkerCode, Counter>,
    retries: Family<Code, Counter>,
    breaker_transitions: Family<To, Counter>,
    failovers: Counter,
    late_replies: Counter,
    dropped_replies: Counter,
    events_lost: Counter,
}

/// What every request for one model changes, looked up once.
struct OfModel {
    label: Box<str>,
    ok: Counter,
    duration: Histogram,
    first_token: Histogram,
    prompt: Counter,
    completion: Counter,
    cached: Counter,
}

/// What is true at the moment that the text is written.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Requests that have not ended.
    pub active: usize,
    /// Requests that wait for a worker.
    pub queued: usize,
    /// The fleet.
    pub workers: Vec<WorkerGauges>,
    /// How full each bounded store is: its name and its entries.
    pub stores: Vec<(&'static str, usize)>,
}

/// One worker at the moment that the text is written.
#[derive(Clone, Debug)]
pub struct WorkerGauges {
    /// Its name.
    pub worker_id: WorkerId,
    /// `online`, `degraded`, `draining` or `offline`.
    pub status: &'static str,
    /// The state of its breaker.
    pub breaker: &'static str,
    /// Our requests on it.
    pub in_flight: u32,
    /// Requests that wait on it, whoever sent them.
    pub queue_depth: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Model {
    model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelCode {
    model: String,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelKind {
    model: String,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Worker {
    worker_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerCode {
    worker_id: String,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerState {
    worker_id: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct To {
    to: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Store {
    store: &'static str,
}

// === impl Metrics ===

impl Metrics {
    /// All numbers at zero.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let mut metrics = Self {
            registry: Registry::with_prefix(PREFIX),
            models: Mutex::default(),
            workers: Mutex::default(),
            requests: Family::default(),
            duration: Family::new_with_constructor(duration_buckets),
            first_token: Family::new_with_constructor(duration_buckets),
            tokens: Family::default(),
            attempts: Family::default(),
            retries: Family::default(),
            breaker_transitions: Family::default(),
            failovers: Counter::default(),
            late_replies: Counter::default(),
            dropped_replies: Counter::default(),
            events_lost: Counter::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("requests", "Requests that ended, by model and code", metrics.requests.clone());
        let (name, help) = ("request_duration", "From a request's arrival to its end");
        registry.register_with_unit(name, help, Unit::Seconds, metrics.duration.clone());
        let (name, help) = ("time_to_first_token", "From a request's arrival to its first token");
        registry.register_with_unit(name, help, Unit::Seconds, metrics.first_token.clone());
        registry.register("tokens", "Tokens of prompts and answers, and prompt tokens found in caches", metrics.tokens.clone());
        registry.register("attempts", "Attempts that ended, by worker and code", metrics.attempts.clone());
        registry.register("retries", "Further attempts, by the code that led to them", metrics.retries.clone());
        let (name, help) = ("breaker_transitions", "Changes of circuit breakers, by the state they led to");
        registry.register(name, help, metrics.breaker_transitions.clone());
        registry.register("failovers", "Requests that another worker finished", metrics.failovers.clone());
        let (name, help) = ("late_replies", "Replies to attempts that were over");
        registry.register(name, help, metrics.late_replies.clone());
        let (name, help) = ("dropped_replies", "Replies that the protocol has no place for");
        registry.register(name, help, metrics.dropped_replies.clone());
        registry.register("events_lost", "Events that slow readers missed", metrics.events_lost.clone());
        // What has not happened yet is there as a zero, so that its first time is seen as a change.
        for code in RetryConfig::default().retry_on_errors {
            drop(metrics.retries.get_or_create(&Code { code: code.as_str() }));
        }
        for to in BREAKER_STATES {
            drop(metrics.breaker_transitions.get_or_create(&To { to }));
        }
        Arc::new(metrics)
    }

    /// A request has ended. `model` is none where no worker serves the model that the caller named; `code` is none for a
    /// success.
    pub fn request_ended(
        &self,
        model: Option<&str>,
        code: Option<ControllerErrorCode>,
        duration: Duration,
        first_token: Option<Duration>,
    ) {
        let of_model = self.of_model(model);
        of_model.duration.observe(duration.as_secs_f64());
        if let Some(first_token) = first_token {
            of_model.first_token.observe(first_token.as_secs_f64());
        }
        match code {
            None => of_model.ok.inc(),
            code => self.requests.get_or_create(&ModelCode { model: of_model.label.to_string(), code: name(code) }).inc(),
        };
    }

    /// What an answer cost. `model` as in [`request_ended`](Self::request_ended).
    pub fn tokens(&self, model: Option<&str>, usage: &Usage) {
        let of_model = self.of_model(model);
        of_model.prompt.inc_by(usage.prompt_tokens);
        of_model.completion.inc_by(usage.completion_tokens);
        of_model.cached.inc_by(usage.cached_tokens);
    }

    /// An attempt has ended; `code` is none for a success. Those that outlive their worker's place in the fleet are not
    /// counted: nothing would take their series away again.
    pub fn attempt_ended(&self, worker: &WorkerId, code: Option<ControllerErrorCode>) {
        let workers = self.workers.lock();
        match (workers.get(worker), code) {
            (None, _) => 0,
            (Some(ok), None) => ok.inc(),
            (Some(_), code) => self.attempts.get_or_create(&of_worker(worker, code)).inc(),
        };
    }

    /// Another attempt follows one that ended with this code.
    pub fn retry(&self, code: ControllerErrorCode) {
        self.retries.get_or_create(&Code { code: code.as_str() }).inc();
    }

    /// A breaker changed to this state, as `CircuitState::as_str` writes it.
    pub fn breaker_transition(&self, to: &'static str) {
        self.breaker_transitions.get_or_create(&To { to }).inc();
    }

    /// A request was answered by another worker than its first.
    pub fn failover(&self) {
        self.failovers.inc();
    }

    /// So many replies came to attempts that were over.
    pub fn late_replies(&self, count: u64) {
        self.late_replies.inc_by(count);
    }

    /// So many replies came that the protocol has no place for.
    pub fn dropped_replies(&self, count: u64) {
        self.dropped_replies.inc_by(count);
    }

    /// A reader of events was too slow for so many of them.
    pub fn events_lost(&self, count: u64) {
        self.events_lost.inc_by(count);
    }

    /// A worker is in the fleet: its attempts count.
    pub fn worker_registered(&self, worker: &WorkerId) {
        let mut workers = self.workers.lock();
        if !workers.contains_key(worker) {
            workers.insert(worker.clone(), self.attempts.get_or_create_owned(&of_worker(worker, None)));
        }
    }

    /// A worker has left the fleet: its series go.
    pub fn worker_removed(&self, worker: &WorkerId) {
        let mut workers = self.workers.lock();
        workers.remove(worker);
        self.forget(worker);
    }

    /// The exposition text ([`CONTENT_TYPE`]).
    #[must_use]
    pub fn text(&self, gauges: &Gauges) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let written = encode_registry(&mut text, &self.registry)
            .and_then(|()| encode_registry(&mut text, &gauges.registry()))
            .and_then(|()| encode_eof(&mut text));
        debug_assert!(written.is_ok());
        text
    }

    /// Whether this model has series of its own.
    pub fn knows_model(&self, model: &str) -> bool {
        self.models.lock().contains_key(model)
    }

    /// The series of a model, its own where it is served and the number of those is not used up. At zero where they are new.
    fn of_model(&self, model: Option<&str>) -> Arc<OfModel> {
        let mut models = self.models.lock();
        if let Some(known) = model.and_then(|model| models.get(model)) {
            return Arc::clone(known);
        }
        let label = model.filter(|_| models.len() < MODELS_MAX).unwrap_or(UNKNOWN_MODEL);
        if let Some(known) = models.get(label) {
            return Arc::clone(known);
        }
        let new = Arc::new(self.new_model(label));
        models.insert(label.into(), Arc::clone(&new));
        new
    }

    fn new_model(&self, label: &str) -> OfModel {
        let model = Model { model: label.to_owned() };
        let tokens = |kind| self.tokens.get_or_create_owned(&ModelKind { model: label.to_owned(), kind });
        OfModel {
            label: label.into(),
            ok: self.requests.get_or_create_owned(&ModelCode { model: label.to_owned(), code: OK }),
            duration: self.duration.get_or_create_owned(&model),
            first_token: self.first_token.get_or_create_owned(&model),
            prompt: tokens("prompt"),
            completion: tokens("completion"),
            cached: tokens("cached"),
        }
    }

    /// Called under the lock of `workers`, so that an attempt that ends now leaves nothing behind.
    fn forget(&self, worker: &WorkerId) {
        for code in ControllerErrorCode::ALL.into_iter().map(Some).chain([None]) {
            self.attempts.remove(&of_worker(worker, code));
        }
    }
}

// === impl Gauges ===

impl Gauges {
    fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix(PREFIX);
        let gauge = |value: usize| {
            let gauge: Gauge = Gauge::default();
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            gauge
        };
        registry.register("requests_active", "Requests that have not ended", gauge(self.active));
        registry.register("requests_queued", "Requests that wait for a worker", gauge(self.queued));

        let statuses: Family<Status, Gauge> = Family::default();
        for status in ["online", "degraded", "draining", "offline"] {
            statuses.get_or_create(&Status { status }).set(0);
        }
        let breakers: Family<WorkerState, Gauge> = Family::default();
        let in_flight: Family<Worker, Gauge> = Family::default();
        let queue_depth: Family<Worker, Gauge> = Family::default();
        for worker in &self.workers {
            statuses.get_or_create(&Status { status: worker.status }).inc();
            let label = Worker { worker_id: worker.worker_id.to_string() };
            in_flight.get_or_create(&label).set(worker.in_flight.into());
            queue_depth.get_or_create(&label).set(worker.queue_depth.into());
            breakers.get_or_create(&WorkerState { worker_id: label.worker_id, state: worker.breaker }).set(1);
        }
        registry.register("workers", "Workers, by status", statuses);
        registry.register("worker_breaker", "1 for the state that a worker's circuit breaker is in", breakers);
        registry.register("worker_in_flight", "Requests of this controller on a worker", in_flight);
        registry.register("worker_queue_depth", "Requests that wait on a worker, by its own report", queue_depth);

        let stores: Family<Store, Gauge> = Family::default();
        for (store, entries) in &self.stores {
            stores.get_or_create(&Store { store }).set(i64::try_from(*entries).unwrap_or(i64::MAX));
        }
        registry.register("store_entries", "Entries of each bounded store", stores);
        registry
    }
}

/// From five milliseconds to ten minutes, in seconds.
fn duration_buckets() -> Histogram {
    Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0])
}

fn of_worker(worker: &WorkerId, code: Option<ControllerErrorCode>) -> WorkerCode {
    WorkerCode { worker_id: worker.to_string(), code: name(code) }
}

fn name(code: Option<ControllerErrorCode>) -> &'static str {
    code.map_or(OK, ControllerErrorCode::as_str)
}
