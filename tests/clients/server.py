"""The front-ends that the clients meet: prints their URLs, and ends with its standard input.

Each worker is named after what it does, and serves a model of its name. The second front-end gives signs of life at
every opportunity; it has the worker that is late, and no other. The first one has a server over HTTP, too, which
serves `inner`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from mlx_serving_router import ControllerError, ControllerNode
from mlx_serving_router.fastapi import create_app
from mlx_serving_router.testing import ScriptedWorker, answer

sys.path.append(str(Path(__file__).parents[1] / "python"))
from upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from mlx_serving_router import InferenceRequest

CONFIG = {
    "nats": {"mode": "none"},
    "controller": {"apiKeys": ["right", {"key": "slow down", "requestsPerMinute": 1}]},
    "requestRouting": {
        "retry": {"retryDelayMs": 1, "maxDelayMs": 1, "budgetMinPerSecond": 1000},
        "circuitBreaker": {"enabled": False},
    },
}
LIVELY = {"nats": {"mode": "none"}, "controller": {"sseKeepaliveIntervalMs": 20}}
TOOL_CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
]


async def tiny(_request: InferenceRequest) -> AsyncIterator[str]:
    for token in ("Hello", ", ", "world"):
        yield token


async def echo(request: InferenceRequest) -> AsyncIterator[str]:
    yield json.dumps(request.to_dict())


async def late(_request: InferenceRequest) -> AsyncIterator[str]:
    # Long enough for several signs of life.
    await asyncio.sleep(0.2)
    yield "Hello, world"


async def fails(_request: InferenceRequest) -> AsyncIterator[str]:
    raise ControllerError("WORKER_UNAVAILABLE", "it broke")
    yield ""


async def refuses(_request: InferenceRequest) -> AsyncIterator[str]:
    raise ControllerError("REQUEST_VALIDATION_FAILED", "the prompt is too long")
    yield ""


async def breaks(_request: InferenceRequest) -> AsyncIterator[str]:
    yield "Hel"
    raise ControllerError("WORKER_UNAVAILABLE", "it broke")


async def babbles(_request: InferenceRequest) -> AsyncIterator[str]:
    yield "Hel"
    await asyncio.Event().wait()


class Busy:
    """Has no room at first: once for each session."""

    def __init__(self) -> None:
        self._seen: set[str | None] = set()

    async def busy(self, request: InferenceRequest) -> AsyncIterator[str]:
        if request.session_id not in self._seen:
            self._seen.add(request.session_id)
            raise ControllerError("WORKER_OVERLOADED", "queue full", context={"retry_after_ms": 10})
        yield "Hello, world"


def main() -> None:
    upstream = _Front(Upstream().app)
    static = [{"workerId": "upstream", "url": upstream.url, "models": ["inner"]}]
    controller = ControllerNode({**CONFIG, "workers": {"static": static}})
    for handler in (tiny, echo, refuses, breaks, babbles, Busy().busy):
        controller.add_local_worker(handler, worker_id=handler.__name__, models=[handler.__name__])
    for number in range(4):
        controller.add_local_worker(fails, worker_id=f"fails-{number}", models=["fails"])
    lively = ControllerNode(LIVELY)
    lively.add_local_worker(late, models=["late"])
    calls = answer("", tool_calls=TOOL_CALLS, finish_reason="tool_calls")
    with ScriptedWorker(calls, controller=controller, models=["calls"]):
        fronts = [_Front(create_app(controller=node)) for node in (controller, lively)]
        print(*(front.url for front in fronts), flush=True)
        sys.stdin.read()
        for front in (*fronts, upstream):
            front.end()


class _Front:
    """A front-end, or what stands behind one, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        settings: dict[str, Any] = {"log_level": "warning", "ws": "none", "timeout_graceful_shutdown": 1}
        self._server = uvicorn.Server(uvicorn.Config(app, **settings))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


if __name__ == "__main__":
    main()
