//! Fleets to decide about.

use std::sync::Arc;

use mlx_serving_router::config::{ClusterConfig, Strategy};
use mlx_serving_router::routing::{Carrier, Registered, Router, RouterSettings};
use mlx_serving_router::wire::{
    Capacity, Feature, Heartbeat, HeartbeatMetrics, PROTOCOL, Phase, Registration, Skills, WorkerId, WorkerStatus,
};
use tokio::time::Instant;

/// What every worker serves.
pub const MODELS: [&str; 4] = ["model-a", "model-b", "model-c", "model-d"];

/// A router of the default settings, but for the strategy, without workers.
pub fn router(strategy: Strategy) -> Arc<Router> {
    let mut settings = RouterSettings::try_from(&ClusterConfig::default()).unwrap_or_else(|error| panic!("{error}"));
    settings.strategy = strategy;
    Router::new(settings, 7, Box::new(|_| {}))
}

/// One with so many workers, each heard from at `now`. They do not come in the order of their names.
pub fn with_workers(strategy: Strategy, workers: usize, now: Instant) -> Arc<Router> {
    let router = router(strategy);
    for number in 0..workers {
        let number = scattered(number, workers);
        assert_eq!(router.register(&registration(number), Carrier::Nats, now), Registered::New);
        router.heartbeat(&heartbeat(number, 1), &|_| false, now);
    }
    router
}

/// The numbers below `count` in another order.
pub fn scattered(number: usize, count: usize) -> usize {
    // 7,919 is a prime, and no fleet here has a multiple of it: the map is a bijection.
    number * 7_919 % count
}

pub fn name(number: usize) -> WorkerId {
    WorkerId::new(&format!("worker-{number:05}")).unwrap_or_else(|error| panic!("{error}"))
}

pub fn registration(number: usize) -> Registration {
    Registration {
        protocol: Some(PROTOCOL),
        worker_id: name(number),
        incarnation: format!("{number:016x}"),
        hostname: format!("host-{number}.local"),
        ip: "127.0.0.1".into(),
        port: 0,
        skills: Skills { available_models: MODELS.iter().map(ToString::to_string).collect(), ..Skills::default() },
        capacity: Capacity { max_concurrent: 64, max_queue: 64, memory_gb: 64.0 },
        features: vec![Feature::Cancel],
        status: WorkerStatus::Online,
        timestamp: 0,
    }
}

pub fn heartbeat(number: usize, sequence: u64) -> Heartbeat {
    Heartbeat {
        worker_id: name(number),
        incarnation: format!("{number:016x}"),
        sequence,
        status: WorkerStatus::Online,
        timestamp: 0,
        metrics: HeartbeatMetrics { models_loaded: vec![MODELS[0].to_owned()], ..HeartbeatMetrics::default() },
        queue_depth: 0,
        active_request_ids: Some(Vec::new()),
        tokens_generated: 0,
        phase: Phase::Ready,
        loading_models: Vec::new(),
        cached_prefixes: Vec::new(),
    }
}

/// The name of one of many sessions, as long as a UUID. Made in nanoseconds, without the heap.
pub struct SessionName([u8; 36]);

// === impl SessionName ===

impl SessionName {
    pub fn of(mut number: usize) -> Self {
        let mut name = *b"5e55105e-0000-4000-8000-000000000000";
        for digit in name[24..].iter_mut().rev() {
            *digit = b"0123456789abcdef"[number % 16];
            number /= 16;
        }
        Self(name)
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}
