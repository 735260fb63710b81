//! Who gets a request, or why nobody does.
//!
//! A selection reads the picture of the fleet without a lock, chooses, and then takes the place and the permit in one step
//! each; where a racing selection was quicker it chooses again.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::fleet::{Candidates, Fleet, Model, WarmUp};
use super::hub::Hub;
use super::lease::{Choice, Lease};
use super::router::Router;
use super::sessions::Binding;
use super::strategy::Caches;
use super::worker::{Carrier, Standing, Worker};
use super::{rendezvous, strategy};
use crate::wire::{PrefixHashes, WorkerId};

/// What a worker is wanted for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// The model.
    pub model_id: &'a str,
    /// The conversation that the request belongs to.
    pub session_id: Option<&'a str>,
    /// Workers that failed this request.
    pub exclude: &'a [WorkerId],
    /// How workers have to be reached, where that matters; others are as if they did not serve the model.
    pub carrier: Option<Carrier>,
    /// Workers that cannot answer such a request: likewise.
    pub unable: &'a [WorkerId],
    /// The worker that the caller wants, and no other; the rest is then only checked.
    pub worker_id: Option<&'a str>,
    /// What the prompt begins with; only `prefix_aware` looks at it. See [`Router::wants_prefixes`].
    pub prompt: Option<&'a PrefixHashes>,
}

/// What a request wants, as far as others may want the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// Anybody who serves this model.
    Model(&'a str),
    /// This worker.
    Worker(&'a str),
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

/// Why a worker that is online and serves the model was no candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeftOut {
    /// It failed this request.
    Tried,
    /// It is reached as the request wants it, and cannot answer it all the same.
    Unable,
    /// Its breaker refuses.
    CircuitOpen,
    /// It has no room.
    Full,
    /// It calls itself degraded, has missed heartbeats, or comes and goes, and somebody better was free.
    Degraded,
    /// It has not been heard from since our own connection was down.
    Unheard,
    /// One of a higher priority was free.
    LowerPriority,
}

/// Slow start is for models with at least so many online workers.
const WARM_UP_FROM: usize = 4;

// === impl Router ===

impl Router {
    /// Chooses a worker and takes a place on it.
    ///
    /// # Errors
    /// The [`Refusal`] says why nobody was chosen, in this order: nobody online, nobody serves the model, everybody was
    /// tried (only with a non-empty `exclude`, and then before the others), every breaker refuses, everybody is full.
    pub fn select(&self, query: &Query<'_>, now: Instant) -> Result<Lease, Refusal> {
        if let Some(id) = query.worker_id {
            let mut lease = self.select_named(id, query, now)?;
            self.will_teach(&mut lease, query);
            return Ok(lease);
        }
        let hub = self.hub();
        let session = query.session_id.filter(|_| hub.settings.session_affinity);
        let bound = session.and_then(|session| hub.sessions.lock().find(session, now));
        let prompt = query.prompt.filter(|_| self.wants_prefixes());
        let held = prompt.filter(|_| session.is_none()).map(|prompt| hub.prefixes.lock().find(prompt.hashes(), now));
        let caches = prompt.zip(held.as_deref()).map(|(prompt, held)| Caches { prompt, held });
        loop {
            let fleet = self.fleet_at(now);
            let model = fleet.model(query.model_id);
            let panic = model.is_some_and(|model| hub.panics(&fleet, model));
            let chosen = model.and_then(|model| {
                let candidates =
                    Candidates { fleet: &fleet, model, query, tier: Standing::Online, priority: None, panic, warm_up: None, now };
                Some((model, self.choose(candidates, session, bound.as_ref(), caches)?))
            });
            let Some((model, (place, choice))) = chosen else {
                let refusal = || self.refusal(model, query, panic, now);
                let settled = match refusal() {
                    Refusal::NoWorkers | Refusal::ModelNotFound => self.settled(&fleet, refusal),
                    // The marks in the ledger follow what they mark, and may be a moment behind.
                    Refusal::Full if model.is_some_and(|model| is_anybody_free(model, query, panic, now)) => {
                        fleet.workers.values().for_each(|worker| worker.reconcile(now));
                        None
                    }
                    refusal => self.is_current(&fleet).then_some(refusal),
                };
                match settled {
                    Some(refusal) => return Err(refusal),
                    None => continue,
                }
            };
            if let Some(mut lease) = claim(&model.workers[place], choice, panic, now) {
                if let Some(session) = session {
                    self.settle_session(session, bound, query, &mut lease, &fleet, now);
                }
                self.will_teach(&mut lease, query);
                return Ok(lease);
            }
        }
    }

    /// Whether a worker may be given to either of two requests.
    #[must_use]
    pub fn is_shared(&self, one: Wanted<'_>, other: Wanted<'_>) -> bool {
        let fleet = self.fleet();
        let of = |model| fleet.model(model).map_or(&[][..], |model| &model.workers);
        let serves = |worker: &str, model| of(model).iter().any(|serving| serving.id.as_str() == worker);
        match (one, other) {
            (Wanted::Worker(one), Wanted::Worker(other)) => one == other,
            (Wanted::Worker(worker), Wanted::Model(model)) | (Wanted::Model(model), Wanted::Worker(worker)) => {
                serves(worker, model)
            }
            // Both are sorted by id.
            (Wanted::Model(one), Wanted::Model(other)) => {
                let (mut ones, mut others) = (of(one).iter().peekable(), of(other).iter().peekable());
                while let (Some(one), Some(other)) = (ones.peek(), others.peek()) {
                    match one.id.cmp(&other.id) {
                        Ordering::Less => drop(ones.next()),
                        Ordering::Greater => drop(others.next()),
                        Ordering::Equal => return true,
                    }
                }
                false
            }
        }
    }

    /// Whether somebody serves the model, is admitted by its breaker, and was not tried: one to be asked, now or when it has
    /// room.
    #[must_use]
    pub fn has_untried(&self, query: &Query<'_>, now: Instant) -> bool {
        let fleet = self.fleet_at(now);
        fleet.model(query.model_id).is_some_and(|model| {
            let panic = self.hub().panics(&fleet, model);
            let may = |worker: &Worker| worker.standing().is_online() && worker.admits(panic, now);
            model.workers.iter().any(|worker| may(worker) && query.may_ask(worker))
        })
    }

    /// Who is no candidate for a query, and why; see also [`Lease::left_out`].
    #[must_use]
    pub fn left_out(&self, query: &Query<'_>, now: Instant) -> Vec<(WorkerId, LeftOut)> {
        // A picture of now, which the hub has from there.
        let _fleet = self.fleet_at(now);
        self.hub().left_out(query, None, now)
    }

    /// The candidate that gets the request: the session's own, or by rendezvous, or by the strategy. Those of a tier, and in it
    /// those of a priority, come into question when nobody of the ones before has room.
    fn choose(
        &self,
        candidates: Candidates<'_>,
        session: Option<&str>,
        bound: Option<&Binding>,
        caches: Option<Caches<'_>>,
    ) -> Option<(usize, Choice)> {
        [Standing::Online, Standing::Degraded, Standing::Held].into_iter().find_map(|tier| {
            let candidates = Candidates { tier, ..candidates };
            let own = bound.and_then(|bound| candidates.model.find(bound.life)).filter(|&place| candidates.admits(place));
            if let Some(place) = own {
                return Some((place, Choice::Affinity));
            }
            let pick = |candidates: Candidates<'_>| match session {
                Some(session) => Some((candidates.highest_score(rendezvous::fnv(session))?, Choice::Rendezvous)),
                None => self.choose_by_strategy(candidates, caches),
            };
            match &*candidates.model.priorities {
                [] => pick(candidates),
                priorities => priorities.iter().find_map(|&priority| pick(Candidates { priority: Some(priority), ..candidates })),
            }
        })
    }

    fn choose_by_strategy(&self, candidates: Candidates<'_>, caches: Option<Caches<'_>>) -> Option<(usize, Choice)> {
        let Hub { settings, dice, .. } = self.hub();
        let pick = |candidates| strategy::pick(settings.strategy, &candidates, caches, dice);
        let length = settings.slow_start.filter(|_| candidates.model.workers.len() >= WARM_UP_FROM);
        let warm_up = length.map(|length| WarmUp { length, draw: dice.roll().u64(..) });
        // Where nobody is warm enough, all are candidates.
        warm_up.and_then(|warm_up| pick(Candidates { warm_up: Some(warm_up), ..candidates })).or_else(|| pick(candidates))
    }

    /// What the lease's worker answers, it will hold in its cache.
    fn will_teach(&self, lease: &mut Lease, query: &Query<'_>) {
        if let Some(prompt) = query.prompt.filter(|_| self.wants_prefixes()) {
            lease.teaches(prompt);
        }
    }

    /// Binds the session, or leaves it where it is: a worker that was only skipped keeps it, one that failed, or cannot answer, loses it with
    /// the first success elsewhere, one that is gone loses it now.
    fn settle_session(
        &self,
        session: &str,
        bound: Option<Binding>,
        query: &Query<'_>,
        lease: &mut Lease,
        fleet: &Fleet,
        now: Instant,
    ) {
        match bound {
            Some(bound) if bound.life == lease.worker().life => {}
            Some(bound) if query.exclude.contains(&bound.worker) || query.unable.contains(&bound.worker) => {
                lease.moves_with_success(session, bound);
            }
            Some(bound) if fleet.workers.get(&bound.worker).is_some_and(|worker| worker.keeps(&bound)) => {}
            bound => {
                self.hub().sessions.lock().bind(session, lease.worker().binding(), now);
                if let Some(bound) = bound {
                    self.hub().tell_session(&bound.worker, lease.worker());
                }
            }
        }
    }

    fn select_named(&self, id: &str, query: &Query<'_>, now: Instant) -> Result<Lease, Refusal> {
        let fleet = self.fleet_at(now);
        let Some(worker) = fleet.workers.get(id).filter(|worker| worker.standing().is_online()) else {
            return Err(Refusal::WorkerOffline);
        };
        if !query.is_for(worker) || !worker.live().models.iter().any(|model| **model == *query.model_id) {
            return Err(Refusal::ModelNotFound);
        }
        if let Some(lease) = claim(worker, Choice::Named, false, now) {
            return Ok(lease);
        }
        match worker.breaker() {
            _ if !worker.standing().is_online() => Err(Refusal::WorkerOffline),
            Some((breaker, settings)) if !breaker.admits(settings, false, now) => {
                Err(Refusal::CircuitOpen { retry_after: breaker.retry_after(now).unwrap_or(settings.open_for) })
            }
            _ => Err(Refusal::Full),
        }
    }

    fn refusal(&self, model: Option<&Model>, query: &Query<'_>, panic: bool, now: Instant) -> Refusal {
        let (mut total, mut healthy, mut untried) = (0, 0, 0);
        let mut soonest = None;
        let serving = model.map_or(&[][..], |model| &model.workers);
        let may_serve = |worker: &&Arc<Worker>| worker.standing().is_online() && query.is_for(worker);
        for worker in serving.iter().filter(may_serve) {
            total += 1;
            match worker.breaker() {
                Some((breaker, settings)) if !breaker.admits(settings, panic, now) => {
                    let wait = breaker.retry_after(now).unwrap_or(settings.open_for);
                    soonest = Some(soonest.map_or(wait, |soonest: Duration| soonest.min(wait)));
                }
                _ => {
                    healthy += 1;
                    untried += usize::from(!query.exclude.contains(&worker.id));
                }
            }
        }
        if untried > 0 {
            Refusal::Full
        } else if !query.exclude.is_empty() {
            Refusal::AllTried { total, healthy, excluded: query.exclude.len() }
        } else if let Some(retry_after) = soonest {
            Refusal::NoHealthyWorkers { retry_after }
        } else if self.online() == 0 {
            Refusal::NoWorkers
        } else {
            Refusal::ModelNotFound
        }
    }
}

/// Whether one of a model's workers would take a request, asked itself.
fn is_anybody_free(model: &Model, query: &Query<'_>, panic: bool, now: Instant) -> bool {
    let is_free = |worker: &Worker| worker.presence().is_some() && worker.load.has_room(now) && worker.admits(panic, now);
    model.workers.iter().any(|worker| is_free(worker) && query.may_ask(worker))
}

// === impl Query ===

impl Query<'_> {
    /// Whether a worker that serves the model can answer.
    fn is_for(&self, worker: &Worker) -> bool {
        self.carrier.is_none_or(|carrier| worker.carrier == carrier) && !self.unable.contains(&worker.id)
    }

    /// Whether it comes into question.
    pub(super) fn may_ask(&self, worker: &Worker) -> bool {
        !self.exclude.contains(&worker.id) && self.is_for(worker)
    }
}

// === impl Hub ===

impl Hub {
    /// Whether so few of a model's workers are admitted that the failure rate keeps nobody out any more.
    fn panics(&self, fleet: &Fleet, model: &Model) -> bool {
        let breakers = self.settings.breaker.as_ref().filter(|_| self.may_panic());
        let share = |part: usize| part as f64 / model.workers.len() as f64;
        breakers.is_some_and(|breakers| share(model.workers.len().saturating_sub(model.admitted(fleet))) > breakers.max_open)
    }

    /// Who was no candidate beside the chosen worker, if one was, and why, as it looks now.
    pub(super) fn left_out(&self, query: &Query<'_>, chosen: Option<&Worker>, now: Instant) -> Vec<(WorkerId, LeftOut)> {
        let fleet = self.fleet.load();
        self.settle(now);
        let Some(model) = fleet.model(query.model_id) else { return Vec::new() };
        let panic = self.panics(&fleet, model);
        let is_chosen = |worker: &Worker| chosen.is_some_and(|chosen| chosen.life == worker.life);
        // Mostly nobody is left out, and the ledger says so without asking each of thousands.
        let told_by_marks = query.exclude.is_empty() && query.unable.is_empty() && model.priorities.is_empty();
        let is_wanted = |worker: &Worker| query.carrier.is_none_or(|carrier| worker.carrier == carrier);
        let (some, all) = match told_by_marks {
            true => (Some(model.marked(&fleet)), None),
            false => (None, Some(model.workers.iter())),
        };
        let those = some.into_iter().flatten().chain(all.into_iter().flatten());
        those
            .filter(|worker| !is_chosen(worker) && is_wanted(worker))
            .filter_map(|worker| {
                let why = match worker.standing() {
                    Standing::Offline | Standing::Draining => return None,
                    Standing::Unheard => LeftOut::Unheard,
                    _ if query.unable.contains(&worker.id) => LeftOut::Unable,
                    _ if query.exclude.contains(&worker.id) => LeftOut::Tried,
                    _ if !worker.admits(panic, now) => LeftOut::CircuitOpen,
                    _ if !worker.load.has_room(now) => LeftOut::Full,
                    standing if chosen.is_some_and(|chosen| standing > chosen.standing()) => LeftOut::Degraded,
                    _ if chosen.is_some_and(|chosen| worker.priority < chosen.priority) => LeftOut::LowerPriority,
                    _ => return None,
                };
                Some((worker.id.clone(), why))
            })
            .collect()
    }
}

/// Takes a place and a permit; `None` when the worker cannot give them any more.
fn claim(worker: &Arc<Worker>, choice: Choice, panic: bool, now: Instant) -> Option<Lease> {
    // Whoever cannot be had is not entered: giving the place back would wake those who wait, again and again.
    worker.presence()?;
    if !worker.load.try_enter(now) {
        return None;
    }
    let Some(presence) = worker.presence() else {
        // It may be back before the place is.
        if worker.load.leave() {
            worker.hub.capacity_freed.notify_waiters();
        }
        return None;
    };
    // From here on the lease gives the place back, whatever happens.
    let mut lease = Lease::new(worker.clone(), presence, choice, now);
    if let Some((breaker, settings)) = worker.breaker() {
        let (permit, transition) = breaker.acquire(settings, panic, now)?;
        lease.hold(permit);
        worker.hub.tell_breaker(worker, transition);
    }
    Some(lease)
}

// === impl LeftOut ===

impl LeftOut {
    /// The reason as it is written in metadata and logs: `circuit_open`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tried => "tried",
            Self::Unable => "unable",
            Self::CircuitOpen => "circuit_open",
            Self::Full => "full",
            Self::Degraded => "degraded",
            Self::Unheard => "unheard",
            Self::LowerPriority => "lower_priority",
        }
    }
}
