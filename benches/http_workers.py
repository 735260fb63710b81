"""Usage: make bench ARGS=--only=http-workers, or python benches/http_workers.py --peers PROGRAM [--quick] [--rounds N].

What our controller adds to a request to a worker over HTTP: one request at a time, through the controller and directly,
one side after the other within each round. docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kept
import report
import rounds
from measure import Setup
from report import Cell
from sides import Processes, SideError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rounds import Measured

    #: By what is compared, by side, by `is` and `added`: the median and the range of a figure.
    Compared = dict[str, dict[str, dict[str, dict[str, float]]]]

_CELLS = [Cell("buffered", 1), Cell("streaming", 1, counted="tokens")]
#: Lengths of the answer: what a request costs, and what it costs with what is read of its answer.
_TOKENS = (1, 64)
#: What is asked without a router, by the controller's own HTTP client: the others are compared with it.
_DIRECT = "direct"
#: What is compared: a kind of load, and its figure.
_ADDED = (
    ("buffered-1", "latency_p50_us", "whole answer"),
    ("streaming-1", "first_token_p50_us", "first token"),
    ("streaming-1", "latency_p50_us", "end of the stream"),
)


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    options = _options()
    machine = kept.machine(options.peers)
    load = os.getloadavg()[0]
    print(*(f"{name}: {value}" for name, value in machine.items()), f"load before: {load:.1f}", sep="\n")
    lengths: dict[str, Any] = {}
    try:
        for tokens in _TOKENS:
            measured = _measured(options, tokens)
            by_load = {cell.name: sides for cell, sides in measured.items()}
            compared = compare(by_load)
            print("", *table(tokens, compared), sep="\n", flush=True)
            lengths[str(tokens)] = {"compared": compared, "rounds": by_load}
    except SideError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    found = {"rounds": options.rounds, "seconds_per_round": options.seconds, "tokens": lengths}
    path = kept.keep(options.output, {"machine": machine, "load_before": load, "http_workers": found})
    print(f"\nall figures: {path}")
    return 0


def _measured(options: argparse.Namespace, tokens: int) -> Mapping[Cell, Measured]:
    setup = Setup(
        url="",
        worker="echo",
        model="echo",
        prompt="Say in a few words how a router decides which of its workers gets the next request.",
        answer=" token" * tokens,
        tokens=tokens,
        sessions=256,
    )
    peers = str(options.peers)
    with Processes(options.peers, asdict(setup)) as processes:
        _, said = processes.start("http-worker", [peers, "http-worker", json.dumps(asdict(setup))])
        urls = [f"http://127.0.0.1:{said['ports'][0]}"]
        told = json.dumps(asdict(replace(setup, workers=urls)))
        ours = [*_python("side_controller.py"), told]
        commands = {
            _DIRECT: [peers, "direct", told],
            "httpx": [*_python("side_httpx.py"), told],
            "rust": [peers, "controller", told],
            "python": [*ours, "asyncio", json.dumps(urls)],
            "python-uvloop": [*ours, "uvloop", json.dumps(urls)],
        }
        sides = {name: processes.start(name, command)[0] for name, command in commands.items()}
        return rounds.measure(sides, _CELLS, rounds=options.rounds, seconds=options.seconds)


def _python(script: str) -> list[str]:
    return [sys.executable, "-B", str(Path(__file__).with_name(script))]


def compare(measured: Mapping[str, Measured]) -> Compared:
    """What is compared, from the figures of the rounds by kind of load; differences are taken within rounds."""
    return {
        what: {
            side: {
                "is": report.spread([one[figure] for one in figures]),
                "added": report.spread(
                    [
                        one[figure] - direct[figure]
                        for one, direct in zip(figures, measured[cell][_DIRECT], strict=True)
                    ]
                ),
            }
            for side, figures in measured[cell].items()
        }
        for cell, figure, what in _ADDED
    }


def table(tokens: int, compared: Compared) -> Iterator[str]:
    """The lines for one length of the answer."""
    rows = [["", *compared]]
    rows += [
        [side, *(_shown(of[side], is_direct=side == _DIRECT) for of in compared.values())]
        for side in next(iter(compared.values()))
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    length = "1 token" if tokens == 1 else f"{tokens} tokens"
    yield f"answers of {length}, one at a time: p50 in us, and what is added to {_DIRECT}"
    for row in rows:
        yield "  " + "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))


def _shown(figures: Mapping[str, Mapping[str, float]], *, is_direct: bool) -> str:
    median = f"{figures['is']['median']:,.0f}"
    if is_direct:
        return median
    return f"{median}, {report.added(figures['added'])}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, help="the Rust program")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.3 s: a first look")
    parser.add_argument("--rounds", type=int, help="rounds that count (default 9)")
    parser.add_argument("--seconds", type=float, help="length of one round of one side (default 0.6)")
    parser.add_argument("--output", type=Path, default=kept.FOLDER, help="folder for the JSON")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.seconds = options.seconds or (0.3 if options.quick else 0.6)
    return options


if __name__ == "__main__":
    sys.exit(main())
