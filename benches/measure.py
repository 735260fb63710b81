"""Rounds of load in Python: so many callers, each with one request at a time, for so long.

The twin of benches/peers/load.rs: the same commands on standard input, the same answers on standard output.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence


#: So many requests as there is time for.
UNBOUNDED = 1 << 53


@dataclass(frozen=True)
class Setup:
    """The server and the work, the same for all sides."""

    url: str
    worker: str
    model: str
    prompt: str
    answer: str
    tokens: int
    sessions: int
    interval: int = 0  # milliseconds between the tokens of a paced stream
    workers: Sequence[str] = ()  # where workers over HTTP are; none: they are on NATS

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    def session(self, number: int) -> str:
        return f"session-{number % self.sessions}"


class WrongAnswerError(Exception):
    """An answer that is not the worker's."""


class Side(Protocol):
    """A side of the comparison."""

    async def buffered(self, number: int) -> None:
        """Has one request answered in one piece, and checks the answer."""

    async def streaming(self, number: int) -> int:
        """Has one request answered as a stream, checks it, and gives the time of its first token."""


@dataclass
class Outcome:
    """What a round gave."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # user and system time of this process
    latencies_ns: list[int] = field(default_factory=list)
    first_token_ns: list[int] = field(default_factory=list)
    first_byte_ns: list[int] = field(default_factory=list)  # of answers over HTTP
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


def run(main: Callable[[Setup], Coroutine[Any, Any, None]], loop: str) -> None:
    """Runs a side's coroutine function with the setup, on the event loop named (`asyncio` or `uvloop`)."""
    _answers_only()
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(Setup(**json.loads(sys.argv[1]))))


async def serve(side: Side, setup: Setup) -> None:
    """Says that the side is ready, then works off standard input, a round a line."""
    _say({"ready": True})
    while line := await asyncio.to_thread(sys.stdin.readline):
        outcome = await _round(side, setup, **json.loads(line))
        _say(asdict(outcome))


def _answers_only() -> None:
    """Keeps standard output for the answers: what native code of a peer prints goes to standard error."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def _round(
    side: Side,
    setup: Setup,
    *,
    mode: str,
    concurrency: int,
    seconds: float,
    requests: int,
    seed: int,
    patience: float,
) -> Outcome:
    outcome = Outcome()
    numbers = itertools.count()
    clock = time.perf_counter_ns
    latencies, first_tokens = outcome.latencies_ns, outcome.first_token_ns

    async def call_buffered() -> None:
        while (number := next(numbers)) < requests and (began := clock()) < last:
            await side.buffered(seed + number)
            latencies.append(clock() - began)

    async def call_streaming() -> None:
        while (number := next(numbers)) < requests and (began := clock()) < last:
            first = await side.streaming(seed + number)
            latencies.append(clock() - began)
            first_tokens.append(first - began)

    call = {"buffered": call_buffered, "streaming": call_streaming}[mode]
    cpu, started = time.process_time(), clock()
    last = started + int(seconds * 1e9)
    callers = [asyncio.create_task(call()) for _ in range(concurrency)]
    # One limit for the whole round: a timer for each request would be a cost of the benchmark's own.
    _, late = await asyncio.wait(callers, timeout=seconds + patience)
    outcome.seconds = (clock() - started) / 1e9
    outcome.cpu_seconds = time.process_time() - cpu
    for caller in late:
        caller.cancel()
    if late:
        await asyncio.wait(late)
        outcome.failures.append(f"{len(late)} requests had no end within {patience} s")
    for caller in callers:
        if not caller.cancelled() and (error := caller.exception()) is not None:
            outcome.failures.append(f"{type(error).__name__}: {error}")
    outcome.tokens = len(first_tokens) * setup.tokens
    return outcome
