//! What has to hold after every simulation, whatever happened in it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use mlx_serving_router::error::ControllerErrorCode as Code;
use mlx_serving_router::telemetry::{Attempt, RequestMetadata, RequestStatus};
use serde_json::Value;

use crate::judged::{Judged, record};
use crate::world::{Log, World};

/// Nothing is held any more.
pub fn at_rest(world: &World) {
    let status = world.controller.cluster_status();
    if (status.requests.active, status.requests.queued) != (0, 0) {
        world.complain(format!("at rest: {:?}", status.requests));
    }
    for worker in world.controller.workers() {
        if worker.in_flight != 0 {
            world.complain(format!("at rest {} has {} in flight", worker.worker_id, worker.in_flight));
        }
    }
    for (worker, stats) in world.controller.breaker_stats() {
        if stats.probes != 0 {
            world.complain(format!("at rest {worker} has {} probes out", stats.probes));
        }
    }
    let text = world.controller.metrics_text();
    let mut complaints = numbers(&world.log.lock(), &text);
    let log = world.log.lock();
    let open = log.served.iter().filter(|served| served.postbox.as_ref().is_some_and(|postbox| !postbox.is_closed()));
    complaints.extend(open.map(|served| format!("at rest {}/{} waits for an answer", served.request_id, served.attempt)));
    drop(log);
    complaints.into_iter().for_each(|complaint| world.complain(complaint));
}

/// Everything that can be judged once all is over.
pub fn everything(world: &World) {
    let log = world.log.lock();
    let mut complaints = Vec::new();
    for met in &log.met {
        let found = Judged::new(world, &log, met).complaints();
        complaints.extend(found.into_iter().map(|what| format!("{} (at {}): {what}", met.call.request_id, met.began)));
    }
    if log.met.len() != world.plan.calls.len() {
        complaints.push(format!("{} calls, and {} ends", world.plan.calls.len(), log.met.len()));
    }
    complaints.extend(breakers(world, &log));
    complaints.extend(budgets(world, &log));
    drop(log);
    complaints.into_iter().for_each(|complaint| world.complain(complaint));
}

/// Transitions follow each other, and are somebody's.
fn breakers(world: &World, log: &Log) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut known: BTreeMap<&str, Known> = BTreeMap::new();
    let mut opened = 0;
    for (at, event) in &log.events {
        let Some(worker) = event.worker_id.as_deref() else { continue };
        let detail = |key: &str| event.details.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        match event.kind {
            "worker_registered" | "worker_replaced" => {
                let incarnation = detail("incarnation");
                if known.get(worker).is_none_or(|known| known.incarnation != incarnation) {
                    known.insert(worker, Known { incarnation, state: "CLOSED".into(), since: *at });
                }
            }
            "breaker_changed" => {
                let (from, to, reason) = (detail("from"), detail("to"), detail("reason"));
                let Some(known) = known.get_mut(worker) else { continue };
                if known.state != from {
                    complaints.push(format!("the breaker of {worker} went at {at} from {from} to {to}, and was {}", known.state));
                }
                opened += u32::from(to == "OPEN");
                complaints.extend(unfounded(world, log, worker, &reason, known.since..=*at));
                (known.state, known.since) = (to, *at);
            }
            _ => {}
        }
    }
    let told: u32 = log.met.iter().filter_map(record).map(|metadata| metadata.circuit_breaker_trips).sum();
    if told != opened {
        complaints.push(format!("{opened} breakers opened, and requests tell of {told}"));
    }
    complaints
}

/// A breaker opens after enough failures that count, and closes after enough probes; of what began before its last
/// transition none counts.
fn unfounded(world: &World, log: &Log, worker: &str, reason: &str, span: RangeInclusive<u64>) -> Option<String> {
    let breaker = &world.plan.config.request_routing.circuit_breaker;
    let attempts = log.met.iter().filter_map(|met| Some((met, record(met)?))).flat_map(|(met, metadata)| {
        let start = metadata.start_time;
        metadata.attempts.iter().map(move |attempt| (met.began + attempt.started_ms - start, attempt))
    });
    let within = attempts.filter(|(started, attempt)| attempt.worker_id.as_str() == worker && span.contains(started));
    let ends: Vec<_> =
        within.map(|(started, attempt)| (started + attempt.duration_ms.unwrap_or(0.0) as u64, attempt.code)).collect();
    let failed = |codes: &[Code]| {
        let counts = |(at, code): &&(u64, Option<Code>)| at <= span.end() && code.is_some_and(|code| codes.contains(&code));
        ends.iter().filter(counts).count()
    };
    // As the contract's table of codes has it.
    let failures = [Code::WorkerUnavailable, Code::WorkerTimeout, Code::WorkerOffline];
    let of_rate = [Code::WorkerUnavailable, Code::WorkerTimeout, Code::WorkerOffline, Code::WorkerOverloaded];
    let (least, found) = match reason {
        "consecutive_failures" => (breaker.failure_threshold as usize, failed(&failures)),
        "failure_rate" => (1, failed(&of_rate)),
        "probe_failed" => (1, failed(&failures)),
        "probes_succeeded" => (breaker.success_threshold as usize, ends.len()),
        "slow_first_tokens" => (1, ends.len()),
        _ => (0, 0),
    };
    (found < least).then(|| format!("the breaker of {worker} changed at {} by {reason} after {ends:?}", span.end()))
}

/// What is known of a worker's breaker from events.
struct Known {
    incarnation: String,
    state: String,
    /// When the last transition was.
    since: u64,
}

/// What became of one model's budget.
#[derive(Default)]
struct Spent {
    /// When first attempts were made.
    requests: Vec<u64>,
    /// When retries were paid for, and how much they cost.
    retries: Vec<(u64, f64)>,
}

/// Within any second there are no more retries of a model than its budget allows.
fn budgets(world: &World, log: &Log) -> Vec<String> {
    let retry = &world.plan.config.request_routing.retry;
    let mut spent: BTreeMap<&str, Spent> = BTreeMap::new();
    for met in &log.met {
        let Some(metadata) = record(met) else { continue };
        let at = |attempt: &Attempt| met.began + attempt.started_ms - metadata.start_time;
        let model = |number: usize| {
            let served = log.served.iter().find(|served| served.prompt == met.call.prompt && served.attempt as usize == number);
            served.map(|served| served.model.as_str())
        };
        for (number, attempt) in (1..).zip(&metadata.attempts) {
            let Some(model) = model(number) else { continue };
            let Spent { requests, retries } = spent.entry(model).or_default();
            if number == 1 {
                requests.push(at(attempt));
            }
            if metadata.attempts.len() > number {
                let cost = if attempt.code == Some(Code::WorkerTimeout) { 2.0 } else { 1.0 };
                retries.push((at(attempt) + attempt.duration_ms.unwrap_or(0.0) as u64, cost));
            }
        }
        // First attempts that nobody read count too: they make the budget larger.
        if let Some(first) = metadata.attempts.first().filter(|_| model(1).is_none()) {
            spent.entry(met.call.model).or_default().requests.push(at(first));
        }
    }
    let mut complaints = Vec::new();
    for (model, Spent { requests, retries }) in &spent {
        for (at, _) in retries {
            let within = |since: u64, when: u64| when <= *at && when + since > *at;
            let cost: f64 = retries.iter().filter(|(when, _)| within(900, *when)).map(|(_, cost)| cost).sum();
            let requests = requests.iter().filter(|when| within(1_000, **when)).count();
            let most = retry.budget_percent / 100.0 * requests as f64 + retry.budget_min_per_second;
            if cost > most + 1e-9 && world.plan.config.request_routing.fallback_models.is_empty() {
                complaints.push(format!("retries of {model} cost {cost} in the second before {at}, and {most} is allowed"));
            }
        }
    }
    complaints
}

/// The numbers for Prometheus agree with what happened.
fn numbers(log: &Log, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let sum = |name: &str, label: &str| -> u64 {
        let of = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
        of.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
    };
    let mut check = |what: &str, told: u64, happened: usize| {
        if told != happened as u64 {
            complaints.push(format!("the metrics tell of {told} {what}, and there were {happened}"));
        }
    };
    let records: Vec<_> = log.met.iter().filter_map(record).collect();
    check("requests", sum("mlx_router_requests_total{", ""), records.len());
    check("durations", sum("mlx_router_request_duration_seconds_count{", ""), records.len());
    let firsts = records.iter().filter(|metadata| metadata.time_to_first_token_ms.is_some()).count();
    check("first tokens", sum("mlx_router_time_to_first_token_seconds_count{", ""), firsts);
    for code in Code::ALL {
        let ended = |metadata: &&&RequestMetadata| metadata.final_error.as_ref().is_some_and(|error| error.code == code);
        let label = format!("code=\"{}\"", code.as_str());
        check(code.as_str(), sum("mlx_router_requests_total{", &label), records.iter().filter(ended).count());
    }
    let changes = log.events.iter().filter(|(_, event)| event.kind == "breaker_changed").count();
    // Nobody is told what an operator does after the stop.
    let told = sum("mlx_router_breaker_transitions_total{", "");
    check("transitions", if log.stopped.is_some() { told.min(changes as u64) } else { told }, changes);
    let failovers = log.events.iter().filter(|(_, event)| event.kind == "failover").count();
    check("failovers", sum("mlx_router_failovers_total", ""), failovers);
    let elsewhere = |metadata: &&&RequestMetadata| {
        let attempts = &metadata.attempts;
        metadata.status == RequestStatus::Succeeded
            && attempts.first().map(|first| &first.worker_id) != metadata.selected_worker.as_ref()
    };
    check("answers by others", failovers as u64, records.iter().filter(elsewhere).count());
    for (what, series) in [
        ("active requests", "mlx_router_requests_active"),
        ("queued requests", "mlx_router_requests_queued"),
        ("tickets", "mlx_router_store_entries{store=\"admission\"}"),
        ("events lost", "mlx_router_events_lost_total"),
    ] {
        check(what, sum(series, ""), 0);
    }
    complaints
}
