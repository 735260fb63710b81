//! What the room tells of itself: every change of membership, every transition of a breaker, once.

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
