"""The commands that look at a fleet or use it: against real servers, and in a terminal where they want one."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlx_serving_router import ClusterConfig, ControllerErrorCode, WorkerNode, _chat, _doctor, _top
from mlx_serving_router.cli import app
from mlx_serving_router.testing import ANSWER, TestCluster, answer, fail, stall
from programs import MODEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from click.testing import Result

    from mlx_serving_router import InferenceRequest
    from mlx_serving_router.nats_server import NatsServer

ROUTER = (sys.executable, "-B", "-m", "mlx_serving_router")


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "120"})


@pytest.fixture
def cluster() -> Iterator[TestCluster]:
    with TestCluster(2, transport="local") as cluster:
        yield cluster


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.written = ""
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [*ROUTER, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True,
            start_new_session=True, preexec_fn=_controls_its_terminal,  # noqa: PLW1509 one thread here
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, *words: str, seconds: float = 20) -> str:
        """Everything that was written since the last look, once all of these are in it."""
        deadline, new = time.monotonic() + seconds, ""
        while not all(word in new for word in words):
            left = deadline - time.monotonic()
            assert left > 0, f"{words} did not come: {self.written}"
            if select.select([self._ours], [], [], left)[0]:
                try:
                    read = os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # its end has gone
                    read = ""
                assert read, f"it ended before {words}: {self.written}"
                new += read
                self.written += read
        return new


def _controls_its_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


# === chat ===


def test_a_question_is_answered_with_nothing_but_the_answer(cluster: TestCluster) -> None:
    told = run("chat", "--url", cluster.api_url, "Hello", "there")
    assert (told.exit_code, told.output) == (0, f"{ANSWER}\n")
    asked = [request for worker in cluster.workers for request in worker.requests]
    assert asked[0].request.messages == [{"role": "user", "content": "Hello there"}]
    run("chat", "--url", cluster.api_url, "Sum this up:", stdin="A text.\n")
    asked = [request for worker in cluster.workers for request in worker.requests]
    assert [{"role": "user", "content": "Sum this up:\n\nA text."}] in [one.request.messages for one in asked]


def test_a_question_may_come_on_standard_input_with_all_that_a_model_is_told(cluster: TestCluster) -> None:
    options = ("--system", "Be short.", "--max-tokens", "7", "--temperature", "0.5", "--model", "tiny")
    address = cluster.api_url.removeprefix("http://")
    told = run("chat", "--url", f"{address}/v1/", *options, stdin="Hello?\n")
    assert (told.exit_code, told.output) == (0, f"{ANSWER}\n")
    (asked,) = [received.request for worker in cluster.workers for received in worker.requests]
    assert asked.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello?"},
    ]
    assert (asked.max_tokens, asked.temperature) == (7, 0.5)


def test_chat_tells_what_is_wrong(cluster: TestCluster, closed: int) -> None:
    nobody = run("chat", "--url", f"http://127.0.0.1:{closed}", "Hello")
    assert nobody.exit_code == 1
    assert "nobody answers at" in nobody.output
    assert "--url" in nobody.output
    assert "MODEL_NOT_FOUND" in run("chat", "--url", cluster.api_url, "-m", "huge", "Hello").output
    for worker in cluster.workers:
        worker.script = fail()
    failed = run("chat", "--url", cluster.api_url, "Hello")
    assert failed.exit_code == 1
    assert "ALL_RETRIES_EXHAUSTED" in failed.output or "NO_WORKERS_AVAILABLE" in failed.output
    assert "no question" in run("chat", "--url", cluster.api_url, stdin="").output


def test_a_conversation_in_a_terminal(cluster: TestCluster) -> None:
    with Terminal("chat", "--url", cluster.api_url) as terminal:
        terminal.until("tiny at", "/new", "> ")
        terminal.type("Hello\n")
        assert "tokens" in terminal.until(ANSWER, "first token after", "> ")
        for worker in cluster.workers:
            worker.script = stall(after_tokens=2)
        terminal.type("And now?\n")
        terminal.until("Hello")
        terminal.type("\x03")  # Ctrl-C
        terminal.until("stopped", "> ")
        for worker in cluster.workers:
            worker.script = answer("Fine.")
        terminal.type("Once more\n")
        terminal.until("Fine.", "> ")
        terminal.type("\x04")  # the end of input
        assert terminal.process.wait(10) == 0
    (busy,) = [worker for worker in cluster.workers if worker.requests]
    assert len(busy.cancels) == 1, "Ctrl-C reached the worker"
    contents = [message["content"] for message in busy.requests[-1].request.messages]
    assert contents[:3] == ["Hello", ANSWER, "And now?"]
    assert contents[-1] == "Once more"
    assert len({received.request.session_id for received in busy.requests}) == 1


def test_no_rate_is_told_of_an_answer_that_came_at_once() -> None:
    turn = _chat._Turn(tokens=11, begun=0.0, first=1.0, last=1.0002)
    assert turn.facts("") == "the first token after 1000 ms, 11 tokens"
    turn.last = 2.0
    assert turn.facts("").endswith("11 tokens, 10 tokens/s")


# === bench ===


def test_bench_counts_what_succeeds_and_what_fails(cluster: TestCluster) -> None:
    cluster.workers[0].script = fail("REQUEST_VALIDATION_FAILED")
    told = run("bench", "--url", cluster.api_url, "-n", "40", "-c", "4", "--json")
    assert told.exit_code == 0
    figures = json.loads(told.stdout)
    failed = figures["failed"]["REQUEST_VALIDATION_FAILED"]
    assert figures["succeeded"] + failed == 40
    assert figures["workers"] == {cluster.workers[1].worker_id: figures["succeeded"]}
    assert figures["tokens"] > 0
    for name in ("firstTokenMs", "betweenTokensMs", "durationMs"):
        times = list(figures[name].values())
        assert list(figures[name]) == ["mean", "p50", "p90", "p95", "p99", "max"]
        assert times[1:] == sorted(times[1:])


def test_bench_has_a_table_for_people(cluster: TestCluster) -> None:
    told = run("bench", "--url", cluster.api_url, "-n", "9", "--no-stream")
    assert told.exit_code == 0
    assert "whole answer" in told.stdout
    assert "p99" in told.stdout
    assert "first token" not in told.stdout
    for worker in cluster.workers:
        worker.script = fail("REQUEST_VALIDATION_FAILED")
    told = run("bench", "--url", cluster.api_url, "-n", "9")
    assert told.exit_code == 1
    assert "9 REQUEST_VALIDATION_FAILED" in told.stdout


def test_bench_goes_on_where_some_find_nobody_and_says_so_where_all_do(closed: int) -> None:
    told = run("bench", "--url", f"http://127.0.0.1:{closed}", "-m", "tiny", "-n", "5")
    assert told.exit_code == 1
    assert told.output.count("nobody answers at") == 1
    assert "ExceptionGroup" not in told.output


# === top ===


def test_top_shows_names_as_they_are(cluster: TestCluster) -> None:
    run("chat", "--url", cluster.api_url, "-m", "[/x] [red]m", "Hello")
    told = run("top", "--url", cluster.api_url)
    assert told.exit_code == 0
    assert "[/x] [red]m" in told.output


def test_top_shows_the_fleet_once_where_there_is_no_terminal(cluster: TestCluster) -> None:
    run("chat", "--url", cluster.api_url, "Hello")
    told = run("top", "--url", cluster.api_url)
    assert told.exit_code == 0
    for words in ("2 of 2 online", cluster.workers[0].worker_id, "CLOSED", "succeeded", "tiny"):
        assert words in told.output


def test_top_is_live_in_a_terminal_and_ends_with_ctrl_c(cluster: TestCluster) -> None:
    with Terminal("top", "--url", cluster.api_url, "--every", "0.1") as terminal:
        terminal.until("none yet")
        run("chat", "--url", cluster.api_url, "Hello")
        terminal.until("succeeded")
        cluster.controller.force_open_circuit_breaker(cluster.workers[0].worker_id)
        terminal.until("FORCED_OPEN")
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.process.wait(10) == 130


def test_a_screen_of_80_columns_has_names_give_way_and_nothing_else() -> None:
    codes = [str(code) for code in ControllerErrorCode]
    request = {
        "requestId": "0123456789abcdef", "modelId": "mlx-community/Llama-3.2-3B-Instruct-4bit", "tokens": 100000,
        "selectedWorker": "studio-of-somebody-upstairs", "attempts": [{}] * 3, "timeToFirstTokenMs": 999,
        "durationMs": 59_940.0, "status": "succeeded", "finalError": None,
    }  # fmt: skip
    failed = [{**request, "status": "failed", "finalError": {"code": code}} for code in codes]
    cancelled = {**request, "status": "cancelled", "finalError": {"code": "CANCELLED"}}
    worker = {
        "workerId": "studio-of-somebody-upstairs", "status": "degraded", "phase": "draining", "inFlight": 128,
        "breaker": "FORCED_OPEN", "lastSeenMs": 999, "models": ["mlx-community/Llama-3.2-3B-Instruct-4bit"] * 2,
    }  # fmt: skip
    status = {
        "state": "ready",
        "workers": {"online": 1, "total": 1},
        "requests": {"active": 0, "queued": 0, "completed": 9},
    }
    screen = Console(width=80, file=io.StringIO(), record=True)
    screen.print(
        _top.render(_top.View(0.0, status, [worker], [*failed, cancelled, request]), None, 60, "http://host")
    )
    lines = screen.export_text().splitlines()
    assert max(len(line) for line in lines) <= 80
    (shown,) = [line.split() for line in lines if "FORCED_OPEN" in line]
    assert shown[1:7] == ["degraded", "draining", "FORCED_OPEN", "128", "999", "ms"]
    assert shown[0].startswith("studio")
    words = [line.split() for line in lines if line.startswith("0123")]
    assert [line[-1] for line in words] == ["succeeded", "cancelled", *reversed(codes)]
    for line in words:
        assert line[-7:-1] == ["3", "999", "ms", "59.9", "s", "100000"]
        assert line[2].startswith("studio")


class Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None: ...


def test_top_says_when_it_is_no_router_that_answers() -> None:
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            told = run("top", "--url", f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()
            thread.join()
    assert told.exit_code == 1
    assert "no front-end of this router" in told.output


# === doctor ===


@pytest.mark.nats
async def test_doctor_finds_the_fleet_and_what_is_wrong_with_it(
    nats: NatsServer, tmp_path: Path, closed: int
) -> None:
    settings = {"nats": {"mode": "external", "serverUrl": nats.url, "subjectPrefix": "doctor."}}
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({**settings, "controller": {"port": closed}}))

    async def echo(_request: InferenceRequest) -> AsyncIterator[str]:
        yield "x"

    async with WorkerNode(echo, config=settings, worker_id="w-1", models=["tiny"]):
        command = [*ROUTER, "doctor", "-c", str(file), "-m", f"tiny={MODEL}", "-m", "gone=/nowhere"]
        ended = await _ended(command)
    assert ended.returncode == 1
    lines = [line.split(None, 2) for line in ended.stdout.splitlines()]
    findings = {(level, what): text for level, what, text in lines}
    assert "Python" in findings["ok", "versions"]
    assert findings["ok", "config"] == str(file)
    assert "1,048,576 bytes" in findings["ok", "NATS"]
    assert "w-1 on " in findings["ok", "worker"]
    assert "one worker serves it" in findings["note", "model"]
    assert "is free" in findings["ok", "port"]
    assert "/nowhere" in findings["wrong", "model"]


async def _ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )


def test_doctor_says_what_keeps_a_set_up_from_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor, "_PATIENCE", 0.2)  # for the other program, which never answers
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = tmp_path / "cluster.yaml"
        file.write_text(
            f"nats: {{mode: external, serverUrl: 'nats://127.0.0.1:1'}}\ncontroller: {{port: {port}}}\n"
            "workers: {static: [{workerId: s, url: 'http://127.0.0.1:1'}]}\n"
        )
        told = run("doctor", "-c", str(file))
    assert told.exit_code == 1
    assert "cannot connect to NATS" in told.output
    assert f"{port} on 127.0.0.1 is taken by another program" in told.output
    assert "nobody answers at http://127.0.0.1:1" in told.output
    file.write_text("controler: {}\n")
    told = run("doctor", "-c", str(file))
    assert told.exit_code == 1
    assert "did you mean controller" in told.output


def test_doctor_knows_another_service_from_a_front_end(tmp_path: Path) -> None:
    class Other(Elsewhere):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            file = tmp_path / "cluster.yaml"
            file.write_text(f"nats: {{mode: none}}\ncontroller: {{port: {other.server_port}}}\n")
            told = run("doctor", "-c", str(file), "-m", "gone=/nowhere")
        finally:
            other.shutdown()
            thread.join()
    assert f"{other.server_port} on 127.0.0.1 is taken by another program" in told.output
    assert "/nowhere" in told.output


def test_doctor_believes_the_configuration_where_a_server_has_no_list_of_models(tmp_path: Path) -> None:
    class Listless(Elsewhere):
        """As `mlx_lm.server` on a machine without a cache: it breaks off where it would list its models."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            if self.path == "/health":
                self.wfile.write(b'{"status": "ok"}')

    with HTTPServer(("127.0.0.1", 0), Listless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            file = tmp_path / "cluster.yaml"
            url = f"http://127.0.0.1:{server.server_port}"
            file.write_text(
                "nats: {mode: none}\ncontroller: {port: 0}\nworkers:\n  static:\n"
                f"    - {{workerId: told, url: '{url}', models: ['tiny=default_model', other]}}\n"
                f"    - {{workerId: untold, url: '{url}'}}\n"
            )
            told = run("doctor", "-c", str(file))
        finally:
            server.shutdown()
            thread.join()
    assert f"told at {url}: tiny, other" in told.output
    assert (
        f"untold: {url}/v1/models has no list that could be read; name its models in the key models"
        in told.output
    )
    assert told.exit_code == 1


def test_doctor_knows_a_front_end_that_runs(cluster: TestCluster, tmp_path: Path) -> None:
    port = cluster.api_url.rpartition(":")[2]
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"nats: {{mode: none}}\ncontroller: {{port: {port}}}\n"
        f"workers: {{static: [{{workerId: s, url: '{cluster.api_url}'}}]}}\n"
    )
    told = run("doctor", "-c", str(file))
    assert told.exit_code == 0
    assert "is ready, with 2 workers" in told.output
    assert f"s at {cluster.api_url}: tiny" in told.output
    for worker in cluster.workers:
        cluster.controller.force_open_circuit_breaker(worker.worker_id)
    (line,) = [line for line in run("doctor", "-c", str(file)).output.splitlines() if "is not ready" in line]
    assert line.startswith("note")
    assert "none of 2 workers can serve" in line


# === config ===


def test_config_validate_says_nothing_or_where_it_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("requestRouting:\n  retry:\n    maxRetries: 3\n")
    told = run("config", "validate", str(file))
    assert (told.exit_code, told.output) == (0, "")
    file.write_text("requestRouting:\n  retry:\n    maxRetris: 3\n")
    told = run("config", "validate", str(file))
    assert told.exit_code == 1
    assert f"{file}:3:5: requestRouting.retry.maxRetris: unknown key; did you mean maxRetries?" in told.output


def test_what_a_controller_refuses_is_found_before_one_is_started(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nats: {mode: none}\nrequestRouting: {hedging: {enabled: true}}\n")
    for command in (
        ("config", "validate", str(file)),
        ("doctor", "-c", str(file)),
        ("serve", "-c", str(file)),
    ):
        told = run(*command)
        assert told.exit_code == 1, told.output
        assert f"{file}: requestRouting.hedging.enabled: hedging is not available" in told.output
        assert "http://" not in told.output, "nothing was started"


def test_config_show_hides_secrets_and_knows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("controller: {apiKeys: [sesame]}\n")
    monkeypatch.setenv("MLX_ROUTER__CONTROLLER__PORT", "81")
    told = run("config", "show", "-c", str(file))
    assert told.exit_code == 0
    assert "sesame" not in told.output
    shown = json.loads(told.output)
    assert shown["controller"]["apiKeys"] == ["***"]
    assert shown["controller"]["port"] == 81


def test_config_schema_is_the_modules() -> None:
    told = run("config", "schema")
    assert json.loads(told.output) == ClusterConfig.json_schema()


def test_shells_can_complete() -> None:
    told = run("--show-completion", "bash")
    assert "mlx-serving-router" in told.output or "complete" in told.output
