"""The controller and its web front-end as a process of their own: `mlx-serving-router serve`.

The controller is started before the front-end, so that a start that fails is told in words, and stopped before it, so
that requests which run may finish and the others are told.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import uvicorn

from mlx_serving_router._command import CommandError, changed, stop_signals, unless
from mlx_serving_router._controller import ControllerNode
from mlx_serving_router._uvicorn import http_protocol
from mlx_serving_router.fastapi import create_app
from mlx_serving_router.nats_server import NatsServer, NatsServerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from mlx_serving_router._native import ClusterConfig

_PORTS_TRIED: Final = 20
_TAKEN: Final = (errno.EADDRINUSE, errno.EACCES)
#: Before a NATS server that died is started again: one that dies at once is not to keep the machine busy.
_RESTART_SECONDS: Final = 1.0
#: Seconds that answers have to go out once the controller has stopped.
AFTER_DRAIN: Final = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """A socket that listens, and how people reach it.

    Attributes:
        listener: The socket.
        url: `http://127.0.0.1:8080`.
        moved_from: The port that was asked for, where it was taken.
    """

    listener: socket.socket
    url: str
    moved_from: int | None = None


def listen(host: str, port: int, *, search: bool = False) -> Address:
    """Listens on an address.

    Args:
        host: A name or an address.
        port: 0 takes any free one.
        search: Whether to take the next free port where this one is taken.

    Raises:
        CommandError: The port is taken, or no such address is here.
    """
    last = min(port + _PORTS_TRIED, 65535) if search and port else port
    for candidate in range(port, last + 1):
        try:
            return _listen(host, candidate, port)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise CommandError(
                    f"cannot listen on {host}: {error.strerror}; --host takes an address of this machine"
                    " (127.0.0.1: this machine alone, 0.0.0.0: every network it is in)"
                ) from error
            if error.errno == errno.EACCES and not search:
                raise CommandError(
                    f"port {port} needs more rights than this user has; choose one above 1023 with --port"
                ) from error
    raise CommandError(
        f"port {port} on {host} is taken by another program: stop that one, or choose another port with --port"
        " (0 takes any free one)"
    )


def _listen(host: str, port: int, wanted: int) -> Address:
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.create_server(where[:2], family=family)
    at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 only to be shown
    shown = f"[{at}]" if ":" in at else at
    actual = listener.getsockname()[1]
    return Address(listener, f"http://{shown}:{actual}", wanted if wanted not in {0, actual} else None)


@contextlib.asynccontextmanager
async def front_end(
    controller: ControllerNode, address: Address, patience: float
) -> AsyncIterator[asyncio.Task[None]]:
    """The front-end of a controller that runs; the task ends when it does.

    Args:
        controller: The controller.
        address: Where to listen.
        patience: Seconds that answers have to go out when it ends.

    Raises:
        CommandError: On leaving, where it has not started.
    """
    settings = uvicorn.Config(
        create_app(controller=controller),
        http=http_protocol(),
        log_config=None,
        access_log=False,  # the controller logs requests
        ws="none",
        timeout_graceful_shutdown=max(1, round(patience)),
    )
    server = _Server(settings)
    task = asyncio.create_task(server.serve(sockets=[address.listener]))
    serving = asyncio.create_task(server.serving.wait())
    try:
        await asyncio.wait((task, serving), return_when=asyncio.FIRST_COMPLETED)
        yield task
    finally:
        serving.cancel()
        server.should_exit = True
        await task


class _Server(uvicorn.Server):
    """Leaves signals, and the end of the process, to the command."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
            self.serving.set()
        except SystemExit:  # the application's lifespan has failed, and uvicorn has logged why
            for listener in sockets or ():
                listener.close()
            raise CommandError(
                "the front-end did not start: its log says why (is controller.metricsPort taken?)"
            ) from None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def nats(config: ClusterConfig) -> AsyncIterator[tuple[ClusterConfig, NatsServer | None]]:
    """The NATS server of a configuration: with `nats.mode: embedded` it is started here, and again when it dies.

    Args:
        config: The configuration.

    Yields:
        The configuration with which controllers and workers join that server, and the server where it was started here.

    Raises:
        NatsServerError: The server did not start.
    """
    settings = config.to_dict()["nats"]
    if settings["mode"] != "embedded":
        yield config, None
        return
    loop = asyncio.get_running_loop()
    died = asyncio.Event()

    def on_exit(_status: int) -> None:
        loop.call_soon_threadsafe(died.set)

    server = NatsServer(settings["embedded"]["port"], on_exit=on_exit)
    await asyncio.to_thread(server.start)
    watch = asyncio.create_task(_restart(server, died))
    try:
        # It answers on that port, so a controller joins it.
        yield changed(config, {"nats": {"embedded": {"port": server.port}}}), server
    finally:
        watch.cancel()
        await asyncio.to_thread(server.stop)


async def _restart(server: NatsServer, died: asyncio.Event) -> None:
    while True:
        await died.wait()
        died.clear()
        await asyncio.sleep(_RESTART_SECONDS)
        try:
            await asyncio.to_thread(server.start)
        except NatsServerError as error:
            _logger.error("the embedded NATS server does not start again: %s", error)
            return
        _logger.warning("the embedded NATS server runs again, process %s", server.pid)


async def serve(
    config: ClusterConfig, address: Address, announce: Callable[[NatsServer | None], None]
) -> None:
    """Runs a controller with its front-end until a signal comes.

    Args:
        config: The configuration.
        address: Where the front-end listens.
        announce: Called once it serves, with the embedded NATS server where there is one.

    Raises:
        ControllerError: The controller did not start.
        NatsServerError: The embedded NATS server did not start.
    """
    drain = config.to_dict()["controller"]["drainTimeoutMs"] / 1000
    with stop_signals() as stopping:
        async with nats(config) as (joined, server):
            controller = ControllerNode(joined)
            try:
                await unless(stopping, controller.start())
                if stopping.is_set():
                    return
                async with front_end(controller, address, AFTER_DRAIN) as ended:
                    if not ended.done():
                        announce(server)
                    await unless(stopping, asyncio.wait((ended,)))
                    # First, so that clients whose time is over are told.
                    await stop(controller, drain)
            finally:
                await controller.stop(drain)


async def stop(controller: ControllerNode, drain: float) -> None:
    """Stops a controller because a signal came, and says what a second one does while requests run."""
    requests = controller.cluster_status().requests
    active = requests["active"] + requests["queued"]
    if active:
        _logger.info(
            "what runs may end within %g s; a second signal ends it at once", drain, extra={"active": active}
        )
    await controller.stop(drain)


def curl_line(url: str, model: str, *, with_key: bool) -> str:
    """A request to try, for a shell."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = ' -H "authorization: Bearer $API_KEY"' if with_key else ""
    return f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"
