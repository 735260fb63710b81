"""Load for a fleet, and what it made of it: `mlx-serving-router bench`.

A closed loop: so many requests run at a time, and the next one starts when one ends. Slow answers therefore slow the
load down, and the percentiles are those of this concurrency, not of an arrival rate.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from mlx_serving_router._client import AnswerError, FrontEnd
from mlx_serving_router._command import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PERCENTILES: Final = (50, 90, 95, 99)
_UNREACHABLE: Final = "nobody answers"


@dataclass
class Outcome:
    """What a run of requests met. Times in seconds."""

    seconds: float = 0.0
    succeeded: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    workers: Counter[str] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    duration: list[float] = field(default_factory=list)
    example: str | None = None
    """The words of the first error."""

    def to_dict(self) -> dict[str, Any]:
        """All of it in milliseconds, for programs."""
        return {
            "seconds": round(self.seconds, 3),
            "succeeded": self.succeeded,
            "failed": dict(self.errors),
            "requestsPerSecond": round(self.succeeded / self.seconds, 3) if self.seconds else 0,
            "tokensPerSecond": round(self.tokens / self.seconds, 3) if self.seconds else 0,
            "tokens": self.tokens,
            "workers": dict(self.workers),
            **{name: _figures(values) for name, values in self._times()},
        }

    def _times(self) -> Iterator[tuple[str, list[float]]]:
        yield "firstTokenMs", self.first_token
        yield "betweenTokensMs", self.between_tokens
        yield "durationMs", self.duration

    def tables(self) -> Iterator[Table]:
        """All of it for people."""
        summary = Table(box=None, show_header=False, pad_edge=False)
        told = self.to_dict()
        summary.add_row(
            "requests", f"{self.succeeded} in {self.seconds:.2f} s, {told['requestsPerSecond']:.1f}/s"
        )
        summary.add_row("tokens", f"{self.tokens}, {told['tokensPerSecond']:.1f}/s")
        if self.workers:
            shares = ", ".join(f"{worker} {count}" for worker, count in self.workers.most_common(8))
            summary.add_row("workers", shares + (" ..." if len(self.workers) > 8 else ""))
        for code, count in self.errors.most_common():
            summary.add_row("failed", f"{count} {code}", style="red")
        if self.example is not None:
            summary.add_row("such as", self.example, style="red")
        yield summary
        times = Table(box=None, pad_edge=False)
        times.add_column("ms")
        for name in ("mean", *(f"p{percent}" for percent in _PERCENTILES), "max"):
            times.add_column(name, justify="right")
        for (_, values), name in zip(
            self._times(), ("first token", "between tokens", "whole answer"), strict=True
        ):
            if values:
                times.add_row(name, *(f"{value:.1f}" for value in _figures(values).values()))
        if times.row_count:
            yield times


async def load(
    front_end: FrontEnd,
    body: dict[str, Any],
    *,
    requests: int,
    concurrency: int,
    stream: bool,
    tell: Callable[[], None],
) -> Outcome:
    """Send so many requests, so many at a time.

    Args:
        front_end: Where to.
        body: Each request.
        requests: How many.
        concurrency: How many at a time.
        stream: Whether the answers are streamed; times of tokens are known then alone.
        tell: Called after each.

    Raises:
        CommandError: Nobody answered any of them.
    """
    outcome = Outcome()
    numbers = iter(range(requests))
    one = _streamed if stream else _whole

    async def sender() -> None:
        for _ in numbers:
            try:
                await one(front_end, body, outcome)
            except AnswerError as error:
                outcome.errors[error.code] += 1
                outcome.example = outcome.example or str(error)
            except CommandError as error:
                outcome.errors[_UNREACHABLE] += 1
                outcome.example = outcome.example or str(error)
            except (ValueError, KeyError, TypeError) as error:
                outcome.errors["unreadable answer"] += 1
                outcome.example = outcome.example or f"it is no answer of the OpenAI API ({error!r})"
            tell()

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as senders:
        for _ in range(min(concurrency, requests)):
            senders.create_task(sender())
    outcome.seconds = time.perf_counter() - begun
    if set(outcome.errors) == {_UNREACHABLE} and not outcome.succeeded:
        raise CommandError(outcome.example)
    return outcome


async def _streamed(front_end: FrontEnd, body: dict[str, Any], outcome: Outcome) -> None:
    begun = time.perf_counter()
    first = last = None
    tokens = 0
    async with front_end.answer(body) as (worker, pieces):
        async for piece in pieces:
            if piece.text:
                last = time.perf_counter()
                first = first or last
            tokens = piece.completion_tokens or tokens
    outcome.duration.append(time.perf_counter() - begun)
    outcome.succeeded += 1
    outcome.tokens += tokens
    if worker is not None:
        outcome.workers[worker] += 1
    if first is not None and last is not None:
        outcome.first_token.append(first - begun)
        if tokens > 1:
            outcome.between_tokens.append((last - first) / (tokens - 1))


async def _whole(front_end: FrontEnd, body: dict[str, Any], outcome: Outcome) -> None:
    begun = time.perf_counter()
    piece = await front_end.whole(body)
    outcome.duration.append(time.perf_counter() - begun)
    outcome.succeeded += 1
    outcome.tokens += piece.completion_tokens or 0
    if piece.worker_id is not None:
        outcome.workers[piece.worker_id] += 1


def _figures(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles by nearest rank, and the greatest, in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    ranks = {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in _PERCENTILES}
    figures = {"mean": sum(ordered) / len(ordered), **ranks, "max": ordered[-1]}
    return {name: round(value * 1000, 3) for name, value in figures.items()}
