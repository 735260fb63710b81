//! Membership against its model: workers that register, restart, fall silent, leave and come back, with requests on them.

mod member;
mod model;

use std::time::Duration;

use mlx_serving_router::routing::{Carrier, HeartbeatVerdict, Lease, Query, Refusal, Registered, RouterEvent};
use mlx_serving_router::wire::{Phase, WorkerId, WorkerStatus};
use proptest::prelude::*;

use self::member::{Member, Standing};
use self::model::{Fleet, HISTORY_FOR, LONGEST_HOLD, MOST_WORKERS};
use super::histories::{Coverage, run};
use crate::{ANY, World, heartbeat, id, registration};

/// One more than there is room for.
const WORKERS: usize = MOST_WORKERS + 1;
const MODELS: [&str; 3] = ["m", "m1", "m2"];

#[derive(Clone, Debug)]
enum Event {
    Register {
        worker: usize,
        life: Life,
        says: Says,
        local: bool,
    },
    Heartbeat {
        worker: usize,
        life: Life,
        sequence: Sequence,
        says: Says,
    },
    /// Everybody gives a sign of life.
    AllBeat,
    /// So many restarts in a row.
    Flap {
        worker: usize,
        times: usize,
    },
    Deregister(usize),
    Remove(usize),
    Drain(usize),
    Freeze,
    Thaw,
    /// A request begins on this worker, or one ends.
    Begin(usize),
    End(usize),
    Pass {
        time: Time,
        expire: bool,
    },
    Expire,
}

/// Which incarnation speaks.
#[derive(Clone, Copy, Debug)]
enum Life {
    Current,
    New,
    /// One of those before, so many ago.
    Earlier(usize),
    /// One of the older dialect.
    Older,
}

#[derive(Clone, Copy, Debug)]
enum Sequence {
    Next,
    Same,
    Stale,
}

#[derive(Clone, Debug)]
struct Says {
    status: WorkerStatus,
    phase: Phase,
    models: [bool; 3],
    foreign: Option<usize>,
    active: u32,
}

#[derive(Clone, Debug)]
enum Time {
    Millis(u64),
    /// To what falls due for a worker, or a millisecond before or after.
    ToDue {
        worker: usize,
        which: usize,
        beside: i8,
    },
    Long(Duration),
}

fn says() -> impl Strategy<Value = Says> {
    let status = prop_oneof![
        12 => Just(WorkerStatus::Online),
        4 => Just(WorkerStatus::Degraded),
        1 => Just(WorkerStatus::Draining),
        1 => Just(WorkerStatus::Offline),
    ];
    let phase = prop_oneof![12 => Just(Phase::Ready), 3 => Just(Phase::Loading), 1 => Just(Phase::Draining)];
    (status, phase, any::<[bool; 3]>(), prop::option::of(0..3_usize), 0..4_u32)
        .prop_map(|(status, phase, models, foreign, active)| Says { status, phase, models, foreign, active })
}

fn event() -> impl Strategy<Value = Event> {
    let worker = || 0..WORKERS;
    let life = || {
        prop_oneof![
            10 => Just(Life::Current),
            2 => Just(Life::New),
            2 => prop_oneof![1..4_usize, 14..20_usize].prop_map(Life::Earlier),
            2 => Just(Life::Older),
        ]
    };
    let sequence = prop_oneof![6 => Just(Sequence::Next), 1 => Just(Sequence::Same), 1 => Just(Sequence::Stale)];
    let time = prop_oneof![
        4 => (0..2_000_u64).prop_map(Time::Millis),
        10 => (worker(), 0..5_usize, -1..=1_i8).prop_map(|(worker, which, beside)| Time::ToDue { worker, which, beside }),
        1 => Just(Time::Long(LONGEST_HOLD)),
        1 => Just(Time::Long(HISTORY_FOR - Duration::from_secs(60))),
    ];
    prop_oneof![
        10 => (worker(), life(), says(), prop::bool::weighted(0.1))
            .prop_map(|(worker, life, says, local)| Event::Register { worker, life, says, local }),
        14 => (worker(), life(), sequence, says())
            .prop_map(|(worker, life, sequence, says)| Event::Heartbeat { worker, life, sequence, says }),
        6 => Just(Event::AllBeat),
        1 => (worker(), 1..20_usize).prop_map(|(worker, times)| Event::Flap { worker, times }),
        3 => worker().prop_map(Event::Deregister),
        3 => worker().prop_map(Event::Remove),
        2 => worker().prop_map(Event::Drain),
        1 => Just(Event::Freeze),
        2 => Just(Event::Thaw),
        12 => worker().prop_map(Event::Begin),
        3 => (0..100_usize).prop_map(Event::End),
        16 => (time, any::<bool>()).prop_map(|(time, expire)| Event::Pass { time, expire }),
        6 => Just(Event::Expire),
    ]
}

struct Run<'a> {
    world: World,
    model: Fleet,
    /// The incarnations that each worker has had, the latest last.
    lives: [Vec<String>; WORKERS],
    leases: Vec<Out>,
    seen: &'a Coverage,
}

/// A request on its way.
struct Out {
    lease: Lease,
    life: u64,
    presence: u64,
}

fn name(worker: usize) -> WorkerId {
    id(&format!("w{worker}"))
}

impl<'a> Run<'a> {
    fn new(seen: &'a Coverage) -> Self {
        let world = World::with(|settings| {
            settings.breaker = None;
            settings.max_workers = MOST_WORKERS;
            settings.worker_offline_timeout = model::OFFLINE_AFTER;
            settings.heartbeat_interval = model::HEARTBEAT;
            settings.flap_hold_max = LONGEST_HOLD;
        });
        Self { world, model: Fleet::default(), lives: Default::default(), leases: Vec::new(), seen }
    }

    fn step(&mut self, event: Event) -> Result<(), TestCaseError> {
        let now = self.world.now;
        match event {
            Event::Register { worker, life, says, local } => {
                let incarnation = self.incarnation(worker, life);
                let result = self.register(worker, &incarnation, &says, if local { Carrier::Local } else { Carrier::Nats })?;
                let earlier = matches!(life, Life::Earlier(_)) && incarnation != *self.lives[worker].last().unwrap();
                self.seen.saw_if(
                    earlier && matches!(result, Registered::Replaced | Registered::New),
                    "a life of long ago is new again",
                );
            }
            Event::Flap { worker, times } => {
                let says =
                    Says { status: WorkerStatus::Online, phase: Phase::Ready, models: [true; 3], foreign: None, active: 0 };
                for _ in 0..times {
                    let incarnation = self.incarnation(worker, Life::New);
                    self.register(worker, &incarnation, &says, Carrier::Nats)?;
                }
            }
            Event::Heartbeat { worker, life, sequence, says } => {
                let incarnation = self.incarnation(worker, life);
                let latest = self.model.members.get(&name(worker)).and_then(|member| member.report.as_ref());
                let latest = latest.map_or(0, |(report, _)| report.sequence);
                let sequence = match sequence {
                    Sequence::Next => latest + 1,
                    Sequence::Same => latest,
                    Sequence::Stale => latest.saturating_sub(1),
                };
                self.beat(worker, &incarnation, sequence, &says)?;
            }
            Event::AllBeat => {
                let members: Vec<_> = self.model.members.values().cloned().collect();
                for member in members {
                    let sequence = member.report.map_or(0, |(report, _)| report.sequence + 1);
                    let worker = (0..WORKERS).find(|worker| name(*worker) == member.said.worker_id).unwrap();
                    let models = MODELS.map(|model| member.said.skills.available_models.iter().any(|known| known == model));
                    let says = Says { status: WorkerStatus::Online, phase: Phase::Ready, models, foreign: Some(1), active: 1 };
                    self.beat(worker, &member.said.incarnation, sequence, &says)?;
                }
            }
            Event::Deregister(worker) => {
                self.world.router.deregister(&name(worker), now);
                self.model.deregister(&name(worker), now);
            }
            Event::Remove(worker) => {
                self.world.router.remove(&name(worker));
                self.model.remove(&name(worker));
            }
            Event::Drain(worker) => {
                prop_assert_eq!(self.world.router.drain(&name(worker), now), self.model.drain(&name(worker), now));
            }
            Event::Freeze => {
                self.world.router.freeze(now);
                self.model.freeze(now);
            }
            Event::Thaw => {
                self.world.router.thaw(now);
                self.model.thaw(now);
            }
            Event::Begin(worker) => self.begin(worker)?,
            Event::End(lease) if !self.leases.is_empty() => {
                let out = self.leases.remove(lease % self.leases.len());
                self.seen.saw_if(self.model.is_leaving(out.life), "a request ends behind its worker's next life");
                drop(out.lease);
                self.model.ended(out.life);
            }
            Event::End(_) => {}
            Event::Pass { time, expire } => {
                self.pass(&time);
                if expire {
                    return self.step(Event::Expire);
                }
            }
            Event::Expire => {
                let before = self.model.gone.len();
                let leaves = |run: &Self, out: &Out| run.model.is_leaving(out.life) || run.model.leaves(out.life);
                let leaving = self.leases.iter().filter(|out| leaves(self, out) && !self.model.gone.contains(&out.presence));
                let leaving: Vec<_> = leaving.map(|out| out.presence).collect();
                self.world.router.expire(now);
                self.model.expire(now);
                let cut = before < self.model.gone.len() && leaving.iter().any(|presence| self.model.gone.contains(presence));
                self.seen.saw_if(cut, "a request had 60 s to finish");
            }
        }
        self.compare()
    }

    fn incarnation(&mut self, worker: usize, life: Life) -> String {
        let known = &mut self.lives[worker];
        match life {
            Life::Older => String::new(),
            Life::Earlier(ago) if known.len() > ago => known[known.len() - 1 - ago].clone(),
            Life::Current if !known.is_empty() => known.last().unwrap().clone(),
            _ => {
                known.push(known.len().to_string());
                known.last().unwrap().clone()
            }
        }
    }

    fn register(&mut self, worker: usize, incarnation: &str, says: &Says, carrier: Carrier) -> Result<Registered, TestCaseError> {
        let models: Vec<_> = MODELS.into_iter().zip(says.models).filter(|(_, serves)| *serves).map(|(model, _)| model).collect();
        let mut said = registration(&name(worker), incarnation, &models, 0);
        said.status = says.status;
        said.protocol = (!incarnation.is_empty()).then_some(1);
        // One of the older dialect is always behind NATS.
        let carrier = if incarnation.is_empty() { Carrier::Nats } else { carrier };
        let expected = self.model.register(&said, carrier, self.world.now);
        self.seen.saw(format!("register: {expected:?}"));
        if let (Registered::Replaced, Some(member)) = (expected, self.model.members.get(&name(worker))) {
            self.seen.saw_if(member.held.is_some(), "one that restarts is held back");
        }
        prop_assert_eq!(self.world.router.register(&said, carrier, self.world.now), expected);
        Ok(expected)
    }

    fn beat(&mut self, worker: usize, incarnation: &str, sequence: u64, says: &Says) -> Result<(), TestCaseError> {
        let mut beat = heartbeat(&name(worker), incarnation, sequence);
        beat.status = says.status;
        beat.phase = says.phase;
        beat.metrics.models_loaded =
            MODELS.into_iter().zip(says.models).filter(|(_, loaded)| *loaded).map(|(model, _)| model.to_owned()).collect();
        beat.metrics.active_requests = says.active;
        beat.active_request_ids = says
            .foreign
            .map(|foreign| (0..foreign).map(|number| format!("theirs-{number}")).chain(["ours-1".to_owned()]).collect());
        beat.loading_models = vec![format!("loading-{sequence}")];
        beat.queue_depth = says.active;
        beat.tokens_generated = sequence;
        let expected = self.model.heartbeat(&beat, self.world.now);
        self.seen.saw(format!("heartbeat: {expected:?}"));
        prop_assert_eq!(self.world.beat(&beat), expected);
        if expected == HeartbeatVerdict::Taken && incarnation.is_empty() {
            self.seen.saw("a heartbeat of the older dialect");
        }
        Ok(())
    }

    fn begin(&mut self, worker: usize) -> Result<(), TestCaseError> {
        let id = name(worker);
        let member = self.model.members.get_mut(&id).filter(|member| member.standing() < Standing::Draining);
        let result = self.world.named(&id);
        match member {
            None => prop_assert_eq!(result.unwrap_err(), Refusal::WorkerOffline),
            Some(member) if !member.serves("m") => prop_assert_eq!(result.unwrap_err(), Refusal::ModelNotFound),
            Some(member) if member.standing() == Standing::Unheard => {
                self.seen.saw("one that was not heard from is refused");
                prop_assert_eq!(result.unwrap_err(), Refusal::Full);
            }
            Some(member) => {
                let lease = result.expect("it takes requests");
                prop_assert_eq!(lease.incarnation(), &member.said.incarnation);
                prop_assert_eq!((lease.is_legacy(), lease.carrier()), (member.is_older(), member.carrier));
                member.in_flight += 1;
                self.leases.push(Out { lease, life: member.life, presence: member.presence });
            }
        }
        Ok(())
    }

    fn pass(&mut self, time: &Time) {
        let now = self.world.now;
        let then = match *time {
            Time::Millis(millis) => now + Duration::from_millis(millis),
            Time::Long(span) => now + span,
            Time::ToDue { worker, which, beside } => {
                let due = self.model.members.get(&name(worker)).and_then(|member| member.due()[which]);
                let due = due.unwrap_or(now) + Duration::from_millis(1);
                due - Duration::from_millis((1 - i64::from(beside)) as u64)
            }
        };
        self.world.now = then.max(now);
    }

    fn compare(&mut self) -> Result<(), TestCaseError> {
        let (now, router) = (self.world.now, &self.world.router);
        let members = &self.model.members;
        let expected: Vec<_> = members.values().map(|member| member.snapshot(now)).collect();
        prop_assert_eq!(router.snapshot(now), expected);
        let online = members.values().filter(|member| member.standing() < Standing::Draining).count();
        prop_assert_eq!((router.online(), *router.membership().borrow()), (online, online));
        let served = MODELS.map(|model| members.values().filter(|member| member.serves(model)).count());
        prop_assert_eq!(MODELS.map(|model| router.serving(model)), served);
        let models: Vec<_> = MODELS.into_iter().zip(served).filter(|(_, served)| *served > 0).map(|(model, _)| model).collect();
        prop_assert_eq!(router.models(), models);
        for out in &self.leases {
            prop_assert_eq!(out.lease.gone().has_fired(), self.model.gone.contains(&out.presence));
        }
        self.compare_choice(online)?;
        let told = std::mem::take(&mut self.model.told);
        for event in &told {
            self.seen.saw(format!("{event:?}").split(' ').next().unwrap().to_owned());
            if let RouterEvent::WorkerRegistered { worker_id, .. } = event {
                let back = self.model.members.get(worker_id).is_some_and(|member| member.presence != member.life);
                self.seen.saw_if(back, "one comes back after silence");
            }
        }
        prop_assert_eq!(self.world.take_events(), told);
        Ok(())
    }

    /// Whoever is chosen is one of the best.
    fn compare_choice(&self, online: usize) -> Result<(), TestCaseError> {
        let members = &self.model.members;
        let best = members.values().filter(|member| member.serves("m")).map(Member::standing).min();
        match (self.world.query(&Query { ..ANY }), best) {
            (Ok(lease), Some(best)) if best < Standing::Unheard => {
                self.seen.saw(format!("chosen: {best:?}"));
                prop_assert_eq!(members[lease.worker_id()].standing(), best);
            }
            (Err(refusal), best) => {
                let expected = match best {
                    Some(Standing::Unheard) => Refusal::Full,
                    None if online == 0 => Refusal::NoWorkers,
                    None => Refusal::ModelNotFound,
                    Some(best) => panic!("{refusal:?} with somebody {best:?}"),
                };
                prop_assert_eq!(refusal, expected);
            }
            (Ok(lease), best) => panic!("{lease:?} where the best are {best:?}"),
        }
        Ok(())
    }
}

#[test]
fn membership_is_what_its_model_says() {
    let reached = [
        "register: New",
        "register: Renewed",
        "register: Replaced",
        "register: Ignored(Superseded)",
        "register: Ignored(Deregistered)",
        "register: Ignored(FleetFull)",
        "heartbeat: Taken",
        "heartbeat: Unknown",
        "heartbeat: Ignored",
        "WorkerRegistered",
        "WorkerReplaced",
        "WorkerOffline",
        "WorkerRemoved",
        "WorkerDraining",
        "a heartbeat of the older dialect",
        "chosen: Online",
        "chosen: Degraded",
        "chosen: Held",
        "one comes back after silence",
        "one that restarts is held back",
        "one that was not heard from is refused",
        "a life of long ago is new again",
        "a request ends behind its worker's next life",
        "a request had 60 s to finish",
    ];
    run(1_200, prop::collection::vec(event(), 1..200), &reached, 40, |events, seen| {
        let mut run = Run::new(seen);
        events.into_iter().try_for_each(|event| run.step(event))
    });
}
