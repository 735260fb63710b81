//! The controller for Python: what `ControllerNode` in `_controller.py` stands on.
//!
//! Each thing that takes time is there twice: as an awaitable, and as a blocking call.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::answer::PyInferenceResponse;
use super::config::PyClusterConfig;
use super::events::PyEvents;
use super::fleet::{self, PyClusterStatus, PyWorkerInfo};
use super::metadata::PyRequestMetadata;
use super::request::PyInferenceRequest;
use super::runtime::{self, OfProcess};
use super::stream::{BlockingTokenStream, PyTokenStream, Reader};
use super::{bridge, errors};
use crate::dispatch::{CallOptions, Controller};
use crate::error::ControllerError;
use crate::wire::InferenceRequest;

/// The controller of the core; `ControllerNode` is its public face.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "Controller")]
pub(super) struct PyController(pub(super) OfProcess<Controller>);

fn options(timeout: Option<f64>, worker_id: Option<String>, traceparent: Option<String>) -> Result<CallOptions, ControllerError> {
    let timeout = timeout.map(|seconds| duration("timeout", seconds)).transpose()?;
    Ok(CallOptions { timeout, worker_id, traceparent: traceparent.map(Arc::from) })
}

pub(super) fn duration(name: &str, seconds: f64) -> Result<Duration, ControllerError> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| ControllerError::validation(name, format!("is {seconds}; a number of seconds of at least 0 is right")))
}

fn streaming(
    controller: Controller,
    request: Arc<InferenceRequest>,
    options: CallOptions,
) -> impl Future<Output = Result<Reader, ControllerError>> + Send + 'static {
    let idle = Duration::from_millis(controller.config().request_routing.stream_idle_timeout_ms);
    async move { controller.streaming(request, options).await.map(|stream| Reader::new(stream, idle)) }
}

/// True once so many workers are online, false when the time has passed.
async fn wait_for_workers(controller: Controller, count: usize, timeout: Option<Duration>) -> Result<bool, ControllerError> {
    let online = controller.wait_for_workers(count);
    match timeout {
        None => online.await.map(|()| true),
        Some(timeout) => match tokio::time::timeout(timeout, online).await {
            Ok(result) => result.map(|()| true),
            Err(_) => Ok(false),
        },
    }
}

/// How many workers are waited for.
fn at_least_none(count: i64) -> PyResult<usize> {
    usize::try_from(count).map_err(|_| PyValueError::new_err(format!("n is {count}; 0 or more workers can be waited for")))
}

#[pymethods]
impl PyController {
    #[new]
    #[pyo3(signature = (config, controller_id=None))]
    fn new(py: Python<'_>, config: &Bound<'_, PyClusterConfig>, controller_id: Option<String>) -> PyResult<Self> {
        // The runtime is made with the first controller: what the core logs from here on reaches Python.
        runtime::current(py)?;
        let controller = Controller::new(config.get().0.clone(), controller_id);
        let controller = controller.map_err(|error| errors::raise_settings(py, &error))?;
        Ok(Self(OfProcess::new("controller", controller)))
    }

    /// Its name.
    #[getter]
    fn controller_id(&self) -> PyResult<&str> {
        Ok(self.0.get()?.id())
    }

    /// Its configuration.
    #[getter]
    fn config(&self) -> PyResult<PyClusterConfig> {
        Ok(PyClusterConfig(self.0.get()?.config().clone()))
    }

    /// Where it is in its life.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        errors::controller_state(py, self.0.get()?.state())
    }

    /// Starts. `nats_url` stands in place of `nats.serverUrl`.
    #[pyo3(signature = (nats_url=None))]
    fn start<'py>(&self, py: Python<'py>, nats_url: Option<String>) -> PyResult<Bound<'py, PyAny>> {
        let controller = self.0.get()?.clone();
        bridge::awaitable(py, async move { controller.start(nats_url).await })
    }

    /// As `start`, blocking.
    #[pyo3(signature = (nats_url=None))]
    fn start_blocking(&self, py: Python<'_>, nats_url: Option<String>) -> PyResult<()> {
        let controller = self.0.get()?.clone();
        bridge::block_on(py, async move { controller.start(nats_url).await })
    }

    /// Stops: running requests may finish for so many seconds.
    fn stop<'py>(&self, py: Python<'py>, drain_timeout: f64) -> PyResult<Bound<'py, PyAny>> {
        let drain_timeout = errors::unwrap(py, duration("drain_timeout", drain_timeout))?;
        let controller = self.0.get()?.clone();
        bridge::awaitable(py, async move {
            controller.stop(drain_timeout).await;
            Ok(())
        })
    }

    /// As `stop`, blocking.
    fn stop_blocking(&self, py: Python<'_>, drain_timeout: f64) -> PyResult<()> {
        let drain_timeout = errors::unwrap(py, duration("drain_timeout", drain_timeout))?;
        let controller = self.0.get()?.clone();
        bridge::block_on_any(py, async move { controller.stop(drain_timeout).await })
    }

    /// True once so many workers are online, false when so many seconds have passed.
    fn wait_for_workers<'py>(&self, py: Python<'py>, count: i64, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        let timeout = errors::unwrap(py, timeout.map(|seconds| duration("timeout", seconds)).transpose())?;
        bridge::awaitable(py, wait_for_workers(self.0.get()?.clone(), at_least_none(count)?, timeout))
    }

    /// As `wait_for_workers`, blocking.
    fn wait_for_workers_blocking(&self, py: Python<'_>, count: i64, timeout: Option<f64>) -> PyResult<bool> {
        let timeout = errors::unwrap(py, timeout.map(|seconds| duration("timeout", seconds)).transpose())?;
        bridge::block_on(py, wait_for_workers(self.0.get()?.clone(), at_least_none(count)?, timeout))
    }

    /// An answer in one piece.
    #[pyo3(signature = (request, *, timeout=None, worker_id=None, traceparent=None))]
    fn buffered<'py>(
        &self,
        py: Python<'py>,
        request: &Bound<'py, PyInferenceRequest>,
        timeout: Option<f64>,
        worker_id: Option<String>,
        traceparent: Option<String>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let options = errors::unwrap(py, options(timeout, worker_id, traceparent))?;
        let (controller, request) = (self.0.get()?.clone(), Arc::clone(&request.get().0));
        bridge::awaitable(py, async move {
            let answer = controller.buffered(request, options).await?;
            Ok(PyInferenceResponse(Arc::new(answer)))
        })
    }

    /// As `buffered`, blocking.
    #[pyo3(signature = (request, *, timeout=None, worker_id=None))]
    fn buffered_blocking(
        &self,
        py: Python<'_>,
        request: &Bound<'_, PyInferenceRequest>,
        timeout: Option<f64>,
        worker_id: Option<String>,
    ) -> PyResult<PyInferenceResponse> {
        let options = errors::unwrap(py, options(timeout, worker_id, None))?;
        let (controller, request) = (self.0.get()?.clone(), Arc::clone(&request.get().0));
        let answer = async move { controller.buffered(request, options).await };
        Ok(PyInferenceResponse(Arc::new(bridge::block_on(py, answer)?)))
    }

    /// An answer as it comes.
    #[pyo3(signature = (request, *, timeout=None, worker_id=None, traceparent=None))]
    fn streaming<'py>(
        &self,
        py: Python<'py>,
        request: &Bound<'py, PyInferenceRequest>,
        timeout: Option<f64>,
        worker_id: Option<String>,
        traceparent: Option<String>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let options = errors::unwrap(py, options(timeout, worker_id, traceparent))?;
        let stream = streaming(self.0.get()?.clone(), Arc::clone(&request.get().0), options);
        bridge::awaitable(py, async move { stream.await.map(PyTokenStream::new) })
    }

    /// As `streaming`, blocking.
    #[pyo3(signature = (request, *, timeout=None, worker_id=None))]
    fn streaming_blocking(
        &self,
        py: Python<'_>,
        request: &Bound<'_, PyInferenceRequest>,
        timeout: Option<f64>,
        worker_id: Option<String>,
    ) -> PyResult<BlockingTokenStream> {
        let options = errors::unwrap(py, options(timeout, worker_id, None))?;
        let stream = streaming(self.0.get()?.clone(), Arc::clone(&request.get().0), options);
        bridge::block_on(py, stream).map(BlockingTokenStream::new)
    }

    /// Every known worker, by id.
    fn workers(&self) -> PyResult<Vec<PyWorkerInfo>> {
        Ok(self.0.get()?.workers().into_iter().map(PyWorkerInfo::from).collect())
    }

    /// One worker; `None` where it is not known.
    fn worker(&self, worker_id: &str) -> PyResult<Option<PyWorkerInfo>> {
        Ok(self.0.get()?.worker(worker_id).map(PyWorkerInfo::from))
    }

    /// The fleet and its requests in numbers.
    fn cluster_status(&self) -> PyResult<PyClusterStatus> {
        Ok(self.0.get()?.cluster_status().into())
    }

    /// The breakers, by worker; empty where they are disabled.
    fn breaker_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let shown = PyDict::new(py);
        for (worker, stats) in self.0.get()?.breaker_stats() {
            shown.set_item(worker.as_str(), fleet::breaker_stats(py, &stats)?)?;
        }
        Ok(shown)
    }

    /// False: there is no such worker, or there are no breakers.
    fn reset_breaker(&self, worker_id: &str) -> PyResult<bool> {
        Ok(self.0.get()?.reset_breaker(worker_id))
    }

    /// False: there is no such worker, or there are no breakers.
    fn force_open_breaker(&self, worker_id: &str) -> PyResult<bool> {
        Ok(self.0.get()?.force_open_breaker(worker_id))
    }

    /// False: there is no such worker.
    fn drain_worker(&self, worker_id: &str) -> PyResult<bool> {
        Ok(self.0.get()?.drain_worker(worker_id))
    }

    /// What is known of a request; `None` where nothing is.
    fn request_metrics(&self, request_id: &str) -> PyResult<Option<PyRequestMetadata>> {
        Ok(self.0.get()?.request_metrics(request_id).map(|metadata| PyRequestMetadata(Arc::new(metadata))))
    }

    /// What is known of all requests.
    #[pyo3(signature = (limit=None))]
    fn all_request_metrics(&self, py: Python<'_>, limit: Option<usize>) -> PyResult<Vec<PyRequestMetadata>> {
        let controller = self.0.get()?;
        let all = py.detach(|| controller.newest_request_metrics(limit.unwrap_or(usize::MAX)));
        Ok(all.into_iter().map(|metadata| PyRequestMetadata(Arc::new(metadata))).collect())
    }

    /// Numbers for Prometheus.
    fn metrics_text(&self, py: Python<'_>) -> PyResult<String> {
        let controller = self.0.get()?;
        Ok(py.detach(|| controller.metrics_text()))
    }

    /// What happens from now on.
    fn events(&self) -> PyResult<PyEvents> {
        Ok(PyEvents::new(self.0.get()?.events()))
    }
}
