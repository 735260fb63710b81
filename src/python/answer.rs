//! What comes back, for Python: `InferenceResponse`, `TokenEvent`, `Usage`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};
use serde::{Deserialize, Serialize};

use super::json;
use super::metadata::PyRequestMetadata;
use crate::dispatch::Answer;
use crate::telemetry::RequestMetadata;
use crate::wire::{FinishReason, Json, Token, TokenIds, Usage, WorkerId};

/// Characters of a text that a `repr` shows.
const SHOWN: usize = 60;

/// A whole answer, and how it came about.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "InferenceResponse")]
pub(super) struct PyInferenceResponse(pub(super) Arc<Answer>);

/// A piece of an answer: one token, or several.
///
/// Args:
///     text: The text, perhaps empty: a character may need several tokens.
///     index: The place of its first token in the answer, from 0. What a local worker yields is counted for it.
///     token_ids: The tokens, where they are known.
///     logprobs: Log probabilities, in the OpenAI API's shape.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "TokenEvent")]
pub(super) struct PyTokenEvent(pub(super) Token);

/// Tokens of a request and its answer.
///
/// Args:
///     prompt_tokens: Of the prompt.
///     completion_tokens: Of the answer.
///     cached_tokens: Of the prompt, those that a cache held.
#[derive(PartialEq, Eq, Hash)]
#[pyclass(frozen, eq, hash, module = "mlx_serving_router._native", name = "Usage")]
pub(super) struct PyUsage(pub(super) Usage);

/// An answer as its dictionary.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerDocument {
    request_id: Arc<str>,
    model_id: Arc<str>,
    worker_id: WorkerId,
    text: String,
    finish_reason: FinishReason,
    usage: UsageDocument,
    #[serde(default)]
    tool_calls: Option<Json>,
    #[serde(default)]
    logprobs: Option<Json>,
    metadata: Arc<RequestMetadata>,
}

/// A usage with its sum, which is not read.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct UsageDocument {
    #[serde(flatten)]
    usage: Usage,
    #[serde(default, skip_deserializing)]
    total_tokens: u64,
}

/// A piece as its dictionary: that of the wire, without the message's type.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenDocument {
    #[serde(alias = "token")]
    text: String,
    #[serde(default)]
    index: u64,
    #[serde(default)]
    token_ids: TokenIds,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    logprobs: Option<Json>,
}

impl From<Usage> for UsageDocument {
    fn from(usage: Usage) -> Self {
        Self { usage, total_tokens: usage.total_tokens() }
    }
}

/// The text in Python's quotes, cut.
fn shown(py: Python<'_>, text: &str) -> PyResult<String> {
    let cut: String = text.chars().take(SHOWN).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    Ok(format!("{}{more}", pyo3::types::PyString::new(py, &cut).repr()?))
}

#[pymethods]
impl PyInferenceResponse {
    /// A response from its dictionary, as `to_dict` gives it.
    ///
    /// Raises:
    ///     TypeError: It has another shape.
    #[classmethod]
    fn from_dict(_class: &Bound<'_, PyType>, fields: &Bound<'_, PyAny>) -> PyResult<Self> {
        let read: AnswerDocument = json::from_python("InferenceResponse", fields)?;
        Ok(Self(Arc::new(Answer {
            request_id: read.request_id,
            model_id: read.model_id,
            worker_id: read.worker_id,
            text: read.text,
            finish_reason: read.finish_reason,
            usage: read.usage.usage,
            tool_calls: read.tool_calls.filter(|calls| !matches!(calls.text(), "[]" | "null")),
            logprobs: read.logprobs,
            metadata: read.metadata,
        })))
    }

    /// Its dictionary, with camelCase keys.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let answer = &*self.0;
        let none = || Json::from_value::<[u8; 0]>(&[]).ok();
        json::to_python(
            py,
            &AnswerDocument {
                request_id: answer.request_id.clone(),
                model_id: answer.model_id.clone(),
                worker_id: answer.worker_id.clone(),
                text: answer.text.clone(),
                finish_reason: answer.finish_reason,
                usage: answer.usage.into(),
                tool_calls: answer.tool_calls.clone().or_else(none),
                logprobs: answer.logprobs.clone(),
                metadata: answer.metadata.clone(),
            },
        )
    }

    /// The text; whole also after a stream.
    #[getter]
    fn text(&self) -> &str {
        &self.0.text
    }

    /// Why it ended: `stop`, `length` or `tool_calls`.
    #[getter]
    fn finish_reason(&self) -> &'static str {
        self.0.finish_reason.as_str()
    }

    /// What it cost.
    #[getter]
    fn usage(&self) -> PyUsage {
        PyUsage(self.0.usage)
    }

    /// The functions that the model wants called, in the OpenAI API's shape; empty where it wants none.
    #[getter]
    fn tool_calls<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match &self.0.tool_calls {
            Some(calls) => json::shown(py, Some(calls)),
            None => Ok(pyo3::types::PyList::empty(py).into_any()),
        }
    }

    /// Log probabilities, in the OpenAI API's shape; of a stream they went with its tokens.
    #[getter]
    fn logprobs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::shown(py, self.0.logprobs.as_ref())
    }

    /// The worker that answered.
    #[getter]
    fn worker_id(&self) -> &str {
        &self.0.worker_id
    }

    /// The model that answered.
    #[getter]
    fn model_id(&self) -> &str {
        &self.0.model_id
    }

    /// The request.
    #[getter]
    fn request_id(&self) -> &str {
        &self.0.request_id
    }

    /// How it came about; final.
    #[getter]
    fn metadata(&self) -> PyRequestMetadata {
        PyRequestMetadata(Arc::clone(&self.0.metadata))
    }

    fn __hash__(&self) -> u64 {
        super::hash(&self.0.request_id)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        super::reduce(slf.as_any(), slf.get().to_dict(slf.py())?)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let answer = &*self.0;
        Ok(format!(
            "InferenceResponse(text={}, finish_reason='{}', worker_id='{}', model_id={}, request_id={}, usage={})",
            shown(py, &answer.text)?,
            answer.finish_reason.as_str(),
            answer.worker_id,
            super::quoted(&answer.model_id),
            super::quoted(&answer.request_id),
            PyUsage(answer.usage).__repr__(),
        ))
    }
}

#[pymethods]
impl PyTokenEvent {
    #[new]
    #[pyo3(signature = (text, *, index=0, token_ids=Vec::new(), logprobs=None), text_signature = "(text, *, index=0, token_ids=(), logprobs=None)")]
    fn new(text: String, index: u64, token_ids: Vec<u32>, logprobs: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let logprobs = logprobs.map(|logprobs| json::passed_on("logprobs", logprobs)).transpose()?;
        Ok(Self(Token { text, index, token_ids: token_ids.into(), logprobs }))
    }

    /// An event from its dictionary: as `to_dict` gives it, or a token message of the wire.
    ///
    /// Raises:
    ///     TypeError: It has another shape.
    #[classmethod]
    fn from_dict(_class: &Bound<'_, PyType>, fields: &Bound<'_, PyAny>) -> PyResult<Self> {
        let TokenDocument { text, index, token_ids, logprobs } = json::from_python("TokenEvent", fields)?;
        Ok(Self(Token { text, index, token_ids, logprobs }))
    }

    /// Its dictionary, with camelCase keys.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let Token { text, index, token_ids, logprobs } = self.0.clone();
        json::to_python(py, &TokenDocument { text, index, token_ids, logprobs })
    }

    /// The text, perhaps empty.
    #[getter]
    fn text(&self) -> &str {
        &self.0.text
    }

    /// The place of its first token in the answer, from 0.
    #[getter]
    fn index(&self) -> u64 {
        self.0.index
    }

    /// The tokens, where the worker says them.
    #[getter]
    fn token_ids(&self) -> Vec<u32> {
        self.0.token_ids.to_vec()
    }

    /// Log probabilities, in the OpenAI API's shape.
    #[getter]
    fn logprobs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::shown(py, self.0.logprobs.as_ref())
    }

    fn __hash__(&self) -> u64 {
        super::hash(&(&self.0.text, self.0.index, &self.0.token_ids))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        super::reduce(slf.as_any(), slf.get().to_dict(slf.py())?)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let token = &self.0;
        Ok(format!("TokenEvent(text={}, index={}, token_ids={:?})", shown(py, &token.text)?, token.index, token.token_ids))
    }
}

#[pymethods]
impl PyUsage {
    #[new]
    #[pyo3(signature = (prompt_tokens=0, completion_tokens=0, cached_tokens=0))]
    fn new(prompt_tokens: u64, completion_tokens: u64, cached_tokens: u64) -> Self {
        Self(Usage { prompt_tokens, completion_tokens, cached_tokens })
    }

    /// A usage from its dictionary, with camelCase keys; `totalTokens` is not read.
    ///
    /// Raises:
    ///     TypeError: It has another shape.
    #[classmethod]
    fn from_dict(_class: &Bound<'_, PyType>, fields: &Bound<'_, PyAny>) -> PyResult<Self> {
        json::from_python("Usage", fields).map(Self)
    }

    /// Its dictionary, with camelCase keys.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        Ok(json::to_python(py, &UsageDocument::from(self.0))?.cast_into()?)
    }

    /// Tokens of the prompt.
    #[getter]
    fn prompt_tokens(&self) -> u64 {
        self.0.prompt_tokens
    }

    /// Tokens of the answer.
    #[getter]
    fn completion_tokens(&self) -> u64 {
        self.0.completion_tokens
    }

    /// Of the prompt's tokens, those that a cache held.
    #[getter]
    fn cached_tokens(&self) -> u64 {
        self.0.cached_tokens
    }

    /// Prompt and answer together.
    #[getter]
    fn total_tokens(&self) -> u64 {
        self.0.total_tokens()
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        super::reduce(slf.as_any(), slf.get().to_dict(slf.py())?.into_any())
    }

    fn __repr__(&self) -> String {
        let Usage { prompt_tokens, completion_tokens, cached_tokens } = self.0;
        format!("Usage(prompt_tokens={prompt_tokens}, completion_tokens={completion_tokens}, cached_tokens={cached_tokens})")
    }
}
