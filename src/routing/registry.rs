//! Who is in the fleet: incarnations, signs of life, silence.
//!
//! A worker is one (id, incarnation); a later registration takes the place of an earlier one. Incarnations that were
//! superseded or deregistered are remembered, sixteen for each id, and what they say is ignored. Liveness is judged by the
//! injected clock alone. Everything here runs under the router's lock; what has to be told is gathered in [`Effects`] and
//! told without it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::event::RouterEvent;
use super::history::{Departed, History};
use super::hub::Hub;
use super::worker::{Carrier, Live, Standing, Worker};
use crate::signal::Signal;
use crate::wire::{Heartbeat, Registration, Skills, WorkerId};

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// The worker was not known.
    New,
    /// This incarnation was known; what it says of itself has been taken over.
    Renewed,
    /// It took the place of another incarnation.
    Replaced,
    /// Nothing.
    Ignored(IgnoredBecause),
}

/// Why a registration was ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IgnoredBecause {
    /// A later incarnation has taken its place.
    Superseded,
    /// The incarnation has deregistered.
    Deregistered,
    /// There are `maxWorkers` already.
    FleetFull,
}

/// What became of a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeartbeatVerdict {
    /// It was taken.
    Taken,
    /// Nobody knows this incarnation: the worker has to register.
    Unknown,
    /// It says nothing new: a superseded or deregistered incarnation, an older sequence, or no room in the fleet.
    Ignored,
}

/// What has to be told once the lock is free.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) events: Vec<RouterEvent>,
    /// Presences that are over.
    pub(super) gone: Vec<Signal>,
    /// Requests that wait may find room, or that nobody is left to wait for.
    pub(super) look_again: bool,
}

#[derive(Debug)]
pub(super) struct Registry {
    hub: Arc<Hub>,
    members: BTreeMap<WorkerId, Member>,
    departed: Departed,
    /// Deregistered workers that were replaced before their last request ended.
    leaving: Vec<Arc<Worker>>,
    frozen: Option<Instant>,
    serial: u64,
    version: u64,
    online: usize,
}

#[derive(Debug)]
struct Member {
    worker: Arc<Worker>,
    history: History,
}

/// The running requests of a draining worker have so long to finish.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// A worker that was silent for so many heartbeats has missed two, and stands behind the others.
const MISSED_AFTER: f64 = 2.5;
/// A worker that has been offline for so many times the offline timeout is forgotten.
const FORGOTTEN_AFTER: u32 = 20;
/// A report is ignored when it is older than so many heartbeats.
const REPORT_LIFETIME: u32 = 3;

// === impl Registry ===

impl Registry {
    pub(super) fn new(hub: Arc<Hub>) -> Self {
        Self {
            hub,
            members: BTreeMap::new(),
            departed: Departed::default(),
            leaving: Vec::new(),
            frozen: None,
            serial: 0,
            version: 0,
            online: 0,
        }
    }

    /// Grows with every change that selections have to see.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn online(&self) -> usize {
        self.online
    }

    /// Everybody, by id.
    pub(super) fn workers(&self) -> BTreeMap<WorkerId, Arc<Worker>> {
        self.members.iter().map(|(id, member)| (id.clone(), member.worker.clone())).collect()
    }

    pub(super) fn find(&self, id: &str) -> Option<&Arc<Worker>> {
        self.members.get(id).map(|member| &member.worker)
    }

    pub(super) fn register(
        &mut self,
        registration: &Registration,
        carrier: Carrier,
        now: Instant,
        effects: &mut Effects,
    ) -> Registered {
        let (id, incarnation) = (&registration.worker_id, registration.incarnation.as_str());
        let Some(member) = self.members.get(id) else {
            if self.departed.remembers(id, incarnation) {
                return Registered::Ignored(IgnoredBecause::Deregistered);
            }
            if self.members.len() >= self.hub.settings.max_workers {
                return Registered::Ignored(IgnoredBecause::FleetFull);
            }
            let known = self.departed.take(id);
            let is_back = known.is_some();
            self.admit(registration, carrier, known.unwrap_or_default(), is_back, now);
            effects.events.push(registered(&self.members[id].worker));
            effects.look_again = true;
            return Registered::New;
        };
        if member.history.contains(incarnation) {
            return Registered::Ignored(IgnoredBecause::Superseded);
        }
        // A worker without incarnations registers at its start only: it is always another life.
        if incarnation.is_empty() || *member.worker.incarnation != *incarnation {
            return self.replace(registration, carrier, now, effects);
        }
        if member.worker.live().deregistered.is_some() {
            return Registered::Ignored(IgnoredBecause::Deregistered);
        }
        let worker = member.worker.clone();
        let differs = self.hear(&worker, now, effects, |live| live.describe(registration));
        self.version += u64::from(differs);
        effects.look_again = true;
        Registered::Renewed
    }

    pub(super) fn heartbeat(
        &mut self,
        heartbeat: &Heartbeat,
        foreign: Option<u32>,
        now: Instant,
        effects: &mut Effects,
    ) -> HeartbeatVerdict {
        let (id, incarnation) = (&heartbeat.worker_id, heartbeat.incarnation.as_str());
        if !self.members.contains_key(id) {
            if self.departed.remembers(id, incarnation) || self.members.len() >= self.hub.settings.max_workers {
                return HeartbeatVerdict::Ignored;
            }
            if !incarnation.is_empty() {
                return HeartbeatVerdict::Unknown;
            }
            self.register(&older_registration(heartbeat), Carrier::Nats, now, effects);
        }
        let member = &self.members[id];
        let worker = member.worker.clone();
        if *worker.incarnation != *incarnation {
            let over = incarnation.is_empty() || member.history.contains(incarnation);
            return if over { HeartbeatVerdict::Ignored } else { HeartbeatVerdict::Unknown };
        }
        {
            let mut live = worker.live();
            if heartbeat.sequence < live.sequence && !incarnation.is_empty() {
                return HeartbeatVerdict::Ignored;
            }
            if live.deregistered.is_some() {
                // Still a sign of life for the requests that it finishes.
                live.last_seen = now;
                live.silent_since = now;
                return HeartbeatVerdict::Ignored;
            }
        }
        let before = worker.load.total(now);
        let own = worker.load.own();
        let foreign = foreign.unwrap_or_else(|| heartbeat.metrics.active_requests.saturating_sub(own));
        worker.load.report_foreign(foreign, self.hub.settings.heartbeat_interval * REPORT_LIFETIME, now);
        effects.look_again |= worker.load.total(now) < before;
        let is_more = self.hear(&worker, now, effects, |live| {
            live.update(heartbeat);
            // It registers at its start only, if we heard it at all: what it has loaded since, it serves.
            worker.legacy && live.serve_too(&heartbeat.metrics.models_loaded)
        });
        self.version += u64::from(is_more);
        effects.look_again |= is_more;
        HeartbeatVerdict::Taken
    }

    pub(super) fn deregister(&mut self, id: &str, now: Instant, effects: &mut Effects) {
        if let Some(member) = self.members.get(id) {
            let worker = member.worker.clone();
            self.change(&worker, effects, |live| live.deregistered = live.deregistered.or(Some(now)));
        }
    }

    pub(super) fn drain(&mut self, id: &str, now: Instant, effects: &mut Effects) -> bool {
        let Some(worker) = self.members.get(id).map(|member| member.worker.clone()) else { return false };
        self.change(&worker, effects, |live| live.drained = live.drained.or(Some(now)));
        true
    }

    /// This life of a worker seems to be over: nobody listens for it, and it gets nothing new. What it has goes on until it has
    /// been silent for as long as others may be: one look may be refused while connections still serve. Only of a worker that is looked at can
    /// it be known; one on NATS may have the same name, and those of the older dialect have empty incarnations.
    pub(super) fn lost(&mut self, id: &str, incarnation: &str, now: Instant, effects: &mut Effects) {
        let Some(worker) = self.members.get(id).map(|member| member.worker.clone()) else { return };
        if incarnation.is_empty() || worker.carrier != Carrier::Http {
            return;
        }
        if *worker.incarnation == *incarnation && worker.live().offline.is_none() {
            self.change(&worker, effects, |live| live.offline = Some(now));
        }
    }

    /// Forgets a worker at once.
    pub(super) fn remove(&mut self, id: &str, effects: &mut Effects) {
        let Some((id, mut member)) = self.members.remove_entry(id) else { return };
        self.leave(&member.worker, effects);
        let (deregistered, last_seen) = {
            let live = member.worker.live();
            (live.deregistered.is_some(), live.last_seen)
        };
        if deregistered {
            member.history.push(&member.worker.incarnation);
        }
        effects.events.push(RouterEvent::WorkerRemoved { worker_id: id.clone() });
        self.departed.insert(id, member.history, self.hub.settings.max_workers, last_seen);
    }

    /// Our own connection is down: silence says nothing.
    pub(super) fn freeze(&mut self, now: Instant) {
        self.frozen = self.frozen.or(Some(now));
    }

    /// Our own connection is back: whoever is reached through it has to be heard from first.
    pub(super) fn thaw(&mut self, now: Instant, effects: &mut Effects) {
        let Some(frozen) = self.frozen.take() else { return };
        let lost = now.saturating_duration_since(frozen);
        let workers: Vec<_> = self.members.values().map(|member| &member.worker).chain(&self.leaving).cloned().collect();
        for worker in workers.iter().filter(|worker| worker.carrier == Carrier::Nats) {
            self.change(worker, effects, |live| {
                live.unheard = true;
                live.silent_since = now;
                live.deregistered = live.deregistered.map(|at| at + lost);
                live.offline = live.offline.map(|at| at + lost);
            });
        }
    }

    /// Does what is due by the clock: silent workers go offline, those who left are forgotten.
    pub(super) fn expire(&mut self, now: Instant, effects: &mut Effects) {
        let is_frozen = self.frozen.is_some();
        if !is_frozen {
            self.departed.expire(now);
        }
        let timeout = self.hub.settings.worker_offline_timeout;
        let missed = self.hub.settings.heartbeat_interval.mul_f64(MISSED_AFTER);
        let mut silent = Vec::new();
        let mut suspect = Vec::new();
        let mut over = Vec::new();
        let mut rested = Vec::new();
        // Whoever is not reached through the connection that is down is judged all the same.
        let judged = self.members.values().filter(|member| !is_frozen || member.worker.carrier == Carrier::Http);
        for Member { worker, .. } in judged {
            let live = worker.live();
            let silence = now.saturating_duration_since(live.silent_since);
            if live.held.is_some_and(|until| now >= until) {
                rested.push(worker.clone());
            }
            if let Some(at) = live.deregistered {
                let late = now.saturating_duration_since(at) >= DRAIN_LIMIT;
                // One without incarnations would come back with its next heartbeat: it is watched until it is silent.
                if (late || worker.load.own() == 0) && (!worker.legacy || silence >= timeout) {
                    over.push(worker.id.clone());
                } else if late {
                    effects.gone.push(live.gone.clone());
                }
            } else if let Some(at) = live.offline {
                if now.saturating_duration_since(at) >= timeout * FORGOTTEN_AFTER {
                    over.push(worker.id.clone());
                } else if silence >= timeout {
                    effects.gone.push(live.gone.clone());
                }
            } else if worker.carrier != Carrier::Local && silence >= timeout {
                silent.push(worker.clone());
            } else if worker.carrier != Carrier::Local && silence >= missed && !live.suspect {
                suspect.push(worker.clone());
            } else if live.drained.is_some_and(|at| now.saturating_duration_since(at) >= DRAIN_LIMIT) {
                effects.gone.push(live.gone.clone());
            }
        }
        for worker in rested {
            self.change(&worker, effects, |live| live.held = None);
        }
        for worker in suspect {
            self.change(&worker, effects, |live| live.suspect = true);
        }
        for worker in silent {
            effects.gone.push(worker.live().gone.clone());
            self.change(&worker, effects, |live| live.offline = Some(now));
        }
        for id in over {
            self.remove(&id, effects);
        }
        if is_frozen {
            return;
        }
        self.leaving.retain(|worker| {
            let live = worker.live();
            let late = live.deregistered.is_none_or(|at| now.saturating_duration_since(at) >= DRAIN_LIMIT);
            if late {
                effects.gone.push(live.gone.clone());
            }
            !late && worker.load.own() > 0
        });
    }

    fn admit(&mut self, registration: &Registration, carrier: Carrier, mut history: History, is_back: bool, now: Instant) {
        self.serial += 1;
        let worker = Arc::new(Worker::new(registration, carrier, self.serial, self.hub.clone(), now));
        if is_back && carrier != Carrier::Local {
            let held = history.back(self.hub.settings.flap_hold_max, now);
            worker.change(|live| live.held = held);
        }
        self.online += usize::from(worker.standing().is_online());
        self.version += 1;
        self.members.insert(worker.id.clone(), Member { worker, history });
    }

    fn replace(&mut self, registration: &Registration, carrier: Carrier, now: Instant, effects: &mut Effects) -> Registered {
        let id = &registration.worker_id;
        let Some(Member { worker: old, mut history }) = self.members.remove(id) else {
            return Registered::Ignored(IgnoredBecause::Superseded);
        };
        let finishing = {
            let live = old.live();
            let is_lost = live.offline.is_some() && !live.gone.has_fired();
            (live.deregistered.is_some() || is_lost) && old.load.own() > 0
        };
        if finishing {
            self.version += 1;
            old.change(|live| {
                live.succeeded = true;
                live.deregistered.get_or_insert(now);
            });
            self.leaving.push(old.clone());
        } else {
            self.leave(&old, effects);
        }
        history.push(&old.incarnation);
        self.admit(registration, carrier, history, true, now);
        effects.look_again = true;
        effects.events.push(RouterEvent::WorkerReplaced {
            worker_id: id.clone(),
            incarnation: registration.incarnation.clone(),
            previous: old.incarnation.to_string(),
        });
        Registered::Replaced
    }

    /// A life of a worker is over.
    fn leave(&mut self, worker: &Worker, effects: &mut Effects) {
        let was_online = worker.standing().is_online();
        effects.gone.push(worker.change(|live| {
            live.replaced = true;
            live.gone.clone()
        }));
        self.online -= usize::from(was_online);
        self.version += 1;
        effects.look_again |= was_online;
    }

    /// A member gave a sign of life and said something.
    fn hear<T>(&mut self, worker: &Worker, now: Instant, effects: &mut Effects, take: impl FnOnce(&mut Live) -> T) -> T {
        let is_back = worker.live().offline.is_some();
        let history = self.members.get_mut(&worker.id).filter(|_| is_back).map(|member| &mut member.history);
        let held = history.and_then(|history| history.back(self.hub.settings.flap_hold_max, now));
        self.change(worker, effects, |live| {
            live.heard(now);
            live.held = held.or(live.held);
            take(live)
        })
    }

    /// Changes what is known of a member, and tells what follows from it.
    fn change<T>(&mut self, worker: &Worker, effects: &mut Effects, change: impl FnOnce(&mut Live) -> T) -> T {
        let before = worker.standing();
        let result = worker.change(change);
        let after = worker.standing();
        match (before.is_online(), after.is_online()) {
            (true, false) => self.online -= 1,
            (false, true) => self.online += 1,
            _ => {}
        }
        self.version += u64::from(before.is_online() != after.is_online());
        let is_new = !before.is_candidate() && after.is_candidate();
        effects.look_again |= is_new || before.is_online() != after.is_online();
        let worker_id = worker.id.clone();
        match (before, after) {
            (Standing::Offline, _) if after != Standing::Offline => effects.events.push(registered(worker)),
            (_, Standing::Offline) if before != Standing::Offline => {
                effects.events.push(RouterEvent::WorkerOffline { worker_id });
            }
            (_, Standing::Draining) if before.is_online() => {
                effects.events.push(RouterEvent::WorkerDraining { worker_id });
            }
            _ => {}
        }
        result
    }
}

fn registered(worker: &Worker) -> RouterEvent {
    RouterEvent::WorkerRegistered {
        worker_id: worker.id.clone(),
        incarnation: worker.incarnation.to_string(),
        models: worker.live().model_names(),
    }
}

/// The registration that a worker of the older dialect would have sent: it registers at its start only, and a controller
/// that started later knows it by its heartbeats.
fn older_registration(heartbeat: &Heartbeat) -> Registration {
    Registration {
        protocol: None,
        worker_id: heartbeat.worker_id.clone(),
        incarnation: String::new(),
        hostname: String::new(),
        ip: String::new(),
        port: 0,
        skills: Skills { available_models: heartbeat.metrics.models_loaded.clone(), ..Skills::default() },
        capacity: crate::wire::Capacity::default(),
        features: Vec::new(),
        status: heartbeat.status,
        timestamp: heartbeat.timestamp,
    }
}
