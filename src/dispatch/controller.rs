//! The door of the room: the controller as the rest of the program holds it.
//!
//! It hands on: requests to `call` and `stream`, life to `lifecycle`, questions to the rooms that know.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::answer::Answer;
use super::call::Call;
use super::core::{Core, not_ready};
use super::events::Events;
use super::lifecycle::Lifecycle;
use super::limits::Mode;
use super::membership;
use super::stream::{self, TokenStream};
use crate::config::ClusterConfig;
use crate::error::{ControllerError, epoch_ms};
use crate::routing::{BreakerStats, Router, WorkerSnapshot};
use crate::telemetry::RequestMetadata;
use crate::transport::LocalPort;
use crate::wire::{InferenceRequest, Registration, WorkerId, WorkerStatus};

/// Where a controller is in its life. It goes through these in order, and once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ControllerState {
    /// Made, not started.
    Idle,
    /// It connects to NATS.
    Connecting,
    /// It subscribes, and asks the fleet to register.
    Registering,
    /// It starts its tasks.
    Starting,
    /// It takes requests.
    Ready,
    /// It takes no new ones and lets the running ones finish.
    Draining,
    /// It ends what is left.
    Stopping,
    /// It is over.
    Stopped,
}

/// What a caller may say about one request beside the request itself.
#[derive(Clone, Debug, Default)]
pub struct CallOptions {
    /// Bounds the whole call.
    pub timeout: Option<Duration>,
    /// This worker and no other: no balancing, no retry elsewhere.
    pub worker_id: Option<String>,
    /// The caller's W3C trace context.
    pub traceparent: Option<Arc<str>>,
}

/// The fleet and its requests in numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    /// The controller.
    pub controller_id: String,
    /// Its state.
    pub state: &'static str,
    /// Workers by status.
    pub workers: WorkerCounts,
    /// Requests by status.
    pub requests: RequestCounts,
    /// What online workers serve, sorted.
    pub models: Vec<String>,
    /// Now, in milliseconds since the epoch.
    pub timestamp: u64,
}

/// Workers by status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkerCounts {
    /// All that are known.
    pub total: usize,
    /// Those that may be given requests.
    pub online: usize,
    /// Those that finish what they have.
    pub draining: usize,
    /// Those that are silent.
    pub offline: usize,
}

/// Requests by status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RequestCounts {
    /// Not ended.
    pub active: usize,
    /// Of those, the ones without a worker yet.
    pub queued: usize,
    /// Ended since the start, however they did.
    pub completed: u64,
}

/// The controller. Clones are the same one; when the last one goes, it stops at once.
#[derive(Clone)]
pub struct Controller(Arc<Handle>);

/// Cuts everything off when nobody holds the controller any more.
struct Handle {
    core: Arc<Core>,
    life: Lifecycle,
}

// === impl ControllerState ===

impl ControllerState {
    /// All states, in order.
    pub const ALL: [Self; 8] = [
        Self::Idle,
        Self::Connecting,
        Self::Registering,
        Self::Starting,
        Self::Ready,
        Self::Draining,
        Self::Stopping,
        Self::Stopped,
    ];

    /// The state as it is written everywhere: `ready`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Connecting => "connecting",
            Self::Registering => "registering",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

// === impl Controller ===

impl Controller {
    /// A controller that is idle. Needs no runtime. An id is made where none is given.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED: the configuration asks for something that this version cannot do, or the id is unsuitable.
    pub fn new(config: ClusterConfig, controller_id: Option<String>) -> Result<Self, ControllerError> {
        let core = Core::new(config, controller_id)?;
        Ok(Self(Arc::new(Handle { life: Lifecycle::new(core.clone()), core })))
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.core().id
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &ClusterConfig {
        &self.core().config
    }

    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> ControllerState {
        self.core().state()
    }

    /// Starts. `nats_url` stands in place of `nats.serverUrl`: that of the embedded server. Dropping the future stops it.
    ///
    /// # Errors
    /// NATS_ERROR; CONTROLLER_NOT_READY where it was started before. After the former it has cleaned up and is `stopped`.
    pub async fn start(&self, nats_url: Option<String>) -> Result<(), ControllerError> {
        self.0.life.start(nats_url).await
    }

    /// Stops: nothing new, running requests may finish for so long, the rest ends with CONTROLLER_NOT_READY. May be called
    /// in any state and any number of times; returns when it is stopped.
    pub async fn stop(&self, drain_timeout: Duration) {
        self.0.life.stop(drain_timeout).await;
    }

    /// Returns when so many workers are online.
    ///
    /// # Errors
    /// CONTROLLER_NOT_READY: it stops.
    pub async fn wait_for_workers(&self, count: usize) -> Result<(), ControllerError> {
        let mut online = self.core().router.membership();
        let mut state = self.core().state.subscribe();
        tokio::select! {
            biased;
            _ = online.wait_for(|online| *online >= count) => Ok(()),
            _ = state.wait_for(|state| *state >= ControllerState::Draining) => Err(not_ready(self.state())),
        }
    }

    /// Answers in one piece. Dropping the future cancels.
    ///
    /// # Errors
    /// As spec/contract.md, section 4.
    pub async fn buffered(
        &self,
        request: impl Into<Arc<InferenceRequest>>,
        options: CallOptions,
    ) -> Result<Answer, ControllerError> {
        stream::gather(Call::open(self.core(), request.into(), options, Mode::Buffered)?).await
    }

    /// Answers as it comes: returns with the first token, or at the end of an answer without any. Dropping the future
    /// cancels.
    ///
    /// # Errors
    /// As [`Self::buffered`].
    pub async fn streaming(
        &self,
        request: impl Into<Arc<InferenceRequest>>,
        options: CallOptions,
    ) -> Result<TokenStream, ControllerError> {
        TokenStream::open(Call::open(self.core(), request.into(), options, Mode::Streaming)?).await
    }

    /// Every known worker, by id.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerSnapshot> {
        self.core().router.snapshot(Instant::now())
    }

    /// One worker.
    #[must_use]
    pub fn worker(&self, id: &str) -> Option<WorkerSnapshot> {
        self.core().router.worker(id, Instant::now())
    }

    /// The fleet and its requests in numbers.
    #[must_use]
    pub fn cluster_status(&self) -> ClusterStatus {
        let core = self.core();
        let mut workers = WorkerCounts::default();
        for worker in self.workers() {
            workers.total += 1;
            match worker.status {
                WorkerStatus::Online | WorkerStatus::Degraded => workers.online += 1,
                WorkerStatus::Draining => workers.draining += 1,
                WorkerStatus::Offline => workers.offline += 1,
            }
        }
        ClusterStatus {
            controller_id: core.id.to_string(),
            state: core.state().as_str(),
            workers,
            requests: RequestCounts {
                active: core.requests.active(),
                queued: core.requests.queued(),
                completed: core.requests.completed(),
            },
            models: core.router.models(),
            timestamp: epoch_ms(),
        }
    }

    /// The breakers, by worker; empty where they are disabled.
    #[must_use]
    pub fn breaker_stats(&self) -> Vec<(WorkerId, BreakerStats)> {
        self.core().router.breaker_stats(Instant::now())
    }

    /// Closes a breaker and forgets what it has seen. False: no such worker, or no breakers.
    #[must_use]
    pub fn reset_breaker(&self, worker: &str) -> bool {
        self.core().router.reset_breaker(worker, Instant::now())
    }

    /// Opens a breaker until it is reset. False: no such worker, or no breakers.
    #[must_use]
    pub fn force_open_breaker(&self, worker: &str) -> bool {
        self.core().router.force_open_breaker(worker, Instant::now())
    }

    /// Gives a worker nothing new from this controller. False: no such worker.
    #[must_use]
    pub fn drain_worker(&self, worker: &str) -> bool {
        self.core().router.drain(worker, Instant::now())
    }

    /// What is known of a request; none for one that is unknown or forgotten.
    #[must_use]
    pub fn request_metrics(&self, request_id: &str) -> Option<RequestMetadata> {
        self.core().requests.get(request_id, Instant::now())
    }

    /// What is known of all requests: the ended ones in the order of their ends, then the active ones.
    #[must_use]
    pub fn all_request_metrics(&self) -> Vec<RequestMetadata> {
        self.core().requests.all(Instant::now())
    }

    /// The last `most` of [`Self::all_request_metrics`].
    #[must_use]
    pub fn newest_request_metrics(&self, most: usize) -> Vec<RequestMetadata> {
        self.core().requests.newest(most, Instant::now())
    }

    /// Numbers for Prometheus, as [`CONTENT_TYPE`](crate::telemetry::CONTENT_TYPE) names them.
    #[must_use]
    pub fn metrics_text(&self) -> String {
        self.core().metrics_text()
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.core().events.reader()
    }

    /// Adds a worker of this process; requests to it come out of the port. It leaves the fleet when its port is dropped.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED: a worker of this id is there already, or the fleet is full. CONTROLLER_NOT_READY: it stops.
    pub fn attach_local(&self, registration: &Registration) -> Result<LocalPort, ControllerError> {
        membership::attach_local(self.core(), registration)
    }

    /// The deciding core, for tests that play the membership messages of a fleet without a server.
    #[doc(hidden)]
    #[must_use]
    pub fn router(&self) -> &Arc<Router> {
        &self.core().router
    }

    fn core(&self) -> &Arc<Core> {
        &self.0.core
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.life.abandon();
    }
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("id", &self.core().id).field("state", &self.state()).finish_non_exhaustive()
    }
}
