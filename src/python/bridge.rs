//! Rust futures for Python: awaited in an event loop, or waited for in a thread.
//!
//! The work runs on the runtime's own threads, which never take the interpreter: an awaiting task is woken through its
//! event loop ([`super::event_loop`]), and what came of the work becomes a Python object in the loop's own thread. An await
//! that ends in any other way, by a cancellation or with its [`Call`], aborts the work: dropping a future of the core undoes
//! all that it holds.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pyo3::conversion::IntoPyObjectExt;
use pyo3::exceptions::{PyRuntimeError, PyStopIteration};
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};
use tokio::task::AbortHandle;

use super::errors;
use super::event_loop::Waiter;
use super::runtime::{self, OfProcess};
use crate::error::ControllerError;

/// How often a thread that waits looks for signals, Ctrl-C among them.
const SIGNALS_EVERY: Duration = Duration::from_millis(50);
/// How long an interrupted thread waits for the work to let go of what it holds.
const ABORT_WITHIN: Duration = Duration::from_secs(1);

/// Work on the runtime, to be awaited once in the event loop in which it was begun. Dropping it aborts the work.
#[pyclass(frozen, module = "mlx_serving_router._native")]
pub(super) struct Call(OfProcess<Inner>);

struct Inner {
    outcome: Arc<dyn Outcome>,
    /// Who waits, and for what; none where the outcome was there from the beginning.
    waits: Option<(Arc<Waiter>, AbortHandle)>,
}

/// Where the work leaves its result.
struct Slot<T, C>(Mutex<(Option<T>, Option<C>)>);

trait Outcome: Send + Sync {
    /// The result as a Python object; none while there is none.
    fn take(&self, py: Python<'_>) -> Option<PyResult<Py<PyAny>>>;

    /// Lets go of the result, be it there or not.
    fn discard(&self);
}

/// Wakes however the work ends: a panic must not leave a task waiting for ever.
struct WakeAtEnd(Arc<Waiter>);

/// Where a thread waits for the work.
struct Meeting<T> {
    state: Mutex<Met<T>>,
    changed: Condvar,
}

struct Met<T> {
    result: Option<T>,
    ended: bool,
}

/// Ends the wait however the work ends.
struct NotifyAtEnd<T>(Arc<Meeting<T>>);

/// Begins the work, and gives an awaitable for its result in the running event loop. A task that is cancelled while it
/// awaits aborts the work.
///
/// # Errors
/// `RuntimeError`: no event loop runs in this thread, or the interpreter exits.
pub(super) fn awaitable<F, T>(py: Python<'_>, future: F) -> PyResult<Bound<'_, PyAny>>
where
    F: Future<Output = Result<T, ControllerError>> + Send + 'static,
    T: for<'py> IntoPyObject<'py> + Send + 'static,
{
    awaitable_with(py, future, |py, result| errors::unwrap(py, result)?.into_py_any(py))
}

/// As [`awaitable`], for work with any result: `convert` makes a Python object of it, or raises, in the loop's thread.
///
/// # Errors
/// As [`awaitable`].
pub(super) fn awaitable_with<F, C>(py: Python<'_>, future: F, convert: C) -> PyResult<Bound<'_, PyAny>>
where
    F: Future<Output: Send> + Send + 'static,
    C: FnOnce(Python<'_>, F::Output) -> PyResult<Py<PyAny>> + Send + 'static,
{
    let process = runtime::current(py)?;
    let waiter = Waiter::new(py, &process)?;
    let outcome = Arc::new(Slot(Mutex::new((None, Some(convert)))));
    let work = process.spawn({
        let outcome = Arc::clone(&outcome);
        let end = WakeAtEnd(Arc::clone(&waiter));
        async move {
            let result = future.await;
            outcome.0.lock().0 = Some(result);
            drop(end);
        }
    });
    let inner = Inner { outcome, waits: Some((waiter, work.abort_handle())) };
    Ok(Bound::new(py, Call(OfProcess::new("awaitable", inner)))?.into_any())
}

/// An awaitable for what is there already; the event loop has nothing to do with it.
pub(super) fn ready(py: Python<'_>, value: Py<PyAny>) -> PyResult<Bound<'_, PyAny>> {
    let outcome = Arc::new(Slot(Mutex::new((Some(value), Some(|_: Python<'_>, value| Ok(value))))));
    let inner = Inner { outcome, waits: None };
    Ok(Bound::new(py, Call(OfProcess::new("awaitable", inner)))?.into_any())
}

/// Waits for the work with the interpreter released; Ctrl-C interrupts it and aborts the work. The thread may have an event
/// loop that runs, as in a notebook: it stands still meanwhile.
///
/// # Errors
/// What the work raises, what a signal's handler raises; `RuntimeError`: the interpreter exits.
pub(super) fn block_on<F, T>(py: Python<'_>, future: F) -> PyResult<T>
where
    F: Future<Output = Result<T, ControllerError>> + Send + 'static,
    T: Send + 'static,
{
    errors::unwrap(py, block_on_any(py, future)?)
}

/// As [`block_on`], for work with any result.
///
/// # Errors
/// As [`block_on`].
pub(super) fn block_on_any<F>(py: Python<'_>, future: F) -> PyResult<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    let process = runtime::current(py)?;
    let meeting = Arc::new(Meeting::default());
    let work = process.spawn({
        // Not polled here: a thread that polls while the runtime is shut down meets tokio's panics.
        let end = NotifyAtEnd(Arc::clone(&meeting));
        async move {
            let result = future.await;
            end.0.state.lock().result = Some(result);
            drop(end);
        }
    });
    loop {
        if py.detach(|| meeting.wait(SIGNALS_EVERY)) {
            let result = meeting.state.lock().result.take();
            return match result {
                _ if process.leaves_behind() => stand_still(py),
                Some(result) => Ok(result),
                None if process.is_over() => stand_still(py),
                None => Err(PyRuntimeError::new_err("the work ended without a result; this is a defect of the router")),
            };
        }
        if let Err(interrupted) = py.check_signals() {
            work.abort();
            py.detach(|| meeting.wait(ABORT_WITHIN));
            return Err(interrupted);
        }
    }
}

/// For threads that the exit of the interpreter does not wait for: whatever they did now would disturb it.
pub(super) fn stand_still<T: Send>(py: Python<'_>) -> T {
    py.detach(|| {
        loop {
            std::thread::park();
        }
    })
}

// === impl Meeting ===

impl<T> Meeting<T> {
    /// Whether the work has ended, within this time.
    fn wait(&self, limit: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.ended {
            self.changed.wait_for(&mut state, limit);
        }
        state.ended
    }
}

impl<T> Default for Meeting<T> {
    fn default() -> Self {
        Self { state: Mutex::new(Met { result: None, ended: false }), changed: Condvar::new() }
    }
}

// === impl NotifyAtEnd ===

impl<T> Drop for NotifyAtEnd<T> {
    fn drop(&mut self) {
        self.0.state.lock().ended = true;
        self.0.changed.notify_all();
    }
}

// === impl Call ===

#[pymethods]
impl Call {
    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let inner = self.0.get()?;
        if let Some(result) = inner.outcome.take(py) {
            return Err(PyStopIteration::new_err((result?,)));
        }
        let future = inner.waits.as_ref().map(|(waiter, _)| waiter.blocking_future(py)).transpose()?;
        future.flatten().ok_or_else(|| PyRuntimeError::new_err("the work was given up, or awaited before"))
    }

    /// A cancellation, or whatever else ends the await: the work is aborted at once, though a traceback may hold the awaitable
    /// for longer.
    #[pyo3(signature = (kind, value=None, _traceback=None))]
    fn throw(
        &self,
        kind: Bound<'_, PyAny>,
        value: Option<Bound<'_, PyAny>>,
        _traceback: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.give_up();
        Err(PyErr::from_value(value.unwrap_or(kind)))
    }

    /// The await is given up.
    fn close(&self) {
        self.give_up();
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let waits = self.0.if_here().and_then(|inner| inner.waits.as_ref());
        waits.map_or(Ok(()), |(waiter, _)| waiter.traverse(&visit))
    }

    fn __clear__(&self) {
        self.give_up();
    }
}

impl Call {
    fn give_up(&self) {
        if let Some((waiter, work)) = self.0.if_here().and_then(|inner| inner.waits.as_ref()) {
            work.abort();
            waiter.forget();
        }
        if let Some(inner) = self.0.if_here() {
            inner.outcome.discard();
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.give_up();
    }
}

// === impl Slot ===

impl<T, C> Outcome for Slot<T, C>
where
    T: Send,
    C: FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send,
{
    fn take(&self, py: Python<'_>) -> Option<PyResult<Py<PyAny>>> {
        let (result, convert) = {
            let mut slot = self.0.lock();
            (slot.0.take()?, slot.1.take()?)
        };
        Some(convert(py, result))
    }

    fn discard(&self) {
        let both = std::mem::take(&mut *self.0.lock());
        drop(both);
    }
}

// === impl WakeAtEnd ===

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.wake();
    }
}
