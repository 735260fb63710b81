//! What happens, for Python: `ControllerEvent`, and the reader of them.

use std::collections::VecDeque;
use std::sync::Arc;

use pyo3::conversion::IntoPyObjectExt;
use pyo3::exceptions::PyStopAsyncIteration;
use pyo3::prelude::*;
use tokio::sync::Notify;

use super::runtime::OfProcess;
use super::{bridge, errors, json};
use crate::dispatch::{Event, Events};

/// Something that happened.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "ControllerEvent")]
pub(super) struct PyControllerEvent(Event);

/// What happens from now on, until the controller has stopped. A slow reader loses the oldest events, and the next one tells
/// how many.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "ControllerEvents")]
pub(super) struct PyEvents(OfProcess<Arc<Reader>>);

struct Reader {
    events: tokio::sync::Mutex<Events>,
    /// Events whose reader was cancelled after they had been taken for it: the next one gets them.
    returned: parking_lot::Mutex<VecDeque<Event>>,
    came_back: Notify,
}

/// An event on its way to Python. Dropped before it gets there, it goes back.
struct Taken {
    event: Option<Event>,
    reader: Arc<Reader>,
}

#[pymethods]
impl PyControllerEvent {
    /// `worker_registered`, `worker_replaced`, `worker_offline`, `worker_removed`, `worker_draining`, `breaker_changed`,
    /// `session_moved` or `failover`.
    #[getter]
    fn kind(&self) -> &'static str {
        self.0.kind
    }

    /// The worker that it concerns.
    #[getter]
    fn worker_id(&self) -> Option<&str> {
        self.0.worker_id.as_deref()
    }

    /// When, in milliseconds since the epoch.
    #[getter]
    fn timestamp(&self) -> u64 {
        self.0.timestamp_ms
    }

    /// The facts.
    #[getter]
    fn details<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &errors::snake_keys(&self.0.details))
    }

    /// How many events this reader missed right before this one.
    #[getter]
    fn lost(&self) -> u64 {
        self.0.lost
    }

    /// Its dictionary, with camelCase keys.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let Event { kind, worker_id, timestamp_ms, details, lost } = &self.0;
        json::to_python(
            py,
            &serde_json::json!({
                "kind": kind, "workerId": worker_id, "timestamp": timestamp_ms, "details": details, "lost": lost,
            }),
        )
    }

    fn __hash__(&self) -> u64 {
        super::hash(&(self.0.kind, &self.0.worker_id, self.0.timestamp_ms))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let worker = self.0.worker_id.as_ref().map_or("None".to_owned(), |worker| format!("'{worker}'"));
        let details = self.details(py)?.repr()?;
        Ok(format!("ControllerEvent(kind='{}', worker_id={worker}, details={details}, lost={})", self.0.kind, self.0.lost))
    }
}

#[pymethods]
impl PyEvents {
    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let next = Arc::clone(self.0.get()?).next();
        bridge::awaitable_with(py, next, |py, mut taken| match taken.event.take() {
            Some(event) => PyControllerEvent::from(event).into_py_any(py),
            None => Err(PyStopAsyncIteration::new_err(())),
        })
    }
}

// === impl PyControllerEvent ===

impl From<Event> for PyControllerEvent {
    fn from(event: Event) -> Self {
        Self(event)
    }
}

// === impl PyEvents ===

impl PyEvents {
    pub(super) fn new(events: Events) -> Self {
        let events = tokio::sync::Mutex::new(events);
        let reader = Reader { events, returned: parking_lot::Mutex::default(), came_back: Notify::new() };
        Self(OfProcess::new("reader of events", Arc::new(reader)))
    }
}

// === impl Reader ===

impl Reader {
    /// The next event; none when the controller has stopped.
    async fn next(self: Arc<Self>) -> Taken {
        let mut events = self.events.lock().await;
        let event = loop {
            if let Some(event) = self.returned.lock().pop_front() {
                break Some(event);
            }
            tokio::select! {
                biased;
                () = self.came_back.notified() => {}
                event = events.next() => break event,
            }
        };
        drop(events);
        Taken { event, reader: self }
    }
}

// === impl Taken ===

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.reader.returned.lock().push_back(event);
            self.reader.came_back.notify_one();
        }
    }
}
