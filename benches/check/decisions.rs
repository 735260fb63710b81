//! One decision of the router, from its question to its report, as benches/routing has it.

use std::hint::black_box;
use std::time::Duration;

use mlx_serving_router::config::Strategy;
use mlx_serving_router::routing::{Outcome, Query};
use mlx_serving_router::wire::PrefixHashes;
use tokio::time::Instant;

use crate::fleet::{self, MODELS, SessionName};
use crate::{Case, sound};

const ANY: Query<'static> =
    Query { model_id: MODELS[0], session_id: None, exclude: &[], carrier: None, unable: &[], worker_id: None, prompt: None };
const SESSIONS: usize = 1_000;
const PROMPTS: usize = 100;

pub fn cases() -> Vec<Case> {
    let case = |name, times, run| Case { name, times, run };
    vec![
        case("select/least_requests/10", 5_000, |times| plain(Strategy::LeastRequests, 10, times)),
        case("select/least_requests/1000", 5_000, |times| plain(Strategy::LeastRequests, 1_000, times)),
        case("select/peak_ewma/10", 5_000, |times| plain(Strategy::PeakEwma, 10, times)),
        case("select/peak_ewma/1000", 5_000, |times| plain(Strategy::PeakEwma, 1_000, times)),
        case("select/session/10", 5_000, |times| sessions(10, times)),
        case("select/session/1000", 5_000, |times| sessions(1_000, times)),
        case("select/prefix_aware/10", 500, |times| prefixes(10, times)),
        case("membership/heartbeat/10", 1_000, |times| heartbeats(10, times)),
    ]
}

fn plain(strategy: Strategy, workers: usize, times: u64) {
    decide(strategy, workers, times, 0, |_, decide| decide(black_box(ANY)));
}

fn sessions(workers: usize, times: u64) {
    decide(Strategy::LeastRequests, workers, times, SESSIONS, |number, decide| {
        let name = SessionName::of(fleet::scattered(number % SESSIONS, SESSIONS));
        decide(Query { session_id: Some(black_box(name.as_str())), ..ANY });
    });
}

/// A prompt of 4 kB that somebody had before, hashed for each decision.
fn prefixes(workers: usize, times: u64) {
    let prompts: Vec<String> = (0..PROMPTS)
        .map(|number| format!("In case {number} they went on about who would get the next request. ").repeat(64))
        .collect();
    decide(Strategy::PrefixAware, workers, times, PROMPTS, |number, decide| {
        let prompt = PrefixHashes::of_prompt(MODELS[0], black_box(&prompts[number % PROMPTS]));
        decide(Query { prompt: Some(&prompt), ..ANY });
    });
}

/// Decides so often, and as often before as it takes for all that is remembered to be there.
fn decide(strategy: Strategy, workers: usize, times: u64, before: usize, mut ask: impl FnMut(usize, &mut dyn FnMut(Query<'_>))) {
    let now = Instant::now();
    let router = fleet::with_workers(strategy, workers, now);
    for number in 0..before + sound(usize::try_from(times)) {
        ask(number, &mut |query| {
            let lease = sound(router.select(&query, now));
            lease.first_token(Duration::from_millis(20), now);
            lease.end(Outcome::Success, now);
        });
    }
}

/// A sign of life, from its JSON on.
fn heartbeats(workers: usize, times: u64) {
    let now = Instant::now();
    let router = fleet::with_workers(Strategy::LeastRequests, workers, now);
    let mut beat = fleet::heartbeat(0, 0);
    for number in 0..times {
        beat.sequence = number + 2;
        let bytes = sound(serde_json::to_vec(&beat));
        router.heartbeat(&sound(serde_json::from_slice(black_box(&bytes))), &|_| false, now);
    }
}
