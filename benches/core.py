"""The deciding core by itself: what one decision costs, and what a large fleet takes, beside the targets.

Criterion's figures and others come from a Rust program (benches/routing); `Router` is measured here.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from report import Row, number

from mlx_serving_router import Router

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SCALES = {"ns": 1.0, "µs": 1e3, "ms": 1e6}


class CoreError(Exception):
    """The program of the deciding core failed."""


def measure(program: Path, *, quick: bool) -> list[Row]:
    """Runs everything. `quick`: for less long.

    Raises:
        CoreError: The program failed.
    """
    names = ("--warm-up-time", "--measurement-time", "--sample-size", "--nresamples")
    values = (0.2, 0.4, 15, 1001) if quick else (0.5, 2, 50, 100_000)
    options = zip(names, map(str, values), strict=True)
    with tempfile.TemporaryDirectory() as home:
        _run(program, "--bench", *(word for option in options for word in option), home=home)
        nanoseconds = {
            str(file.parent.parent.relative_to(home)): _median_of(file)
            for file in Path(home).glob("**/new/estimates.json")
        }
    figures = json.loads(_run(program, "figures", *(["--quick"] if quick else []), home="."))
    return rows(nanoseconds, figures, _from_python(rounds=5 if quick else 25))


def _run(program: Path, *arguments: str, home: str) -> str:
    done = subprocess.run(
        [program, *arguments], env={"CRITERION_HOME": home}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CoreError(f"{program.name} {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _median_of(file: Path) -> float:
    estimates: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
    return estimates["median"]["point_estimate"]


def _from_python(rounds: int) -> dict[str, float]:
    """Nanoseconds of `Router.select` and `success`, by strategy: the median of the rounds."""
    return {strategy: _router_costs(strategy, rounds) for strategy in ("least_requests", "peak_ewma")}


def _router_costs(strategy: str, rounds: int, calls: int = 20_000) -> float:
    router = Router({"loadBalancing": {"strategy": strategy}}, seed=7)
    for worker in range(10):
        router.add_worker(f"worker-{worker}", ["model-a"])
    found = []
    for _ in range(rounds + 1):
        started = time.perf_counter_ns()
        for _ in range(calls):
            router.select("model-a").success()
        found.append((time.perf_counter_ns() - started) / calls)
    return median(found[1:])


# === the rows ===


def rows(
    nanoseconds: Mapping[str, float], figures: Mapping[str, Any], python: Mapping[str, float]
) -> list[Row]:
    """What was measured, beside the targets.

    Args:
        nanoseconds: Medians by criterion's names.
        figures: What the program prints.
        python: Nanoseconds by strategy.
    """

    def timed(name: str, key: str, unit: str, at_most: float = math.inf) -> Row:
        return Row(name, nanoseconds[key] / _SCALES[unit], unit, at_most)

    retry = figures["retry"]
    added = [
        after - at_once for after, at_once in zip(retry["after_a_failure"], retry["at_once"], strict=True)
    ]
    bytes_held, _ = figures["memory"]
    found = [
        timed("least_requests, 10 workers", "decision/least_requests/10", "ns", 300),
        timed("least_requests, 10,000 workers", "decision/least_requests/10000", "µs", 10),
        timed("least_requests, 10,000 workers, all busy", "decision/least_requests_busy/10000", "µs", 10),
        timed("peak_ewma, 10 workers", "decision/peak_ewma/10", "ns", 300),
        timed("peak_ewma, 10,000 workers", "decision/peak_ewma/10000", "µs", 1),
        timed("one of 100,000 sessions, 10 workers", "decision/session/10", "ns", 600),
        timed("one of 100,000 sessions, 10,000 workers", "decision/session/10000", "ns"),
        timed("prefix_aware, prompt of 4 kB, 10 workers", "decision/prefix_aware/10", "µs", 10),
        timed("prefix_aware, prompt of 4 kB, 1,000 workers", "decision/prefix_aware/1000", "µs", 10),
        Row("heap allocations of a decision", max(count for _, count in figures["allocations"]), "", 0),
        *(
            Row(f"Router.select and success from Python, {strategy}", cost / 1e3, "µs", 1)
            for strategy, cost in python.items()
        ),
    ]
    for workers, measured in figures["threads"]:
        together = median(two / one for one, two, _ in measured)
        apart = median(two / one for one, _, two in measured)
        found += [
            Row(f"two threads to one, peak_ewma, {workers:,} workers", together, "x", at_least=1.6),
            Row(f"  the same with a router each: the machine, {workers:,} workers", apart, "x"),
        ]
    return [
        *found,
        timed("four timers of an attempt, set and cleared", "attempt/timers", "µs", 5),
        Row("what a retry adds beside its backoff", median(added) * 1e3, "ms", 1),
        Row("10,000 workers with 4 models, 100,000 sessions, 10,000 records", bytes_held / 1e6, "MB", 100),
        Row("CPU of 10,000 registrations and 10,000 heartbeats", sum(figures["fleet_cpu"]), "s", 1),
    ]


def table(found: Sequence[Row]) -> Iterator[str]:
    """The lines that are printed."""
    cells = [("", "target", "measured", "")] + [
        (
            row.name,
            f"{row.target} {row.unit}".strip() if row.target else "",
            f"{number(row.measured)} {row.unit}".strip(),
            "" if row.holds else "missed",
        )
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield "The deciding core"
    for first, *rest in cells:
        columns = [
            first.ljust(widths[0]),
            *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)),
        ]
        yield f"  {'  '.join(columns)}".rstrip()
