//! The door of the room: membership comes in, leases go out.
//!
//! A selection reads the picture of the fleet without a lock, chooses, and then takes the place and the permit in one step
//! each; where a racing selection was quicker it chooses again. Locks are held for a few instructions, never while the
//! observer runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::breaker::{BreakerStats, CircuitState, Transition};
use super::dice::Dice;
use super::event::{Observer, RouterEvent};
use super::fleet::{Candidates, Fleet, Model};
use super::lease::{Choice, Lease};
use super::registry::{Effects, HeartbeatVerdict, Registered, Registry};
use super::sessions::{Binding, Sessions};
use super::settings::RouterSettings;
use super::snapshot::WorkerSnapshot;
use super::worker::{Carrier, Standing, Worker};
use super::{rendezvous, strategy};
use crate::wire::{Heartbeat, Registration, WorkerId};

/// What a worker is wanted for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// The model.
    pub model_id: &'a str,
    /// The conversation that the request belongs to.
    pub session_id: Option<&'a str>,
    /// Workers that failed this request.
    pub exclude: &'a [WorkerId],
    /// The worker that the caller wants, and no other; the rest is then only checked.
    pub worker_id: Option<&'a str>,
}

/// Why nobody was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody is online.
    NoWorkers,
    /// Nobody who is online, or not the worker that was named, serves the model.
    ModelNotFound,
    /// Workers serve the model, and every breaker refuses.
    NoHealthyWorkers {
        /// The soonest that one of them may admit a request.
        retry_after: Duration,
    },
    /// Of those who were not tried yet, nobody is admitted.
    AllTried {
        /// Online workers that serve the model.
        total: usize,
        /// Those of them that their breakers admit.
        healthy: usize,
        /// Workers that were tried.
        excluded: usize,
    },
    /// Somebody could serve the request once there is room; see [`Router::capacity_freed`].
    Full,
    /// The worker that was named is unknown, offline or draining.
    WorkerOffline,
    /// The breaker of the worker that was named is open.
    CircuitOpen {
        /// The soonest that it may admit a request.
        retry_after: Duration,
    },
}

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
        self.with_registry(|registry, effects| registry.heartbeat(heartbeat, foreign, now, effects))
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
        let mut reopened = false;
        for worker in self.fleet().workers.values() {
            let transition = worker.breaker.as_ref().and_then(|breaker| breaker.tick(now));
            reopened |= transition.is_some();
            self.tell_breaker(worker, transition);
        }
        if reopened {
            self.capacity_freed.notify_waiters();
        }
    }

    /// Chooses a worker and takes a place on it.
    ///
    /// # Errors
    /// The [`Refusal`] says why nobody was chosen, in this order: nobody online, nobody serves the model, everybody was
    /// tried (only with a non-empty `exclude`, and then before the others), every breaker refuses, everybody is full.
    pub fn select(self: &Arc<Self>, query: &Query<'_>, now: Instant) -> Result<Lease, Refusal> {
        if let Some(id) = query.worker_id {
            return self.select_named(id, query.model_id, now);
        }
        let session = query.session_id.filter(|_| self.settings.session_affinity);
        let bound = session.and_then(|session| self.sessions.lock().find(session, now));
        loop {
            let fleet = self.fleet();
            let model = fleet.model(query.model_id);
            let chosen = model.and_then(|model| Some((model, self.choose(model, query, session, bound.as_ref(), now)?)));
            let Some((model, (place, choice))) = chosen else {
                if self.is_current(&fleet) {
                    return Err(self.refusal(model, query.exclude, now));
                }
                continue;
            };
            if let Some(mut lease) = self.claim(&model.workers[place], choice, now) {
                if let Some(session) = session {
                    self.settle_session(session, bound, query.exclude, &mut lease, &fleet, now);
                }
                return Ok(lease);
            }
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

    pub(super) fn settings(&self) -> &RouterSettings {
        &self.settings
    }

    pub(super) fn dice(&self) -> &Dice {
        &self.dice
    }

    /// Tells the observer of a transition. Never called under a lock.
    pub(super) fn tell_breaker(&self, worker: &Worker, transition: Option<Transition>) {
        if let Some(Transition { from, to, reason }) = transition {
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

    fn tell_session(&self, from: &WorkerId, to: &Worker) {
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
    fn fleet(&self) -> Guard<Arc<Fleet>> {
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

    fn is_current(&self, fleet: &Fleet) -> bool {
        fleet.version == self.version.load(Ordering::Acquire)
    }

    /// The candidate that gets the request: the session's own, or by rendezvous, or by the strategy.
    fn choose(
        &self,
        model: &Model,
        query: &Query<'_>,
        session: Option<&str>,
        bound: Option<&Binding>,
        now: Instant,
    ) -> Option<(usize, Choice)> {
        [Standing::Online, Standing::Degraded].into_iter().find_map(|tier| {
            let Query { model_id, exclude, .. } = *query;
            let candidates = Candidates { model, model_id, exclude, tier, settings: &self.settings, now };
            let Some(session) = session else {
                return Some((strategy::pick(self.settings.strategy, &candidates, &self.dice)?, Choice::Strategy));
            };
            let own = bound.and_then(|bound| {
                let place = model.find(&bound.worker)?;
                (model.workers[place].serial == bound.serial && candidates.admits(place)).then_some(place)
            });
            if let Some(place) = own {
                return Some((place, Choice::Affinity));
            }
            let session = rendezvous::fnv(session);
            let scored = candidates.iter_from(0).map(|(place, worker)| (rendezvous::score(session, worker.seat), place));
            let (_, place) = scored.reduce(|best, next| if next.0 > best.0 { next } else { best })?;
            Some((place, Choice::Rendezvous))
        })
    }

    /// Takes a place and a permit; `None` when the worker cannot give them any more.
    fn claim(self: &Arc<Self>, worker: &Arc<Worker>, choice: Choice, now: Instant) -> Option<Lease> {
        if !worker.load.try_enter(now) {
            return None;
        }
        // From here on the lease gives the place back, whatever happens.
        let gone = worker.presence();
        let mut lease = Lease::new(self.clone(), worker.clone(), gone.clone().unwrap_or_default(), choice, now);
        gone?;
        if let (Some(breaker), Some(settings)) = (&worker.breaker, &self.settings.breaker) {
            let (permit, transition) = breaker.acquire(settings, now)?;
            lease.hold(permit);
            self.tell_breaker(worker, transition);
        }
        Some(lease)
    }

    /// Binds the session, or leaves it where it is: a worker that was only skipped keeps it, one that failed loses it with
    /// the first success elsewhere, one that is gone loses it now.
    fn settle_session(
        &self,
        session: &str,
        bound: Option<Binding>,
        exclude: &[WorkerId],
        lease: &mut Lease,
        fleet: &Fleet,
        now: Instant,
    ) {
        let taken = lease.worker().binding();
        match bound {
            Some(bound) if bound == taken => {}
            Some(bound) if exclude.contains(&bound.worker) => lease.moves_with_success(session, bound),
            Some(bound) if fleet.workers.get(&bound.worker).is_some_and(|worker| worker.keeps(&bound)) => {}
            bound => {
                self.sessions.lock().bind(session, taken, now);
                if let Some(bound) = bound {
                    self.tell_session(&bound.worker, lease.worker());
                }
            }
        }
    }

    fn select_named(self: &Arc<Self>, id: &str, model_id: &str, now: Instant) -> Result<Lease, Refusal> {
        let fleet = self.fleet();
        let Some(worker) = fleet.workers.get(id).filter(|worker| worker.standing().is_online()) else {
            return Err(Refusal::WorkerOffline);
        };
        if !worker.live().models.iter().any(|model| **model == *model_id) {
            return Err(Refusal::ModelNotFound);
        }
        if let Some(lease) = self.claim(worker, Choice::Named, now) {
            return Ok(lease);
        }
        match (&worker.breaker, &self.settings.breaker) {
            _ if !worker.standing().is_online() => Err(Refusal::WorkerOffline),
            (Some(breaker), Some(settings)) if !breaker.admits(settings, now) => {
                Err(Refusal::CircuitOpen { retry_after: breaker.retry_after(now).unwrap_or(settings.open_for) })
            }
            _ => Err(Refusal::Full),
        }
    }

    fn refusal(&self, model: Option<&Model>, exclude: &[WorkerId], now: Instant) -> Refusal {
        let (mut total, mut healthy, mut untried) = (0, 0, 0);
        let mut soonest = None;
        let serving = model.map_or(&[][..], |model| &model.workers);
        for worker in serving.iter().filter(|worker| worker.standing().is_online()) {
            total += 1;
            match (&worker.breaker, &self.settings.breaker) {
                (Some(breaker), Some(settings)) if !breaker.admits(settings, now) => {
                    let wait = breaker.retry_after(now).unwrap_or(settings.open_for);
                    soonest = Some(soonest.map_or(wait, |soonest: Duration| soonest.min(wait)));
                }
                _ => {
                    healthy += 1;
                    untried += usize::from(!exclude.contains(&worker.id));
                }
            }
        }
        if untried > 0 {
            Refusal::Full
        } else if !exclude.is_empty() {
            Refusal::AllTried { total, healthy, excluded: exclude.len() }
        } else if let Some(retry_after) = soonest {
            Refusal::NoHealthyWorkers { retry_after }
        } else if self.online() == 0 {
            Refusal::NoWorkers
        } else {
            Refusal::ModelNotFound
        }
    }
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("settings", &self.settings).finish_non_exhaustive()
    }
}
