//! What all parts of one controller share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::admission::Admission;
use super::controller::ControllerState;
use super::events::Teller;
use super::left_out::LeftOutLog;
use super::limits::Limits;
use super::retry::{Budgets, Next, RetryPolicy};
use crate::config::ClusterConfig;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::routing::{Carrier, Router, RouterSettings};
use crate::signal::Signal;
use crate::telemetry::{Gauges, Metrics, Requests, WorkerGauges};
use crate::transport::http::HttpTransport;
use crate::transport::nats::NatsTransport;
use crate::transport::{LocalHub, Transport};

/// One controller.
pub(super) struct Core {
    pub(super) id: Arc<str>,
    pub(super) config: ClusterConfig,
    pub(super) router: Arc<Router>,
    pub(super) requests: Arc<Requests>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) events: Teller,
    pub(super) left_out: LeftOutLog,
    /// When a worker was last turned away because the fleet is full.
    pub(super) fleet_full_told: Mutex<Option<Instant>>,
    pub(super) limits: Limits,
    pub(super) retry: RetryPolicy,
    pub(super) budgets: Mutex<Budgets>,
    pub(super) admission: Arc<Admission>,
    pub(super) hub: Arc<LocalHub>,
    pub(super) nats: OnceLock<Arc<NatsTransport>>,
    pub(super) http: Arc<HttpTransport>,
    pub(super) state: watch::Sender<ControllerState>,
    /// Fires when running requests are cut off.
    pub(super) cut: Signal,
    /// Notified whenever a request ends.
    pub(super) ended: Notify,
    rng: Mutex<fastrand::Rng>,
    /// Late replies that the metrics know of.
    late_told: AtomicU64,
}

// === impl Core ===

impl Core {
    pub(super) fn new(config: ClusterConfig, id: Option<String>) -> Result<Arc<Self>, ControllerError> {
        refuse_what_is_missing(&config)?;
        let settings = RouterSettings::try_from(&config)?;
        let mut rng = fastrand::Rng::new();
        let id = match id {
            Some(id) if (1..=128).contains(&id.len()) && id.chars().all(|letter| letter.is_ascii_graphic()) => id,
            Some(id) => {
                let shown: String = id.chars().take(80).collect();
                let message = format!("is {shown:?}; 1 to 128 printable ASCII characters without spaces are allowed");
                return Err(ControllerError::validation("controller_id", message));
            }
            None => format!("controller-{:08x}", rng.u32(..)),
        };
        let id: Arc<str> = id.into();
        let metrics = Metrics::new();
        let events = Teller::new(metrics.clone());
        let observer = events.clone();
        let routing = &config.request_routing;
        let retry = RetryPolicy::new(&routing.retry);
        let accept = Duration::from_millis(routing.accept_timeout_ms);
        Ok(Arc::new(Self {
            router: Router::new(settings, rng.u64(..), Box::new(move |event| observer.observe(event))),
            requests: Requests::new(&config.request_metrics),
            limits: Limits::new(routing, retry.attempts()),
            budgets: Mutex::new(Budgets::new(&routing.retry)),
            admission: Admission::new(&routing.admission),
            hub: Arc::new(LocalHub::new(id.clone())),
            nats: OnceLock::new(),
            http: Arc::new(HttpTransport::new(&config.workers.r#static, accept)?),
            state: watch::Sender::new(ControllerState::Idle),
            cut: Signal::new(),
            ended: Notify::new(),
            rng: Mutex::new(rng),
            late_told: AtomicU64::new(0),
            left_out: LeftOutLog::default(),
            fleet_full_told: Mutex::default(),
            retry,
            metrics,
            events,
            config,
            id,
        }))
    }

    pub(super) fn state(&self) -> ControllerState {
        *self.state.borrow()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.state() == ControllerState::Ready
    }

    /// Whether our own connection to NATS is down.
    pub(super) fn is_disconnected(&self) -> bool {
        self.nats.get().is_some_and(|nats| !nats.is_connected())
    }

    /// Goes on to a later state; false where it is there, or past it.
    pub(super) fn advance(&self, to: ControllerState) -> bool {
        let moved = self.state.send_if_modified(|state| {
            let moves = *state < to;
            if moves {
                *state = to;
            }
            moves
        });
        if moved {
            tracing::debug!(controller_id = &*self.id, state = to.as_str(), "controller state");
        }
        moved
    }

    /// What follows a failed attempt.
    pub(super) fn next(&self, error: &ControllerError, attempt: u32) -> Next {
        self.retry.next(error, attempt, &mut self.rng.lock())
    }

    /// Who carries requests to such a worker.
    pub(super) fn transport(&self, carrier: Carrier) -> Arc<dyn Transport> {
        match (carrier, self.nats.get()) {
            (Carrier::Nats, Some(nats)) => nats.clone(),
            (Carrier::Http, _) => self.http.clone(),
            // Without NATS there are no workers behind it.
            (Carrier::Nats, None) | (Carrier::Local, _) => self.hub.clone(),
        }
    }

    pub(super) fn workers_known(&self) -> usize {
        self.router.snapshot(Instant::now()).len()
    }

    pub(super) fn metrics_text(&self) -> String {
        let late = self.nats.get().map_or(0, |nats| nats.late_replies());
        self.metrics.late_replies(late.saturating_sub(self.late_told.fetch_max(late, Ordering::Relaxed)));
        let workers = self.router.snapshot(Instant::now()).into_iter().map(|worker| WorkerGauges {
            worker_id: worker.worker_id,
            status: worker.status.as_str(),
            breaker: worker.breaker.as_str(),
            in_flight: worker.in_flight,
            queue_depth: worker.queue_depth,
        });
        self.metrics.text(&Gauges {
            active: self.requests.active(),
            queued: self.requests.queued(),
            workers: workers.collect(),
            stores: vec![
                ("admission", self.admission.waiting()),
                ("inbox", self.nats.get().map_or(0, |nats| nats.waiting())),
                ("prefixes", self.router.prefixes_known()),
                ("request_metadata", self.requests.remembered()),
                ("sessions", self.router.sessions_known()),
            ],
        })
    }
}

/// Better refused at the start than found missing later.
fn refuse_what_is_missing(config: &ClusterConfig) -> Result<(), ControllerError> {
    let refuse = |key: &str, what: &str| Err(ControllerError::validation(key, format!("{what} not available in this version")));
    if config.request_routing.hedging.enabled {
        return refuse("requestRouting.hedging.enabled", "hedging is");
    }
    Ok(())
}

/// The error of a call to a controller that does not take requests.
pub(super) fn not_ready(state: ControllerState) -> ControllerError {
    let what = match state {
        ControllerState::Idle => "has not been started",
        ControllerState::Connecting | ControllerState::Registering | ControllerState::Starting => "is starting",
        ControllerState::Ready => "is not ready",
        ControllerState::Draining | ControllerState::Stopping => "is stopping",
        ControllerState::Stopped => "has stopped",
    };
    ControllerError::new(ControllerErrorCode::ControllerNotReady, format!("the controller {what}")).with("state", state.as_str())
}
