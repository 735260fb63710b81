"""Usage: make bench ARGS=--only=growth, or python benches/growth.py --peers PROGRAM [--quick] [--rounds N].

What a request costs in large fleets, what a token costs among many streams, and whether a thousand paced streams are
followed on one core. CPU of our controller's process, from Python. docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import kept
from fleet import conduct, config, ready
from measure import Setup
from report import percentile
from sides import Process, Processes, SideError

from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.nats_server import NatsServer
from mlx_serving_router.testing import ScriptedWorker, answer

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLEETS = (3, 10, 100, 1000)
_STREAMS = (1, 10, 100, 1000)
_MANY = 64
#: Of a stream. What a thousand of them have on their way at most fits the 65,536 messages that a subscription holds:
#: the worker sends as fast as it can, and what comes beyond that is lost.
_TOKENS = 32
_FOLLOWED = 1000
_INTERVAL = 50  # milliseconds between the tokens of a stream that is followed
_PATIENCE = 60.0
_MESSAGES = [{"role": "user", "content": "Which worker gets the next request, and why?"}]


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    if len(sys.argv) > 1 and sys.argv[1] in _ROLES:
        asyncio.run(_ROLES[sys.argv[1]](*json.loads(sys.argv[2])))
        return 0
    return conduct(_run(_options()))


async def _run(options: argparse.Namespace) -> int:
    figures: dict[str, Any] = {}
    with ready([_role("_fleet", size) for size in _FLEETS]) as fleets:
        figures["workers"] = _rounds(options, dict(zip(_FLEETS, fleets, strict=True)), _ask_fleet)
    print(*table("workers", "CPU us a request", figures["workers"]), sep="\n")
    with NatsServer(port=0) as nats:
        setup = Setup(nats.url, "echo", "echo", "Why?", "Hello", tokens=_TOKENS, sessions=256)
        for side in ("python", "rust"):
            with Processes(options.peers, asdict(setup)) as processes:
                processes.start_worker()
                one = processes.start_side(side)
                found = _rounds(options, dict.fromkeys(_STREAMS, one), _ask_streams)
            figures[f"streams, {side}"] = found
            print(*table(f"streams, {side}", "CPU us a token", found), sep="\n")
        figures["followed"] = {where: _follow(options, nats.url, where) for where in ("free", "one core")}
    print(*_followed(figures["followed"]), sep="\n")
    path = kept.keep(kept.FOLDER, {"machine": kept.machine(options.peers), "growth": figures})
    print(f"\nall figures: {path}")
    return 0


def _role(name: str, *arguments: Any) -> Process:
    return Process(name, [sys.executable, str(Path(__file__).resolve()), name, json.dumps(arguments)])


# === rounds ===


def _rounds(options: argparse.Namespace, sizes: dict[int, Process], ask: Any) -> dict[int, dict[str, Any]]:
    """Microseconds of CPU by size and round, and their ratios to the smallest of the same round."""
    rounds = []
    for number in range(options.rounds + 1):
        order = list(sizes)[number % len(sizes) :] + list(sizes)[: number % len(sizes)]
        seconds = options.seconds if number else min(0.5, options.seconds)
        found = {size: ask(sizes[size], size, seconds) for size in order}
        if number:  # the first warms up
            rounds.append(found)
    return summarize(rounds)


def summarize(rounds: list[dict[int, float]]) -> dict[int, dict[str, Any]]:
    """By size: all figures, their median, and the median of the ratios to the smallest size of the same round."""
    smallest = min(rounds[0])
    return {
        size: {
            "figures": [found[size] for found in rounds],
            "median": median(found[size] for found in rounds),
            "to_the_smallest": median(found[size] / found[smallest] for found in rounds),
        }
        for size in sorted(rounds[0])
    }


def _ask_fleet(process: Process, _size: int, seconds: float) -> float:
    found = process.ask({"seconds": seconds}, seconds + _PATIENCE)
    return float(found["cpu_seconds"] / found["requests"] * 1e6)


def _ask_streams(process: Process, size: int, seconds: float) -> float:
    command = {
        "mode": "streaming",
        "concurrency": size,
        "seconds": seconds,
        "requests": 1 << 53,
        "seed": 0,
        "patience": _PATIENCE,
    }
    found = process.ask(command, seconds + _PATIENCE + 5)
    if found["failures"] or not found["tokens"]:
        raise SideError(f"{size} streams: {(found['failures'] or ['nothing was answered'])[0]}")
    return float(found["cpu_seconds"] / found["tokens"] * 1e6)


def table(what: str, unit: str, found: dict[int, dict[str, Any]]) -> Iterator[str]:
    """The lines for one kind of growth."""
    yield f"\n{what:20}{unit:>20}  (min-max)        to the smallest"
    for size, row in found.items():
        spread = f"({min(row['figures']):.2f}-{max(row['figures']):.2f})"
        mark = "" if row["to_the_smallest"] <= 1.15 else "  not flat"
        yield f"{size:<20,}{row['median']:>20.2f}  {spread:15}{row['to_the_smallest']:>17.2f}{mark}"


# === following paced streams ===


def _follow(options: argparse.Namespace, url: str, where: str) -> dict[str, Any]:
    tokens = 60 if options.quick else 300
    setup = Setup(url, f"paced-{where[:3]}", "paced", "Why?", "", tokens, sessions=256, interval=_INTERVAL)
    with Processes(options.peers, asdict(setup)) as processes:
        processes.start_worker("paced")
        with ready([_role("_follower", asdict(setup), where == "one core")]) as (follower,):
            return follower.ask({}, tokens * _INTERVAL / 1000 + _PATIENCE)


def _followed(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield f"\n{_FOLLOWED:,} streams, a token every {_INTERVAL} ms each: from sent to read, in ms"
    for where, row in found.items():
        late = ", ".join(f"{name} {value:.1f}" for name, value in row["late_ms"].items())
        drift = f"{row['first_tenth_ms']:.1f} in their first tenth, {row['last_tenth_ms']:.1f} in their last"
        yield f"  {where}: {late}; p50 {drift}"
        yield (
            f"    {row['tokens_per_second']:,.0f} tokens/s; CPU {row['cpu_us_a_token']:.1f} us a token,"
            f" {row['cpu_share']:.0%} of a core"
        )


# === in the processes that are measured ===


def _say(answered: dict[str, Any]) -> None:
    print(json.dumps(answered), flush=True)


async def _fleet(size: int) -> None:
    """A controller whose workers answer at once, in its process and in Rust. A round a line."""
    async with ControllerNode({"nats": {"mode": "none"}, "logging": {"level": "warning"}}) as controller:
        with contextlib.ExitStack() as workers:
            for number in range(size):
                workers.enter_context(
                    ScriptedWorker(answer("Hello"), controller=controller, worker_id=f"worker-{number:04}")
                )
            await controller.wait_for_workers(size, timeout=_PATIENCE)
            _say({"ready": True})
            while line := await asyncio.to_thread(sys.stdin.readline):
                _say(await _buffered(controller, **json.loads(line)))


async def _buffered(controller: ControllerNode, seconds: float) -> dict[str, Any]:
    requests = 0
    cpu, last = time.process_time(), time.monotonic() + seconds

    async def call() -> None:
        nonlocal requests
        while time.monotonic() < last:
            await controller.handle_buffered_request(InferenceRequest(model_id="tiny", messages=_MESSAGES))
            requests += 1

    await asyncio.gather(*(call() for _ in range(_MANY)))
    return {"requests": requests, "cpu_seconds": time.process_time() - cpu}


async def _follower(fields: dict[str, Any], one_core: bool) -> None:  # noqa: FBT001
    """Reads a thousand streams with `async for`, each token of which says when it was sent."""
    setup = Setup(**fields)
    if one_core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    async with ControllerNode(config(setup.url)) as controller:
        await controller.wait_for_workers(1, timeout=10)
        _say({"ready": True})
        await asyncio.to_thread(sys.stdin.readline)
        late: list[list[int]] = []
        clock = time.time_ns

        async def follow(number: int) -> None:
            # They begin within ten intervals, evenly: streams have nothing to do with each other.
            await asyncio.sleep(10 * _INTERVAL / 1000 * number / _FOLLOWED)
            request = InferenceRequest(model_id=setup.model, messages=_MESSAGES, max_tokens=setup.tokens)
            mine: list[int] = []
            async with await controller.handle_streaming_request(request) as stream:
                async for event in stream:
                    mine.append(clock() - int(event.text))  # noqa: PERF401 - it is what a reader does
            late.append(mine)

        cpu, started = time.process_time(), time.monotonic()
        await asyncio.gather(*(follow(number) for number in range(_FOLLOWED)))
        cpu, seconds = time.process_time() - cpu, time.monotonic() - started
    tokens = sum(map(len, late))
    if tokens != _FOLLOWED * setup.tokens:
        raise RuntimeError(f"{tokens} tokens instead of {_FOLLOWED * setup.tokens}")
    tenth = setup.tokens // 10
    every = sorted(one for mine in late for one in mine)
    _say(
        {
            "late_ms": {f"p{share}": percentile(every, share) / 1e6 for share in (50, 95, 99, 100)},
            "first_tenth_ms": median(one for mine in late for one in mine[:tenth]) / 1e6,
            "last_tenth_ms": median(one for mine in late for one in mine[-tenth:]) / 1e6,
            "cpu_share": cpu / seconds,
            "cpu_us_a_token": cpu / tokens * 1e6,
            "tokens_per_second": tokens / seconds,
        }
    )


_ROLES = {"_fleet": _fleet, "_follower": _follower}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, help="the Rust program (make bench names it)")
    parser.add_argument("--rounds", type=int, help="that count (default 9)")
    parser.add_argument("--seconds", type=float, help="of one size in one round (default 1)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.3 s: a first look")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 9)
    options.seconds = options.seconds or (0.3 if options.quick else 1.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
