//! One life of a scripted worker, as its own task sees it: what reaches it, and the requests in play.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep, sleep_until, timeout};

use super::line::{Arrival, Event, Line, Way};
use super::performance::{Cue, Performance, Said};
use super::record::{Counts, InWork, Received, Record};
use super::runtime::ScriptedState;
use super::script::{Plan, Prompter};
use crate::error::{ControllerError, ControllerErrorCode, epoch_ms};
use crate::wire::{Heartbeat, HeartbeatMetrics, Phase, Registration, Reply, WorkerStatus};

/// How many requests it works on where its capacity says nothing; further ones are refused.
const MOST: usize = 10_000;
/// How long after its time a request is forgotten: late enough for its controller's own limits to be met first.
const LATE: Duration = Duration::from_secs(1);
/// Signs of life come no faster.
pub(super) const SHORTEST_BEAT: Duration = Duration::from_millis(1);
/// After so many messages without a pause there is a short one: whoever reads them has other things to do as well.
const BREATH: u32 = 256;
const PAUSE: Duration = Duration::from_millis(1);

/// What every life of a worker has in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) registration: Mutex<Registration>,
    pub(super) heartbeat_interval: Duration,
    pub(super) loading: Mutex<Duration>,
    pub(super) prompter: Mutex<Prompter>,
    pub(super) record: Arc<Record>,
    pub(super) state: Mutex<ScriptedState>,
    pub(super) frozen: watch::Sender<bool>,
    /// The models are there.
    pub(super) loaded: watch::Sender<bool>,
    pub(super) beats: AtomicBool,
    pub(super) obeys: AtomicBool,
}

/// What a worker is told from outside.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// Goes without a word.
    Die,
    /// Says goodbye and goes.
    Stop,
    /// Wants nothing new.
    Drain,
    /// Takes requests, or nobody listens for them.
    Listen(bool),
}

/// A life as its own task sees it.
pub(super) struct Stage {
    shared: Arc<Shared>,
    line: Line,
    performances: JoinSet<()>,
    deaths: mpsc::Sender<()>,
    sequence: u64,
    draining: bool,
}

// === impl Shared ===

impl Shared {
    /// A life is over; the next is another incarnation.
    pub(super) fn over(&self, state: ScriptedState) {
        self.registration.lock().incarnation = incarnation();
        self.frozen.send_replace(false);
        *self.state.lock() = state;
    }

    /// How many requests it takes at a time.
    fn most(&self) -> usize {
        match self.registration.lock().capacity.max_concurrent {
            0 => MOST,
            most => usize::try_from(most).unwrap_or(MOST).min(MOST),
        }
    }
}

// === impl Stage ===

impl Stage {
    /// `deaths` is how a script ends the worker.
    pub(super) fn new(shared: Arc<Shared>, line: Line, deaths: mpsc::Sender<()>) -> Self {
        Self { shared, line, performances: JoinSet::new(), deaths, sequence: 0, draining: false }
    }

    /// Lives until it is told to go, dies by a script, or nobody is left to serve.
    pub(super) async fn run(
        mut self,
        mut orders: mpsc::Receiver<(Order, oneshot::Sender<()>)>,
        mut died: mpsc::Receiver<()>,
        loaded_at: Instant,
    ) {
        let mut frozen = self.shared.frozen.subscribe();
        let mut tick = tokio::time::interval_at(Instant::now() + self.shared.heartbeat_interval, self.shared.heartbeat_interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (end, told) = loop {
            let goes_on = !*frozen.borrow_and_update();
            let loads = !*self.shared.loaded.borrow();
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some((Order::Die, told)) => break (ScriptedState::Dead, Some(told)),
                    Some((Order::Stop, told)) => break (ScriptedState::Stopped, Some(told)),
                    Some((Order::Drain, told)) => {
                        self.drain().await;
                        let _ = told.send(());
                    }
                    Some((Order::Listen(listens), told)) => {
                        self.line.listen(listens).await;
                        let _ = told.send(());
                    }
                    None => break (ScriptedState::Dead, None),
                },
                Some(()) = died.recv() => break (ScriptedState::Dead, None),
                changed = frozen.changed() => if changed.is_err() {
                    break (ScriptedState::Dead, None);
                },
                Some(_) = self.performances.join_next() => {}
                () = sleep_until(loaded_at), if goes_on && loads => {
                    self.shared.loaded.send_replace(true);
                    self.beat().await;
                }
                _ = tick.tick(), if goes_on => self.beat().await,
                event = self.line.next(), if goes_on => match event {
                    Some(event) => self.take(event).await,
                    None => break (ScriptedState::Stopped, None),
                },
            }
        };
        self.end(end).await;
        if let Some(told) = told {
            let _ = told.send(());
        }
    }

    /// What it works on ends without a word, or with one where it says goodbye.
    async fn end(mut self, end: ScriptedState) {
        if end == ScriptedState::Stopped {
            self.shared.frozen.send_replace(false);
            self.line.deregister().await;
            self.shared.record.dismiss();
            let said = async { while self.performances.join_next().await.is_some() {} };
            let _ = timeout(LATE, said).await;
        }
        self.performances.shutdown().await;
        self.line.vanish().await;
        self.shared.over(end);
    }

    async fn take(&mut self, event: Event) {
        match event {
            Event::Request(arrival) => self.perform(arrival).await,
            Event::Unreadable(way) => {
                way.send("", refusal(ControllerErrorCode::RequestValidationFailed, "the request cannot be read")).await;
            }
            Event::Cancel(cancellation) => self.shared.record.cancelled(&cancellation, self.shared.obeys.load(Ordering::Relaxed)),
            // Not registered now: its next heartbeat has it called again.
            Event::Call if self.draining => {}
            Event::Call => {
                let _ = self.register().await;
            }
        }
    }

    async fn perform(&mut self, arrival: Arrival) {
        let Arrival { request, attempt, controller_id, timeout, way } = arrival;
        let received = Received { request, attempt, controller_id, timeout };
        self.shared.record.received(received.clone());
        let refused = if self.draining {
            Some("the worker is draining")
        } else if self.shared.record.in_flight() >= self.shared.most() {
            Some("the worker has no room")
        } else {
            None
        };
        if let Some(why) = refused {
            way.send(&received.request.request_id, refusal(ControllerErrorCode::WorkerOverloaded, why)).await;
            return;
        }
        let plan = self.shared.prompter.lock().next();
        let in_work = self.shared.record.begin(&received, way.address());
        self.performances.spawn(perform(self.shared.clone(), plan, received, way, in_work, self.deaths.clone()));
    }

    pub(super) async fn register(&mut self) -> Result<(), ControllerError> {
        let registration = {
            let mut registration = self.shared.registration.lock();
            registration.timestamp = epoch_ms();
            registration.clone()
        };
        self.line.register(&registration).await?;
        self.beat().await;
        Ok(())
    }

    async fn drain(&mut self) {
        self.draining = true;
        *self.shared.state.lock() = ScriptedState::Draining;
        self.line.deregister().await;
        self.beat().await;
    }

    async fn beat(&mut self) {
        if !self.shared.beats.load(Ordering::Relaxed) {
            return;
        }
        self.sequence += 1;
        let (worker_id, incarnation, models) = {
            let registration = self.shared.registration.lock();
            let models = registration.skills.available_models.clone();
            (registration.worker_id.clone(), registration.incarnation.clone(), models)
        };
        let is_loaded = *self.shared.loaded.borrow();
        let (models_loaded, loading_models) = if is_loaded { (models, Vec::new()) } else { (Vec::new(), models) };
        let Counts { requests, in_flight, .. } = *self.shared.record.counts().borrow();
        let heartbeat = Heartbeat {
            worker_id,
            incarnation,
            sequence: self.sequence,
            status: if self.draining { WorkerStatus::Draining } else { WorkerStatus::Online },
            timestamp: epoch_ms(),
            metrics: HeartbeatMetrics {
                active_requests: u32::try_from(in_flight).unwrap_or(u32::MAX),
                total_requests_handled: requests.saturating_sub(in_flight as u64),
                models_loaded,
                ..HeartbeatMetrics::default()
            },
            queue_depth: 0,
            active_request_ids: Some(self.shared.record.running_ids()),
            tokens_generated: 0,
            phase: match (self.draining, is_loaded) {
                (true, _) => Phase::Draining,
                (false, true) => Phase::Ready,
                (false, false) => Phase::Loading,
            },
            loading_models,
            cached_prefixes: Vec::new(),
        };
        self.line.heartbeat(heartbeat).await;
    }
}

/// Does what a plan says, until its end, its time or a cancellation.
async fn perform(shared: Arc<Shared>, plan: Plan, received: Received, way: Way, in_work: InWork, deaths: mpsc::Sender<()>) {
    let request_id = received.request.request_id.as_str();
    let mut frozen = shared.frozen.subscribe();
    let mut loaded = shared.loaded.subscribe();
    let mut performance = Performance::new(plan, request_id, received.request.stream);
    let play = async {
        let _ = loaded.wait_for(|loaded| *loaded).await;
        let mut breath = 0;
        loop {
            let _ = frozen.wait_for(|frozen| !frozen).await;
            match performance.next() {
                Cue::Send(said) => {
                    way.send(request_id, said).await;
                    breath += 1;
                    if breath == BREATH {
                        breath = 0;
                        sleep(PAUSE).await;
                    }
                }
                Cue::Wait(pause) => sleep(pause).await,
                Cue::Stall => std::future::pending().await,
                Cue::Die => {
                    let _ = deaths.try_send(());
                    std::future::pending().await
                }
                Cue::End => return,
            }
        }
    };
    tokio::select! {
        biased;
        () = in_work.cancelled.cancelled() => {
            let _ = shared.frozen.subscribe().wait_for(|frozen| !frozen).await;
            way.send(request_id, refusal(ControllerErrorCode::Cancelled, "told to stop")).await;
        }
        () = sleep(received.timeout.saturating_add(LATE)) => {}
        () = play => {}
    }
}

fn refusal(code: ControllerErrorCode, why: &str) -> Said {
    Said::Reply(Reply::Error { message: why.to_owned(), code: Some(code.as_str().to_owned()), retry_after_ms: None })
}

/// The name of a life.
pub(super) fn incarnation() -> String {
    format!("{:032x}", fastrand::u128(..))
}
