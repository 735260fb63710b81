"""Our router beside others' in one run: with mocked answers, and in front of the same workers over HTTP.

`make bench ARGS=--only=field`. Each peer lives in an environment of its own, which is made from package registries the
first time. One that cannot be had here is named with the reason, and the others go on. docs/performance.md says what
is measured and how fair that is.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kept
import report
import rounds
from measure import Setup
from report import OURS, Cell
from routers import COMMANDS, Routers
from side_controller import over_http, over_nats
from sides import Processes, SideError

from mlx_serving_router.nats_server import NatsServer

sys.path.append(str(kept.ROOT / "scripts"))
import environment
from progress import StepError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

_MOCKED = ("litellm",)
_CALLED = ("tensorzero", "litellm")
#: What `--only` names. Ours always takes part.
NAMES = (OURS, *COMMANDS, *_CALLED)
_DIRECT = "direct"
_ON_NATS = "ours, NATS"
_BUFFERED = [Cell("buffered", 64), Cell("buffered", 1)]
_ALL = [*_BUFFERED, Cell("streaming", 64), Cell("streaming", 1)]
_LOOP = "uvloop"


def run(options: argparse.Namespace) -> int:
    """Runs the comparison, prints and keeps it, and returns the exit status."""
    started = time.monotonic()
    setup = Setup(
        url="",
        worker="echo",
        model="echo",
        prompt="Say in a few words how a router decides which of its workers gets the next request.",
        answer=" token" * options.tokens,
        tokens=options.tokens,
        sessions=256,
    )
    missing: dict[str, str] = {}
    if "tensorzero" in options.field:
        missing["tensorzero, mocked"] = "its wheel has no provider that answers by itself"
    homes = _environments([name for name in options.field if name != OURS], missing)
    machine = kept.machine(options.peers)
    machine["peers"] = ", ".join(
        requirement.replace("==", " ")
        for name in homes
        for requirement in environment.peer_requirements(name)[:1]
    )
    print(*(f"{name}: {value}" for name, value in machine.items()), sep="\n", flush=True)
    groups: dict[str, Any] = {}
    for name, group in GROUPS.items():
        measured = _measured(name, options, setup, homes, missing)
        summaries = {
            cell: report.summarize(measured[cell], {OURS: list(measured[cell])}) for cell in group.cells
        }
        for cell, summary in summaries.items():
            title, *table = report.table(cell, summary)
            print("", f"{group.title}: {title}", *table, sep="\n", flush=True)
        groups[name] = {
            "title": group.title,
            "cells": {
                cell.name: {"summary": summary, "rounds": measured[cell]}
                for cell, summary in summaries.items()
            },
        }
    print("\nours / it: alone, latency (lower is better); with many, requests a second (higher is better)")
    print(*(f"not measured: {name}: {why}" for name, why in missing.items()), sep="\n")
    field = {
        "rounds": options.rounds,
        "seconds_per_round": options.seconds,
        "tokens_per_stream": options.tokens,
        "missing": missing,
        "groups": groups,
    }
    path = kept.keep(options.output, {"machine": machine, "load_before": options.load_before, "field": field})
    print(f"{time.monotonic() - started:.0f} s; all figures: {path}")
    return 0


def _environments(names: list[str], missing: dict[str, str]) -> dict[str, Path]:
    """The folders of the peers' environments."""
    homes: dict[str, Path] = {}
    if not names:
        return homes
    with environment.exclusive():
        for name in names:
            try:
                homes[name] = environment.ensure_peer(name).parent.parent
            except StepError as error:
                missing[name] = f"cannot be installed: {str(error).strip()[-300:]}"
    return homes


class _Start:
    """Starts the sides of one group; a peer that cannot be started is missing."""

    def __init__(
        self, setup: Setup, peers: Path, homes: Mapping[str, Path], ends: contextlib.ExitStack
    ) -> None:
        self._setup = setup
        self._peers = peers
        self._homes = homes
        self._ends = ends
        self._processes = ends.enter_context(Processes(peers, asdict(setup)))
        self.sides: dict[str, rounds.Asked] = {}
        self.missing: dict[str, str] = {}

    def mocked(self, workers: int) -> None:
        self._called(OURS, sys.executable, "side_controller.py", workers)
        for name in _MOCKED:
            self._peer(name, workers)

    def called(self) -> None:
        urls = self._workers()[1]
        self._called(OURS, sys.executable, "side_controller.py", urls)
        for name in _CALLED:
            self._peer(name, urls)

    def http(self) -> None:
        worker, urls = self._workers()
        routers = self._ends.enter_context(Routers(self._setup))
        self.sides[_DIRECT] = routers.direct(int(urls[0].rpartition(":")[2]), worker)
        for name in COMMANDS:
            if name in self._homes:
                with self._excused(name):
                    self.sides[name] = routers.theirs(name, self._homes[name], urls)
        self.sides[OURS] = routers.ours(OURS, over_http(urls, self._setup.model))
        nats = self._ends.enter_context(NatsServer(port=0))
        on_nats = replace(self._setup, url=nats.url)
        self._ends.enter_context(Processes(self._peers, asdict(on_nats))).start_worker()
        self.sides[_ON_NATS] = routers.ours(_ON_NATS, over_nats(nats.url))

    def _workers(self) -> tuple[int, list[str]]:
        """The process of the workers over HTTP, and their addresses."""
        command = [str(self._peers), "http-worker", json.dumps(asdict(self._setup))]
        process, said = self._processes.start("http-worker", command)
        return process.pid, [f"http://127.0.0.1:{port}" for port in said["ports"]]

    def _peer(self, name: str, workers: int | list[str]) -> None:
        if name in self._homes:
            with self._excused(name):
                self._called(name, str(self._homes[name] / "bin" / "python"), f"side_{name}.py", workers)

    def _called(self, name: str, python: str, script: str, workers: int | list[str]) -> None:
        path = Path(__file__).with_name(script)
        arguments = [json.dumps(asdict(self._setup)), _LOOP, json.dumps(workers)]
        self.sides[name] = self._processes.start(name, [python, str(path), *arguments])[0]

    @contextlib.contextmanager
    def _excused(self, name: str) -> Iterator[None]:
        try:
            yield
        except SideError as error:
            self.missing[name] = str(error)


@dataclass(frozen=True)
class Group:
    """Sides that are compared with each other."""

    title: str
    cells: list[Cell]
    start: Callable[[_Start], None]


GROUPS = {
    "mocked-4": Group(
        "called in the process, answers mocked, 4 workers", _BUFFERED, lambda start: start.mocked(4)
    ),
    "mocked-100": Group(
        "called in the process, answers mocked, 100 workers", _BUFFERED, lambda start: start.mocked(100)
    ),
    "called": Group("called in the process, 4 workers over HTTP", _ALL, _Start.called),
    "http": Group("asked over HTTP, 4 workers over HTTP", _ALL, _Start.http),
}


def _measured(
    name: str, options: argparse.Namespace, setup: Setup, homes: Mapping[str, Path], missing: dict[str, str]
) -> dict[Cell, rounds.Measured]:
    group = GROUPS[name]
    print(f"\n=== {group.title}", flush=True)
    with contextlib.ExitStack() as ends:
        start = _Start(setup, options.peers, homes, ends)
        group.start(start)
        measured = rounds.measure(
            start.sides,
            group.cells,
            rounds=options.rounds,
            seconds=options.seconds,
            requests=options.requests,
            dropped=start.missing,
        )
    for side, why in start.missing.items():
        if side not in homes:
            raise SideError(why)  # one of our own
        missing[f"{side}, {group.title}"] = why
    return measured
