"""All in one: `mlx-serving-router up`. A NATS server, worker processes, and the controller with its front-end.

With `mode: worker` in the configuration it is the workers alone; with `mode: controller` it is what `serve` is.
Workers are programs of their own, started with the command `worker` and watched. Whatever ends this process ends them,
and the embedded NATS server too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
from typing import TYPE_CHECKING, Final

from mlx_serving_router._command import CommandError, stop_signals
from mlx_serving_router._controller import ControllerNode
from mlx_serving_router._serve import AFTER_DRAIN, front_end, nats, stop
from mlx_serving_router._work import DRAIN_SECONDS
from mlx_serving_router.processes import ChildProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving_router._native import ClusterConfig
    from mlx_serving_router._serve import Address
    from mlx_serving_router.nats_server import NatsServer

#: Seconds that workers, idle by then, get to end after the controller has.
_WORKER_SECONDS: Final = 10.0

_logger = logging.getLogger(__name__)


async def up(
    config: ClusterConfig,
    address: Address,
    *,
    workers: int,
    worker_options: Sequence[str],
    announce: Callable[[NatsServer | None], None],
    tell_online: Callable[[int], None],
) -> None:
    """Runs everything until a signal comes, or no worker is left.

    Args:
        config: The configuration; with `nats.mode: embedded` the server is started here.
        address: Where the front-end listens.
        workers: How many worker processes.
        worker_options: What each gets on its command line beside its id and the embedded server's URL.
        announce: Called once the front-end serves, with the embedded NATS server where there is one.
        tell_online: Called with the number of workers that are online, each time that it grows.

    Raises:
        CommandError: No worker is left.
        ControllerError: The controller did not start.
        NatsServerError: The embedded NATS server did not start.
    """
    drain = config.to_dict()["controller"]["drainTimeoutMs"] / 1000
    with stop_signals() as stopping:
        async with nats(config) as (joined, server):
            options = list(worker_options)
            if server is not None:
                # On everybody's screen, but the embedded server has no password.
                options += ["--nats", server.url]
            alone = server is not None and not server.joined
            team = _Team(asyncio.get_running_loop())
            controller = ControllerNode(joined)
            try:
                for number in range(1, workers + 1):
                    team.start(f"worker-{number}" if alone else _name(number), options)
                await controller.start()
                async with front_end(controller, address, AFTER_DRAIN) as served:
                    if not served.done():
                        announce(server)
                    online = asyncio.create_task(_count(controller, workers, tell_online))
                    ends = [asyncio.create_task(event.wait()) for event in (stopping, team.all_ended)]
                    await asyncio.wait((*ends, served), return_when=asyncio.FIRST_COMPLETED)
                    for task in (online, *ends):
                        task.cancel()
                    await stop(controller, drain)
            finally:
                await controller.stop(drain)
                await team.stop(_WORKER_SECONDS)
    if not stopping.is_set() and team.all_ended.is_set():
        raise _nobody_left()


async def workers_alone(workers: int, worker_options: Sequence[str]) -> None:
    """Runs worker processes until a signal comes, or none is left. They join the NATS server of the configuration.

    Args:
        workers: How many.
        worker_options: What each gets on its command line beside its id.

    Raises:
        CommandError: No worker is left.
    """
    with stop_signals() as stopping:
        team = _Team(asyncio.get_running_loop())
        try:
            for number in range(1, workers + 1):
                team.start(_name(number), worker_options)
            ends = [asyncio.create_task(event.wait()) for event in (stopping, team.all_ended)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                task.cancel()
        finally:
            # Nobody has drained them.
            await team.stop(DRAIN_SECONDS + _WORKER_SECONDS)
    if not stopping.is_set():
        raise _nobody_left()


def _name(number: int) -> str:
    """A worker's name where others may use the same NATS server: a name is its worker's own."""
    return f"worker-{number}-{secrets.token_hex(2)}"


def _nobody_left() -> CommandError:
    return CommandError(
        "no worker is left: what each of them met is in the lines above; `mlx-serving-router worker` with the same"
        " --model runs one alone"
    )


async def _count(controller: ControllerNode, workers: int, tell_online: Callable[[int], None]) -> None:
    for number in range(1, workers + 1):
        await controller.wait_for_workers(number, timeout=None)
        tell_online(number)


class _Team:
    """The worker processes. One that ends by itself is told of and not replaced."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        #: Every worker that was started has ended by itself.
        self.all_ended = asyncio.Event()
        self._loop = loop
        self._running: dict[str, ChildProcess] = {}
        self._stopping = False

    def start(self, name: str, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "mlx_serving_router", "worker", "--id", name, *options]

        def on_exit(status: int) -> None:
            self._loop.call_soon_threadsafe(self._ended, name, status)

        self._running[name] = ChildProcess(command, on_exit=on_exit)

    def _ended(self, name: str, status: int) -> None:
        if self._stopping:
            return
        child = self._running.pop(name)
        _logger.error(
            "%s (process %s) ended by itself, %s; %s",
            name,
            child.pid,
            _describe(status),
            f"{len(self._running)} left" if self._running else "none is left",
        )
        if not self._running:
            self.all_ended.set()

    async def stop(self, seconds: float) -> None:
        """Asks all to end, and returns when all have; after so many seconds they are ended."""
        self._stopping = True
        await asyncio.gather(*(asyncio.to_thread(_end, child, seconds) for child in self._running.values()))


def _end(child: ChildProcess, seconds: float) -> None:
    child.terminate()
    child.ended.wait(seconds)
    child.close()


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
