//! The picture of the fleet that selections read: who is there, and who serves which model.
//!
//! It is swapped whole when membership changes, and holds no state of its own but whose turn it is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::rendezvous;
use super::settings::RouterSettings;
use super::worker::{Standing, Worker};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::wire::WorkerId;

#[derive(Debug, Default)]
pub(super) struct Fleet {
    /// Of the registry that it was made from.
    pub(super) version: u64,
    /// Everybody who is known, offline ones too.
    pub(super) workers: BTreeMap<WorkerId, Arc<Worker>>,
    models: HashMap<Arc<str>, Model>,
}

/// A model and the online workers that serve it, at least one, by id.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) workers: Box<[Arc<Worker>]>,
    /// The place after that of the last one chosen.
    turn: Arc<AtomicUsize>,
}

/// The workers of a model that may take a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidates<'a> {
    pub(super) model: &'a Model,
    pub(super) model_id: &'a str,
    pub(super) exclude: &'a [WorkerId],
    /// Those who stand so, and no others.
    pub(super) tier: Standing,
    /// Too few of the model's workers are admitted: those opened by their failure rate are candidates too.
    pub(super) panic: bool,
    /// New workers are candidates now and then only.
    pub(super) warm_up: Option<WarmUp>,
    pub(super) settings: &'a RouterSettings,
    pub(super) now: Instant,
}

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
    pub(super) fn new(version: u64, workers: BTreeMap<WorkerId, Arc<Worker>>, before: &Self) -> Self {
        let mut lists: HashMap<Arc<str>, Vec<Arc<Worker>>> = HashMap::new();
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
            (id, Model { workers: workers.into(), turn })
        });
        Self { version, models: models.collect(), workers }
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
    /// The place of a worker.
    pub(super) fn find(&self, id: &WorkerId) -> Option<usize> {
        self.workers.binary_search_by(|worker| worker.id.cmp(id)).ok()
    }
}

// === impl Candidates ===

impl<'a> Candidates<'a> {
    /// Whether the worker at a place is a candidate.
    pub(super) fn admits(&self, place: usize) -> bool {
        let worker = &*self.model.workers[place];
        worker.standing() == self.tier
            && worker.load.has_room(self.now)
            && !self.exclude.contains(&worker.id)
            && worker.admits(self.settings, self.panic, self.now)
            && self.warm_up.is_none_or(|warm_up| warm_up.admits(worker, self.now))
    }

    /// The candidates with their places, once around from a place.
    pub(super) fn iter_from(&self, start: usize) -> impl Iterator<Item = (usize, &'a Worker)> {
        let count = self.model.workers.len();
        let start = if start < count { start } else { 0 };
        let model = self.model;
        (start..count).chain(0..start).filter(|&place| self.admits(place)).map(move |place| (place, &*model.workers[place]))
    }

    /// The candidates, beginning with the one whose turn it is.
    pub(super) fn in_turn(&self) -> impl Iterator<Item = (usize, &'a Worker)> {
        self.iter_from(self.model.turn.load(Ordering::Relaxed))
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
