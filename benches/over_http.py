"""Load over HTTP, and the process that serves an application of ours: what the benchmarks of front-ends share.

The load is a protocol of its own on plain transports: an HTTP client would cost more than what is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from measure import UNBOUNDED, Outcome, WrongAnswerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

_PATIENCE = 10.0


class Load:
    """Requests to one address, each connection's next when its last has ended.

    Args:
        port: Where the server listens on the loopback interface.
        body: What is asked.
        stream: Whether a stream is asked for.
        token: What an answer has to contain, and
        tokens: how often. 0: that is not looked at, and the first event of a stream counts as its first token.
    """

    def __init__(
        self, port: int, body: bytes, *, stream: bool, token: bytes = b" token", tokens: int = 0
    ) -> None:
        self.port = port
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        self.request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        self.stream = stream
        self.token = token
        self.tokens = tokens
        self.begins = token if tokens else b"data: "

    async def run(self, concurrency: int, seconds: float, requests: int = UNBOUNDED) -> Outcome:
        """A round. The server's CPU is for the caller to add, who knows which process that is."""
        outcome = Outcome()
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        numbers = itertools.count()

        def begins() -> bool:
            return next(numbers) < requests and time.perf_counter() < started + seconds

        connections = [_Connection(self, outcome, begins, loop.create_future()) for _ in range(concurrency)]
        try:
            async with asyncio.timeout(seconds + _PATIENCE):
                for connection in connections:
                    await loop.create_connection(lambda one=connection: one, "127.0.0.1", self.port)
                await asyncio.gather(*(connection.ended for connection in connections))
        except TimeoutError:
            raise WrongAnswerError(f"a request had no end within {_PATIENCE} s") from None
        finally:
            for connection in connections:
                connection.close()
        outcome.seconds = time.perf_counter() - started
        return outcome

    async def alone(self, seconds: float) -> Outcome:
        """A round of one connection, by a thread that waits in the kernel: waking a loop is no part of the answer."""
        return await asyncio.to_thread(self._alone, time.perf_counter() + seconds)

    def _alone(self, until: float) -> Outcome:
        outcome = Outcome()
        ended: Future[None] = Future()
        with socket.create_connection(("127.0.0.1", self.port), _PATIENCE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one = _Connection(self, outcome, lambda: time.perf_counter() < until, ended)
            one.connection_made(_Blocking(connection))
            while not ended.done():
                one.data_received(connection.recv(1 << 16))
        ended.result()
        return outcome


class _Blocking:
    """What a connection needs of a transport."""

    def __init__(self, connection: socket.socket) -> None:
        self.write = connection.sendall

    def close(self) -> None:
        """The socket is closed by whoever has opened it."""


class _Connection(asyncio.Protocol):
    def __init__(
        self,
        load: Load,
        outcome: Outcome,
        begins: Callable[[], bool],
        ended: asyncio.Future[None] | Future[None],
    ) -> None:
        self._load = load
        self._outcome = outcome
        self._begins = begins
        self._transport: Any = None
        self.ended = ended

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._go_on()

    def _go_on(self) -> None:
        """The next request, or the end."""
        if not self._begins():
            self.ended.set_result(None)
            self.close()
            return
        self._received: list[bytes] = []
        self._body_length: int | None = None  # 0: the body comes in chunks
        self._missing = 0
        self._first_byte = 0
        self._first = 0
        self._begun = time.perf_counter_ns()
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        received = self._received
        if not received:
            self._first_byte = time.perf_counter_ns()
        received.append(data)
        if self._body_length is None and not self._read_head():
            return
        if self._body_length:
            self._missing -= len(data)
            if self._missing > 0:
                return
        else:
            if not self._first and self._load.begins in data:
                self._first = time.perf_counter_ns()
            end = data if len(data) >= 5 else b"".join(received[-5:])
            if not end.endswith(b"0\r\n\r\n"):
                return
        self._answered(b"".join(received))

    def _read_head(self) -> bool:
        """Whether the head of the response is there; then, how much of the body is missing, this piece included."""
        head, separator, _ = b"".join(self._received).partition(b"\r\n\r\n")
        if separator:
            length = head.lower().partition(b"content-length: ")[2].split()
            self._body_length = int(length[0]) if length else 0
            before = sum(map(len, self._received[:-1]))
            self._missing = len(head) + len(separator) + self._body_length - before
        return bool(separator)

    def _answered(self, answer: bytes) -> None:
        load, outcome = self._load, self._outcome
        complete = answer.startswith(b"HTTP/1.1 200") and (not load.stream or b"[DONE]" in answer[-64:])
        if not complete or (load.tokens and answer.count(load.token) != load.tokens):
            self.ended.set_exception(WrongAnswerError(f"no good answer: {answer[-300:]!r}"))
            return
        outcome.latencies_ns.append(time.perf_counter_ns() - self._begun)
        outcome.first_byte_ns.append(self._first_byte - self._begun)
        if load.stream:
            outcome.first_token_ns.append(self._first - self._begun)
            outcome.tokens += load.tokens
        self._go_on()

    def close(self) -> None:
        self.ended.cancel()  # unless it has ended
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(WrongAnswerError(f"the server closed a connection: {error}"))


async def get(port: int, path: str) -> bytes:
    """The body of what a server on the loopback interface answers. Raises OSError when nobody listens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n".encode())
    answered = await reader.read()
    writer.close()
    return answered.partition(b"\r\n\r\n")[2]


async def serve(app: FastAPI, http: str = "httptools") -> None:
    """Serves under uvicorn, says where on standard output, and ends with standard input."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=http, access_log=False, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def end_with_input() -> None:
        sys.stdin.read()
        server.should_exit = True

    loop.run_in_executor(None, end_with_input)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    await server.serve(sockets=[listener])
