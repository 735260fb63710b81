//! The deciding core alone, for Python: `Router` and `Lease`. Synchronous, without I/O and without the runtime.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use tokio::time::Instant;

use super::config::PyClusterConfig;
use super::events::PyControllerEvent;
use super::fleet::{self, PyWorkerInfo};
use super::{errors, json};
use crate::dispatch::Event;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::routing::{Carrier, Lease, LeftOut, Outcome, Query, Refusal, Registered, Router, RouterSettings};
use crate::wire::{
    Capacity, Heartbeat, HeartbeatMetrics, PROTOCOL, Phase, PrefixHashes, Registration, Skills, WorkerId, WorkerStatus,
    check_session_id,
};

/// How often a selection also does what is due by the clock.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);

/// The decision engine of a controller, for people with their own transport: who gets a request.
///
/// Args:
///     config: `requestRouting` and `loadBalancing` of it count. As `ControllerNode` takes it.
///     seed: Decides every random choice; a random one where it is left out.
///
/// Raises:
///     ConfigError: The configuration cannot be used.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "Router")]
pub(super) struct PyRouter {
    router: Arc<Router>,
    sequence: AtomicU64,
    expired: Mutex<Instant>,
    events: Arc<Mutex<Untold>>,
}

/// What happened and was not taken yet: the latest of it.
#[derive(Default)]
struct Untold {
    events: VecDeque<Event>,
    lost: u64,
}

/// Events that are kept until they are taken.
const MOST_EVENTS: usize = 1_024;

/// A worker's promise to take one request. End it with `success`, `failure` or `release`; the first one counts. Dropped, or
/// left as a context manager, it is released: that says nothing about the worker.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "Lease")]
pub(super) struct PyLease {
    lease: Mutex<Option<Lease>>,
    worker_id: WorkerId,
    choice: &'static str,
    left_out: Option<Vec<(WorkerId, LeftOut)>>,
}

fn worker_id(name: &str) -> PyResult<WorkerId> {
    WorkerId::new(name).map_err(|error| PyValueError::new_err(error.to_string()))
}

fn refused(model: &str, refusal: Refusal) -> ControllerError {
    let millis = |wait: Duration| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let error = match refusal {
        Refusal::NoWorkers => ControllerError::new(ControllerErrorCode::NoWorkersAvailable, "no worker is online"),
        Refusal::ModelNotFound => {
            ControllerError::new(ControllerErrorCode::ModelNotFound, "workers are online, but none of them serves this model")
        }
        Refusal::NoHealthyWorkers { retry_after } => {
            let message = "workers serve this model, but the circuit breakers of all of them refuse";
            ControllerError::new(ControllerErrorCode::NoHealthyWorkers, message).with("retryAfterMs", millis(retry_after))
        }
        Refusal::AllTried { total, healthy, excluded } => {
            let message = "of the workers that are not excluded nobody takes the request";
            ControllerError::new(ControllerErrorCode::NoWorkersAvailable, message)
                .with("totalWorkers", total)
                .with("healthyWorkers", healthy)
                .with("excludedWorkers", excluded)
        }
        Refusal::Full => ControllerError::new(ControllerErrorCode::QueueFull, "every worker that serves this model is full"),
        Refusal::WorkerOffline => ControllerError::new(ControllerErrorCode::WorkerOffline, "the worker is offline"),
        Refusal::CircuitOpen { retry_after } => {
            ControllerError::new(ControllerErrorCode::CircuitBreakerOpen, "the circuit breaker of the worker is open")
                .with("retryAfterMs", millis(retry_after))
        }
    };
    error.with("modelId", model)
}

#[pymethods]
impl PyRouter {
    #[new]
    #[pyo3(signature = (config=None, *, seed=None))]
    fn new(py: Python<'_>, config: Option<&Bound<'_, PyAny>>, seed: Option<u64>) -> PyResult<Self> {
        let config = py.import("mlx_serving_router._config")?.getattr("as_config")?.call1((config,))?;
        let config = config.cast_into::<PyClusterConfig>()?;
        let settings = RouterSettings::try_from(&config.get().0).map_err(|error| errors::raise_settings(py, &error))?;
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        let events = Arc::new(Mutex::new(Untold::default()));
        let told = events.clone();
        let router = Router::new(settings, seed, Box::new(move |event| told.lock().push((&event).into())));
        Ok(Self { router, sequence: AtomicU64::new(0), expired: Mutex::new(Instant::now()), events })
    }

    /// Adds a worker, or says anew what it can do. It stays until it is removed.
    ///
    /// Args:
    ///     worker_id: Its name: 1 to 64 letters, digits, `-` and `_`.
    ///     models: What it serves.
    ///     max_concurrent: Requests that it takes at a time; 0: no limit.
    ///     memory_gb: Its memory, for the strategy `skills_based`.
    ///
    /// Raises:
    ///     ValueError: The name is unsuitable, or there are `controller.maxWorkers` already.
    #[pyo3(signature = (worker_id, models, *, max_concurrent=0, memory_gb=0.0))]
    fn add_worker(&self, worker_id: &str, models: Vec<String>, max_concurrent: u32, memory_gb: f64) -> PyResult<()> {
        let registration = Registration {
            protocol: Some(PROTOCOL),
            worker_id: self::worker_id(worker_id)?,
            // One life: a worker that comes back is removed and added.
            incarnation: self.incarnation(worker_id),
            hostname: String::new(),
            ip: String::new(),
            port: 0,
            skills: Skills { available_models: models, ..Skills::default() },
            capacity: Capacity { max_concurrent, max_queue: 0, memory_gb },
            features: Vec::new(),
            status: WorkerStatus::Online,
            timestamp: 0,
        };
        match self.router.register(&registration, Carrier::Local, Instant::now()) {
            Registered::Ignored(_) => Err(PyValueError::new_err("the fleet is full: controller.maxWorkers has more")),
            Registered::New | Registered::Renewed | Registered::Replaced => Ok(()),
        }
    }

    /// Forgets a worker. False: it is not known.
    fn remove_worker(&self, worker_id: &str) -> bool {
        let known = self.router.worker(worker_id, Instant::now());
        if let Some(worker) = &known {
            self.router.remove(&worker.worker_id);
        }
        known.is_some()
    }

    /// A worker tells its load.
    ///
    /// Args:
    ///     worker_id: Who.
    ///     active_requests: Requests on it, whoever sent them; what is beyond this router's own counts as load.
    ///     queue_depth: Requests that wait there.
    ///     status: `online`, `degraded` (chosen only when no other is free), `draining` or `offline`.
    ///     loaded_models: Models in memory.
    ///     loading_models: Models on their way into memory.
    ///     memory_used_gb: For the strategy `skills_based`.
    ///
    /// Raises:
    ///     ValueError: The worker is not known, or the status is no word for one.
    #[pyo3(signature = (worker_id, *, active_requests=0, queue_depth=0, status="online", loaded_models=Vec::new(),
        loading_models=Vec::new(), memory_used_gb=0.0),
        text_signature = "($self, worker_id, *, active_requests=0, queue_depth=0, status='online', loaded_models=(), \
            loading_models=(), memory_used_gb=0.0)")]
    #[expect(clippy::too_many_arguments, reason = "they are the keywords of a Python method")]
    fn heartbeat(
        &self,
        worker_id: &str,
        active_requests: u32,
        queue_depth: u32,
        status: &str,
        loaded_models: Vec<String>,
        loading_models: Vec<String>,
        memory_used_gb: f64,
    ) -> PyResult<()> {
        let now = Instant::now();
        let Some(worker) = self.router.worker(worker_id, now) else {
            return Err(PyValueError::new_err(format!("worker {worker_id:?} is not known; add_worker comes first")));
        };
        let status = [WorkerStatus::Online, WorkerStatus::Degraded, WorkerStatus::Draining, WorkerStatus::Offline]
            .into_iter()
            .find(|known| known.as_str() == status)
            .ok_or_else(|| {
                PyValueError::new_err(format!("status is {status:?}; online, degraded, draining or offline is right"))
            })?;
        let metrics =
            HeartbeatMetrics { active_requests, models_loaded: loaded_models, memory_used_gb, ..HeartbeatMetrics::default() };
        let heartbeat = Heartbeat {
            worker_id: worker.worker_id,
            incarnation: worker.incarnation,
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed) + 1,
            status,
            timestamp: 0,
            metrics,
            queue_depth,
            active_request_ids: None,
            tokens_generated: 0,
            phase: Phase::Ready,
            loading_models,
            cached_prefixes: Vec::new(),
        };
        self.router.heartbeat(&heartbeat, &|_| false, now);
        self.expire(now);
        Ok(())
    }

    /// Chooses a worker and takes a place on it.
    ///
    /// Args:
    ///     model_id: The model.
    ///     session_id: The conversation that the request belongs to.
    ///     exclude: Workers that failed this request.
    ///     explain: Whether the lease, or the error's context, says who was left out, and why.
    ///     prompt: What will be asked, as one text; only the strategy `prefix_aware` looks at it, and keeps hashes alone.
    ///
    /// Raises:
    ///     ControllerError: NO_WORKERS_AVAILABLE, MODEL_NOT_FOUND, NO_HEALTHY_WORKERS, or QUEUE_FULL where all are full or
    ///         want to be left alone; INVALID_SESSION_ID.
    #[pyo3(signature = (model_id, session_id=None, exclude=Vec::new(), *, explain=false, prompt=None),
        text_signature = "($self, model_id, session_id=None, exclude=(), *, explain=False, prompt=None)")]
    fn select(
        &self,
        py: Python<'_>,
        model_id: &str,
        session_id: Option<&str>,
        exclude: Vec<String>,
        explain: bool,
        prompt: Option<&str>,
    ) -> PyResult<PyLease> {
        let now = Instant::now();
        self.expire(now);
        errors::unwrap(py, session_id.map_or(Ok(()), check_session_id))?;
        let exclude = exclude.iter().map(|name| worker_id(name)).collect::<PyResult<Vec<_>>>()?;
        let prompt = prompt.filter(|_| self.router.wants_prefixes()).map(|text| PrefixHashes::of_prompt(model_id, text));
        let query = Query {
            model_id,
            session_id,
            exclude: &exclude,
            carrier: None,
            unable: &[],
            worker_id: None,
            prompt: prompt.as_ref(),
        };
        let lease = self.router.select(&query, now).map_err(|refusal| {
            let error = refused(model_id, refusal);
            if explain { error.with("leftOut", shown("workerId", &self.router.left_out(&query, now))) } else { error }
        });
        let lease = errors::unwrap(py, lease)?;
        Ok(PyLease {
            worker_id: lease.worker_id().clone(),
            choice: lease.choice().as_str(),
            left_out: explain.then(|| lease.left_out(&query, now)),
            lease: Mutex::new(Some(lease)),
        })
    }

    /// Every known worker, by id.
    fn workers(&self) -> Vec<PyWorkerInfo> {
        self.router.snapshot(Instant::now()).into_iter().map(PyWorkerInfo::from).collect()
    }

    /// One worker; `None` where it is not known.
    fn worker(&self, worker_id: &str) -> Option<PyWorkerInfo> {
        self.router.worker(worker_id, Instant::now()).map(PyWorkerInfo::from)
    }

    /// Gives a worker nothing new; to have it back, remove it and add it again. False: it is not known.
    fn drain_worker(&self, worker_id: &str) -> bool {
        self.router.drain(worker_id, Instant::now())
    }

    /// Closes a circuit breaker and forgets what it has seen. False: there is no such worker, or there are no breakers.
    fn reset_circuit_breaker(&self, worker_id: &str) -> bool {
        self.router.reset_breaker(worker_id, Instant::now())
    }

    /// Opens a circuit breaker until it is reset. False: there is no such worker, or there are no breakers.
    fn force_open_circuit_breaker(&self, worker_id: &str) -> bool {
        self.router.force_open_breaker(worker_id, Instant::now())
    }

    /// What happened since the last call, the oldest first: at most the latest 1,024, and the first of them says in `lost` how
    /// many came before.
    fn take_events(&self) -> Vec<PyControllerEvent> {
        self.expire(Instant::now());
        let Untold { mut events, lost } = std::mem::take(&mut *self.events.lock());
        if let Some(first) = events.front_mut() {
            first.lost = lost;
        }
        events.into_iter().map(PyControllerEvent::from).collect()
    }

    /// What the circuit breakers have seen, by worker; empty where they are disabled.
    fn get_circuit_breaker_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let shown = PyDict::new(py);
        for (worker, stats) in self.router.breaker_stats(Instant::now()) {
            shown.set_item(worker.as_str(), fleet::breaker_stats(py, &stats)?)?;
        }
        Ok(shown)
    }

    fn __repr__(&self) -> String {
        format!("<Router workers={} models={}>", self.router.online(), super::quoted_list(&self.router.models()))
    }
}

impl PyRouter {
    fn incarnation(&self, worker_id: &str) -> String {
        let known = self.router.worker(worker_id, Instant::now());
        known.map_or_else(|| format!("{:016x}", fastrand::u64(..)), |worker| worker.incarnation)
    }

    fn expire(&self, now: Instant) {
        {
            let mut expired = self.expired.lock();
            if now.saturating_duration_since(*expired) < EXPIRE_EVERY {
                return;
            }
            *expired = now;
        }
        self.router.expire(now);
    }
}

#[pymethods]
impl PyLease {
    /// Who takes the request.
    #[getter]
    fn worker_id(&self) -> &str {
        &self.worker_id
    }

    /// What decided for this worker: `strategy`, `prefix` (it most likely holds most of the prompt in its cache), `affinity`
    /// (the session belongs to it) or `rendezvous` (a new session, or its worker cannot take the request).
    #[getter]
    fn choice(&self) -> &'static str {
        self.choice
    }

    /// With `explain`: who was no candidate, and why (`tried`, `circuit_open`, `full`, `degraded`), as `worker_id` and
    /// `reason`. Else `None`.
    #[getter]
    fn left_out<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.left_out.as_deref().map(|left_out| shown("worker_id", left_out)))
    }

    /// The first token came, so many milliseconds after the request was sent.
    fn first_token(&self, ttft_ms: f64) -> PyResult<()> {
        let ttft = millis(ttft_ms)?;
        if let Some(lease) = &*self.lease.lock() {
            lease.first_token(ttft, Instant::now());
        }
        Ok(())
    }

    /// The answer came, to its end. `ttft_ms`: its first token came so many milliseconds after the request was sent.
    #[pyo3(signature = (ttft_ms=None))]
    fn success(&self, ttft_ms: Option<f64>) -> PyResult<()> {
        let ttft = ttft_ms.map(millis).transpose()?;
        let now = Instant::now();
        if let Some(lease) = self.take() {
            if let Some(ttft) = ttft {
                lease.first_token(ttft, now);
            }
            lease.end(Outcome::Success, now);
        }
        Ok(())
    }

    /// It failed. The code decides what the breaker makes of it. True: this opened the breaker. `retry_after_ms`: the worker
    /// wants to be left alone for so many milliseconds, and is.
    #[pyo3(signature = (code, *, retry_after_ms=None))]
    fn failure(&self, code: &Bound<'_, PyString>, retry_after_ms: Option<u64>) -> PyResult<bool> {
        let code = errors::code(code)?;
        let now = Instant::now();
        Ok(self.take().is_some_and(|lease| {
            if let Some(span) = retry_after_ms {
                lease.hold_back(Duration::from_millis(span), now);
            }
            lease.end(Outcome::Failure(code), now)
        }))
    }

    /// Gives the place back; says nothing about the worker.
    fn release(&self) {
        drop(self.take());
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (kind, error, traceback, /))]
    fn __exit__(&self, kind: &Bound<'_, PyAny>, error: &Bound<'_, PyAny>, traceback: &Bound<'_, PyAny>) {
        let _ = (kind, error, traceback);
        self.release();
    }

    fn __repr__(&self) -> String {
        let state = if self.lease.lock().is_some() { "held" } else { "ended" };
        format!("<Lease worker_id='{}' choice='{}' {state}>", self.worker_id, self.choice)
    }
}

impl PyLease {
    fn take(&self) -> Option<Lease> {
        self.lease.lock().take()
    }
}

impl Untold {
    fn push(&mut self, event: Event) {
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
            self.lost += 1;
        }
        self.events.push_back(event);
    }
}

/// Who was left out; `key` is what the worker's name stands under.
fn shown(key: &str, left_out: &[(WorkerId, LeftOut)]) -> serde_json::Value {
    left_out.iter().map(|(worker, why)| serde_json::json!({key: worker.as_str(), "reason": why.as_str()})).collect()
}

fn millis(ms: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(ms / 1000.0).map_err(|_| PyValueError::new_err(format!("ttft_ms is {ms}; at least 0 is right")))
}
