//! One life of one worker: what it said of itself, and whether it may be given a request.
//!
//! What selections ask for is in atomics; the rest lies behind a small lock. Only the registry changes a standing.

use std::sync::Arc;

use tokio::time::Instant;

use super::breaker::Breaker;
use super::hub::Hub;
use super::ledger::Entry;
use super::load::Load;
use super::rendezvous;
use super::sessions::Binding;
use super::settings::BreakerSettings;
use crate::signal::Signal;
use crate::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::wire::{Capacity, Feature, Heartbeat, Phase, Registration, WorkerId, WorkerStatus};

/// Who carries requests to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carrier {
    /// NATS: it gives signs of life, and silence means that it is gone.
    Nats,
    /// HTTP: it is looked at every so often, which gives signs of life in its name.
    Http,
    /// This process: it is there until it is removed.
    Local,
}

/// What may be asked of a worker: of those before it in this list, more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
#[repr(u8)]
pub(super) enum Standing {
    /// Anything.
    Online,
    /// What no online worker has room for: it calls itself degraded, or has missed heartbeats.
    Degraded,
    /// What nobody else has room for: it comes and goes.
    Held,
    /// Nothing until it has been heard from: our own connection was down.
    Unheard,
    /// Nothing new.
    Draining,
    /// Nothing: it is silent, or not the one any more.
    Offline,
}

/// A worker that names more models than this, one heartbeat after the other, is not believed.
const MODELS_FROM_HEARTBEATS: usize = 1024;

/// Tells one life of a worker from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) serial: u64,
    /// Its account in the ledger, which becomes another's when this life is forgotten.
    pub(super) account: u32,
}

/// In this order: what a selection writes lies together, for threads to have few lines of memory to hand to each other.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Worker {
    /// The standing in the lowest byte, and the number of the presence: what [`Live`] says, written under its lock.
    state: AtomicU64,
    pub(super) load: Load,
    breaker: Option<Breaker>,
    pub(super) hub: Arc<Hub>,
    pub(super) life: Life,
    pub(super) id: WorkerId,
    pub(super) incarnation: Arc<str>,
    pub(super) carrier: Carrier,
    /// It speaks the older dialect.
    pub(super) legacy: bool,
    /// Its share of rendezvous scores.
    pub(super) seat: u64,
    /// For `weighted_random`.
    pub(super) weight: f64,
    /// Those of a lower one are chosen when none of a higher one is free.
    pub(super) priority: u8,
    features: AtomicU8,
    live: Mutex<Live>,
}

/// What a worker said last, and when.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) status: WorkerStatus,
    pub(super) phase: Phase,
    pub(super) models: Vec<Arc<str>>,
    pub(super) loaded: Vec<String>,
    pub(super) loading: Vec<String>,
    pub(super) capacity: Capacity,
    pub(super) memory_used_gb: f64,
    pub(super) hostname: String,
    pub(super) features: Vec<Feature>,
    pub(super) queue_depth: u32,
    pub(super) tokens_generated: u64,
    pub(super) sequence: u64,
    pub(super) last_seen: Instant,
    /// From here on silence is counted; later than `last_seen` after our own connection was down.
    pub(super) silent_since: Instant,
    pub(super) unheard: bool,
    /// It missed heartbeats.
    pub(super) suspect: bool,
    /// Until when it is held back.
    pub(super) held: Option<Instant>,
    pub(super) drained: Option<Instant>,
    pub(super) deregistered: Option<Instant>,
    pub(super) offline: Option<Instant>,
    /// Nothing is to be expected of it any more.
    pub(super) replaced: bool,
    /// Another life has its name; what it has may finish.
    pub(super) succeeded: bool,
    /// Grows when it comes back after it had been offline.
    presence: u64,
    /// Fires when this presence is over.
    pub(super) gone: Signal,
}

// === impl Worker ===

impl Worker {
    pub(super) fn new(registration: &Registration, carrier: Carrier, serial: u64, hub: Arc<Hub>, now: Instant) -> Self {
        let mut live = Live {
            status: registration.status,
            phase: Phase::default(),
            models: Vec::new(),
            loaded: Vec::new(),
            loading: Vec::new(),
            capacity: Capacity::default(),
            memory_used_gb: 0.0,
            hostname: String::new(),
            features: Vec::new(),
            queue_depth: 0,
            tokens_generated: 0,
            sequence: 0,
            last_seen: now,
            silent_since: now,
            unheard: false,
            suspect: false,
            held: None,
            drained: None,
            deregistered: None,
            offline: None,
            replaced: false,
            succeeded: false,
            presence: 0,
            gone: Signal::new(),
        };
        live.describe(registration);
        let id = registration.worker_id.clone();
        let account = hub.ledger.open(now);
        account.mark(Entry::ASIDE, live.standing() != Standing::Online);
        let breaker = hub.settings.breaker.as_ref().map(|breaker| Breaker::new(breaker, account.clone(), now));
        Self {
            incarnation: registration.incarnation.as_str().into(),
            life: Life { serial, account: account.number() },
            carrier,
            legacy: registration.is_older(),
            seat: rendezvous::seat(&id),
            weight: hub.settings.weights.get(id.as_str()).copied().unwrap_or(1.0),
            priority: hub.settings.priorities.get(id.as_str()).copied().unwrap_or(0),
            load: Load::new(account, live.capacity.max_concurrent, now),
            breaker,
            state: AtomicU64::new(live.state()),
            features: AtomicU8::new(feature_bits(&live.features)),
            live: Mutex::new(live),
            id,
            hub,
        }
    }

    pub(super) fn standing(&self) -> Standing {
        Standing::from_state(self.state.load(Ordering::Acquire))
    }

    pub(super) fn has(&self, feature: Feature) -> bool {
        self.features.load(Ordering::Relaxed) & feature_bits(&[feature]) != 0
    }

    pub(super) fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock()
    }

    /// Changes what is known of it. The atomics follow before the lock is given back.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Live) -> T) -> T {
        let mut live = self.live.lock();
        let result = change(&mut live);
        self.load.set_limit(live.capacity.max_concurrent);
        self.features.store(feature_bits(&live.features), Ordering::Relaxed);
        self.state.store(live.state(), Ordering::Release);
        self.load.account().mark(Entry::ASIDE, live.standing() != Standing::Online);
        result
    }

    /// Its breaker, with the settings of all breakers.
    pub(super) fn breaker(&self) -> Option<(&Breaker, &BreakerSettings)> {
        self.breaker.as_ref().zip(self.hub.settings.breaker.as_ref())
    }

    /// Whether its breaker would let a request through.
    pub(super) fn admits(&self, panic: bool, now: Instant) -> bool {
        self.breaker().is_none_or(|(breaker, settings)| breaker.admits(settings, panic, now))
    }

    /// Sets right what the clock alone changes in its account, and tells those who wait of room that it gave back.
    pub(super) fn settle(&self, now: Instant) {
        if self.load.settle(now) {
            self.hub.capacity_freed.notify_waiters();
        }
        if let Some((breaker, settings)) = self.breaker() {
            breaker.settle(settings, now);
        }
    }

    /// Sets right its whole account, which others may be about to do.
    pub(super) fn reconcile(&self, now: Instant) {
        let live = self.live();
        self.load.account().mark(Entry::ASIDE, live.standing() != Standing::Online);
        drop(live);
        self.settle(now);
    }

    /// The number of its presence, if it may be given a request now.
    pub(super) fn presence(&self) -> Option<u64> {
        let state = self.state.load(Ordering::Acquire);
        Standing::from_state(state).is_candidate().then_some(state >> 8)
    }

    /// Fires when a presence is over.
    pub(super) fn gone(&self, presence: u64) -> Signal {
        let live = self.live.lock();
        if live.presence == presence {
            return live.gone.clone();
        }
        let over = Signal::new();
        over.fire();
        over
    }

    /// Whether this life is over for all but what it finishes.
    pub(super) fn is_over(&self) -> bool {
        let live = self.live();
        live.replaced || live.succeeded
    }

    /// What a session holds that belongs to it.
    pub(super) fn binding(&self) -> Binding {
        Binding { worker: self.id.clone(), life: self.life }
    }

    /// Whether a session that was bound here may still come back: a worker that cannot take a request just now keeps it.
    pub(super) fn keeps(&self, bound: &Binding) -> bool {
        self.life == bound.life && self.standing().is_online()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.load.account().close();
    }
}

// === impl Live ===

impl Live {
    fn standing(&self) -> Standing {
        let leaving = matches!(self.status, WorkerStatus::Draining | WorkerStatus::Offline) || self.phase == Phase::Draining;
        if self.offline.is_some() || self.replaced {
            Standing::Offline
        } else if self.drained.is_some() || self.deregistered.is_some() || leaving {
            Standing::Draining
        } else if self.unheard {
            Standing::Unheard
        } else if self.held.is_some() {
            Standing::Held
        } else if self.suspect || self.status == WorkerStatus::Degraded {
            Standing::Degraded
        } else {
            Standing::Online
        }
    }

    fn state(&self) -> u64 {
        self.presence << 8 | self.standing() as u64
    }

    /// Takes over what a registration says. Whether the models are others than before.
    pub(super) fn describe(&mut self, registration: &Registration) -> bool {
        self.status = registration.status;
        self.capacity = registration.capacity;
        self.hostname.clone_from(&registration.hostname);
        self.features.clone_from(&registration.features);
        let models = &registration.skills.available_models;
        let differs = !self.models.iter().map(|model| &**model).eq(models.iter().map(String::as_str));
        if differs {
            self.models = models.iter().map(|model| model.as_str().into()).collect();
        }
        differs
    }

    /// Takes over what a heartbeat says.
    pub(super) fn update(&mut self, heartbeat: &Heartbeat) {
        self.sequence = heartbeat.sequence;
        self.status = heartbeat.status;
        self.phase = heartbeat.phase;
        self.loaded.clone_from(&heartbeat.metrics.models_loaded);
        self.loading.clone_from(&heartbeat.loading_models);
        self.memory_used_gb = heartbeat.metrics.memory_used_gb;
        self.queue_depth = heartbeat.queue_depth;
        self.tokens_generated = heartbeat.tokens_generated;
    }

    /// Models that it turned out to serve. Whether one of them was not known.
    pub(super) fn serve_too(&mut self, models: &[String]) -> bool {
        let known = self.models.len();
        for model in models {
            if self.models.len() < MODELS_FROM_HEARTBEATS && !self.models.iter().any(|known| **known == **model) {
                self.models.push(model.as_str().into());
            }
        }
        self.models.len() > known
    }

    /// It gave a sign of life. After it had been offline, this is a new presence.
    pub(super) fn heard(&mut self, now: Instant) {
        self.last_seen = now;
        self.silent_since = now;
        self.unheard = false;
        self.suspect = false;
        self.held = self.held.filter(|until| now < *until);
        if self.offline.take().is_some() {
            self.presence += 1;
            self.gone = Signal::new();
        }
    }

    pub(super) fn model_names(&self) -> Vec<String> {
        self.models.iter().map(|model| model.to_string()).collect()
    }

    /// Memory that is not in use, in GB; nothing for a worker that does not say how much it has.
    pub(super) fn free_memory_gb(&self) -> f64 {
        (self.capacity.memory_gb - self.memory_used_gb).max(0.0)
    }
}

// === impl Standing ===

impl Standing {
    fn from_state(state: u64) -> Self {
        match state as u8 {
            0 => Self::Online,
            1 => Self::Degraded,
            2 => Self::Held,
            3 => Self::Unheard,
            4 => Self::Draining,
            _ => Self::Offline,
        }
    }

    /// Whether requests may go there.
    pub(super) fn is_candidate(self) -> bool {
        matches!(self, Self::Online | Self::Degraded | Self::Held)
    }

    /// Whether it is one of the online workers.
    pub(super) fn is_online(self) -> bool {
        matches!(self, Self::Online | Self::Degraded | Self::Held | Self::Unheard)
    }
}

fn feature_bits(features: &[Feature]) -> u8 {
    features.iter().fold(0, |bits, feature| {
        bits | match feature {
            Feature::Resume => 1,
            Feature::Cancel => 2,
            Feature::Batch => 4,
            Feature::Unknown => 0,
        }
    })
}
