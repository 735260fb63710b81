"""What the front-end needs of HTTP: the controller and the id of a request, bodies, disconnects, errors.

Knows requests and responses of ASGI, and nothing of routes, workers or the OpenAI API's fields.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.datastructures import MutableHeaders

# Not for type checking alone: FastAPI reads the annotations of `get_controller`.
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mlx_serving_router import _native
from mlx_serving_router._errors import ControllerError, ControllerErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mlx_serving_router._controller import ControllerNode

REQUEST_ID: Final = "x-request-id"
WORKER_ID: Final = "x-worker-id"

_STATE: Final = "mlx_serving_router"
_ID: Final = "mlx_serving_router.request_id"

# What may stand in a path and in a log line as it is.
_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_REQUEST_ID: Final = REQUEST_ID.encode()

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)


# === requests ===


def get_controller(request: Request) -> ControllerNode:
    """The application's controller, for `Depends`.

    Raises:
        RuntimeError: The application has none: its lifespan has not run, or includes no `controller_router`.
    """
    controller: ControllerNode | None = request.scope.get("state", {}).get(_STATE)
    if controller is None:
        raise RuntimeError(
            "no controller: the application's lifespan has not run. An application that is mounted in another one has"
            " no lifespan of its own; use app.include_router(controller_router(...), prefix=...) there"
        )
    return controller


def lifespan_state(controller: ControllerNode) -> dict[str, Any]:
    """What a lifespan yields, so that `get_controller` finds the controller."""
    return {_STATE: controller}


def path_below_root(request: Request) -> str:
    """The path without what a proxy, or an application around this one, has put in front of it."""
    path, root = request.scope["path"], request.scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        return str(path[len(root) :])
    return str(path)


def request_id(request: Request) -> str:
    """The request's id: the header's where that is a sane one, else one that is made; the same at each call."""
    made: str | None = request.scope.get(_ID)
    if made is None:
        given = next((value for name, value in request.scope["headers"] if name == _REQUEST_ID), b"")
        made = request.scope[_ID] = given.decode("latin-1") if _SANE_ID.fullmatch(given) else _new_id()
    return made


def _new_id() -> str:
    """A random UUID; the library's own takes ten times as long to make one."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def named(app: ASGIApp) -> ASGIApp:
    """An application with the id of the request in each of its answers."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id(Request(scope))
            await send(message)

        await app(scope, receive, send_named)

    return answer


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of `limit` bytes at most.

    Raises:
        ControllerError: PAYLOAD_TOO_LARGE; the rest is not read.
        ClientDisconnect: The client went away before it had sent all.
    """
    chunks = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise ControllerError(
                ControllerErrorCode.PAYLOAD_TOO_LARGE,
                f"the body has more than {limit} bytes",
                context={"limit_bytes": limit},
            )
        chunks.append(chunk)
    return b"".join(chunks)


_WATCH_AFTER: Final = 0.005
"""Seconds of work that are not worth a watch of the client."""


async def until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, _T], begins: Callable[[], None] | None = None
) -> _T:
    """Do the work while the client is there; the body has been read.

    Args:
        receive: Tells of the client.
        work: What is done.
        begins: Called when the watch of the client begins, which it does where the work takes a while.

    Raises:
        ClientDisconnect: The client went away; the work has been cancelled, and has ended.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 coroutines run in tasks
    # Others, a time limit of the application's for one, may cancel the task as well.
    others = task.cancelling()
    watch = _Watch(receive, task, begins)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.gone and task.uncancel() <= others:
            raise ClientDisconnect from None
        raise
    finally:
        watch.stop()


class _Watch:
    """Cancels a task when the client goes away. A watch of what is done in no time would cost as much again."""

    def __init__(self, receive: Receive, task: asyncio.Task[Any], begins: Callable[[], None] | None) -> None:
        self.gone = False
        self._begins = begins
        self._receive = receive
        self._task = task
        self._watching: asyncio.Task[None] | None = None
        loop = task.get_loop()
        # In the context of the request, as the server's own and all middleware's work.
        self._timer = loop.call_later(_WATCH_AFTER, self._begin)

    def _begin(self) -> None:
        self._watching = self._task.get_loop().create_task(_disconnect(self._receive))
        self._watching.add_done_callback(self._leave)
        if self._begins is not None:
            self._begins()

    def _leave(self, watching: asyncio.Task[None]) -> None:
        if watching is not self._watching or watching.cancelled():
            return
        watching.exception()  # a connection that fails is one that is gone
        self.gone = True
        self._task.cancel()

    def stop(self) -> None:
        """The task is not cancelled any more."""
        self._timer.cancel()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# === responses ===


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON body. `Infinity` and `NaN` are refused: other languages' parsers do not take them."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return json_bytes(body, status, headers)


def json_bytes(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A body that is JSON already."""
    return Response(body, status, headers, media_type="application/json")


# === errors ===


class HttpError(Exception):
    """A failure that no request to the fleet can end with, such as a missing key.

    Attributes:
        status: The HTTP status.
        code: The code, for programs.
        headers: Headers of the answer.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Make the error; the message is for people."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


def defect(error: Exception, request_id: str) -> ControllerError:
    """What the client is told of an exception, which goes to the log."""
    _logger.error("a defect in a request", exc_info=error, extra={"request_id": request_id})
    return ControllerError(ControllerErrorCode.INTERNAL_ERROR, "a defect of the router; its log has more")


def openai_error(error: ControllerError | HttpError) -> Response:
    """An error as clients of the OpenAI API expect it."""
    if isinstance(error, HttpError):
        body = _native.openai_error_body(error.status, error.code, str(error))
        return json_bytes(body, error.status, error.headers)
    status, headers, body = _native.openai_error(error)
    return json_bytes(body, status, dict(headers))


def api_error(error: ControllerError | HttpError) -> Response:
    """An error in the shape of `ControllerError.to_dict()`."""
    if isinstance(error, HttpError):
        facts = {"code": error.code, "message": str(error), "context": {}}
        content = {"error": {**facts, "timestamp": time.time_ns() // 1_000_000, "retryable": False}}
        return json_response(content, error.status, error.headers)
    status, headers, _ = _native.openai_error(error)
    return json_response(error.to_dict(), status, dict(headers))
