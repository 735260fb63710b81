//! The worker's runtime for Python: what `WorkerNode` in `_worker.py` stands on, and the thread of an engine.
//!
//! The thread is Rust's own, so that it can be joined as the operating system understands it, with the interpreter
//! released: an engine may take the interpreter once more while the thread's storage is destroyed.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use tokio::sync::watch;

use super::config::PyClusterConfig;
use super::controller::{PyController, duration};
use super::job::PyJobQueue;
use super::runtime::{self, OfProcess};
use super::{bridge, errors};
use crate::error::ControllerError;
use crate::wire::{Feature, WorkerId};
use crate::worker::{Worker, WorkerOptions};

/// The worker of the core; `WorkerNode` is its public face.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "Worker")]
pub(super) struct PyWorker(OfProcess<Inner>);

struct Inner {
    worker: Worker,
    engine: Arc<EngineThread>,
}

/// The thread of an engine.
#[derive(Default)]
struct EngineThread {
    handle: Mutex<Option<JoinHandle<()>>>,
    /// `run` has returned; what is left is the thread's own end.
    returned: watch::Sender<bool>,
    /// What it raised.
    error: Mutex<Option<PyErr>>,
}

// === impl EngineThread ===

impl EngineThread {
    /// Waits until the thread is gone. False: it is still there after this time.
    async fn joined(self: Arc<Self>, limit: Duration) -> bool {
        if self.handle.lock().is_none() {
            return true;
        }
        let mut returned = self.returned.subscribe();
        if tokio::time::timeout(limit, returned.wait_for(|returned| *returned)).await.is_err() {
            return false;
        }
        let handle = self.handle.lock().take();
        if let Some(handle) = handle {
            let _ = tokio::task::spawn_blocking(move || handle.join()).await;
        }
        true
    }
}

#[pymethods]
impl PyWorker {
    #[new]
    #[pyo3(signature = (config, *, models, worker_id=None, max_concurrent=1, max_queue=64, features=Vec::new()))]
    fn new(
        py: Python<'_>,
        config: &Bound<'_, PyClusterConfig>,
        models: Vec<String>,
        worker_id: Option<&str>,
        max_concurrent: u32,
        max_queue: u32,
        features: Vec<String>,
    ) -> PyResult<Self> {
        runtime::current(py)?;
        let worker_id = worker_id.map(|id| WorkerId::new(id).map_err(|error| ControllerError::validation("worker_id", error)));
        let worker_id = errors::unwrap(py, worker_id.transpose())?;
        let features = features.iter().map(|name| feature(name)).collect::<Result<_, _>>();
        let features = errors::unwrap(py, features)?;
        let options = WorkerOptions { worker_id, models, max_concurrent, max_queue, features };
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
        let mut handle = inner.engine.handle.lock();
        if handle.is_some() || *inner.engine.returned.borrow() {
            return Err(PyRuntimeError::new_err("an engine runs once"));
        }
        let run = move || {
            let words = Python::try_attach(|py| {
                let result = engine.bind(py).call_method1("run", (queue,));
                drop(engine);
                let error = result.err()?;
                let words = words(py, &error);
                *thread.error.lock() = Some(error);
                Some(words)
            });
            jobs.engine_ended(words.flatten());
            thread.returned.send_replace(true);
        };
        *handle = Some(std::thread::Builder::new().name("mlx-engine".into()).spawn(run)?);
        Ok(())
    }

    /// What the engine raised; `None` where it raised nothing.
    fn engine_error(&self, py: Python<'_>) -> PyResult<Option<PyErr>> {
        Ok(self.0.get()?.engine.error.lock().as_ref().map(|error| error.clone_ref(py)))
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

fn words(py: Python<'_>, error: &PyErr) -> String {
    let kind = error.get_type(py).name().map_or_else(|_| "exception".to_owned(), |name| name.to_string());
    match error.value(py).str() {
        Ok(text) if !text.to_string_lossy().is_empty() => format!("{kind}: {}", text.to_string_lossy()),
        _ => kind,
    }
}
