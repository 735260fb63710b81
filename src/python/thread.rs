//! Threads that can be waited for: that of an engine, and those on which it loads its models.
//!
//! They are Rust's own, so that they can be joined as the operating system understands it, with the interpreter released: mlx
//! takes the interpreter once more while a thread's storage is destroyed. `threading.Thread.join` of Python 3.11 and 3.12
//! returns before that, and an interpreter that exits in between aborts.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::prelude::*;
use tokio::sync::watch;

use super::controller::duration;
use super::runtime::OfProcess;
use super::{bridge, errors};

/// A thread that runs Python once.
#[derive(Default)]
pub(super) struct Thread {
    handle: Mutex<Option<JoinHandle<()>>>,
    /// What it runs has returned; what is left is the thread's own end.
    returned: watch::Sender<bool>,
    /// What that raised.
    error: Mutex<Option<PyErr>>,
}

/// A thread that calls `target` at once.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "Thread")]
pub(super) struct PyThread(OfProcess<Arc<Thread>>);

// === impl Thread ===

impl Thread {
    /// Starts. `ended` gets the words of what was raised. False: it was started before.
    pub(super) fn spawn(
        self: Arc<Self>,
        name: &str,
        run: impl FnOnce(Python<'_>) -> PyResult<()> + Send + 'static,
        ended: impl FnOnce(Option<String>) + Send + 'static,
    ) -> PyResult<bool> {
        let mut handle = self.handle.lock();
        if handle.is_some() || *self.returned.borrow() {
            return Ok(false);
        }
        let thread = self.clone();
        let run = move || {
            let words = Python::try_attach(|py| {
                let error = run(py).err()?;
                let words = words(py, &error);
                *thread.error.lock() = Some(error);
                Some(words)
            });
            ended(words.flatten());
            thread.returned.send_replace(true);
        };
        *handle = Some(std::thread::Builder::new().name(name.to_owned()).spawn(run)?);
        Ok(true)
    }

    /// What was raised.
    pub(super) fn error(&self, py: Python<'_>) -> Option<PyErr> {
        self.error.lock().as_ref().map(|error| error.clone_ref(py))
    }

    /// Waits until the thread is gone. False: it is still there after this time.
    pub(super) async fn joined(self: Arc<Self>, limit: Duration) -> bool {
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
impl PyThread {
    #[new]
    fn new(target: Py<PyAny>, name: &str) -> PyResult<Self> {
        let thread = Arc::new(Thread::default());
        thread.clone().spawn(name, move |py| target.call0(py).map(drop), |_| {})?;
        Ok(Self(OfProcess::new("thread", thread)))
    }

    /// Waits until it is gone. False: it is still there after so many seconds.
    fn join(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let limit = errors::unwrap(py, duration("timeout", timeout))?;
        bridge::block_on_any(py, self.0.get()?.clone().joined(limit))
    }
}

fn words(py: Python<'_>, error: &PyErr) -> String {
    let kind = error.get_type(py).name().map_or_else(|_| "exception".to_owned(), |name| name.to_string());
    match error.value(py).str() {
        Ok(text) if !text.to_string_lossy().is_empty() => format!("{kind}: {}", text.to_string_lossy()),
        _ => kind,
    }
}
