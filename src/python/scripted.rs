//! Scripted workers for Python: what `mlx_serving_router.testing` stands on. No Python runs while one performs.
//!
//! What changes a worker is blocking and short; what waits for others is there twice.

use std::time::Duration;

use pyo3::prelude::*;

use super::config::PyClusterConfig;
use super::controller::{PyController, duration};
use super::request::PyInferenceRequest;
use super::runtime::{self, OfProcess};
use super::script::{PyScript, at_least_0, truth};
use super::{bridge, errors, quoted, worker};
use crate::error::ControllerError;
use crate::wire::WorkerId;
use crate::worker::scripted::{Cancelled, Counts, Received, ScriptedOptions, ScriptedWorker};

/// A request as it reached a scripted worker.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "ReceivedRequest")]
pub(super) struct PyReceivedRequest {
    received: Received,
    request: Py<PyInferenceRequest>,
}

/// A cancellation as it reached a scripted worker.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "ReceivedCancel")]
pub(super) struct PyReceivedCancel(Cancelled);

/// The scripted worker of the core; that of `mlx_serving_router.testing` is its public face.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "ScriptedWorker")]
pub(super) struct PyScriptedWorker {
    worker: OfProcess<ScriptedWorker>,
    config: PyClusterConfig,
}

#[pymethods]
impl PyReceivedRequest {
    /// Names the request everywhere.
    #[getter]
    fn request_id(&self) -> &str {
        &self.received.request.request_id
    }

    /// 1 for the first worker that was asked, 2 for the second, and so on.
    #[getter]
    fn attempt(&self) -> u32 {
        self.received.attempt
    }

    /// The model.
    #[getter]
    fn model_id(&self) -> &str {
        &self.received.request.model_id
    }

    /// The conversation that it belongs to.
    #[getter]
    fn session_id(&self) -> Option<&str> {
        self.received.request.session_id.as_deref()
    }

    /// Whether tokens are wanted as they come.
    #[getter]
    fn stream(&self) -> bool {
        self.received.request.stream
    }

    /// How many seconds it may take, to its end.
    #[getter]
    fn timeout(&self) -> f64 {
        self.received.timeout.as_secs_f64()
    }

    /// Who asked.
    #[getter]
    fn controller_id(&self) -> &str {
        &self.received.controller_id
    }

    /// All of it, the prompt included.
    #[getter]
    fn request(&self, py: Python<'_>) -> Py<PyInferenceRequest> {
        self.request.clone_ref(py)
    }

    fn __repr__(&self) -> String {
        let Received { request, attempt, .. } = &self.received;
        let stream = truth(request.stream);
        format!(
            "ReceivedRequest(request_id={}, attempt={attempt}, model_id={}, stream={stream})",
            quoted(&request.request_id),
            quoted(&request.model_id)
        )
    }
}

#[pymethods]
impl PyReceivedCancel {
    /// The request.
    #[getter]
    fn request_id(&self) -> &str {
        &self.0.request_id
    }

    /// Its attempt.
    #[getter]
    fn attempt(&self) -> u32 {
        self.0.attempt
    }

    fn __hash__(&self) -> u64 {
        super::hash(&(&self.0.request_id, self.0.attempt))
    }

    fn __repr__(&self) -> String {
        format!("ReceivedCancel(request_id={}, attempt={})", quoted(&self.0.request_id), self.0.attempt)
    }
}

#[pymethods]
impl PyScriptedWorker {
    #[new]
    #[pyo3(signature = (config, script, *, models, worker_id=None, max_concurrent=0, features=Vec::new(), loading_ms=0))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn new(
        py: Python<'_>,
        config: &Bound<'_, PyClusterConfig>,
        script: &Bound<'_, PyScript>,
        models: Vec<String>,
        worker_id: Option<&str>,
        max_concurrent: u32,
        features: Vec<String>,
        loading_ms: i64,
    ) -> PyResult<Self> {
        runtime::current(py)?;
        let worker_id = worker_id.map(|id| WorkerId::new(id).map_err(|error| ControllerError::validation("worker_id", error)));
        let worker_id = errors::unwrap(py, worker_id.transpose())?;
        let features = features.iter().map(|name| worker::feature(name)).collect::<Result<_, _>>();
        let config = config.get().clone();
        let options = ScriptedOptions {
            worker_id,
            models,
            max_concurrent,
            features: errors::unwrap(py, features)?,
            heartbeat_interval: Duration::from_millis(config.0.discovery.heartbeat_interval_ms),
            loading: Duration::from_millis(at_least_0("loading_ms", loading_ms)?),
            script: script.get().script.clone(),
        };
        let worker = errors::unwrap(py, ScriptedWorker::new(options))?;
        Ok(Self { worker: OfProcess::new("scripted worker", worker), config })
    }

    /// Its name.
    #[getter]
    fn worker_id(&self) -> PyResult<String> {
        Ok(self.worker.get()?.id().to_string())
    }

    /// This life of it, or the next.
    #[getter]
    fn incarnation(&self) -> PyResult<String> {
        Ok(self.worker.get()?.registration().incarnation)
    }

    /// Where it is in its life.
    #[getter]
    fn state(&self) -> PyResult<&'static str> {
        Ok(self.worker.get()?.state().as_str())
    }

    /// What it serves.
    #[getter]
    fn models(&self) -> PyResult<Vec<String>> {
        Ok(self.worker.get()?.registration().skills.available_models)
    }

    /// Connects to NATS and registers.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        let (worker, nats) = (self.worker.get()?.clone(), self.config.0.nats.clone());
        bridge::block_on(py, async move { worker.start(&nats).await })
    }

    /// Joins a controller of this process.
    fn start_local(&self, py: Python<'_>, controller: &Bound<'_, PyController>) -> PyResult<()> {
        let worker = self.worker.get()?.clone();
        let port = errors::unwrap(py, controller.get().0.get()?.attach_local(&worker.registration()))?;
        bridge::block_on(py, async move { worker.start_local(port).await })
    }

    /// Is gone without a word.
    fn die(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.worker.get()?.clone();
        bridge::block_on_any(py, async move { worker.die().await })
    }

    /// Says goodbye and goes.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.worker.get()?.clone();
        bridge::block_on_any(py, async move { worker.stop().await })
    }

    /// Wants nothing new.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.worker.get()?.clone();
        bridge::block_on_any(py, async move { worker.drain().await })
    }

    /// Takes requests, or nobody listens for them.
    #[pyo3(signature = (*, listens))]
    fn listen(&self, py: Python<'_>, listens: bool) -> PyResult<()> {
        let worker = self.worker.get()?.clone();
        bridge::block_on_any(py, async move { worker.listen(listens).await })
    }

    /// Stands still.
    fn freeze(&self) -> PyResult<()> {
        self.worker.get()?.freeze();
        Ok(())
    }

    /// Goes on.
    fn thaw(&self) -> PyResult<()> {
        self.worker.get()?.thaw();
        Ok(())
    }

    /// Does this from the next request on.
    fn now_does(&self, script: &Bound<'_, PyScript>) -> PyResult<()> {
        self.worker.get()?.now_does(&script.get().script);
        Ok(())
    }

    /// How long its models take to load after its next start.
    fn set_loading(&self, loading_ms: i64) -> PyResult<()> {
        self.worker.get()?.set_loading(Duration::from_millis(at_least_0("loading_ms", loading_ms)?));
        Ok(())
    }

    /// Whether it gives signs of life.
    fn set_heartbeats(&self, beats: bool) -> PyResult<()> {
        self.worker.get()?.set_heartbeats(beats);
        Ok(())
    }

    /// Whether a cancellation ends what it does.
    fn set_obeys_cancels(&self, obeys: bool) -> PyResult<()> {
        self.worker.get()?.set_obeys_cancels(obeys);
        Ok(())
    }

    /// What it was asked, oldest first: the last thousand.
    fn requests(&self, py: Python<'_>) -> PyResult<Vec<PyReceivedRequest>> {
        let received = self.worker.get()?.requests();
        received.into_iter().map(|received| PyReceivedRequest::new(py, received)).collect()
    }

    /// What it was told to stop, oldest first: the last thousand.
    fn cancels(&self) -> PyResult<Vec<PyReceivedCancel>> {
        Ok(self.worker.get()?.cancels().into_iter().map(PyReceivedCancel).collect())
    }

    /// How many requests came, how many cancellations, and how many requests it works on.
    fn counts(&self) -> PyResult<(u64, u64, usize)> {
        let Counts { requests, cancels, in_flight } = self.worker.get()?.counts();
        Ok((requests, cancels, in_flight))
    }

    /// Waits, awaited, until at least so many came, or it is idle. False: not within so many seconds.
    #[pyo3(signature = (timeout, *, requests=0, cancels=0, idle=false))]
    fn wait_until<'py>(
        &self,
        py: Python<'py>,
        timeout: f64,
        requests: u64,
        cancels: u64,
        idle: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let limit = errors::unwrap(py, duration("timeout", timeout))?;
        let worker = self.worker.get()?.clone();
        bridge::awaitable(py, async move { Ok(met(&worker, limit, requests, cancels, idle).await) })
    }

    /// As `wait_until`, blocking.
    #[pyo3(signature = (timeout, *, requests=0, cancels=0, idle=false))]
    fn wait_until_blocking(&self, py: Python<'_>, timeout: f64, requests: u64, cancels: u64, idle: bool) -> PyResult<bool> {
        let limit = errors::unwrap(py, duration("timeout", timeout))?;
        let worker = self.worker.get()?.clone();
        bridge::block_on_any(py, async move { met(&worker, limit, requests, cancels, idle).await })
    }
}

// === impl PyReceivedRequest ===

impl PyReceivedRequest {
    fn new(py: Python<'_>, received: Received) -> PyResult<Self> {
        let request = Py::new(py, PyInferenceRequest(received.request.clone()))?;
        Ok(Self { received, request })
    }
}

async fn met(worker: &ScriptedWorker, limit: Duration, requests: u64, cancels: u64, idle: bool) -> bool {
    let is_met = |counts: &Counts| counts.requests >= requests && counts.cancels >= cancels && (!idle || counts.in_flight == 0);
    tokio::time::timeout(limit, worker.wait_until(is_met)).await.is_ok()
}
