//! How a worker looks from outside at one moment.

use std::time::Duration;

use tokio::time::Instant;

use super::breaker::CircuitState;
use super::worker::{Carrier, Standing, Worker};
use crate::wire::{Capacity, Feature, Phase, WorkerId, WorkerStatus};

/// A worker at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerSnapshot {
    /// Its name.
    pub worker_id: WorkerId,
    /// Which life of it; empty for workers of the older dialect.
    pub incarnation: String,
    /// Who carries requests to it.
    pub carrier: Carrier,
    /// How it stands with this controller, which may know more than the worker says.
    pub status: WorkerStatus,
    /// What it is doing.
    pub phase: Phase,
    /// What it serves.
    pub models: Vec<String>,
    /// Models in memory.
    pub loaded_models: Vec<String>,
    /// Models on their way into memory.
    pub loading_models: Vec<String>,
    /// Requests of this controller.
    pub in_flight: u32,
    /// Requests of others, as far as it said so lately.
    pub foreign: u32,
    /// Its room.
    pub capacity: Capacity,
    /// What it can do beyond answering.
    pub features: Vec<Feature>,
    /// The machine's name.
    pub hostname: String,
    /// How long ago it was last heard from.
    pub last_seen: Duration,
    /// Its breaker.
    pub breaker: CircuitState,
    /// Requests that wait at the worker.
    pub queue_depth: u32,
    /// Tokens since its start.
    pub tokens_generated: u64,
    /// It speaks the older dialect.
    pub legacy: bool,
}

// === impl WorkerSnapshot ===

impl WorkerSnapshot {
    pub(super) fn new(worker: &Worker, now: Instant) -> Self {
        let breaker = worker.breaker().map_or(CircuitState::Disabled, |(breaker, _)| breaker.state(now));
        let live = worker.live();
        Self {
            worker_id: worker.id.clone(),
            incarnation: worker.incarnation.to_string(),
            carrier: worker.carrier,
            status: match worker.standing() {
                Standing::Online | Standing::Held | Standing::Unheard => WorkerStatus::Online,
                Standing::Degraded => WorkerStatus::Degraded,
                // In its own word: it gets nothing new, and is still heard from.
                Standing::Draining if live.status == WorkerStatus::Offline => WorkerStatus::Offline,
                Standing::Draining => WorkerStatus::Draining,
                Standing::Offline => WorkerStatus::Offline,
            },
            phase: live.phase,
            models: live.model_names(),
            loaded_models: live.loaded.clone(),
            loading_models: live.loading.clone(),
            in_flight: worker.load.own(),
            foreign: worker.load.foreign(now),
            capacity: live.capacity,
            features: live.features.clone(),
            hostname: live.hostname.clone(),
            last_seen: now.saturating_duration_since(live.last_seen),
            breaker,
            queue_depth: live.queue_depth,
            tokens_generated: live.tokens_generated,
            legacy: worker.legacy,
        }
    }
}
