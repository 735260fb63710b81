//! The fleet for Python: `WorkerInfo`, `ClusterStatus`, and what the breakers have seen.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{errors, json};
use crate::dispatch::ClusterStatus;
use crate::error::epoch_ms;
use crate::routing::{BreakerStats, Carrier, CircuitState, WorkerSnapshot};
use crate::wire::Feature;

/// A worker at one moment.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "WorkerInfo")]
pub(super) struct PyWorkerInfo(Document);

/// The fleet and its requests in numbers, at one moment.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "ClusterStatus")]
pub(super) struct PyClusterStatus(ClusterStatus);

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    worker_id: String,
    incarnation: String,
    status: String,
    phase: String,
    models: Vec<String>,
    loaded_models: Vec<String>,
    loading_models: Vec<String>,
    in_flight: u32,
    foreign_requests: u32,
    queue_depth: u32,
    max_concurrent: u32,
    last_seen_ms: u64,
    breaker: String,
    features: Vec<Feature>,
    hostname: String,
    carrier: String,
}

impl From<WorkerSnapshot> for PyWorkerInfo {
    fn from(worker: WorkerSnapshot) -> Self {
        let carrier = match worker.carrier {
            Carrier::Nats => "nats",
            Carrier::Http => "http",
            Carrier::Local => "local",
        };
        Self(Document {
            worker_id: worker.worker_id.to_string(),
            incarnation: worker.incarnation,
            status: worker.status.as_str().to_owned(),
            phase: worker.phase.as_str().to_owned(),
            models: worker.models,
            loaded_models: worker.loaded_models,
            loading_models: worker.loading_models,
            in_flight: worker.in_flight,
            foreign_requests: worker.foreign,
            queue_depth: worker.queue_depth,
            max_concurrent: worker.capacity.max_concurrent,
            last_seen_ms: u64::try_from(worker.last_seen.as_millis()).unwrap_or(u64::MAX),
            breaker: worker.breaker.as_str().to_owned(),
            features: worker.features.into_iter().filter(|feature| *feature != Feature::Unknown).collect(),
            hostname: worker.hostname,
            carrier: carrier.to_owned(),
        })
    }
}

impl From<ClusterStatus> for PyClusterStatus {
    fn from(status: ClusterStatus) -> Self {
        Self(status)
    }
}

#[pymethods]
impl PyWorkerInfo {
    /// A worker from its dictionary, as `to_dict` gives it.
    ///
    /// Raises:
    ///     TypeError: It has another shape.
    #[classmethod]
    fn from_dict(_class: &Bound<'_, PyType>, fields: &Bound<'_, PyAny>) -> PyResult<Self> {
        json::from_python("WorkerInfo", fields).map(Self)
    }

    /// Its dictionary, with camelCase keys.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0)
    }

    /// Its name.
    #[getter]
    fn worker_id(&self) -> &str {
        &self.0.worker_id
    }

    /// Which life of it; empty for workers of the older dialect.
    #[getter]
    fn incarnation(&self) -> &str {
        &self.0.incarnation
    }

    /// How it stands with this controller: `online`, `degraded`, `draining` or `offline`.
    #[getter]
    fn status(&self) -> &str {
        &self.0.status
    }

    /// What it is doing: `loading`, `ready` or `draining`.
    #[getter]
    fn phase(&self) -> &str {
        &self.0.phase
    }

    /// What it serves.
    #[getter]
    fn models(&self) -> Vec<String> {
        self.0.models.clone()
    }

    /// Models in memory.
    #[getter]
    fn loaded_models(&self) -> Vec<String> {
        self.0.loaded_models.clone()
    }

    /// Models on their way into memory.
    #[getter]
    fn loading_models(&self) -> Vec<String> {
        self.0.loading_models.clone()
    }

    /// Requests of this controller on it.
    #[getter]
    fn in_flight(&self) -> u32 {
        self.0.in_flight
    }

    /// Requests of other controllers on it, as far as it said so lately.
    #[getter]
    fn foreign_requests(&self) -> u32 {
        self.0.foreign_requests
    }

    /// Requests that wait at the worker.
    #[getter]
    fn queue_depth(&self) -> u32 {
        self.0.queue_depth
    }

    /// Requests that it takes at a time; 0: it does not say.
    #[getter]
    fn max_concurrent(&self) -> u32 {
        self.0.max_concurrent
    }

    /// How long ago it was last heard from, in milliseconds.
    #[getter]
    fn last_seen_ms(&self) -> u64 {
        self.0.last_seen_ms
    }

    /// The state of its circuit breaker; `DISABLED` where there are none.
    #[getter]
    fn breaker<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        errors::member(py, "CircuitState", &self.0.breaker)
    }

    /// What it can do beyond answering: `resume`, `cancel`, `batch`.
    #[getter]
    fn features<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0.features)
    }

    /// The machine's name.
    #[getter]
    fn hostname(&self) -> &str {
        &self.0.hostname
    }

    /// Who carries requests to it: `nats`, `http` or `local`.
    #[getter]
    fn carrier(&self) -> &str {
        &self.0.carrier
    }

    fn __hash__(&self) -> u64 {
        super::hash(&(&self.0.worker_id, &self.0.incarnation))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        super::reduce(slf.as_any(), slf.get().to_dict(slf.py())?)
    }

    fn __repr__(&self) -> String {
        let worker = &self.0;
        format!(
            "WorkerInfo(worker_id='{}', status='{}', phase='{}', models={}, in_flight={}, breaker='{}', last_seen_ms={})",
            worker.worker_id,
            worker.status,
            worker.phase,
            super::quoted_list(&worker.models),
            worker.in_flight,
            worker.breaker,
            worker.last_seen_ms,
        )
    }
}

#[pymethods]
impl PyClusterStatus {
    /// Its dictionary, with camelCase keys.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0)
    }

    /// The controller.
    #[getter]
    fn controller_id(&self) -> &str {
        &self.0.controller_id
    }

    /// Its state.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        errors::member(py, "ControllerState", self.0.state)
    }

    /// How many workers are known: `total`, `online`, `draining`, `offline`.
    #[getter]
    fn workers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0.workers)
    }

    /// How many requests there are and were: `active`, `queued` (of the active ones, those without a worker yet),
    /// `completed` (however they ended).
    #[getter]
    fn requests<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0.requests)
    }

    /// What online workers serve, sorted.
    #[getter]
    fn models(&self) -> Vec<String> {
        self.0.models.clone()
    }

    /// When this was, in milliseconds since the epoch.
    #[getter]
    fn timestamp(&self) -> u64 {
        self.0.timestamp
    }

    fn __hash__(&self) -> u64 {
        super::hash(&(&self.0.controller_id, self.0.timestamp))
    }

    fn __repr__(&self) -> String {
        let ClusterStatus { controller_id, state, workers, requests, models, .. } = &self.0;
        format!(
            "ClusterStatus(controller_id={}, state='{state}', workers={} of {} online, requests={} active and {} \
             completed, models={})",
            super::quoted(controller_id),
            workers.online,
            workers.total,
            requests.active,
            requests.completed,
            super::quoted_list(models),
        )
    }
}

/// What a breaker has seen, as a dictionary; points in time are milliseconds since the epoch.
pub(super) fn breaker_stats<'py>(py: Python<'py>, stats: &BreakerStats) -> PyResult<Bound<'py, PyDict>> {
    let now = Instant::now();
    let at = |instant: Option<Instant>| {
        let ago = instant.map(|instant| u64::try_from(now.saturating_duration_since(instant).as_millis()).unwrap_or(u64::MAX));
        ago.map(|ago| epoch_ms().saturating_sub(ago))
    };
    let shown = PyDict::new(py);
    shown.set_item("state", errors::circuit_state(py, stats.state)?)?;
    shown.set_item("failure_count", stats.failure_count)?;
    shown.set_item("success_count", stats.success_count)?;
    shown.set_item("consecutive_failures", stats.consecutive_failures)?;
    shown.set_item("opened_count", stats.opened_count)?;
    shown.set_item("window_requests", stats.window_requests)?;
    shown.set_item("window_failures", stats.window_failures)?;
    shown.set_item("probes", stats.probes)?;
    shown.set_item("last_failure_time", at(stats.last_failure))?;
    shown.set_item("last_success_time", at(stats.last_success))?;
    shown.set_item("opened_at", at(stats.opened_at))?;
    shown.set_item("retry_after_ms", stats.retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)))?;
    Ok(shown)
}

/// Every state of a breaker, for the Python enum to be checked against.
pub(super) const CIRCUIT_STATES: [CircuitState; 5] =
    [CircuitState::Closed, CircuitState::Open, CircuitState::HalfOpen, CircuitState::ForcedOpen, CircuitState::Disabled];
