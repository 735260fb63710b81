//! What one process has one of: the tokio runtime, the event loops that it answers to, the buffer of its logs.
//!
//! Made at the first use and remembered with the process id. A forked child has its own: that of the parent is left alone
//! there, never used and never dropped, since its threads are gone and its locks may be held for ever.

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

use super::event_loop::EventLoops;
use super::logs::{self, Logs};

/// Requests wait for I/O; the work in between is small, and cores are wanted for Python and for models.
const THREADS: usize = 2;
/// How long the exit of the interpreter waits for threads that do not stop.
const SHUTDOWN: Duration = Duration::from_secs(1);

/// The id of this process; asking the system each time would cost a system call.
static ID: AtomicU32 = AtomicU32::new(0);

static CURRENT: ArcSwapOption<Process> = ArcSwapOption::const_empty();

/// What this process has.
pub(super) struct Process {
    id: u32,
    handle: Handle,
    /// The thread in which the interpreter exits, from then on.
    exits_in: OnceLock<ThreadId>,
    /// None once the interpreter exits.
    runtime: Mutex<Option<Runtime>>,
    pub(super) event_loops: EventLoops,
    pub(super) logs: Logs,
}

/// A value of the process that made it. Elsewhere, in a forked child, it cannot be had, and is left alone.
pub(super) struct OfProcess<T> {
    id: u32,
    what: &'static str,
    value: Option<T>,
}

/// The id of this process.
fn process_id() -> u32 {
    match ID.load(Ordering::Relaxed) {
        0 => {
            let id = std::process::id();
            ID.store(id, Ordering::Relaxed);
            id
        }
        id => id,
    }
}

/// To be called in a forked child before anything else: the id has changed.
#[pyfunction]
pub(super) fn forked() {
    ID.store(std::process::id(), Ordering::Relaxed);
}

/// What this process has, made now where it has nothing yet.
pub(super) fn current(_py: Python<'_>) -> PyResult<Arc<Process>> {
    let id = process_id();
    if let Some(process) = CURRENT.load().as_ref().filter(|process| process.id == id) {
        return if process.is_over() {
            Err(PyRuntimeError::new_err("the interpreter is exiting: nothing can be started any more"))
        } else {
            Ok(Arc::clone(process))
        };
    }
    let runtime = Builder::new_multi_thread().worker_threads(THREADS).thread_name("mlx-serving-router").enable_all().build()?;
    let process = Arc::new(Process {
        id,
        handle: runtime.handle().clone(),
        exits_in: OnceLock::new(),
        runtime: Mutex::new(Some(runtime)),
        event_loops: EventLoops::default(),
        logs: Logs::default(),
    });
    logs::install();
    // Dropping the parent's runtime would wait for threads that a child does not have.
    std::mem::forget(CURRENT.swap(Some(Arc::clone(&process))));
    Ok(process)
}

/// What this process has, where it has anything. Also once the interpreter exits.
pub(super) fn existing() -> Option<Arc<Process>> {
    CURRENT.load_full().filter(|process| process.id == process_id())
}

/// The interpreter begins to exit, in this thread: what other threads wait for is over, and none of their business.
#[pyfunction]
pub(super) fn exits() {
    if let Some(process) = existing() {
        let _ = process.exits_in.set(std::thread::current().id());
    }
}

/// Ends the runtime with all that it runs. Called at the exit of the interpreter, which is not needed for it; without effect
/// in a forked child.
#[pyfunction]
pub(super) fn shutdown(py: Python<'_>) {
    if let Some(runtime) = existing().and_then(|process| process.runtime.lock().take()) {
        py.detach(|| runtime.shutdown_timeout(SHUTDOWN));
    }
}

// === impl Process ===

impl Process {
    /// Runs a future.
    pub(super) fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.handle.spawn(future)
    }

    /// Whether the interpreter exits, and not in this thread.
    pub(super) fn leaves_behind(&self) -> bool {
        self.exits_in.get().is_some_and(|thread| *thread != std::thread::current().id())
    }

    /// Whether the interpreter exits: nothing runs here any more.
    pub(super) fn is_over(&self) -> bool {
        self.runtime.lock().is_none()
    }

    /// The runtime.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

// === impl OfProcess ===

impl<T> OfProcess<T> {
    /// Binds a value to this process. `what` names it in errors.
    pub(super) fn new(what: &'static str, value: T) -> Self {
        Self { id: process_id(), what, value: Some(value) }
    }

    /// The value.
    pub(super) fn get(&self) -> PyResult<&T> {
        match &self.value {
            Some(value) if self.id == process_id() => Ok(value),
            _ => Err(PyRuntimeError::new_err(format!(
                "this {} belongs to process {}, which was forked into this one ({}); make a new controller here",
                self.what,
                self.id,
                process_id()
            ))),
        }
    }

    /// The value, where this is its process.
    pub(super) fn if_here(&self) -> Option<&T> {
        self.value.as_ref().filter(|_| self.id == process_id())
    }
}

impl<T> Drop for OfProcess<T> {
    fn drop(&mut self) {
        if self.id != process_id() {
            std::mem::forget(self.value.take());
        }
    }
}
