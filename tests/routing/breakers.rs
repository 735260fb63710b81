//! A worker that fails is left alone, and tried again with care.

use std::sync::Barrier;
use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::error::ControllerErrorCode;
use mlx_serving_router::routing::{BreakerReason, CircuitState, Outcome, Refusal, RouterEvent, RouterSettings};

use super::{ANY, FAILURE, World};

const OVERLOADED: Outcome = Outcome::Failure(ControllerErrorCode::WorkerOverloaded);

fn transitions(world: &World) -> Vec<(CircuitState, CircuitState, BreakerReason)> {
    let changed = |event| match event {
        RouterEvent::BreakerChanged { from, to, reason, .. } => Some((from, to, reason)),
        _ => None,
    };
    world.take_events().into_iter().filter_map(changed).collect()
}

#[test]
fn consecutive_failures_open_it_and_two_probes_close_it() {
    let mut world = World::of(1, 0);
    for _ in 0..4 {
        assert!(!world.select().unwrap().end(FAILURE, world.now));
    }
    assert!(world.select().unwrap().end(FAILURE, world.now), "the fifth opens it");
    assert!(matches!(world.select(), Err(Refusal::NoHealthyWorkers { .. })));
    let wait = world.stats("w0").retry_after.unwrap();
    assert!((24_000..=36_000).contains(&wait.as_millis()), "{wait:?}");
    world.now += wait;
    assert_eq!(world.state("w0"), CircuitState::HalfOpen);
    for _ in 0..2 {
        assert_eq!(world.state("w0"), CircuitState::HalfOpen);
        assert!(!world.select().unwrap().end(Outcome::Success, world.now));
    }
    assert_eq!(world.state("w0"), CircuitState::Closed);
    assert_eq!(
        transitions(&world),
        [
            (CircuitState::Closed, CircuitState::Open, BreakerReason::ConsecutiveFailures),
            (CircuitState::Open, CircuitState::HalfOpen, BreakerReason::TimeoutPassed),
            (CircuitState::HalfOpen, CircuitState::Closed, BreakerReason::ProbesSucceeded),
        ]
    );
}

#[test]
fn a_success_ends_a_run_of_failures() {
    let world = World::of(1, 0);
    for _ in 0..2 {
        world.finish("w0", FAILURE, 4);
        world.finish("w0", Outcome::Success, 12);
    }
    assert_eq!(world.state("w0"), CircuitState::Closed);
}

#[test]
fn case_14_every_second_request_fails_and_the_rate_opens_it() {
    let world = World::of(1, 0);
    for _ in 0..5 {
        assert_eq!(world.state("w0"), CircuitState::Closed);
        world.finish("w0", Outcome::Success, 1);
        world.finish("w0", FAILURE, 1);
    }
    assert_eq!(world.state("w0"), CircuitState::Open);
    assert_eq!(transitions(&world), [(CircuitState::Closed, CircuitState::Open, BreakerReason::FailureRate)]);
}

#[test]
fn shares_are_compared_exactly() {
    let world = World::with(|settings| {
        let breaker = settings.breaker.as_mut().unwrap();
        (breaker.failure_rate, breaker.minimum_requests, breaker.max_open) = (28.0 / 100.0, 25, 70.0 / 100.0);
    });
    (0..10).for_each(|number| world.join(number, 0));
    for worker in (0..7).map(|number| format!("w{number}")) {
        world.finish(&worker, FAILURE, 4);
        world.finish(&worker, Outcome::Success, 18);
        world.finish(&worker, FAILURE, 2);
        assert_eq!(world.state(&worker), CircuitState::Closed);
        world.finish(&worker, FAILURE, 1);
        assert_eq!(world.state(&worker), CircuitState::Open, "7 of 25 are 28 %");
    }
    let leases: Vec<_> = (0..30).map(|_| world.select().unwrap()).collect();
    let admitted = |worker: &str| world.state(worker) == CircuitState::Closed;
    assert!(leases.iter().all(|lease| admitted(lease.worker_id())), "7 of 10 are not more than 70 %");
}

#[test]
fn what_has_left_the_window_does_not_open_it() {
    let mut world = World::of(1, 0);
    for _ in 0..4 {
        world.finish("w0", FAILURE, 1);
        world.finish("w0", Outcome::Success, 1);
    }
    world.pass(60_000);
    world.finish("w0", FAILURE, 4);
    assert_eq!(world.state("w0"), CircuitState::Closed);
    assert_eq!(world.stats("w0").window_requests, 4);
}

#[test]
fn refusals_for_want_of_room_count_for_the_rate_alone() {
    let mut world = World::of(1, 0);
    world.finish("w0", OVERLOADED, 9);
    assert_eq!(world.state("w0"), CircuitState::Closed);
    world.finish("w0", OVERLOADED, 1);
    assert_eq!(world.state("w0"), CircuitState::Open);
    world.now += world.stats("w0").retry_after.unwrap();
    world.finish("w0", OVERLOADED, 3);
    assert_eq!(world.state("w0"), CircuitState::HalfOpen, "a probe that is refused proves nothing");
}

#[test]
fn case_15_client_errors_and_cancellations_open_nothing() {
    let world = World::of(1, 0);
    for code in ControllerErrorCode::ALL {
        let ignored = [
            ControllerErrorCode::RequestValidationFailed,
            ControllerErrorCode::InvalidSessionId,
            ControllerErrorCode::PayloadTooLarge,
            ControllerErrorCode::Cancelled,
            ControllerErrorCode::NatsError,
            ControllerErrorCode::ModelLoadFailed,
            ControllerErrorCode::ModelNotFound,
        ];
        if ignored.contains(&code) {
            world.finish("w0", Outcome::Failure(code), 1_000);
        }
    }
    world.finish("w0", Outcome::Ignored, 1_000);
    for _ in 0..1_000 {
        drop(world.select().unwrap());
    }
    let stats = world.stats("w0");
    assert_eq!((stats.state, stats.failure_count, stats.window_requests), (CircuitState::Closed, 0, 0));
}

#[test]
fn case_18_of_a_thousand_callers_at_half_open_one_passes() {
    let mut world = World::of(1, 0);
    world.half_open("w0");
    let start = Barrier::new(8);
    let admitted: Vec<_> = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    (0..125).filter_map(|_| world.select().ok()).collect::<Vec<_>>()
                })
            })
            .collect();
        callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect()
    });
    assert_eq!(admitted.len(), 1);
    assert_eq!(world.stats("w0").probes, 1);
    assert_eq!(world.worker("w0").in_flight, 1);
    assert_eq!(transitions(&world).len(), 2, "half-open is told once");
}

#[test]
fn case_17_a_cancelled_probe_leaves_its_place_to_the_next() {
    let mut world = World::of(1, 0);
    world.half_open("w0");
    for _ in 0..100 {
        let probe = world.select().unwrap();
        assert!(world.select().is_err());
        drop(probe);
        world.select().unwrap().end(Outcome::Ignored, world.now);
    }
    assert_eq!((world.state("w0"), world.stats("w0").probes), (CircuitState::HalfOpen, 0));
}

#[test]
fn case_19_results_from_before_a_transition_change_nothing() {
    let mut world = World::of(1, 0);
    let early: Vec<_> = (0..20).map(|_| world.select().unwrap()).collect();
    world.finish("w0", FAILURE, 5);
    let opened = world.stats("w0");
    let mut early = early.into_iter();
    for lease in early.by_ref().take(5) {
        lease.end(Outcome::Success, world.now);
    }
    for lease in early.by_ref().take(5) {
        assert!(!lease.end(FAILURE, world.now));
    }
    assert_eq!(world.stats("w0"), opened);
    world.now += opened.retry_after.unwrap();
    let probe = world.select().unwrap();
    for lease in early.by_ref().take(5) {
        lease.first_token(Duration::from_millis(1), world.now);
        lease.end(Outcome::Success, world.now);
    }
    for lease in early {
        lease.end(FAILURE, world.now);
    }
    assert_eq!((world.state("w0"), world.stats("w0").probes), (CircuitState::HalfOpen, 1));
    probe.end(Outcome::Success, world.now);
    assert_eq!(world.stats("w0").success_count, 1);
}

#[test]
fn the_first_token_is_the_probes_success_and_a_later_break_its_failure() {
    let mut world = World::of(1, 0);
    world.half_open("w0");
    let first = world.select().unwrap();
    assert!(world.select().is_err());
    first.first_token(Duration::from_millis(5), world.now);
    assert_eq!(world.state("w0"), CircuitState::HalfOpen);
    let second = world.select().expect("the first token frees the place");
    assert!(first.end(Outcome::Failure(ControllerErrorCode::StreamInterrupted), world.now), "it opens again");
    assert_eq!(world.state("w0"), CircuitState::Open);
    second.first_token(Duration::from_millis(5), world.now);
    second.end(Outcome::Success, world.now);
    assert_eq!(world.state("w0"), CircuitState::Open);
}

#[test]
fn a_probes_success_counts_once() {
    let mut world = World::of(1, 0);
    world.half_open("w0");
    let probe = world.select().unwrap();
    probe.first_token(Duration::from_millis(5), world.now);
    probe.first_token(Duration::from_millis(6), world.now);
    probe.end(Outcome::Success, world.now);
    assert_eq!((world.state("w0"), world.stats("w0").success_count), (CircuitState::HalfOpen, 1));
}

#[test]
fn the_time_to_be_open_doubles_up_to_its_limit_and_shrinks_in_calm() {
    let mut world = World::of(1, 0);
    let within = |world: &World, seconds: u64| {
        let wait = world.stats("w0").retry_after.unwrap().as_secs_f64() / seconds as f64;
        assert!((0.8..=1.2).contains(&wait), "{wait} of {seconds}");
    };
    world.half_open("w0");
    for seconds in [60, 120, 240, 300, 300] {
        world.finish("w0", FAILURE, 1);
        within(&world, seconds);
        world.now += world.stats("w0").retry_after.unwrap();
    }
    // Growth beyond the limit would only delay forgiveness: 2⁴ is the first factor that reaches it.
    world.finish("w0", Outcome::Success, 2);
    world.pass(30_000 * 3);
    world.finish("w0", FAILURE, 5);
    within(&world, 60);
    world.now += world.stats("w0").retry_after.unwrap();
    world.finish("w0", Outcome::Success, 2);
    world.pass(30_000);
    world.finish("w0", FAILURE, 5);
    within(&world, 30);
}

#[test]
fn reading_changes_nothing() {
    let mut world = World::of(1, 0);
    world.half_open("w0");
    world.take_events();
    for _ in 0..10 {
        assert_eq!(world.state("w0"), CircuitState::HalfOpen);
        assert_eq!(world.worker("w0").breaker, CircuitState::HalfOpen);
    }
    assert_eq!(world.take_events(), []);
    world.router.expire(world.now);
    world.router.expire(world.now);
    assert_eq!(transitions(&world), [(CircuitState::Open, CircuitState::HalfOpen, BreakerReason::TimeoutPassed)]);
    assert_eq!(world.stats("w0").opened_count, 1);
}

#[test]
fn the_operator_opens_and_resets() {
    let mut world = World::of(2, 0);
    let running = world.named("w0").unwrap();
    assert!(world.router.force_open_breaker("w0", world.now));
    assert_eq!(world.state("w0"), CircuitState::ForcedOpen);
    world.pass(1_000_000);
    assert!((0..10).all(|_| world.select().unwrap().worker_id().as_str() == "w1"));
    assert!(matches!(world.named("w0"), Err(Refusal::CircuitOpen { .. })));
    running.end(Outcome::Success, world.now);
    assert_eq!(world.state("w0"), CircuitState::ForcedOpen);
    assert!(world.router.reset_breaker("w0", world.now));
    let stats = world.stats("w0");
    assert_eq!((stats.state, stats.failure_count, stats.success_count), (CircuitState::Closed, 0, 0));
    assert!(!world.router.reset_breaker("nobody", world.now) && !world.router.force_open_breaker("nobody", world.now));
}

#[test]
fn slow_first_tokens_open_it_where_that_is_wanted() {
    let world = World::with(|settings| {
        settings.breaker.as_mut().unwrap().slow_first_token = Some(Duration::from_millis(500));
    });
    world.join(0, 0);
    for number in 0..10 {
        let lease = world.select().unwrap();
        lease.first_token(Duration::from_millis(if number % 2 == 0 { 501 } else { 500 }), world.now);
        lease.end(Outcome::Success, world.now);
    }
    assert_eq!(transitions(&world), [(CircuitState::Closed, CircuitState::Open, BreakerReason::SlowFirstTokens)]);
}

#[test]
fn without_breakers_nobody_is_left_alone() {
    let world = World::with(|settings| settings.breaker = None);
    world.join(0, 0);
    world.finish("w0", FAILURE, 100);
    assert!(world.query(&ANY).is_ok());
    assert_eq!(world.worker("w0").breaker, CircuitState::Disabled);
    assert_eq!(world.router.breaker_stats(world.now), []);
    assert!(!world.router.force_open_breaker("w0", world.now));
}

#[test]
fn settings_that_cannot_be_followed_are_refused_by_name() {
    let field = |change: fn(&mut ClusterConfig)| {
        let mut config = ClusterConfig::default();
        change(&mut config);
        let error = RouterSettings::try_from(&config).unwrap_err();
        error.context()["field"].as_str().unwrap().to_owned()
    };
    let weights = |config: &mut ClusterConfig| config.load_balancing.weights = [("w0".into(), -1.0)].into();
    assert_eq!(field(weights), "loadBalancing.weights.w0");
}

#[test]
fn case_22_panic_mode_ignores_the_rate_but_not_a_run_of_failures() {
    let mut world = World::with(|settings| settings.worker_offline_timeout = Duration::from_secs(3_600));
    (0..4).for_each(|number| world.join(number, 0));
    let by_rate = |world: &World, worker: &str| {
        for _ in 0..5 {
            world.finish(worker, Outcome::Success, 1);
            world.finish(worker, FAILURE, 1);
        }
        assert_eq!(world.state(worker), CircuitState::Open);
    };
    let taken = |world: &World| {
        let leases: Vec<_> = (0..4).map(|_| world.select().unwrap()).collect();
        let mut workers: Vec<_> = leases.iter().map(|lease| lease.worker_id().to_string()).collect();
        workers.sort_unstable();
        workers.dedup();
        workers
    };
    by_rate(&world, "w0");
    by_rate(&world, "w1");
    assert_eq!(taken(&world), ["w2", "w3"], "half of them are admitted");
    world.finish("w2", FAILURE, 5);
    assert_eq!(taken(&world), ["w0", "w1", "w3"], "too few are, and the rate counts no more");
    let opened = world.stats("w0");
    for _ in 0..20 {
        world.select().unwrap().end(FAILURE, world.now);
    }
    assert_eq!(world.stats("w0"), opened, "what panic mode let through says nothing");
    world.now += ["w0", "w1"].map(|worker| world.stats(worker).retry_after.unwrap()).into_iter().max().unwrap();
    world.router.expire(world.now);
    for worker in ["w0", "w1"] {
        world.finish(worker, Outcome::Success, 2);
    }
    world.router.reset_breaker("w3", world.now);
    world.router.force_open_breaker("w2", world.now);
    world.router.expire(world.now);
    assert_eq!(taken(&world), ["w0", "w1", "w3"]);
}
