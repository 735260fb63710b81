"""Usage: python benches/soak.py [--requests N] [--minutes M] [--callers N] [--seed N] [--model FOLDER].

Whether memory stays flat: thousands of requests of every kind through controller, NATS and one mlx-lm worker, a quarter
of them cancelled somewhere on the way. docs/performance.md says what is measured and what counts as flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import TYPE_CHECKING, Any

import fleet

from mlx_serving_router import ControllerError, ControllerNode, InferenceRequest
from mlx_serving_router.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sides import Process

_QUESTIONS = (
    "Hello",
    "What is the capital of France?",
    "What is two plus two?",
    "Count to ten.",
    "Tell me a story.",
    "Show me some Unicode.",
)
_SAMPLES = 60
_PATIENCE = 120.0
#: The first part warms up: allocators, caches and stores of a bounded size fill.
_WARM_UP = 0.33
#: Small enough that they are full long before the end of the warm-up.
_STORES = {
    "requestMetrics": {"maxEntries": 500},
    "requestRouting": {
        "maxSessions": 500,
        "acceptTimeoutMs": 60_000,
        "timeoutMs": 60_000,
        "streamingTimeoutMs": 60_000,
        "streamIdleTimeoutMs": 60_000,
        "admission": {"maxWaitMs": 60_000},
    },
}
_PROMPT_CACHE = 8 * 1024**2


@dataclass
class Soak:
    """What came of the requests so far."""

    known: dict[str, list[int]] = field(default_factory=dict)  # the tokens of whole answers, by question
    ends: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    samples: list[dict[str, int]] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(self.ends.values())


@dataclass(frozen=True)
class Draw:
    """One request, and where its caller leaves."""

    request: InferenceRequest
    question: str | None  # where its answer is known
    stream: bool
    leave_after: int | None  # tokens
    leave_within: float | None  # seconds


def main() -> int:
    """Runs the soak and returns the exit status: 0 where memory is flat and every answer right."""
    return fleet.conduct(_run(_options()))


async def _run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    with NatsServer(port=0) as nats:
        options_of_engine = {"max_concurrent": 16, "prompt_cache_bytes": _PROMPT_CACHE}
        with fleet.ready([fleet.start(nats.url, "w", model=options.model, **options_of_engine)]) as (worker,):
            soak, left = await _soaked(nats.url, worker, options, began)
    seconds = time.monotonic() - began
    _keep(options, soak, seconds)
    print(f"\n{soak.done} requests in {seconds:.0f} s: {dict(soak.ends)}; load {os.getloadavg()[0]:.1f}")
    print(f"wrong answers: {soak.wrong}; left behind: {left}")
    flat = _told(soak.samples, options.growth)
    failed = any(end not in {"answered", "left"} for end in soak.ends)
    return 0 if flat and not (failed or soak.wrong or left) else 1


async def _soaked(url: str, worker: Process, options: argparse.Namespace, began: float) -> tuple[Soak, int]:
    """What came of the requests, and how many of them the controller still knows as running."""
    soak = Soak()
    async with ControllerNode(fleet.config(url, **_STORES)) as controller:
        await controller.wait_for_workers(1, timeout=_PATIENCE)
        for question in _QUESTIONS:
            draw = Draw(_asked(question, 64), None, stream=True, leave_after=None, leave_within=None)
            soak.known[question] = await _streamed(controller, draw)
        await _drive(controller, worker, soak, options, began)
        in_flight = sum(info.in_flight for info in controller.workers())
        return soak, in_flight + controller.cluster_status().requests["active"]


async def _drive(
    controller: ControllerNode, worker: Process, soak: Soak, options: argparse.Namespace, began: float
) -> None:
    """All requests, with a look at the memory now and then, while nobody waits for an answer."""
    draws = _draws(random.Random(options.seed))
    for part in range(_SAMPLES):
        upto = options.requests * (part + 1) // _SAMPLES
        await asyncio.gather(
            *(
                _caller(controller, soak, draws, upto - soak.done, number, options.callers)
                for number in range(options.callers)
            )
        )
        soak.samples.append(await _looked(worker, soak.done))
        late = time.monotonic() - began
        print(f"{soak.done:>6} requests, {late:.0f} s: {_shown(soak.samples[-1])}", flush=True)
        if late > options.minutes * 60:
            print(f"the time is over: {soak.done} of {options.requests} requests")
            return


async def _caller(
    controller: ControllerNode, soak: Soak, draws: Iterator[Draw], total: int, number: int, callers: int
) -> None:
    for _ in range(number, total, callers):
        draw = next(draws)
        try:
            end = await _one(controller, soak, draw)
        except ControllerError as error:
            end = str(error.code)
            print(f"request {draw.request.request_id}: {error}", file=sys.stderr)
        soak.ends[end] += 1


async def _one(controller: ControllerNode, soak: Soak, draw: Draw) -> str:
    work = _streamed if draw.stream else _buffered
    call = asyncio.create_task(work(controller, draw))
    if draw.leave_within is not None:
        await asyncio.wait([call], timeout=draw.leave_within)
        if call.cancel():
            with contextlib.suppress(asyncio.CancelledError):
                await call
            return "left"
    tokens = await call
    left = draw.leave_after is not None and len(tokens) >= draw.leave_after
    if draw.question is not None and draw.stream:
        known = soak.known[draw.question]
        most = draw.request.max_tokens or 0
        right = tokens == known[: len(tokens)] if left else tokens == known[:most]
        soak.wrong += not right
    return "left" if left else "answered"


async def _streamed(controller: ControllerNode, draw: Draw) -> list[int]:
    tokens: list[int] = []
    stream = await controller.handle_streaming_request(draw.request)
    async with stream:
        async for event in stream:
            tokens += event.token_ids
            if draw.leave_after is not None and len(tokens) >= draw.leave_after:
                break
    return tokens


async def _buffered(controller: ControllerNode, draw: Draw) -> list[int]:
    await controller.handle_buffered_request(draw.request)
    return []


# === what is asked ===


def _asked(question: str, max_tokens: int, **fields: Any) -> InferenceRequest:
    messages = [{"role": "user", "content": question}]
    return InferenceRequest(model_id=fleet.NAME, messages=messages, max_tokens=max_tokens, **fields)


def _draws(draw: random.Random) -> Iterator[Draw]:
    number = 0
    while True:
        number += 1
        fields: dict[str, Any] = {"priority": draw.choice([None, "high", "normal", "low"])}
        if draw.random() < 0.5:
            fields["session_id"] = f"s-{draw.randrange(100_000)}"
        question = None
        kind = draw.random()
        most = draw.randint(1, 24)
        if kind < 0.6:
            question = draw.choice(_QUESTIONS)
            request = _asked(question, most, **fields)
        elif kind < 0.8:  # prompts that no cache has, some of them long
            words = " ".join(str(draw.randrange(1000)) for _ in range(draw.choice([5, 20, 150])))
            request = InferenceRequest(model_id=fleet.NAME, prompt=words, max_tokens=most, **fields)
        else:
            fields |= {"temperature": 2.0, "seed": draw.choice([None, number]), "top_p": 0.9}
            fields |= draw.choice([{}, {"stop": ["e"]}, {"logprobs": 2}, {"repetition_penalty": 1.2}])
            request = _asked("Tell me a story.", most, **fields)
        leaving = draw.random()
        yield Draw(
            request,
            question,
            stream=draw.random() < 0.7,
            leave_after=draw.randint(1, 12) if leaving < 0.2 else None,
            leave_within=draw.uniform(0, 0.1) if leaving > 0.85 else None,
        )


# === memory ===


async def _looked(worker: Process, done: int) -> dict[str, int]:
    gc.collect()
    answer = await asyncio.to_thread(worker.ask, {}, _PATIENCE)
    return {
        "requests": done,
        "controller": fleet.resident(os.getpid()),
        "controller_objects": len(gc.get_objects()),
        **{f"worker_{name}": value for name, value in answer.items()},
    }


def _shown(sample: dict[str, int]) -> str:
    return (
        f"controller {sample['controller'] / 1e6:.1f} MB, {sample['controller_objects']} objects; "
        f"worker {sample['worker_resident'] / 1e6:.1f} MB, {sample['worker_objects']} objects, "
        f"mlx {sample['worker_mlx'] / 1e6:.1f} + {sample['worker_mlx_cache'] / 1e6:.1f} MB"
    )


def _told(samples: list[dict[str, int]], most: float) -> bool:
    """Prints how much each grew after the warm-up, by a line through it; whether the processes are flat."""
    warm = [sample for sample in samples if sample["requests"] > _WARM_UP * samples[-1]["requests"]]
    flat = True
    requests = [sample["requests"] for sample in warm]
    for name in ("controller", "worker_resident", "worker_mlx", "controller_objects", "worker_objects"):
        values = [sample[name] for sample in warm]
        slope = linear_regression(requests, values).slope
        grown = 100 * slope * (requests[-1] - requests[0]) / median(values)
        judged = name in {"controller", "worker_resident"}
        flat = flat and (not judged or grown <= most)
        unit = "objects" if name.endswith("objects") else "bytes"
        print(
            f"  {name}: {grown:+.2f} % after the warm-up, {slope:+.1f} {unit} by request; "
            f"median {median(values):,.0f}, from {min(values):,} to {max(values):,}"
            + (f" (wanted: at most {most} %)" if judged else "")
        )
    return flat


def _keep(options: argparse.Namespace, soak: Soak, seconds: float) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    kept = {"seconds": seconds, "ends": soak.ends, "wrong": soak.wrong, "samples": soak.samples}
    options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--requests", type=int, default=20_000, help="how many (default 20000)")
    parser.add_argument("--minutes", type=float, default=60.0, help="for how long at most (default 60)")
    parser.add_argument("--callers", type=int, default=24, help="requests at a time (default 24)")
    parser.add_argument(
        "--growth",
        type=float,
        default=3.0,
        help="percent of memory after the warm-up that are flat (default 3)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of what is asked (default 1)")
    parser.add_argument("--model", type=Path, default=fleet.MODEL, help="the model's folder")
    output = Path(__file__).resolve().parent.parent / "target" / "bench" / "soak.json"
    parser.add_argument("--output", type=Path, default=output, help="the JSON with all figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
