//! The door of the room: membership comes in, and everybody may look. How leases go out is said in `selection`.
//!
//! Locks are held for a few instructions, never while the observer runs.

use std::sync::Arc;

use arc_swap::Guard;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::breaker::BreakerStats;
use super::event::Observer;
use super::fleet::Fleet;
use super::hub::Hub;
use super::registry::{Effects, HeartbeatVerdict, Registered, Registry};
use super::settings::RouterSettings;
use super::snapshot::WorkerSnapshot;
use super::worker::{Carrier, Worker};
use crate::config::Strategy;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::wire::{Heartbeat, MOST_CACHED_PREFIXES, PrefixHashes, Registration, WorkerId};

/// The deciding core: who is in the fleet, and who gets a request.
pub struct Router {
    hub: Arc<Hub>,
    registry: Mutex<Registry>,
    /// That of the registry: a picture of another version is out of date.
    version: AtomicU64,
    membership: watch::Sender<usize>,
}

// === impl Router ===

impl Router {
    /// A router without workers. The seed decides every random choice.
    #[must_use]
    pub fn new(settings: RouterSettings, seed: u64, observer: Observer) -> Arc<Self> {
        let hub = Arc::new(Hub::new(settings, seed, observer));
        Arc::new(Self {
            registry: Mutex::new(Registry::new(hub.clone())),
            hub,
            version: AtomicU64::new(0),
            membership: watch::Sender::new(0),
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

    /// Nobody listens for this life of a worker: it gets nothing new from now on. Its `gone` tokens fire after the time that
    /// silence takes.
    pub fn lost(&self, worker: &WorkerId, incarnation: &str, now: Instant) {
        self.with_registry(|registry, effects| registry.lost(worker, incarnation, now, effects));
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
    /// be called every so often; nothing that [`Self::select`] decides waits for it but silence and the end of a
    /// flap hold.
    pub fn expire(&self, now: Instant) {
        self.with_registry(|registry, effects| registry.expire(now, effects));
        self.hub.sessions.lock().expire(now);
        self.hub.prefixes.lock().expire(now);
        let mut open_by_rate = false;
        let openings = self.hub.rate_openings();
        for worker in self.fleet().workers.values() {
            worker.settle(now);
            let Some((breaker, settings)) = worker.breaker() else { continue };
            let transition = breaker.tick(settings, now);
            open_by_rate |= breaker.opened_by_rate();
            self.hub.tell_breaker(worker, transition);
        }
        if !open_by_rate {
            self.hub.rates_settled(openings);
        }
    }

    /// Notified, all who wait, when a request may find room that it did not find before, or that nobody is left to wait for.
    /// A waiter has to enable its `notified()` before it selects again, or it may miss the one that matters.
    #[must_use]
    pub fn capacity_freed(&self) -> &Notify {
        &self.hub.capacity_freed
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
        self.find(id).map(|worker| WorkerSnapshot::new(&worker, now))
    }

    /// What the breaker of every known worker has seen, by id; empty where there are none.
    #[must_use]
    pub fn breaker_stats(&self, now: Instant) -> Vec<(WorkerId, BreakerStats)> {
        let fleet = self.fleet();
        let stats = fleet.workers.values();
        stats.filter_map(|worker| Some((worker.id.clone(), worker.breaker()?.0.stats(now)))).collect()
    }

    /// Closes a breaker and forgets what it has seen. False: the worker is unknown, or there are no breakers.
    pub fn reset_breaker(&self, id: &str, now: Instant) -> bool {
        let Some(worker) = self.find(id) else { return false };
        let Some((breaker, settings)) = worker.breaker() else { return false };
        self.hub.tell_breaker(&worker, breaker.reset(settings, now));
        true
    }

    /// Opens a breaker until it is reset. False: the worker is unknown, or there are no breakers.
    pub fn force_open_breaker(&self, id: &str, now: Instant) -> bool {
        let Some(worker) = self.find(id) else { return false };
        let Some((breaker, settings)) = worker.breaker() else { return false };
        self.hub.tell_breaker(&worker, breaker.force_open(settings, now));
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

    /// How many sessions are remembered.
    #[must_use]
    pub fn sessions_known(&self) -> usize {
        self.hub.sessions.lock().len()
    }

    /// How many beginnings of prompts are remembered; none under any strategy but `prefix_aware`.
    #[must_use]
    pub fn prefixes_known(&self) -> usize {
        self.hub.prefixes.lock().len()
    }

    /// Whether [`Query::prompt`](super::Query::prompt) makes a difference: hashing a prompt is work.
    #[must_use]
    pub fn wants_prefixes(&self) -> bool {
        self.hub.settings.strategy == Strategy::PrefixAware
    }

    /// Learns what a heartbeat names. What it leaves out may still be there: it has room for some hashes only.
    fn take_prefixes(&self, heartbeat: &Heartbeat, now: Instant) {
        if let Some(worker) = self.find(&heartbeat.worker_id).filter(|worker| *worker.incarnation == *heartbeat.incarnation) {
            let named = heartbeat.cached_prefixes.iter().take(MOST_CACHED_PREFIXES);
            self.hub.learn(named.filter_map(|text| PrefixHashes::parse(text)), &worker, now);
        }
    }

    /// One worker. It needs no new picture of the fleet, which a large fleet that gathers would pay for with each worker.
    fn find(&self, id: &str) -> Option<Arc<Worker>> {
        self.registry.lock().find(id).cloned()
    }

    pub(super) fn hub(&self) -> &Hub {
        &self.hub
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
            gone.fire();
        }
        for event in effects.events {
            (self.hub.observer)(event);
        }
        if effects.look_again {
            self.hub.capacity_freed.notify_waiters();
        }
        result
    }

    /// The picture of the fleet, made anew when membership has changed since the last one.
    pub(super) fn fleet(&self) -> Guard<Arc<Fleet>> {
        let fleet = self.hub.fleet.load();
        if self.is_current(&fleet) {
            return fleet;
        }
        let registry = self.registry.lock();
        let before = self.hub.fleet.load();
        if before.version != registry.version() {
            let fleet = Fleet::new(registry.version(), registry.workers(), &before, &self.hub.ledger);
            self.hub.fleet.store(Arc::new(fleet));
            // Whoever was not in the picture before was not set right with it.
            self.hub.ledger.hurry();
        }
        self.hub.fleet.load()
    }

    /// The same, with everybody's account as it has to be at this time.
    pub(super) fn fleet_at(&self, now: Instant) -> Guard<Arc<Fleet>> {
        let fleet = self.fleet();
        self.hub.settle(now);
        fleet
    }

    /// What is to be said of who is there, while no change of membership is half made; `None` when this picture is out of date.
    pub(super) fn settled<T>(&self, fleet: &Fleet, say: impl FnOnce() -> T) -> Option<T> {
        let registry = self.registry.lock();
        (fleet.version == registry.version()).then(say)
    }

    pub(super) fn is_current(&self, fleet: &Fleet) -> bool {
        fleet.version == self.version.load(Ordering::Acquire)
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        // Or the workers in it would keep each other, by the hub.
        self.hub.fleet.store(Arc::default());
    }
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("settings", &self.hub.settings).finish_non_exhaustive()
    }
}
