"""Usage: python benches/worker.py [--rounds N] [--requests N] [--tokens N] [--model FOLDER].

What an mlx-lm worker makes of the model: mlx-lm's BatchGenerator driven directly in one process, against the same work
through controller, NATS and worker, and through mlx_lm.server over HTTP, one after the other within each round.
docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import fleet
from sides import Process

from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.nats_server import NatsServer

_MANY = 16
_PATIENCE = 300.0


@dataclass(frozen=True)
class Load:
    """The work of one side in one round: so many answers of so many tokens, so many of them at a time."""

    requests: int
    concurrency: int
    tokens: int  # of an answer, on average
    even: bool  # every answer has as many
    first: int  # the number of the first request: no two are the same, so that no cache has their prompts

    def messages(self, number: int) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": f"This is request number {self.first + number}."},
            {"role": "user", "content": "Tell me a story."},
        ]

    def limit(self, number: int) -> int:
        """The most tokens of an answer: between half and one and a half times the average, the same on every side.

        Answers of one length would begin and end together, sixteen by sixteen, and nobody would ever join a batch.
        """
        share = 1.0 if self.even else 0.5 + Random(number).random()
        return max(1, round(self.tokens * share))


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    if len(sys.argv) == 3 and sys.argv[1] in _ROLES:
        _ROLES[sys.argv[1]](json.loads(sys.argv[2]))
        return 0
    return fleet.conduct(_run(_options()))


async def _run(options: argparse.Namespace) -> int:
    rounds: list[dict[str, float]] = []
    with NatsServer(port=0) as nats:
        setup = {
            "model": str(options.model),
            "concurrency": _MANY,
            "port": _free_port(),
        }
        started = [_started(role, setup) for role in _ROLES]
        started.append(fleet.start(nats.url, "w", model=options.model, max_concurrent=_MANY))
        with fleet.ready(started) as (direct, *_):
            async with ControllerNode(fleet.config(nats.url)) as controller:
                await controller.wait_for_workers(1, timeout=60)
                for number in range(options.rounds + 1):
                    measured = await _round(controller, direct, setup, options, number)
                    if number:  # round 0 warms up
                        rounds.append(measured)
                    print(f"round {number}: " + _shown(measured), flush=True)
    of_direct = median(each["through"] / each["direct"] for each in rounds)
    of_one = median(each["through"] / each["alone"] for each in rounds)
    of_server = median(each["through"] / each["server"] for each in rounds)
    direct_of_server = median(each["direct"] / each["server"] for each in rounds)
    print(f"\n{_MANY} at a time through controller, NATS and worker, medians of {len(rounds)} rounds:")
    print(f"  {of_direct:.2f} of BatchGenerator driven directly (wanted: 0.9)")
    print(f"  {of_one:.2f} times our own, one at a time (wanted: 4)")
    print(f"  {of_server:.2f} times mlx_lm.server over HTTP (wanted: 1.5);")
    print(f"  BatchGenerator driven directly makes {direct_of_server:.2f} times as many as mlx_lm.server")
    return 0


async def _round(
    controller: ControllerNode,
    direct: Process,
    setup: dict[str, Any],
    options: argparse.Namespace,
    number: int,
) -> dict[str, float]:
    def load(part: int, requests: int, concurrency: int) -> Load:
        first = (4 * number + part) * 10_000
        return Load(requests, concurrency, options.tokens, options.even, first)

    async def drive() -> float:
        work = load(0, options.requests, _MANY)
        answer = await asyncio.to_thread(direct.ask, vars(work), _PATIENCE)
        return float(answer["tokens_per_second"])

    sides = {
        "direct": drive,
        "through": lambda: _through(controller, load(1, options.requests, _MANY)),
        "alone": lambda: _through(controller, load(2, max(1, options.requests // 8), 1)),
        "server": lambda: _over_http(setup, load(3, options.requests, _MANY)),
    }
    names = list(sides)
    turned = names[number % 4 :] + names[: number % 4]  # whatever a side leaves behind falls on all places
    return {name: await sides[name]() for name in turned}


async def _through(controller: ControllerNode, load: Load) -> float:
    """Tokens each second, as the callers see them."""
    numbers = iter(range(load.requests))
    counted = 0

    async def caller() -> None:
        nonlocal counted
        for number in numbers:
            request = InferenceRequest(
                model_id=fleet.NAME,
                messages=load.messages(number),
                max_tokens=load.limit(number),
            )
            stream = await controller.handle_streaming_request(request)
            async for batch in stream.batches():
                counted += sum(len(event.token_ids) for event in batch)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(load.concurrency)))
    return counted / (time.perf_counter() - began)


async def _over_http(setup: dict[str, Any], load: Load) -> float:
    """The same of mlx_lm.server, as streams."""

    def ask(number: int) -> int:
        body = {
            "model": setup["model"],
            "messages": load.messages(number),
            "max_tokens": load.limit(number),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{setup['port']}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            told = [line for line in answer if b'"completion_tokens"' in line]
            return int(json.loads(told[-1].removeprefix(b"data: "))["usage"]["completion_tokens"])

    with ThreadPoolExecutor(load.concurrency) as callers:
        began = time.perf_counter()
        counts = await asyncio.gather(
            *(
                asyncio.get_running_loop().run_in_executor(callers, ask, number)
                for number in range(load.requests)
            )
        )
        return sum(counts) / (time.perf_counter() - began)


def _shown(measured: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {measured[name]:.0f} tokens/s" for name in ("direct", "through", "alone", "server")
    )


# === the processes ===


def _started(role: str, setup: dict[str, Any]) -> Process:
    return Process(role, [sys.executable, __file__, role, json.dumps(setup)])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _direct(setup: dict[str, Any]) -> None:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import BatchGenerator

    if mx.default_device().type == mx.cpu:
        mx.disable_compile()
    model, tokenizer = mlx_lm.load(setup["model"])
    _say({"ready": True})
    while line := sys.stdin.readline():
        load = Load(**json.loads(line))
        began = time.perf_counter()
        generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in tokenizer.eos_token_ids],
            completion_batch_size=load.concurrency,
            prefill_batch_size=8,
            prefill_step_size=512,
        )
        waiting = [
            (
                tokenizer.apply_chat_template(load.messages(number), add_generation_prompt=True),
                load.limit(number),
            )
            for number in range(load.requests)
        ]
        running = counted = 0
        while waiting or running:
            while waiting and running < load.concurrency:
                prompt, limit = waiting.pop()
                generator.insert([prompt], max_tokens=[limit])
                running += 1
            _, tokens = generator.next()
            counted += len(tokens)
            running -= sum(each.finish_reason is not None for each in tokens)
        generator.close()
        _say({"tokens_per_second": counted / (time.perf_counter() - began)})


def _server(setup: dict[str, Any]) -> None:
    from http.server import HTTPServer

    from mlx_lm import server

    def watch() -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", setup["port"]), 1.0):
                break
            time.sleep(0.05)
        _say({"ready": True})
        sys.stdin.read()
        os._exit(0)

    HTTPServer.request_queue_size = 128  # it turns away callers that come all at once
    threading.Thread(target=watch, daemon=True).start()
    options = ["--model", setup["model"], "--port", str(setup["port"]), "--log-level", "ERROR"]
    sys.argv = ["mlx_lm.server", *options]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        server.main()


_ROLES = {"direct": _direct, "server": _server}


# === options ===


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--requests", type=int, default=96, help="requests of a side in a round (default 96)")
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens of an answer, on average (default 128)"
    )
    parser.add_argument(
        "--even", action="store_true", help="answers of one length instead of half to one and a half"
    )
    parser.add_argument("--model", type=Path, default=fleet.MODEL, help="the model's folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
