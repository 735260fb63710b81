//! The OpenAI codec for Python front-ends: `CompletionCall`, `StreamEncoder` and the bodies of errors and models.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::{Map, Value};

use super::answer::{PyInferenceResponse, PyTokenEvent};
use super::errors;
use super::json;
use super::request::PyInferenceRequest;
use crate::dispatch::Answer;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::openai::{self, Completion, CompletionCall, Endpoint, ErrorAnswer, RelayedCall, StreamEncoder};
use crate::wire::RelayedTo;

/// A client's call: what is asked of the fleet, and how its answer is written.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "CompletionCall")]
pub(super) struct PyCompletionCall(Arc<CompletionCall>);

/// Writes one stream of server-sent events. Each method gives the bytes of one write.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "StreamEncoder")]
pub(super) struct PyStreamEncoder(Mutex<StreamEncoder>);

/// A call that goes to a server as it came. The same methods as those of `CompletionCall`.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "RelayedCall")]
pub(super) struct PyRelayedCall(RelayedCall);

/// Hands a relayed stream on. The same methods as those of `StreamEncoder`.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "RelayedStream")]
pub(super) struct PyRelayedStream {
    /// Events that were handed on.
    events: AtomicU64,
}

/// Status, headers and body.
type Parts<'py> = (u16, Vec<(&'static str, String)>, Bound<'py, PyBytes>);

fn parse(
    py: Python<'_>,
    endpoint: Endpoint,
    body: &[u8],
    request_id: String,
    session_id: Option<&str>,
) -> PyResult<PyCompletionCall> {
    let call = errors::unwrap(py, CompletionCall::parse(endpoint, body, request_id, session_id))?;
    Ok(PyCompletionCall(Arc::new(call)))
}

#[pymethods]
impl PyCompletionCall {
    /// Reads a body of `/v1/chat/completions`.
    ///
    /// Args:
    ///     body: The body.
    ///     request_id: Becomes the request's name.
    ///     session_id: The header `x-session-id`.
    ///
    /// Raises:
    ///     ControllerError: REQUEST_VALIDATION_FAILED, INVALID_SESSION_ID.
    #[staticmethod]
    #[pyo3(signature = (body, *, request_id, session_id=None))]
    fn chat(py: Python<'_>, body: &[u8], request_id: String, session_id: Option<&str>) -> PyResult<Self> {
        parse(py, Endpoint::Chat, body, request_id, session_id)
    }

    /// Reads a body of `/v1/completions`; as `chat` otherwise.
    #[staticmethod]
    #[pyo3(signature = (body, *, request_id, session_id=None))]
    fn text(py: Python<'_>, body: &[u8], request_id: String, session_id: Option<&str>) -> PyResult<Self> {
        parse(py, Endpoint::Text, body, request_id, session_id)
    }

    /// What is asked of the fleet.
    #[getter]
    fn request(&self) -> PyInferenceRequest {
        PyInferenceRequest(self.0.request.clone())
    }

    /// Whether the answer is wanted as it comes.
    #[getter]
    fn stream(&self) -> bool {
        self.0.stream
    }

    /// The answer in one piece. `created` is in seconds since the epoch.
    ///
    /// Raises:
    ///     ControllerError: WORKER_UNAVAILABLE, the worker's tool calls are in no shape that could be meant.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        response: &Bound<'py, PyInferenceResponse>,
        created: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = errors::unwrap(py, self.0.encode(&completion(&response.get().0), created))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// The writer of the answer as it comes. `created` is in seconds since the epoch.
    fn stream_encoder(&self, created: u64) -> PyStreamEncoder {
        PyStreamEncoder(Mutex::new(StreamEncoder::new(self.0.clone(), created)))
    }
}

#[pymethods]
impl PyStreamEncoder {
    /// The model that answers, where it is not the one that was asked for. What is written from now on names it.
    fn answered_by(&self, model: &str) {
        self.0.lock().answered_by(model);
    }

    /// Pieces of the answer.
    fn tokens<'py>(&self, py: Python<'py>, events: Vec<Bound<'py, PyTokenEvent>>) -> Bound<'py, PyBytes> {
        let pieces = events.iter().map(|event| (event.get().0.text.as_str(), event.get().0.logprobs.as_ref()));
        PyBytes::new(py, &self.0.lock().tokens(pieces))
    }

    /// The end of the answer, up to `[DONE]`.
    fn finish<'py>(&self, py: Python<'py>, response: &Bound<'py, PyInferenceResponse>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.lock().finish(&completion(&response.get().0)))
    }

    /// A sign of life: a chunk without text.
    fn keepalive<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.lock().keepalive())
    }

    /// The end of a stream that broke.
    fn error<'py>(&self, py: Python<'py>, error: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let error = core_error(error)?;
        Ok(PyBytes::new(py, &self.0.lock().error(&error)))
    }
}

fn relay(py: Python<'_>, to: RelayedTo, body: &[u8], request_id: String, session_id: Option<&str>) -> PyResult<PyRelayedCall> {
    errors::unwrap(py, RelayedCall::parse(to, body, request_id, session_id)).map(PyRelayedCall)
}

#[pymethods]
impl PyRelayedCall {
    /// Reads a body of `/v1/embeddings`; as `CompletionCall.chat` otherwise.
    #[staticmethod]
    #[pyo3(signature = (body, *, request_id, session_id=None))]
    fn embeddings(py: Python<'_>, body: &[u8], request_id: String, session_id: Option<&str>) -> PyResult<Self> {
        relay(py, RelayedTo::Embeddings, body, request_id, session_id)
    }

    /// Reads a body of `/v1/responses`; as `CompletionCall.chat` otherwise.
    #[staticmethod]
    #[pyo3(signature = (body, *, request_id, session_id=None))]
    fn responses(py: Python<'_>, body: &[u8], request_id: String, session_id: Option<&str>) -> PyResult<Self> {
        relay(py, RelayedTo::Responses, body, request_id, session_id)
    }

    /// What is asked of the fleet.
    #[getter]
    fn request(&self) -> PyInferenceRequest {
        PyInferenceRequest(self.0.request.clone())
    }

    /// Whether the answer is wanted as it comes.
    #[getter]
    fn stream(&self) -> bool {
        self.0.request.stream
    }

    /// The answer in one piece, as the server wrote it.
    #[pyo3(signature = (response, created))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        response: &Bound<'py, PyInferenceResponse>,
        #[allow(unused_variables)] created: u64,
    ) -> Bound<'py, PyBytes> {
        PyBytes::new(py, response.get().0.text.as_bytes())
    }

    /// What hands the answer on as it comes.
    #[pyo3(signature = (created))]
    fn stream_encoder(&self, #[allow(unused_variables)] created: u64) -> PyRelayedStream {
        PyRelayedStream { events: AtomicU64::new(0) }
    }
}

#[pymethods]
impl PyRelayedStream {
    /// The events name the model themselves.
    #[pyo3(signature = (model))]
    fn answered_by(&self, #[allow(unused_variables)] model: &str) {}

    /// Events of the answer.
    fn tokens<'py>(&self, py: Python<'py>, events: Vec<Bound<'py, PyTokenEvent>>) -> Bound<'py, PyBytes> {
        let texts = events.iter().map(|event| event.get().0.text.as_str()).collect::<String>();
        let ends = texts.matches("\n\n").count();
        self.events.fetch_add(u64::try_from(ends).unwrap_or(0), Ordering::Relaxed);
        PyBytes::new(py, texts.as_bytes())
    }

    /// Nothing: the last event has said it.
    #[pyo3(signature = (response))]
    fn finish<'py>(
        &self,
        py: Python<'py>,
        #[allow(unused_variables)] response: &Bound<'py, PyInferenceResponse>,
    ) -> Bound<'py, PyBytes> {
        PyBytes::new(py, b"")
    }

    /// A sign of life: a comment. The API has no event that says nothing.
    fn keepalive<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, b": keepalive\n\n")
    }

    /// The end of a stream that broke.
    fn error<'py>(&self, py: Python<'py>, error: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &openai::relayed_error(&core_error(error)?, self.events.load(Ordering::Relaxed))))
    }
}

/// A `ControllerError` as status, headers and body.
#[pyfunction]
#[pyo3(name = "openai_error")]
pub(super) fn error_answer<'py>(py: Python<'py>, error: &Bound<'py, PyAny>) -> PyResult<Parts<'py>> {
    let ErrorAnswer { status, headers, body } = ErrorAnswer::from(&core_error(error)?);
    Ok((status, headers, PyBytes::new(py, &body)))
}

/// The body of an error that no request can end with: a missing key, an unknown address.
#[pyfunction]
#[pyo3(name = "openai_error_body")]
pub(super) fn error_body<'py>(py: Python<'py>, status: u16, code: &str, message: &str) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &openai::error_body(status, code, message))
}

/// The body of `/v1/models`. `created` is in seconds since the epoch.
#[pyfunction]
#[pyo3(name = "openai_models")]
pub(super) fn models<'py>(py: Python<'py>, ids: Vec<String>, created: u64) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &openai::models(&ids, created))
}

/// The body of `/v1/models/{id}`. `created` is in seconds since the epoch.
#[pyfunction]
#[pyo3(name = "openai_model")]
pub(super) fn model<'py>(py: Python<'py>, id: &str, created: u64) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &openai::model(id, created))
}

fn completion(answer: &Answer) -> Completion<'_> {
    Completion {
        model: &answer.model_id,
        text: &answer.text,
        finish_reason: answer.finish_reason,
        usage: answer.usage,
        tool_calls: answer.tool_calls.as_ref(),
        logprobs: answer.logprobs.as_ref(),
    }
}

/// The core's error of a Python `ControllerError`, with its cause.
fn core_error(error: &Bound<'_, PyAny>) -> PyResult<ControllerError> {
    let core = without_cause(error)?;
    let cause = error.getattr("__cause__")?;
    // One step: a chain of Python exceptions may be a ring.
    Ok(if cause.hasattr("to_dict")? { core.caused_by(without_cause(&cause)?) } else { core })
}

fn without_cause(error: &Bound<'_, PyAny>) -> PyResult<ControllerError> {
    let code: String = error.getattr("code")?.getattr("value")?.extract()?;
    let code = ControllerErrorCode::parse(&code).unwrap_or(ControllerErrorCode::InternalError);
    let message: String = error.getattr("message")?.extract()?;
    let facts = error.call_method0("to_dict")?.get_item("error")?.get_item("context")?;
    let facts: Map<String, Value> = json::from_python("context", &facts)?;
    Ok(facts.into_iter().fold(ControllerError::new(code, message), |core, (key, value)| core.with(&key, value)))
}
