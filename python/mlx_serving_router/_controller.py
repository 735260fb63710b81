"""`ControllerNode`: the controller as Python programs hold it.

It adds to the core's controller what is Python's to do: the embedded NATS server, both kinds of `with`, and the words
of the public interface. Who answers a request, and what happens when that fails, is the core's business.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mlx_serving_router import _exposition, _logs, _native
from mlx_serving_router._config import as_config
from mlx_serving_router._errors import ControllerError, ControllerErrorCode, ControllerState
from mlx_serving_router.nats_server import NatsServer, NatsServerError

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from mlx_serving_router._native import (
        BlockingTokenStream,
        ClusterConfig,
        ClusterStatus,
        ControllerEvents,
        InferenceRequest,
        InferenceResponse,
        RequestMetadata,
        TokenEvent,
        TokenStream,
        WorkerInfo,
    )
    from mlx_serving_router._types import BreakerStats
    from mlx_serving_router._worker import _Runner

__all__ = ["ControllerNode"]


class ControllerNode:
    """A controller: it knows the workers, chooses who answers, and tries again elsewhere.

    In coroutines it is used with `async with`, in scripts and notebooks with `with`::

        async with ControllerNode("cluster.yaml") as controller:
            await controller.wait_for_workers(1, timeout=30)
            response = await controller.handle_buffered_request(request)

        with ControllerNode("cluster.yaml") as controller:
            controller.wait_for_workers_blocking(1, timeout=30)
            response = controller.generate(request)

    It starts once, and may be used from any thread and event loop of the process that made it. A forked child makes its
    own: there, every use of this one raises `RuntimeError`.

    Args:
        config: A `ClusterConfig`, a dictionary of its shape, or the path of a file. Left out: the defaults with what
            the environment (`MLX_ROUTER__…`) overrides.
        controller_id: Its name; one is made where it is left out.

    Raises:
        ConfigError: The configuration cannot be used.
        ControllerError: REQUEST_VALIDATION_FAILED (a `ValueError`): the name is unsuitable.
    """

    def __init__(
        self,
        config: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        controller_id: str | None = None,
    ) -> None:
        self._config = as_config(config)
        self._native = _native.Controller(self._config, controller_id)
        settings = self._config.to_dict()
        self._drain_timeout: float = settings["controller"]["drainTimeoutMs"] / 1000
        self._nats: NatsServer | None = None
        if settings["nats"]["mode"] == "embedded":
            self._nats = NatsServer(settings["nats"]["embedded"]["port"])
        self._started = False
        #: Whether it was started in the blocking way; `None` before.
        self._blocking: bool | None = None
        #: Local workers whose handlers wait for the start to say where they run.
        self._waiting: list[_Runner] = []
        _logs.start()

    def __repr__(self) -> str:
        return f"<ControllerNode {self.controller_id!r} {self.state}>"

    # === life ===

    @property
    def controller_id(self) -> str:
        """Its name."""
        return self._native.controller_id

    @property
    def config(self) -> ClusterConfig:
        """Its configuration."""
        return self._config

    @property
    def state(self) -> ControllerState:
        """Where it is in its life."""
        return self._native.state

    async def start(self) -> None:
        """Start; with `nats.mode: embedded`, the NATS server first. After a failure it is `stopped`.

        Raises:
            ControllerError: NATS_ERROR: no NATS server, or none that can be used. CONTROLLER_NOT_READY: it was started
                before.
        """
        self._begin(blocking=False)
        try:
            if self._nats is not None:
                await asyncio.to_thread(self._nats.start)
            await self._native.start(self._nats_url)
        except NatsServerError as error:
            await _to_the_end(self._clean_up())
            raise ControllerError(ControllerErrorCode.NATS_ERROR, str(error)) from error
        except BaseException:
            await _to_the_end(self._clean_up())
            raise

    async def stop(self, drain_timeout: float = 30.0) -> None:
        """Stop. May be called in any state, any number of times; returns when it is stopped.

        Args:
            drain_timeout: Seconds in which running requests may finish; what is left then ends with
                CONTROLLER_NOT_READY.
        """
        try:
            await self._native.stop(drain_timeout)
        finally:
            await _to_the_end(self._clean_up())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop(self._patience(error))

    def __enter__(self) -> Self:
        self._begin(blocking=True)
        try:
            if self._nats is not None:
                self._nats.start()
            self._native.start_blocking(self._nats_url)
        except NatsServerError as error:
            self._clean_up_blocking()
            raise ControllerError(ControllerErrorCode.NATS_ERROR, str(error)) from error
        except BaseException:
            self._clean_up_blocking()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._native.stop_blocking(self._patience(error))
        finally:
            self._clean_up_blocking()

    async def wait_for_workers(self, n: int, *, timeout: float | None) -> None:  # noqa: ASYNC109 the contract's name
        """Return when so many workers are online.

        Args:
            n: How many.
            timeout: Seconds to wait at most; `None`: without limit.

        Raises:
            TimeoutError: The time has passed.
            ValueError: `n` is negative.
            ControllerError: CONTROLLER_NOT_READY: it stopped meanwhile.
        """
        if not await self._native.wait_for_workers(n, timeout):
            raise self._too_few(n, timeout)

    def wait_for_workers_blocking(self, n: int, *, timeout: float | None) -> None:
        """As `wait_for_workers`, for scripts and notebooks."""
        if not self._native.wait_for_workers_blocking(n, timeout):
            raise self._too_few(n, timeout)

    # === requests ===

    async def handle_buffered_request(
        self,
        request: InferenceRequest,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 the contract's name
        worker_id: str | None = None,
        traceparent: str | None = None,
    ) -> InferenceResponse:
        """Answer in one piece. A task that is cancelled meanwhile cancels the work on the worker.

        Args:
            request: What is asked.
            timeout: Seconds that bound the whole call, retries included.
            worker_id: This worker and no other: no balancing, no retry elsewhere.
            traceparent: The caller's W3C trace context, which goes on to the worker.

        Raises:
            ControllerError: Every failure, the request's own faults included.
        """
        return await self._native.buffered(
            request, timeout=timeout, worker_id=worker_id, traceparent=traceparent
        )

    async def handle_streaming_request(
        self,
        request: InferenceRequest,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 the contract's name
        worker_id: str | None = None,
        traceparent: str | None = None,
    ) -> TokenStream:
        """Answer as it comes. Returns with the first token, or at the end of an answer without tokens.

        Leaving the stream's `async with` early, `aclose()` and dropping it cancel the work on the worker.

        Args:
            request: What is asked.
            timeout: Seconds that bound the whole call, the stream included.
            worker_id: This worker and no other: no balancing, no retry elsewhere.
            traceparent: The caller's W3C trace context, which goes on to the worker.

        Raises:
            ControllerError: Every failure before the first token, the request's own faults included. Later ones come
                from the stream.
        """
        return await self._native.streaming(
            request, timeout=timeout, worker_id=worker_id, traceparent=traceparent
        )

    def generate(
        self, request: InferenceRequest, *, timeout: float | None = None, worker_id: str | None = None
    ) -> InferenceResponse:
        """The blocking twin of `handle_buffered_request`. Other threads run meanwhile, and Ctrl-C works."""
        return self._native.buffered_blocking(request, timeout=timeout, worker_id=worker_id)

    def generate_stream(
        self, request: InferenceRequest, *, timeout: float | None = None, worker_id: str | None = None
    ) -> BlockingTokenStream:
        """The blocking twin of `handle_streaming_request`: an iterator of `TokenEvent`, to be used in a `with`."""
        return self._native.streaming_blocking(request, timeout=timeout, worker_id=worker_id)

    # === the fleet ===

    def workers(self) -> list[WorkerInfo]:
        """Every known worker, by id."""
        return self._native.workers()

    def worker(self, worker_id: str) -> WorkerInfo | None:
        """One worker; `None` where it is not known."""
        return self._native.worker(worker_id)

    def cluster_status(self) -> ClusterStatus:
        """The fleet and its requests in numbers."""
        return self._native.cluster_status()

    def add_local_worker(
        self,
        handler: Callable[[InferenceRequest], AsyncIterator[str | TokenEvent]],
        *,
        worker_id: str | None = None,
        models: Sequence[str],
    ) -> str:
        """Add a worker of this very process, which needs no NATS. It stays until the controller stops.

        Args:
            handler: An async generator function: it gets a request and yields the pieces of its answer. A
                `ControllerError` that it raises is its answer; anything else it raises is WORKER_UNAVAILABLE. It is
                closed where nobody waits any more.
            worker_id: Its name; one is made where it is left out.
            models: What it serves.

        Returns:
            Its name.

        Raises:
            ControllerError: REQUEST_VALIDATION_FAILED: a worker of this name is there already, or the fleet is full.
        """
        from mlx_serving_router._worker import add_local_worker

        return add_local_worker(self, handler, worker_id=worker_id, models=models)

    def drain_worker(self, worker_id: str) -> None:
        """Give a worker nothing new from this controller; what runs there may finish within 60 s.

        Raises:
            ValueError: No worker of this name is known.
        """
        if not self._native.drain_worker(worker_id):
            raise self._unknown(worker_id)

    def get_circuit_breaker_stats(self) -> dict[str, BreakerStats]:
        """What the circuit breaker of every known worker has seen; empty where breakers are disabled."""
        return self._native.breaker_stats()

    def reset_circuit_breaker(self, worker_id: str) -> None:
        """Close a worker's breaker and forget what it has seen.

        Raises:
            ValueError: No worker of this name is known, or breakers are disabled.
        """
        if not self._native.reset_breaker(worker_id):
            raise self._unknown(worker_id)

    def force_open_circuit_breaker(self, worker_id: str) -> None:
        """Keep a worker out until its breaker is reset.

        Raises:
            ValueError: No worker of this name is known, or breakers are disabled.
        """
        if not self._native.force_open_breaker(worker_id):
            raise self._unknown(worker_id)

    # === what is told ===

    def get_request_metrics(self, request_id: str) -> RequestMetadata | None:
        """What is known of a request; `None` where it is unknown, or forgotten."""
        return self._native.request_metrics(request_id)

    def get_all_request_metrics(self, *, limit: int | None = None) -> list[RequestMetadata]:
        """What is known of all requests: the ended ones in the order of their ends, then the active ones.

        Args:
            limit: The last so many of them; `None`: all.

        Raises:
            ValueError: The limit is negative.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"limit is {limit}; a number of at least 0 is right")
        return self._native.all_request_metrics(limit)

    def metrics_text(self, *, openmetrics: bool = False) -> str:
        """Numbers for Prometheus.

        Args:
            openmetrics: In the format OpenMetrics; else in the older text format (0.0.4) that everybody reads.
        """
        text = self._native.metrics_text()
        return text if openmetrics else _exposition.classic(text)

    def events(self) -> ControllerEvents:
        """What happens from now on: workers that come and go, breakers, failovers. Ends when the controller stops."""
        return self._native.events()

    # === inside ===

    def _begin(self, *, blocking: bool) -> None:
        if self._started or self.state is not ControllerState.IDLE:
            raise ControllerError(
                ControllerErrorCode.CONTROLLER_NOT_READY,
                f"a controller starts once, and this one was started before (it is {self.state}); make a new one",
            )
        self._started = True
        self._blocking = blocking
        for runner in self._waiting:
            runner.begin(blocking=blocking)
        self._waiting.clear()

    def _join_local(self, runner: _Runner) -> None:
        """Attach a local worker, and have its handler run where requests are waited for."""
        runner.native.start_local(self._native)
        if not runner.is_handler:
            return
        if self._blocking is None:
            self._waiting.append(runner)  # a loop that `generate` blocks could not run it meanwhile
            return
        runner.begin(blocking=self._blocking)

    @property
    def _nats_url(self) -> str | None:
        return None if self._nats is None else self._nats.url

    def _patience(self, error: BaseException | None) -> float:
        # Ctrl-C, cancellation and exit are not to wait for the requests of others.
        return self._drain_timeout if error is None or isinstance(error, Exception) else 0.0

    async def _clean_up(self) -> None:
        await self._native.stop(0.0)
        if self._nats is not None:
            # Waits for a start in another thread to end.
            await asyncio.to_thread(self._nats.stop)

    def _clean_up_blocking(self) -> None:
        self._native.stop_blocking(0.0)
        if self._nats is not None:
            self._nats.stop()

    def _too_few(self, n: int, timeout: float | None) -> TimeoutError:
        online = self.cluster_status().workers["online"]
        return TimeoutError(f"{online} of {n} workers are online after {timeout} s")

    def _unknown(self, worker_id: str) -> ValueError:
        known = [worker.worker_id for worker in self.workers()]
        if worker_id in known:
            return ValueError("circuit breakers are disabled (requestRouting.circuitBreaker.enabled)")
        return ValueError(f"no worker {worker_id!r} is known; known are {', '.join(known) or 'none'}")


async def _to_the_end(work: Awaitable[None]) -> None:
    """Await the work to its end, also where the task is cancelled meanwhile: then it is cancelled afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
