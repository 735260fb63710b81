//! What lies in the ledger decides as a look at everybody would: random fleets, and a bookkeeper who asks them one by one.

use std::time::Duration;

use mlx_serving_router::config::Strategy as Balancing;
use mlx_serving_router::error::ControllerErrorCode;
use mlx_serving_router::routing::{CircuitState, Lease, LeftOut, Outcome, Query, Refusal, WorkerSnapshot};
use mlx_serving_router::wire::WorkerStatus;
use proptest::prelude::*;
use proptest::sample::Index;

use super::{ANY, World, heartbeat, id, registration};

const WORKERS: u8 = 6;

#[derive(Clone, Debug)]
enum Event {
    Join { worker: u8, capacity: u32 },
    Beat { worker: u8, foreign: u8, status: WorkerStatus },
    Leave(u8),
    Drain(u8),
    Select { exclude: Vec<u8> },
    End(Index, Outcome),
    HoldBack(Index, u64),
    Pass(u64),
    Expire,
    Thaw,
    ForceOpen(u8),
    Reset(u8),
}

fn event() -> impl Strategy<Value = Event> {
    let worker = || 0..WORKERS;
    let index = any::<Index>;
    let status = prop_oneof![
        6 => Just(WorkerStatus::Online), 1 => Just(WorkerStatus::Degraded), 1 => Just(WorkerStatus::Draining)
    ];
    let outcome = prop_oneof![
        2 => Just(Outcome::Success),
        2 => Just(Outcome::Failure(ControllerErrorCode::WorkerTimeout)),
        1 => Just(Outcome::Ignored),
    ];
    prop_oneof![
        4 => (worker(), 0..4_u32).prop_map(|(worker, capacity)| Event::Join { worker, capacity }),
        6 => (worker(), 0..4_u8, status).prop_map(|(worker, foreign, status)| Event::Beat { worker, foreign, status }),
        1 => worker().prop_map(Event::Leave),
        1 => worker().prop_map(Event::Drain),
        24 => prop::collection::vec(worker(), 0..3).prop_map(|exclude| Event::Select { exclude }),
        12 => (index(), outcome).prop_map(|(lease, outcome)| Event::End(lease, outcome)),
        2 => (index(), 1..30_000_u64).prop_map(|(lease, span)| Event::HoldBack(lease, span)),
        4 => prop_oneof![0..50_u64, 1_000..40_000_u64].prop_map(Event::Pass),
        1 => Just(Event::Expire),
        1 => Just(Event::Thaw),
        1 => worker().prop_map(Event::ForceOpen),
        1 => worker().prop_map(Event::Reset),
    ]
}

fn step(world: &mut World, leases: &mut Vec<Lease>, sequence: u64, event: Event) -> Result<(), TestCaseError> {
    let name = |worker: u8| format!("w{worker}");
    match event {
        Event::Join { worker, capacity } => drop(world.register(&registration(&name(worker), "1", &["m"], capacity))),
        Event::Beat { worker, foreign, status } => {
            let mut report = heartbeat(&name(worker), "1", sequence);
            report.active_request_ids = Some((0..foreign).map(|number| format!("theirs-{number}")).collect());
            report.status = status;
            world.beat(&report);
        }
        Event::Leave(worker) => world.router.remove(&id(&name(worker))),
        Event::Drain(worker) => drop(world.router.drain(&name(worker), world.now)),
        Event::Select { exclude } => {
            let exclude: Vec<_> = exclude.into_iter().map(|worker| id(&name(worker))).collect();
            select(world, leases, &Query { exclude: &exclude, ..ANY })?;
        }
        Event::End(index, outcome) if !leases.is_empty() => {
            leases.swap_remove(index.index(leases.len())).end(outcome, world.now);
        }
        Event::HoldBack(index, span) if !leases.is_empty() => {
            index.get(leases).hold_back(Duration::from_millis(span), world.now);
        }
        Event::End(..) | Event::HoldBack(..) => {}
        Event::Pass(millis) => world.pass(millis),
        Event::Expire => world.router.expire(world.now),
        Event::Thaw => {
            world.router.freeze(world.now);
            world.router.thaw(world.now);
        }
        Event::ForceOpen(worker) => drop(world.router.force_open_breaker(&name(worker), world.now)),
        Event::Reset(worker) => drop(world.router.reset_breaker(&name(worker), world.now)),
    }
    Ok(())
}

/// Selects, and compares with what asking one by one says: `left_out` looks at workers, not at the ledger.
fn select(world: &World, leases: &mut Vec<Lease>, query: &Query<'_>) -> Result<(), TestCaseError> {
    let before = world.router.snapshot(world.now);
    let online = |worker: &&WorkerSnapshot| matches!(worker.status, WorkerStatus::Online | WorkerStatus::Degraded);
    let out = world.router.left_out(query, world.now);
    let is_out = |worker: &WorkerSnapshot| out.iter().any(|(id, _)| *id == worker.worker_id);
    let free: Vec<_> = before.iter().filter(online).filter(|worker| !is_out(worker)).collect();
    match world.query(query) {
        Ok(lease) => {
            let chosen = free.iter().find(|worker| worker.worker_id == *lease.worker_id());
            prop_assert!(chosen.is_some(), "{} is no candidate: {out:?}", lease.worker_id());
            let load = |worker: &WorkerSnapshot| worker.in_flight + worker.foreign;
            let behind = lease.left_out(query, world.now);
            for other in &free {
                let stands_behind = behind.contains(&(other.worker_id.clone(), LeftOut::Degraded));
                prop_assert!(stands_behind || chosen.is_some_and(|chosen| load(chosen) <= load(other)), "{other:?} has less");
            }
            if chosen.is_some_and(|chosen| chosen.status == WorkerStatus::Degraded) {
                let better = free.iter().filter(|other| {
                    other.status == WorkerStatus::Online && !behind.contains(&(other.worker_id.clone(), LeftOut::Degraded))
                });
                prop_assert_eq!(better.count(), 0);
            }
            leases.push(lease);
        }
        Err(refusal) => {
            prop_assert!(free.is_empty(), "{refusal:?}, and {free:?} could have taken it");
            let shut = before
                .iter()
                .filter(online)
                .all(|worker| matches!(worker.breaker, CircuitState::Open | CircuitState::ForcedOpen | CircuitState::HalfOpen));
            let unhealthy = matches!(refusal, Refusal::NoHealthyWorkers { .. });
            prop_assert!(shut || !unhealthy);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(super::cases(400))]

    #[test]
    fn the_least_busy_candidate_is_chosen_and_nobody_is_overlooked(
        events in prop::collection::vec(event(), 1..200),
        prefix_aware in any::<bool>(),
    ) {
        let mut world = World::with(|settings| {
            settings.strategy = if prefix_aware { Balancing::PrefixAware } else { Balancing::LeastRequests };
            let breaker = settings.breaker.as_mut().unwrap();
            breaker.failure_threshold = 2;
            breaker.minimum_requests = 4;
        });
        let mut leases = Vec::new();
        (0..WORKERS).for_each(|worker| world.join(worker.into(), 2));
        for (sequence, event) in (1..).zip(events) {
            step(&mut world, &mut leases, sequence, event)?;
        }
    }
}

#[test]
fn ties_are_taken_in_turn_whatever_lies_between() {
    let mut world = World::of(5, 1);
    let names = |world: &World, count| (0..count).map(|_| world.select().unwrap()).collect::<Vec<_>>();
    let ids = |leases: &[Lease]| leases.iter().map(|lease| lease.worker_id().to_string()).collect::<Vec<_>>();
    let first = names(&world, 2);
    assert_eq!(ids(&first), ["w0", "w1"]);
    world.router.force_open_breaker("w3", world.now);
    drop(first);
    let next = names(&world, 4);
    assert_eq!(ids(&next), ["w2", "w4", "w0", "w1"]);
    assert!(matches!(world.select(), Err(Refusal::Full)));
    world.pass(1);
    world.router.reset_breaker("w3", world.now);
    assert_eq!(ids(&names(&world, 1)), ["w3"]);
}

#[test]
fn what_the_clock_alone_changes_is_seen_at_its_time() {
    let mut world = World::of(2, 4);
    let mut report = heartbeat("w0", "1", 1);
    report.active_request_ids = Some(vec!["theirs-1".into(), "theirs-2".into(), "theirs-3".into(), "theirs-4".into()]);
    world.beat(&report);
    // Two heartbeats of 5 s later it still counts, three later no more: the second worker is not asked for what it has.
    let held: Vec<_> = (0..3).map(|_| world.select().unwrap()).collect();
    assert!(held.iter().all(|lease| lease.worker_id().as_str() == "w1"));
    world.pass(14_999);
    let last = world.select().unwrap();
    assert_eq!(last.worker_id().as_str(), "w1");
    assert!(matches!(world.select(), Err(Refusal::Full)));
    world.pass(1);
    let freed = world.select().unwrap();
    assert_eq!(freed.worker_id().as_str(), "w0");
    freed.hold_back(Duration::from_millis(700), world.now);
    world.pass(699);
    assert!(matches!(world.select(), Err(Refusal::Full)));
    world.pass(1);
    assert_eq!(world.select().unwrap().worker_id().as_str(), "w0");
}

#[test]
fn a_worker_that_came_after_the_last_selection_is_seen_at_its_time_too() {
    let mut world = World::of(1, 4);
    let busy = |worker: &str, sequence| {
        let mut report = heartbeat(worker, "1", sequence);
        report.active_request_ids = Some((0..4).map(|number| format!("theirs-{number}")).collect());
        report
    };
    let lease = world.select().unwrap();
    world.beat(&busy("w0", 1));
    world.pass(1_000);
    world.join(1, 4);
    world.beat(&busy("w1", 1));
    // What the old picture has to be looked at for is due, and a lease looks, before the new one is made.
    world.pass(14_000);
    assert!(lease.left_out(&ANY, world.now).is_empty());
    lease.end(Outcome::Success, world.now);
    assert_eq!(world.select().unwrap().worker_id().as_str(), "w0");
    world.beat(&busy("w0", 2));
    world.pass(1_000);
    assert_eq!(world.select().unwrap().worker_id().as_str(), "w1");
}
