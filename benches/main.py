"""Usage: make bench ARGS="[--quick] [--rounds N] [--seconds S] [--only NAME,NAME ...]".

What our controller costs: the deciding core by itself, beside its targets; then the bare transport (async-nats), our
controller from Rust, our controller from Python, and nats-py, with one and the same worker, one after the other within
each round. docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import core
import field
import kept
import report
import rounds
from measure import UNBOUNDED, Setup
from report import Cell
from sides import SIDES, Processes, SideError

from mlx_serving_router.nats_server import NatsServer, NatsServerError

_ROOT = Path(__file__).resolve().parent.parent
_CELLS = [
    Cell("buffered", 1),
    Cell("buffered", 64),
    Cell("streaming", 1, counted="tokens"),
    Cell("streaming", 64, counted="tokens"),
]
#: What these names of `--only` run, each a program of its own: not a part of the rest. Those of workers bring a model.
_PROGRAMS = {
    "worker": ("worker.py", "turns.py", "liveness.py"),
    "memory": ("memory.py",),
    "growth": ("growth.py",),
    "http-workers": ("http_workers.py",),
}
#: Which peer a side is compared with: nats-py on the same event loop.
_PEERS = {"python-uvloop": "nats-py-uvloop", "nats-py-uvloop": "nats-py-uvloop"}

_PROMPT = (
    "A small fleet of workers answers questions. Say in a few words how a router decides which of them gets the next "
    "one, what it does when a worker falls silent, and why a conversation is best served by the same worker throughout."
)
_ANSWER = (
    "It takes the worker with the fewest requests in flight among those that are healthy and have the model; when one "
    "falls silent it asks another; and the same worker still holds the conversation in its cache."
)


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    options = _options()
    try:
        if options.programs:
            return _run_programs(options)
        return field.run(options) if options.field else _run(options)
    except (NatsServerError, SideError, core.CoreError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was left behind", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    machine = kept.machine(options.peers)
    print(*(f"{name}: {value}" for name, value in machine.items()), sep="\n")
    if options.load_before > 0.5:
        print(
            f"The machine is busy with other things (load {options.load_before:.1f}): the figures will be too."
        )
    found: dict[str, Any] = {"machine": machine, "load_before": options.load_before}
    if options.core:
        rows = core.measure(options.routing, quick=options.quick)
        print("", *core.table(rows), sep="\n")
        found["core"] = [asdict(row) for row in rows]
    if options.cells:
        found |= _compare(options)
    path = kept.keep(options.output, found)
    print(f"{time.monotonic() - started:.0f} s; all figures: {path}")
    return 0


def _run_programs(options: argparse.Namespace) -> int:
    """Runs what is a program of its own, and returns the first exit status that is not 0."""
    for name in options.programs:
        print(f"\n=== {name}", flush=True)
        command = [sys.executable, _ROOT / "benches" / name]
        if name not in _PROGRAMS["worker"]:
            command += ["--peers", options.peers, *(["--quick"] if options.quick else [])]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    with NatsServer(port=0) as nats:
        setup = Setup(
            url=nats.url,
            worker="echo",
            model="echo",
            prompt=_PROMPT,
            answer=_ANSWER,
            tokens=options.tokens,
            sessions=256,
        )
        with Processes(options.peers, asdict(setup)) as processes:
            processes.start_worker()
            sides = {name: processes.start_side(name) for name in options.sides}
            measured = rounds.measure(
                sides,
                options.cells,
                rounds=options.rounds,
                seconds=options.seconds,
                requests=options.requests,
            )
    against = {side: ["raw", _PEERS.get(side, "nats-py")] for side in options.sides}
    cells = {cell: report.summarize(measured[cell], against) for cell in options.cells}
    for cell, summary in cells.items():
        print("", *report.table(cell, summary), sep="\n")
    print(
        "\n/ raw, / nats-py: alone, latency (lower is better); with many, throughput (higher is better)."
        "\nnats-py is the one on the same event loop; Rust is compared with the one on asyncio."
    )
    return {
        "rounds": options.rounds,
        "seconds_per_round": options.seconds,
        "tokens_per_stream": options.tokens,
        "cells": {
            cell.name: {"summary": summary, "rounds": measured[cell]} for cell, summary in cells.items()
        },
    }


# === options ===


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--peers", type=Path, required=True, help="the Rust program (make bench builds and names it)"
    )
    parser.add_argument(
        "--routing",
        type=Path,
        required=True,
        help="the program of the deciding core (make bench does it too)",
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.3 s: a first look")
    parser.add_argument("--rounds", type=_positive, help="rounds that count (default 9; of the field 3)")
    parser.add_argument(
        "--seconds", type=float, help="length of one round of one side (default 0.6; of the field 1)"
    )
    parser.add_argument(
        "--requests",
        type=_positive,
        default=UNBOUNDED,
        help="at most so many in one round of one side",
    )
    parser.add_argument("--tokens", type=_positive, default=64, help="length of a stream (default 64)")
    names = ["core", *_PROGRAMS, "field", *SIDES, *(cell.name for cell in _CELLS), *field.NAMES]
    parser.add_argument("--only", metavar="NAME,NAME", default="", help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path, default=kept.FOLDER, help="folder for the JSON")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    for name in wanted:
        if name not in names:
            parser.error(f"--only: {name!r} is none of {', '.join(names)}")
    alone = [name for name in wanted if name in _PROGRAMS]
    options.programs = [program for name in alone for program in _PROGRAMS[name]]
    if alone and alone != wanted:
        parser.error(f"--only: {alone[0]} is measured by itself")
    named = [name for name in field.NAMES if name in wanted]
    options.field = named or (list(field.NAMES) if "field" in wanted else [])
    if options.field and not set(wanted) <= {"field", *field.NAMES}:
        parser.error("--only: field is measured by itself, with all its peers or those that are named")
    few = options.field or options.quick
    options.rounds = options.rounds or (3 if few else 9)
    options.seconds = options.seconds or (0.3 if options.quick else 1.0 if options.field else 0.6)
    options.core = not wanted or "core" in wanted
    options.sides = [name for name in SIDES if name in wanted] or list(SIDES)
    options.cells = [cell for cell in _CELLS if cell.name in wanted] or _CELLS
    if wanted == ["core"]:
        options.cells = []
    options.load_before = os.getloadavg()[0]
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
