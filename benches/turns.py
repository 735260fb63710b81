"""Usage: python benches/turns.py [--rounds N] [--sessions N] [--workers N] [--model FOLDER].

What it is worth that a conversation comes back to its worker: the time to the first token of growing turns on four
workers, with session affinity and at random, one after the other within each round; and that of the next turn of a long
conversation on the worker that has it, against another one. docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import fleet

from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.nats_server import NatsServer

_TURNS = 6
_AT_A_TIME = 2
_ANSWER = 16  # tokens
_LONG = 1500  # tokens
_LIMITS = {
    "timeoutMs": 60_000,
    "acceptTimeoutMs": 60_000,
    "streamingTimeoutMs": 60_000,
    "streamIdleTimeoutMs": 60_000,
}
_WORDS = (
    "the",
    "old",
    "lamp",
    "on",
    "the",
    "hill",
    "was",
    "lit",
    "again",
    "by",
    "a",
    "boy",
    "who",
    "found",
    "some",
    "oil",
)


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    return fleet.conduct(_run(_options()))


async def _run(options: argparse.Namespace) -> int:
    balancing = {
        "affinity": {},  # as it comes
        "random": {"strategy": "weighted_random", "sessionAffinity": False},
    }
    with NatsServer(port=0) as nats:
        names = [f"w-{number}" for number in range(1, options.workers + 1)]
        workers = [fleet.start(nats.url, name, model=options.model) for name in names]
        with fleet.ready(workers):
            sides = {
                name: ControllerNode(fleet.config(nats.url, loadBalancing=settings, requestRouting=_LIMITS))
                for name, settings in balancing.items()
            }
            async with sides["affinity"], sides["random"]:
                for controller in sides.values():
                    await controller.wait_for_workers(len(workers), timeout=60)
                ratios = await _rounds(sides, options)
                warm, cold, tokens = await _long(sides["affinity"], options)
    print(f"\nmedians of {options.rounds} rounds; load of the machine {os.getloadavg()[0]:.1f}:")
    print(f"  {median(ratios):.2f} of the time to first token at random, with affinity (wanted: 0.7)")
    of_long = median(one / other for one, other in zip(warm, cold, strict=True))
    print(
        f"  {of_long:.2f} of that of another worker, on its own, after {tokens:.0f} tokens "
        f"({median(warm):.1f} ms to {median(cold):.1f} ms; wanted: 0.15)"
    )
    return 0


# === growing turns ===


async def _rounds(sides: dict[str, ControllerNode], options: argparse.Namespace) -> list[float]:
    ratios = []
    sessions = itertools.count()
    for number in range(options.rounds + 1):
        names = list(sides) if number % 2 else list(sides)[::-1]
        times = {
            name: await _conversations(sides[name], [next(sessions) for _ in range(options.sessions)])
            for name in names
        }
        if number:  # round 0 warms up
            ratios.append(mean(times["affinity"]) / mean(times["random"]))
        shown = ", ".join(f"{name} {mean(each):.1f} ms" for name, each in sorted(times.items()))
        print(f"round {number}: mean time to first token {shown}", flush=True)
    return ratios


async def _conversations(controller: ControllerNode, sessions: list[int]) -> list[float]:
    """The times to the first token of all turns, in milliseconds."""
    waiting = iter(sessions)
    times: list[float] = []

    async def talk() -> None:
        for session in waiting:
            # Every session begins in its own way, so that no cache of another one helps.
            messages = [{"role": "system", "content": f"This is session {session}."}]
            for turn in range(_TURNS):
                messages.append({"role": "user", "content": _said(session, turn, words=60)})
                took, text, _ = await _turn(controller, messages, session_id=f"s-{session}")
                times.append(took)
                messages.append({"role": "assistant", "content": text})

    await asyncio.gather(*(talk() for _ in range(_AT_A_TIME)))
    return times


def _said(session: int, turn: int, *, words: int) -> str:
    draw = random.Random(session * 1000 + turn)
    return " ".join(draw.choice(_WORDS) for _ in range(words))


async def _turn(
    controller: ControllerNode, messages: list[dict[str, str]], *, worker_id: str | None = None, **fields: Any
) -> tuple[float, str, int]:
    """Milliseconds to the first token, the answer, and the tokens of the prompt."""
    request = InferenceRequest(model_id=fleet.NAME, messages=messages, max_tokens=_ANSWER, **fields)
    began = time.perf_counter()
    took = 0.0
    stream = await controller.handle_streaming_request(request, worker_id=worker_id)
    async with stream:
        async for _ in stream:
            took = took or (time.perf_counter() - began) * 1000
    assert stream.response is not None
    return took, stream.response.text, stream.response.usage.prompt_tokens


# === a long conversation ===


async def _long(
    controller: ControllerNode, options: argparse.Namespace
) -> tuple[list[float], list[float], float]:
    """Times to the first token of its next turn on its worker and on another one, and the tokens of the prompt."""
    warm, cold, tokens = [], [], []
    words = 100
    for number in range(options.rounds + 1):
        while True:
            messages = [{"role": "user", "content": _said(10**6 + number, words, words=words)}]
            _, text, prompt = await _turn(controller, messages, worker_id="w-1")
            if prompt >= _LONG:
                break
            words = max(words + 1, words * _LONG // prompt)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
        order = [("w-1", warm), ("w-2", cold)]
        for worker, times in order if number % 2 else order[::-1]:
            took, _, prompt = await _turn(controller, messages, worker_id=worker)
            if number:
                times.append(took)
                tokens.append(prompt)
    return warm, cold, median(tokens)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--sessions", type=int, default=8, help="sessions of a side in a round (default 8)")
    parser.add_argument("--workers", type=int, default=4, help="two at least (default 4)")
    parser.add_argument("--model", type=Path, default=fleet.MODEL, help="the model's folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
