//! `JobQueue` and `Job` for Python: the protocols of `mlx_serving_router/engine.py`, and what a handler in an event loop
//! needs beside them.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyString;

use super::answer::PyTokenEvent;
use super::request::PyInferenceRequest;
use super::runtime::OfProcess;
use super::{bridge, json};
use crate::wire::{Finish, FinishReason, Json, MOST_CACHED_PREFIXES, Phase, PrefixHashes, Priority, Usage};
use crate::worker::{Job, JobQueue, Piece};

/// How often a thread that waits for a job looks for signals.
const SIGNALS_EVERY: Duration = Duration::from_secs(1);
/// How long one piece may hold up the engine whose answer nobody takes off.
const ROOM_WITHIN: Duration = Duration::from_secs(1);

/// The work of one engine, in the order in which it is to be done.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "JobQueue")]
pub(super) struct PyJobQueue(pub(super) OfProcess<JobQueue>);

/// One attempt at one request.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "Job")]
pub(super) struct PyJob {
    job: OfProcess<Arc<Job>>,
    request: Py<PyInferenceRequest>,
}

// === impl PyJobQueue ===

#[pymethods]
impl PyJobQueue {
    /// Whether the worker is stopping and no further job will come.
    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(self.0.get()?.closed())
    }

    /// The next job, waiting for it with the interpreter released; `None` when so many seconds have passed or the queue is
    /// closed.
    #[pyo3(signature = (timeout=None))]
    fn get(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<PyJob>> {
        let mut left = timeout.map(seconds).transpose()?;
        let jobs = self.0.get()?;
        if left.is_none() {
            jobs.report_waiting();
        }
        loop {
            let slice = left.map_or(SIGNALS_EVERY, |left| left.min(SIGNALS_EVERY));
            // A look costs less than letting go of the interpreter, which a busy thread may keep for long.
            let job = if slice.is_zero() { jobs.get(Some(slice)) } else { py.detach(|| jobs.get(Some(slice))) };
            if let Some(job) = job {
                return PyJob::new(py, job).map(Some);
            }
            py.check_signals()?;
            left = left.map(|left| left.saturating_sub(slice));
            if jobs.closed() || left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
        }
    }

    /// The next job, awaited; `None` when the queue is closed.
    fn next<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let jobs = self.0.get()?.clone();
        jobs.report_waiting();
        bridge::awaitable_with(py, async move { jobs.next().await }, |py, job| match job {
            Some(job) => PyJob::new(py, job)?.into_pyobject(py).map(|job| job.into_any().unbind()),
            None => Ok(py.None()),
        })
    }

    /// Delivers pieces of several jobs together, without waiting for slow readers.
    fn deliver(&self, pieces: Vec<PyPiece<'_>>) -> PyResult<()> {
        let pieces = pieces.into_iter().map(|(job, text, token_ids, logprobs)| {
            let (job, logprobs) = (job.get().job.get()?.clone(), passed_logprobs(logprobs.as_ref())?);
            Ok(Piece { job, text: text.to_string_lossy().into_owned(), token_ids, logprobs })
        });
        let pieces: PyResult<Vec<_>> = pieces.collect();
        self.0.get()?.deliver(pieces?);
        Ok(())
    }

    /// The models that waiting jobs ask for, each once.
    #[getter]
    fn waiting_models(&self) -> PyResult<Vec<String>> {
        Ok(self.0.get()?.waiting_models())
    }

    /// Refuses requests of this priority and of lower ones from now on, waiting jobs too; `None` refuses nobody.
    #[pyo3(signature = (up_to, message="", *, retry_after_ms=None))]
    fn refuse(&self, up_to: Option<&str>, message: &str, retry_after_ms: Option<i64>) -> PyResult<()> {
        let known = |name: &str| match name {
            "low" => Ok(Priority::Low),
            "normal" => Ok(Priority::Normal),
            "high" => Ok(Priority::High),
            other => Err(PyValueError::new_err(format!("up_to is {other:?}; 'low', 'normal', 'high' or None is right"))),
        };
        self.0.get()?.refuse(up_to.map(known).transpose()?, message, retry_after_ms);
        Ok(())
    }

    /// What heartbeats say from now on. The first `ready` lets the worker register. Jobs for `loading_models` are not handed
    /// out. `cached_prefixes` that are left out stay as they are.
    #[pyo3(signature = (phase, *, loaded_models=Vec::new(), loading_models=Vec::new(), cached_prefixes=None))]
    fn report(
        &self,
        phase: &str,
        loaded_models: Vec<String>,
        loading_models: Vec<String>,
        cached_prefixes: Option<Vec<String>>,
    ) -> PyResult<()> {
        let known = [Phase::Loading, Phase::Ready, Phase::Draining].into_iter().find(|known| known.as_str() == phase);
        let Some(known) = known else {
            return Err(PyValueError::new_err(format!("phase is {phase:?}; 'loading', 'ready' or 'draining' is right")));
        };
        let jobs = self.0.get()?;
        if let Some(prefixes) = cached_prefixes {
            if prefixes.len() > MOST_CACHED_PREFIXES || prefixes.iter().any(|text| PrefixHashes::parse(text).is_none()) {
                return Err(PyValueError::new_err(format!(
                    "cached_prefixes has {} entries; at most {MOST_CACHED_PREFIXES} are right, each of sixteen hexadecimal digits",
                    prefixes.len()
                )));
            }
            jobs.hold(prefixes);
        }
        jobs.report(known, loaded_models, loading_models);
        Ok(())
    }
}

/// A piece of a job's answer: its text, its tokens, their log probabilities.
type PyPiece<'py> = (Bound<'py, PyJob>, Bound<'py, PyString>, Vec<u32>, Option<Bound<'py, PyAny>>);

// === impl PyJob ===

impl PyJob {
    fn new(py: Python<'_>, job: Job) -> PyResult<Self> {
        let request = Py::new(py, PyInferenceRequest(job.request().clone()))?;
        Ok(Self { job: OfProcess::new("job", Arc::new(job)), request })
    }
}

#[pymethods]
impl PyJob {
    /// What is asked for.
    #[getter]
    fn request(&self, py: Python<'_>) -> Py<PyInferenceRequest> {
        self.request.clone_ref(py)
    }

    /// 1 for the first worker that was asked, 2 for the second, and so on.
    #[getter]
    fn attempt(&self) -> PyResult<u32> {
        Ok(self.job.get()?.attempt())
    }

    /// Whether nobody waits any more: cancelled, past its deadline, or the worker is stopping.
    #[getter]
    fn cancelled(&self) -> PyResult<bool> {
        Ok(self.job.get()?.cancelled().is_cancelled())
    }

    /// Whether the answer goes out as fast as it comes.
    #[getter]
    fn has_room(&self) -> PyResult<bool> {
        Ok(self.job.get()?.has_room())
    }

    /// Delivers a piece of the answer. One that nobody takes off holds up the engine, for a second at most.
    #[pyo3(signature = (text, token_ids=Vec::new(), *, logprobs=None))]
    fn token(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyString>,
        token_ids: Vec<u32>,
        logprobs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let job = self.job.get()?;
        job.token(&text.to_string_lossy(), &token_ids, passed_logprobs(logprobs)?);
        if !job.has_room() {
            py.detach(|| job.wait_for_room(ROOM_WITHIN));
        }
        Ok(())
    }

    /// Delivers a piece of the answer, without waiting: the caller looks at `has_room` and awaits `room`.
    fn event(&self, event: &Bound<'_, PyTokenEvent>) -> PyResult<()> {
        let token = &event.get().0;
        self.job.get()?.token(&token.text, &token.token_ids, token.logprobs.clone());
        Ok(())
    }

    /// As `event`, for a text alone.
    fn piece(&self, text: &Bound<'_, PyString>) -> PyResult<()> {
        self.job.get()?.token(&text.to_string_lossy(), &[], None);
        Ok(())
    }

    /// Returns, awaited, when `has_room`.
    fn room<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let job = self.job.get()?.clone();
        bridge::awaitable_with(py, async move { job.room().await }, |py, ()| Ok(py.None()))
    }

    /// Returns, awaited, when `cancelled`.
    fn gone<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let token = self.job.get()?.cancelled().clone();
        bridge::awaitable_with(py, async move { token.cancelled().await }, |py, ()| Ok(py.None()))
    }

    /// Gives it back to the queue, where it waits as before: its model is loaded first.
    fn put_back(&self) -> PyResult<()> {
        self.job.get()?.put_back();
        Ok(())
    }

    /// Gives the place of a job of `next` back: nobody works on it any more.
    fn let_go(&self) -> PyResult<()> {
        self.job.get()?.let_go();
        Ok(())
    }

    /// Ends the job with success. `completion_tokens` is counted where it is `None`.
    #[pyo3(signature = (finish_reason="stop", *, prompt_tokens=0, completion_tokens=None, cached_tokens=0, tool_calls=None))]
    fn done(
        &self,
        finish_reason: &str,
        prompt_tokens: u64,
        completion_tokens: Option<u64>,
        cached_tokens: u64,
        tool_calls: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let reason = FinishReason::parse(finish_reason).ok_or_else(|| {
            PyValueError::new_err(format!("finish_reason is {finish_reason:?}; 'stop', 'length' or 'tool_calls' is right"))
        })?;
        let tool_calls = tool_calls.map(|calls| json::passed_on("tool_calls", calls)).transpose()?;
        let usage = Usage { prompt_tokens, completion_tokens: 0, cached_tokens };
        self.job.get()?.done(Finish { reason, usage, tool_calls, latency_ms: 0.0 }, completion_tokens);
        Ok(())
    }

    /// Ends the job with a failure.
    #[pyo3(signature = (code, message, *, retry_after_ms=None))]
    fn error(&self, code: &str, message: &str, retry_after_ms: Option<i64>) -> PyResult<()> {
        self.job.get()?.error(code, message, retry_after_ms);
        Ok(())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("<Job {:?} attempt {}>", self.request.bind(py).get().0.request_id, self.job.get()?.attempt()))
    }
}

fn passed_logprobs(logprobs: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Json>> {
    logprobs.map(|logprobs| json::passed_on("logprobs", logprobs)).transpose()
}

fn seconds(timeout: f64) -> PyResult<Duration> {
    // Longer than can be counted is without limit, for all that anybody will see.
    if timeout.is_nan() || timeout < 0.0 {
        return Err(PyValueError::new_err(format!("timeout is {timeout}; a number of seconds of at least 0 is right")));
    }
    Ok(Duration::try_from_secs_f64(timeout).unwrap_or(Duration::MAX))
}
