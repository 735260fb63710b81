"""What the front-end needs of HTTP: ids, bodies, disconnects, event streams, errors.

Knows requests and responses of ASGI, and nothing of routes, workers or the OpenAI API's fields.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from mlx_serving_router import _native
from mlx_serving_router._errors import ControllerError, ControllerErrorCode

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from mlx_serving_router._native import StreamEncoder, TokenStream

REQUEST_ID: Final = "x-request-id"
WORKER_ID: Final = "x-worker-id"

_MAX_BODY: Final = 16 * 1024 * 1024
"""Bytes of a body that are read at most. The transport's own limit, 1 MiB over NATS unless configured, comes later."""

# What may stand in a path and in a log line as it is.
_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)


# === requests ===


def request_id(request: Request) -> str:
    """The request's id: the header's where that is a sane one, else one that is made; the same at each call."""
    made: str | None = getattr(request.state, "request_id", None)
    if made is None:
        given = request.headers.get(REQUEST_ID, "")
        made = given if _SANE_ID.fullmatch(given) else str(uuid.uuid4())
        request.state.request_id = made
    return made


async def read_body(request: Request) -> bytes:
    """The body.

    Raises:
        ControllerError: PAYLOAD_TOO_LARGE, beyond 16 MiB; the rest is not read.
        ClientDisconnect: The client went away before it had sent all.
    """
    chunks = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _MAX_BODY:
            raise ControllerError(
                ControllerErrorCode.PAYLOAD_TOO_LARGE,
                f"the body has more than {_MAX_BODY} bytes",
                context={"limit_bytes": _MAX_BODY},
            )
        chunks.append(chunk)
    return b"".join(chunks)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Do the work while the client is there; the body has been read.

    Raises:
        ClientDisconnect: The client went away; the work has been cancelled, and has ended.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        if task.cancel():
            await asyncio.wait((task,))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# === responses ===


class EventStream(Response):
    """A streamed answer as server-sent events. Events that come together leave in one write.

    A client that disconnects ends the stream, and with it the work on the worker. A stream that breaks ends with an
    error event: clients take one that is merely cut for a success.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: TokenStream, encoder: StreamEncoder) -> None:
        """Make the response; nothing of the stream is read before it is sent.

        Args:
            stream: The answer.
            encoder: Writes it.
        """
        self._stream = stream
        self._encoder = encoder
        self.status_code = 200
        self.background = None
        # Proxies that gather responses would hold tokens back.
        self.init_headers(
            {"cache-control": "no-cache", "x-accel-buffering": "no", WORKER_ID: stream.worker_id}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        del scope
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnect:
            _logger.info("the client left its stream", extra={"request_id": self._stream.request_id})

    async def _send(self, send: Send) -> None:
        async with self._stream as stream:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            try:
                async for events in stream.batches():
                    await send(_piece(self._encoder.tokens(events), more=True))
                if stream.response is None:
                    raise RuntimeError("a stream ended with neither an error nor a response")
                last = self._encoder.finish(stream.response)
            except ControllerError as error:
                last = self._encoder.error(error)
            except OSError as error:  # how servers since ASGI 2.4 tell that nobody reads
                raise ClientDisconnect from error
            except Exception as error:  # noqa: BLE001 it goes to the log, and the client must not take this for the end
                last = self._encoder.error(defect(error, stream.request_id))
            await send(_piece(last, more=False))


def _piece(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


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
