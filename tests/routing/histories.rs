//! Random histories: whatever happens in whatever order, what has to hold holds.

use std::collections::HashMap;
use std::time::Duration;

use mlx_serving_router::error::ControllerErrorCode;
use mlx_serving_router::routing::{Choice, CircuitState, Lease, LeftOut, Outcome, Query, Refusal, WorkerSnapshot};
use mlx_serving_router::wire::{WorkerId, WorkerStatus};
use proptest::prelude::*;

use super::{World, heartbeat, id, registration};

const ROOM: u32 = 2;

#[derive(Clone, Debug)]
enum Event {
    Register { worker: u8, incarnation: u8, both_models: bool },
    Heartbeat { worker: u8, incarnation: u8, sequence: u64, foreign: u8, degraded: bool },
    Deregister(u8),
    Remove(u8),
    Drain(u8),
    Select { model: u8, session: Option<u8>, exclude: Vec<u8>, named: Option<u8> },
    FirstToken(prop::sample::Index),
    End(prop::sample::Index, Outcome),
    Drop(prop::sample::Index),
    Pass(u64),
    Expire,
    Freeze,
    Thaw,
    ForceOpen(u8),
    Reset(u8),
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        3 => Just(Outcome::Success),
        4 => Just(Outcome::Failure(ControllerErrorCode::WorkerTimeout)),
        1 => Just(Outcome::Failure(ControllerErrorCode::WorkerOverloaded)),
        1 => Just(Outcome::Failure(ControllerErrorCode::Cancelled)),
        1 => Just(Outcome::Ignored),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let worker = || 0..4_u8;
    prop_oneof![
        4 => (worker(), 0..3_u8, any::<bool>())
            .prop_map(|(worker, incarnation, both_models)| Event::Register { worker, incarnation, both_models }),
        4 => (worker(), 0..3_u8, 0..9_u64, 0..3_u8, prop::bool::weighted(0.2)).prop_map(
            |(worker, incarnation, sequence, foreign, degraded)| Event::Heartbeat {
                worker, incarnation, sequence, foreign, degraded
            }
        ),
        1 => worker().prop_map(Event::Deregister),
        1 => worker().prop_map(Event::Remove),
        1 => worker().prop_map(Event::Drain),
        16 => (
            0..2_u8,
            prop::option::of(0..6_u8),
            prop::collection::vec(worker(), 0..3),
            prop::option::weighted(0.1, worker()),
        )
            .prop_map(|(model, session, exclude, named)| Event::Select { model, session, exclude, named }),
        4 => any::<prop::sample::Index>().prop_map(Event::FirstToken),
        12 => (any::<prop::sample::Index>(), outcome()).prop_map(|(index, outcome)| Event::End(index, outcome)),
        3 => any::<prop::sample::Index>().prop_map(Event::Drop),
        4 => prop_oneof![0..50_u64, 1_000..40_000_u64].prop_map(Event::Pass),
        3 => Just(Event::Expire),
        1 => Just(Event::Freeze),
        1 => Just(Event::Thaw),
        1 => worker().prop_map(Event::ForceOpen),
        1 => worker().prop_map(Event::Reset),
    ]
}

/// A world with the leases that are out, and what a careful bookkeeper knows of them.
struct Run {
    world: World,
    leases: Vec<Lease>,
}

fn name(worker: u8) -> WorkerId {
    id(&format!("w{worker}"))
}

impl Run {
    fn new() -> Self {
        let world = World::with(|settings| {
            let breaker = settings.breaker.as_mut().unwrap();
            breaker.failure_threshold = 2;
            settings.max_sessions = 4;
            settings.max_workers = 3;
        });
        Self { world, leases: Vec::new() }
    }

    fn step(&mut self, event: Event) -> Result<(), TestCaseError> {
        let world = &mut self.world;
        match event {
            Event::Register { worker, incarnation, both_models } => {
                let models: &[&str] = if both_models { &["m0", "m1"] } else { &["m0"] };
                world.register(&registration(&name(worker), &incarnation.to_string(), models, ROOM));
            }
            Event::Heartbeat { worker, incarnation, sequence, foreign, degraded } => {
                let mut report = heartbeat(&name(worker), &incarnation.to_string(), sequence);
                report.active_request_ids = Some((0..foreign).map(|number| format!("theirs-{number}")).collect());
                report.status = if degraded { WorkerStatus::Degraded } else { WorkerStatus::Online };
                world.beat(&report);
            }
            Event::Deregister(worker) => world.router.deregister(&name(worker), world.now),
            Event::Remove(worker) => world.router.remove(&name(worker)),
            Event::Drain(worker) => drop(world.router.drain(&name(worker), world.now)),
            Event::Select { model, session, exclude, named } => {
                let model = format!("m{model}");
                let session = session.map(|session| format!("s{session}"));
                let exclude: Vec<_> = exclude.into_iter().map(name).collect();
                let named = named.map(name);
                self.select(&Query {
                    model_id: &model,
                    session_id: session.as_deref(),
                    exclude: &exclude,
                    carrier: None,
                    unable: &[],
                    worker_id: named.as_deref(),
                    prompt: None,
                })?;
            }
            Event::FirstToken(index) if !self.leases.is_empty() => {
                index.get(&self.leases).first_token(Duration::from_millis(10), world.now);
            }
            Event::End(index, outcome) if !self.leases.is_empty() => {
                let lease = self.leases.swap_remove(index.index(self.leases.len()));
                let worker = world.router.worker(lease.worker_id(), world.now);
                let present =
                    !lease.gone().has_fired() && worker.as_ref().is_some_and(|worker| worker.incarnation == lease.incarnation());
                let id = lease.worker_id().clone();
                if lease.end(outcome, world.now) && present {
                    prop_assert_eq!(world.worker(&id).breaker, CircuitState::Open);
                }
            }
            Event::Drop(index) if !self.leases.is_empty() => {
                drop(self.leases.swap_remove(index.index(self.leases.len())));
            }
            Event::FirstToken(_) | Event::End(..) | Event::Drop(_) => {}
            Event::Pass(millis) => world.pass(millis),
            Event::Expire => world.router.expire(world.now),
            Event::Freeze => world.router.freeze(world.now),
            Event::Thaw => world.router.thaw(world.now),
            Event::ForceOpen(worker) => drop(world.router.force_open_breaker(&name(worker), world.now)),
            Event::Reset(worker) => drop(world.router.reset_breaker(&name(worker), world.now)),
        }
        self.check()
    }

    fn select(&mut self, query: &Query<'_>) -> Result<(), TestCaseError> {
        let world = &self.world;
        let before = world.router.snapshot(world.now);
        let online = |status| matches!(status, WorkerStatus::Online | WorkerStatus::Degraded);
        let serving: Vec<_> = before
            .iter()
            .filter(|worker| online(worker.status) && worker.models.iter().any(|model| model == query.model_id))
            .collect();
        match world.query(query) {
            Ok(lease) => {
                let worker = serving.iter().find(|worker| worker.worker_id == *lease.worker_id());
                let worker = worker.expect("the chosen worker is online and serves the model");
                prop_assert!(worker.in_flight + worker.foreign < ROOM);
                prop_assert!(worker.breaker != CircuitState::ForcedOpen);
                // One that the rate has opened is a candidate where most of a model's workers are kept out.
                prop_assert!(worker.breaker != CircuitState::Open || 2 * kept_out(&serving) > serving.len());
                prop_assert!(!lease.gone().has_fired());
                match query.worker_id {
                    Some(named) => prop_assert_eq!((lease.choice(), lease.worker_id().as_str()), (Choice::Named, named)),
                    None => prop_assert!(!query.exclude.contains(lease.worker_id())),
                }
                if worker.status == WorkerStatus::Degraded && query.worker_id.is_none() {
                    // One that comes and goes calls itself online, and stands behind the degraded while it is held back.
                    let left_out = lease.left_out(query, world.now);
                    let held_back = |id: &WorkerId| left_out.contains(&(id.clone(), LeftOut::Degraded));
                    let free = serving.iter().filter(|other| {
                        other.status == WorkerStatus::Online
                            && !held_back(&other.worker_id)
                            && other.breaker == CircuitState::Closed
                            && other.in_flight + other.foreign < ROOM
                            && !query.exclude.contains(&other.worker_id)
                            && world.named_fits(other.worker_id.as_str(), query.model_id)
                    });
                    prop_assert_eq!(free.count(), 0);
                }
                self.leases.push(lease);
            }
            Err(Refusal::NoWorkers) => prop_assert!(!before.iter().any(|worker| online(worker.status))),
            Err(Refusal::ModelNotFound) if query.worker_id.is_none() => prop_assert!(serving.is_empty()),
            Err(Refusal::NoHealthyWorkers { .. }) => {
                prop_assert!(serving.iter().all(|worker| worker.breaker != CircuitState::Closed));
            }
            Err(Refusal::AllTried { total, healthy, excluded }) => {
                prop_assert_eq!((total, excluded), (serving.len(), query.exclude.len()));
                prop_assert!(excluded > 0 && healthy <= total);
            }
            Err(Refusal::Full) => prop_assert!(!serving.is_empty()),
            Err(Refusal::ModelNotFound | Refusal::WorkerOffline | Refusal::CircuitOpen { .. }) => {
                prop_assert!(query.worker_id.is_some());
            }
        }
        prop_assert!(self.world.router.online() == before.iter().filter(|worker| online(worker.status)).count());
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let world = &self.world;
        let mut held: HashMap<(&str, &str), u32> = HashMap::new();
        for lease in &self.leases {
            *held.entry((lease.worker_id(), lease.incarnation())).or_default() += 1;
        }
        let workers = world.router.snapshot(world.now);
        prop_assert!(workers.len() <= 3);
        for worker in &workers {
            // An incarnation that left and came back is another life: leases of the first do not count for it.
            let most = held.get(&(worker.worker_id.as_str(), worker.incarnation.as_str())).copied().unwrap_or(0);
            prop_assert!(worker.in_flight <= most.min(ROOM), "{} holds {}, {most} are out", worker.worker_id, worker.in_flight);
        }
        for (worker, stats) in world.router.breaker_stats(world.now) {
            prop_assert!(stats.probes <= 1, "{worker} has {} probes", stats.probes);
            prop_assert!(stats.probes == 0 || stats.state == CircuitState::HalfOpen);
            prop_assert!(stats.retry_after.is_none_or(|wait| wait <= Duration::from_secs(360)));
        }
        prop_assert_eq!(*world.router.membership().borrow(), world.router.online());
        Ok(())
    }

    fn finish(mut self) -> Result<(), TestCaseError> {
        self.leases.clear();
        for worker in self.world.router.snapshot(self.world.now) {
            prop_assert_eq!(worker.in_flight, 0);
        }
        for (_, stats) in self.world.router.breaker_stats(self.world.now) {
            prop_assert_eq!(stats.probes, 0);
        }
        Ok(())
    }
}

impl World {
    /// Whether a worker could take a request for a model just now; leaves everything as it was.
    fn named_fits(&self, worker: &str, model_id: &str) -> bool {
        self.query(&Query { model_id, worker_id: Some(worker), ..super::ANY }).is_ok()
    }
}

/// How many of them a breaker keeps out.
fn kept_out(workers: &[&WorkerSnapshot]) -> usize {
    workers.iter().filter(|worker| matches!(worker.breaker, CircuitState::Open | CircuitState::ForcedOpen)).count()
}

proptest! {
    #![proptest_config(super::cases(400))]

    #[test]
    fn nothing_leaks_and_nobody_gets_more_than_it_can_hold(events in prop::collection::vec(event(), 1..150)) {
        let mut run = Run::new();
        for event in events {
            run.step(event)?;
        }
        run.finish()?;
    }
}
