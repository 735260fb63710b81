"""Usage: make bench ARGS=--only=memory, or python benches/memory.py --peers PROGRAM [--quick].

What a controller takes of memory: idle, under load and afterwards, by stream, by session, by request record.
docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import os
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kept
from fleet import conduct, config, resident
from measure import Setup
from sides import Process, Processes

from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

_MANY = 64
#: How a scenario's process allocates, by what it is to tell: as always; all by malloc, whose bytes in use are known;
#: with Python's own objects traced.
_MODES: dict[str, dict[str, str]] = {
    "resident": {},
    "heap": {"PYTHONMALLOC": "malloc"},
    "python": {"PYTHONTRACEMALLOC": "1"},
}
_MESSAGES = [{"role": "user", "content": "Which worker gets the next request, and why?"}]


def main() -> int:
    """Runs the scenarios and returns the exit status."""
    if len(sys.argv) > 1 and sys.argv[1] in _SCENARIOS:
        asyncio.run(_work(sys.argv[1], json.loads(sys.argv[2])))
        return 0
    return conduct(_run(_options()))


async def _run(options: argparse.Namespace) -> int:
    found: dict[str, dict[str, list[Sample]]] = {}
    with NatsServer(port=0) as nats:
        for worker, names in (("worker", ("life", "sessions", "records")), ("paced", ("streams",))):
            # The paced worker's streams say one token and, for an hour, nothing more.
            setup = Setup(nats.url, worker, worker, "", "Hello", tokens=8, sessions=256, interval=3_600_000)
            with Processes(options.peers, asdict(setup)) as processes:
                processes.start_worker(worker)
                for name in names:
                    found[name] = {
                        mode: _scenario(name, mode, {"quick": options.quick, **asdict(setup)})
                        for mode in _MODES
                    }
                    print(f"{name}: done", flush=True)
    figures = summarize(found)
    print("", *table(figures), sep="\n")
    path = kept.keep(
        kept.FOLDER, {"machine": kept.machine(options.peers), "memory": figures, "samples": found}
    )
    print(f"\nall figures: {path}")
    return 0


#: What a process was at one moment: how far its scenario had come, and its bytes by `_MODES`.
Sample = dict[str, Any]


def _scenario(name: str, mode: str, setup: dict[str, Any]) -> list[Sample]:
    command = [sys.executable, str(Path(__file__).resolve()), name, json.dumps(setup)]
    process = Process(f"{name}, {mode}", command, environment={**os.environ, **_MODES[mode]})
    try:
        answer: list[Sample] = process.read(300.0)["samples"]
    finally:
        process.end()
        process.wait()
    return answer


# === the sums ===


def summarize(found: dict[str, dict[str, list[Sample]]]) -> dict[str, dict[str, float]]:
    """Bytes by row and column: `resident`, `heap`, `python`, and `rust`, which is what Python has no part in."""
    rows: dict[str, dict[str, float]] = {}
    for mode in _MODES:
        for phase, samples in _phases(found["life"][mode]).items():
            values = sorted(sample[mode] for sample in samples)
            rows.setdefault(phase, {})[mode] = values[len(values) // 2]
        for name in ("streams", "sessions", "records"):
            rising = [sample for sample in found[name][mode] if sample["phase"] == "more"]
            rows.setdefault(f"per {name[:-1]}", {})[mode] = slope(
                [(sample["count"], sample[mode]) for sample in rising]
            )
        streams = _phases(found["streams"][mode])
        left = streams["after"][-1][mode] - streams["more"][0][mode]
        rows.setdefault("left of the streams", {})[mode] = left
    for row in rows.values():
        row["rust"] = row["heap"] - row["python"]
    return rows


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line that is nearest to the points, by least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def _phases(samples: list[Sample]) -> dict[str, list[Sample]]:
    phases: dict[str, list[Sample]] = {}
    for sample in samples:
        phases.setdefault(sample["phase"], []).append(sample)
    return phases


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """The lines to print: megabytes of a process, and bytes of one of many."""
    lines = [f"{'':36}{'resident':>12}{'heap':>12}{'of Python':>12}{'of Rust':>12}"]
    for name, row in rows.items():
        one = name.startswith("per ")
        cells = (row[column] for column in ("resident", "heap", "python", "rust"))
        shown = (f"{value:,.0f} B" if one else f"{value / 1e6:,.2f} MB" for value in cells)
        lines.append(f"{name:36}" + "".join(f"{cell:>12}" for cell in shown))
    return lines


# === in the process that is measured ===


class _Mallinfo2(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _sample(phase: str, count: int = 0) -> Sample:
    gc.collect()
    heap = 0
    with contextlib.suppress(AttributeError):  # no glibc, or one before 2.33
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        mallinfo2.restype = _Mallinfo2
        info = mallinfo2()
        heap = info.uordblks + info.hblkhd
    return {
        "phase": phase,
        "count": count,
        "resident": resident(os.getpid()),
        "heap": heap,
        "python": tracemalloc.get_traced_memory()[0],
    }


async def _work(name: str, setup: dict[str, Any]) -> None:
    quick = setup.pop("quick")
    samples = [sample async for sample in _SCENARIOS[name](Setup(**setup), quick)]
    print(json.dumps({"samples": samples}), flush=True)


def _request(setup: Setup, number: int) -> InferenceRequest:
    session = setup.session(number)
    return InferenceRequest(model_id=setup.model, messages=_MESSAGES, max_tokens=8, session_id=session)


async def _many(each: Callable[[int], Coroutine[Any, Any, None]], first: int, count: int) -> None:
    """So many requests, 64 at a time."""
    numbers = iter(range(first, first + count))

    async def call() -> None:
        for number in numbers:
            await each(number)

    await asyncio.gather(*(call() for _ in range(_MANY)))


def _node(setup: Setup, **changes: Any) -> ControllerNode:
    routing = {"streamIdleTimeoutMs": 600_000, **changes.pop("requestRouting", {})}
    return ControllerNode(config(setup.url, requestRouting=routing, **changes))


async def _life(setup: Setup, quick: bool) -> AsyncIterator[Sample]:  # noqa: FBT001
    yield _sample("imported, nothing made")
    async with _node(setup) as controller:
        await controller.wait_for_workers(1, timeout=10)

        async def each(number: int) -> None:
            if number % 2:
                await controller.handle_buffered_request(_request(setup, number))
                return
            async with await controller.handle_streaming_request(_request(setup, number)) as stream:
                async for _event in stream:
                    pass

        await _many(each, 0, 8)
        await asyncio.sleep(1)
        yield _sample("idle")
        share = 100 if quick else 1_500
        await _many(each, 0, 8 * share)  # the records fill, of which 10,000 are kept
        running = asyncio.create_task(_many(each, 0, 16 * share))
        while not running.done():
            yield _sample("64 requests at a time")
            await asyncio.sleep(0.2)
        await running
        await asyncio.sleep(1)
        yield _sample("after the load")
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        yield _sample("the same, with what malloc held given back")


async def _streams(setup: Setup, quick: bool) -> AsyncIterator[Sample]:  # noqa: FBT001
    async with _node(setup) as controller:
        await controller.wait_for_workers(1, timeout=10)
        streams = []
        async for count in _steps(200 if quick else 1_000):
            while len(streams) < count:
                streams.append(await controller.handle_streaming_request(_request(setup, len(streams))))
                await anext(streams[-1])
            yield _sample("more", count)
        for stream in streams:
            await stream.aclose()
        streams.clear()
        await asyncio.sleep(1)
        yield _sample("after")


async def _sessions(setup: Setup, quick: bool) -> AsyncIterator[Sample]:  # noqa: FBT001
    async with _node(setup, requestMetrics={"maxEntries": 100}) as controller:
        await controller.wait_for_workers(1, timeout=10)

        async def each(number: int) -> None:
            session = f"5e55105e-0000-4000-8000-{number:012x}"
            request = InferenceRequest(model_id=setup.model, messages=_MESSAGES, session_id=session)
            await controller.handle_buffered_request(request)

        before = 0
        async for count in _steps(5_000 if quick else 100_000):
            await _many(each, before, count - before)
            before = count
            yield _sample("more", count)


async def _records(setup: Setup, quick: bool) -> AsyncIterator[Sample]:  # noqa: FBT001
    most = 2_000 if quick else 20_000
    async with _node(setup, requestMetrics={"maxEntries": most}) as controller:
        await controller.wait_for_workers(1, timeout=10)

        async def each(number: int) -> None:
            await controller.handle_buffered_request(_request(setup, number))

        before = 0
        async for count in _steps(most):
            await _many(each, before, count - before)
            before = count
            yield _sample("more", count)


async def _steps(most: int) -> AsyncIterator[int]:
    """Tenths; the first one is none, after a moment in which what the start needs is over."""
    await asyncio.sleep(0.5)
    for tenth in range(11):
        yield most * tenth // 10


_SCENARIOS = {"life": _life, "streams": _streams, "sessions": _sessions, "records": _records}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, help="the Rust program (make bench names it)")
    parser.add_argument("--quick", action="store_true", help="a twentieth of it: for a first look")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
