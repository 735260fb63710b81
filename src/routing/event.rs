//! What the room tells of itself: every change of membership, every transition of a breaker, once.

use serde_json::{Map, Value, json};

use super::breaker::{BreakerReason, CircuitState};
use crate::wire::WorkerId;

/// Who hears of events. It is called outside of every lock, on the thread that caused the event.
pub type Observer = Box<dyn Fn(RouterEvent) + Send + Sync>;

/// Something that happened in the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouterEvent {
    /// A worker is in the fleet: for the first time, or again after silence.
    WorkerRegistered {
        /// Who.
        worker_id: WorkerId,
        /// Which life of it.
        incarnation: String,
        /// What it serves.
        models: Vec<String>,
    },
    /// A new incarnation took the place of one that was still known.
    WorkerReplaced {
        /// Who.
        worker_id: WorkerId,
        /// The new one.
        incarnation: String,
        /// The one that is no more.
        previous: String,
    },
    /// A worker was silent for too long.
    WorkerOffline {
        /// Who.
        worker_id: WorkerId,
    },
    /// A worker is forgotten.
    WorkerRemoved {
        /// Who.
        worker_id: WorkerId,
    },
    /// A worker takes nothing new and finishes what it has.
    WorkerDraining {
        /// Who.
        worker_id: WorkerId,
    },
    /// A breaker went from one state to another.
    BreakerChanged {
        /// Whose.
        worker_id: WorkerId,
        /// The state before.
        from: CircuitState,
        /// The state now.
        to: CircuitState,
        /// Why.
        reason: BreakerReason,
    },
    /// A session belongs to another worker now.
    SessionMoved {
        /// To whom.
        worker_id: WorkerId,
        /// From whom.
        previous: WorkerId,
    },
}

// === impl RouterEvent ===

impl RouterEvent {
    /// The worker that it concerns.
    #[must_use]
    pub const fn worker_id(&self) -> &WorkerId {
        match self {
            Self::WorkerRegistered { worker_id, .. }
            | Self::WorkerReplaced { worker_id, .. }
            | Self::WorkerOffline { worker_id }
            | Self::WorkerRemoved { worker_id }
            | Self::WorkerDraining { worker_id }
            | Self::BreakerChanged { worker_id, .. }
            | Self::SessionMoved { worker_id, .. } => worker_id,
        }
    }

    /// What happened, as it is written everywhere, and the facts, under camelCase keys.
    #[must_use]
    pub fn told(&self) -> (&'static str, Map<String, Value>) {
        let (kind, facts) = match self {
            Self::WorkerRegistered { incarnation, models, .. } => {
                ("worker_registered", json!({"incarnation": incarnation, "models": models}))
            }
            Self::WorkerReplaced { incarnation, previous, .. } => {
                ("worker_replaced", json!({"incarnation": incarnation, "previous": previous}))
            }
            Self::WorkerOffline { .. } => ("worker_offline", json!({})),
            Self::WorkerRemoved { .. } => ("worker_removed", json!({})),
            Self::WorkerDraining { .. } => ("worker_draining", json!({})),
            Self::BreakerChanged { from, to, reason, .. } => {
                let (from, to, reason) = (from.as_str(), to.as_str(), reason.as_str());
                ("breaker_changed", json!({"from": from, "to": to, "reason": reason}))
            }
            Self::SessionMoved { previous, .. } => ("session_moved", json!({"previous": previous.as_str()})),
        };
        (kind, if let Value::Object(facts) = facts { facts } else { Map::new() })
    }
}
