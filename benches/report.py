"""From the rounds to what is printed and kept: medians, spreads, ratios. Pure.

A ratio is taken within each round, where the sides ran one right after the other; what is shown is the median of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


#: What our side is called where it is one among others.
OURS = "ours"


@dataclass(frozen=True)
class Cell:
    """One kind of load, and what is counted by the second: `requests` or `tokens`."""

    mode: str
    concurrency: int
    counted: str = "requests"

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.concurrency}"

    @property
    def measures_latency(self) -> bool:
        """Alone it is latency that matters, with many it is throughput."""
        return self.concurrency == 1


@dataclass(frozen=True)
class Row:
    """One figure: what it is of, what it has to be (none: nothing was promised), what it is."""

    name: str
    measured: float
    unit: str
    at_most: float = math.inf
    at_least: float = -math.inf

    @property
    def target(self) -> str:
        if self.at_most < math.inf:
            return f"≤ {number(self.at_most)}"
        return f"≥ {number(self.at_least)}" if self.at_least > -math.inf else ""

    @property
    def holds(self) -> bool:
        return self.at_least <= self.measured <= self.at_most


def figures(answer: Mapping[str, Any]) -> dict[str, float]:
    """What one round of one side says. Times in microseconds."""
    requests, seconds = len(answer["latencies_ns"]), answer["seconds"]
    found = {
        "requests": float(requests),
        "requests_per_second": requests / seconds,
        "cpu_us_per_request": answer["cpu_seconds"] * 1e6 / max(requests, 1),
        **_percentiles("latency", answer["latencies_ns"]),
    }
    if answer["tokens"]:
        found["tokens_per_second"] = answer["tokens"] / seconds
        found.update(_percentiles("first_token", answer["first_token_ns"]))
    return found


def _percentiles(name: str, nanoseconds: Iterable[int]) -> dict[str, float]:
    ordered = sorted(nanoseconds)
    if not ordered:
        return {}
    return {f"{name}_p{share}_us": percentile(ordered, share) / 1e3 for share in (50, 95, 99)}


def percentile(ordered: Sequence[int], share: int) -> int:
    """The nearest rank: a value that is there."""
    return ordered[math.ceil(share / 100 * len(ordered)) - 1]


def summarize(
    rounds: Mapping[str, Sequence[Mapping[str, float]]], against: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Medians, spreads and ratios of one cell's sides, each given as its rounds' figures.

    `against`: with which other sides each side is compared, where those took part.
    """
    return {
        side: {
            "figures": {
                name: spread([one[name] for one in measured if name in one]) for name in measured[-1]
            },
            "ratios": {
                other: _ratios(measured, rounds[other])
                for other in against.get(side, ())
                if other in rounds and other != side
            },
        }
        for side, measured in rounds.items()
    }


def _ratios(
    measured: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    return {
        name: spread([one[name] / other[name] for one, other in zip(measured, others, strict=True)])
        for name in ("requests_per_second", "latency_p50_us", "latency_p99_us", "cpu_us_per_request")
        if all(other[name] for other in others)  # CPU is counted in steps, and may be 0
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


# === the table ===


def ratio_columns(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ratios by heading and side: what ours is of each peer; or each side, of the bare transport and of nats-py."""
    if OURS in summary:
        return {"ours / it": summary[OURS]["ratios"]}

    def of(peer: str) -> dict[str, Any]:
        found = ((side, one["ratios"].items()) for side, one in summary.items())
        return {side: ratio for side, ratios in found for other, ratio in ratios if other.startswith(peer)}

    return {f"/ {peer}": of(peer) for peer in ("raw", "nats-py")}


def table(cell: Cell, summary: Mapping[str, Any]) -> Iterator[str]:
    """The lines for one cell."""
    ratios = ratio_columns(summary)
    rows = [[*_headings(cell), *ratios]]
    for side, found in summary.items():
        rows.append(
            [*_row(cell, side, found), *(_shown(cell, column.get(side)) for column in ratios.values())]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    what = "one request at a time" if cell.measures_latency else f"{cell.concurrency} requests at a time"
    yield f"{cell.mode}, {what}"
    for row in rows:
        first, *rest = (
            text.ljust(width) if n == 0 else text.rjust(width)
            for n, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join([first, *rest])


def _headings(cell: Cell) -> list[str]:
    unit = f"{cell.counted}/s"
    first_token = ["1st p50", "1st p99"] if cell.mode == "streaming" else []
    main = "p50 µs" if cell.measures_latency else unit
    other = unit if cell.measures_latency else "p50 µs"
    return ["", main, "(min-max)", other, "p95", "p99", *first_token, "CPU µs/req"]


def _row(cell: Cell, side: str, found: Mapping[str, Any]) -> list[str]:
    shown = found["figures"]
    rate = f"{cell.counted}_per_second"
    main, other = ("latency_p50_us", rate) if cell.measures_latency else (rate, "latency_p50_us")
    columns = [other, "latency_p95_us", "latency_p99_us"]
    if cell.mode == "streaming":
        columns += ["first_token_p50_us", "first_token_p99_us"]
    extent = shown[main]
    return [
        side,
        f"{extent['median']:,.0f}",
        f"({extent['min']:,.0f}-{extent['max']:,.0f})",
        *(f"{shown[name]['median']:,.0f}" for name in columns),
        f"{shown['cpu_us_per_request']['median']:,.1f}",
    ]


def _shown(cell: Cell, ratios: Mapping[str, Mapping[str, float]] | None) -> str:
    """Alone it is latency that is compared, with many throughput."""
    name = "latency_p50_us" if cell.measures_latency else "requests_per_second"
    return "" if ratios is None else number(ratios[name]["median"])


def number(value: float) -> str:
    """A figure with two or three digits that count, and thousands apart."""
    if value >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def added(difference: Mapping[str, float]) -> str:
    """A difference, with its range."""
    return f"{difference['median']:+,.0f} ({difference['min']:+,.0f} to {difference['max']:+,.0f})"
