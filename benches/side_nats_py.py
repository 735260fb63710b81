"""nats-py with a wildcard inbox of its own: what the raw side does, in Python.

It decides nothing, encodes its requests beforehand, and reads one byte of an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

import nats
from measure import Setup, WrongAnswerError, run, serve

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

# A name as long as a controller's, and where a message with it says its type.
_REQUEST_ID = "00000000-0000-4000-8000-000000000000"
_TYPE_AT = len('{"requestId":"') + len(_REQUEST_ID) + len('","type":"')
_ACCEPTED, _TOKEN, _DONE, _RESPONSE = b"atdr"


class _Replies:
    """The messages of one request, for the one caller that waits for them."""

    __slots__ = ("_arrived", "_waiter")

    def __init__(self) -> None:
        self._arrived: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, message: bytes) -> None:
        self._arrived.append(message)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def kind(self) -> int:
        """The first letter of the next message's type."""
        if not self._arrived:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        message = self._arrived.popleft()
        if len(message) <= _TYPE_AT:
            raise WrongAnswerError("a message without a type: is the worker there?")
        return message[_TYPE_AT]


class _NatsPy:
    def __init__(self, client: Client, setup: Setup) -> None:
        self._client = client
        self._tokens = setup.tokens
        self._subject = f"inference.{setup.worker}"
        self._prefix = f"{client.new_inbox()}."
        self._waiting: dict[str, _Replies] = {}
        self._slots = itertools.count()
        self._bodies = {
            stream: [_body(setup, number, stream=stream) for number in range(setup.sessions)]
            for stream in (False, True)
        }

    async def open(self) -> None:
        await self._client.subscribe(f"{self._prefix}*", cb=self._deliver)
        await self._client.flush()

    async def _deliver(self, message: Msg) -> None:
        replies = self._waiting.get(message.subject)
        if replies is not None:
            replies.put(message.data)

    async def buffered(self, number: int) -> None:
        bodies = self._bodies[False]
        subject = f"{self._prefix}{next(self._slots)}"
        replies = self._waiting[subject] = _Replies()
        try:
            await self._client.publish(self._subject, bodies[number % len(bodies)], subject)
            while (kind := await replies.kind()) == _ACCEPTED:
                pass
            if kind != _RESPONSE:
                raise WrongAnswerError(f"a message of type {chr(kind)}… out of turn")
        finally:
            del self._waiting[subject]

    async def streaming(self, number: int) -> int:
        bodies = self._bodies[True]
        subject = f"{self._prefix}{next(self._slots)}"
        replies = self._waiting[subject] = _Replies()
        first = tokens = 0
        try:
            await self._client.publish(self._subject, bodies[number % len(bodies)], subject)
            while (kind := await replies.kind()) != _DONE:
                if kind == _TOKEN:
                    tokens += 1
                    first = first or time.perf_counter_ns()
                elif kind != _ACCEPTED:
                    raise WrongAnswerError(f"a message of type {chr(kind)}… out of turn")
        finally:
            del self._waiting[subject]
        if tokens != self._tokens:
            raise WrongAnswerError(f"{tokens} tokens instead of {self._tokens}")
        return first


def _body(setup: Setup, number: int, *, stream: bool) -> bytes:
    request = {
        "requestId": _REQUEST_ID,
        "modelId": setup.model,
        "messages": setup.messages(),
        "maxTokens": setup.tokens,
        "sessionId": setup.session(number),
        "stream": stream,
        "priority": "normal",
    }
    return json.dumps(request, separators=(",", ":")).encode()


async def _main(setup: Setup) -> None:
    client = await nats.connect(setup.url)
    side = _NatsPy(client, setup)
    await side.open()
    try:
        await serve(side, setup)
    finally:
        await client.close()


if __name__ == "__main__":
    run(_main, sys.argv[2])
