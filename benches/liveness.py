"""Usage: python benches/liveness.py [--seconds S] [--cancels N] [--model FOLDER].

Whether a worker that works looks alive and lets go: the intervals of its heartbeats while nothing happens, while models
load and while sixteen requests generate; and how many steps pass between a caller's leaving and its place being free.
docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import sys
import time
import weakref
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import fleet
import nats as nats_py
from sides import Process, SideError

from mlx_serving_router import ControllerNode, InferenceRequest, WorkerNode
from mlx_serving_router.mlx import MlxEngine
from mlx_serving_router.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from mlx_serving_router.engine import Job, JobQueue

_MANY = 16
_INTERVAL = 500.0  # milliseconds
_TOLERANCE = 0.1
_LIMITS = {
    "timeoutMs": 60_000,
    "acceptTimeoutMs": 60_000,
    "streamingTimeoutMs": 60_000,
    "streamIdleTimeoutMs": 60_000,
}
_PATIENCE = 60.0
_STEPS = 2  # within which a place is to be free


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    if len(sys.argv) == 3 and sys.argv[1] in _ROLES:
        asyncio.run(_ROLES[sys.argv[1]](json.loads(sys.argv[2])))
        return 0
    return fleet.conduct(_run(_options()))


async def _run(options: argparse.Namespace) -> int:
    with NatsServer(port=0) as nats:
        for what, intervals in (await _heartbeats(nats.url, options)).items():
            kept = [each for each in intervals if abs(each / _INTERVAL - 1) <= _TOLERANCE]
            print(
                f"heartbeats, {what}: {len(intervals)} intervals of {_INTERVAL:.0f} ms, from {min(intervals):.0f} to "
                f"{max(intervals):.0f} ms; {100 * len(kept) / len(intervals):.0f} % within 10 % (wanted: all)"
            )
        for where, steps in (await _cancellations(nats.url, options)).items():
            late = sum(each > _STEPS for each in steps)
            print(
                f"cancelled in {where}: {len(steps)} requests, steps until the place is free "
                f"{dict(sorted(Counter(steps).items()))}, median {median(steps):.0f}; "
                f"{late} later than {_STEPS} (wanted: none)"
            )
    print(f"load of the machine after: {os.getloadavg()[0]:.1f}")
    return 0


# === heartbeats ===


async def _heartbeats(url: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Intervals in milliseconds, by the worker's own clock: how late they are read here does not matter."""
    client = await nats_py.connect(url)
    sent: dict[str, list[float]] = {}

    async def heard(message: Any) -> None:
        heartbeat = json.loads(message.data)
        sent.setdefault(heartbeat["workerId"], []).append(heartbeat["timestamp"])

    await client.subscribe("worker.heartbeat", cb=heard)
    await client.flush()

    async def listened(worker: str) -> list[float]:
        # The first ones come with the registration, when it becomes ready.
        await asyncio.sleep(1.0)
        sent[worker] = []
        await asyncio.sleep(options.seconds)
        return [later - earlier for earlier, later in itertools.pairwise(sent[worker])]

    loads = _started("loading", url, options)
    worker = fleet.start(
        url, "w", model=options.model, heartbeat_ms=int(_INTERVAL), max_concurrent=_MANY, prompt_cache_bytes=0
    )
    found = {}
    with fleet.ready([worker]):
        found["at rest"] = await listened("w")
        async with ControllerNode(fleet.config(url, requestRouting=_LIMITS)) as controller:
            await controller.wait_for_workers(1, timeout=60)
            async with _generating(controller):
                found[f"while {_MANY} requests generate"] = await listened("w")
    with fleet.ready([loads]):
        loads.ask({}, 60.0)
        found["while models load"] = await listened("loading")
    await client.close()
    return found


@contextlib.asynccontextmanager
async def _generating(controller: ControllerNode, many: int = _MANY) -> AsyncIterator[None]:
    """So many requests generate all the time."""

    async def ask() -> None:
        for number in itertools.count():
            stream = await controller.handle_streaming_request(_endless(number))
            async for _ in stream.batches():
                pass

    callers = [asyncio.create_task(ask()) for _ in range(many)]
    try:
        yield
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


def _endless(number: int, *, words: int = 20, **fields: Any) -> InferenceRequest:
    draw = random.Random(number)
    prompt = " ".join(str(draw.randrange(1000)) for _ in range(words))
    return InferenceRequest(
        model_id=fleet.NAME,
        prompt=prompt,
        max_tokens=400,
        temperature=2.0,
        seed=number,
        **fields,
    )


class _Loading:
    """An engine that loads its model again and again once it has been told to."""

    models = (fleet.NAME,)

    def __init__(self, model: str) -> None:
        self._model = model
        self.begin = asyncio.Event()

    def run(self, jobs: JobQueue) -> None:
        import mlx_lm

        jobs.report("ready", loading_models=self.models)
        while not jobs.closed:
            mlx_lm.load(self._model)


async def _loading(setup: dict[str, Any]) -> None:
    told = fleet.config(setup["url"], discovery={"heartbeatIntervalMs": int(_INTERVAL)})
    async with WorkerNode(_Loading(setup["model"]), config=told, worker_id="loading"):
        _say({"ready": True})
        while await asyncio.to_thread(sys.stdin.readline):
            _say({})


# === places ===


class _Watched:
    """An engine that notes when steps begin, and when it takes jobs and lets go of them, by the machine's clock."""

    def __init__(self, engine: MlxEngine) -> None:
        self._engine = engine
        self.models = engine.models
        self.max_concurrent = engine.max_concurrent
        self.features = engine.features
        self.steps: list[float] = []
        self.taken: dict[str, float] = {}
        self.gone: dict[str, float] = {}

    def run(self, jobs: JobQueue) -> None:
        self._engine.run(_WatchedQueue(jobs, self))

    def let_go(self, request_id: str) -> None:
        self.gone[request_id] = time.monotonic()

    async def answer(self, request: str, *, steps: int = 0, left: float | None = None) -> dict[str, int]:
        """Once a request is so many steps old; or, where its caller has left, the steps until it was let go of."""
        if left is None:
            await _until(lambda: self.steps_since(self.taken.get(request)) >= steps)
            return {}
        await _until(lambda: request in self.gone)
        return {"steps": self.steps_since(left, self.gone[request])}

    def steps_since(self, moment: float | None, until: float | None = None) -> int:
        """Steps that had something to say between two moments, up to now where none is given."""
        if moment is None:
            return 0
        end = len(self.steps) if until is None else bisect_left(self.steps, until)
        return max(0, end - bisect_left(self.steps, moment))


class _WatchedQueue:
    def __init__(self, jobs: JobQueue, watched: _Watched) -> None:
        self._jobs = jobs
        self._watched = watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    def get(self, timeout: float | None = None) -> Any:
        job = self._jobs.get(timeout)
        return None if job is None else _WatchedJob(job, self._watched)

    def deliver(self, pieces: Sequence[tuple[Any, str, Sequence[int], Mapping[str, Any] | None]]) -> None:
        self._watched.steps.append(time.monotonic())  # once for each step in which anybody has a token
        self._jobs.deliver([(piece[0].job, *piece[1:]) for piece in pieces])


class _WatchedJob:
    def __init__(self, job: Job, watched: _Watched) -> None:
        self.job = job
        watched.taken[job.request.request_id] = time.monotonic()
        weakref.finalize(self, watched.let_go, job.request.request_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)


async def _watched(setup: dict[str, Any]) -> None:
    """A worker that is asked when a request is some steps old, and how many steps it took to let go of one."""
    engine = MlxEngine(
        {fleet.NAME: setup["model"]}, max_concurrent=_MANY, prefill_step_size=128, prompt_cache_bytes=0
    )
    watched = _Watched(engine)
    async with WorkerNode(watched, config=fleet.config(setup["url"]), worker_id="watched"):
        _say({"ready": True})
        while line := await asyncio.to_thread(sys.stdin.readline):
            _say(await watched.answer(**json.loads(line)))


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 the engine's thread is not to be made to tell us
        await asyncio.sleep(0.001)


async def _cancellations(url: str, options: argparse.Namespace) -> dict[str, list[int]]:
    """For each place where a request may be, the steps between its caller's leaving and the engine's letting go."""
    found: dict[str, list[int]] = {"prefill": [], "decode": []}
    draw = random.Random(1)
    with fleet.ready([_started("watched", url, options)]) as (worker,):
        async with ControllerNode(fleet.config(url, requestRouting=_LIMITS)) as controller:
            await controller.wait_for_workers(1, timeout=60)
            async with _generating(controller, _MANY - 1):
                for number in range(options.cancels):
                    found["prefill"].append(
                        await _left_in_prefill(controller, worker, number, draw.randint(1, 4))
                    )
                    steps = await _left_in_decode(controller, worker, number, draw.randint(1, 60))
                    found["decode"] += [] if steps is None else [steps]
    return found


async def _left_in_prefill(controller: ControllerNode, worker: Process, number: int, steps: int) -> int:
    name = f"prefill-{number}"
    call = asyncio.create_task(
        controller.handle_streaming_request(_endless(10**6 + number, words=300, request_id=name))
    )
    await asyncio.to_thread(worker.ask, {"request": name, "steps": steps}, _PATIENCE)
    left = time.monotonic()
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
        raise SideError("a prompt was computed before its caller had left")
    return await _steps(worker, name, left)


async def _left_in_decode(
    controller: ControllerNode, worker: Process, number: int, tokens: int
) -> int | None:
    """None where the answer was over before."""
    name = f"decode-{number}"
    stream = await controller.handle_streaming_request(_endless(2 * 10**6 + number, request_id=name))
    async with stream:
        came = 0
        async for event in stream:
            came += len(event.token_ids)
            if came >= tokens:
                break
        else:
            return None
        left = time.monotonic()
    return await _steps(worker, name, left)


async def _steps(worker: Process, name: str, left: float) -> int:
    """The steps until the engine had let go of a request whose caller left at this moment."""
    answer = await asyncio.to_thread(worker.ask, {"request": name, "left": left}, _PATIENCE)
    return int(answer["steps"])


# === processes ===

_ROLES = {"loading": _loading, "watched": _watched}


def _started(role: str, url: str, options: argparse.Namespace) -> Process:
    setup = {"url": url, "model": os.fspath(options.model)}
    return Process(role, [sys.executable, __file__, role, json.dumps(setup)])


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--seconds", type=float, default=15.0, help="of listening for each (default 15)")
    parser.add_argument("--cancels", type=int, default=100, help="cancellations in each place (default 100)")
    parser.add_argument("--model", type=Path, default=fleet.MODEL, help="the model's folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
