//! Workers of a higher priority come first, whatever the strategy, as long as one of them is free.

use mlx_serving_router::config::Strategy;
use mlx_serving_router::routing::{Choice, LeftOut};
use mlx_serving_router::wire::WorkerStatus;

use super::{ANY, FAILURE, Query, World, heartbeat, id, registration};

const STRATEGIES: [Strategy; 6] = [
    Strategy::RoundRobin,
    Strategy::LeastRequests,
    Strategy::WeightedRandom,
    Strategy::SkillsBased,
    Strategy::PeakEwma,
    Strategy::PrefixAware,
];

/// Six workers, of which `w1` and `w4` have priority 50 and `w2` has 100; each holds so many requests.
fn world(strategy: Strategy, capacity: u32) -> World {
    let world = World::with(|settings| {
        settings.strategy = strategy;
        settings.priorities = [("w1", 50), ("w4", 50), ("w2", 100)].map(|(id, priority)| (id.to_owned(), priority)).into();
    });
    (0..6).for_each(|number| world.join(number, capacity));
    world
}

#[test]
fn those_of_a_lower_priority_wait_for_the_higher_ones_to_be_full() {
    for strategy in STRATEGIES {
        let world = world(strategy, 2);
        let leases: Vec<_> = (0..12).map(|_| world.select().unwrap()).collect();
        let mut names: Vec<&str> = leases.iter().map(|lease| lease.worker_id().as_str()).collect();
        names[2..6].sort_unstable();
        names[6..].sort_unstable();
        let wanted = ["w2", "w2", "w1", "w1", "w4", "w4", "w0", "w0", "w3", "w3", "w5", "w5"];
        assert_eq!(names, wanted, "{strategy:?}");
        assert!(world.select().is_err());
    }
}

#[test]
fn new_sessions_begin_among_the_highest_and_stay_where_they_are() {
    let world = world(Strategy::LeastRequests, 1);
    let first = world.select_for("s");
    assert_eq!((first.worker_id().as_str(), first.choice()), ("w2", Choice::Rendezvous));
    // One that began elsewhere, for want of a place, belongs there.
    let second = world.select_for("t");
    let place = second.worker_id().clone();
    assert!(["w1", "w4"].contains(&place.as_str()));
    drop((first, second));
    let again = world.select_for("t");
    assert_eq!((again.worker_id(), again.choice()), (&place, Choice::Affinity));
}

#[test]
fn one_that_failed_or_whose_breaker_is_open_is_passed_over() {
    let world = world(Strategy::LeastRequests, 0);
    let excluded = [id("w2")];
    let next = world.query(&Query { exclude: &excluded, ..ANY }).unwrap();
    assert!(["w1", "w4"].contains(&next.worker_id().as_str()));
    let reasons = next.left_out(&Query { exclude: &excluded, ..ANY }, world.now);
    let reason = |worker: &str| reasons.iter().find(|(name, _)| name.as_str() == worker).map(|(_, why)| *why);
    assert_eq!((reason("w2"), reason("w0")), (Some(LeftOut::Tried), Some(LeftOut::LowerPriority)));
    assert_eq!([reason("w1"), reason("w4")], [None, None]);
    drop(next);
    world.finish("w2", FAILURE, 5);
    assert_ne!(world.select().unwrap().worker_id().as_str(), "w2");
}

#[test]
fn one_that_is_degraded_comes_after_those_who_are_not() {
    let world = world(Strategy::LeastRequests, 1);
    let mut degraded = heartbeat("w2", "1", 1);
    degraded.status = WorkerStatus::Degraded;
    world.beat(&degraded);
    let leases: Vec<_> = (0..6).map(|_| world.select().unwrap()).collect();
    assert_eq!(leases[5].worker_id().as_str(), "w2");
}

#[test]
fn priorities_concern_those_who_serve_the_model() {
    let world = world(Strategy::LeastRequests, 0);
    world.register(&registration("x", "1", &["other"], 0));
    let other = Query { model_id: "other", ..ANY };
    assert_eq!(world.query(&other).unwrap().worker_id().as_str(), "x");
}
