//! The life of a scripted worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::line::{Arrival, Event, Line, Way};
use super::performance::{Cue, Performance, Said};
use super::record::{Cancelled, Counts, InWork, Received, Record};
use super::script::{Plan, Prompter, Script};
use crate::config::NatsConfig;
use crate::error::{ControllerError, ControllerErrorCode, epoch_ms};
use crate::transport::LocalPort;
use crate::wire::{
    Capacity, Feature, Heartbeat, HeartbeatMetrics, PROTOCOL, Phase, Registration, Reply, Skills, WorkerId, WorkerStatus,
};
use crate::worker::{machine, options};

/// How many requests it works on where its capacity says nothing; further ones are refused.
const MOST: usize = 10_000;
/// How long after its time a request is forgotten: late enough for its controller's own limits to be met first.
const LATE: Duration = Duration::from_secs(1);
/// After so many messages without a pause there is a short one: whoever reads them has other things to do as well.
const BREATH: u32 = 256;
const PAUSE: Duration = Duration::from_millis(1);
/// How many orders may wait.
const ORDERS: usize = 16;

/// What a scripted worker is.
#[derive(Clone, Debug)]
pub struct ScriptedOptions {
    /// Its name; one is made where none is given.
    pub worker_id: Option<WorkerId>,
    /// What it says that it serves.
    pub models: Vec<String>,
    /// How many requests it takes at a time; 0: it does not say.
    pub max_concurrent: u32,
    /// What it says that it can do.
    pub features: Vec<Feature>,
    /// How often it gives a sign of life.
    pub heartbeat_interval: Duration,
    /// How long its models take to load after a start; requests wait meanwhile.
    pub loading: Duration,
    /// What it does with requests.
    pub script: Script,
}

/// Where a scripted worker is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScriptedState {
    /// Made, not started.
    Idle,
    /// It takes requests.
    Running,
    /// It is there, and does nothing.
    Frozen,
    /// It takes no new requests.
    Draining,
    /// It went without a word.
    Dead,
    /// It said goodbye, or its controller has gone.
    Stopped,
}

/// A scripted worker. Clones are the same one; when the last is dropped, it is gone without a word.
#[derive(Clone, Debug)]
pub struct ScriptedWorker(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    life: Mutex<Option<Life>>,
}

/// One life, from a start to an end.
#[derive(Debug)]
struct Life {
    orders: mpsc::Sender<(Order, oneshot::Sender<()>)>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Die,
    Stop,
    Drain,
    Listen(bool),
}

#[derive(Debug)]
struct Shared {
    registration: Mutex<Registration>,
    heartbeat_interval: Duration,
    loading: Mutex<Duration>,
    prompter: Mutex<Prompter>,
    record: Arc<Record>,
    state: Mutex<ScriptedState>,
    frozen: watch::Sender<bool>,
    /// The models are there.
    loaded: watch::Sender<bool>,
    beats: AtomicBool,
    obeys: AtomicBool,
}

/// Cleans up after a start that fails, or whose future is dropped.
struct Beginning<'a>(Option<&'a Arc<Shared>>);

/// A life as its own task sees it.
struct Stage {
    shared: Arc<Shared>,
    line: Line,
    performances: JoinSet<()>,
    deaths: mpsc::Sender<()>,
    sequence: u64,
    draining: bool,
}

// === impl ScriptedState ===

impl ScriptedState {
    /// The state as it is written everywhere: `running`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Running => "running",
            Self::Frozen => "frozen",
            Self::Draining => "draining",
            Self::Dead => "dead",
            Self::Stopped => "stopped",
        }
    }
}

// === impl ScriptedWorker ===

impl ScriptedWorker {
    /// A worker that is idle. Needs no runtime.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED: no model, or an unsuitable name of one.
    pub fn new(options: ScriptedOptions) -> Result<Self, ControllerError> {
        let worker_id = options.worker_id.unwrap_or_else(|| machine::default_worker_id("scripted"));
        let skills = Skills { available_models: options::models(options.models)?, last_scanned: epoch_ms(), ..Skills::default() };
        let registration = Registration {
            protocol: Some(PROTOCOL),
            worker_id,
            incarnation: incarnation(),
            hostname: machine::host_name(),
            ip: String::new(),
            port: 0,
            skills,
            capacity: Capacity { max_concurrent: options.max_concurrent, ..Capacity::default() },
            features: options.features,
            status: WorkerStatus::Online,
            timestamp: epoch_ms(),
        };
        let shared = Shared {
            registration: Mutex::new(registration),
            heartbeat_interval: options.heartbeat_interval.max(PAUSE),
            loading: Mutex::new(options.loading),
            prompter: Mutex::new(Prompter::new(&options.script)),
            record: Arc::default(),
            state: Mutex::new(ScriptedState::Idle),
            frozen: watch::Sender::default(),
            loaded: watch::Sender::default(),
            beats: AtomicBool::new(true),
            obeys: AtomicBool::new(true),
        };
        Ok(Self(Arc::new(Handle { shared: Arc::new(shared), life: Mutex::default() })))
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> WorkerId {
        self.0.shared.registration.lock().worker_id.clone()
    }

    /// What it says of itself: in this life of it, or in the next where it is over.
    #[must_use]
    pub fn registration(&self) -> Registration {
        self.0.shared.registration.lock().clone()
    }

    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> ScriptedState {
        match *self.0.shared.state.lock() {
            ScriptedState::Running | ScriptedState::Draining if *self.0.shared.frozen.borrow() => ScriptedState::Frozen,
            state => state,
        }
    }

    /// Does this from the next request on, from its beginning.
    pub fn now_does(&self, script: &Script) {
        *self.0.shared.prompter.lock() = Prompter::new(script);
    }

    /// How long its models take to load after its next start.
    pub fn set_loading(&self, loading: Duration) {
        *self.0.shared.loading.lock() = loading;
    }

    /// Whether it gives signs of life.
    pub fn set_heartbeats(&self, beats: bool) {
        self.0.shared.beats.store(beats, Ordering::Relaxed);
    }

    /// Whether a cancellation ends what it does.
    pub fn set_obeys_cancels(&self, obeys: bool) {
        self.0.shared.obeys.store(obeys, Ordering::Relaxed);
    }

    /// What it was asked, oldest first: the last thousand.
    #[must_use]
    pub fn requests(&self) -> Vec<Received> {
        self.0.shared.record.requests()
    }

    /// What it was told to stop, oldest first: the last thousand.
    #[must_use]
    pub fn cancels(&self) -> Vec<Cancelled> {
        self.0.shared.record.cancels()
    }

    /// All that in numbers.
    #[must_use]
    pub fn counts(&self) -> Counts {
        *self.0.shared.record.counts().borrow()
    }

    /// Returns when the numbers are so.
    pub async fn wait_until(&self, is_so: impl Fn(&Counts) -> bool) {
        // The sender lives in what is borrowed here.
        let _ = self.0.shared.record.counts().wait_for(|counts| is_so(counts)).await;
    }

    /// Connects, subscribes and registers.
    ///
    /// # Errors
    /// NATS_ERROR; CONTROLLER_NOT_READY where it runs already. Nothing is left running.
    pub async fn start(&self, nats: &NatsConfig) -> Result<(), ControllerError> {
        let beginning = self.begin()?;
        let line = Line::nats(nats, &self.id()).await?;
        self.live(line, beginning).await
    }

    /// Takes the requests of a port, which [`registration`](Self::registration) was attached for.
    ///
    /// # Errors
    /// CONTROLLER_NOT_READY where it runs already.
    pub async fn start_local(&self, port: LocalPort) -> Result<(), ControllerError> {
        let beginning = self.begin()?;
        self.live(Line::local(port), beginning).await
    }

    /// Goes as a process does that is killed: no goodbye, no answer, nobody listens any more. Does nothing where it is over.
    pub async fn die(&self) {
        self.order(Order::Die).await;
    }

    /// Says goodbye and goes; what it works on ends in WORKER_UNAVAILABLE. Does nothing where it is over.
    pub async fn stop(&self) {
        self.order(Order::Stop).await;
    }

    /// Says that it wants nothing new, and finishes what it has.
    pub async fn drain(&self) {
        self.order(Order::Drain).await;
    }

    /// Takes requests, or nobody listens for them any more.
    pub async fn listen(&self, listens: bool) {
        self.order(Order::Listen(listens)).await;
    }

    /// Stands still as a stopped process does: what reaches it waits, nothing leaves it.
    pub fn freeze(&self) {
        self.0.shared.frozen.send_replace(true);
    }

    /// Goes on.
    pub fn thaw(&self) {
        self.0.shared.frozen.send_replace(false);
    }

    fn begin(&self) -> Result<Beginning<'_>, ControllerError> {
        let shared = &self.0.shared;
        let mut state = shared.state.lock();
        if matches!(*state, ScriptedState::Running | ScriptedState::Draining) {
            let message = format!("worker {} runs already", self.id());
            return Err(ControllerError::new(ControllerErrorCode::ControllerNotReady, message));
        }
        *state = ScriptedState::Running;
        shared.frozen.send_replace(false);
        Ok(Beginning(Some(shared)))
    }

    async fn live(&self, line: Line, mut beginning: Beginning<'_>) -> Result<(), ControllerError> {
        let shared = &self.0.shared;
        let (deaths, died) = mpsc::channel(1);
        let loading = *shared.loading.lock();
        shared.loaded.send_replace(loading.is_zero());
        let mut stage =
            Stage { shared: shared.clone(), line, performances: JoinSet::new(), deaths, sequence: 0, draining: false };
        stage.register().await?;
        let (orders, queue) = mpsc::channel(ORDERS);
        let task = AbortOnDropHandle::new(tokio::spawn(stage.run(queue, died, Instant::now() + loading)));
        *self.0.life.lock() = Some(Life { orders, _task: task });
        beginning.0 = None;
        Ok(())
    }

    /// Gives an order, and returns when it is carried out, or there is nobody to do so.
    async fn order(&self, order: Order) {
        let orders = self.0.life.lock().as_ref().map(|life| life.orders.clone());
        let (done, carried_out) = oneshot::channel();
        if let Some(orders) = orders
            && orders.send((order, done)).await.is_ok()
        {
            let _ = carried_out.await;
        }
    }
}

// === impl Beginning ===

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.over(ScriptedState::Stopped);
        }
    }
}

// === impl Shared ===

impl Shared {
    /// A life is over; the next is another incarnation.
    fn over(&self, state: ScriptedState) {
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
    /// Lives until it is told to go, dies by a script, or nobody is left to serve.
    async fn run(
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
            Event::Cancel(cancel, whose) => {
                self.shared.record.cancelled(cancel, whose.as_deref(), self.shared.obeys.load(Ordering::Relaxed));
            }
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
        let in_work = self.shared.record.begin(&received);
        self.performances.spawn(perform(self.shared.clone(), plan, received, way, in_work, self.deaths.clone()));
    }

    async fn register(&mut self) -> Result<(), ControllerError> {
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

fn incarnation() -> String {
    format!("{:032x}", fastrand::u128(..))
}
