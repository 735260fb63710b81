//! What is known of a request, for Python: `RequestMetadata`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};

use super::{errors, json};
use crate::telemetry::RequestMetadata;

/// What is known of one request. Points in time are milliseconds since the epoch, durations milliseconds.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "RequestMetadata")]
pub(super) struct PyRequestMetadata(pub(super) Arc<RequestMetadata>);

#[pymethods]
impl PyRequestMetadata {
    /// Metadata from its dictionary, as `to_dict` gives it.
    ///
    /// Raises:
    ///     TypeError: It has another shape.
    #[classmethod]
    fn from_dict(_class: &Bound<'_, PyType>, fields: &Bound<'_, PyAny>) -> PyResult<Self> {
        json::from_python("RequestMetadata", fields).map(|metadata| Self(Arc::new(metadata)))
    }

    /// Its dictionary, with camelCase keys.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &*self.0)
    }

    /// Its name.
    #[getter]
    fn request_id(&self) -> &str {
        &self.0.request_id
    }

    /// The model that was asked for.
    #[getter]
    fn model_id(&self) -> &str {
        &self.0.model_id
    }

    /// The session it belongs to.
    #[getter]
    fn session_id(&self) -> Option<&str> {
        self.0.session_id.as_deref()
    }

    /// When it came.
    #[getter]
    fn start_time(&self) -> u64 {
        self.0.start_time
    }

    /// When it ended; `None` while it has not.
    #[getter]
    fn end_time(&self) -> Option<u64> {
        self.0.end_time
    }

    /// How long it took, waiting and retries included; `None` while it has not ended.
    #[getter]
    fn duration_ms(&self) -> Option<f64> {
        self.0.duration_ms
    }

    /// From its arrival to its first token; `None` for an answer without tokens of its own.
    #[getter]
    fn time_to_first_token_ms(&self) -> Option<f64> {
        self.0.time_to_first_token_ms
    }

    /// Attempts after the first.
    #[getter]
    fn retry_count(&self) -> u32 {
        self.0.retry_count
    }

    /// The worker that was chosen last; `None` until one is.
    #[getter]
    fn selected_worker(&self) -> Option<&str> {
        self.0.selected_worker.as_deref()
    }

    /// The workers at which an attempt failed, each once, in the order of their failures.
    #[getter]
    fn failed_workers(&self) -> Vec<&str> {
        self.0.failed_workers.iter().map(|worker| worker.as_str()).collect()
    }

    /// Breakers that this request opened.
    #[getter]
    fn circuit_breaker_trips(&self) -> u32 {
        self.0.circuit_breaker_trips
    }

    /// Limits on time that passed.
    #[getter]
    fn timeouts(&self) -> u32 {
        self.0.timeouts
    }

    /// What the caller met, where it failed: `code` and `message`.
    #[getter]
    fn final_error<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let Some(error) = &self.0.final_error else { return Ok(None) };
        let shown = PyDict::new(py);
        shown.set_item("code", errors::member(py, "ControllerErrorCode", error.code.as_str())?)?;
        shown.set_item("message", &error.message)?;
        Ok(Some(shown))
    }

    /// `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    #[getter]
    fn status(&self) -> &'static str {
        self.0.status.as_str()
    }

    /// Tokens generated for it.
    #[getter]
    fn tokens(&self) -> u64 {
        self.0.tokens
    }

    /// What was tried: `worker_id`, `started_ms`, `duration_ms`, `code`, `choice` (why this worker) and `left_out` (who was
    /// no candidate: `worker_id` and `reason` each).
    #[getter]
    fn attempts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let attempts = PyList::empty(py);
        for attempt in &self.0.attempts {
            let left_out = PyList::empty(py);
            for one in &attempt.left_out {
                let shown = PyDict::new(py);
                shown.set_item("worker_id", one.worker_id.as_str())?;
                shown.set_item("reason", one.reason.as_ref())?;
                left_out.append(shown)?;
            }
            let code = attempt.code.map(|code| errors::member(py, "ControllerErrorCode", code.as_str())).transpose()?;
            let shown = PyDict::new(py);
            shown.set_item("worker_id", attempt.worker_id.as_str())?;
            shown.set_item("started_ms", attempt.started_ms)?;
            shown.set_item("duration_ms", attempt.duration_ms)?;
            shown.set_item("code", code)?;
            shown.set_item("choice", attempt.choice.as_ref())?;
            shown.set_item("left_out", left_out)?;
            attempts.append(shown)?;
        }
        Ok(attempts)
    }

    fn __hash__(&self) -> u64 {
        super::hash(&(&self.0.request_id, self.0.start_time))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        super::reduce(slf.as_any(), slf.get().to_dict(slf.py())?)
    }

    fn __repr__(&self) -> String {
        let metadata = &*self.0;
        let worker = metadata.selected_worker.as_ref().map_or("None".to_owned(), |worker| format!("'{worker}'"));
        format!(
            "RequestMetadata(request_id={}, model_id={}, status='{}', selected_worker={worker}, retry_count={}, tokens={})",
            super::quoted(&metadata.request_id),
            super::quoted(&metadata.model_id),
            metadata.status.as_str(),
            metadata.retry_count,
            metadata.tokens,
        )
    }
}
