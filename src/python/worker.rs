//! The worker's runtime for Python: what `WorkerNode` in `_worker.py` stands on.

use std::collections::BTreeMap;
use std::sync::Arc;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use super::config::PyClusterConfig;
use super::controller::{PyController, duration};
use super::job::PyJobQueue;
use super::runtime::{self, OfProcess};
use super::thread::Thread;
use super::{bridge, errors};
use crate::error::ControllerError;
use crate::wire::{Feature, WorkerId};
use crate::worker::{ModelFiles, Worker, WorkerOptions};

/// The worker of the core; `WorkerNode` is its public face.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "Worker")]
pub(super) struct PyWorker(OfProcess<Inner>);

struct Inner {
    worker: Worker,
    engine: Arc<Thread>,
}

#[pymethods]
impl PyWorker {
    #[new]
    #[pyo3(signature = (config, *, models, worker_id=None, max_concurrent=1, max_queue=64, features=Vec::new(),
        model_paths=BTreeMap::new(), total_model_size=0, last_scanned=None))]
    #[expect(clippy::too_many_arguments, reason = "named arguments of Python")]
    fn new(
        py: Python<'_>,
        config: &Bound<'_, PyClusterConfig>,
        models: Vec<String>,
        worker_id: Option<&str>,
        max_concurrent: u32,
        max_queue: u32,
        features: Vec<String>,
        model_paths: BTreeMap<String, String>,
        total_model_size: u64,
        last_scanned: Option<u64>,
    ) -> PyResult<Self> {
        runtime::current(py)?;
        let worker_id = worker_id.map(|id| WorkerId::new(id).map_err(|error| ControllerError::validation("worker_id", error)));
        let worker_id = errors::unwrap(py, worker_id.transpose())?;
        let features = features.iter().map(|name| feature(name)).collect::<Result<_, _>>();
        let features = errors::unwrap(py, features)?;
        let files = ModelFiles { paths: model_paths, size: total_model_size, last_scanned };
        let options = WorkerOptions { worker_id, models, max_concurrent, max_queue, features, files };
        let worker = errors::unwrap(py, Worker::new(options, &config.get().0))?;
        Ok(Self(OfProcess::new("worker", Inner { worker, engine: Arc::default() })))
    }

    /// Its name.
    #[getter]
    fn worker_id(&self) -> PyResult<&str> {
        Ok(self.0.get()?.worker.id())
    }

    /// This life of it.
    #[getter]
    fn incarnation(&self) -> PyResult<&str> {
        Ok(self.0.get()?.worker.incarnation())
    }

    /// Where it is in its life.
    #[getter]
    fn state(&self) -> PyResult<&'static str> {
        Ok(self.0.get()?.worker.state().as_str())
    }

    /// What it serves.
    #[getter]
    fn models(&self) -> PyResult<Vec<String>> {
        Ok(self.0.get()?.worker.registration().skills.available_models)
    }

    /// The work for its engine.
    fn jobs(&self) -> PyResult<PyJobQueue> {
        Ok(PyJobQueue(OfProcess::new("job queue", self.0.get()?.worker.jobs())))
    }

    /// Calls `engine.run` with the queue on a thread of its own. Once.
    fn run_engine(&self, py: Python<'_>, engine: Py<PyAny>) -> PyResult<()> {
        let inner = self.0.get()?;
        // Made before the lock: an allocation may run the collector, and with it anything.
        let (jobs, thread) = (inner.worker.jobs(), inner.engine.clone());
        let queue = Py::new(py, PyJobQueue(OfProcess::new("job queue", jobs.clone())))?;
        let run = engine.getattr(py, "run")?;
        drop(engine);
        let ended = move |words| jobs.engine_ended(words);
        if thread.spawn("mlx-engine", move |py| run.call1(py, (queue,)).map(drop), ended)? {
            return Ok(());
        }
        Err(PyRuntimeError::new_err("an engine runs once"))
    }

    /// What the engine raised; `None` where it raised nothing.
    fn engine_error(&self, py: Python<'_>) -> PyResult<Option<PyErr>> {
        Ok(self.0.get()?.engine.error(py))
    }

    /// Waits, awaited, until the engine's thread is gone. False: it is still there after so many seconds.
    fn engine_joined<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyAny>> {
        let limit = errors::unwrap(py, duration("timeout", timeout))?;
        let engine = self.0.get()?.engine.clone();
        bridge::awaitable(py, async move { Ok(engine.joined(limit).await) })
    }

    /// As `engine_joined`, blocking.
    fn engine_joined_blocking(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let limit = errors::unwrap(py, duration("timeout", timeout))?;
        bridge::block_on_any(py, self.0.get()?.engine.clone().joined(limit))
    }

    /// Waits until the engine can take work.
    fn engine_ready_blocking(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.0.get()?.worker.clone();
        bridge::block_on(py, async move { worker.engine_ready().await })
    }

    /// Connects, waits for the engine, registers.
    fn start<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let worker = self.0.get()?.worker.clone();
        bridge::awaitable(py, async move { worker.start(None).await })
    }

    /// As `start`, blocking.
    fn start_blocking(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.0.get()?.worker.clone();
        bridge::block_on(py, async move { worker.start(None).await })
    }

    /// Joins a controller of this process, whose engine is ready. Returns at once.
    fn start_local(&self, py: Python<'_>, controller: &Bound<'_, PyController>) -> PyResult<()> {
        let worker = self.0.get()?.worker.clone();
        let attached = controller.get().0.get()?.attach_local(&worker.registration());
        let port = errors::unwrap(py, attached)?;
        runtime::current(py)?.spawn(async move { worker.start_local(port).await });
        Ok(())
    }

    /// Stops: running jobs may finish for so many seconds.
    fn stop<'py>(&self, py: Python<'py>, drain_timeout: f64) -> PyResult<Bound<'py, PyAny>> {
        let drain_timeout = errors::unwrap(py, duration("drain_timeout", drain_timeout))?;
        let worker = self.0.get()?.worker.clone();
        bridge::awaitable(py, async move {
            worker.stop(drain_timeout).await;
            Ok(())
        })
    }

    /// As `stop`, blocking.
    fn stop_blocking(&self, py: Python<'_>, drain_timeout: f64) -> PyResult<()> {
        let drain_timeout = errors::unwrap(py, duration("drain_timeout", drain_timeout))?;
        let worker = self.0.get()?.worker.clone();
        bridge::block_on_any(py, async move { worker.stop(drain_timeout).await })
    }

    /// As `stop`, without waiting for it.
    fn begin_stop(&self, py: Python<'_>, drain_timeout: f64) -> PyResult<()> {
        let drain_timeout = errors::unwrap(py, duration("drain_timeout", drain_timeout))?;
        self.0.get()?.worker.begin_stop(drain_timeout);
        Ok(())
    }

    /// Returns, awaited, when it has stopped; raises why where it did so by itself.
    fn wait<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let worker = self.0.get()?.worker.clone();
        bridge::awaitable(py, async move { worker.wait().await })
    }

    /// As `wait`, blocking.
    fn wait_blocking(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.0.get()?.worker.clone();
        bridge::block_on(py, async move { worker.wait().await })
    }
}

pub(super) fn feature(name: &str) -> Result<Feature, ControllerError> {
    match name {
        "resume" => Ok(Feature::Resume),
        "cancel" => Ok(Feature::Cancel),
        "batch" => Ok(Feature::Batch),
        other => Err(ControllerError::validation(
            "features",
            format!("{other:?} is unknown; 'resume', 'cancel' and 'batch' are right"),
        )),
    }
}
