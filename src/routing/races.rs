//! Threads that meet at permits, counts and guards, in many orders (feature `shuttle`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use shuttle::thread;
use tokio::time::Instant;

use super::{
    BreakerReason, BreakerSettings, Carrier, Choice, CircuitState, Lease, Outcome, Query, Refusal, Registered, Router,
    RouterEvent, RouterSettings,
};
use crate::config::ClusterConfig;
use crate::error::ControllerErrorCode;
use crate::sync::explore;
use crate::wire::{Capacity, Registration, Skills, WorkerId, WorkerStatus};

const ORDERS: usize = 500;
const FAILURE: Outcome = Outcome::Failure(ControllerErrorCode::WorkerUnavailable);
const ANY: Query<'static> =
    Query { model_id: "m", session_id: None, exclude: &[], carrier: None, unable: &[], worker_id: None, prompt: None };

/// A router, and what its observer was told. It is only asked at one moment.
struct World {
    router: Arc<Router>,
    told: Arc<parking_lot::Mutex<Vec<RouterEvent>>>,
    now: Instant,
}

impl World {
    fn new(change: impl FnOnce(&mut RouterSettings, &mut BreakerSettings)) -> Arc<Self> {
        let mut settings = RouterSettings::try_from(&ClusterConfig::default()).unwrap();
        let mut breaker = settings.breaker.take().unwrap();
        change(&mut settings, &mut breaker);
        settings.breaker = Some(breaker);
        let told: Arc<parking_lot::Mutex<Vec<_>>> = Arc::default();
        let told_to = told.clone();
        let router = Router::new(settings, 7, Box::new(move |event| told_to.lock().push(event)));
        Arc::new(Self { router, told, now: Instant::now() })
    }

    fn with_one(room: u32) -> Arc<Self> {
        let world = Self::new(|_, breaker| breaker.failure_threshold = 2);
        world.register("w0", "1", room);
        world
    }

    /// With a breaker that is open by failures, at the moment when it becomes half-open.
    fn half_open(change: impl FnOnce(&mut BreakerSettings)) -> Arc<Self> {
        let world = Self::new(|_, breaker| {
            breaker.failure_threshold = 1;
            change(breaker);
        });
        world.register("w0", "1", 0);
        world.router.select(&ANY, world.now).unwrap().end(FAILURE, world.now);
        let now = world.now + world.router.breaker_stats(world.now)[0].1.retry_after.unwrap();
        world.told.lock().clear();
        Arc::new(Self { router: world.router.clone(), told: world.told.clone(), now })
    }

    fn register(&self, worker: &str, incarnation: &str, room: u32) -> Registered {
        let registration = Registration {
            protocol: Some(1),
            worker_id: WorkerId::new(worker).unwrap(),
            incarnation: incarnation.into(),
            hostname: String::new(),
            ip: String::new(),
            port: 0,
            skills: Skills { available_models: vec!["m".into()], ..Skills::default() },
            capacity: Capacity { max_concurrent: room, ..Capacity::default() },
            features: Vec::new(),
            status: WorkerStatus::Online,
            timestamp: 0,
        };
        self.router.register(&registration, Carrier::Local, self.now)
    }

    fn select(&self) -> Result<Lease, Refusal> {
        self.router.select(&ANY, self.now)
    }

    fn in_flight(&self) -> u32 {
        self.router.snapshot(self.now).iter().map(|worker| worker.in_flight).sum()
    }

    fn probes(&self) -> u32 {
        self.router.breaker_stats(self.now).iter().map(|(_, stats)| stats.probes).sum()
    }

    fn state(&self) -> CircuitState {
        self.router.breaker_stats(self.now)[0].1.state
    }

    fn transitions(&self) -> Vec<(CircuitState, CircuitState, BreakerReason)> {
        let change = |event: &RouterEvent| match event {
            RouterEvent::BreakerChanged { from, to, reason, .. } => Some((*from, *to, *reason)),
            _ => None,
        };
        self.told.lock().iter().filter_map(change).collect()
    }
}

/// Runs something in so many threads at once, and gives what each of them gives.
fn threads<T: Send + 'static>(count: usize, run: impl Fn(usize) -> T + Send + Sync + 'static) -> Vec<T> {
    let run = Arc::new(run);
    let start = |number| {
        let run = run.clone();
        thread::spawn(move || run(number))
    };
    (0..count).map(start).collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// How many hold something at a time.
#[derive(Default)]
struct Held {
    now: AtomicU32,
    most: AtomicU32,
}

impl Held {
    fn one_more(&self) {
        self.most.fetch_max(self.now.fetch_add(1, SeqCst) + 1, SeqCst);
    }

    fn one_less(&self) {
        self.now.fetch_sub(1, SeqCst);
    }
}

// === permits ===

#[test]
fn as_many_probes_pass_as_there_are_permits_and_half_open_is_told_once() {
    explore(ORDERS, || {
        let world = World::half_open(|breaker| breaker.half_open_requests = 2);
        let asked = world.clone();
        let leases = threads(4, move |_| asked.select().ok());
        assert_eq!((leases.iter().flatten().count(), world.probes(), world.in_flight()), (2, 2, 2));
        assert_eq!(world.transitions(), [(CircuitState::Open, CircuitState::HalfOpen, BreakerReason::TimeoutPassed)]);
        drop(leases);
        assert_eq!((world.probes(), world.in_flight()), (0, 0));
    });
}

#[test]
fn probes_that_are_dropped_or_say_nothing_make_room_for_others() {
    explore(ORDERS, || {
        let world = World::half_open(|_| {});
        let held = Arc::new(Held::default());
        let (asked, count) = (world.clone(), held.clone());
        threads(3, move |number| {
            for _ in 0..2 {
                if let Ok(lease) = asked.select() {
                    count.one_more();
                    thread::yield_now();
                    count.one_less();
                    let outcomes = [Outcome::Ignored, Outcome::Failure(ControllerErrorCode::WorkerOverloaded)];
                    if let Some(outcome) = outcomes.get(number) {
                        lease.end(*outcome, asked.now);
                    }
                }
            }
        });
        assert_eq!(held.most.load(SeqCst), 1, "one probe at a time");
        assert_eq!((world.state(), world.probes(), world.in_flight()), (CircuitState::HalfOpen, 0, 0));
        assert!(world.select().is_ok(), "the place is free again");
    });
}

#[test]
fn of_two_probes_the_first_to_end_decides() {
    explore(ORDERS, || {
        let world = World::half_open(|breaker| {
            (breaker.half_open_requests, breaker.success_threshold) = (2, 1);
        });
        let leases = [world.select().unwrap(), world.select().unwrap()];
        world.told.lock().clear();
        let leases = leases.map(|lease| parking_lot::Mutex::new(Some(lease)));
        let asked = world.clone();
        let opened = threads(2, move |number| {
            let lease = leases[number].lock().take().unwrap();
            lease.end(if number == 0 { Outcome::Success } else { FAILURE }, asked.now)
        });
        let transitions = world.transitions();
        assert_eq!(transitions.len(), 1, "{transitions:?}");
        let (_, to, _) = transitions[0];
        assert_eq!((world.state(), opened), (to, vec![false, to == CircuitState::Open]));
    });
}

#[test]
fn the_first_token_of_a_probe_frees_its_permit_once() {
    explore(ORDERS, || {
        let world = World::half_open(|breaker| breaker.success_threshold = 4);
        let lease = Arc::new(world.select().unwrap());
        let (asked, probe) = (world.clone(), lease.clone());
        let others = threads(3, move |number| {
            if number < 2 {
                probe.first_token(Duration::from_millis(1), asked.now);
                return None;
            }
            asked.select().ok()
        });
        assert_eq!(world.probes() as usize, others.iter().flatten().count());
        assert_eq!(world.router.breaker_stats(world.now)[0].1.success_count, 1);
        let lease = Arc::into_inner(lease).unwrap();
        lease.end(Outcome::Success, world.now);
        drop(others);
        assert_eq!((world.probes(), world.router.breaker_stats(world.now)[0].1.success_count), (0, 1));
    });
}

// === epochs ===

#[test]
fn failures_that_race_open_a_breaker_once_and_those_that_come_late_say_nothing() {
    explore(ORDERS, || {
        let world = World::with_one(0);
        let asked = world.clone();
        let opened = threads(4, move |_| asked.select().is_ok_and(|lease| lease.end(FAILURE, asked.now)));
        let stats = world.router.breaker_stats(world.now)[0].1.clone();
        assert_eq!(opened.iter().filter(|opened| **opened).count(), 1, "one of them is told that it did");
        assert_eq!((stats.state, stats.failure_count, stats.opened_count), (CircuitState::Open, 2, 1));
        assert_eq!(world.transitions(), [(CircuitState::Closed, CircuitState::Open, BreakerReason::ConsecutiveFailures)]);
        assert_eq!(world.in_flight(), 0);
    });
}

#[test]
fn what_passed_a_closed_breaker_says_nothing_after_it_was_opened() {
    explore(ORDERS, || {
        let world = World::with_one(0);
        let asked = world.clone();
        threads(3, move |number| match number {
            0 => {
                asked.router.force_open_breaker("w0", asked.now);
                let refused = asked.select();
                assert!(refused.is_err(), "whoever comes after that is refused");
            }
            _ => drop(asked.select().map(|lease| lease.end(Outcome::Success, asked.now))),
        });
        let stats = world.router.breaker_stats(world.now)[0].1.clone();
        assert_eq!((stats.state, world.in_flight()), (CircuitState::ForcedOpen, 0));
        assert!(stats.success_count <= 2);
        assert_eq!(world.transitions().len(), 1);
        world.router.reset_breaker("w0", world.now);
        let lease = world.select().unwrap();
        assert_eq!(world.probes(), 0);
        drop(lease);
    });
}

#[test]
fn a_reset_makes_what_began_before_it_count_for_nothing() {
    explore(ORDERS, || {
        let world = World::half_open(|breaker| breaker.half_open_requests = 2);
        let leases = [world.select().unwrap(), world.select().unwrap()].map(|lease| parking_lot::Mutex::new(Some(lease)));
        let asked = world.clone();
        threads(3, move |number| match number {
            2 => {
                asked.router.reset_breaker("w0", asked.now);
            }
            _ => {
                let lease = leases[number].lock().take().unwrap();
                lease.end(FAILURE, asked.now);
            }
        });
        let stats = world.router.breaker_stats(world.now)[0].1.clone();
        assert_eq!((stats.state, stats.failure_count, stats.probes), (CircuitState::Closed, 0, 0));
        let lease = world.select().unwrap();
        lease.end(Outcome::Success, world.now);
        assert_eq!((world.router.breaker_stats(world.now)[0].1.success_count, world.in_flight()), (1, 0));
    });
}

#[test]
fn becoming_half_open_by_the_clock_and_by_a_caller_is_told_once() {
    explore(ORDERS, || {
        let world = World::half_open(|_| {});
        let asked = world.clone();
        let leases = threads(3, move |number| {
            if number < 2 {
                asked.select().ok()
            } else {
                asked.router.expire(asked.now);
                None
            }
        });
        assert_eq!(leases.iter().flatten().count(), 1);
        assert_eq!(world.transitions().len(), 1);
    });
}

#[test]
fn panic_mode_sees_a_breaker_that_opens_while_others_are_looked_at() {
    explore(ORDERS, || {
        let world = World::new(|_, breaker| (breaker.minimum_requests, breaker.max_open) = (1, 0.0));
        world.register("w0", "1", 0);
        let asked = world.clone();
        threads(3, move |number| {
            if number == 0 {
                assert!(asked.select().unwrap().end(FAILURE, asked.now), "all that ended failed");
            } else {
                asked.router.expire(asked.now);
            }
        });
        assert_eq!(world.state(), CircuitState::Open);
        assert!(world.select().is_ok(), "the failure rate keeps nobody out of a fleet of one");
    });
}

// === counts ===

#[test]
fn nobody_gets_more_requests_than_it_has_room_for_and_all_come_back() {
    explore(ORDERS, || {
        let world = World::with_one(2);
        let held = Arc::new(Held::default());
        let (asked, count) = (world.clone(), held.clone());
        threads(4, move |number| {
            for _ in 0..2 {
                if let Ok(lease) = asked.select() {
                    count.one_more();
                    assert!(asked.in_flight() <= 2);
                    count.one_less();
                    if number % 2 == 0 {
                        lease.end(Outcome::Success, asked.now);
                    }
                }
            }
        });
        assert!(held.most.load(SeqCst) <= 2);
        assert_eq!(world.in_flight(), 0);
        let leases = [world.select(), world.select(), world.select()];
        assert_eq!(leases.iter().filter(|lease| lease.is_ok()).count(), 2);
    });
}

#[test]
fn a_place_that_becomes_free_reaches_who_watches_for_it() {
    explore(ORDERS, || {
        let world = World::with_one(1);
        let asked = world.clone();
        // A caller that missed the only place which becomes free would wait for ever; shuttle sees that.
        threads(3, move |_| {
            let lease = shuttle::future::block_on(find(&asked));
            drop(lease);
        });
        assert_eq!(world.in_flight(), 0);
    });
}

async fn find(world: &World) -> Lease {
    loop {
        let freed = world.router.capacity_freed().notified();
        tokio::pin!(freed);
        freed.as_mut().enable();
        match world.select() {
            Ok(lease) => return lease,
            Err(refusal) => assert_eq!(refusal, Refusal::Full),
        }
        freed.await;
    }
}

// === membership ===

#[test]
fn a_lease_on_a_worker_that_is_removed_hears_of_it() {
    explore(ORDERS, || {
        let world = World::with_one(0);
        let asked = world.clone();
        let leases = threads(3, move |number| {
            if number < 2 {
                return asked.select().ok();
            }
            asked.router.remove(&WorkerId::new("w0").unwrap());
            assert_eq!(asked.select().unwrap_err(), Refusal::NoWorkers, "whoever comes after that finds nobody");
            None
        });
        assert!(leases.iter().flatten().all(|lease| lease.gone().has_fired()));
        drop(leases);
        assert_eq!(world.router.online(), 0);
    });
}

#[test]
fn a_lease_belongs_to_one_life_of_a_worker() {
    explore(ORDERS, || {
        let world = World::with_one(1);
        let asked = world.clone();
        let leases = threads(3, move |number| {
            if number < 2 {
                return asked.select().ok();
            }
            assert_eq!(asked.register("w0", "2", 1), Registered::Replaced);
            None
        });
        let (new, old): (Vec<_>, Vec<_>) = leases.into_iter().flatten().partition(|lease| lease.incarnation() == "2");
        assert!(old.iter().all(|lease| lease.gone().has_fired()) && !new.iter().any(|lease| lease.gone().has_fired()));
        assert!(new.len() <= 1 && old.len() <= 1);
        assert_eq!(world.in_flight() as usize, new.len());
        drop(old);
        assert_eq!(world.in_flight() as usize, new.len(), "a place of the old life is none of the new one");
        drop(new);
        assert_eq!((world.in_flight(), world.router.online()), (0, 1));
    });
}

#[test]
fn a_worker_that_restarts_is_there_all_the_time() {
    explore(ORDERS, || {
        let world = World::with_one(0);
        let asked = world.clone();
        threads(3, move |number| {
            if number < 2 {
                asked.select().expect("one life or the other takes it");
            } else {
                asked.register("w0", "2", 0);
            }
        });
        assert_eq!(world.in_flight(), 0);
    });
}

#[test]
fn when_the_last_worker_leaves_nobody_hears_that_its_model_is_unknown() {
    explore(ORDERS, || {
        let world = World::with_one(0);
        let asked = world.clone();
        threads(3, move |number| {
            if number < 2 {
                assert_eq!(asked.select().err().unwrap_or(Refusal::NoWorkers), Refusal::NoWorkers);
            } else {
                asked.router.deregister(&WorkerId::new("w0").unwrap(), asked.now);
            }
        });
    });
}

#[test]
fn a_worker_that_deregisters_gets_nothing_new_and_keeps_what_it_has() {
    explore(ORDERS, || {
        let world = World::with_one(0);
        let asked = world.clone();
        let leases = threads(3, move |number| {
            if number < 2 {
                return asked.select().ok();
            }
            asked.router.deregister(&WorkerId::new("w0").unwrap(), asked.now);
            assert_eq!(asked.select().unwrap_err(), Refusal::NoWorkers);
            None
        });
        assert!(!leases.iter().flatten().any(|lease| lease.gone().has_fired()));
        assert_eq!(world.in_flight() as usize, leases.iter().flatten().count());
        world.router.expire(world.now);
        assert_eq!(world.router.snapshot(world.now).is_empty(), leases.iter().flatten().next().is_none());
        drop(leases);
        world.router.expire(world.now);
        assert!(world.router.snapshot(world.now).is_empty());
    });
}

#[test]
fn whoever_has_registered_is_found() {
    explore(ORDERS, || {
        let world = World::new(|_, _| {});
        let asked = world.clone();
        threads(3, move |number| {
            let name = format!("w{number}");
            asked.register(&name, "1", 0);
            let lease = asked.router.select(&Query { worker_id: Some(&name), ..ANY }, asked.now);
            assert_eq!(lease.unwrap().worker_id().as_str(), name);
            assert!(asked.select().is_ok());
        });
        assert_eq!((world.router.online(), world.router.serving("m"), *world.router.membership().borrow()), (3, 3, 3));
    });
}

// === sessions ===

fn session(exclude: &[WorkerId]) -> Query<'_> {
    Query { session_id: Some("s"), exclude, ..ANY }
}

#[test]
fn a_session_that_races_with_itself_has_one_worker_and_moves_once() {
    explore(ORDERS, || {
        let world = World::new(|_, _| {});
        for worker in ["w0", "w1", "w2"] {
            world.register(worker, "1", 0);
        }
        let asked = world.clone();
        let homes = threads(2, move |_| asked.router.select(&session(&[]), asked.now).unwrap().worker_id().clone());
        assert_eq!(homes[0], homes[1]);
        let home = [homes[0].clone()];
        let leases = [(); 2].map(|()| {
            let lease = world.router.select(&session(&home), world.now).unwrap();
            assert_eq!(lease.choice(), Choice::Rendezvous);
            parking_lot::Mutex::new(Some(lease))
        });
        let asked = world.clone();
        threads(2, move |number| {
            let lease = leases[number].lock().take().unwrap();
            lease.end(Outcome::Success, asked.now);
        });
        let moved = world.told.lock().iter().filter(|event| matches!(event, RouterEvent::SessionMoved { .. })).count();
        assert_eq!(moved, 1);
        let lease = world.router.select(&session(&[]), world.now).unwrap();
        assert_eq!((lease.choice(), *lease.worker_id() != homes[0]), (Choice::Affinity, true));
    });
}
