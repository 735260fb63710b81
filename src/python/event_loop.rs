//! Waking what waits in an asyncio event loop, from any thread, without taking the interpreter.
//!
//! Each loop has one queue of waiters and one file descriptor that it watches. A waiter that becomes ready joins the queue;
//! the first one makes the descriptor readable, and the loop's own thread then completes the futures of all. A loop without
//! `add_reader` gets one `call_soon_threadsafe` for as many instead. Futures that are done already (cancelled ones) are
//! left alone. Nothing here keeps a loop alive; what belongs to a closed one is let go of when the next one comes, at the
//! latest when the loop itself is freed.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::exceptions::PyNotImplementedError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCFunction, PyWeakrefMethods, PyWeakrefReference};
use pyo3::{PyTraverseError, PyVisit, intern};
use tokio::runtime::Handle;

use super::runtime::{self, Process};
use super::wake::Wake;

/// The event loops that somebody has waited in, by their address.
#[derive(Default)]
pub(super) struct EventLoops(Mutex<HashMap<usize, Known>>);

struct Known {
    event_loop: Py<PyWeakrefReference>,
    door: Arc<Door>,
}

/// The way into one event loop.
struct Door {
    ready: Mutex<Ready>,
    bell: Bell,
}

enum Bell {
    /// The loop watches it.
    Watched(Wake),
    /// The loop can watch nothing, and is called.
    Called { event_loop: Arc<Py<PyWeakrefReference>>, handle: Handle },
}

#[derive(Default)]
struct Ready {
    waiters: Vec<Arc<Waiter>>,
    /// The bell was rung, and nobody has come yet.
    rung: bool,
    /// The loop is no more.
    closed: bool,
}

/// Called by the event loop, in its thread: completes what is ready.
#[pyclass(frozen, module = "mlx_serving_router._native", name = "_Drain")]
struct Drain(Arc<Door>);

/// One await of one task: an asyncio future that any thread can complete.
pub(super) struct Waiter {
    door: Arc<Door>,
    future: Mutex<Option<Py<PyAny>>>,
}

// === impl Waiter ===

impl Waiter {
    /// A waiter in the running event loop.
    ///
    /// # Errors
    /// `RuntimeError`: no event loop runs in this thread.
    pub(super) fn new(py: Python<'_>, process: &Process) -> PyResult<Arc<Self>> {
        static RUNNING: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let event_loop = RUNNING.import(py, "asyncio", "get_running_loop")?.call0()?;
        let door = process.event_loops.door(&event_loop, process)?;
        let future = event_loop.call_method0(intern!(py, "create_future"))?.unbind();
        Ok(Arc::new(Self { door, future: Mutex::new(Some(future)) }))
    }

    /// Lets the task go on. From any thread, any number of times.
    pub(super) fn wake(self: &Arc<Self>) {
        self.door.push(Arc::clone(self));
    }

    /// What the task is to yield to its event loop; none where it was woken already.
    pub(super) fn blocking_future(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let future = self.future.lock().as_ref().map(|future| future.clone_ref(py));
        if let Some(future) = &future {
            future.setattr(py, intern!(py, "_asyncio_future_blocking"), true)?;
        }
        Ok(future)
    }

    /// Whether nobody waits here any more: woken, or cancelled.
    pub(super) fn is_over(&self, py: Python<'_>) -> PyResult<bool> {
        let future = self.future.lock().as_ref().map(|future| future.clone_ref(py));
        future.map_or(Ok(true), |future| is_done(future.bind(py)))
    }

    /// Nobody will wait here any more.
    pub(super) fn forget(&self) {
        let future = self.future.lock().take();
        drop(future);
    }

    /// For the garbage collector: the future refers to the task that waits. As long as somebody else holds the waiter, to
    /// wake it, nothing is shown: the future, its task and all that it refers to are in use then, though no Python object
    /// says so, and would be collected in the middle of the work. Unless the loop is closed, where nobody is woken.
    pub(super) fn traverse(self: &Arc<Self>, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        if Arc::strong_count(self) > 1 && !self.door.is_closed() {
            return Ok(());
        }
        match self.future.try_lock() {
            Some(future) => visit.call(&*future),
            None => Ok(()),
        }
    }

    fn complete(&self, py: Python<'_>) -> PyResult<()> {
        let future = self.future.lock().take();
        let Some(future) = future else { return Ok(()) };
        let future = future.bind(py);
        match future.call_method1(intern!(py, "set_result"), (py.None(),)) {
            // Cancelled meanwhile, and not worth a question beforehand.
            Err(_) if is_done(future)? => Ok(()),
            set => set.map(drop),
        }
    }
}

fn is_done(future: &Bound<'_, PyAny>) -> PyResult<bool> {
    future.call_method0(intern!(future.py(), "done"))?.is_truthy()
}

// === impl EventLoops ===

impl EventLoops {
    /// The way into this loop, made now where it is a new one.
    fn door(&self, event_loop: &Bound<'_, PyAny>, process: &Process) -> PyResult<Arc<Door>> {
        let py = event_loop.py();
        let address = event_loop.as_ptr() as usize;
        if let Some(known) = self.0.lock().get(&address)
            && known.event_loop.bind(py).upgrade().is_some_and(|alive| alive.is(event_loop))
        {
            return Ok(Arc::clone(&known.door));
        }
        self.forget_closed(py)?;
        let freed = PyCFunction::new_closure(py, None, None, move |arguments, _| {
            runtime::current(arguments.py()).map(|process| process.event_loops.forget_freed(arguments.py())).ok();
        })?;
        let weak = PyWeakrefReference::new_with(event_loop, freed)?.unbind();
        let door = Door::open(event_loop, &weak, process)?;
        self.0.lock().insert(address, Known { event_loop: weak, door: Arc::clone(&door) });
        Ok(door)
    }

    fn forget_freed(&self, py: Python<'_>) {
        self.forget(|known| known.event_loop.bind(py).upgrade().is_none());
    }

    fn forget_closed(&self, py: Python<'_>) -> PyResult<()> {
        self.forget_freed(py);
        // Asked without the lock: a loop's method may let other threads run.
        let known: Vec<Py<PyWeakrefReference>> = self.0.lock().values().map(|known| known.event_loop.clone_ref(py)).collect();
        for weak in known {
            if let Some(event_loop) = weak.bind(py).upgrade()
                && event_loop.call_method0(intern!(py, "is_closed"))?.is_truthy()?
            {
                self.forget(|known| known.event_loop.is(&weak));
            }
        }
        Ok(())
    }

    fn forget(&self, which: impl Fn(&Known) -> bool) {
        let gone: Vec<Known> = self.0.lock().extract_if(|_, known| which(known)).map(|(_, known)| known).collect();
        for known in gone {
            known.door.close();
        }
    }
}

// === impl Door ===

impl Door {
    fn open(event_loop: &Bound<'_, PyAny>, weak: &Py<PyWeakrefReference>, process: &Process) -> PyResult<Arc<Self>> {
        static CONTEXT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let py = event_loop.py();
        let wake = Wake::new()?;
        let fd = wake.fd();
        let door = Arc::new(Self { ready: Mutex::default(), bell: Bell::Watched(wake) });
        let add_reader = event_loop.getattr(intern!(py, "add_reader"))?;
        // In an empty context: the loop keeps the one of this call for as long as it lives.
        let context = CONTEXT.import(py, "contextvars", "Context")?.call0()?;
        match context.call_method1(intern!(py, "run"), (add_reader, fd, Drain(Arc::clone(&door)))) {
            Ok(_) => Ok(door),
            Err(error) if error.is_instance_of::<PyNotImplementedError>(py) => {
                let bell = Bell::Called { event_loop: Arc::new(weak.clone_ref(py)), handle: process.handle().clone() };
                Ok(Arc::new(Self { ready: Mutex::default(), bell }))
            }
            Err(error) => Err(error),
        }
    }

    fn push(self: &Arc<Self>, waiter: Arc<Waiter>) {
        {
            let mut ready = self.ready.lock();
            if ready.closed {
                return;
            }
            ready.waiters.push(waiter);
            if std::mem::replace(&mut ready.rung, true) {
                return;
            }
        }
        match &self.bell {
            Bell::Watched(wake) => wake.signal(),
            Bell::Called { event_loop, handle } => {
                let (door, event_loop) = (Arc::clone(self), Arc::clone(event_loop));
                // The interpreter may be busy for long: no thread of the runtime waits for it.
                handle.spawn_blocking(move || Python::try_attach(|py| door.call(event_loop.bind(py))));
            }
        }
    }

    /// Has the loop drain the queue. One that closed meanwhile refuses; nobody waits in it any more.
    fn call(self: &Arc<Self>, event_loop: &Bound<'_, PyWeakrefReference>) {
        let Some(event_loop) = event_loop.upgrade() else { return };
        let name = intern!(event_loop.py(), "call_soon_threadsafe");
        let _ = event_loop.call_method1(name, (Drain(Arc::clone(self)),));
    }

    fn drain(&self, py: Python<'_>) {
        if let Bell::Watched(wake) = &self.bell {
            wake.clear();
        }
        let waiters = {
            let mut ready = self.ready.lock();
            ready.rung = false;
            std::mem::take(&mut ready.waiters)
        };
        for waiter in waiters {
            if let Err(error) = waiter.complete(py) {
                error.write_unraisable(py, None);
            }
        }
    }

    /// Whether the loop is no more, as far as is known without waiting.
    fn is_closed(&self) -> bool {
        self.ready.try_lock().is_some_and(|ready| ready.closed)
    }

    fn close(&self) {
        let waiters = {
            let mut ready = self.ready.lock();
            ready.closed = true;
            std::mem::take(&mut ready.waiters)
        };
        drop(waiters);
    }
}

// === impl Drain ===

#[pymethods]
impl Drain {
    fn __call__(&self, py: Python<'_>) {
        self.0.drain(py);
    }
}
