//! The life of a worker.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::desk::{Desk, Limits};
use super::intake;
use super::job::JobQueue;
use super::local;
use super::machine;
use super::membership::{Membership, Stage};
use super::options::{self, WorkerOptions};
use super::pulse::Pulse;
use crate::config::{ClusterConfig, NatsConfig};
use crate::error::{ControllerError, ControllerErrorCode, epoch_ms};
use crate::transport::LocalPort;
use crate::transport::nats::{NatsConnection, WorkerService};
use crate::wire::{Capacity, Feature, PROTOCOL, Registration, Skills, WorkerId, WorkerStatus, subject};

/// How long a drained worker still answers requests that were on their way: they are refused and go elsewhere.
const LINGER: Duration = Duration::from_millis(100);
/// How long the last messages may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Where a worker is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WorkerState {
    /// Made, not started.
    Idle,
    /// It connects, and its engine gets ready.
    Starting,
    /// It takes requests.
    Ready,
    /// It takes no new ones and lets the running ones finish.
    Draining,
    /// It is over.
    Stopped,
}

/// A worker. Clones are the same one; when the last is dropped, it stops at once.
#[derive(Clone)]
pub struct Worker(Arc<Handle>);

/// Asks the worker to stop when nobody holds it any more.
struct Handle(Arc<Inner>);

struct Inner {
    registration: Mutex<Registration>,
    id: WorkerId,
    incarnation: String,
    nats: NatsConfig,
    heartbeat_interval: Duration,
    /// What an attempt may take that does not say.
    unsaid: Duration,
    desk: Arc<Desk>,
    state: watch::Sender<WorkerState>,
    /// Until when a drain may take, once it was asked for.
    stop: watch::Sender<Option<Instant>>,
    /// Why it has stopped.
    fate: watch::Sender<Option<Result<(), ControllerError>>>,
}

/// Cleans up after a start that fails, or whose future is dropped.
struct Starting<'a>(Option<&'a Arc<Inner>>);

// === impl WorkerState ===

impl WorkerState {
    /// The state as it is written everywhere: `ready`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

// === impl Worker ===

impl Worker {
    /// A worker that is idle. Needs no runtime.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED: no model, or an unsuitable name of one.
    pub fn new(options: WorkerOptions, config: &ClusterConfig) -> Result<Self, ControllerError> {
        let WorkerOptions { worker_id, models, max_concurrent, max_queue, mut features, files } = options;
        let models = options::models(models)?;
        let hostname = machine::host_name();
        let id = worker_id.unwrap_or_else(|| machine::default_worker_id(&hostname));
        let incarnation = format!("{:032x}", fastrand::u128(..));
        if !features.contains(&Feature::Cancel) {
            features.push(Feature::Cancel);
        }
        let loading = Duration::from_millis(config.request_routing.model_load_timeout_ms);
        let registration = Registration {
            protocol: Some(PROTOCOL),
            worker_id: id.clone(),
            incarnation: incarnation.clone(),
            hostname,
            ip: String::new(),
            port: 0,
            skills: Skills {
                available_models: models.clone(),
                model_paths: files.paths,
                total_model_size: files.size,
                last_scanned: files.last_scanned.unwrap_or_else(epoch_ms),
            },
            capacity: Capacity { max_concurrent, max_queue, memory_gb: machine::total_memory() },
            features,
            status: WorkerStatus::Online,
            timestamp: epoch_ms(),
        };
        Ok(Self(Arc::new(Handle(Arc::new(Inner {
            registration: Mutex::new(registration),
            id,
            incarnation,
            nats: config.nats.clone(),
            heartbeat_interval: Duration::from_millis(config.discovery.heartbeat_interval_ms),
            unsaid: Duration::from_millis(config.request_routing.stream_total_timeout_ms),
            desk: Desk::new(Limits { models, max_concurrent, max_queue, loading }),
            state: watch::Sender::new(WorkerState::Idle),
            stop: watch::Sender::default(),
            fate: watch::Sender::default(),
        })))))
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &WorkerId {
        &self.0.0.id
    }

    /// This life of it.
    #[must_use]
    pub fn incarnation(&self) -> &str {
        &self.0.0.incarnation
    }

    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> WorkerState {
        *self.0.0.state.borrow()
    }

    /// What it says of itself.
    #[must_use]
    pub fn registration(&self) -> Registration {
        self.0.0.registration.lock().clone()
    }

    /// The work for its engine.
    #[must_use]
    pub fn jobs(&self) -> JobQueue {
        JobQueue::new(self.0.0.desk.clone())
    }

    /// Returns when the engine has said that it can take work. Needs no start.
    ///
    /// # Errors
    /// MODEL_LOAD_FAILED with the engine's own words where it ended before.
    pub async fn engine_ready(&self) -> Result<(), ControllerError> {
        self.0.0.engine_ready().await
    }

    /// Connects to NATS, waits for the engine's first `Ready`, subscribes and registers. `nats_url` stands in place of
    /// what the configuration names.
    ///
    /// # Errors
    /// NATS_ERROR; MODEL_LOAD_FAILED with the engine's own words where it ended before it was ready; CONTROLLER_NOT_READY
    /// where it was started or stopped before. Nothing is left running.
    pub async fn start(&self, nats_url: Option<String>) -> Result<(), ControllerError> {
        let inner = &self.0.0;
        let starting = inner.begin()?;
        let result = inner.unless_stopped(inner.join_fleet(nats_url)).await;
        starting.settle(result)
    }

    /// Serves a controller of this process instead.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_local(&self, port: LocalPort) -> Result<(), ControllerError> {
        let inner = &self.0.0;
        let starting = inner.begin()?;
        let result = inner.unless_stopped(inner.engine_ready()).await.map(|()| {
            inner.state.send_replace(WorkerState::Ready);
            tokio::spawn(inner.clone().live_locally(port));
        });
        starting.settle(result)
    }

    /// Deregisters, lets running and waiting jobs finish for so long, ends the rest with errors, closes the queue and the
    /// connection. In any state, and any number of times: the shortest limit counts. Returns when the worker has stopped.
    pub async fn stop(&self, drain_timeout: Duration) {
        self.begin_stop(drain_timeout);
        let _ = self.0.0.state.subscribe().wait_for(|state| *state == WorkerState::Stopped).await;
    }

    /// As [`Self::stop`], without waiting for it.
    pub fn begin_stop(&self, drain_timeout: Duration) {
        self.0.0.request_stop(drain_timeout);
    }

    /// Returns when the worker has stopped: by `stop`, or because its engine ended, or another took its name (then the error).
    ///
    /// # Errors
    /// Why it stopped by itself.
    pub async fn wait(&self) -> Result<(), ControllerError> {
        let mut fate = self.0.0.fate.subscribe();
        match fate.wait_for(Option::is_some).await {
            Ok(fate) => fate.clone().unwrap_or(Ok(())),
            Err(_) => Ok(()),
        }
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("id", self.id()).field("state", &self.state()).finish_non_exhaustive()
    }
}

// === impl Handle ===

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.request_stop(Duration::ZERO);
    }
}

// === impl Inner ===

impl Inner {
    fn begin(self: &Arc<Self>) -> Result<Starting<'_>, ControllerError> {
        let begun = self.state.send_if_modified(|state| {
            let idle = *state == WorkerState::Idle;
            if idle {
                *state = WorkerState::Starting;
            }
            idle
        });
        if begun {
            return Ok(Starting(Some(self)));
        }
        let state = self.state.borrow().as_str();
        Err(ControllerError::new(
            ControllerErrorCode::ControllerNotReady,
            format!("worker {} is {state}: a worker starts once; make a new one", self.id),
        ))
    }

    fn request_stop(&self, drain_timeout: Duration) {
        let now = Instant::now();
        let until = now.checked_add(drain_timeout).unwrap_or_else(|| now + Duration::from_secs(365 * 86_400));
        self.stop.send_modify(|stop| *stop = Some(stop.map_or(until, |earlier| earlier.min(until))));
        let never_started = self.state.send_if_modified(|state| {
            let idle = *state == WorkerState::Idle;
            if idle {
                *state = WorkerState::Draining;
            }
            idle
        });
        if never_started {
            self.over(Ok(()));
        }
    }

    /// The work of a start, or the error that it was stopped meanwhile.
    async fn unless_stopped(&self, work: impl Future<Output = Result<(), ControllerError>>) -> Result<(), ControllerError> {
        let mut stop = self.stop.subscribe();
        tokio::select! {
            biased;
            result = work => result,
            _ = stop.wait_for(Option::is_some) => Err(ControllerError::new(
                ControllerErrorCode::ControllerNotReady,
                format!("worker {} was stopped while it started", self.id),
            )),
        }
    }

    /// Returns when the engine can take work.
    async fn engine_ready(&self) -> Result<(), ControllerError> {
        let mut board = self.desk.board.subscribe();
        let ended = match board.wait_for(|board| board.was_ready || board.ended.is_some()).await {
            Ok(board) => board.ended.clone(),
            Err(_) => None,
        };
        match ended {
            None => Ok(()),
            Some(error) => {
                let words = error.unwrap_or_else(|| "it returned without a word".to_owned());
                Err(ControllerError::new(
                    ControllerErrorCode::ModelLoadFailed,
                    format!("the engine of worker {} ended before it was ready: {words}", self.id),
                ))
            }
        }
    }

    /// Returns with the reason when the engine has ended.
    async fn engine_ended(&self) -> ControllerError {
        let mut board = self.desk.board.subscribe();
        let error = board.wait_for(|board| board.ended.is_some()).await.ok().and_then(|board| board.ended.clone()).flatten();
        let words = error.unwrap_or_else(|| "it returned although its queue was open".to_owned());
        ControllerError::new(ControllerErrorCode::WorkerUnavailable, format!("the engine of worker {} ended: {words}", self.id))
            .with("workerId", &self.id)
    }

    async fn join_fleet(self: &Arc<Self>, nats_url: Option<String>) -> Result<(), ControllerError> {
        let config = options::reachable(&self.nats, nats_url)?;
        let connection = NatsConnection::connect(&config, &format!("mlx-worker {}", self.id)).await?;
        let joined = self.join_over(&connection, &config).await;
        if joined.is_err() {
            connection.close().await;
        }
        joined
    }

    async fn join_over(self: &Arc<Self>, connection: &NatsConnection, config: &NatsConfig) -> Result<(), ControllerError> {
        self.engine_ready().await?;
        // Loading may take minutes, in which the connection may have been lost.
        let mut link = connection.link();
        let limit = Duration::from_millis(config.connect_timeout_ms);
        let _ = tokio::time::timeout(limit, link.wait_for(|link| link.connected)).await;
        let registration = {
            let mut registration = self.registration.lock();
            registration.ip = connection.own_address();
            registration.clone()
        };
        let prefix = connection.prefix();
        let mut membership =
            Membership::open(connection.clone(), self.desk.clone(), registration, self.heartbeat_interval).await?;
        let cancels = connection.subscribe(subject::cancel(prefix, &self.id)).await?;
        let service = WorkerService::open(
            connection,
            subject::inference(prefix, &self.id),
            &self.incarnation,
            membership.metadata(),
            statistics(&self.desk),
        )
        .await?;
        connection.flush().await?;
        membership.register().await?;
        connection.flush().await?;
        self.state.send_replace(WorkerState::Ready);
        let closing = CancellationToken::new();
        let intake = intake::from_nats(self.desk.clone(), service, cancels, self.unsaid, closing.clone());
        let intake = AbortOnDropHandle::new(tokio::spawn(intake));
        tokio::spawn(self.clone().live_on_nats(connection.clone(), membership, intake, closing));
        Ok(())
    }

    async fn live_on_nats(
        self: Arc<Self>,
        connection: NatsConnection,
        membership: Membership,
        mut intake: AbortOnDropHandle<()>,
        closing: CancellationToken,
    ) {
        let _tasks = self.common_tasks(Some(connection.clone()));
        let (stages, stage) = watch::channel(Stage::Serving);
        let mut membership = AbortOnDropHandle::new(tokio::spawn(membership.run(stage)));
        let mut stop = self.stop.subscribe();
        let mut left = false;
        let why = tokio::select! {
            _ = stop.wait_for(Option::is_some) => Ok(()),
            error = self.engine_ended() => Err(error),
            ended = &mut membership => {
                left = true;
                ended.unwrap_or_else(|error| Err(broken(&error)))
            }
        };
        self.state.send_replace(WorkerState::Draining);
        stages.send_replace(Stage::Draining);
        self.finish_work(why.is_ok(), LINGER).await;
        stages.send_replace(Stage::Leaving);
        if !left {
            let _ = tokio::time::timeout(LAST_WORDS, &mut membership).await;
        }
        closing.cancel();
        let _ = tokio::time::timeout(LAST_WORDS, &mut intake).await;
        // Until the server has taken that nobody listens here, it sends requests that nobody answers.
        let _ = tokio::time::timeout(LAST_WORDS, connection.flush()).await;
        connection.close().await;
        self.over(why);
    }

    async fn live_locally(self: Arc<Self>, port: LocalPort) {
        let _tasks = self.common_tasks(None);
        let pulse = Pulse::new(self.desk.clone(), &self.registration.lock());
        let (stages, stage) = watch::channel(Stage::Serving);
        let served = local::serve(self.desk.clone(), port, pulse, self.heartbeat_interval, stage);
        let mut served = AbortOnDropHandle::new(tokio::spawn(served));
        let mut stop = self.stop.subscribe();
        let mut controller_gone = false;
        let why = tokio::select! {
            _ = stop.wait_for(Option::is_some) => Ok(()),
            error = self.engine_ended() => Err(error),
            _ = &mut served => {
                controller_gone = true;
                Ok(())
            }
        };
        self.state.send_replace(WorkerState::Draining);
        stages.send_replace(Stage::Draining);
        self.finish_work(why.is_ok() && !controller_gone, Duration::ZERO).await;
        self.over(why);
    }

    fn common_tasks(&self, connection: Option<NatsConnection>) -> [AbortOnDropHandle<()>; 2] {
        [tokio::spawn(self.desk.outbox.clone().run(connection)), tokio::spawn(self.desk.clone().watch_time())]
            .map(AbortOnDropHandle::new)
    }

    /// Lets the jobs finish where there is time, ends the rest, and waits until all of it is said.
    async fn finish_work(&self, may_finish: bool, linger: Duration) {
        if may_finish {
            let mut stop = self.stop.subscribe();
            loop {
                let until = stop.borrow_and_update().unwrap_or_else(Instant::now);
                self.desk.drain(until);
                tokio::select! {
                    biased;
                    () = self.desk.emptied() => {
                        tokio::time::sleep_until(until.min(Instant::now() + linger)).await;
                        break;
                    }
                    _ = self.engine_ended() => break,
                    () = tokio::time::sleep_until(until) => break,
                    _ = stop.changed() => {}
                }
            }
        }
        self.desk.close("the worker stopped before the request was done");
        let _ = tokio::time::timeout(LAST_WORDS, self.desk.outbox.drained()).await;
    }

    /// The end.
    fn over(&self, why: Result<(), ControllerError>) {
        self.desk.close("the worker has stopped");
        if let Err(error) = &why {
            tracing::error!(worker = self.id.as_str(), %error, "the worker has stopped");
        }
        // Who waits for its fate finds it stopped.
        self.state.send_replace(WorkerState::Stopped);
        self.fate.send_if_modified(|fate| {
            let first = fate.is_none();
            fate.get_or_insert(why);
            first
        });
    }
}

// === impl Starting ===

impl Starting<'_> {
    fn settle(mut self, result: Result<(), ControllerError>) -> Result<(), ControllerError> {
        if let (Err(error), Some(inner)) = (&result, self.0) {
            inner.over(Err(error.clone()));
        }
        self.0 = None;
        result
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(inner) = self.0 {
            inner.over(Ok(()));
        }
    }
}

/// What `$SRV.STATS` shows.
fn statistics(desk: &Arc<Desk>) -> impl FnMut() -> serde_json::Value + Send + Sync + 'static {
    let desk = desk.clone();
    move || {
        let census = desk.census(0);
        serde_json::json!({
            "activeRequests": census.active,
            "queueDepth": census.waiting,
            "totalRequestsHandled": census.tally.handled,
            "failed": census.tally.failed,
            "refused": census.tally.refused,
            "tokensGenerated": census.tally.tokens,
            "avgLatencyMs": census.tally.mean_ms(),
        })
    }
}

fn broken(error: &tokio::task::JoinError) -> ControllerError {
    ControllerError::new(ControllerErrorCode::InternalError, format!("the worker's membership failed: {error}"))
}
