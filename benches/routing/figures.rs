//! What criterion has no measure for: allocations, memory, CPU time of a fleet's signs of life, threads, retries.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use allocation_counter::measure;
use mlx_serving_router::config::{RequestMetricsConfig, Strategy};
use mlx_serving_router::routing::{Carrier, Query, Router};
use mlx_serving_router::telemetry::Requests;
use mlx_serving_router::wire::{Heartbeat, InferenceRequest, Json, Registration};
use serde::Serialize;
use tokio::time::Instant;

use crate::decisions::{ANY, SESSIONS, decide};
use crate::{attempts, fleet, threads};

const WORKERS: usize = 10_000;
const RECORDS: usize = 10_000;

/// All of them.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Heap allocations of a decision, by what is decided.
    allocations: Vec<(String, f64)>,
    /// Bytes on the heap of a fleet with its sessions and request records, and how many allocations they are.
    memory: (u64, u64),
    /// CPU seconds of registering the fleet, and of a heartbeat from each, both from their JSON on.
    fleet_cpu: (f64, f64),
    /// By the size of the fleet and round: decisions per second of one thread, of two, and of two with a router each.
    threads: Vec<(usize, Vec<[f64; 3]>)>,
    /// What a request takes more for a failed attempt before, in seconds, by round: without backoff; with it, less the backoff.
    retry: attempts::Retries,
}

/// Measures them. `quick`: less often.
pub fn all(quick: bool) -> Result<Figures, Box<dyn Error>> {
    let (rounds, length) = (if quick { 5 } else { 60 }, Duration::from_millis(20));
    Ok(Figures {
        allocations: allocations(),
        memory: memory()?,
        fleet_cpu: fleet_cpu()?,
        threads: [10, 1_000].map(|workers| (workers, threads::rounds(workers, rounds, length))).to_vec(),
        retry: attempts::retries(if quick { 20 } else { 300 })?,
    })
}

fn allocations() -> Vec<(String, f64)> {
    const TIMES: u64 = 10_000;
    let mut found = Vec::new();
    let mut count = |name: &str, router: &Arc<Router>, query: &Query<'_>, now| {
        decide(router, query, now);
        let counted = measure(|| (0..TIMES).for_each(|_| decide(router, query, now)));
        found.push((name.to_owned(), counted.count_total as f64 / TIMES as f64));
    };
    for (name, strategy) in [("least_requests", Strategy::LeastRequests), ("peak_ewma", Strategy::PeakEwma)] {
        for workers in [10, 1_000] {
            let now = Instant::now();
            let router = fleet::with_workers(strategy, workers, now);
            count(&format!("{name}/{workers}"), &router, &ANY, now);
            count(&format!("{name}/{workers}, session"), &router, &Query { session_id: Some("s"), ..ANY }, now);
        }
    }
    found
}

fn memory() -> Result<(u64, u64), Box<dyn Error>> {
    let mut kept = None;
    let counted = measure(|| kept = Some(a_large_house()));
    let (router, requests) = kept.ok_or("nothing was built")??;
    assert_eq!((router.online(), requests.remembered()), (WORKERS, RECORDS));
    Ok((u64::try_from(counted.bytes_current)?, u64::try_from(counted.count_current)?))
}

fn a_large_house() -> Result<(Arc<Router>, Arc<Requests>), Box<dyn Error>> {
    let now = Instant::now();
    let router = fleet::with_workers(Strategy::PeakEwma, WORKERS, now);
    let requests = Requests::new(&RequestMetricsConfig::default());
    let messages = Json::from_value(&serde_json::json!([{"role": "user", "content": "Hello"}]))?;
    for number in 0..SESSIONS {
        let session = fleet::SessionName::of(number).as_str().to_owned();
        let lease = router.select(&Query { session_id: Some(&session), ..ANY }, now).map_err(|why| format!("{why:?}"))?;
        if number < RECORDS {
            let request = InferenceRequest {
                request_id: session.clone(),
                model_id: ANY.model_id.to_owned(),
                messages: Some(messages.clone()),
                session_id: Some(session),
                ..InferenceRequest::default()
            };
            let mut record = requests.begin(&request, now)?;
            record.attempt_started(lease.worker_id(), lease.choice().as_str(), Vec::new(), now);
            record.first_token(now);
            record.tokens(64);
            record.finish(Ok(()), now);
        }
    }
    Ok((router, requests))
}

fn fleet_cpu() -> Result<(f64, f64), Box<dyn Error>> {
    let registrations = (0..WORKERS).map(|number| serde_json::to_vec(&fleet::registration(number)));
    let registrations = registrations.collect::<Result<Vec<_>, _>>()?;
    let heartbeats = (0..WORKERS).map(|number| serde_json::to_vec(&fleet::heartbeat(number, 1)));
    let heartbeats = heartbeats.collect::<Result<Vec<_>, _>>()?;
    let router = fleet::router(Strategy::LeastRequests);
    let now = Instant::now();
    let began = cpu_seconds();
    for message in &registrations {
        router.register(&serde_json::from_slice::<Registration>(message)?, Carrier::Nats, now);
    }
    let registered = cpu_seconds();
    for message in &heartbeats {
        router.heartbeat(&serde_json::from_slice::<Heartbeat>(message)?, &|_| false, now);
    }
    assert_eq!(router.online(), WORKERS);
    Ok((registered - began, cpu_seconds() - registered))
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
