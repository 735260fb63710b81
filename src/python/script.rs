//! Scripts for Python: what a scripted worker does, checked when it is written and shown as it was.

use std::fmt::Display;
use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMapping, PyString, PyTuple};
use serde_json::{Map, Value};

use super::{json, quoted};
use crate::wire::{FinishReason, Usage};
use crate::worker::scripted::{Babble, PIECES, Plan, Script, Step, beginning};

/// The most tokens of a beginning.
const TOKENS_MAX: i64 = 100_000;

/// What a scripted worker does with the requests that reach it: a value.
#[derive(PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "Script")]
pub(super) struct PyScript {
    pub(super) script: Script,
    /// The call that made it.
    shown: String,
}

/// The words of a call, for `__repr__`.
struct Shown {
    name: &'static str,
    arguments: Vec<String>,
}

#[pymethods]
impl PyScript {
    /// Answers with these pieces, one token each; where a stream is not wanted, in one piece after the same time.
    #[staticmethod]
    #[pyo3(signature = (
        *pieces, delay_ms=0, token_delay_ms=0, finish_reason="stop", prompt_tokens=4, cached_tokens=0, tool_calls=None,
        streamed=false
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn answer(
        pieces: &Bound<'_, PyTuple>,
        delay_ms: i64,
        token_delay_ms: i64,
        finish_reason: &str,
        prompt_tokens: i64,
        cached_tokens: i64,
        tool_calls: Option<&Bound<'_, PyAny>>,
        streamed: bool,
    ) -> PyResult<Self> {
        let reason = FinishReason::parse(finish_reason).ok_or_else(|| {
            let right = "'stop', 'length' or 'tool_calls' is right";
            PyValueError::new_err(format!("finish_reason is {finish_reason:?}; {right}"))
        })?;
        let (delay, token_delay) = (pause("delay_ms", delay_ms)?, pause("token_delay_ms", token_delay_ms)?);
        let mut shown = Shown::new("answer");
        let mut spoken = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let text = piece.cast::<PyString>().map_err(|_| PyTypeError::new_err("a piece of an answer is a str"))?;
            let text = text.to_string_lossy();
            shown = shown.add(quoted(&text));
            spoken.push(Step::token(&text));
        }
        if spoken.is_empty() {
            spoken.extend(PIECES.map(Step::token));
        }
        shown = shown
            .add_if(delay_ms != 0, "delay_ms", delay_ms)
            .add_if(token_delay_ms != 0, "token_delay_ms", token_delay_ms)
            .add_if(reason != FinishReason::Stop, "finish_reason", quoted(finish_reason))
            .add_if(prompt_tokens != 4, "prompt_tokens", prompt_tokens)
            .add_if(cached_tokens != 0, "cached_tokens", cached_tokens)
            .add_if(streamed, "streamed", truth(streamed));
        if let Some(calls) = tool_calls {
            shown = shown.add(format!("tool_calls={}", calls.repr()?));
        }
        let completion_tokens = spoken.len() as u64;
        let usage = Usage {
            prompt_tokens: at_least_0("prompt_tokens", prompt_tokens)?,
            completion_tokens,
            cached_tokens: at_least_0("cached_tokens", cached_tokens)?,
        };
        let tool_calls = tool_calls.map(|calls| json::passed_on("tool_calls", calls)).transpose()?;
        let mut steps = vec![Step::Accept];
        steps.extend(delay);
        for (number, token) in spoken.into_iter().enumerate() {
            steps.extend(token_delay.clone().filter(|_| number > 0));
            steps.push(token);
        }
        steps.push(Step::Finish { reason, usage: Some(usage), tool_calls });
        Ok(shown.of(Script::Plan(Plan { steps: steps.into(), streamed })))
    }

    /// Says so many tokens, then nothing more.
    #[staticmethod]
    #[pyo3(signature = (after_tokens=0, *, accept=true))]
    fn stall(after_tokens: i64, accept: bool) -> PyResult<Self> {
        begun(Shown::new("stall"), after_tokens, accept, 0, Step::Stall)
    }

    /// Says so many tokens, then fails.
    #[staticmethod]
    #[pyo3(signature = (code, message, *, after_tokens=0, retry_after_ms=None, delay_ms=0, accept=true))]
    fn fail(
        code: Option<&str>,
        message: &str,
        after_tokens: i64,
        retry_after_ms: Option<i64>,
        delay_ms: i64,
        accept: bool,
    ) -> PyResult<Self> {
        if code == Some("") {
            return Err(PyValueError::new_err("code is empty; a code such as 'WORKER_UNAVAILABLE' is right, or None for none"));
        }
        let end = Step::Fail {
            code: code.map(str::to_owned),
            message: message.to_owned(),
            retry_after_ms: retry_after_ms.map(retry_after).transpose()?,
        };
        let shown = Shown::new("fail")
            .add(code.map_or("None".to_owned(), quoted))
            .add_if(message != "as scripted", "message", quoted(message))
            .add_if(retry_after_ms.is_some(), "retry_after_ms", retry_after_ms.unwrap_or_default());
        begun(shown, after_tokens, accept, delay_ms, end)
    }

    /// Refuses, because there is no room.
    #[staticmethod]
    #[pyo3(signature = (retry_after_ms=None))]
    fn refuse(retry_after_ms: Option<i64>) -> PyResult<Self> {
        let shown = Shown::new("refuse").add_if(retry_after_ms.is_some(), "retry_after_ms", retry_after_ms.unwrap_or_default());
        Ok(shown.of(Script::refuse(retry_after_ms.map(retry_after).transpose()?)))
    }

    /// Says so many tokens, then is gone without a word: the worker, with all its requests.
    #[staticmethod]
    #[pyo3(signature = (after_tokens=0, *, accept=true))]
    fn die(after_tokens: i64, accept: bool) -> PyResult<Self> {
        begun(Shown::new("die"), after_tokens, accept, 0, Step::Die)
    }

    /// Answers in tokens and breaks the protocol after so many of them.
    #[staticmethod]
    #[pyo3(signature = (how="malformed", *, after_tokens=1))]
    fn babble(how: &str, after_tokens: i64) -> PyResult<Self> {
        let kind = match how {
            "malformed" => Babble::Malformed,
            "duplicate" => Babble::Duplicate,
            "reordered" => Babble::Reordered,
            "missing" => Babble::Missing,
            other => {
                let right = "'malformed', 'duplicate', 'reordered' or 'missing' is right";
                return Err(PyValueError::new_err(format!("how is {other:?}; {right}")));
            }
        };
        if kind == Babble::Duplicate && after_tokens == 0 {
            return Err(PyValueError::new_err("after_tokens is 0; with 'duplicate' at least 1 is right: the token to repeat"));
        }
        let shown = Shown::new("babble").add(quoted(how)).add_if(after_tokens != 1, "after_tokens", after_tokens);
        Ok(shown.of(Script::babble(kind, tokens(after_tokens)?)))
    }

    /// Says these messages as they are: objects of the wire, which get the request's id, and texts or bytes of any kind.
    #[staticmethod]
    #[pyo3(signature = (*messages))]
    fn say(messages: &Bound<'_, PyTuple>) -> PyResult<Self> {
        if messages.is_empty() {
            return Err(PyValueError::new_err("say() says nothing; stall(accept=False) is right for that"));
        }
        let mut shown = Shown::new("say");
        let mut steps = Vec::with_capacity(messages.len());
        for message in messages {
            shown = shown.add(message.repr()?.to_string_lossy());
            steps.push(if let Ok(text) = message.cast::<PyString>() {
                Step::Raw(text.to_str()?.to_owned().into())
            } else if let Ok(bytes) = message.cast::<PyBytes>() {
                Step::Raw(bytes.as_bytes().to_vec().into())
            } else if message.cast::<PyMapping>().is_ok() {
                Step::Say(json::from_python::<Map<String, Value>>("a message", &message)?)
            } else {
                let kind = message.get_type().name()?;
                return Err(PyTypeError::new_err(format!("a message is of type {kind}; dict, str and bytes are right")));
            });
        }
        Ok(shown.of(Script::steps(steps)))
    }

    /// This for each n-th request, something else for the others.
    #[staticmethod]
    #[pyo3(signature = (n, script, *, otherwise=None))]
    fn every(n: i64, script: &Bound<'_, Self>, otherwise: Option<&Bound<'_, Self>>) -> PyResult<Self> {
        let count = at_least_1("n", n)?;
        let script = script.get();
        let (others, named) = match otherwise {
            Some(otherwise) => (otherwise.get().script.clone(), &*otherwise.get().shown),
            None => (Script::default(), "answer()"),
        };
        let shown = Shown::new("every").add(n.to_string()).add(script.shown.as_str()).add(format!("otherwise={named}"));
        Ok(shown.of(script.script.clone().every(count, others)))
    }

    /// This for one request, or as often as `times` says, then another script for all further ones.
    fn then(&self, script: &Bound<'_, Self>) -> Self {
        let next = script.get();
        Self { script: self.script.clone().then(next.script.clone()), shown: format!("{}.then({})", self.shown, next.shown) }
    }

    /// This for so many requests, before what comes with `then`.
    fn times(&self, n: i64) -> PyResult<Self> {
        let script = self.script.clone().times(at_least_1("n", n)?);
        Ok(Self { script, shown: format!("{}.times({n})", self.shown) })
    }

    fn __hash__(&self) -> u64 {
        super::hash(&self.shown)
    }

    fn __repr__(&self) -> &str {
        &self.shown
    }
}

/// A script that begins an answer and ends it in another way.
fn begun(shown: Shown, after_tokens: i64, accept: bool, delay_ms: i64, end: Step) -> PyResult<PyScript> {
    let shown = shown.add_if(after_tokens != 0, "after_tokens", after_tokens).add_if(delay_ms != 0, "delay_ms", delay_ms).add_if(
        !accept,
        "accept",
        truth(accept),
    );
    let mut steps: Vec<Step> = accept.then_some(Step::Accept).into_iter().chain(beginning(tokens(after_tokens)?)).collect();
    steps.extend(pause("delay_ms", delay_ms)?);
    steps.push(end);
    Ok(shown.of(Script::steps(steps)))
}

fn tokens(after_tokens: i64) -> PyResult<u64> {
    if after_tokens > TOKENS_MAX {
        return Err(PyValueError::new_err(format!("after_tokens is {after_tokens}; at most {TOKENS_MAX} is right")));
    }
    at_least_0("after_tokens", after_tokens)
}

/// A step that waits; none for no time.
fn pause(name: &str, ms: i64) -> PyResult<Option<Step>> {
    let ms = at_least_0(name, ms)?;
    Ok((ms > 0).then_some(Step::Wait(Duration::from_millis(ms))))
}

fn retry_after(ms: i64) -> PyResult<i64> {
    if ms < -1 {
        let right = "a number of milliseconds is right, or -1: never again";
        return Err(PyValueError::new_err(format!("retry_after_ms is {ms}; {right}")));
    }
    Ok(ms)
}

pub(super) fn at_least_0(name: &str, number: i64) -> PyResult<u64> {
    u64::try_from(number).map_err(|_| PyValueError::new_err(format!("{name} is {number}; 0 or more is right")))
}

fn at_least_1(name: &str, number: i64) -> PyResult<u64> {
    match u64::try_from(number) {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(PyValueError::new_err(format!("{name} is {number}; 1 or more is right"))),
    }
}

// === impl Shown ===

impl Shown {
    fn new(name: &'static str) -> Self {
        Self { name, arguments: Vec::new() }
    }

    fn add(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds what a keyword says, where it has been given.
    fn add_if(self, given: bool, name: &str, value: impl Display) -> Self {
        if given { self.add(format!("{name}={value}")) } else { self }
    }

    fn of(self, script: Script) -> PyScript {
        PyScript { script, shown: format!("{}({})", self.name, self.arguments.join(", ")) }
    }
}

/// A truth value as Python writes it.
pub(super) fn truth(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}
