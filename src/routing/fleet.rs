//! The picture of the fleet that selections read: who is there, and who serves which model.
//!
//! It is swapped whole when membership changes, and holds no state of its own but whose turn it is.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use tokio::time::Instant;

use super::ledger::{Entry, Ledger, Page};
use super::rendezvous;
use super::selection::Query;
use super::worker::{Life, Standing, Worker};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::wire::WorkerId;

#[derive(Debug, Default)]
pub(super) struct Fleet {
    /// Of the registry that it was made from.
    pub(super) version: u64,
    /// Everybody who is known, offline ones too.
    pub(super) workers: BTreeMap<WorkerId, Arc<Worker>>,
    models: HashMap<Arc<str>, Model>,
    /// Where everybody has his account.
    pages: Box<[Arc<Page>]>,
}

/// A model and the online workers that serve it, at least one, by id. What selections read of all of them lies together.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) workers: Box<[Arc<Worker>]>,
    /// By place: the worker's share of rendezvous scores.
    seats: Box<[u64]>,
    /// By place: where in the pages its account lies.
    accounts: Box<[u32]>,
    /// By the number of an account: the place, or [`NOBODY`].
    places: Box<[u32]>,
    /// Where in the pages all their accounts lie, where nobody else's lies between them.
    together: Option<Range<usize>>,
    /// The priorities that its workers have, the highest first; empty where all have the same.
    pub(super) priorities: Box<[u8]>,
    /// The place after that of the last one chosen.
    turn: Arc<AtomicUsize>,
}

const NOBODY: u32 = u32::MAX;

/// The workers of a model that may take a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidates<'a> {
    pub(super) fleet: &'a Fleet,
    pub(super) model: &'a Model,
    pub(super) query: &'a Query<'a>,
    /// Those who stand so, and no others.
    pub(super) tier: Standing,
    /// Those of this priority, and no others; `None`: all.
    pub(super) priority: Option<u8>,
    /// Too few of the model's workers are admitted: those opened by their failure rate are candidates too.
    pub(super) panic: bool,
    /// New workers are candidates now and then only.
    pub(super) warm_up: Option<WarmUp>,
    pub(super) now: Instant,
}

/// More than anybody's.
const ANY_LOAD: u32 = Entry::MOST + 1;

/// Slow start: a new worker is a candidate with a probability that grows from [`COLD`] to 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct WarmUp {
    pub(super) length: Duration,
    /// A random number for this selection.
    pub(super) draw: u64,
}

/// The share of a worker that has just registered.
const COLD: f64 = 0.1;

// === impl Fleet ===

impl Fleet {
    /// A picture of these workers. Turns go on where they stood in the picture before.
    pub(super) fn new(version: u64, workers: BTreeMap<WorkerId, Arc<Worker>>, before: &Self, ledger: &Ledger) -> Self {
        let mut lists: HashMap<Arc<str>, Vec<Arc<Worker>>> = HashMap::default();
        for worker in workers.values().filter(|worker| worker.standing().is_online()) {
            for model in &worker.live().models {
                let list = lists.entry(model.clone()).or_default();
                if list.last().is_none_or(|last| !Arc::ptr_eq(last, worker)) {
                    list.push(worker.clone());
                }
            }
        }
        let models = lists.into_iter().map(|(id, workers)| {
            let turn = before.models.get(&id).map_or_else(Arc::default, |model| model.turn.clone());
            (id, Model::new(workers, turn, ledger))
        });
        Self { version, models: models.collect(), workers, pages: ledger.pages() }
    }

    pub(super) fn model(&self, id: &str) -> Option<&Model> {
        self.models.get(id)
    }

    /// The models that online workers serve, sorted.
    pub(super) fn models(&self) -> Vec<String> {
        let mut names: Vec<String> = self.models.keys().map(|name| name.to_string()).collect();
        names.sort_unstable();
        names
    }
}

// === impl Model ===

impl Model {
    fn new(workers: Vec<Arc<Worker>>, turn: Arc<AtomicUsize>, ledger: &Ledger) -> Self {
        let numbers = || workers.iter().map(|worker| worker.life.account);
        let mut places = vec![NOBODY; numbers().max().map_or(0, |last| last as usize + 1)];
        (0..).zip(numbers()).for_each(|(place, number)| places[number as usize] = place);
        let accounts: Box<[u32]> = numbers().map(|number| ledger.place(number) as u32).collect();
        let together = accounts.iter().min().zip(accounts.iter().max()).map(|(min, max)| *min as usize..*max as usize + 1);
        let priorities: BTreeSet<u8> = workers.iter().map(|worker| worker.priority).collect();
        let priorities: Box<[u8]> = priorities.into_iter().rev().collect();
        Self {
            priorities: if priorities.len() > 1 { priorities } else { Box::default() },
            seats: workers.iter().map(|worker| worker.seat).collect(),
            together: together.filter(|span| span.len() == accounts.len()),
            accounts,
            places: places.into(),
            workers: workers.into(),
            turn,
        }
    }

    /// The place of one life of a worker.
    pub(super) fn find(&self, life: Life) -> Option<usize> {
        let place = *self.places.get(life.account as usize)? as usize;
        self.workers.get(place).filter(|worker| worker.life == life).map(|_| place)
    }

    /// Those whose accounts are marked: full, shut, held, or standing elsewhere than online. One pass over numbers that lie
    /// side by side.
    pub(super) fn marked<'a>(&'a self, fleet: &'a Fleet) -> impl Iterator<Item = &'a Arc<Worker>> {
        let is_marked = |account: u32| Page::read(&fleet.pages, account as usize).has(Entry::MARKS);
        let some = self.together.clone().is_none_or(|span| Page::any(&fleet.pages, span, Entry::MARKS));
        let workers = if some { &*self.workers } else { &[] };
        workers.iter().zip(&self.accounts).filter(move |(_, account)| is_marked(**account)).map(|(worker, _)| worker)
    }

    /// Of how many workers the breakers admit requests.
    pub(super) fn admitted(&self, fleet: &Fleet) -> usize {
        self.accounts.iter().filter(|&&account| !Page::read(&fleet.pages, account as usize).has(Entry::SHUT)).count()
    }
}

// === impl Candidates ===

impl<'a> Candidates<'a> {
    /// Whether the worker at a place is a candidate.
    pub(super) fn admits(&self, place: usize) -> bool {
        let worker = &*self.model.workers[place];
        worker.standing() == self.tier
            && self.priority.is_none_or(|priority| worker.priority == priority)
            && worker.load.has_room(self.now)
            && self.query.may_ask(worker)
            && worker.admits(self.panic, self.now)
            && self.warm_up.is_none_or(|warm_up| warm_up.admits(worker, self.now))
    }

    /// Once around from a place: the places of those who may be candidates by their accounts, each with the least load that
    /// it can have. Whether they are is for [`Self::admits`] to say. `visit` goes on with the load from which on nobody is
    /// wanted any more, [`ANY_LOAD`] at first.
    pub(super) fn scan<T>(&self, start: usize, mut visit: impl FnMut(usize, u32) -> ControlFlow<T, u32>) -> Option<T> {
        let aside = if self.tier == Standing::Online { 0 } else { Entry::ASIDE };
        let marks = if self.panic { Entry::MARKS & !Entry::SHUT } else { Entry::MARKS };
        let pages = &*self.fleet.pages;
        let start = if start < self.model.accounts.len() { start } else { 0 };
        let (before, after) = self.model.accounts.split_at(start);
        let mut below = ANY_LOAD;
        for (first, accounts) in [(start, after), (0, before)] {
            for (index, &account) in accounts.iter().enumerate() {
                let load = Page::read(pages, account as usize).load_unless(marks, aside);
                if load < below {
                    match visit(first + index, load) {
                        ControlFlow::Continue(from) => below = from,
                        ControlFlow::Break(found) => return Some(found),
                    }
                }
            }
        }
        None
    }

    /// The candidates with their places, once around from a place.
    pub(super) fn each_from<T>(&self, start: usize, mut visit: impl FnMut(usize, &'a Worker) -> ControlFlow<T>) -> Option<T> {
        self.scan(start, |place, _| match self.admits(place) {
            true => visit(place, &self.model.workers[place]).map_continue(|()| ANY_LOAD),
            false => ControlFlow::Continue(ANY_LOAD),
        })
    }

    /// The candidates, beginning with the one whose turn it is.
    pub(super) fn each_in_turn<T>(&self, visit: impl FnMut(usize, &'a Worker) -> ControlFlow<T>) -> Option<T> {
        self.each_from(self.turn(), visit)
    }

    /// The candidate with the least load, and that; of equals the one whose turn it is.
    pub(super) fn least_loaded(&self) -> Option<(usize, u32)> {
        let mut best: Option<(usize, u32)> = None;
        self.scan(self.turn(), |place, _| {
            let least = best.map_or(ANY_LOAD, |(_, least)| least);
            if self.admits(place) {
                let load = self.load(&self.model.workers[place]);
                if load < least {
                    best = Some((place, load));
                    return if load == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(load.min(ANY_LOAD)) };
                }
            }
            ControlFlow::Continue(least)
        });
        best
    }

    /// The candidate with the highest score of a session, given by [`rendezvous::fnv`].
    pub(super) fn highest_score(&self, session: u64) -> Option<usize> {
        let mut best: Option<(u64, usize)> = None;
        self.scan::<()>(0, |place, _| {
            let score = rendezvous::score(session, self.model.seats[place]);
            if best.is_none_or(|(highest, _)| score > highest) && self.admits(place) {
                best = Some((score, place));
            }
            ControlFlow::Continue(ANY_LOAD)
        });
        best.map(|(_, place)| place)
    }

    /// The place of the one whose turn it is.
    pub(super) fn turn(&self) -> usize {
        self.model.turn.load(Ordering::Relaxed)
    }

    /// The candidate whose turn it is; the turn goes on in the same step.
    pub(super) fn take_turn(&self) -> Option<usize> {
        let mut turn = self.model.turn.load(Ordering::Relaxed);
        loop {
            let place = self.each_from(turn, |place, _| ControlFlow::Break(place))?;
            match self.model.turn.compare_exchange(turn, place + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(place),
                Err(now) => turn = now,
            }
        }
    }

    /// Says who was chosen, so that others are next.
    pub(super) fn took(&self, place: usize) {
        self.model.turn.store(place + 1, Ordering::Relaxed);
    }

    /// A worker's load, as much larger for a new one as its share is to be smaller.
    pub(super) fn load(&self, worker: &Worker) -> u32 {
        let load = worker.load.total(self.now);
        match self.warm_up {
            None => load,
            Some(warm_up) => (f64::from(load) / warm_up.warmth(worker, self.now)) as u32,
        }
    }
}

// === impl WarmUp ===

impl WarmUp {
    fn admits(self, worker: &Worker, now: Instant) -> bool {
        let warmth = self.warmth(worker, now);
        warmth >= 1.0 || (rendezvous::score(self.draw, worker.seat) as f64) < warmth * u64::MAX as f64
    }

    fn warmth(self, worker: &Worker, now: Instant) -> f64 {
        let part = worker.load.age(now).as_secs_f64() / self.length.as_secs_f64();
        (COLD + (1.0 - COLD) * part).min(1.0)
    }
}
