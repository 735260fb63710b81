//! The routing room through its public door: time is a number that the tests move.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod breakers;
mod histories;
mod ledger;
mod membership;
mod models;
mod prefixes;
mod priorities;
mod refusals;
mod selection;
mod sessions;

use std::sync::Arc;
use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::error::ControllerErrorCode;
use mlx_serving_router::routing::{
    BreakerStats, Carrier, CircuitState, HeartbeatVerdict, Lease, LeftOut, Outcome, Query, Refusal, Registered, Router,
    RouterEvent, RouterSettings, WorkerSnapshot,
};
use mlx_serving_router::wire::{
    Capacity, Feature, Heartbeat, HeartbeatMetrics, Phase, Registration, Skills, WorkerId, WorkerStatus,
};
use parking_lot::Mutex;
use proptest::prelude::ProptestConfig;
use tokio::time::Instant;

const FAILURE: Outcome = Outcome::Failure(ControllerErrorCode::WorkerUnavailable);

/// A router with a clock that stands until it is moved, and a list of what the observer was told.
struct World {
    router: Arc<Router>,
    now: Instant,
    events: Arc<Mutex<Vec<RouterEvent>>>,
}

impl World {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut RouterSettings)) -> Self {
        Self::seeded(7, change)
    }

    fn seeded(seed: u64, change: impl FnOnce(&mut RouterSettings)) -> Self {
        let mut settings = RouterSettings::try_from(&ClusterConfig::default()).unwrap();
        change(&mut settings);
        let events = Arc::new(Mutex::new(Vec::new()));
        let told = events.clone();
        let router = Router::new(settings, seed, Box::new(move |event| told.lock().push(event)));
        Self { router, now: Instant::now(), events }
    }

    /// With so many online workers, `w0`, `w1` …, that serve `m` and hold `capacity` requests each.
    fn of(workers: usize, capacity: u32) -> Self {
        let world = Self::new();
        (0..workers).for_each(|number| world.join(number, capacity));
        world
    }

    fn join(&self, number: usize, capacity: u32) {
        let registration = registration(&format!("w{number}"), "1", &["m"], capacity);
        assert_eq!(self.register(&registration), Registered::New);
    }

    fn register(&self, registration: &Registration) -> Registered {
        self.router.register(registration, Carrier::Nats, self.now)
    }

    fn beat(&self, heartbeat: &Heartbeat) -> HeartbeatVerdict {
        self.router.heartbeat(heartbeat, &|id| id.starts_with("ours"), self.now)
    }

    fn pass(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
    }

    fn query(&self, query: &Query<'_>) -> Result<Lease, Refusal> {
        self.router.select(query, self.now)
    }

    fn select(&self) -> Result<Lease, Refusal> {
        self.query(&ANY)
    }

    fn select_for(&self, session: &str) -> Lease {
        self.query(&Query { session_id: Some(session), ..ANY }).unwrap()
    }

    fn named(&self, worker: &str) -> Result<Lease, Refusal> {
        self.query(&Query { worker_id: Some(worker), ..ANY })
    }

    fn worker(&self, worker: &str) -> WorkerSnapshot {
        self.router.worker(worker, self.now).unwrap()
    }

    fn stats(&self, worker: &str) -> BreakerStats {
        let stats = self.router.breaker_stats(self.now);
        stats.into_iter().find(|(id, _)| id.as_str() == worker).unwrap().1
    }

    fn state(&self, worker: &str) -> CircuitState {
        self.stats(worker).state
    }

    /// Ends `count` requests on a worker in this way.
    fn finish(&self, worker: &str, outcome: Outcome, count: u32) {
        for _ in 0..count {
            self.named(worker).unwrap().end(outcome, self.now);
        }
    }

    /// Opens a worker's breaker by consecutive failures, and lets the time to be open pass.
    fn half_open(&mut self, worker: &str) {
        self.finish(worker, FAILURE, 5);
        assert_eq!(self.state(worker), CircuitState::Open);
        self.now += self.stats(worker).retry_after.unwrap();
    }

    fn take_events(&self) -> Vec<RouterEvent> {
        std::mem::take(&mut self.events.lock())
    }
}

const ANY: Query<'static> =
    Query { model_id: "m", session_id: None, exclude: &[], carrier: None, unable: &[], worker_id: None, prompt: None };

/// So many cases, or as many as `PROPTEST_CASES` says.
fn cases(cases: u32) -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").map(|_| ProptestConfig::default().cases);
    ProptestConfig { cases: asked.unwrap_or(cases), failure_persistence: None, ..ProptestConfig::default() }
}

fn id(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn registration(worker: &str, incarnation: &str, models: &[&str], capacity: u32) -> Registration {
    Registration {
        protocol: Some(1),
        worker_id: id(worker),
        incarnation: incarnation.into(),
        hostname: "host".into(),
        ip: String::new(),
        port: 0,
        skills: Skills { available_models: models.iter().map(ToString::to_string).collect(), ..Skills::default() },
        capacity: Capacity { max_concurrent: capacity, max_queue: 64, memory_gb: 64.0 },
        features: vec![Feature::Cancel],
        status: WorkerStatus::Online,
        timestamp: 0,
    }
}

fn heartbeat(worker: &str, incarnation: &str, sequence: u64) -> Heartbeat {
    Heartbeat {
        worker_id: id(worker),
        incarnation: incarnation.into(),
        sequence,
        status: WorkerStatus::Online,
        timestamp: 0,
        metrics: HeartbeatMetrics::default(),
        queue_depth: 0,
        active_request_ids: Some(Vec::new()),
        tokens_generated: 0,
        phase: Phase::Ready,
        loading_models: Vec::new(),
        cached_prefixes: Vec::new(),
    }
}
