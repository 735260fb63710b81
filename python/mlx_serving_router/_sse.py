"""A streamed answer as server-sent events: its status, its events, its signs of life, its end.

Knows ASGI and the codec's bytes, and nothing of routes or the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final, Literal

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from mlx_serving_router._errors import ControllerError, ControllerErrorCode
from mlx_serving_router._http import WORKER_ID, HttpError, defect, openai_error, until_disconnect

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractContextManager

    from starlette.types import Receive, Scope, Send

    from mlx_serving_router._native import RelayedStream, StreamEncoder, TokenStream

_COMMENT: Final = b": keepalive\n\n"
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # Proxies that gather responses would hold tokens back.
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
#: Seconds for the error event of a stream that is cut off.
_LAST_WORDS: Final = 1.0

_logger = logging.getLogger(__name__)


class EventStream(Response):
    """A streamed answer. Events that come together leave in one write.

    The status waits for the first token, so that a request that fails has the status of its error. Where the token is
    late, the first sign of life takes the status along, and an error that comes afterwards is an event of the stream.
    A client that disconnects ends the stream, and with it the work on the worker. A stream that breaks ends with an
    error event: clients take one that is merely cut for a success.
    """

    def __init__(
        self,
        start: Callable[[], Coroutine[Any, Any, TokenStream]],
        encoder: StreamEncoder | RelayedStream,
        *,
        request_id: str,
        place: AbstractContextManager[None],
        keepalive: Literal["comment", "chunk", "off"],
        keepalive_seconds: float,
    ) -> None:
        """Make the response; nothing is asked of the fleet before it is sent.

        Args:
            start: Asks the fleet; returns with the first token.
            encoder: Writes the answer.
            request_id: Names it in the log.
            place: Held while the stream runs. Entering it may raise `HttpError`.
            keepalive: What is sent where nothing else is.
            keepalive_seconds: After how long.
        """
        self._start = start
        self._encoder = encoder
        self._request_id = request_id
        self._place = place
        self._keepalive = keepalive
        self._interval = keepalive_seconds
        # One message at a time.
        self._sending = asyncio.Lock()
        self._begun = False
        self._ended = False
        self._last = 0.0
        self.status_code = 200
        self.background = None
        self.raw_headers = [*_HEADERS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        heart = None if self._keepalive == "off" else _Heart(self, send)
        try:
            with self._place:
                refused = await until_disconnect(receive, self._send(send), heart.start if heart else None)
        except HttpError as error:
            refused = openai_error(error)
        except asyncio.CancelledError:
            # The server waits no longer, or the application has a limit of its own.
            await self._cut_off(send)
            raise
        except ClientDisconnect:
            _logger.info("the client left its stream", extra={"request_id": self._request_id})
            return
        finally:
            if heart is not None:
                heart.stop()
        if refused is not None:
            # What the route says of every answer, such as the id of its request.
            refused.raw_headers += [header for header in self.raw_headers if header not in _HEADERS]
            await refused(scope, receive, send)

    async def _send(self, send: Send) -> Response | None:
        """Send the stream, or return what is to be sent in its place."""
        try:
            stream = await self._start()
        except Exception as error:  # noqa: BLE001 whatever it is, the client gets an answer
            told = error if isinstance(error, ControllerError) else defect(error, self._request_id)
            async with self._sending:
                begun = self._begun
            if not begun:
                return openai_error(told)
            await self._write(send, self._encoder.error(told), more=False)
            return None
        self._encoder.answered_by(stream.model_id)
        async with stream:
            if not self._begun:
                self.raw_headers.append((WORKER_ID.encode(), stream.worker_id.encode()))
            try:
                async for events in stream.batches():
                    await self._write(send, self._encoder.tokens(events))
                if stream.response is None:
                    raise RuntimeError("a stream ended with neither an error nor a response")
                last = self._encoder.finish(stream.response)
            except ControllerError as error:
                last = self._encoder.error(error)
            except OSError as error:  # how servers since ASGI 2.4 tell that nobody reads
                raise ClientDisconnect from error
            except Exception as error:  # noqa: BLE001 it goes to the log, and the client must not take this for the end
                last = self._encoder.error(defect(error, self._request_id))
            await self._write(send, last, more=False)
        return None

    async def _cut_off(self, send: Send) -> None:
        """Say, where there is still time, that this is no end."""
        if self._begun and not self._ended:
            words = "the front-end stopped before the answer was complete"
            told = ControllerError(ControllerErrorCode.CONTROLLER_NOT_READY, words)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS):
                    await self._write(send, self._encoder.error(told), more=False)

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with self._sending:
            await self._begin(send)
            self._ended = not more
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _begin(self, send: Send) -> None:
        """The status, once. To be called while sending."""
        self._last = asyncio.get_running_loop().time()
        if not self._begun:
            self._begun = True
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )

    async def keep_alive(self, send: Send) -> None:
        """Send a sign of life, unless something is being sent."""
        if self._sending.locked():
            return
        try:
            await self._write(send, _COMMENT if self._keepalive == "comment" else self._encoder.keepalive())
        except OSError:
            return  # the stream itself learns of it

    @property
    def due(self) -> float:
        """Seconds until a sign of life is due; none are left where it is."""
        return self._last + self._interval - asyncio.get_running_loop().time()


class _Heart:
    """Beats while a stream is silent: one timer, and a task for each beat alone."""

    def __init__(self, stream: EventStream, send: Send) -> None:
        self._stream = stream
        self._send = send
        self._timer: asyncio.TimerHandle | None = None
        self._beat: asyncio.Task[None] | None = None
        stream._last = asyncio.get_running_loop().time()  # noqa: SLF001 its own half

    def start(self) -> None:
        """Beats begin: the first when it is due."""
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(max(0.0, self._stream.due), self._fire)

    def _fire(self) -> None:
        due = self._stream.due
        if due <= 0:
            self._beat = self._loop.create_task(self._stream.keep_alive(self._send))
            due = self._stream._interval  # noqa: SLF001
        self._timer = self._loop.call_later(due, self._fire)

    def stop(self) -> None:
        """No beat begins any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._beat is not None:
            self._beat.cancel()
