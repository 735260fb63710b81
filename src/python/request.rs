//! `InferenceRequest` for Python: types are checked here, meaning where the request is used.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple, PyType};

use super::{errors, json};
use crate::wire::{InferenceRequest, Json, PrefixHashes, Priority};

/// What is asked of a model. What is not set is left to the worker.
///
/// Args:
///     model_id: The model.
///     messages: A conversation, in the OpenAI API's shape. Either this or `prompt`.
///     prompt: A text to continue as it stands.
///     request_id: Names the request everywhere; made where it is left out.
///     session_id: Requests of one session go to the same worker where that is possible.
///
/// All other fields are those of the wire, in snake_case; the stubs list them.
///
/// Raises:
///     TypeError: A field has the wrong type, or is unknown.
///     ValueError: A value that JSON has no word for.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "InferenceRequest")]
pub(super) struct PyInferenceRequest(pub(super) Arc<InferenceRequest>);

/// In the order of the wire.
const FIELDS: [&str; 23] = [
    "request_id",
    "model_id",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "tools",
    "tool_choice",
    "response_format",
    "session_id",
    "stream",
    "priority",
    "resume",
];

/// Sets a field. False: there is none of this name.
fn set(request: &mut InferenceRequest, name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    if value.is_none() && name != "model_id" {
        return Ok(FIELDS.contains(&name));
    }
    match name {
        "request_id" => request.request_id = text(name, value)?,
        "model_id" => request.model_id = text(name, value)?,
        "prompt" => request.prompt = Some(text(name, value)?),
        "messages" => request.messages = Some(objects(name, value)?),
        "max_tokens" => request.max_tokens = Some(whole(name, value)?),
        "temperature" => request.temperature = Some(number(name, value)?),
        "top_p" => request.top_p = Some(number(name, value)?),
        "top_k" => request.top_k = Some(whole(name, value)?),
        "min_p" => request.min_p = Some(number(name, value)?),
        "seed" => request.seed = Some(whole(name, value)?),
        "stop" => request.stop = Some(stop(value)?),
        "repetition_penalty" => request.repetition_penalty = Some(number(name, value)?),
        "presence_penalty" => request.presence_penalty = Some(number(name, value)?),
        "frequency_penalty" => request.frequency_penalty = Some(number(name, value)?),
        "logit_bias" => request.logit_bias = Some(object(name, value)?),
        "logprobs" => request.logprobs = Some(whole(name, value)?),
        "tools" => request.tools = Some(objects(name, value)?),
        "tool_choice" if value.is_instance_of::<PyString>() => request.tool_choice = Some(json::passed_on(name, value)?),
        "tool_choice" if value.cast::<PyMapping>().is_err() => return Err(wrong(name, value, "str or dict")),
        "tool_choice" => request.tool_choice = Some(object(name, value)?),
        "response_format" => request.response_format = Some(object(name, value)?),
        "session_id" => request.session_id = Some(text(name, value)?),
        "stream" => request.stream = truth(name, value)?,
        "priority" => match text(name, value)?.as_str() {
            "high" => request.priority = Priority::High,
            "normal" | "medium" => request.priority = Priority::Normal,
            "low" => request.priority = Priority::Low,
            other => request.unknown_priority = Some(other.to_owned()),
        },
        "resume" => request.resume = Some(json::from_python(name, value)?),
        _ => return Ok(false),
    }
    Ok(true)
}

/// The hashes of the prefixes of a prompt, as docs/prefix-hashes.md defines them, the shortest first.
#[pyfunction]
#[pyo3(signature = (model_id, *, prompt=None, messages=None))]
pub(super) fn prefix_hashes(model_id: &str, prompt: Option<&str>, messages: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<String>> {
    let hashes = match (prompt, messages) {
        (Some(prompt), _) => PrefixHashes::of_prompt(model_id, prompt),
        (None, Some(messages)) => PrefixHashes::of_messages(model_id, &json::passed_on("messages", messages)?),
        (None, None) => PrefixHashes::default(),
    };
    Ok(hashes.hashes().iter().map(|hash| format!("{hash:016x}")).collect())
}

fn finished(mut request: InferenceRequest) -> PyInferenceRequest {
    if request.request_id.is_empty() {
        request.request_id = uuid::Uuid::new_v4().to_string();
    }
    PyInferenceRequest(Arc::new(request))
}

#[pymethods]
impl PyInferenceRequest {
    #[new]
    #[pyo3(
        signature = (*, model_id, **fields),
        text_signature = "(*, model_id, messages=None, prompt=None, request_id=None, session_id=None, max_tokens=None, \
            temperature=None, top_p=None, top_k=None, min_p=None, seed=None, stop=None, repetition_penalty=None, \
            presence_penalty=None, frequency_penalty=None, logit_bias=None, logprobs=None, tools=None, tool_choice=None, \
            response_format=None, stream=None, priority=None, resume=None)"
    )]
    fn new(model_id: &Bound<'_, PyAny>, fields: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut request = InferenceRequest::default();
        set(&mut request, "model_id", model_id)?;
        for (name, value) in fields.into_iter().flatten() {
            let name: String = name.extract()?;
            if !set(&mut request, &name, &value)? {
                let near = FIELDS
                    .into_iter()
                    .max_by(|one, other| strsim::jaro_winkler(&name, one).total_cmp(&strsim::jaro_winkler(&name, other)));
                let near = near.filter(|near| strsim::jaro_winkler(&name, near) > 0.85);
                let hint = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
                return Err(PyTypeError::new_err(format!("InferenceRequest has no field {name}{hint}")));
            }
        }
        Ok(finished(request))
    }

    /// A request from the dictionary of the wire, with camelCase keys. Unknown keys are ignored.
    ///
    /// Raises:
    ///     TypeError: A field has the wrong type, or `modelId` is missing.
    #[classmethod]
    fn from_dict(_class: &Bound<'_, PyType>, fields: &Bound<'_, PyMapping>) -> PyResult<Self> {
        let mut request = InferenceRequest::default();
        let mut has_model = false;
        for item in fields.items()?.iter() {
            let (name, value): (String, Bound<'_, PyAny>) = item.extract()?;
            let name = errors::snake(&name);
            has_model |= name == "model_id";
            set(&mut request, &name, &value)?;
        }
        if has_model { Ok(finished(request)) } else { Err(PyTypeError::new_err("modelId is missing")) }
    }

    /// The dictionary of the wire, with camelCase keys and without what is not set.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let fields = json::to_python(py, &*self.0)?;
        if let Some(other) = &self.0.unknown_priority {
            fields.set_item("priority", other)?;
        }
        Ok(fields)
    }

    /// Names the request everywhere.
    #[getter]
    fn request_id(&self) -> &str {
        &self.0.request_id
    }

    /// The model.
    #[getter]
    fn model_id(&self) -> &str {
        &self.0.model_id
    }

    /// A text to continue; instead of `messages`.
    #[getter]
    fn prompt(&self) -> Option<&str> {
        self.0.prompt.as_deref()
    }

    /// A conversation, in the OpenAI API's shape.
    #[getter]
    fn messages<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::shown(py, self.0.messages.as_ref())
    }

    /// The most tokens to generate.
    #[getter]
    fn max_tokens(&self) -> Option<i64> {
        self.0.max_tokens
    }

    /// 0 is greedy decoding.
    #[getter]
    fn temperature(&self) -> Option<f64> {
        self.0.temperature
    }

    /// Nucleus sampling.
    #[getter]
    fn top_p(&self) -> Option<f64> {
        self.0.top_p
    }

    /// Only the k likeliest tokens; 0 is all.
    #[getter]
    fn top_k(&self) -> Option<i64> {
        self.0.top_k
    }

    /// Only tokens at least so likely as this share of the likeliest.
    #[getter]
    fn min_p(&self) -> Option<f64> {
        self.0.min_p
    }

    /// Makes sampling repeatable.
    #[getter]
    fn seed(&self) -> Option<i64> {
        self.0.seed
    }

    /// Texts that end the answer and are not part of it.
    #[getter]
    fn stop(&self) -> Option<Vec<String>> {
        self.0.stop.clone()
    }

    /// Above 1 makes what was said less likely.
    #[getter]
    fn repetition_penalty(&self) -> Option<f64> {
        self.0.repetition_penalty
    }

    /// Taken once from every token that was said.
    #[getter]
    fn presence_penalty(&self) -> Option<f64> {
        self.0.presence_penalty
    }

    /// Taken from a token as often as it was said.
    #[getter]
    fn frequency_penalty(&self) -> Option<f64> {
        self.0.frequency_penalty
    }

    /// Added to the logits, by token id.
    #[getter]
    fn logit_bias<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::shown(py, self.0.logit_bias.as_ref())
    }

    /// How many alternatives to report for each token.
    #[getter]
    fn logprobs(&self) -> Option<i64> {
        self.0.logprobs
    }

    /// Functions that the model may call, in the OpenAI API's shape.
    #[getter]
    fn tools<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::shown(py, self.0.tools.as_ref())
    }

    /// Whether and which of them it has to call.
    #[getter]
    fn tool_choice<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::shown(py, self.0.tool_choice.as_ref())
    }

    /// The shape of the answer.
    #[getter]
    fn response_format<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::shown(py, self.0.response_format.as_ref())
    }

    /// The conversation that the request belongs to.
    #[getter]
    fn session_id(&self) -> Option<&str> {
        self.0.session_id.as_deref()
    }

    /// Whether tokens are wanted as they come. The method called decides, not this.
    #[getter]
    fn stream(&self) -> bool {
        self.0.stream
    }

    /// Who goes first in a queue: `high`, `normal` or `low`.
    #[getter]
    fn priority(&self) -> &str {
        match (&self.0.unknown_priority, self.0.priority) {
            (Some(other), _) => other,
            (None, Priority::High) => "high",
            (None, Priority::Normal) => "normal",
            (None, Priority::Low) => "low",
        }
    }

    /// Continues after what another worker delivered: `tokenIds` and `text`.
    #[getter]
    fn resume<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0.resume)
    }

    fn __hash__(&self) -> u64 {
        super::hash(&self.0.request_id)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        super::reduce(slf.as_any(), slf.get().to_dict(slf.py())?)
    }

    /// Prompts are never shown, only their sizes.
    fn __repr__(&self) -> String {
        let request = &*self.0;
        let mut shown = format!(
            "InferenceRequest(request_id={}, model_id={}",
            super::quoted(&request.request_id),
            super::quoted(&request.model_id)
        );
        if let Some(prompt) = &request.prompt {
            shown.push_str(&format!(", prompt=<{} bytes>", prompt.len()));
        }
        if let Some(messages) = &request.messages {
            shown.push_str(&format!(", messages=<{} bytes>", messages.text().len()));
        }
        if let Some(max_tokens) = request.max_tokens {
            shown.push_str(&format!(", max_tokens={max_tokens}"));
        }
        if let Some(temperature) = request.temperature {
            shown.push_str(&format!(", temperature={temperature}"));
        }
        if let Some(session_id) = &request.session_id {
            shown.push_str(&format!(", session_id={}", super::quoted(session_id)));
        }
        shown.push(')');
        shown
    }
}

fn wrong(name: &str, value: &Bound<'_, PyAny>, right: &str) -> PyErr {
    match value.get_type().name() {
        Ok(kind) => PyTypeError::new_err(format!("{name} is of type {kind}; {right} is right")),
        Err(error) => error,
    }
}

fn text(name: &str, value: &Bound<'_, PyAny>) -> PyResult<String> {
    let text = value.cast::<PyString>().map_err(|_| wrong(name, value, "str"))?;
    // Python's own error would quote the text.
    let whole = text.to_str().map_err(|_| PyValueError::new_err(format!("{name} holds half a character (a lone surrogate)")))?;
    Ok(whole.to_owned())
}

fn whole(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    if !value.is_instance_of::<PyInt>() || value.is_instance_of::<PyBool>() {
        return Err(wrong(name, value, "int"));
    }
    value.extract().map_err(|_| PyValueError::new_err(format!("{name} is beyond 64 bits")))
}

fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    let is_number = value.is_instance_of::<PyFloat>() || value.is_instance_of::<PyInt>();
    if !is_number || value.is_instance_of::<PyBool>() {
        return Err(wrong(name, value, "float"));
    }
    value.extract().map_err(|_| PyValueError::new_err(format!("{name} is beyond the range of a float")))
}

fn truth(name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    value.cast::<PyBool>().map(|truth| truth.is_true()).map_err(|_| wrong(name, value, "bool"))
}

fn object(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Json> {
    value.cast::<PyMapping>().map_err(|_| wrong(name, value, "dict"))?;
    json::passed_on(name, value)
}

fn objects(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Json> {
    if !value.is_instance_of::<PyList>() && !value.is_instance_of::<PyTuple>() {
        return Err(wrong(name, value, "list of dict"));
    }
    for (index, item) in value.try_iter()?.enumerate() {
        let item = item?;
        item.cast::<PyMapping>().map_err(|_| wrong(&format!("{name}[{index}]"), &item, "dict"))?;
    }
    json::passed_on(name, value)
}

fn stop(value: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
    if value.is_instance_of::<PyString>() {
        return Ok(vec![text("stop", value)?]);
    }
    let items = value.try_iter().map_err(|_| wrong("stop", value, "a list of str, or one str,"))?;
    items.enumerate().map(|(index, item)| text(&format!("stop[{index}]"), &item?)).collect()
}
