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

#: Which peer a side is compared with: nats-py on the same event loop.
_PEERS = {"python-uvloop": "nats-py-uvloop", "nats-py-uvloop": "nats-py-uvloop"}


@dataclass(frozen=True)
class Cell:
    """One kind of load."""

    mode: str
    concurrency: int

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.concurrency}"

    @property
    def measures_latency(self) -> bool:
        """Alone it is latency that matters, with many it is throughput."""
        return self.concurrency == 1


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


def summarize(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians, spreads and ratios of one cell's sides, each given as its rounds' figures."""
    summary: dict[str, Any] = {}
    for side, measured in rounds.items():
        peer = _PEERS.get(side, "nats-py")
        summary[side] = {
            "figures": {
                name: _spread([one[name] for one in measured if name in one]) for name in measured[-1]
            },
            "ratios": {
                other: _ratios(measured, rounds[other])
                for other in ("raw", peer)
                if other in rounds and other != side
            },
        }
    return summary


def _ratios(
    measured: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    return {
        name: _spread([one[name] / other[name] for one, other in zip(measured, others, strict=True)])
        for name in ("requests_per_second", "latency_p50_us", "latency_p99_us", "cpu_us_per_request")
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


# === the table ===


def table(cell: Cell, summary: Mapping[str, Any]) -> Iterator[str]:
    """The lines for one cell."""
    rows = [_headings(cell)] + [_row(cell, side, found) for side, found in summary.items()]
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
    unit = "tokens/s" if cell.mode == "streaming" else "requests/s"
    first_token = ["1st p50", "1st p99"] if cell.mode == "streaming" else []
    main = "p50 µs" if cell.measures_latency else unit
    other = unit if cell.measures_latency else "p50 µs"
    return ["", main, "(min-max)", other, "p95", "p99", *first_token, "CPU µs/req", "/ raw", "/ nats-py"]


def _row(cell: Cell, side: str, found: Mapping[str, Any]) -> list[str]:
    shown = found["figures"]
    rate = "tokens_per_second" if cell.mode == "streaming" else "requests_per_second"
    main, other = ("latency_p50_us", rate) if cell.measures_latency else (rate, "latency_p50_us")
    columns = [other, "latency_p95_us", "latency_p99_us"]
    if cell.mode == "streaming":
        columns += ["first_token_p50_us", "first_token_p99_us"]
    ratio = "latency_p50_us" if cell.measures_latency else "requests_per_second"
    ratios = found["ratios"]
    peer = next((name for name in ratios if name != "raw"), "")
    spread = shown[main]
    return [
        side,
        f"{spread['median']:,.0f}",
        f"({spread['min']:,.0f}-{spread['max']:,.0f})",
        *(f"{shown[name]['median']:,.0f}" for name in columns),
        f"{shown['cpu_us_per_request']['median']:,.1f}",
        *(f"{ratios[name][ratio]['median']:.2f}" if name in ratios else "" for name in ("raw", peer)),
    ]
