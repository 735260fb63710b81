"""`WorkerNode`: the worker's runtime as Python programs hold it, and workers that live in a controller's own process.

Everything that travels is the core's business and runs on its threads. This module finds a place for the code that
generates: one thread for an engine, an event loop for a handler. It sees to it that neither outlives its worker, nor
the interpreter.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from mlx_serving_router import _handlers, _logs, _native
from mlx_serving_router._config import as_config
from mlx_serving_router._errors import ControllerError, ControllerErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from types import FrameType, TracebackType
    from typing import Self

    from mlx_serving_router._controller import ControllerNode
    from mlx_serving_router._handlers import Handler
    from mlx_serving_router._native import ClusterConfig
    from mlx_serving_router.engine import Engine

__all__ = ["WorkerNode", "WorkerState", "add_local_worker"]

WorkerState: TypeAlias = Literal["idle", "starting", "ready", "draining", "stopped"]
"""Where a worker is in its life."""

_logger = logging.getLogger("mlx_serving_router.worker")

#: Seconds that an engine's thread, or a handler, has to end once its queue is closed.
_ENGINE_PATIENCE: Final = 10.0


class WorkerNode:
    """A worker: it registers, queues, streams, cancels and drains for the code that generates.

    The code is an engine, which has a thread of its own, or an async generator function, called for each request::

        async def echo(request: InferenceRequest) -> AsyncIterator[str]:
            for word in (request.prompt or "").split():
                yield word + " "

        async with WorkerNode(echo, config="cluster.yaml", models=["echo"]) as worker:
            await worker.wait()

    A handler yields texts or `TokenEvent`s, and as its last piece a `Finish` where the answer ends otherwise than with
    `"stop"`, or its usage is known. It runs in the event loop in which the worker was started, or in one of the
    package's own when it was started by `run()`; each request is a task there, cancelled when nobody waits for it any
    more. What it raises ends its request alone: a `ControllerError` with its code (and `retry_after_ms` of its
    context), anything else as WORKER_UNAVAILABLE.

    A started worker runs until it is stopped, also when nobody refers to it. The exit of the interpreter stops it.

    Args:
        engine: An object with `models` and `run` (`mlx_serving_router.engine`), or an async generator function.
        config: A `ClusterConfig`, a dictionary of its shape, or the path of a file. Left out: the defaults with what
            the environment (`MLX_ROUTER__…`) overrides. The worker starts no NATS server: with
            `nats.mode: embedded` it connects to the one on `nats.embedded.port` of this machine.
        worker_id: Its name: 1 to 64 letters, digits, `-` and `_`; no two workers share one. Left out: made of the
            host's name.
        models: What it serves. Left out: the engine's `models`.
        max_concurrent: Requests that are worked on at a time; 0: no limit. Left out: the engine's `max_concurrent`
            where it says one, else 1; 0 for a handler.
        max_queue: Requests that may wait beside them; further ones are refused as WORKER_OVERLOADED.

    Raises:
        ConfigError: The configuration cannot be used.
        ControllerError: REQUEST_VALIDATION_FAILED (a `ValueError`): a name is unsuitable, or there is no model.
        TypeError: `engine` is neither.
    """

    def __init__(
        self,
        engine: Engine | Handler,
        *,
        config: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        worker_id: str | None = None,
        models: Sequence[str] | None = None,
        max_concurrent: int | None = None,
        max_queue: int = 64,
    ) -> None:
        self._runner = _Runner(
            engine,
            as_config(config),
            worker_id=worker_id,
            models=models,
            max_concurrent=max_concurrent,
            max_queue=max_queue,
        )
        _logs.start()

    def __repr__(self) -> str:
        return f"<WorkerNode {self.worker_id!r} {self.state}>"

    @property
    def worker_id(self) -> str:
        """Its name."""
        return self._native.worker_id

    @property
    def incarnation(self) -> str:
        """This life of it; new at every start."""
        return self._native.incarnation

    @property
    def state(self) -> WorkerState:
        """Where it is in its life."""
        return self._native.state

    @property
    def models(self) -> list[str]:
        """What it serves."""
        return self._native.models

    async def start(self) -> None:
        """Connect to NATS, wait until the engine is ready, register. After a failure it is `stopped`.

        Raises:
            ControllerError: NATS_ERROR: no NATS server, or none that can be used. CONTROLLER_NOT_READY: it was started
                before.
            Exception: What the engine raised before it was ready.
        """
        self._runner.begin(blocking=False)
        try:
            await self._native.start()
        except BaseException as error:
            await self.stop(0.0)
            self._runner.raise_instead_of(error)
            raise

    async def stop(self, drain_timeout: float = 60.0) -> None:
        """Stop. May be called in any state, any number of times; returns when it is stopped.

        Args:
            drain_timeout: Seconds in which running and waiting requests may finish; what is left then ends with
                WORKER_UNAVAILABLE.
        """
        try:
            await self._native.stop(drain_timeout)
        finally:
            self._native.begin_stop(0.0)
            await self._runner.ended()

    async def wait(self) -> None:
        """Return when it has stopped.

        Raises:
            ControllerError: Why it stopped by itself: WORKER_UNAVAILABLE, its engine ended (`__cause__` is what that
                raised); WORKER_OFFLINE, another worker has taken its name.
        """
        try:
            await self._native.wait()
        except ControllerError as error:
            raise error from self._native.engine_error()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Ctrl-C, cancellation and exit are not to wait for the requests of others.
        await self.stop(60.0 if error is None or isinstance(error, Exception) else 0.0)

    def run(self, *, drain_timeout: float = 60.0) -> None:
        """Start, and block until it has stopped: the whole life of a worker process.

        In the main thread SIGTERM and SIGINT (Ctrl-C) stop it: the first lets running requests finish, the second
        ends them, the third ends the process.

        Args:
            drain_timeout: Seconds in which they may finish.

        Raises:
            ControllerError: As `start` and `wait`.
            Exception: What the engine raised before it was ready.
        """
        with _stopping_signals(self._native, drain_timeout) as stopping:
            self._runner.begin(blocking=True)
            try:
                self._native.start_blocking()
                self._native.wait_blocking()
            except ControllerError as error:
                self._runner.raise_instead_of(error)
                if not (stopping and error.code is ControllerErrorCode.CONTROLLER_NOT_READY):
                    raise error from self._native.engine_error()
            finally:
                self._native.stop_blocking(0.0)
                self._runner.ended_blocking()

    @property
    def _native(self) -> _native.Worker:
        return self._runner.native


def add_local_worker(
    controller: ControllerNode,
    engine: Engine | Handler,
    *,
    worker_id: str | None = None,
    models: Sequence[str] | None = None,
) -> str:
    """Add a worker of this process to a controller; `ControllerNode.add_local_worker` says what that means.

    A handler runs in the event loop in which the controller is started, or in one of the package's own where it is
    started in the blocking way. An engine has its own thread, and is waited for until it is ready.

    Returns:
        Its name.
    """
    runner = _Runner(
        engine, controller.config, worker_id=worker_id, models=models, max_concurrent=None, max_queue=64
    )
    native = runner.native
    try:
        if not runner.is_handler:
            runner.begin(blocking=True)
            native.engine_ready_blocking()
        controller._join_local(runner)  # noqa: SLF001 the other half of this
    except BaseException as error:
        native.begin_stop(0.0)
        runner.raise_instead_of(error)
        raise
    return native.worker_id


# === where the code that generates runs ===


class _Runner:
    """A native worker together with the thread or the task that answers its jobs."""

    def __init__(
        self,
        engine: Engine | Handler,
        config: ClusterConfig,
        *,
        worker_id: str | None,
        models: Sequence[str] | None,
        max_concurrent: int | None,
        max_queue: int,
    ) -> None:
        self._engine: Any = engine
        self.is_handler = not hasattr(engine, "run")
        if self.is_handler and not _handlers.gives_pieces(engine):
            raise TypeError(
                "engine is neither an object with models and run(jobs) nor an async generator function "
                f"(async def with yield), but {type(engine).__name__}"
            )
        if models is None and self.is_handler:
            raise TypeError("models is missing: a handler does not say what it serves")
        if isinstance(models, str):
            raise TypeError("models is a str; a list of names is right")
        if max_concurrent is None:
            max_concurrent = 0 if self.is_handler else getattr(engine, "max_concurrent", 1)
        self.native = _native.Worker(
            config,
            worker_id=worker_id,
            models=list(getattr(engine, "models", ()) if models is None else models),
            max_concurrent=max_concurrent,
            max_queue=max_queue,
            features=list(getattr(engine, "features", ())),
            model_paths=dict(getattr(engine, "model_paths", {})),
            total_model_size=getattr(engine, "total_model_size", 0),
            last_scanned=getattr(engine, "last_scanned", None),
        )
        self._begun = False
        self._task: asyncio.Task[None] | None = None
        self._future: Future[None] | None = None

    def begin(self, *, blocking: bool) -> None:
        """Start the engine's thread, or the handler's task: in the running event loop, or in the package's own.

        Args:
            blocking: Whoever waits for answers may hold up the running loop: it is not used.

        Raises:
            ControllerError: CONTROLLER_NOT_READY: it was started or stopped before.
        """
        if self._begun or self.native.state == "stopped":
            raise ControllerError(
                ControllerErrorCode.CONTROLLER_NOT_READY,
                f"worker {self.native.worker_id} is {self.native.state}: a worker starts once; make a new one",
            )
        self._begun = True
        _keep(self)
        if not self.is_handler:
            self.native.run_engine(self._engine)
            return
        jobs = self.native.jobs()
        jobs.report("ready", loaded_models=self.native.models)
        loop = None if blocking else _running_loop()
        if loop is not None:
            self._task = loop.create_task(self._serve(jobs), name=f"worker {self.native.worker_id}")
            self._task.add_done_callback(lambda _: _forget(self))
        else:
            self._future = asyncio.run_coroutine_threadsafe(self._serve(jobs), _own_loop())
            self._future.add_done_callback(lambda _: _forget(self))

    def raise_instead_of(self, error: BaseException) -> None:
        """Raise the engine's own exception, where a start failed by it.

        Raises:
            BaseException: What the engine raised.
        """
        raised = self.native.engine_error()
        by_engine = isinstance(error, ControllerError) and error.code is ControllerErrorCode.MODEL_LOAD_FAILED
        if raised is not None and by_engine:
            raise raised

    async def ended(self) -> None:
        """Wait until the thread or task is gone, for a while."""
        if not self.is_handler:
            self._note(gone=await self.native.engine_joined(_ENGINE_PATIENCE))
        elif self._task is not None and self._task is not asyncio.current_task():
            # In the loop of another thread it ends by itself.
            if self._task.get_loop() is asyncio.get_running_loop():
                await asyncio.wait({self._task}, timeout=_ENGINE_PATIENCE)
        elif self._future is not None:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._future)), _ENGINE_PATIENCE)

    def ended_blocking(self) -> None:
        """As `ended`, blocking."""
        if not self.is_handler:
            self._note(gone=self.native.engine_joined_blocking(_ENGINE_PATIENCE))
        elif self._future is not None:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                self._future.result(_ENGINE_PATIENCE)

    def _note(self, *, gone: bool) -> None:
        if gone:
            _forget(self)
        else:
            _logger.warning(
                "the engine of worker %s has not returned %.0f s after its queue was closed",
                self.native.worker_id,
                _ENGINE_PATIENCE,
            )

    async def _serve(self, jobs: _native.JobQueue) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            while (job := await jobs.next()) is not None:
                task = asyncio.create_task(_handlers.answer(job, self._engine))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            # The queue is closed, or the loop ends: then there is nobody left to answer.
            self.native.begin_stop(0.0)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextlib.contextmanager
def _stopping_signals(native: _native.Worker, drain_timeout: float) -> Iterator[list[int]]:
    """SIGTERM and SIGINT stop the worker within this block. Gives the list of those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            native.begin_stop(drain_timeout)
        else:
            native.begin_stop(0.0)
            restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        restore()


# === the package's own event loop, and the exit of the interpreter ===

#: What runs in this process: kept alive here, and stopped at the exit of the interpreter.
_running: set[_Runner] = set()
_own: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
_process: int | None = None
_lock = threading.Lock()


def _keep(runner: _Runner) -> None:
    global _process, _own  # noqa: PLW0603 there is one of each for each process
    with _lock:
        if _process != os.getpid():
            # Registered with the first worker, and so called before the core's own end. A forked child begins anew.
            if _process is None:
                atexit.register(_at_exit)
            _process = os.getpid()
            _own = None
            _running.clear()
        _running.add(runner)


def _forget(runner: _Runner) -> None:
    with _lock:
        _running.discard(runner)


def _own_loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own, for handlers of programs that have none. One for each process."""
    global _own  # noqa: PLW0603 there is one of it
    with _lock:
        if _own is None or not _own[1].is_alive():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(
                target=_run_loop, args=(loop,), name="mlx_serving_router-handlers", daemon=True
            )
            thread.start()
            _own = (loop, thread)
        return _own[0]


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _at_exit() -> None:
    if _process != os.getpid():
        return
    with _lock:
        left = list(_running)
        own = _own
    # What is cut off now is cut off by the exit, and nobody's failure: nothing is to be read of it.
    _native.exits()
    _logs.stop()
    for runner in left:
        runner.native.begin_stop(0.0)
    for runner in left:
        runner.ended_blocking()
    if own is not None:
        loop, thread = own
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join(_ENGINE_PATIENCE)
