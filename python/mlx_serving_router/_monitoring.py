"""`controller.metricsPort`: metrics and life on a port of their own, beside whatever serves the application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request  # noqa: TC002 beside what it is given to
from starlette.responses import Response  # noqa: TC002 likewise
from starlette.routing import Route

from mlx_serving_router import _fleet_routes
from mlx_serving_router._http import lifespan_state, named
from mlx_serving_router._uvicorn import http_protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.types import ASGIApp

    from mlx_serving_router._controller import ControllerNode

_logger = logging.getLogger(__name__)


@asynccontextmanager
async def serve(controller: ControllerNode, host: str, port: int) -> AsyncIterator[int]:
    """`/metrics`, `/health` and `/ready` of a controller, without a key.

    Args:
        controller: The controller.
        host: Where to listen.
        port: 0 takes any free one.

    Yields:
        The port.

    Raises:
        OSError: The port is taken, or no such address is here.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to whoever serves the application."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    listener = _listen(host, port)
    settings = uvicorn.Config(
        _app(controller),
        http=http_protocol(),
        log_config=None,
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = Server(settings)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    actual: int = listener.getsockname()[1]
    _logger.info("metrics are on port %s of %s", actual, host)
    try:
        yield actual
    finally:
        server.should_exit = True
        await task
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(where[:2], family=family)
    except OSError as error:
        raise OSError(
            error.errno,
            f"controller.metricsPort: cannot listen on port {port} of {host}: {error.strerror}. Each"
            " process needs a port of its own (0 takes any free one)",
        ) from error


def _app(controller: ControllerNode) -> ASGIApp:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, object]]:
        yield lifespan_state(controller)

    async def health(_request: Request) -> Response:
        return await _fleet_routes.health()

    routes = [
        Route("/metrics", _fleet_routes.metrics),
        Route("/health", health),
        Route("/ready", _fleet_routes.ready),
    ]
    return named(Starlette(routes=routes, lifespan=lifespan))
