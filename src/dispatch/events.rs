//! What happens, for those who watch: a bounded ring. A slow reader loses the oldest, and is told how many.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::error::epoch_ms;
use crate::routing::RouterEvent;
use crate::signal::Signal;
use crate::telemetry::Metrics;
use crate::wire::WorkerId;

/// Events that wait for a reader at most.
const CAPACITY: usize = 1_024;

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `worker_registered`, `worker_replaced`, `worker_offline`, `worker_removed`, `worker_draining`, `breaker_changed`,
    /// `session_moved`, `failover`.
    pub kind: &'static str,
    /// The worker that it concerns.
    pub worker_id: Option<WorkerId>,
    /// When, in milliseconds since the epoch.
    pub timestamp_ms: u64,
    /// The facts, under camelCase keys.
    pub details: Map<String, Value>,
    /// How many events this reader missed right before this one.
    pub lost: u64,
}

/// A reader of events.
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    metrics: Arc<Metrics>,
    over: Signal,
}

/// Where events are told.
#[derive(Clone)]
pub(super) struct Teller {
    sender: broadcast::Sender<Event>,
    metrics: Arc<Metrics>,
    over: Signal,
}

// === impl Events ===

impl Events {
    /// The next event; none when the controller has stopped.
    pub async fn next(&mut self) -> Option<Event> {
        let mut lost = 0;
        loop {
            let received = tokio::select! {
                biased;
                received = self.receiver.recv() => received,
                () = self.over.fired() => return None,
            };
            match received {
                Ok(event) => return Some(Event { lost, ..event }),
                Err(RecvError::Lagged(missed)) => {
                    self.metrics.events_lost(missed);
                    lost += missed;
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

// === impl Teller ===

impl Teller {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { sender: broadcast::Sender::new(CAPACITY), metrics, over: Signal::new() }
    }

    pub(super) fn reader(&self) -> Events {
        Events { receiver: self.sender.subscribe(), metrics: self.metrics.clone(), over: self.over.clone() }
    }

    /// Readers get what is there, and then the end.
    pub(super) fn close(&self) {
        self.over.fire();
    }

    /// Another worker answered than the one that was asked first.
    pub(super) fn failover(&self, request_id: &str, worker: &WorkerId, previous: &WorkerId) {
        self.metrics.failover();
        if self.sender.receiver_count() > 0 {
            self.tell(Event::new("failover", worker, json!({"requestId": request_id, "previous": previous.as_str()})));
        }
    }

    /// The routing room's observer: counts, logs and hands on.
    pub(super) fn observe(&self, event: RouterEvent) {
        match &event {
            RouterEvent::WorkerRegistered { worker_id, models, .. } => {
                self.metrics.worker_registered(worker_id);
                tracing::info!(%worker_id, ?models, "worker registered");
            }
            RouterEvent::WorkerReplaced { worker_id, incarnation, previous } => {
                self.metrics.worker_registered(worker_id);
                tracing::warn!(%worker_id, incarnation, previous, "a new start of this worker, or another one of its name, took its place");
            }
            RouterEvent::WorkerOffline { worker_id } => tracing::warn!(%worker_id, "worker offline: silent for too long"),
            RouterEvent::WorkerRemoved { worker_id } => {
                tracing::info!(%worker_id, "worker forgotten");
                self.metrics.worker_removed(worker_id);
            }
            RouterEvent::WorkerDraining { worker_id } => tracing::info!(%worker_id, "worker draining"),
            RouterEvent::BreakerChanged { worker_id, from, to, reason } => {
                use crate::routing::CircuitState::{ForcedOpen, Open};
                let (opened, from, to, reason) = (matches!(to, Open | ForcedOpen), from.as_str(), to.as_str(), reason.as_str());
                if opened {
                    tracing::warn!(%worker_id, from, to, reason, "circuit breaker opened");
                } else {
                    tracing::info!(%worker_id, from, to, reason, "circuit breaker half-open or closed");
                }
                self.metrics.breaker_transition(to);
            }
            RouterEvent::SessionMoved { .. } => {}
        }
        if self.sender.receiver_count() > 0 {
            self.tell((&event).into());
        }
    }

    fn tell(&self, event: Event) {
        // An error means that the last reader has just gone.
        let _ = self.sender.send(event);
    }
}

// === impl Event ===

impl Event {
    fn new(kind: &'static str, worker: &WorkerId, details: Value) -> Self {
        let details = if let Value::Object(details) = details { details } else { Map::new() };
        Self { kind, worker_id: Some(worker.clone()), timestamp_ms: epoch_ms(), details, lost: 0 }
    }
}

impl From<&RouterEvent> for Event {
    /// It happened now.
    fn from(event: &RouterEvent) -> Self {
        let (kind, facts) = event.told();
        Self::new(kind, event.worker_id(), Value::Object(facts))
    }
}
