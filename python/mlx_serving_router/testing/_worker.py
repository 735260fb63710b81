"""`ScriptedWorker`: a worker that does what a script says, and remembers what it was asked.

It runs on the core's own threads: nothing of it waits for the event loop, and no Python runs when a request reaches it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Literal

from mlx_serving_router import _native
from mlx_serving_router._config import as_config
from mlx_serving_router._native import Script
from mlx_serving_router.testing._scripts import checked

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from mlx_serving_router._controller import ControllerNode
    from mlx_serving_router._native import ClusterConfig, ReceivedCancel, ReceivedRequest

__all__ = ["PATIENCE", "ScriptedWorker"]

#: Seconds within which what was begun has to be known everywhere.
PATIENCE: Final = 10.0
_PAUSE: Final = 0.001


class ScriptedWorker:
    """A worker that answers, stalls, fails, babbles and dies as it is told.

    A `TestCluster` has some; by itself it joins a fleet of yours, over NATS or in a controller's own process::

        with ScriptedWorker(stall(), config="cluster.yaml", models=["llama"]) as worker: ...
        with ScriptedWorker(stall(), controller=controller, models=["llama"]) as worker: ...

    What it is told takes effect before the call returns, within moments, in coroutines as elsewhere; only what waits
    for others is there twice.

    Args:
        script: What it does with requests; `answer()` where it is left out.
        controller: The controller of this process that it serves. Left out: it is reached over NATS.
        config: Where NATS is, as `WorkerNode` takes it. Counts for `discovery.heartbeatIntervalMs` too.
        worker_id: Its name: 1 to 64 letters, digits, `-` and `_`. One is made where it is left out.
        models: What it says that it serves. It answers whatever it is asked for.
        max_concurrent: The capacity that it tells; further requests are refused as WORKER_OVERLOADED. 0: none is told.
        features: What it says that it can do: `resume`, `cancel`, `batch`.
        loading_ms: How long its models take to load after the start. It is in the fleet meanwhile, and requests wait.

    Raises:
        ConfigError: The configuration cannot be used.
        ControllerError: REQUEST_VALIDATION_FAILED (a `ValueError`): a name is unsuitable, or there is no model.
        TypeError: The script is none.
        ValueError: A number is out of range; or both a controller and a configuration are given.
    """

    # A name that is mistyped is an error: `worker.scirpt = stall()` would change nothing.
    __slots__ = (
        "__weakref__",
        "_controller",
        "_heartbeats",
        "_known_to",
        "_native",
        "_obeys_cancels",
        "_script",
    )

    def __init__(
        self,
        script: Script | None = None,
        *,
        controller: ControllerNode | None = None,
        config: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        worker_id: str | None = None,
        models: Sequence[str] = ("tiny",),
        max_concurrent: int = 0,
        features: Sequence[Literal["resume", "cancel", "batch"]] = ("cancel",),
        loading_ms: int = 0,
    ) -> None:
        if controller is not None and config is not None:
            raise ValueError(
                "give a controller or a config, not both: a worker of this process needs no NATS"
            )
        if isinstance(models, str):
            raise TypeError("models is a str; a list of names is right")
        self._script = Script.answer() if script is None else checked("script", script)
        self._heartbeats = True
        self._obeys_cancels = True
        self._controller = controller
        #: Who has to know it before a start returns.
        self._known_to = controller
        self._native = _native.ScriptedWorker(
            as_config(config) if controller is None else controller.config,
            self._script,
            models=list(models),
            worker_id=worker_id,
            max_concurrent=max_concurrent,
            features=list(features),
            loading_ms=loading_ms,
        )

    def __repr__(self) -> str:
        requests, cancels, in_flight = self._native.counts()
        return (
            f"<ScriptedWorker {self.worker_id!r} {self.state} script={self._script} requests={requests}"
            f" cancels={cancels} in_flight={in_flight}>"
        )

    # === what it is ===

    @property
    def worker_id(self) -> str:
        """Its name."""
        return self._native.worker_id

    @property
    def incarnation(self) -> str:
        """This life of it; new at every start."""
        return self._native.incarnation

    @property
    def models(self) -> list[str]:
        """What it says that it serves."""
        return self._native.models

    @property
    def state(self) -> Literal["idle", "running", "frozen", "draining", "dead", "stopped"]:
        """Where it is in its life."""
        return self._native.state

    # === what it does ===

    @property
    def script(self) -> Script:
        """What it does with requests. Set, it holds from the next request on, and counts from its beginning."""
        return self._script

    @script.setter
    def script(self, script: Script) -> None:
        self._native.now_does(checked("script", script))
        self._script = script

    @property
    def heartbeats(self) -> bool:
        """Whether it gives signs of life; without them it is `offline` after `controller.workerOfflineTimeoutMs`.

        One of the controller's own process needs none.
        """
        return self._heartbeats

    @heartbeats.setter
    def heartbeats(self, beats: bool) -> None:
        self._native.set_heartbeats(beats)
        self._heartbeats = beats

    @property
    def obeys_cancels(self) -> bool:
        """Whether a cancellation ends what it does. Either way it is remembered."""
        return self._obeys_cancels

    @obeys_cancels.setter
    def obeys_cancels(self, obeys: bool) -> None:
        self._native.set_obeys_cancels(obeys)
        self._obeys_cancels = obeys

    # === life ===

    def start(self) -> None:
        """Join the fleet.

        Raises:
            ControllerError: NATS_ERROR: no NATS server. CONTROLLER_NOT_READY: it runs already, or its controller has
                stopped. REQUEST_VALIDATION_FAILED: its controller has a worker of this name.
        """
        if self._controller is None:
            self._native.start()
        else:
            self._native.start_local(self._controller._native)  # noqa: SLF001 the other half of this
        self._until_known()

    def stop(self) -> None:
        """Say goodbye and leave; what it works on ends in WORKER_UNAVAILABLE. Does nothing where it is over."""
        self._native.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def die(self) -> None:
        """Be gone as after `kill -9`: no goodbye and no answer. Nobody listens any more when this returns.

        Over NATS controllers notice it by its silence, or with the next request; one of its own process at once.
        """
        self._native.die()

    def restart(self, *, loading_ms: int = 0) -> None:
        """Die, where it has not, and come back under the same name as another incarnation. The script goes on.

        Args:
            loading_ms: How long its models take to load.

        Raises:
            ControllerError: As `start`.
        """
        self._native.die()
        self._native.set_loading(loading_ms)
        self.start()

    def freeze(self) -> None:
        """Stand still as after SIGSTOP: subscribed, but what reaches it waits, and nothing leaves it."""
        self._native.freeze()

    def thaw(self) -> None:
        """Go on as after SIGCONT."""
        self._native.thaw()

    def drain(self) -> None:
        """Deregister: finish what it has, refuse anything new."""
        self._native.drain()

    def stop_listening(self) -> None:
        """Stay in the fleet with nobody listening for requests: they fail at once, as if its process had just died."""
        self._native.listen(listens=False)

    def listen(self) -> None:
        """Listen for requests again."""
        self._native.listen(listens=True)

    # === what it was asked ===

    @property
    def requests(self) -> list[ReceivedRequest]:
        """What it was asked, oldest first; of more than a thousand the last thousand."""
        return self._native.requests()

    @property
    def request_count(self) -> int:
        """How many requests reached it so far."""
        return self._native.counts()[0]

    @property
    def cancels(self) -> list[ReceivedCancel]:
        """What it was told to stop, oldest first; of more than a thousand the last thousand."""
        return self._native.cancels()

    @property
    def cancel_count(self) -> int:
        """How many cancellations reached it so far."""
        return self._native.counts()[1]

    @property
    def in_flight(self) -> int:
        """How many requests it works on."""
        return self._native.counts()[2]

    async def wait_for_requests(self, n: int, *, timeout: float = 5.0) -> list[ReceivedRequest]:  # noqa: ASYNC109
        """Return when so many requests have reached it so far; they are what it returns.

        Args:
            n: How many.
            timeout: Seconds to wait at most.

        Raises:
            TimeoutError: The time has passed.
        """
        self._check(f"{n} requests", timeout, met=await self._native.wait_until(timeout, requests=n))
        return self.requests

    async def wait_for_cancels(self, n: int, *, timeout: float = 5.0) -> list[ReceivedCancel]:  # noqa: ASYNC109
        """Return when so many cancellations have reached it so far; they are what it returns.

        Args:
            n: How many.
            timeout: Seconds to wait at most.

        Raises:
            TimeoutError: The time has passed.
        """
        self._check(f"{n} cancels", timeout, met=await self._native.wait_until(timeout, cancels=n))
        return self.cancels

    async def wait_until_idle(self, *, timeout: float = 5.0) -> None:  # noqa: ASYNC109
        """Return when it works on nothing.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            TimeoutError: The time has passed.
        """
        self._check("the end of its work", timeout, met=await self._native.wait_until(timeout, idle=True))

    def wait_for_requests_blocking(self, n: int, *, timeout: float = 5.0) -> list[ReceivedRequest]:
        """As `wait_for_requests`, for tests without an event loop."""
        met = self._native.wait_until_blocking(timeout, requests=n)
        self._check(f"{n} requests", timeout, met=met)
        return self.requests

    def wait_for_cancels_blocking(self, n: int, *, timeout: float = 5.0) -> list[ReceivedCancel]:
        """As `wait_for_cancels`, for tests without an event loop."""
        met = self._native.wait_until_blocking(timeout, cancels=n)
        self._check(f"{n} cancels", timeout, met=met)
        return self.cancels

    def wait_until_idle_blocking(self, *, timeout: float = 5.0) -> None:
        """As `wait_until_idle`, for tests without an event loop."""
        met = self._native.wait_until_blocking(timeout, idle=True)
        self._check("the end of its work", timeout, met=met)

    # === inside ===

    def _check(self, what: str, timeout: float, *, met: bool) -> None:
        if not met:
            raise TimeoutError(f"waited {timeout} s in vain for {what}: {self!r}")

    def _until_known(self) -> None:
        """Return when its controller knows this life of it; nothing tells of that but a look."""
        if self._known_to is None:
            return
        deadline = time.monotonic() + PATIENCE
        while True:
            info = self._known_to.worker(self.worker_id)
            if info is not None and info.incarnation == self.incarnation:
                has_beaten = info.loaded_models or info.loading_models
                if has_beaten or not self._heartbeats:
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the controller does not know of {self!r} after {PATIENCE:.0f} s")
            time.sleep(_PAUSE)
