"""An application under a real uvicorn in a thread, and the workers that answer its requests."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from mlx_serving_router import ControllerError, ControllerNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mlx_serving_router import InferenceRequest

LOCAL: dict[str, Any] = {
    "nats": {"mode": "none"},
    # One attempt, so that each test meets the error of its worker itself.
    "requestRouting": {"retry": {"enabled": False}, "circuitBreaker": {"enabled": False}},
}
PATIENCE = 10.0


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """The URL of the application while it is served."""
    listening = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listening.set()

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", ws="none", lifespan="on", timeout_graceful_shutdown=1)
    server = Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert listening.wait(PATIENCE)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


# === workers: each is named after what it does, and serves a model of its name ===


async def tiny(_request: InferenceRequest) -> AsyncIterator[str]:
    """Three tokens."""
    for token in ("Hello", ", ", "world"):
        yield token


async def echo(request: InferenceRequest) -> AsyncIterator[str]:
    """What it was asked."""
    yield json.dumps(request.to_dict())


async def refuses(_request: InferenceRequest) -> AsyncIterator[str]:
    """The request is at fault."""
    raise ControllerError("REQUEST_VALIDATION_FAILED", "the prompt is too long")
    yield ""


async def fails(_request: InferenceRequest) -> AsyncIterator[str]:
    """The worker is at fault."""
    raise ControllerError("WORKER_UNAVAILABLE", "it broke")
    yield ""


async def full(_request: InferenceRequest) -> AsyncIterator[str]:
    """There is no room."""
    raise ControllerError("WORKER_OVERLOADED", "queue full", context={"retry_after_ms": 1500})
    yield ""


async def breaks(_request: InferenceRequest) -> AsyncIterator[str]:
    """One token, then the end of it."""
    yield "Hel"
    raise ControllerError("WORKER_UNAVAILABLE", "it broke")


class Fleet:
    """A controller with all these workers, and two that go on until they are told to stop.

    Attributes:
        controller: It starts with the application that it is given to.
        begun: One of the two has got its request.
        cancelled: It was told to stop.
    """

    def __init__(self, **controller: Any) -> None:
        """Make it, with these settings of `controller`."""
        self.controller = ControllerNode({**LOCAL, "controller": controller})
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        for handler in (tiny, echo, refuses, fails, full, breaks, self.stalls, self.babbles):
            self.controller.add_local_worker(handler, worker_id=handler.__name__, models=[handler.__name__])

    async def stalls(self, _request: InferenceRequest) -> AsyncIterator[str]:
        """Nothing."""
        await self._until_cancelled()
        yield ""

    async def babbles(self, _request: InferenceRequest) -> AsyncIterator[str]:
        """One token, then nothing."""
        yield "Hel"
        await self._until_cancelled()

    async def _until_cancelled(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
