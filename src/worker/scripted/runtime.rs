//! The life of a scripted worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::line::Line;
use super::record::{Cancelled, Counts, Received};
use super::script::{Prompter, Script};
use super::stage::{Order, SHORTEST_BEAT, Shared, Stage, incarnation};
use crate::config::NatsConfig;
use crate::error::{ControllerError, ControllerErrorCode, epoch_ms};
use crate::transport::LocalPort;
use crate::wire::{Capacity, Feature, PROTOCOL, Registration, Skills, WorkerId, WorkerStatus};
use crate::worker::{machine, options};

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

/// Cleans up after a start that fails, or whose future is dropped.
struct Beginning<'a>(Option<&'a Arc<Shared>>);

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
            heartbeat_interval: options.heartbeat_interval.max(SHORTEST_BEAT),
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
    /// NATS_ERROR: no server, or none that a worker can know of; CONTROLLER_NOT_READY where it runs already. Nothing is
    /// left running.
    pub async fn start(&self, nats: &NatsConfig) -> Result<(), ControllerError> {
        let beginning = self.begin()?;
        let nats = options::reachable(nats, None)?;
        let line = Line::nats(&nats, &self.id()).await?;
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
        let mut stage = Stage::new(shared.clone(), line, deaths);
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
            tokio::select! {
                _ = carried_out => {}
                // One that comes in the moment of the end stays in the channel, neither heard nor dropped.
                () = orders.closed() => {}
            }
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
