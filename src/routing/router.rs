//! The door of the room: membership comes in, and everybody may look. How leases go out is said in `selection`.
//!
//! Locks are held for a few instructions, never while the observer runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::breaker::{BreakerReason, BreakerStats, CircuitState, Transition};
use super::dice::Dice;
use super::event::{Observer, RouterEvent};
use super::fleet::Fleet;
use super::prefixes::{FORGOTTEN_AFTER, Held, MOST_PREFIXES, PrefixIndex};
use super::registry::{Effects, HeartbeatVerdict, Registered, Registry};
use super::sessions::{Binding, Sessions};
use super::settings::RouterSettings;
use super::snapshot::WorkerSnapshot;
use super::worker::{Carrier, Worker};
use crate::config::Strategy;
use crate::wire::{Heartbeat, MOST_CACHED_PREFIXES, PrefixHashes, Registration, WorkerId};

/// The deciding core: who is in the fleet, and who gets a request.
pub struct Router {
    settings: Arc<RouterSettings>,
    observer: Observer,
    dice: Dice,
    registry: Mutex<Registry>,
    /// That of the registry: a picture of another version is out of date.
    version: AtomicU64,
    fleet: ArcSwap<Fleet>,
    sessions: Mutex<Sessions>,
    /// Empty under every strategy but `prefix_aware`.
    prefixes: Mutex<PrefixIndex>,
    /// How often a failure rate opened a breaker, and how often that had been when none was open by it any more. Equal:
    /// none is.
    rate_openings: AtomicU64,
    rate_settled: AtomicU64,
    capacity_freed: Notify,
    membership: watch::Sender<usize>,
}

// === impl Router ===

impl Router {
    /// A router without workers. The seed decides every random choice.
    #[must_use]
    pub fn new(settings: RouterSettings, seed: u64, observer: Observer) -> Arc<Self> {
        let settings = Arc::new(settings);
        Arc::new(Self {
            observer,
            dice: Dice::new(seed),
            registry: Mutex::new(Registry::new(settings.clone())),
            version: AtomicU64::new(0),
            fleet: ArcSwap::default(),
            sessions: Mutex::new(Sessions::new(settings.session_ttl, settings.max_sessions)),
            prefixes: Mutex::new(PrefixIndex::new(MOST_PREFIXES, FORGOTTEN_AFTER)),
            rate_openings: AtomicU64::new(0),
            rate_settled: AtomicU64::new(0),
            capacity_freed: Notify::new(),
            membership: watch::Sender::new(0),
            settings,
        })
    }

    /// A worker says who it is and what it can do.
    pub fn register(&self, registration: &Registration, carrier: Carrier, now: Instant) -> Registered {
        self.with_registry(|registry, effects| registry.register(registration, carrier, now, effects))
    }

    /// A worker gives a sign of life. `is_ours` tells the requests of this controller from those of others; it is called
    /// without a lock.
    pub fn heartbeat(&self, heartbeat: &Heartbeat, is_ours: &dyn Fn(&str) -> bool, now: Instant) -> HeartbeatVerdict {
        let foreign = heartbeat.active_request_ids.as_ref().map(|ids| {
            let foreign = ids.iter().filter(|id| !is_ours(id)).count();
            u32::try_from(foreign).unwrap_or(u32::MAX)
        });
        let verdict = self.with_registry(|registry, effects| registry.heartbeat(heartbeat, foreign, now, effects));
        if verdict == HeartbeatVerdict::Taken && self.wants_prefixes() && !heartbeat.cached_prefixes.is_empty() {
            self.take_prefixes(heartbeat, now);
        }
        verdict
    }

    /// A worker wants nothing new. Its running requests finish; then, or after 60 s, it is forgotten.
    pub fn deregister(&self, worker: &WorkerId, now: Instant) {
        self.with_registry(|registry, effects| registry.deregister(worker, now, effects));
    }

    /// Forgets a worker at once; its `gone` tokens fire.
    pub fn remove(&self, worker: &WorkerId) {
        self.with_registry(|registry, effects| registry.remove(worker, effects));
    }

    /// Our own NATS connection is down: until [`Self::thaw`] nobody goes offline.
    pub fn freeze(&self, now: Instant) {
        self.registry.lock().freeze(now);
    }

    /// Our own NATS connection is back: workers behind it are no candidates until they have been heard from.
    pub fn thaw(&self, now: Instant) {
        self.with_registry(|registry, effects| registry.thaw(now, effects));
    }

    /// Does what is due by the clock: workers go offline or are forgotten, breakers become half-open, sessions expire. To
    /// be called every so often; nothing that [`Self::select`] decides waits for it but silence.
    pub fn expire(&self, now: Instant) {
        self.with_registry(|registry, effects| registry.expire(now, effects));
        self.sessions.lock().expire(now);
        self.prefixes.lock().expire(now);
        let mut reopened = false;
        let mut open_by_rate = false;
        let openings = self.rate_openings.load(Ordering::SeqCst);
        for worker in self.fleet().workers.values() {
            reopened |= worker.load.has_rested(now);
            let Some(breaker) = &worker.breaker else { continue };
            let transition = breaker.tick(now);
            open_by_rate |= breaker.opened_by_rate();
            reopened |= transition.is_some();
            self.tell_breaker(worker, transition);
        }
        if !open_by_rate {
            self.rate_settled.store(openings, Ordering::SeqCst);
        }
        if reopened {
            self.capacity_freed.notify_waiters();
        }
    }

    /// Notified, all who wait, when a request may find room that it did not find before. A waiter has to enable its
    /// `notified()` before it selects again, or it may miss the one that matters.
    #[must_use]
    pub fn capacity_freed(&self) -> &Notify {
        &self.capacity_freed
    }

    /// How many workers are online.
    #[must_use]
    pub fn online(&self) -> usize {
        *self.membership.borrow()
    }

    /// How many online workers serve a model.
    #[must_use]
    pub fn serving(&self, model: &str) -> usize {
        self.fleet().model(model).map_or(0, |model| model.workers.len())
    }

    /// The models that online workers serve, sorted.
    #[must_use]
    pub fn models(&self) -> Vec<String> {
        self.fleet().models()
    }

    /// Every known worker, by id.
    #[must_use]
    pub fn snapshot(&self, now: Instant) -> Vec<WorkerSnapshot> {
        self.fleet().workers.values().map(|worker| WorkerSnapshot::new(worker, now)).collect()
    }

    /// One worker.
    #[must_use]
    pub fn worker(&self, id: &str, now: Instant) -> Option<WorkerSnapshot> {
        self.fleet().workers.get(id).map(|worker| WorkerSnapshot::new(worker, now))
    }

    /// What the breaker of every known worker has seen, by id; empty where there are none.
    #[must_use]
    pub fn breaker_stats(&self, now: Instant) -> Vec<(WorkerId, BreakerStats)> {
        let fleet = self.fleet();
        let stats = fleet.workers.values();
        stats.filter_map(|worker| Some((worker.id.clone(), worker.breaker.as_ref()?.stats(now)))).collect()
    }

    /// Closes a breaker and forgets what it has seen. False: the worker is unknown, or there are no breakers.
    pub fn reset_breaker(&self, id: &str, now: Instant) -> bool {
        let fleet = self.fleet();
        let Some(worker) = fleet.workers.get(id) else { return false };
        let (Some(breaker), Some(settings)) = (&worker.breaker, &self.settings.breaker) else { return false };
        self.tell_breaker(worker, breaker.reset(settings, now));
        self.capacity_freed.notify_waiters();
        true
    }

    /// Opens a breaker until it is reset. False: the worker is unknown, or there are no breakers.
    pub fn force_open_breaker(&self, id: &str, now: Instant) -> bool {
        let fleet = self.fleet();
        let Some(worker) = fleet.workers.get(id) else { return false };
        let Some(breaker) = &worker.breaker else { return false };
        self.tell_breaker(worker, breaker.force_open(now));
        true
    }

    /// Gives this life of a worker nothing new; the worker is not told. What still runs after 60 s is cut off. False: the
    /// worker is unknown.
    pub fn drain(&self, id: &str, now: Instant) -> bool {
        self.with_registry(|registry, effects| registry.drain(id, now, effects))
    }

    /// The number of online workers, to wait on.
    #[must_use]
    pub fn membership(&self) -> watch::Receiver<usize> {
        self.membership.subscribe()
    }

    /// Whether [`Query::prompt`](super::Query::prompt) makes a difference: hashing a prompt is work.
    #[must_use]
    pub fn wants_prefixes(&self) -> bool {
        self.settings.strategy == Strategy::PrefixAware
    }

    /// Who most likely holds something of a prompt.
    pub(super) fn holders(&self, prompt: &PrefixHashes, now: Instant) -> Vec<Held> {
        self.prefixes.lock().find(prompt.hashes(), now)
    }

    /// A worker holds the prefixes with these hashes.
    pub(super) fn learn(&self, hashes: impl IntoIterator<Item = u64>, serial: u64, now: Instant) {
        self.prefixes.lock().learn(hashes, serial, now);
    }

    /// Learns what a heartbeat names. What it leaves out may still be there: it has room for some hashes only.
    fn take_prefixes(&self, heartbeat: &Heartbeat, now: Instant) {
        let fleet = self.fleet();
        let worker = fleet.workers.get(&heartbeat.worker_id);
        if let Some(worker) = worker.filter(|worker| *worker.incarnation == *heartbeat.incarnation) {
            let named = heartbeat.cached_prefixes.iter().take(MOST_CACHED_PREFIXES);
            self.learn(named.filter_map(|text| PrefixHashes::parse(text)), worker.serial, now);
        }
    }

    pub(super) fn settings(&self) -> &RouterSettings {
        &self.settings
    }

    /// Whether a breaker may be open by its failure rate.
    pub(super) fn may_panic(&self) -> bool {
        self.rate_openings.load(Ordering::SeqCst) != self.rate_settled.load(Ordering::SeqCst)
    }

    pub(super) fn sessions(&self) -> &Mutex<Sessions> {
        &self.sessions
    }

    pub(super) fn dice(&self) -> &Dice {
        &self.dice
    }

    /// Tells the observer of a transition. Never called under a lock.
    pub(super) fn tell_breaker(&self, worker: &Worker, transition: Option<Transition>) {
        if let Some(Transition { from, to, reason }) = transition {
            if reason == BreakerReason::FailureRate {
                self.rate_openings.fetch_add(1, Ordering::SeqCst);
            }
            (self.observer)(RouterEvent::BreakerChanged { worker_id: worker.id.clone(), from, to, reason });
            if to == CircuitState::Closed {
                self.capacity_freed.notify_waiters();
            }
        }
    }

    /// Gives a session to the worker that answered after its own had failed.
    pub(super) fn move_session(&self, session: &str, from: &Binding, to: &Worker, now: Instant) {
        {
            let mut sessions = self.sessions.lock();
            if sessions.find(session, now).is_some_and(|bound| bound != *from) {
                return;
            }
            sessions.bind(session, to.binding(), now);
        }
        self.tell_session(&from.worker, to);
    }

    pub(super) fn tell_session(&self, from: &WorkerId, to: &Worker) {
        if *from != to.id {
            (self.observer)(RouterEvent::SessionMoved { worker_id: to.id.clone(), previous: from.clone() });
        }
    }

    /// Changes membership, and then tells what followed.
    fn with_registry<T>(&self, change: impl FnOnce(&mut Registry, &mut Effects) -> T) -> T {
        let mut effects = Effects::default();
        let result = {
            let mut registry = self.registry.lock();
            let result = change(&mut registry, &mut effects);
            self.version.store(registry.version(), Ordering::Release);
            let online = registry.online();
            self.membership.send_if_modified(|known| std::mem::replace(known, online) != online);
            result
        };
        for gone in effects.gone {
            gone.cancel();
        }
        for event in effects.events {
            (self.observer)(event);
        }
        if effects.room {
            self.capacity_freed.notify_waiters();
        }
        result
    }

    /// The picture of the fleet, made anew when membership has changed since the last one.
    pub(super) fn fleet(&self) -> Guard<Arc<Fleet>> {
        let fleet = self.fleet.load();
        if self.is_current(&fleet) {
            return fleet;
        }
        let registry = self.registry.lock();
        let before = self.fleet.load();
        if before.version != registry.version() {
            self.fleet.store(Arc::new(Fleet::new(registry.version(), registry.workers(), &before)));
        }
        self.fleet.load()
    }

    pub(super) fn is_current(&self, fleet: &Fleet) -> bool {
        fleet.version == self.version.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("settings", &self.settings).finish_non_exhaustive()
    }
}
