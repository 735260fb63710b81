//! Which of the candidates is taken, and that nobody gets more than it can hold.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mlx_serving_router::config::Strategy;
use mlx_serving_router::routing::{Lease, Outcome, Refusal};
use mlx_serving_router::wire::WorkerStatus;

use super::{ANY, FAILURE, LeftOut, Query, World, heartbeat, id, registration};

fn counts(names: impl IntoIterator<Item = String>) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    names.into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
    counts
}

/// Who gets each of `count` requests that end at once.
fn sequence(world: &World, count: usize) -> Vec<String> {
    (0..count).map(|_| world.select().unwrap().worker_id().to_string()).collect()
}

fn by(strategy: Strategy) -> World {
    World::with(|settings| settings.strategy = strategy)
}

#[test]
fn least_requests_spreads_what_runs_at_once() {
    let world = World::of(10, 0);
    let leases: Vec<_> = (0..100).map(|_| world.select().unwrap()).collect();
    let counts = counts(leases.iter().map(|lease| lease.worker_id().to_string()));
    assert_eq!((counts.len(), counts.values().all(|count| *count == 10)), (10, true));
}

#[test]
fn least_requests_takes_equals_in_turn() {
    let world = World::of(3, 0);
    assert_eq!(sequence(&world, 6), ["w0", "w1", "w2", "w0", "w1", "w2"]);
    let _busy = world.named("w1").unwrap();
    assert_eq!(sequence(&world, 4), ["w0", "w2", "w0", "w2"]);
}

#[test]
fn what_others_sent_counts_until_the_report_is_old() {
    let mut world = World::of(2, 2);
    let report = |sequence, ids: &[&str]| {
        let mut report = heartbeat("w0", "1", sequence);
        report.active_request_ids = Some(ids.iter().map(ToString::to_string).collect());
        report
    };
    world.beat(&report(1, &["theirs-1", "ours-1"]));
    assert_eq!(world.worker("w0").foreign, 1);
    assert_eq!(sequence(&world, 2), ["w1", "w1"]);
    world.beat(&report(2, &["theirs-1", "theirs-2"]));
    let full = [world.select().unwrap(), world.select().unwrap()];
    assert!(full.iter().all(|lease| lease.worker_id().as_str() == "w1"));
    assert_eq!(world.select().unwrap_err(), Refusal::Full);
    world.pass(15_000);
    assert_eq!(world.worker("w0").foreign, 0);
    assert_eq!(world.select().unwrap().worker_id().as_str(), "w0");
}

#[test]
fn a_report_without_ids_counts_beyond_our_own() {
    let world = World::of(1, 0);
    let _ours = [world.select().unwrap(), world.select().unwrap()];
    let mut report = heartbeat("w0", "1", 1);
    report.active_request_ids = None;
    report.metrics.active_requests = 5;
    world.beat(&report);
    assert_eq!((world.worker("w0").in_flight, world.worker("w0").foreign), (2, 3));
    report.metrics.active_requests = 1;
    world.beat(&report);
    assert_eq!(world.worker("w0").foreign, 0);
}

#[test]
fn racing_selections_never_exceed_a_workers_room() {
    const ROOM: u32 = 3;
    let world = World::of(4, ROOM);
    let held: [AtomicU32; 4] = Default::default();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2_000 {
                    let leases: Vec<_> = (0..4).filter_map(|_| world.select().ok()).collect();
                    let place = |lease: &super::Lease| lease.worker_id()[1..].parse::<usize>().unwrap();
                    for lease in &leases {
                        assert!(held[place(lease)].fetch_add(1, Ordering::SeqCst) < ROOM);
                    }
                    for lease in leases {
                        held[place(&lease)].fetch_sub(1, Ordering::SeqCst);
                        lease.end(Outcome::Success, world.now);
                    }
                }
            });
        }
    });
    assert!(world.router.snapshot(world.now).iter().all(|worker| worker.in_flight == 0));
}

#[test]
fn a_degraded_worker_serves_when_no_online_one_is_free() {
    let world = World::of(2, 1);
    let mut degraded = heartbeat("w0", "1", 1);
    degraded.status = WorkerStatus::Degraded;
    world.beat(&degraded);
    assert_eq!(sequence(&world, 3), ["w1", "w1", "w1"]);
    let _busy = world.select().unwrap();
    assert_eq!(world.select().unwrap().worker_id().as_str(), "w0");
    assert_eq!(world.router.online(), 2);
}

#[test]
fn round_robin_goes_in_turn_whatever_the_load() {
    let world = by(Strategy::RoundRobin);
    (0..3).for_each(|number| world.join(number, 0));
    let _busy = [world.named("w0").unwrap(), world.named("w0").unwrap()];
    assert_eq!(sequence(&world, 5), ["w0", "w1", "w2", "w0", "w1"]);
}

#[test]
fn weighted_random_follows_the_weights() {
    let world = World::with(|settings| {
        settings.strategy = Strategy::WeightedRandom;
        settings.weights = [("w0".into(), 3.0), ("w2".into(), 0.0)].into();
    });
    (0..3).for_each(|number| world.join(number, 0));
    let counts = counts(sequence(&world, 10_000));
    assert!((7_300..7_700).contains(&counts["w0"]), "{counts:?}");
    assert!(!counts.contains_key("w2"), "{counts:?}");
}

#[test]
fn skills_based_takes_who_has_the_model_then_who_has_memory() {
    let world = by(Strategy::SkillsBased);
    (0..3).for_each(|number| world.join(number, 0));
    let report = |worker: &str, sequence, loaded: bool, used: f64| {
        let mut report = heartbeat(worker, "1", sequence);
        report.metrics.models_loaded = loaded.then(|| "m".to_owned()).into_iter().collect();
        report.metrics.memory_used_gb = used;
        world.beat(&report);
    };
    report("w0", 1, false, 1.0);
    report("w1", 1, true, 60.0);
    report("w2", 1, true, 50.0);
    assert_eq!(sequence(&world, 2), ["w2", "w2"]);
    report("w2", 2, true, 60.0);
    let _busy = world.named("w2").unwrap();
    assert_eq!(sequence(&world, 2), ["w1", "w1"]);
}

#[test]
fn peak_ewma_prefers_the_quick_and_shuns_who_fails_fast() {
    let world = World::with(|settings| {
        settings.strategy = Strategy::PeakEwma;
        settings.breaker = None;
    });
    (0..3).for_each(|number| world.join(number, 0));
    for _ in 0..20 {
        for (worker, millis) in [("w0", 50), ("w1", 2_000)] {
            let lease = world.named(worker).unwrap();
            lease.first_token(Duration::from_millis(millis), world.now);
            lease.end(Outcome::Success, world.now);
        }
        world.finish("w2", FAILURE, 1);
    }
    let counts = counts(sequence(&world, 1_000));
    let share = |worker: &str| counts.get(worker).copied().unwrap_or(0);
    assert!(share("w0") > 600 && share("w2") == 0, "{counts:?}");
}

#[test]
fn the_same_seed_chooses_the_same() {
    let run = || {
        let world = by(Strategy::PeakEwma);
        (0..10).for_each(|number| world.join(number, 0));
        sequence(&world, 100)
    };
    assert_eq!(run(), run());
}

#[test]
fn a_lease_knows_its_worker() {
    let world = World::of(1, 0);
    let mut loading = heartbeat("w0", "1", 1);
    loading.loading_models = vec!["m".into()];
    world.beat(&loading);
    let lease = world.select().unwrap();
    assert_eq!((lease.incarnation(), lease.choice().as_str(), lease.is_legacy()), ("1", "strategy", false));
    assert!(lease.is_loading("m") && !lease.is_loading("x"));
    assert!(lease.has(super::Feature::Cancel) && !lease.has(super::Feature::Resume));
}

#[tokio::test]
async fn whoever_waits_for_room_hears_of_it() {
    let world = World::of(1, 1);
    let lease = world.select().unwrap();
    let mut freed = std::pin::pin!(world.router.capacity_freed().notified());
    freed.as_mut().enable();
    assert_eq!(world.select().unwrap_err(), Refusal::Full);
    lease.end(Outcome::Success, world.now);
    freed.as_mut().await;
    freed.set(world.router.capacity_freed().notified());
    freed.as_mut().enable();
    world.register(&registration("w1", "1", &["m"], 1));
    freed.await;
}

#[tokio::test]
async fn whoever_waits_hears_when_nobody_is_left_to_wait_for() {
    type Change = fn(&mut World, Lease);
    let changes: [(&str, Change); 7] = [
        ("drained", |world, _lease| assert!(world.router.drain("w0", world.now))),
        ("removed", |world, _lease| world.router.remove(&id("w0"))),
        ("deregistered", |world, _lease| world.router.deregister(&id("w0"), world.now)),
        ("silent", |world, _lease| {
            world.pass(15_000);
            world.router.expire(world.now);
        }),
        ("leaving", |world, _lease| {
            let mut report = heartbeat("w0", "1", 1);
            report.status = WorkerStatus::Draining;
            world.beat(&report);
        }),
        ("forced open", |world, _lease| assert!(world.router.force_open_breaker("w0", world.now))),
        ("failing", |world, lease| assert!(lease.end(FAILURE, world.now))),
    ];
    for (how, change) in changes {
        let mut world = World::of(1, 8);
        world.finish("w0", FAILURE, 4);
        // It wants nothing for a while, but is not full: the end of a request frees no place.
        let lease = world.select().unwrap();
        lease.hold_back(Duration::from_secs(60), world.now);
        let router = world.router.clone();
        let mut look = std::pin::pin!(router.capacity_freed().notified());
        look.as_mut().enable();
        assert_eq!(world.select().unwrap_err(), Refusal::Full);
        assert!(futures_util::poll!(look.as_mut()).is_pending(), "{how}");
        change(&mut world, lease);
        assert!(futures_util::poll!(look).is_ready(), "{how}");
        let refusal = world.select().unwrap_err();
        assert!(matches!(refusal, Refusal::NoWorkers | Refusal::NoHealthyWorkers { .. }), "{how}: {refusal:?}");
    }
}

#[tokio::test]
async fn whoever_waits_hears_of_room_that_the_clock_gives_back() {
    // By the tick, or by a selection for another model, which sets right everybody's account.
    let ways: [fn(&World); 2] =
        [|world| world.router.expire(world.now), |world| assert!(world.query(&Query { model_id: "x", ..ANY }).is_err())];
    for look in ways {
        let mut world = World::of(1, 1);
        let mut report = heartbeat("w0", "1", 1);
        report.active_request_ids = Some(vec!["theirs".into()]);
        world.beat(&report);
        world.pass(14_999);
        // It missed heartbeats by then.
        world.router.expire(world.now);
        let router = world.router.clone();
        let mut freed = std::pin::pin!(router.capacity_freed().notified());
        freed.as_mut().enable();
        assert_eq!(world.select().unwrap_err(), Refusal::Full);
        look(&world);
        assert!(futures_util::poll!(freed.as_mut()).is_pending());
        // A sign of life that says nothing of requests: or it would be offline as well.
        world.register(&registration("w0", "1", &["m"], 1));
        freed.set(router.capacity_freed().notified());
        freed.as_mut().enable();
        world.pass(1);
        look(&world);
        assert!(futures_util::poll!(freed.as_mut()).is_ready());
        drop(world.select().unwrap());
    }
}

#[test]
fn a_new_worker_warms_up() {
    for strategy in [Strategy::LeastRequests, Strategy::RoundRobin, Strategy::WeightedRandom, Strategy::PeakEwma] {
        let mut world = World::with(|settings| {
            settings.strategy = strategy;
            settings.slow_start = Some(Duration::from_secs(100));
        });
        (0..4).for_each(|number| world.join(number, 0));
        world.pass(100_000);
        world.join(4, 0);
        let share = |world: &mut World, seconds: u64| {
            world.pass(seconds * 1_000);
            counts(sequence(world, 2_000)).get("w4").copied().unwrap_or(0)
        };
        let (cold, half, warm) = (share(&mut world, 0), share(&mut world, 50), share(&mut world, 50));
        assert!((10..80).contains(&cold), "{strategy:?}: {cold}");
        assert!((140..320).contains(&half), "{strategy:?}: {half}");
        assert!((340..460).contains(&warm), "{strategy:?}: {warm}");
    }
}

#[test]
fn in_a_small_or_wholly_new_fleet_nobody_waits_for_warmth() {
    let world = World::with(|settings| settings.slow_start = Some(Duration::from_secs(100)));
    (0..3).for_each(|number| world.join(number, 0));
    assert_eq!(sequence(&world, 4), ["w0", "w1", "w2", "w0"]);
    (3..10).for_each(|number| world.join(number, 1));
    assert!((0..100).all(|_| world.select().is_ok()));
}

#[test]
fn a_lease_tells_who_was_left_out_and_why() {
    let world = World::of(6, 1);
    world.finish("w1", FAILURE, 5);
    let _busy = world.named("w2").unwrap();
    let mut degraded = heartbeat("w3", "1", 1);
    degraded.status = WorkerStatus::Degraded;
    world.beat(&degraded);
    world.router.drain("w5", world.now);
    let query = Query { exclude: &[id("w0")], ..ANY };
    let lease = world.query(&query).unwrap();
    assert_eq!(lease.worker_id().as_str(), "w4");
    let expected =
        [(id("w0"), LeftOut::Tried), (id("w1"), LeftOut::CircuitOpen), (id("w2"), LeftOut::Full), (id("w3"), LeftOut::Degraded)];
    assert_eq!(lease.left_out(&query, world.now), expected);
    assert_eq!(expected.map(|(_, why)| why.as_str()), ["tried", "circuit_open", "full", "degraded"]);
}

#[test]
fn in_turn_means_so_for_callers_at_the_same_time() {
    let world = World::with(|settings| settings.strategy = Strategy::RoundRobin);
    for worker in ["a", "b", "c"] {
        world.register(&registration(worker, "1", &["m"], 0));
    }
    let counts = parking_lot::Mutex::new(BTreeMap::<String, u32>::new());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..2_000 {
                    let lease = world.router.select(&Query { model_id: "m", ..Query::default() }, world.now).unwrap();
                    *counts.lock().entry(lease.worker_id().to_string()).or_default() += 1;
                }
            });
        }
    });
    let counts: Vec<_> = counts.into_inner().into_values().collect();
    assert_eq!(counts, [2_000, 2_000, 2_000]);
}
