"""Usage: python benches/front.py [--rounds N] [--seconds S] [--http h11|httptools].

What the web front-end costs on top of uvicorn and of the bare controller: uvicorn with uvloop in one process, a worker
in the same process and in Rust. docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from sides import Process, SideError

from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.testing import ScriptedWorker, answer

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
    print(
        f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; uvicorn with {options.http}"
    )
    try:
        uvloop.run(_run(options))
    except SideError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    processes = {role: Process(role, _command(role, options.http)) for role in _ROLES}
    try:
        ports = {role: process.read(30.0)["port"] for role, process in processes.items()}
        rounds = []
        for number in range(options.rounds + 1):
            measured = await _round(ports, options.seconds, first=list(_ROLES)[number % 2])
            if number:  # the first warms up
                rounds.append(measured)
                print(_shown(measured), flush=True)
    finally:
        for process in processes.values():
            process.end()
            process.wait()
    print("\nmedians of the rounds:")
    print(_shown({name: median(one[name] for one in rounds) for name in rounds[0]}))


async def _round(ports: dict[str, int], seconds: float, first: str) -> dict[str, float]:
    measured: dict[str, float] = {}
    for role in sorted(_ROLES, key=lambda role: role != first):
        load = Load(ports[role], _body("whole", stream=False), stream=False)
        found = await load.run(_MANY, seconds)
        measured[f"{role}_rate"] = found.requests / found.seconds
        measured[f"{role}_cpu_us"] = found.cpu / found.requests * 1e6
        measured[f"{role}_loop_us"] = found.loop / found.requests * 1e6
        alone = await load.run(1, seconds / 2)
        measured[f"{role}_p50_us"] = median(alone.latencies) * 1e6
    stream = Load(ports["front"], _body("burst", stream=True), stream=True)
    found = await stream.run(_MANY, seconds)
    measured["token_cpu_us"] = found.cpu / (found.requests * _TOKENS) * 1e6
    measured["tokens_rate"] = found.requests * _TOKENS / found.seconds
    paced = Load(ports["front"], _body("paced", stream=True), stream=True)
    found = await paced.run(1, seconds)
    measured["first_byte_us"] = median(found.latencies) * 1e6
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
        f"  first byte of a stream {of['first_byte_us']:.0f} us, first token of the bare controller"
        f" {of['bare_first_token_us']:.0f} us, added {of['first_byte_added_us']:.0f} us\n"
        f"streams in bursts, {_MANY} at a time: CPU of the process {of['token_cpu_us']:.2f} us a token,"
        f" {of['tokens_rate']:,.0f} tokens/s"
    )


# === load ===


class Found:
    """What a run found: seconds of CPU are the server's, latencies of streams those to their first event."""

    def __init__(self) -> None:
        self.requests = 0
        self.seconds = 0.0
        self.cpu = 0.0  # of the process
        self.loop = 0.0  # of the thread of its event loop
        self.latencies: list[float] = []


class Load:
    """Requests to one address, each connection's next when its last has ended."""

    def __init__(self, port: int, body: bytes, *, stream: bool) -> None:
        self._port = port
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        self.request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        self.stream = stream

    async def run(self, concurrency: int, seconds: float) -> Found:
        found = Found()
        loop = asyncio.get_running_loop()
        before = await _get(self._port, "/cpu")
        started = time.perf_counter()
        connections = [_Connection(self, found, started + seconds) for _ in range(concurrency)]
        for connection in connections:
            await loop.create_connection(lambda one=connection: one, "127.0.0.1", self._port)
        await asyncio.gather(*(connection.ended for connection in connections))
        found.seconds = time.perf_counter() - started
        after = await _get(self._port, "/cpu")
        found.cpu = after["process"] - before["process"]
        found.loop = after["loop"] - before["loop"]
        return found


class _Connection(asyncio.Protocol):
    def __init__(self, load: Load, found: Found, until: float) -> None:
        self._load = load
        self._found = found
        self._until = until
        self._received = b""
        self._begun = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._received = b""
        self._first = False
        self._begun = time.perf_counter()
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        if self._load.stream:
            if not self._first and b"data: " in data:
                self._first = True
                self._found.latencies.append(time.perf_counter() - self._begun)
            self._received = self._received[-32:] + data
            if not self._received.endswith(b"0\r\n\r\n"):
                return
            complete = b"[DONE]" in self._received
        else:
            self._received += data
            head, separator, body = self._received.partition(b"\r\n\r\n")
            if not separator or len(body) < int(head.lower().partition(b"content-length: ")[2].split()[0]):
                return
            self._found.latencies.append(time.perf_counter() - self._begun)
            complete = head.startswith(b"HTTP/1.1 200")
        if not complete:
            self.ended.set_exception(SideError(f"no good answer: {self._received[-300:]!r}"))
            return
        self._found.requests += 1
        if time.perf_counter() < self._until:
            self._ask()
        else:
            self._transport.close()
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(SideError(f"the server closed a connection: {error}"))


def _body(model: str, *, stream: bool) -> bytes:
    return json.dumps({"model": model, "messages": _MESSAGES, "stream": stream}).encode()


async def _get(port: int, path: str) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n".encode())
    answered = await reader.read()
    writer.close()
    found: dict[str, Any] = json.loads(answered.partition(b"\r\n\r\n")[2])
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
    import uvicorn

    async def cpu() -> dict[str, float]:
        return {"process": time.process_time(), "loop": time.thread_time()}

    app.get("/cpu")(cpu)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=setup["http"], access_log=False, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def end_with_input() -> None:
        sys.stdin.read()
        server.should_exit = True

    loop.run_in_executor(None, end_with_input)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    await server.serve(sockets=[listener])


_ROLES = {"front": _front, "constant": _constant}


def _command(role: str, http: str) -> list[str]:
    return [sys.executable, "-B", str(Path(__file__).resolve()), role, json.dumps({"http": http})]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load in each round")
    parser.add_argument("--http", choices=["h11", "httptools"], default="httptools")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
