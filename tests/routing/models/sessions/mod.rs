//! Affinity against its model: sessions whose workers fill up, fail, leave, restart and come back.

mod model;

use std::collections::BTreeMap;

use mlx_serving_router::routing::{Carrier, Lease, Outcome, Query, Registered, RouterEvent};
use mlx_serving_router::wire::{WorkerId, WorkerStatus};
use proptest::prelude::*;

use self::model::{Chosen, Home, MOST_SESSIONS, Seen, Sessions, TTL};
use super::histories::{Coverage, run};
use crate::{ANY, FAILURE, World, id, registration};

const WORKERS: usize = 4;
const ROOM: u32 = 2;

#[derive(Clone, Debug)]
enum Event {
    Select {
        session: usize,
        tried: [bool; WORKERS],
    },
    /// A request for one worker, which is no business of its session.
    Named {
        session: usize,
        worker: usize,
    },
    /// Leases are counted from the latest.
    End {
        lease: usize,
        outcome: Outcome,
    },
    Drop(usize),
    /// A new life of a worker, well or not so well.
    Restart {
        worker: usize,
        degraded: bool,
    },
    Improve {
        worker: usize,
        degraded: bool,
    },
    Drain(usize),
    Remove(usize),
    /// An operator keeps a worker out, or lets it in again.
    Force(usize),
    Reset(usize),
    Pass(u64),
    Expire,
}

fn event() -> impl Strategy<Value = Event> {
    let worker = || 0..WORKERS;
    let session = || 0..MOST_SESSIONS + 2;
    let lease = || prop_oneof![3 => Just(0_usize), 1 => 0..20_usize];
    let outcome = prop_oneof![4 => Just(Outcome::Success), 2 => Just(FAILURE), 1 => Just(Outcome::Ignored)];
    let millis = TTL.as_millis() as u64;
    prop_oneof![
        16 => session().prop_map(|session| Event::Select { session, tried: [false; WORKERS] }),
        8 => (session(), any::<[bool; WORKERS]>()).prop_map(|(session, tried)| Event::Select { session, tried }),
        2 => (session(), worker()).prop_map(|(session, worker)| Event::Named { session, worker }),
        20 => (lease(), outcome).prop_map(|(lease, outcome)| Event::End { lease, outcome }),
        4 => lease().prop_map(Event::Drop),
        2 => (worker(), prop::bool::weighted(0.3)).prop_map(|(worker, degraded)| Event::Restart { worker, degraded }),
        2 => (worker(), any::<bool>()).prop_map(|(worker, degraded)| Event::Improve { worker, degraded }),
        1 => worker().prop_map(Event::Drain),
        1 => worker().prop_map(Event::Remove),
        2 => worker().prop_map(Event::Force),
        4 => worker().prop_map(Event::Reset),
        6 => prop_oneof![0..400_u64, millis - 1..=millis + 1].prop_map(Event::Pass),
        2 => Just(Event::Expire),
    ]
}

struct Run<'a> {
    world: World,
    fleet: BTreeMap<usize, Worker>,
    lives: u32,
    sessions: Sessions,
    leases: Vec<Out>,
    seen: &'a Coverage,
}

struct Worker {
    life: u32,
    degraded: bool,
    drained: bool,
    forced: bool,
}

/// A request on its way.
struct Out {
    lease: Lease,
    home: Home,
    /// The session that a success moves, and from where.
    moves: Option<(String, Home)>,
}

fn name(worker: usize) -> WorkerId {
    id(&format!("w{worker}"))
}

impl<'a> Run<'a> {
    fn new(seen: &'a Coverage) -> Result<Self, TestCaseError> {
        let world = World::with(|settings| {
            settings.session_ttl = TTL;
            settings.max_sessions = MOST_SESSIONS;
            let breaker = settings.breaker.as_mut().unwrap();
            (breaker.failure_threshold, breaker.minimum_requests) = (u32::MAX, u32::MAX);
        });
        let mut run = Self { world, fleet: BTreeMap::new(), lives: 0, sessions: Sessions::default(), leases: Vec::new(), seen };
        (0..WORKERS - 1).try_for_each(|worker| run.restart(worker, false))?;
        Ok(run)
    }

    fn step(&mut self, event: Event) -> Result<(), TestCaseError> {
        match event {
            Event::Select { session, tried } => self.select(&format!("s{session}"), tried)?,
            Event::Named { session, worker } => {
                let (session, worker_id) = (format!("s{session}"), name(worker));
                let query = Query { session_id: Some(&session), worker_id: Some(&worker_id), ..ANY };
                if let Ok(lease) = self.world.query(&query) {
                    let home = Home { worker: worker_id.to_string(), life: self.fleet[&worker].life };
                    self.leases.push(Out { lease, home, moves: None });
                }
            }
            Event::End { lease, outcome } if !self.leases.is_empty() => {
                let out = self.leases.remove(self.leases.len() - 1 - lease % self.leases.len());
                out.lease.end(outcome, self.world.now);
                if let (Outcome::Success, Some((session, from))) = (outcome, out.moves) {
                    let before = self.sessions.told.len();
                    self.sessions.succeeded(&session, &from, &out.home, self.world.now);
                    let moved = self.sessions.told.len() > before;
                    self.seen.saw(if moved { "moved by a success elsewhere" } else { "not moved by a success elsewhere" });
                }
            }
            Event::Drop(lease) if !self.leases.is_empty() => {
                drop(self.leases.remove(self.leases.len() - 1 - lease % self.leases.len()));
            }
            Event::End { .. } | Event::Drop(_) => {}
            Event::Restart { worker, degraded } => self.restart(worker, degraded)?,
            Event::Improve { worker, degraded } => {
                if let Some(known) = self.fleet.get_mut(&worker) {
                    known.degraded = degraded;
                    let life = known.life;
                    prop_assert_eq!(self.register(worker, life, degraded), Registered::Renewed);
                }
            }
            Event::Drain(worker) => {
                self.world.router.drain(&name(worker), self.world.now);
                self.fleet.get_mut(&worker).into_iter().for_each(|worker| worker.drained = true);
            }
            Event::Remove(worker) => {
                self.world.router.remove(&name(worker));
                self.fleet.remove(&worker);
            }
            Event::Force(worker) => {
                self.world.router.force_open_breaker(&name(worker), self.world.now);
                self.fleet.get_mut(&worker).into_iter().for_each(|worker| worker.forced = true);
            }
            Event::Reset(worker) => {
                self.world.router.reset_breaker(&name(worker), self.world.now);
                self.fleet.get_mut(&worker).into_iter().for_each(|worker| worker.forced = false);
            }
            Event::Pass(millis) => self.world.pass(millis),
            Event::Expire => self.world.router.expire(self.world.now),
        }
        let told = self.world.take_events().into_iter().filter_map(|event| match event {
            RouterEvent::SessionMoved { worker_id, previous } => Some((worker_id.to_string(), previous.to_string())),
            _ => None,
        });
        let expected = std::mem::take(&mut self.sessions.told);
        prop_assert_eq!(told.collect::<Vec<_>>(), expected);
        Ok(())
    }

    fn restart(&mut self, worker: usize, degraded: bool) -> Result<(), TestCaseError> {
        self.lives += 1;
        let known = self.fleet.insert(worker, Worker { life: self.lives, degraded, drained: false, forced: false });
        let expected = if known.is_some() { Registered::Replaced } else { Registered::New };
        prop_assert_eq!(self.register(worker, self.lives, degraded), expected);
        Ok(())
    }

    fn register(&self, worker: usize, life: u32, degraded: bool) -> Registered {
        let mut said = registration(&name(worker), &life.to_string(), &["m"], ROOM);
        said.status = if degraded { WorkerStatus::Degraded } else { WorkerStatus::Online };
        self.world.router.register(&said, Carrier::Local, self.world.now)
    }

    fn select(&mut self, session: &str, tried: [bool; WORKERS]) -> Result<(), TestCaseError> {
        let now = self.world.now;
        let exclude: Vec<_> = (0..WORKERS).filter(|worker| tried[*worker]).map(name).collect();
        let seen = self.fleet.iter().map(|(worker, known)| {
            let home = Home { worker: name(*worker).to_string(), life: known.life };
            let running = self.leases.iter().filter(|out| out.home == home).count() as u32;
            let takes = !known.drained && !known.forced && running < ROOM && !tried[*worker];
            Seen { home, keeps: !known.drained, takes: takes.then_some(u8::from(known.degraded)), tried: tried[*worker] }
        });
        let mut seen: Vec<_> = seen.collect();
        // A worker that failed the request may be gone by now.
        seen.extend((0..WORKERS).filter(|worker| tried[*worker] && !self.fleet.contains_key(worker)).map(|worker| Seen {
            home: Home { worker: name(worker).to_string(), life: 0 },
            keeps: false,
            takes: None,
            tried: true,
        }));
        let expected = self.sessions.select(session, &seen, now);
        let lease = self.world.query(&Query { session_id: Some(session), exclude: &exclude, ..ANY });
        let chosen = lease.as_ref().ok().map(|lease| {
            let home = Home { worker: lease.worker_id().to_string(), life: lease.incarnation().parse().unwrap() };
            (home, lease.choice())
        });
        prop_assert_eq!(&chosen, &expected.as_ref().map(|expected| (expected.home.clone(), expected.choice)));
        if let (Ok(lease), Some(Chosen { home, moves_from, why, .. })) = (lease, expected) {
            self.seen.saw(why);
            self.leases.push(Out { lease, home, moves: moves_from.map(|from| (session.to_owned(), from)) });
        }
        Ok(())
    }
}

#[test]
fn sessions_go_where_their_model_says() {
    let reached = [
        "its own worker",
        "elsewhere: its own worker cannot take it now",
        "elsewhere: its own worker failed",
        "bound anew: a new life of its own worker",
        "bound anew: its own worker is gone",
        "new, in the place of the oldest",
        "new",
        "moved by a success elsewhere",
        "not moved by a success elsewhere",
    ];
    run(2_000, prop::collection::vec(event(), 1..200), &reached, 100, |events, seen| {
        let mut run = Run::new(seen)?;
        events.into_iter().try_for_each(|event| run.step(event))
    });
}
