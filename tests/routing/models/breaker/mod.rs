//! Breakers against their model: three workers, requests that overlap, time that passes by every boundary.

mod model;

use std::time::Duration;

use mlx_serving_router::error::ControllerErrorCode;
use mlx_serving_router::routing::{
    BreakerSettings, Carrier, CircuitState, Lease, Outcome, Query, Refusal, RouterEvent, RouterSettings,
};
use mlx_serving_router::wire::WorkerId;
use proptest::prelude::*;
use tokio::time::Instant;

use self::model::{Breaker, Permit, Told};
use super::histories::{Coverage, run};
use crate::{ANY, World, id, registration};

const WORKERS: usize = 3;
/// The width of a bucket of the window.
const BUCKET: Duration = Duration::from_millis(100);
const OPEN_FOR: Duration = Duration::from_millis(1_000);
const SLOW: Duration = Duration::from_millis(50);

#[derive(Clone, Debug)]
enum Event {
    /// One of those whom the strategy may choose, without those who were tried.
    Select {
        tried: [bool; WORKERS],
    },
    Named(usize),
    /// Leases are counted from the latest.
    FirstToken {
        lease: usize,
        slow: bool,
    },
    End {
        lease: usize,
        outcome: Outcome,
    },
    Drop(usize),
    /// A request that begins and ends at once, some with a first token, which may be slow.
    Finish {
        worker: usize,
        token: Option<bool>,
        outcome: Outcome,
    },
    Pass(Time),
    Expire,
    Force(usize),
    Reset(usize),
}

#[derive(Clone, Debug)]
enum Time {
    Millis(u64),
    /// To the time when the open breaker of a worker becomes half-open, or a nanosecond before or after.
    ToHalfOpen {
        worker: usize,
        beside: i8,
    },
    /// To the beginning of a bucket of the window, so many from here, or a nanosecond beside it.
    ToBucket {
        ahead: u32,
        beside: i8,
    },
    /// Multiples of the time that lowers the exponent.
    Calm(u32),
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        8 => Just(Outcome::Success),
        8 => Just(Outcome::Failure(ControllerErrorCode::WorkerTimeout)),
        2 => Just(Outcome::Failure(ControllerErrorCode::WorkerOverloaded)),
        1 => Just(Outcome::Ignored),
        1 => prop::sample::select(&ControllerErrorCode::ALL[..]).prop_map(Outcome::Failure),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let lease = || prop_oneof![3 => 0..2_usize, 1 => 0..20_usize];
    let worker = || 0..WORKERS;
    let time = prop_oneof![
        1 => (0..300_u64).prop_map(Time::Millis),
        8 => (worker(), -1..=1_i8).prop_map(|(worker, beside)| Time::ToHalfOpen { worker, beside }),
        2 => (1..=11_u32, -1..=1_i8).prop_map(|(ahead, beside)| Time::ToBucket { ahead, beside }),
        1 => (1..=4_u32).prop_map(Time::Calm),
    ];
    let finish = |worker, token, outcome| Event::Finish { worker, token, outcome };
    prop_oneof![
        6 => any::<[bool; WORKERS]>().prop_map(|tried| Event::Select { tried }),
        6 => Just(Event::Select { tried: [false; WORKERS] }),
        12 => worker().prop_map(Event::Named),
        10 => (lease(), any::<bool>()).prop_map(|(lease, slow)| Event::FirstToken { lease, slow }),
        20 => (lease(), outcome()).prop_map(|(lease, outcome)| Event::End { lease, outcome }),
        6 => lease().prop_map(Event::Drop),
        24 => (worker(), outcome()).prop_map(move |(worker, outcome)| finish(worker, None, outcome)),
        16 => worker().prop_map(move |worker| finish(worker, Some(true), Outcome::Success)),
        12 => (worker(), any::<bool>(), outcome())
            .prop_map(move |(worker, slow, outcome)| finish(worker, Some(slow), outcome)),
        24 => time.prop_map(Event::Pass),
        4 => Just(Event::Expire),
        2 => worker().prop_map(Event::Force),
        5 => worker().prop_map(Event::Reset),
    ]
}

fn settings() -> impl Strategy<Value = BreakerSettings> {
    let shares = prop::sample::select(vec![0.28, 0.5, 1.0]);
    let limits = (1..=4_u32, 1..=3_u32, 1..=3_u32, prop_oneof![6 => 2..=6_u32, 1 => Just(25)]);
    (limits, shares, prop::sample::select(vec![0.0, 0.33, 0.34, 1.0]), 1..=6_u32, any::<bool>()).prop_map(
        |((failure_threshold, success_threshold, half_open_requests, minimum_requests), failure_rate, max_open, times, slow)| {
            BreakerSettings {
                failure_threshold,
                success_threshold,
                open_for: OPEN_FOR,
                open_for_max: OPEN_FOR * times,
                failure_rate,
                minimum_requests,
                window: 10 * BUCKET,
                half_open_requests,
                max_open,
                slow_first_token: slow.then_some(SLOW),
            }
        },
    )
}

struct Run<'a> {
    world: World,
    start: Instant,
    settings: BreakerSettings,
    breakers: Vec<Breaker>,
    leases: Vec<Out>,
    /// What has to have been told in this step.
    told: Vec<(usize, Told)>,
    seen: &'a Coverage,
}

/// A request on its way.
struct Out {
    lease: Lease,
    worker: usize,
    permit: Permit,
    /// Its first token came.
    token: bool,
}

fn name(worker: usize) -> WorkerId {
    id(&format!("w{worker}"))
}

impl<'a> Run<'a> {
    fn new(settings: BreakerSettings, seed: u64, seen: &'a Coverage) -> Self {
        let world = World::seeded(seed, |all: &mut RouterSettings| all.breaker = Some(settings.clone()));
        for worker in 0..WORKERS {
            world.router.register(&registration(&name(worker), "1", &["m"], 0), Carrier::Local, world.now);
        }
        world.take_events();
        let breakers = (0..WORKERS).map(|_| Breaker::new(&settings, world.now)).collect();
        Self { start: world.now, world, settings, breakers, leases: Vec::new(), told: Vec::new(), seen }
    }

    /// Lets the model of a worker's breaker do something, and notes what it has to tell.
    fn model<T>(&mut self, worker: usize, change: impl FnOnce(&mut Breaker, Instant, &mut Vec<Told>) -> T) -> T {
        let mut told = Vec::new();
        let result = change(&mut self.breakers[worker], self.world.now, &mut told);
        self.told.extend(told.into_iter().map(|told| (worker, told)));
        result
    }

    fn step(&mut self, event: Event) -> Result<(), TestCaseError> {
        match event {
            Event::Select { tried } => self.select(tried)?,
            Event::Named(worker) => drop(self.named(worker)?),
            Event::Finish { worker, token, outcome } => {
                if let Some(out) = self.named(worker)? {
                    if let Some(slow) = token {
                        self.first_token(out, slow);
                    }
                    self.end(out, outcome)?;
                }
            }
            Event::FirstToken { lease, slow } if !self.leases.is_empty() => self.first_token(self.at(lease), slow),
            Event::End { lease, outcome } if !self.leases.is_empty() => self.end(self.at(lease), outcome)?,
            Event::Drop(lease) if !self.leases.is_empty() => {
                let out = self.leases.remove(self.at(lease));
                self.seen.saw_if(out.permit.probe && !out.token, "a probe is dropped");
                drop(out.lease);
                self.model(out.worker, |breaker, _, _| breaker.release(&out.permit));
            }
            Event::FirstToken { .. } | Event::End { .. } | Event::Drop(_) => {}
            Event::Pass(time) => self.pass(time),
            Event::Expire => {
                self.world.router.expire(self.world.now);
                (0..WORKERS).for_each(|worker| self.model(worker, Breaker::tick));
            }
            Event::Force(worker) => {
                prop_assert!(self.world.router.force_open_breaker(&name(worker), self.world.now));
                self.model(worker, Breaker::force_open);
            }
            Event::Reset(worker) => {
                prop_assert!(self.world.router.reset_breaker(&name(worker), self.world.now));
                self.model(worker, Breaker::reset);
            }
        }
        self.compare()
    }

    fn pass(&mut self, time: Time) {
        let now = self.world.now;
        let beside = |at: Instant, beside: i8| match beside {
            -1 => at - Duration::from_nanos(1),
            0 => at,
            _ => at + Duration::from_nanos(1),
        };
        let then = match time {
            Time::Millis(millis) => now + Duration::from_millis(millis),
            Time::Calm(times) => now + OPEN_FOR * times,
            Time::ToBucket { ahead, beside: by } => {
                let passed = (now - self.start).as_nanos() / BUCKET.as_nanos();
                beside(self.start + BUCKET * (passed as u32 + ahead), by)
            }
            Time::ToHalfOpen { worker, beside: by } => {
                let wait = self.breakers[worker].stats(now).retry_after;
                wait.map_or(now, |wait| beside(now + wait, by))
            }
        };
        self.world.now = then.max(now);
    }

    fn select(&mut self, tried: [bool; WORKERS]) -> Result<(), TestCaseError> {
        let now = self.world.now;
        let exclude: Vec<_> = (0..WORKERS).filter(|worker| tried[*worker]).map(name).collect();
        let admitted = self.breakers.iter().filter(|breaker| breaker.admits(now)).count();
        let percent = (100.0 * self.settings.max_open).round() as usize;
        let panic = 100 * admitted < (100 - percent) * WORKERS;
        let admits = |breaker: &Breaker| breaker.admits(now) || panic && breaker.admits_in_panic();
        let healthy = self.breakers.iter().filter(|breaker| admits(breaker)).count();
        let may: Vec<_> = (0..WORKERS).filter(|worker| !tried[*worker] && admits(&self.breakers[*worker])).collect();
        let soonest = self.breakers.iter().filter(|breaker| !admits(breaker)).map(|breaker| breaker.wait(now)).min();
        match self.world.query(&Query { exclude: &exclude, ..ANY }) {
            Ok(lease) => {
                let worker = (0..WORKERS).find(|worker| name(*worker) == *lease.worker_id()).unwrap();
                prop_assert!(may.contains(&worker), "{worker} of {may:?}");
                self.took(lease, worker);
            }
            Err(refusal) => {
                prop_assert!(may.is_empty(), "{may:?} could");
                let expected = if exclude.is_empty() {
                    self.seen.saw("refused: nobody healthy");
                    Refusal::NoHealthyWorkers { retry_after: soonest.unwrap() }
                } else {
                    self.seen.saw("refused: all tried");
                    Refusal::AllTried { total: WORKERS, healthy, excluded: exclude.len() }
                };
                prop_assert_eq!(refusal, expected);
            }
        }
        Ok(())
    }

    /// Asks for a worker by name, and gives the place of the lease.
    fn named(&mut self, worker: usize) -> Result<Option<usize>, TestCaseError> {
        let now = self.world.now;
        match self.world.named(&name(worker)) {
            Ok(lease) => {
                prop_assert!(self.breakers[worker].admits(now));
                self.took(lease, worker);
                Ok(Some(self.leases.len() - 1))
            }
            Err(refusal) => {
                prop_assert!(!self.breakers[worker].admits(now));
                self.seen.saw("refused: circuit open");
                prop_assert_eq!(refusal, Refusal::CircuitOpen { retry_after: self.breakers[worker].wait(now) });
                Ok(None)
            }
        }
    }

    fn at(&self, lease: usize) -> usize {
        self.leases.len() - 1 - lease % self.leases.len()
    }

    fn first_token(&mut self, at: usize, slow: bool) {
        let ttft = SLOW + Duration::from_nanos(u64::from(slow));
        let now = self.world.now;
        let out = &mut self.leases[at];
        out.lease.first_token(ttft, now);
        out.token = true;
        let mut told = Vec::new();
        self.breakers[out.worker].first_token(&mut out.permit, ttft, now, &mut told);
        self.told.extend(told.into_iter().map(|told| (out.worker, told)));
    }

    fn took(&mut self, lease: Lease, worker: usize) {
        let permit = self.model(worker, Breaker::acquire);
        self.seen.saw_if(permit.probe, "a probe");
        self.seen.saw_if(permit.panic, "panic lets one pass");
        self.leases.push(Out { lease, worker, permit, token: false });
    }

    fn end(&mut self, at: usize, outcome: Outcome) -> Result<(), TestCaseError> {
        let out = self.leases.remove(at);
        let before = self.breakers[out.worker].stats(self.world.now);
        self.model(out.worker, |breaker, now, told| breaker.end(&out.permit, outcome, now, told));
        let failed =
            matches!(outcome, Outcome::Failure(code) if model::effect(code) != mlx_serving_router::error::BreakerEffect::Ignored);
        let changed = self.breakers[out.worker].stats(self.world.now) != before;
        self.seen.saw_if(!changed && outcome == Outcome::Success && !out.token, "a success from before the last transition");
        self.seen.saw_if(!changed && failed && !out.permit.panic, "a failure that says nothing any more");
        self.seen.saw_if(changed && failed && out.permit.probe && out.token, "a probe breaks after its first token");
        let opened = self.told.iter().any(|(_, (_, to, _))| *to == CircuitState::Open);
        prop_assert_eq!(out.lease.end(outcome, self.world.now), opened);
        Ok(())
    }

    fn compare(&mut self) -> Result<(), TestCaseError> {
        let now = self.world.now;
        let stats = self.world.router.breaker_stats(now);
        prop_assert_eq!(stats.len(), WORKERS);
        for (worker, (breaker, (id, stats))) in self.breakers.iter_mut().zip(&stats).enumerate() {
            if let Some(length) = breaker.just_opened() {
                let share = stats.retry_after.unwrap().as_secs_f64() / length.as_secs_f64();
                prop_assert!((0.8..=1.2).contains(&share), "{share} of {length:?}");
                prop_assert!(stats.retry_after.unwrap() <= self.settings.open_for_max, "{stats:?}");
                self.seen.saw_if(share < 0.84, "jitter near its least");
                self.seen.saw_if(share > 1.16, "jitter near its most");
                self.seen.saw(if length < self.settings.open_for_max {
                    "opened for less than the longest"
                } else {
                    "opened for the longest"
                });
                self.seen.saw_if(length > OPEN_FOR, "opened for longer than the first time");
                breaker.opens_until(now + stats.retry_after.unwrap());
            }
            prop_assert_eq!(&(name(worker), breaker.stats(now)), &(id.clone(), stats.clone()));
            let snapshot = self.world.worker(id);
            let held = self.leases.iter().filter(|out| out.worker == worker).count() as u32;
            prop_assert_eq!((snapshot.breaker, snapshot.in_flight), (stats.state, held));
        }
        let told = self.world.take_events().into_iter().map(|event| match event {
            RouterEvent::BreakerChanged { worker_id, from, to, reason } => (worker_id, (from, to, reason)),
            other => panic!("{other:?}"),
        });
        let told: Vec<_> = told.collect();
        let expected: Vec<_> = self.told.drain(..).map(|(worker, told)| (name(worker), told)).collect();
        for (_, (from, to, reason)) in &expected {
            self.seen.saw(format!("{} > {}: {}", from.as_str(), to.as_str(), reason.as_str()));
        }
        prop_assert_eq!(told, expected);
        Ok(())
    }
}

#[test]
fn a_breaker_does_what_its_model_does() {
    let reached = [
        "CLOSED > OPEN: consecutive_failures",
        "CLOSED > OPEN: failure_rate",
        "CLOSED > OPEN: slow_first_tokens",
        "OPEN > HALF_OPEN: timeout_passed",
        "HALF_OPEN > OPEN: probe_failed",
        "HALF_OPEN > CLOSED: probes_succeeded",
        "CLOSED > FORCED_OPEN: forced",
        "OPEN > FORCED_OPEN: forced",
        "HALF_OPEN > FORCED_OPEN: forced",
        "OPEN > CLOSED: reset",
        "HALF_OPEN > CLOSED: reset",
        "FORCED_OPEN > CLOSED: reset",
        "a failure that says nothing any more",
        "a probe",
        "a probe breaks after its first token",
        "a probe is dropped",
        "a success from before the last transition",
        "jitter near its least",
        "jitter near its most",
        "opened for less than the longest",
        "opened for longer than the first time",
        "opened for the longest",
        "panic lets one pass",
        "refused: all tried",
        "refused: circuit open",
        "refused: nobody healthy",
    ];
    let histories = (settings(), any::<u64>(), prop::collection::vec(event(), 1..200));
    run(2_500, histories, &reached, 25, |(settings, seed, events), seen| {
        let mut run = Run::new(settings, seed, seen);
        events.into_iter().try_for_each(|event| run.step(event))
    });
}
