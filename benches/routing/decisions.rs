//! One decision, from its question to its report: select, first token, end.

use std::cell::LazyCell;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use mlx_serving_router::config::Strategy;
use mlx_serving_router::routing::{Lease, Outcome, Query, Router};
use mlx_serving_router::wire::PrefixHashes;
use tokio::time::Instant;

use crate::fleet::{self, MODELS, SessionName};

/// Each new one looks at every worker. A debug build, which tests run and whose figures nobody reads, has fewer.
pub const SESSIONS: usize = if cfg!(debug_assertions) { 10_000 } else { 100_000 };
const TTFT: Duration = Duration::from_millis(20);

/// A query for a model that everybody serves.
pub const ANY: Query<'static> =
    Query { model_id: MODELS[0], session_id: None, exclude: &[], carrier: None, unable: &[], worker_id: None, prompt: None };

pub fn all(criterion: &mut Criterion) {
    by_strategy(criterion);
    busy(criterion);
    sessions(criterion);
    prefixes(criterion);
}

/// What a request that goes well asks of the router.
pub fn decide(router: &Arc<Router>, query: &Query<'_>, now: Instant) {
    let lease = router.select(query, now).unwrap_or_else(|refusal| panic!("{refusal:?}"));
    lease.first_token(TTFT, now);
    lease.end(Outcome::Success, now);
}

fn by_strategy(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decision");
    for (name, strategy) in [("least_requests", Strategy::LeastRequests), ("peak_ewma", Strategy::PeakEwma)] {
        for workers in [10, 10_000] {
            let now = Instant::now();
            let router = LazyCell::new(|| fleet::with_workers(strategy, workers, now));
            group.bench_function(BenchmarkId::new(name, workers), |bencher| {
                bencher.iter(|| decide(&router, black_box(&ANY), now));
            });
        }
    }
}

/// Every worker has something to do, so that nobody can be taken because he is idle.
fn busy(criterion: &mut Criterion) {
    let now = Instant::now();
    let fleet = LazyCell::new(|| {
        let router = fleet::with_workers(Strategy::LeastRequests, 10_000, now);
        let held = occupy(&router, 25_000, now);
        (router, held)
    });
    let mut group = criterion.benchmark_group("decision");
    group.bench_function(BenchmarkId::new("least_requests_busy", 10_000), |bencher| {
        bencher.iter(|| decide(&fleet.0, black_box(&ANY), now));
    });
}

/// So many requests that do not end.
fn occupy(router: &Arc<Router>, requests: usize, now: Instant) -> Vec<Lease> {
    (0..requests).map(|_| router.select(&ANY, now).unwrap_or_else(|refusal| panic!("{refusal:?}"))).collect()
}

/// Requests of known sessions, in no order that a cache could guess.
fn sessions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decision");
    for workers in [10, 10_000] {
        let now = Instant::now();
        let known = LazyCell::new(|| {
            let router = fleet::with_workers(Strategy::LeastRequests, workers, now);
            for number in 0..SESSIONS {
                decide(&router, &Query { session_id: Some(SessionName::of(number).as_str()), ..ANY }, now);
            }
            router
        });
        let mut number = 0;
        group.bench_function(BenchmarkId::new("session", workers), |bencher| {
            let router = &*known;
            bencher.iter(|| {
                number = (number + 1) % SESSIONS;
                let name = SessionName::of(fleet::scattered(number, SESSIONS));
                decide(router, &Query { session_id: Some(black_box(name.as_str())), ..ANY }, now);
            });
        });
    }
}

/// A prompt of 4 kB whose first three quarters somebody holds, hashed for each decision.
fn prefixes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decision");
    for workers in [10, 1_000] {
        let now = Instant::now();
        let known = LazyCell::new(|| {
            let router = fleet::with_workers(Strategy::PrefixAware, workers, now);
            let prompts: Vec<String> = (0..1_000).map(|number| prompt(number, 3_072)).collect();
            for text in &prompts {
                decide(&router, &Query { prompt: Some(&PrefixHashes::of_prompt(MODELS[0], text)), ..ANY }, now);
            }
            let asked: Vec<String> = prompts.iter().map(|text| format!("{text}{}", prompt(9_999, 1_024))).collect();
            (router, asked)
        });
        let mut number = 0;
        group.bench_function(BenchmarkId::new("prefix_aware", workers), |bencher| {
            let (router, asked) = &*known;
            bencher.iter(|| {
                number = (number + 7) % asked.len();
                let prompt = PrefixHashes::of_prompt(MODELS[0], black_box(&asked[number]));
                decide(router, &Query { prompt: Some(&prompt), ..ANY }, now);
            });
        });
    }
}

fn prompt(number: usize, bytes: usize) -> String {
    let sentence = format!("In case {number} they went on talking about the fleet and who would get the next request. ");
    sentence.chars().cycle().take(bytes).collect()
}
