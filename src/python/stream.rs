//! An answer as it comes, for Python: `TokenStream`, and its blocking twin.
//!
//! A task of the runtime pulls from the core's stream into a bounded queue, and Python takes from there: what is there
//! already is given without a wait. While the queue is full the task pulls nothing; a consumer that takes nothing for
//! `streamIdleTimeoutMs` ends the stream with STREAM_INTERRUPTED. Leaving early, closing and dropping cancel the work on the
//! worker. The core's stream is gone, and with it all that it held, before Python sees the end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::{Mutex, MutexGuard};
use pyo3::exceptions::{PyRuntimeError, PyStopAsyncIteration, PyStopIteration};
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{PyTraverseError, PyVisit};
use tokio::sync::Notify;

use super::answer::{PyInferenceResponse, PyTokenEvent};
use super::event_loop::Waiter;
use super::runtime::{self, OfProcess};
use super::{bridge, errors};
use crate::dispatch::{Answer, TokenStream};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::signal::Signal;
use crate::wire::{Token, WorkerId};

/// Events that wait for Python at most.
const CAPACITY: usize = 1024;

/// Between the task that pulls and the Python object that is read.
pub(super) struct Channel {
    request_id: String,
    model_id: String,
    queue: Mutex<Queue>,
    /// Something can be taken, for a thread that waits.
    readable: Notify,
    /// There is room again.
    taken: Notify,
    /// Nobody reads any more.
    closed: Signal,
    /// The core's stream is gone.
    ended: Signal,
}

struct Queue {
    tokens: VecDeque<Token>,
    end: Option<End>,
    worker_id: WorkerId,
    waiter: Option<Arc<Waiter>>,
    /// A thread waits.
    blocks: bool,
}

#[derive(Clone)]
enum End {
    Complete(Arc<Answer>),
    Failed(ControllerError),
    Closed,
}

enum Taken {
    Token(Token),
    Tokens(Vec<Token>),
    End(End),
    Nothing,
}

/// A stream for one reader. Dropping it closes the channel.
pub(super) struct Reader(OfProcess<Arc<Channel>>);

/// An answer as it comes: an async iterator of `TokenEvent`.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "TokenStream")]
pub(super) struct PyTokenStream(Reader);

/// An answer as it comes, all events that are ready at a time.
#[pyclass(frozen, module = "mlx_serving_router._native")]
pub(super) struct TokenBatches(Py<PyTokenStream>);

/// An answer as it comes, for scripts and notebooks: an iterator of `TokenEvent` that waits with the interpreter released.
#[pyclass(frozen, module = "mlx_serving_router._native")]
pub(super) struct BlockingTokenStream(Reader);

/// The await of what comes next.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "_Next")]
pub(super) struct Next {
    channel: OfProcess<Arc<Channel>>,
    batch: bool,
    waiter: Mutex<Option<Arc<Waiter>>>,
}

// === impl Reader ===

impl Reader {
    /// Reads a stream. To be called on the runtime.
    pub(super) fn new(mut stream: TokenStream, idle: Duration) -> Self {
        // A stream is handed out with its first token: that can be taken without another turn of the runtime.
        let mut tokens = Vec::new();
        let end = match stream.next_into(&mut tokens).now_or_never() {
            Some(Ok(false)) => Some(complete(&stream)),
            Some(Err(error)) => Some(End::Failed(error)),
            Some(Ok(true)) | None => None,
        };
        let over = end.is_some();
        let queue = Queue { tokens: tokens.into(), end, worker_id: stream.worker_id().clone(), waiter: None, blocks: false };
        let channel = Arc::new(Channel {
            request_id: stream.request_id().to_owned(),
            model_id: stream.model_id().to_owned(),
            queue: Mutex::new(queue),
            readable: Notify::new(),
            taken: Notify::new(),
            closed: Signal::new(),
            ended: Signal::new(),
        });
        if over {
            drop(stream);
            channel.ended.fire();
        } else {
            tokio::spawn(pull(Arc::clone(&channel), stream, idle));
        }
        Self(OfProcess::new("stream", channel))
    }

    fn channel(&self) -> PyResult<&Arc<Channel>> {
        self.0.get()
    }

    fn worker_id(&self) -> PyResult<String> {
        Ok(self.channel()?.queue.lock().worker_id.to_string())
    }

    fn response(&self) -> PyResult<Option<PyInferenceResponse>> {
        match &self.channel()?.queue.lock().end {
            Some(End::Complete(answer)) => Ok(Some(PyInferenceResponse(Arc::clone(answer)))),
            _ => Ok(None),
        }
    }

    fn repr(&self, name: &str) -> PyResult<String> {
        let channel = self.channel()?;
        let queue = channel.queue.lock();
        let state = match &queue.end {
            None => "running",
            Some(End::Complete(_)) => "complete",
            Some(End::Failed(error)) => error.code().as_str(),
            Some(End::Closed) => "closed",
        };
        Ok(format!("<{name} request_id={} worker_id='{}' {state}>", super::quoted(&channel.request_id), queue.worker_id))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(channel) = self.0.if_here() {
            channel.close();
        }
    }
}

async fn pull(channel: Arc<Channel>, mut stream: TokenStream, idle: Duration) {
    let mut tokens = Vec::new();
    let mut closed = channel.closed.listen();
    let end = loop {
        if !channel.has_room() {
            tokio::select! {
                biased;
                () = closed.fired() => break End::Closed,
                room = tokio::time::timeout(idle, channel.room()) => if room.is_err() {
                    stream.abandon(unread(idle));
                },
            }
        }
        let more = tokio::select! {
            biased;
            more = stream.next_into(&mut tokens) => more,
            () = closed.fired() => break End::Closed,
        };
        match more {
            Ok(true) if channel.put(&mut tokens, stream.worker_id()) => {}
            Ok(true) => break End::Closed,
            Ok(false) => break complete(&stream),
            Err(error) => break End::Failed(error),
        }
    };
    drop(stream);
    channel.end(end);
}

/// The end of a stream that has no more tokens.
fn complete(stream: &TokenStream) -> End {
    stream.response().map_or(End::Closed, |answer| End::Complete(Arc::new(answer.clone())))
}

/// The end of a stream that nobody reads.
fn unread(idle: Duration) -> ControllerError {
    let message = format!("nothing was read of the stream for {} ms while {CAPACITY} events waited", idle.as_millis());
    ControllerError::new(ControllerErrorCode::StreamInterrupted, message).with("limit", "reader")
}

// === impl Channel ===

impl Channel {
    async fn room(&self) {
        loop {
            let taken = self.taken.notified();
            tokio::pin!(taken);
            taken.as_mut().enable();
            if self.has_room() {
                return;
            }
            taken.await;
        }
    }

    fn has_room(&self) -> bool {
        self.queue.lock().tokens.len() < CAPACITY
    }

    /// False: nobody reads any more.
    fn put(&self, batch: &mut Vec<Token>, worker: &WorkerId) -> bool {
        let mut queue = self.queue.lock();
        if queue.end.is_some() {
            return false;
        }
        queue.tokens.extend(batch.drain(..));
        if queue.worker_id != *worker {
            queue.worker_id = worker.clone();
        }
        self.tell(queue);
        true
    }

    fn end(&self, end: End) {
        self.queue.lock().end.get_or_insert(end);
        self.ended.fire();
        self.tell(self.queue.lock());
    }

    /// Wakes whoever waits.
    fn tell(&self, mut queue: MutexGuard<'_, Queue>) {
        let (waiter, blocks) = (queue.waiter.take(), std::mem::take(&mut queue.blocks));
        drop(queue);
        if let Some(waiter) = waiter {
            waiter.wake();
        }
        if blocks {
            self.readable.notify_waiters();
        }
    }

    /// Nobody reads any more. What was there is gone, unless the stream was complete.
    fn close(&self) {
        self.closed.fire();
        let mut queue = self.queue.lock();
        queue.tokens.clear();
        queue.end.get_or_insert(End::Closed);
        self.tell(queue);
    }

    fn take(&self, batch: bool) -> Taken {
        let mut queue = self.queue.lock();
        let was_full = queue.tokens.len() >= CAPACITY;
        let taken = if batch && !queue.tokens.is_empty() {
            Taken::Tokens(queue.tokens.drain(..).collect())
        } else if let Some(token) = queue.tokens.pop_front() {
            Taken::Token(token)
        } else {
            queue.end.clone().map_or(Taken::Nothing, Taken::End)
        };
        drop(queue);
        if was_full {
            self.taken.notify_one();
        }
        taken
    }

    /// Whether there is something to wait for; whoever puts something in knows of it then.
    fn block(&self) -> bool {
        let mut queue = self.queue.lock();
        queue.blocks = queue.tokens.is_empty() && queue.end.is_none();
        queue.blocks
    }

    /// Waits until something can be taken, and takes it.
    async fn next(&self) -> Taken {
        loop {
            let readable = self.readable.notified();
            tokio::pin!(readable);
            readable.as_mut().enable();
            match self.take(false) {
                Taken::Nothing if self.block() => readable.await,
                Taken::Nothing => {}
                taken => return taken,
            }
        }
    }
}

#[pymethods]
impl PyTokenStream {
    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__(&self) -> PyResult<Next> {
        Next::new(self.0.channel()?, false)
    }

    /// All events that are ready at a time, as lists: fewer steps where tokens come faster than they are read.
    fn batches(slf: Bound<'_, Self>) -> TokenBatches {
        TokenBatches(slf.unbind())
    }

    /// Ends it. The work on the worker is cancelled where it still runs; all that the request held is back when this
    /// returns. What was not read is lost.
    fn aclose<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let channel = Arc::clone(self.0.channel()?);
        channel.close();
        if channel.ended.has_fired() {
            return bridge::ready(py, py.None());
        }
        bridge::awaitable_with(py, async move { channel.ended.fired().await }, |py, ()| Ok(py.None()))
    }

    fn __aenter__<'py>(slf: Bound<'py, Self>, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        bridge::ready(py, slf.into_any().unbind())
    }

    #[pyo3(signature = (kind, error, traceback, /))]
    fn __aexit__<'py>(
        &self,
        py: Python<'py>,
        kind: &Bound<'py, PyAny>,
        error: &Bound<'py, PyAny>,
        traceback: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let _ = (kind, error, traceback);
        self.aclose(py)
    }

    /// The whole answer, once it is complete; `None` before, and where it failed.
    #[getter]
    fn response(&self) -> PyResult<Option<PyInferenceResponse>> {
        self.0.response()
    }

    /// The request.
    #[getter]
    fn request_id(&self) -> PyResult<&str> {
        Ok(&self.0.channel()?.request_id)
    }

    /// The model that answers: the one asked for, or one that stands in for it.
    #[getter]
    fn model_id(&self) -> PyResult<&str> {
        Ok(&self.0.channel()?.model_id)
    }

    /// The worker that answers now.
    #[getter]
    fn worker_id(&self) -> PyResult<String> {
        self.0.worker_id()
    }

    fn __repr__(&self) -> PyResult<String> {
        self.0.repr("TokenStream")
    }
}

#[pymethods]
impl TokenBatches {
    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__(&self) -> PyResult<Next> {
        Next::new(self.0.get().0.channel()?, true)
    }
}

#[pymethods]
impl BlockingTokenStream {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<PyTokenEvent>> {
        let channel = self.0.channel()?;
        let taken = match channel.take(false) {
            Taken::Nothing => {
                let channel = Arc::clone(channel);
                bridge::block_on_any(py, async move { channel.next().await })?
            }
            taken => taken,
        };
        match taken {
            Taken::Token(token) => Ok(Some(PyTokenEvent(token))),
            Taken::End(End::Failed(_)) if runtime::existing().is_some_and(|process| process.leaves_behind()) => {
                bridge::stand_still(py)
            }
            Taken::End(End::Failed(error)) => Err(errors::raise(py, &error)),
            Taken::End(_) | Taken::Tokens(_) | Taken::Nothing => Ok(None),
        }
    }

    /// Ends it, as `TokenStream.aclose` does.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let channel = self.0.channel()?;
        channel.close();
        let ended = channel.ended.clone();
        bridge::block_on_any(py, async move { ended.fired().await })
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (kind, error, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        error: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (kind, error, traceback);
        self.close(py)
    }

    /// The whole answer, once it is complete; `None` before, and where it failed.
    #[getter]
    fn response(&self) -> PyResult<Option<PyInferenceResponse>> {
        self.0.response()
    }

    /// The request.
    #[getter]
    fn request_id(&self) -> PyResult<&str> {
        Ok(&self.0.channel()?.request_id)
    }

    /// The model that answers: the one asked for, or one that stands in for it.
    #[getter]
    fn model_id(&self) -> PyResult<&str> {
        Ok(&self.0.channel()?.model_id)
    }

    /// The worker that answers now.
    #[getter]
    fn worker_id(&self) -> PyResult<String> {
        self.0.worker_id()
    }

    fn __repr__(&self) -> PyResult<String> {
        self.0.repr("BlockingTokenStream")
    }
}

// === impl PyTokenStream ===

impl PyTokenStream {
    pub(super) fn new(reader: Reader) -> Self {
        Self(reader)
    }
}

// === impl BlockingTokenStream ===

impl BlockingTokenStream {
    pub(super) fn new(reader: Reader) -> Self {
        Self(reader)
    }
}

// === impl Next ===

#[pymethods]
impl Next {
    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// What is there is taken when the task goes on, not when it is woken: one that is cancelled in between loses nothing.
    fn __next__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let channel = self.channel.get()?;
        loop {
            match channel.take(self.batch) {
                Taken::Token(token) => return Err(PyStopIteration::new_err((PyTokenEvent(token),))),
                Taken::Tokens(tokens) => return Err(PyStopIteration::new_err((events(py, tokens)?,))),
                Taken::End(End::Failed(error)) => return Err(errors::raise(py, &error)),
                Taken::End(_) => return Err(PyStopAsyncIteration::new_err(())),
                Taken::Nothing => {}
            }
            let other = channel.queue.lock().waiter.clone();
            if let Some(other) = other
                && !other.is_over(py)?
            {
                return Err(PyRuntimeError::new_err("another task waits for this stream already"));
            }
            let waiter = Waiter::new(py, &*runtime::current(py)?)?;
            {
                let mut queue = channel.queue.lock();
                if !queue.tokens.is_empty() || queue.end.is_some() {
                    continue;
                }
                queue.waiter = Some(Arc::clone(&waiter));
            }
            *self.waiter.lock() = Some(Arc::clone(&waiter));
            if let Some(future) = waiter.blocking_future(py)? {
                return Ok(future);
            }
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.waiter.try_lock().as_deref() {
            Some(Some(waiter)) => waiter.traverse(&visit),
            _ => Ok(()),
        }
    }

    fn __clear__(&self) {
        if let Some(waiter) = self.waiter.lock().take() {
            waiter.forget();
        }
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        if let Some(waiter) = self.waiter.get_mut().take() {
            waiter.forget();
        }
    }
}

impl Next {
    fn new(channel: &Arc<Channel>, batch: bool) -> PyResult<Self> {
        Ok(Self { channel: OfProcess::new("stream", Arc::clone(channel)), batch, waiter: Mutex::new(None) })
    }
}

fn events(py: Python<'_>, tokens: Vec<Token>) -> PyResult<Py<PyList>> {
    let list = PyList::empty(py);
    tokens.into_iter().try_for_each(|token| list.append(PyTokenEvent(token)))?;
    Ok(list.unbind())
}
