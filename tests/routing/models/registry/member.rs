//! One member of the fleet as the specification says it, and what is remembered of an id beyond one life of it.

use std::time::Duration;

use mlx_serving_router::routing::{Carrier, CircuitState, WorkerSnapshot};
use mlx_serving_router::wire::{Heartbeat, Phase, Registration, WorkerStatus};
use tokio::time::Instant;

use super::model::{DRAIN_LIMIT, FORGOTTEN_AFTER, HEARTBEAT, LONGEST_HOLD, OFFLINE_AFTER, SUSPECT_AFTER};

const INCARNATIONS_REMEMBERED: usize = 16;

/// What outlives one life of a worker.
#[derive(Clone, Default)]
pub struct History {
    /// Incarnations that are over, the oldest first.
    pub over: Vec<String>,
    returns: u32,
    returned: Option<Instant>,
}

#[derive(Clone)]
pub struct Member {
    pub history: History,
    /// What it said of itself at first, and what has changed since.
    pub said: Registration,
    pub carrier: Carrier,
    pub life: u64,
    /// The time in which it was there without a break.
    pub presence: u64,
    pub report: Option<(Heartbeat, Instant)>,
    pub foreign: u32,
    pub seen: Instant,
    pub silent_since: Instant,
    pub unheard: bool,
    /// It missed two heartbeats.
    pub suspect: bool,
    pub held: Option<Instant>,
    pub drained: Option<Instant>,
    pub deregistered: Option<Instant>,
    pub offline: Option<Instant>,
    pub in_flight: u32,
}

/// How it stands, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    Online,
    Degraded,
    Held,
    Unheard,
    Draining,
    Offline,
}

impl Member {
    pub fn standing(&self) -> Standing {
        let phase = self.report.as_ref().map_or(Phase::Ready, |(report, _)| report.phase);
        let leaves = self.drained.is_some() || self.deregistered.is_some() || phase == Phase::Draining;
        match self.said.status {
            _ if self.offline.is_some() => Standing::Offline,
            WorkerStatus::Draining | WorkerStatus::Offline => Standing::Draining,
            _ if leaves => Standing::Draining,
            _ if self.unheard => Standing::Unheard,
            _ if self.held.is_some() => Standing::Held,
            WorkerStatus::Online if !self.suspect => Standing::Online,
            WorkerStatus::Online | WorkerStatus::Degraded => Standing::Degraded,
        }
    }

    pub fn is_older(&self) -> bool {
        self.said.protocol.is_none()
    }

    pub fn serves(&self, model: &str) -> bool {
        self.standing() < Standing::Draining && self.said.skills.available_models.iter().any(|served| served == model)
    }

    pub fn snapshot(&self, now: Instant) -> WorkerSnapshot {
        let report = self.report.clone().map_or_else(|| crate::heartbeat("nobody", "", 0), |(report, _)| report);
        let is_fresh = self.report.as_ref().is_some_and(|(_, at)| now - *at < 3 * HEARTBEAT);
        WorkerSnapshot {
            worker_id: self.said.worker_id.clone(),
            incarnation: self.said.incarnation.clone(),
            carrier: self.carrier,
            status: match self.standing() {
                Standing::Online | Standing::Held | Standing::Unheard => WorkerStatus::Online,
                Standing::Degraded => WorkerStatus::Degraded,
                // What it calls itself: it gets nothing new, and is heard from.
                Standing::Draining if self.said.status == WorkerStatus::Offline => WorkerStatus::Offline,
                Standing::Draining => WorkerStatus::Draining,
                Standing::Offline => WorkerStatus::Offline,
            },
            phase: report.phase,
            models: self.said.skills.available_models.clone(),
            loaded_models: report.metrics.models_loaded,
            loading_models: report.loading_models,
            in_flight: self.in_flight,
            foreign: if is_fresh { self.foreign } else { 0 },
            capacity: self.said.capacity,
            features: self.said.features.clone(),
            hostname: self.said.hostname.clone(),
            last_seen: now - self.seen,
            breaker: CircuitState::Disabled,
            queue_depth: report.queue_depth,
            tokens_generated: report.tokens_generated,
            legacy: self.is_older(),
        }
    }

    /// When something falls due by the clock alone.
    pub fn due(&self) -> [Option<Instant>; 6] {
        [
            Some(self.silent_since + SUSPECT_AFTER),
            Some(self.silent_since + OFFLINE_AFTER),
            self.offline.map(|at| at + FORGOTTEN_AFTER),
            self.deregistered.or(self.drained).map(|at| at + DRAIN_LIMIT),
            self.held,
            self.report.as_ref().map(|(_, at)| *at + 3 * HEARTBEAT),
        ]
    }
}

impl History {
    pub fn end(&mut self, incarnation: &str) {
        if !incarnation.is_empty() && !self.over.iter().any(|over| over == incarnation) {
            self.over.push(incarnation.to_owned());
            let forgotten = self.over.len().saturating_sub(INCARNATIONS_REMEMBERED);
            self.over.drain(..forgotten);
        }
    }

    /// Two returns are free; those that follow hold the worker back for 1 s, 2 s, 4 s … Each time as long as the longest
    /// hold that passes without a return forgives one; those that would hold it for as long or longer are not added up.
    pub fn back(&mut self, now: Instant) -> Option<Instant> {
        let calm = self.returned.map_or(Duration::ZERO, |returned| now - returned);
        let forgiven = calm.as_millis() / LONGEST_HOLD.as_millis();
        self.returns = self.returns.saturating_sub(forgiven as u32) + 1;
        self.returned = Some(now);
        let hold = Duration::from_secs(1 << self.returns.checked_sub(3)?);
        self.returns -= u32::from(hold >= LONGEST_HOLD);
        Some(now + hold.min(LONGEST_HOLD))
    }
}
