//! One simulation: a controller, its machines, its callers, and everything that is noted of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mlx_serving_router::dispatch::{Controller, Event};
use mlx_serving_router::error::ControllerErrorCode as Code;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::caller::{self, Met};
use crate::check;
use crate::machine::{self, Served};
use crate::plan::{Hand, Plan};

/// What all parts of one simulation share.
pub struct World {
    pub plan: Plan,
    pub controller: Controller,
    pub start: Instant,
    pub traced: bool,
    pub log: Mutex<Log>,
}

/// What happened.
#[derive(Default)]
pub struct Log {
    pub served: Vec<Served>,
    pub met: Vec<Met>,
    pub events: Vec<(u64, Event)>,
    /// Calls that have begun and not ended.
    pub under_way: usize,
    /// When the controller was told to stop.
    pub stopped: Option<u64>,
    pub complaints: Vec<String>,
    pub trace: Vec<String>,
}

/// What came of a simulation.
pub struct Outcome {
    /// The codes that requests ended with; none for a success.
    pub codes: BTreeSet<Option<&'static str>>,
    pub complaints: Vec<String>,
    pub trace: Vec<String>,
}

/// Every call has ended long before this.
const FOREVER: Duration = Duration::from_secs(600);

/// Runs a plan to its end, and judges it.
pub fn run(plan: Plan, traced: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(simulate(plan, traced))
}

async fn simulate(plan: Plan, traced: bool) -> Outcome {
    let controller = Controller::new(plan.config.clone(), Some("c".into())).unwrap();
    let mut events = controller.events();
    controller.start(None).await.unwrap();
    let world = Arc::new(World { plan, controller, start: Instant::now(), traced, log: Mutex::default() });
    world.note(|| format!("{:#?}", world.plan));

    let listener = world.clone();
    let listening = tokio::spawn(async move {
        while let Some(event) = events.next().await {
            listener.note(|| format!("{} {:?} {:?}", event.kind, event.worker_id, event.details));
            listener.log.lock().events.push((listener.now(), event));
        }
    });
    let mut machines = JoinSet::new();
    for (number, machine) in world.plan.machines.iter().enumerate() {
        machines.spawn(machine::live(world.clone(), machine.clone(), number as u64));
    }
    let mut calls = JoinSet::new();
    for call in &world.plan.calls {
        calls.spawn(caller::call(world.clone(), call.clone()));
    }
    let hand = tokio::spawn(lend_a_hand(world.clone()));
    let stopping = tokio::spawn(stop(world.clone()));

    let all = async { while let Some(Ok(())) = calls.join_next().await {} };
    if timeout(FOREVER, all).await.is_err() {
        world.complain(format!("{} calls never ended", calls.len()));
    }
    // What was abandoned comes to rest within a second; a little earlier nothing is due by the clock.
    sleep(Duration::from_millis(950)).await;
    check::at_rest(&world);
    if stopping.await.is_err() || hand.await.is_err() {
        world.complain("the operator's hand failed".into());
    }
    world.controller.stop(Duration::ZERO).await;
    if listening.await.is_err() {
        world.complain("the reader of events failed".into());
    }
    if let Some(ended) = machines.try_join_next() {
        world.complain(format!("a machine ended: {ended:?}"));
    }
    check::everything(&world);
    let mut log = world.log.lock();
    let codes = log.met.iter().map(|met| met.code().map(Code::as_str)).collect();
    Outcome { codes, complaints: std::mem::take(&mut log.complaints), trace: std::mem::take(&mut log.trace) }
}

async fn lend_a_hand(world: Arc<World>) {
    for (at, act) in &world.plan.hand {
        sleep_until(world.at(*at)).await;
        world.note(|| format!("{act:?}"));
        let (controller, now) = (&world.controller, Instant::now());
        let _ = match act {
            Hand::ForceOpen(id) => controller.force_open_breaker(id),
            Hand::Reset(id) => controller.reset_breaker(id),
            Hand::Drain(id) => controller.drain_worker(id),
            Hand::LinkDown => {
                controller.router().freeze(now);
                true
            }
            Hand::LinkUp => {
                controller.router().thaw(now);
                true
            }
        };
    }
}

async fn stop(world: Arc<World>) {
    let Some((at, drain)) = world.plan.stop else { return };
    sleep_until(world.at(at)).await;
    world.note(|| "the controller is told to stop".into());
    world.log.lock().stopped = Some(world.now());
    world.controller.stop(Duration::from_millis(drain)).await;
}

// === impl World ===

impl World {
    /// Milliseconds since the beginning.
    pub fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap()
    }

    pub fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    pub fn note(&self, what: impl FnOnce() -> String) {
        if self.traced {
            let line = format!("{:>6} {}", self.now(), what());
            self.log.lock().trace.push(line);
        }
    }

    pub fn complain(&self, what: String) {
        self.note(|| format!("COMPLAINT: {what}"));
        self.log.lock().complaints.push(what);
    }
}
