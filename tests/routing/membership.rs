//! Who is in the fleet.

use mlx_serving_router::routing::{
    Carrier, HeartbeatVerdict, IgnoredBecause, Outcome, Refusal, Registered, Router, RouterEvent, RouterSettings,
};
use mlx_serving_router::wire::{Phase, WorkerStatus};
use std::sync::{Arc, OnceLock};

use super::{ANY, World, heartbeat, id, registration};

#[test]
fn a_registered_worker_serves_its_models() {
    let world = World::new();
    assert_eq!(world.register(&registration("b", "1", &["y", "x"], 0)), Registered::New);
    assert_eq!(world.register(&registration("a", "1", &["x", "x"], 0)), Registered::New);
    assert_eq!(world.register(&registration("a", "1", &["x", "z"], 4)), Registered::Renewed);
    assert_eq!(world.router.models(), ["x", "y", "z"]);
    assert_eq!((world.router.online(), world.router.serving("x"), world.router.serving("nothing")), (2, 2, 0));
    let workers: Vec<_> = world.router.snapshot(world.now).into_iter().map(|worker| worker.worker_id).collect();
    assert_eq!(workers, [id("a"), id("b")]);
    assert_eq!(world.worker("a").capacity.max_concurrent, 4);
    assert!(world.router.worker("nobody", world.now).is_none());
}

#[test]
fn a_silent_worker_goes_offline_and_comes_back() {
    let mut world = World::of(1, 0);
    let watch = world.router.membership();
    let lease = world.select().unwrap();
    world.pass(14_999);
    world.router.expire(world.now);
    assert!(!lease.gone().has_fired());
    world.pass(1);
    world.router.expire(world.now);
    assert!(lease.gone().has_fired());
    assert_eq!((world.worker("w0").status, world.router.online(), *watch.borrow()), (WorkerStatus::Offline, 0, 0));
    assert_eq!(world.select().unwrap_err(), Refusal::NoWorkers);
    lease.end(Outcome::Ignored, world.now);
    assert_eq!(world.beat(&heartbeat("w0", "1", 1)), HeartbeatVerdict::Taken);
    let again = world.select().unwrap();
    assert!(!again.gone().has_fired());
    assert_eq!(*watch.borrow(), 1);
    let kinds: Vec<_> = world.take_events().into_iter().map(|event| std::mem::discriminant(&event)).collect();
    assert_eq!((kinds.len(), kinds[0] == kinds[2], kinds[0] == kinds[1]), (3, true, false));
}

#[test]
fn a_worker_that_missed_two_heartbeats_stands_behind_the_others() {
    let mut world = World::of(2, 0);
    world.pass(10_000);
    world.beat(&heartbeat("w1", "1", 1));
    world.pass(2_499);
    world.router.expire(world.now);
    assert_eq!(world.worker("w0").status, WorkerStatus::Online);
    world.pass(1);
    world.router.expire(world.now);
    assert_eq!([world.worker("w0").status, world.worker("w1").status], [WorkerStatus::Degraded, WorkerStatus::Online]);
    let leases: Vec<_> = (0..4).map(|_| world.select().unwrap()).collect();
    assert!(leases.iter().all(|lease| *lease.worker_id() == id("w1")));
    world.router.drain("w1", world.now);
    assert_eq!(*world.select().unwrap().worker_id(), id("w0"));
    world.beat(&heartbeat("w0", "1", 1));
    assert_eq!(world.worker("w0").status, WorkerStatus::Online);
}

#[test]
fn a_worker_that_was_offline_for_long_is_forgotten() {
    let mut world = World::of(1, 0);
    world.pass(15_000);
    world.router.expire(world.now);
    world.pass(20 * 15_000);
    world.router.expire(world.now);
    assert!(world.router.worker("w0", world.now).is_none());
    assert!(world.take_events().contains(&RouterEvent::WorkerRemoved { worker_id: id("w0") }));
    assert_eq!(world.beat(&heartbeat("w0", "1", 9)), HeartbeatVerdict::Unknown);
}

#[test]
fn case_31_a_workers_own_clock_means_nothing() {
    let mut world = World::of(1, 0);
    for sequence in 1..10 {
        world.pass(10_000);
        let mut wrong = heartbeat("w0", "1", sequence);
        wrong.timestamp = u64::MAX - sequence * 3_600_000;
        world.beat(&wrong);
        world.router.expire(world.now);
    }
    assert_eq!(world.router.online(), 1);
}

#[test]
fn case_32_the_new_incarnation_wins_and_the_old_one_is_not_heard() {
    let world = World::of(1, 0);
    let lease = world.select().unwrap();
    world.finish("w0", super::FAILURE, 5);
    assert_eq!(world.register(&registration("w0", "2", &["m"], 0)), Registered::Replaced);
    assert!(lease.gone().has_fired());
    assert_eq!(world.worker("w0").in_flight, 0);
    lease.end(super::FAILURE, world.now);
    assert_eq!((world.stats("w0").failure_count, world.worker("w0").in_flight), (0, 0));
    assert_eq!(world.beat(&heartbeat("w0", "1", 99)), HeartbeatVerdict::Ignored);
    let again = world.register(&registration("w0", "1", &["m"], 0));
    assert_eq!(again, Registered::Ignored(IgnoredBecause::Superseded));
    let replaced = RouterEvent::WorkerReplaced { worker_id: id("w0"), incarnation: "2".into(), previous: "1".into() };
    assert_eq!(world.take_events().iter().filter(|event| **event == replaced).count(), 1);
}

#[test]
fn sixteen_incarnations_are_remembered() {
    let world = World::new();
    for incarnation in 0..=17 {
        world.register(&registration("w0", &incarnation.to_string(), &["m"], 0));
    }
    assert_eq!(world.beat(&heartbeat("w0", "1", 1)), HeartbeatVerdict::Ignored);
    assert_eq!(world.beat(&heartbeat("w0", "0", 1)), HeartbeatVerdict::Unknown);
}

#[test]
fn one_that_leaves_again_and_again_makes_nobody_elses_past_forgotten() {
    let mut world = World::with(|settings| settings.max_workers = 2);
    world.join(0, 0);
    world.router.deregister(&id("w0"), world.now);
    world.router.expire(world.now);
    for _ in 0..3 {
        world.pass(100);
        world.join(1, 0);
        world.router.remove(&id("w1"));
    }
    assert_eq!(world.beat(&heartbeat("w0", "1", 1)), HeartbeatVerdict::Ignored);
}

#[test]
fn older_sequences_are_ignored() {
    let world = World::of(1, 0);
    let mut loading = heartbeat("w0", "1", 5);
    loading.phase = Phase::Loading;
    assert_eq!(world.beat(&loading), HeartbeatVerdict::Taken);
    assert_eq!(world.beat(&heartbeat("w0", "1", 4)), HeartbeatVerdict::Ignored);
    assert_eq!(world.worker("w0").phase, Phase::Loading);
}

#[test]
fn an_unknown_worker_or_incarnation_has_to_register() {
    let world = World::of(1, 0);
    assert_eq!(world.beat(&heartbeat("stranger", "1", 1)), HeartbeatVerdict::Unknown);
    assert_eq!(world.beat(&heartbeat("w0", "2", 1)), HeartbeatVerdict::Unknown);
    assert_eq!(world.router.online(), 1);
}

#[test]
fn a_full_fleet_takes_nobody_new() {
    let world = World::with(|settings| settings.max_workers = 2);
    (0..2).for_each(|number| world.join(number, 0));
    let full = world.register(&registration("w2", "1", &["m"], 0));
    assert_eq!(full, Registered::Ignored(IgnoredBecause::FleetFull));
    assert_eq!(world.beat(&heartbeat("w2", "1", 1)), HeartbeatVerdict::Ignored);
    assert_eq!(world.register(&registration("w1", "2", &["m"], 0)), Registered::Replaced);
}

#[test]
fn cases_35_and_36_a_deregistered_worker_finishes_what_it_has() {
    let mut world = World::of(2, 0);
    let running: Vec<_> = (0..100).map(|_| world.named("w0").unwrap()).collect();
    world.router.deregister(&id("w0"), world.now);
    assert_eq!((world.worker("w0").status, world.router.online()), (WorkerStatus::Draining, 1));
    assert!((0..10).all(|_| world.select().unwrap().worker_id().as_str() == "w1"));
    assert_eq!(world.beat(&heartbeat("w0", "1", 1)), HeartbeatVerdict::Ignored);
    let again = world.register(&registration("w0", "1", &["m"], 0));
    assert_eq!(again, Registered::Ignored(IgnoredBecause::Deregistered));
    world.pass(59_999);
    world.beat(&heartbeat("w1", "1", 1));
    world.router.expire(world.now);
    for lease in running {
        assert!(!lease.gone().has_fired());
        lease.end(Outcome::Success, world.now);
    }
    world.router.expire(world.now);
    assert!(world.router.worker("w0", world.now).is_none());
    assert_eq!(world.beat(&heartbeat("w0", "1", 2)), HeartbeatVerdict::Ignored);
    let again = world.register(&registration("w0", "1", &["m"], 0));
    assert_eq!(again, Registered::Ignored(IgnoredBecause::Deregistered));
    let told = world.take_events().into_iter().filter(|event| matches!(event, RouterEvent::WorkerDraining { .. }));
    assert_eq!(told.count(), 1);
    assert_eq!(world.register(&registration("w0", "2", &["m"], 0)), Registered::New);
}

#[test]
fn a_deregistered_worker_that_was_replaced_finishes_too_but_not_for_ever() {
    let mut world = World::of(1, 0);
    let running = world.select().unwrap();
    world.router.deregister(&id("w0"), world.now);
    assert_eq!(world.register(&registration("w0", "2", &["m"], 0)), Registered::Replaced);
    assert!(!running.gone().has_fired());
    assert_eq!(world.select().unwrap().incarnation(), "2");
    world.pass(60_000);
    world.router.expire(world.now);
    assert!(running.gone().has_fired());
}

#[test]
fn an_operator_drains_one_life_of_a_worker() {
    let mut world = World::of(1, 0);
    let running = world.select().unwrap();
    assert!(world.router.drain("w0", world.now) && !world.router.drain("nobody", world.now));
    world.pass(5_000);
    assert_eq!(world.beat(&heartbeat("w0", "1", 1)), HeartbeatVerdict::Taken);
    assert_eq!(world.register(&registration("w0", "1", &["m"], 0)), Registered::Renewed);
    assert_eq!(world.worker("w0").status, WorkerStatus::Draining);
    assert!(!running.gone().has_fired());
    world.register(&registration("w0", "2", &["m"], 0));
    assert!(world.select().is_ok());
}

#[test]
fn a_worker_that_says_it_drains_gets_nothing_new() {
    let world = World::of(1, 0);
    let mut draining = heartbeat("w0", "1", 1);
    draining.phase = Phase::Draining;
    world.beat(&draining);
    assert_eq!((world.worker("w0").status, world.router.online()), (WorkerStatus::Draining, 0));
}

#[test]
fn while_our_own_connection_is_down_nobody_goes_offline() {
    let mut world = World::of(2, 0);
    world.router.register(&registration("local", "1", &["m"], 0), Carrier::Local, world.now);
    let lease = world.named("w0").unwrap();
    world.router.freeze(world.now);
    world.pass(1_000_000);
    world.router.expire(world.now);
    world.router.thaw(world.now);
    world.router.expire(world.now);
    assert_eq!((world.router.online(), lease.gone().has_fired()), (3, false));
    assert!((0..4).all(|_| world.select().unwrap().worker_id().as_str() == "local"));
    assert_eq!(world.named("w0").unwrap_err(), Refusal::Full);
    world.beat(&heartbeat("w0", "1", 1));
    assert!(world.named("w0").is_ok());
    world.pass(15_000);
    world.router.expire(world.now);
    assert_eq!((world.router.online(), lease.gone().has_fired()), (1, true), "those who stay silent go");
}

#[test]
fn a_worker_that_is_looked_at_does_not_depend_on_our_connection() {
    let mut world = World::of(1, 0);
    world.router.register(&registration("http", "1", &["m"], 0), Carrier::Http, world.now);
    let lease = world.named("http").unwrap();
    world.router.freeze(world.now);
    world.pass(15_000);
    world.router.expire(world.now);
    assert_eq!((world.router.online(), lease.gone().has_fired()), (1, true), "silence says something of it alone");
    assert_eq!(world.router.register(&registration("http", "2", &["m"], 0), Carrier::Http, world.now), Registered::Replaced);
    world.router.thaw(world.now);
    assert_eq!(world.select().unwrap().worker_id().as_str(), "http", "it need not be heard from again");
}

#[test]
fn a_life_that_seems_to_be_over_gets_nothing_new_and_may_finish_until_it_is_silent() {
    let mut world = World::new();
    world.router.register(&registration("w", "1", &["m"], 0), Carrier::Http, world.now);
    let lease = world.select().unwrap();
    world.take_events();
    world.router.lost(&id("w"), "0", world.now);
    world.router.lost(&id("x"), "1", world.now);
    assert_eq!((world.router.online(), lease.gone().has_fired()), (1, false));
    for _ in 0..2 {
        world.router.lost(&id("w"), "1", world.now);
    }
    assert!(world.select().is_err());
    assert_eq!((world.router.online(), lease.gone().has_fired()), (0, false));
    assert_eq!(world.take_events(), [RouterEvent::WorkerOffline { worker_id: id("w") }]);
    world.pass(14_999);
    world.router.expire(world.now);
    assert!(!lease.gone().has_fired());
    world.pass(1);
    world.router.expire(world.now);
    assert!(lease.gone().has_fired());
}

#[test]
fn what_a_life_had_that_seemed_to_be_over_may_finish_beside_the_next_one() {
    let world = World::new();
    let register = |world: &World, incarnation: &str| {
        world.router.register(&registration("w", incarnation, &["m"], 0), Carrier::Http, world.now)
    };
    register(&world, "1");
    let lease = world.select().unwrap();
    world.router.lost(&id("w"), "1", world.now);
    assert_eq!(register(&world, "2"), Registered::Replaced);
    world.router.expire(world.now);
    assert_eq!((world.router.online(), lease.gone().has_fired()), (1, false));
    lease.end(Outcome::Success, world.now);
}

#[test]
fn a_local_worker_stays_until_it_is_removed() {
    let mut world = World::new();
    world.router.register(&registration("local", "1", &["m"], 0), Carrier::Local, world.now);
    world.pass(1_000_000);
    world.router.expire(world.now);
    let lease = world.select().unwrap();
    assert_eq!(lease.carrier(), Carrier::Local);
    world.router.remove(&id("local"));
    assert!(lease.gone().has_fired());
    assert_eq!((world.router.online(), world.router.snapshot(world.now).len()), (0, 0));
    let again = world.router.register(&registration("local", "1", &["m"], 0), Carrier::Local, world.now);
    assert_eq!(again, Registered::New);
}

#[test]
fn a_worker_of_the_older_dialect_is_known_by_its_heartbeats() {
    let mut world = World::new();
    let mut older = heartbeat("old", "", 0);
    older.metrics.models_loaded = vec!["m".into()];
    older.active_request_ids = None;
    assert_eq!(world.beat(&older), HeartbeatVerdict::Taken);
    assert_eq!(world.beat(&older), HeartbeatVerdict::Taken);
    let lease = world.select().unwrap();
    assert!(lease.is_legacy() && world.worker("old").legacy);
    world.router.lost(&id("old"), "", world.now);
    assert_eq!((world.router.online(), lease.gone().has_fired()), (1, false), "nobody looked at it");
    world.router.deregister(&id("old"), world.now);
    lease.end(Outcome::Success, world.now);
    world.router.expire(world.now);
    assert_eq!(world.beat(&older), HeartbeatVerdict::Ignored, "it says good-bye before it falls silent");
    world.pass(15_000);
    world.router.expire(world.now);
    assert!(world.router.worker("old", world.now).is_none());
    let mut restarted = registration("old", "", &["m"], 0);
    restarted.protocol = None;
    assert_eq!(world.register(&restarted), Registered::New);
    let lease = world.select().unwrap();
    assert_eq!(world.register(&restarted), Registered::Replaced, "it registers at its start only");
    assert!(lease.gone().has_fired());
}

#[test]
fn a_worker_of_the_older_dialect_serves_what_it_loads_later() {
    let mut world = World::new();
    let mut older = heartbeat("old", "", 0);
    world.beat(&older);
    assert_eq!(world.select().unwrap_err(), Refusal::ModelNotFound);
    older.metrics.models_loaded = vec!["m".into()];
    world.beat(&older);
    assert_eq!(world.select().unwrap().worker_id().as_str(), "old");
    older.metrics.models_loaded.clear();
    world.pass(1_000);
    world.beat(&older);
    assert!(world.select().is_ok(), "what it has unloaded it can load again");
    assert_eq!(world.worker("old").models, ["m"]);
}

#[test]
fn a_worker_of_the_older_dialect_that_left_stays_away_while_it_still_beats() {
    let mut world = World::new();
    let mut older = heartbeat("old", "", 0);
    older.metrics.models_loaded = vec!["m".into()];
    world.beat(&older);
    let lease = world.select().unwrap();
    world.router.deregister(&id("old"), world.now);
    for _ in 0..12 {
        assert!(!lease.gone().has_fired(), "its requests have 60 s to finish");
        world.pass(5_000);
        world.beat(&older);
        world.router.expire(world.now);
    }
    assert!(lease.gone().has_fired());
    drop(lease);
    world.pass(5_000);
    assert_eq!((world.beat(&older), world.router.online()), (HeartbeatVerdict::Ignored, 0));
}

#[test]
fn the_observer_may_use_the_router() {
    let known: Arc<OnceLock<Arc<Router>>> = Arc::default();
    let inside = known.clone();
    let settings = RouterSettings::try_from(&super::ClusterConfig::default()).unwrap();
    let now = tokio::time::Instant::now();
    let observer = move |_| {
        let router = inside.get().unwrap();
        drop((router.snapshot(now), router.online(), router.breaker_stats(now), router.select(&ANY, now)));
    };
    let router = Router::new(settings, 1, Box::new(observer));
    assert!(known.set(router.clone()).is_ok());
    router.register(&registration("w0", "1", &["m"], 0), Carrier::Nats, now);
    for _ in 0..5 {
        router.select(&ANY, now).unwrap().end(super::FAILURE, now);
    }
    router.deregister(&id("w0"), now);
    router.remove(&id("w0"));
}

#[test]
fn case_34_the_share_of_a_worker_that_comes_and_goes_falls() {
    let mut world = World::of(2, 1);
    let mut shares = Vec::new();
    for incarnation in 2..20 {
        world.register(&registration("w0", &incarnation.to_string(), &["m"], 1));
        let mut share = 0;
        for _ in 0..20 {
            world.pass(100);
            world.router.expire(world.now);
            world.beat(&heartbeat("w1", "1", 1));
            share += u32::from(world.select().unwrap().worker_id().as_str() == "w0");
        }
        shares.push(share);
    }
    assert_eq!(shares[..5], [10, 10, 6, 1, 0], "two returns are free, then it is held for 1 s, 2 s, 4 s");
    assert!(shares[5..].iter().all(|share| *share == 0), "{shares:?}");
    let busy = world.named("w1").unwrap();
    assert_eq!(world.select().unwrap().worker_id().as_str(), "w0", "better than nobody");
    world.beat(&heartbeat("w0", "19", 1));
    assert_eq!((world.router.online(), world.worker("w0").status), (2, WorkerStatus::Online));
    for sequence in 2..100 {
        world.pass(5_000);
        world.beat(&heartbeat("w0", "19", sequence));
        world.beat(&heartbeat("w1", "1", sequence));
        world.router.expire(world.now);
    }
    world.register(&registration("w0", "20", &["m"], 1));
    drop(busy);
    let both: Vec<_> = (0..2).map(|_| world.select().unwrap().worker_id().to_string()).collect();
    assert_ne!(both[0], both[1], "calm is forgiven");
}
