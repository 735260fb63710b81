//! Who is in the fleet: what workers and controllers say about themselves.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::WorkerId;

/// `<P>worker.register`: a worker and what it can do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Registration {
    /// The protocol it speaks; absent from workers of the older dialect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// Its name.
    pub worker_id: WorkerId,
    /// New at every start of the worker; with the name it tells one life of it from the next.
    #[serde(default)]
    pub incarnation: String,
    /// The machine's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// The machine's address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ip: String,
    /// A port of the worker's own, if it has one.
    #[serde(default)]
    pub port: u16,
    /// The models.
    #[serde(default)]
    pub skills: Skills,
    /// The room.
    #[serde(default)]
    pub capacity: Capacity,
    /// What it can do beyond answering.
    #[serde(default)]
    pub features: Vec<Feature>,
    /// How it is.
    #[serde(default)]
    pub status: WorkerStatus,
    /// The worker's clock; shown, never used.
    #[serde(default)]
    pub timestamp: u64,
}

/// The models that a worker can serve.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Skills {
    /// Their names.
    pub available_models: Vec<String>,
    /// Where they lie on the worker's disk.
    pub model_paths: BTreeMap<String, String>,
    /// Their size on disk together, in bytes.
    pub total_model_size: u64,
    /// When the worker last looked for models.
    pub last_scanned: u64,
}

/// How much a worker takes at a time. Zero means: it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Capacity {
    /// Requests at the same time.
    pub max_concurrent: u32,
    /// Requests that wait.
    pub max_queue: u32,
    /// Memory for models and caches.
    #[serde(rename = "memoryGB")]
    pub memory_gb: f64,
}

/// What a worker can do beyond answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Feature {
    /// It continues after tokens that another worker delivered.
    Resume,
    /// It stops on request.
    Cancel,
    /// It works on several requests at once.
    Batch,
    /// Something that this version does not know.
    #[serde(other)]
    Unknown,
}

/// What a worker says of its own fitness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerStatus {
    /// To be chosen only when no online worker is free.
    Degraded,
    /// Finishes what it has and takes nothing new.
    Draining,
    /// Gone.
    Offline,
    /// Ready for work. Also what an unknown word is read as.
    #[default]
    #[serde(other)]
    Online,
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It loads a model: busy, not dead.
    Loading,
    /// It finishes what it has.
    Draining,
    /// It serves. Also what an unknown word is read as.
    #[default]
    #[serde(other)]
    Ready,
}

/// `<P>worker.heartbeat`: a sign of life with the load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    /// Its name.
    pub worker_id: WorkerId,
    /// Which life of it; absent from workers of the older dialect.
    #[serde(default)]
    pub incarnation: String,
    /// Counts up from one heartbeat to the next.
    #[serde(default)]
    pub sequence: u64,
    /// How it is.
    #[serde(default)]
    pub status: WorkerStatus,
    /// The worker's clock; shown, never used.
    #[serde(default)]
    pub timestamp: u64,
    /// Load and use.
    #[serde(default)]
    pub metrics: HeartbeatMetrics,
    /// Requests that wait at the worker.
    #[serde(default)]
    pub queue_depth: u32,
    /// The requests it works on, whoever sent them; absent from workers of the older dialect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_request_ids: Option<Vec<String>>,
    /// Tokens since its start.
    #[serde(default)]
    pub tokens_generated: u64,
    /// What it is doing.
    #[serde(default)]
    pub phase: Phase,
    /// Models on their way into memory.
    #[serde(default)]
    pub loading_models: Vec<String>,
    /// Hashes of the prompts in its caches, at most 256; see [`PrefixHashes`](super::PrefixHashes).
    #[serde(default)]
    pub cached_prefixes: Vec<String>,
}

/// Load and use of a worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HeartbeatMetrics {
    /// Of all cores together, 0 to 100.
    pub cpu_usage_percent: f64,
    /// Resident memory of the worker process.
    #[serde(rename = "memoryUsedGB")]
    pub memory_used_gb: f64,
    /// 0 to 100; 0 where it is not known.
    pub gpu_utilization_percent: f64,
    /// Requests running and waiting.
    pub active_requests: u32,
    /// Requests ended since its start.
    pub total_requests_handled: u64,
    /// Mean time from a request's arrival to its end.
    pub avg_latency_ms: f64,
    /// Models in memory.
    pub models_loaded: Vec<String>,
}

/// `<P>worker.deregister`: a worker that drains says that it wants nothing new.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Deregistration {
    /// Its name.
    pub worker_id: WorkerId,
    /// The worker's clock; shown, never used.
    #[serde(default)]
    pub timestamp: u64,
}

/// `<P>controller.hello` and `<P>controller.heartbeat`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControllerNotice {
    /// The controller's name.
    pub controller_id: String,
    /// How often it says this.
    pub heartbeat_interval_ms: u64,
    /// The controller's clock; shown, never used.
    #[serde(default)]
    pub timestamp: u64,
}

// === impl Registration ===

impl Registration {
    /// Whether it is of the older dialect.
    #[must_use]
    pub fn is_older(&self) -> bool {
        self.protocol.is_none()
    }
}

// === impl Heartbeat ===

impl Heartbeat {
    /// Whether it is of the older dialect.
    #[must_use]
    pub fn is_older(&self) -> bool {
        self.incarnation.is_empty()
    }
}

// === impl WorkerStatus ===

impl WorkerStatus {
    /// The status as it is written everywhere.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Degraded => "degraded",
            Self::Draining => "draining",
            Self::Offline => "offline",
        }
    }
}

// === impl Phase ===

impl Phase {
    /// The phase as it is written everywhere.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}
