"""Rounds: every side does every kind of work in each of them, one side at a time, and each side goes first in turn."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

import report
from measure import UNBOUNDED
from sides import SideError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from report import Cell

    #: The figures of each round, by side.
    Measured = dict[str, list[dict[str, float]]]

#: How long one request may take (seconds), and how long a side may take beyond that to say so.
_PATIENCE = 10.0
_GRACE = 5.0
_WARM_UP_SECONDS = 0.3


class Asked(Protocol):
    """A side: a process, or what stands for one."""

    def ask(self, command: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """One round of load, and what it gave: `measure.Outcome` as a mapping. Raises SideError."""


def measure(
    sides: Mapping[str, Asked],
    cells: Sequence[Cell],
    *,
    rounds: int,
    seconds: float,
    requests: int = UNBOUNDED,
    dropped: dict[str, str] | None = None,
) -> dict[Cell, Measured]:
    """Runs the rounds.

    A side that fails ends them; or, where `dropped` is given, it is left out and named there with the reason.
    """
    measured: dict[Cell, Measured] = {cell: {name: [] for name in sides} for cell in cells}
    left = dict(sides)
    # Round 0 warms up and is not counted.
    for number in range(rounds + 1):
        for cell in cells:
            for name in _rotated(list(left), number):
                command = {
                    "mode": cell.mode,
                    "concurrency": cell.concurrency,
                    "seconds": seconds if number else min(seconds, _WARM_UP_SECONDS),
                    "requests": requests,
                    "seed": number * 1_000_003,
                    "patience": _PATIENCE,
                }
                try:
                    answer = left[name].ask(command, seconds + _PATIENCE + _GRACE)
                    if answer["failures"] or not answer["latencies_ns"]:
                        why = (answer["failures"] or ["nothing was answered"])[0]
                        raise SideError(f"{name}, {cell.name}: {why}")
                except SideError as error:
                    if dropped is None:
                        raise
                    dropped[name] = str(error)
                    del left[name]
                    for by_side in measured.values():
                        del by_side[name]
                    continue
                if number:
                    measured[cell][name].append(report.figures(answer))
        if sys.stdout.isatty() or number in (0, rounds):
            print(f"round {number} of {rounds}{'' if number else ' (warm-up)'}", flush=True)
    return measured


def _rotated(names: list[str], number: int) -> Iterator[str]:
    # Each side goes first in turn: whatever a side leaves behind falls on all places of the order.
    start = number % max(len(names), 1)
    yield from names[start:]
    yield from names[:start]
