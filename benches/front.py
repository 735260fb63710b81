"""Usage: python benches/front.py [--rounds N] [--seconds S] [--http h11|httptools] [--output FOLDER].

What the web front-end costs on top of uvicorn and of the bare controller: uvicorn with uvloop in one process, a worker
in the same process and in Rust. docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import kept
import report
import uvloop
from measure import WrongAnswerError
from over_http import Load, get, serve
from sides import Process, SideError

from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.testing import ScriptedWorker, answer

if TYPE_CHECKING:
    from measure import Outcome

_MANY = 64
_TOKENS = 512
_ANSWER = "The quick brown fox jumps over the lazy dog. " * 4
_MESSAGES = [{"role": "user", "content": "Tell me about foxes and dogs, please."}]


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    if len(sys.argv) == 3 and sys.argv[1] in _ROLES:
        uvloop.run(_ROLES[sys.argv[1]](json.loads(sys.argv[2])))
        return 0
    options = _options()
    try:
        machine = kept.machine()
        print(*(f"{name}: {value}" for name, value in machine.items()), sep="\n")
        load = os.getloadavg()[0]
        print(f"load before: {load:.1f}; uvicorn with {options.http}")
        rounds = uvloop.run(_run(options))
    except (SideError, WrongAnswerError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    summary = {name: report.spread([one[name] for one in rounds]) for name in rounds[0]}
    print("\nmedians of the rounds:")
    print(_shown({name: spread["median"] for name, spread in summary.items()}))
    front = {"http": options.http, "seconds_per_round": options.seconds, "summary": summary, "rounds": rounds}
    path = kept.keep(options.output, {"machine": machine, "load_before": load, "front": front})
    print(f"all figures: {path}")
    return 0


async def _run(options: argparse.Namespace) -> list[dict[str, float]]:
    processes = {role: Process(role, _command(role, options.http)) for role in _ROLES}
    rounds = []
    try:
        ports = {role: process.read(30.0)["port"] for role, process in processes.items()}
        for number in range(options.rounds + 1):
            measured = await _round(ports, options.seconds, first=list(_ROLES)[number % 2])
            if number:  # the first warms up
                rounds.append(measured)
                print(_shown(measured), flush=True)
    finally:
        for process in processes.values():
            process.end()
            process.wait()
    return rounds


async def _round(ports: dict[str, int], seconds: float, first: str) -> dict[str, float]:
    measured: dict[str, float] = {}
    for role in sorted(_ROLES, key=lambda role: role != first):
        load = Load(ports[role], _body("whole", stream=False), stream=False)
        found = await _loaded(load, _MANY, seconds)
        measured[f"{role}_rate"] = found.rate
        measured[f"{role}_cpu_us"] = found.cpu / found.requests * 1e6
        measured[f"{role}_loop_us"] = found.loop / found.requests * 1e6
        alone = await load.alone(seconds / 2)
        measured[f"{role}_p50_us"] = median(alone.latencies_ns) / 1e3
    stream = Load(ports["front"], _body("burst", stream=True), stream=True)
    found = await _loaded(stream, _MANY, seconds)
    measured["token_cpu_us"] = found.cpu / (found.requests * _TOKENS) * 1e6
    measured["tokens_rate"] = found.rate * _TOKENS
    paced = Load(ports["front"], _body("paced", stream=True), stream=True)
    alone = await paced.alone(seconds)
    measured["first_byte_us"] = median(alone.first_byte_ns) / 1e3
    measured["first_event_us"] = median(alone.first_token_ns) / 1e3
    bare = await _get(ports["front"], "/bare")
    measured["bare_first_token_us"] = bare["first_token_us"]
    measured["rate_ratio"] = measured["front_rate"] / measured["constant_rate"]
    measured["cpu_ratio"] = measured["constant_cpu_us"] / measured["front_cpu_us"]
    measured["loop_ratio"] = measured["constant_loop_us"] / measured["front_loop_us"]
    measured["first_byte_added_us"] = measured["first_byte_us"] - measured["bare_first_token_us"]
    return measured


def _shown(of: dict[str, float]) -> str:
    return (
        f"buffered, {_MANY} at a time: {of['front_rate']:,.0f}/s, a constant {of['constant_rate']:,.0f}/s,"
        f" ratio {of['rate_ratio']:.2f}\n"
        f"  CPU of the loop's thread {of['front_loop_us']:.0f} and {of['constant_loop_us']:.0f} us,"
        f" ratio {of['loop_ratio']:.2f}; of the process {of['front_cpu_us']:.0f} and {of['constant_cpu_us']:.0f} us,"
        f" ratio {of['cpu_ratio']:.2f}\n"
        f"alone: p50 {of['front_p50_us']:.0f} us, a constant {of['constant_p50_us']:.0f} us\n"
        f"  first byte of a stream {of['first_byte_us']:.0f} us, first event {of['first_event_us']:.0f} us,"
        f" first token of the bare controller {of['bare_first_token_us']:.0f} us,"
        f" added {of['first_byte_added_us']:.0f} us\n"
        f"streams in bursts, {_MANY} at a time: CPU of the process {of['token_cpu_us']:.2f} us a token,"
        f" {of['tokens_rate']:,.0f} tokens/s"
    )


# === load ===


async def _loaded(load: Load, concurrency: int, seconds: float) -> _Found:
    """A round, with the CPU of the server's process and of the thread of its event loop."""
    before = await _get(load.port, "/cpu")
    outcome = await load.run(concurrency, seconds)
    after = await _get(load.port, "/cpu")
    return _Found(outcome, after["process"] - before["process"], after["loop"] - before["loop"])


@dataclass(frozen=True)
class _Found:
    outcome: Outcome
    cpu: float  # seconds of the process
    loop: float  # seconds of the thread of its event loop

    @property
    def requests(self) -> int:
        return len(self.outcome.latencies_ns)

    @property
    def rate(self) -> float:
        return self.requests / self.outcome.seconds


def _body(model: str, *, stream: bool) -> bytes:
    return json.dumps({"model": model, "messages": _MESSAGES, "stream": stream}).encode()


async def _get(port: int, path: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(await get(port, path))
    return found


# === servers ===


async def _front(setup: dict[str, Any]) -> None:
    from mlx_serving_router.fastapi import create_app

    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        pieces = [f"word{number} " for number in range(_TOKENS)]
        with (
            ScriptedWorker(answer(_ANSWER), controller=controller, models=["whole"]),
            ScriptedWorker(answer(*pieces), controller=controller, models=["burst"]),
            ScriptedWorker(answer(*pieces[:4], token_delay_ms=1), controller=controller, models=["paced"]),
        ):
            app = create_app(controller=controller)

            async def bare() -> dict[str, float]:
                times = []
                for _ in range(300):
                    request = InferenceRequest(model_id="paced", messages=_MESSAGES)
                    began = time.perf_counter()
                    stream = await controller.handle_streaming_request(request)
                    times.append(time.perf_counter() - began)
                    async with stream:
                        async for _events in stream.batches():
                            pass
                return {"first_token_us": median(times) * 1e6}

            app.get("/bare")(bare)
            await _serve(app, setup)


async def _constant(setup: dict[str, Any]) -> None:
    from fastapi import FastAPI, Request, Response

    message = {"role": "assistant", "content": _ANSWER, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    whole = json.dumps({"id": "chatcmpl-0", "object": "chat.completion", "choices": [choice]}).encode()
    app = FastAPI()

    async def constant(request: Request) -> Response:
        await request.body()
        return Response(whole, media_type="application/json")

    constant.__annotations__ = {"request": Request, "return": Response}
    app.post("/v1/chat/completions")(constant)
    await _serve(app, setup)


async def _serve(app: Any, setup: dict[str, Any]) -> None:
    async def cpu() -> dict[str, float]:
        return {"process": time.process_time(), "loop": time.thread_time()}

    app.get("/cpu")(cpu)
    await serve(app, setup["http"])


_ROLES = {"front": _front, "constant": _constant}


def _command(role: str, http: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), role, json.dumps({"http": http})]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load in each round")
    parser.add_argument("--http", choices=["h11", "httptools"], default="httptools")
    parser.add_argument("--output", type=Path, default=kept.FOLDER, help="folder for the JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
