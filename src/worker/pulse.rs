//! What heartbeats say: the engine's last report, what the desk has, and how the machine is doing.

use std::sync::Arc;

use super::board::Board;
use super::desk::Desk;
use super::machine::Machine;
use crate::error::epoch_ms;
use crate::wire::{Heartbeat, HeartbeatMetrics, Phase, Registration, WorkerId, WorkerStatus};

/// How many requests a heartbeat names; `metrics.activeRequests` counts all of them.
const IDS: usize = 1000;

/// The heartbeats of one life of a worker, one after the other.
pub(super) struct Pulse {
    desk: Arc<Desk>,
    worker_id: WorkerId,
    incarnation: String,
    machine: Machine,
    sequence: u64,
}

// === impl Pulse ===

impl Pulse {
    pub(super) fn new(desk: Arc<Desk>, registration: &Registration) -> Self {
        let (worker_id, incarnation) = (registration.worker_id.clone(), registration.incarnation.clone());
        Self { desk, worker_id, incarnation, machine: Machine::new(), sequence: 0 }
    }

    /// The next one.
    pub(super) fn beat(&mut self, status: WorkerStatus) -> Heartbeat {
        self.sequence += 1;
        let Board { phase, loaded, loading, cached, .. } = self.desk.board.borrow().clone();
        let census = self.desk.census(IDS);
        let (cpu_usage_percent, memory_used_gb) = self.machine.read();
        Heartbeat {
            worker_id: self.worker_id.clone(),
            incarnation: self.incarnation.clone(),
            sequence: self.sequence,
            status,
            timestamp: epoch_ms(),
            metrics: HeartbeatMetrics {
                cpu_usage_percent,
                memory_used_gb,
                gpu_utilization_percent: 0.0,
                active_requests: count(census.active),
                total_requests_handled: census.tally.handled,
                avg_latency_ms: census.tally.mean_ms(),
                models_loaded: loaded,
            },
            queue_depth: count(census.waiting),
            active_request_ids: Some(census.active_ids),
            tokens_generated: census.tally.tokens,
            phase: if status == WorkerStatus::Draining { Phase::Draining } else { phase },
            loading_models: loading,
            cached_prefixes: cached.to_vec(),
        }
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
