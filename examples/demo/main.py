"""One chat, answered end to end by real parts: a NATS server, three worker processes with a model, a web front-end.

    python examples/demo/main.py [--once] [--port 8080]

It asks a question, kills the worker that answered and asks again, holds a conversation that stays on one worker, shows
what each request met, and then serves until Ctrl-C. With `--once` it ends by itself. Whatever it shows it checks: the
exit status is 1 when an answer was wrong, a conversation moved, or a process was left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_serving_router.nats_server import NatsServer, NatsServerError
from mlx_serving_router.processes import ChildProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai import OpenAI

MODEL = Path(__file__).resolve().parents[1] / "tiny-model" / "model"
WORKERS = 3
START_SECONDS = 90.0  # for machines that are busy with other things; it takes some five
QUESTION = "How many days are in a week?"
ANSWER = "A week has seven days: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."
# The last answer needs the first turn.
CONVERSATION = [
    ("My name is Ada.", "Nice to meet you, Ada."),
    ("What is two plus two?", "Two plus two is four."),
    ("What is my name?", "Your name is Ada."),
]


class DemoError(Exception):
    """Something is not as the demo promises it."""


def main() -> int:
    """Runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(description="One chat, answered end to end by real parts.")
    parser.add_argument("--once", action="store_true", help="end by itself, with exit status 0 or 1")
    parser.add_argument("--port", type=int, default=8080, help="port of the front-end (default: 8080)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Workers are killed here on purpose: what the controller says of it is shown only when the demo fails.
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.INFO)
    processes: list[Worker | int] = []
    try:
        with contextlib.ExitStack() as stack:
            fleet = Fleet.start(stack, processes, arguments.port)
            with openai_client(fleet) as client:
                show(fleet, client)
            print("\nWhat the requests met")
            table(fleet.get("/api/controller/requests"))
            if not arguments.once:
                serve(fleet)
    except (DemoError, NatsServerError, OSError) as error:
        print(f"\nThe demo failed: {error}\n\nIts log ends with:\n{log.getvalue()[-3000:]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.")
        return 130
    left = [pid for pid in map(pid_of, processes) if is_alive(pid)]
    if left:
        print(f"\nThe demo failed: still running: process {', '.join(map(str, left))}", file=sys.stderr)
        return 1
    print(f"\nAll {len(processes)} processes that it started have ended.")
    return 0


# === the parts ===


@dataclass(frozen=True)
class Fleet:
    """Everything that runs, seen as any client sees it."""

    url: str
    workers: dict[str, Worker]

    @classmethod
    def start(cls, stack: contextlib.ExitStack, processes: list[Worker | int], port: int) -> Fleet:
        """Starts the parts; the stack ends them, and `processes` gets those that are to be gone then."""
        print("Starting")
        listener = listen(port)
        nats = stack.enter_context(NatsServer(port=0))
        processes.append(nats.pid or 0)
        row("nats-server", nats.url, f"process {nats.pid}")
        begun = time.monotonic()
        workers = {}
        for name in (f"worker-{number + 1}" for number in range(WORKERS)):
            workers[name] = stack.enter_context(Worker(name, nats.url))
            processes.append(workers[name])
        url = stack.enter_context(front_end(listener, nats.url))
        row("front-end", url, f"process {os.getpid()}")
        fleet = cls(url, workers)
        waiting = dict(workers)
        while waiting:
            fleet.note_online(waiting, begun)
            if time.monotonic() > begun + START_SECONDS:
                raise DemoError(f"{', '.join(waiting)} did not start within {START_SECONDS:.0f} s")
        return fleet

    def note_online(self, waiting: dict[str, Worker], begun: float) -> None:
        time.sleep(0.05)
        online = {each["workerId"] for each in self.get("/api/cluster/workers") if each["status"] == "online"}
        for name, worker in list(waiting.items()):
            if not worker.running:
                raise DemoError(f"{name} ended with exit status {worker.status}; it said:\n{worker.said()}")
            if name in online:
                del waiting[name]
                row(name, f"online after {time.monotonic() - begun:.1f} s", f"process {worker.pid}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
            return json.load(response)


class Worker(ChildProcess):
    """The command `mlx-serving-router worker`, in a process that ends together with this one."""

    def __init__(self, name: str, nats_url: str) -> None:
        directory = Path(tempfile.mkdtemp(prefix="mlx-serving-router-demo-"))
        self._log = directory / "log"
        command = [sys.executable, "-m", "mlx_serving_router", "worker"]
        options = ["--id", name, "--nats", nats_url, "--model", f"tiny={MODEL}"]
        with self._log.open("wb") as log:
            super().__init__([*command, *options], directory=directory, output=log)

    def said(self) -> str:
        """What it logged."""
        return self._log.read_text(encoding="utf-8", errors="replace").strip()


def listen(port: int) -> socket.socket:
    """A socket on the first free port from this one on."""
    for candidate in range(port, port + 20):
        with contextlib.suppress(OSError):
            listener = socket.create_server(("127.0.0.1", candidate))
            if candidate != port:
                row("note", f"port {port} is taken by another program; using {candidate}")
            return listener
    raise DemoError(f"the ports {port} to {port + 19} are all taken: choose another one with --port")


@contextlib.contextmanager
def front_end(listener: socket.socket, nats_url: str) -> Iterator[str]:
    """The controller and its front-end, in a thread of this process."""
    import uvicorn

    from mlx_serving_router.fastapi import create_app

    app = create_app({"nats": {"mode": "external", "serverUrl": nats_url}})
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise DemoError("the front-end did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


# === the show ===


@contextlib.contextmanager
def openai_client(fleet: Fleet) -> Iterator[OpenAI]:
    from openai import OpenAI, OpenAIError

    try:
        with OpenAI(base_url=f"{fleet.url}/v1", api_key="none needed", max_retries=0, timeout=60) as client:
            row("model", ", ".join(model.id for model in client.models.list()))
            _ = (
                client.chat.completions.with_raw_response
            )  # loaded at its first use, which is not to be measured
            yield client
    except OpenAIError as error:
        raise DemoError(f"the OpenAI client met {type(error).__name__}: {error}") from error


def show(fleet: Fleet, client: OpenAI) -> None:
    print("\nA question, and its answer as it comes")
    first = ask(client, [], QUESTION, session="week", expected=ANSWER)

    print(f"\n{first.worker} is killed (SIGKILL), and the question asked again in the same session")
    fleet.workers[first.worker].kill()
    second = ask(client, [], QUESTION, session="week", expected=ANSWER)
    if second.worker == first.worker:
        raise DemoError(f"{second.worker} answered, and it had been killed")

    print("\nA conversation: it stays on one worker, and the last answer needs the first turn")
    messages: list[dict[str, str]] = []
    turns = [ask(client, messages, said, session="ada", expected=answer) for said, answer in CONVERSATION]
    if len({turn.worker for turn in turns}) != 1:
        raise DemoError(f"the conversation moved: {', '.join(turn.worker for turn in turns)} answered")


@dataclass(frozen=True)
class Answer:
    worker: str
    text: str


def ask(client: OpenAI, messages: list[dict[str, str]], said: str, *, session: str, expected: str) -> Answer:
    """One turn of a conversation, which `messages` hold and get."""
    print(f"  > {said}\n  ", end="", flush=True)
    messages.append({"role": "user", "content": said})
    begun = time.monotonic()
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-session-id": session},
    )
    text, tokens, first = "", 0, begun
    for chunk in raw.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            first = first if text else time.monotonic()
            text += chunk.choices[0].delta.content
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    seconds = time.monotonic() - begun
    worker = raw.headers["x-worker-id"]
    print(
        f"\n    {worker}: first token after {(first - begun) * 1000:.0f} ms, all {tokens} after"
        f" {seconds * 1000:.0f} ms, {tokens / seconds:.0f} tokens/s"
    )
    if text != expected:
        raise DemoError(f"to {said!r} the answer was {text!r}, not {expected!r}")
    messages.append({"role": "assistant", "content": text})
    return Answer(worker, text)


def table(requests: list[dict[str, Any]]) -> None:
    rows = [("session", "status", "first token", "total", "tokens", "attempts")]
    for request in sorted(requests, key=lambda request: request["startTime"]):
        attempts = [f"{each['workerId']} {each['code'] or 'answered'}" for each in request["attempts"]]
        rows.append(
            (
                request["sessionId"] or "-",
                request["status"],
                f"{request['timeToFirstTokenMs']:.0f} ms",
                f"{request['durationMs']:.0f} ms",
                str(request["tokens"]),
                ", then ".join(attempts),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print(
            "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
        )


def serve(fleet: Fleet) -> None:
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
    )
    # From the first word on: whoever reads it may press Ctrl-C before the last one.
    with contextlib.suppress(KeyboardInterrupt):
        print("\nServing until Ctrl-C")
        row("OpenAI", f"{fleet.url}/v1")
        row("fleet", f"{fleet.url}/api/cluster/workers")
        row("requests", f"{fleet.url}/api/controller/requests")
        row("metrics", f"{fleet.url}/metrics")
        row(
            "to try",
            f"curl -N {fleet.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        )
        while True:
            signal.pause()


# === small things ===


def row(what: str, *cells: str) -> None:
    print(f"  {what:<12}" + "".join(f"{cell:<26}" for cell in cells).rstrip(), flush=True)


def pid_of(process: Worker | int) -> int:
    return process if isinstance(process, int) else process.pid or 0


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return pid != 0


if __name__ == "__main__":
    sys.exit(main())
