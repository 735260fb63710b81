"""examples/engines: the echo engine, and the worker in front of a real mlx_lm.server, through controller and NATS."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest

from cluster import (
    ENDLESS,
    LOADING,
    MODEL,
    PATIENCE,
    ask,
    failure,
    read,
    received,
    routing,
    settings,
    text,
    until,
)
from mlx_serving_router import ControllerError, ControllerNode, InferenceRequest, WorkerNode
from programs import ROOT, free_port, load, program
from relay import Relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from mlx_serving_router.nats_server import NatsServer

pytestmark = pytest.mark.nats

ENGINES = ROOT / "examples" / "engines"
#: One attempt, so that each test meets the error of its worker itself; and time for a busy machine.
ALONE = routing(
    retry={"enabled": False},
    acceptTimeoutMs=30_000,
    timeoutMs=60_000,
    streamingTimeoutMs=60_000,
    streamIdleTimeoutMs=60_000,
)


def environment(nats: NatsServer, prefix: str) -> dict[str, str]:
    return {
        "MLX_ROUTER__NATS__MODE": "external",
        "MLX_ROUTER__NATS__SERVER_URL": nats.url,
        "MLX_ROUTER__NATS__SUBJECT_PREFIX": prefix,
    }


# === the echo engine ===


async def test_the_echo_engine_answers_several_at_a_time(
    nats: NatsServer, nats_prefix: str, tmp_path: Path
) -> None:
    def echo(prompt: str, **fields: Any) -> InferenceRequest:
        return InferenceRequest(model_id="echo", prompt=prompt, **fields)

    with program(
        sys.executable, ENGINES / "echo.py", scratch=tmp_path, **environment(nats, nats_prefix)
    ) as worker:
        async with ControllerNode(settings(nats.url, nats_prefix, **ALONE)) as controller:
            await controller.wait_for_workers(1, timeout=LOADING)
            [info] = controller.workers()
            assert (info.max_concurrent, set(info.features)) == (8, {"batch", "cancel"})
            endless = await controller.handle_streaming_request(echo("again " * 5000))
            answers = await asyncio.gather(
                *(controller.handle_buffered_request(echo(f"number {number} of ten")) for number in range(10))
            )
            assert [answer.text for answer in answers] == [f"number {number} of ten " for number in range(10)]
            assert {answer.usage.total_tokens for answer in answers} == {8}
            cut = await controller.handle_buffered_request(echo("one two three", max_tokens=2))
            assert (cut.text, cut.finish_reason) == ("one two ", "length")
            error = await failure(controller.handle_buffered_request(echo(" ")))
            assert error.code == "REQUEST_VALIDATION_FAILED"
            assert endless.response is None
            async with endless:
                assert (await anext(endless)).text.startswith("again ")
        worker.send(15)
        assert worker.ends() == 0, worker.output
        first, *_, last = worker.output.splitlines()
        assert "joins the fleet" in first
        assert "has ended" in last


def test_the_echo_engine_says_that_there_is_no_nats(tmp_path: Path, closed: int) -> None:
    nowhere = {
        "MLX_ROUTER__NATS__MODE": "external",
        "MLX_ROUTER__NATS__SERVER_URL": f"nats://127.0.0.1:{closed}",
    }
    with program(sys.executable, ENGINES / "echo.py", scratch=tmp_path, **nowhere) as worker:
        assert worker.ends() == 1
    assert "Traceback" not in worker.output
    assert "has stopped: cannot connect to NATS" in worker.output.splitlines()[-1]


# === the worker in front of a server ===


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an mlx_lm.server with the tiny model."""
    pytest.importorskip("mlx_lm")
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", MODEL, "--port", str(port)]
    with program(*command, scratch=tmp_path_factory.mktemp("server")) as started:
        started.line_with("Starting httpd")
        yield port


@asynccontextmanager
async def fleet(nats: NatsServer, prefix: str, port: int) -> AsyncIterator[ControllerNode]:
    """A controller with the example's worker, which asks the server on this port."""
    example = load(ENGINES / "openai_server.py")
    handler = example.OpenAIServer(f"http://127.0.0.1:{port}/v1", model="default_model")
    config = settings(nats.url, prefix, **ALONE)
    async with (
        WorkerNode(handler, config=config, worker_id="front", models=["tiny"]),
        ControllerNode(config) as controller,
    ):
        await controller.wait_for_workers(1, timeout=PATIENCE)
        yield controller


@pytest.mark.model
async def test_a_server_behind_a_worker_streams_and_answers(
    nats: NatsServer, nats_prefix: str, server: int
) -> None:
    async with fleet(nats, nats_prefix, server) as controller:
        stream = await controller.handle_streaming_request(ask("What is the capital of France?"))
        events = await read(stream)
        assert text(events) == "The capital of France is Paris."
        assert len(events) > 5
        assert stream.response is not None
        usage = stream.response.usage
        assert stream.response.finish_reason == "stop"
        assert usage.prompt_tokens > 0
        assert usage.completion_tokens > len(events)  # the end token is one of them, and some have no text

        answers = await asyncio.gather(
            *(controller.handle_buffered_request(ask("What do bees make?")) for _ in range(4))
        )
        assert {answer.text for answer in answers} == {"Bees make honey."}
        cut = await controller.handle_buffered_request(ask("Count to ten.", max_tokens=4))
        assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 4)
        stopped = await controller.handle_buffered_request(ask("Count to ten.", stop=[", 4"]))
        assert stopped.text == "1, 2, 3"
        plain = InferenceRequest(model_id="tiny", prompt="Once upon a time an old", max_tokens=12)
        assert "lighthouse" in (await controller.handle_buffered_request(plain)).text


@pytest.mark.model
async def test_leaving_a_stream_hangs_up_on_the_server(
    nats: NatsServer, nats_prefix: str, server: int
) -> None:
    async with Relay(server) as relay, fleet(nats, nats_prefix, relay.port) as controller:
        endless = ask("Tell me a story.", **ENDLESS)
        stream = await controller.handle_streaming_request(endless)
        async with stream:
            await anext(stream)
            assert not relay.left.is_set()
        await asyncio.wait_for(relay.left.wait(), LOADING)
        relay.left.clear()
        # Also before the server has said anything at all.
        call = asyncio.create_task(controller.handle_buffered_request(endless))
        await until(lambda: any(info.in_flight for info in controller.workers()), "a request", LOADING)
        call.cancel()
        await until(lambda: not any(info.in_flight for info in controller.workers()), "its end", LOADING)
        answer = await controller.handle_buffered_request(ask("What do bees make?"))
        assert answer.text == "Bees make honey."


@pytest.mark.model
async def test_what_the_server_refuses_and_its_absence_have_codes_of_their_own(
    nats: NatsServer, nats_prefix: str, server: int
) -> None:
    async with Relay(server) as relay, fleet(nats, nats_prefix, relay.port) as controller:
        refused = await failure(controller.handle_buffered_request(ask(logprobs=20)))
        assert (refused.code, "400" in refused.message) == ("REQUEST_VALIDATION_FAILED", True)
        stream = await controller.handle_streaming_request(ask("Tell me a story.", **ENDLESS))
        await anext(stream)
        await relay.cut()
        _, error = await received(stream)
        assert error is not None
        assert error.code == "STREAM_INTERRUPTED"
        gone = await failure(controller.handle_buffered_request(ask()))
        assert gone.code == "WORKER_UNAVAILABLE"
        await relay.open()
        assert (await controller.handle_buffered_request(ask())).text.startswith("Hello!")


@pytest.mark.model
@pytest.mark.slow
async def test_the_worker_in_front_of_a_server_is_a_program(
    nats: NatsServer, nats_prefix: str, server: int, tmp_path: Path
) -> None:
    command = [sys.executable, ENGINES / "openai_server.py", f"http://127.0.0.1:{server}/v1", "tiny"]
    options = ["--upstream-model", "default_model", "--max-concurrent", "3"]
    with program(*command, *options, scratch=tmp_path, **environment(nats, nats_prefix)) as worker:
        async with ControllerNode(settings(nats.url, nats_prefix, **ALONE)) as controller:
            await controller.wait_for_workers(1, timeout=LOADING)
            assert controller.workers()[0].max_concurrent == 3
            answer = await controller.handle_buffered_request(ask("What do bees make?"))
            assert answer.text == "Bees make honey."
        worker.send(15)
        assert worker.ends() == 0, worker.output


# === what no server of ours says: a scripted one ===


def answer(
    status: str, *headers: str, body: str = '{"error": {"message": "the prompt was: secret"}}'
) -> bytes:
    lines = [f"HTTP/1.0 {status}", "content-type: application/json", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def chunks(*chunks: dict[str, Any], whole: bool = True) -> bytes:
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    end = "data: [DONE]\n\n" if whole else ""
    return f"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n{events}{end}".encode()


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


@asynccontextmanager
async def scripted(nats: NatsServer, prefix: str, reply: bytes) -> AsyncIterator[ControllerNode]:
    """A controller and the example's worker before a server that always says this, and hangs up."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        writer.write(reply)
        writer.close()
        await writer.wait_closed()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening, fleet(nats, prefix, listening.sockets[0].getsockname()[1]) as controller:
        yield controller


def in_an_hour() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)


@pytest.mark.parametrize(
    ("status", "headers", "code", "least", "most"),
    [
        ("429 Too Many Requests", lambda: ["retry-after: 1.5"], "WORKER_OVERLOADED", 1500, 1500),
        (
            "429 Too Many Requests",
            lambda: [f"retry-after: {in_an_hour()}"],
            "WORKER_OVERLOADED",
            3_500_000,
            3_600_000,
        ),
        ("429 Too Many Requests", lambda: ["retry-after: soon"], "WORKER_OVERLOADED", None, None),
        ("429 Too Many Requests", list, "WORKER_OVERLOADED", None, None),
        ("400 Bad Request", list, "REQUEST_VALIDATION_FAILED", None, None),
        ("422 Unprocessable Content", list, "REQUEST_VALIDATION_FAILED", None, None),
        ("401 Unauthorized", list, "WORKER_UNAVAILABLE", None, None),
        ("500 Internal Server Error", list, "WORKER_UNAVAILABLE", None, None),
        ("503 Service Unavailable", list, "WORKER_UNAVAILABLE", None, None),
    ],
    ids=["429-seconds", "429-date", "429-nonsense", "429", "400", "422", "401", "500", "503"],
)
async def test_a_status_becomes_a_code(
    nats: NatsServer,
    nats_prefix: str,
    status: str,
    headers: Callable[[], list[str]],
    code: str,
    least: int | None,
    most: int | None,
) -> None:
    async with scripted(nats, nats_prefix, answer(status, *headers())) as controller:
        error = await failure(controller.handle_buffered_request(ask()))
        assert error.code == code
        assert "secret" not in str(error)
        wait = error.context.get("retry_after_ms")
        assert wait is None if least is None or most is None else least <= wait <= most


async def test_a_stream_without_an_end_is_no_answer(nats: NatsServer, nats_prefix: str) -> None:
    reply = chunks(chunk(content="Hel"), chunk(content="lo"), whole=False)
    async with scripted(nats, nats_prefix, reply) as controller:
        error = await failure(controller.handle_buffered_request(ask()))
        assert error.code == "WORKER_UNAVAILABLE"
        got, interrupted = await received(await controller.handle_streaming_request(ask()))
        assert got == "Hello"
        assert interrupted is not None
        assert interrupted.code == "STREAM_INTERRUPTED"
        assert isinstance(interrupted.__cause__, ControllerError)


async def test_calls_of_tools_are_put_together(nats: NatsServer, nats_prefix: str) -> None:
    def call(index: int, **fields: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, **fields}]}

    reply = chunks(
        chunk(content="Let me look."),
        chunk(**call(0, id="a", type="function", function={"name": "time", "arguments": '{"zone": '})),
        chunk(**call(0, function={"arguments": '"utc"}'})),
        chunk(**call(1, id="b", type="function", function={"name": "date", "arguments": "{}"})),
        chunk("tool_calls"),
    )
    tools = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}]
    async with scripted(nats, nats_prefix, reply) as controller:
        response = await controller.handle_buffered_request(ask(tools=tools))
        assert (response.text, response.finish_reason) == ("Let me look.", "tool_calls")
        assert response.tool_calls == [
            {"id": "a", "type": "function", "function": {"name": "time", "arguments": '{"zone": "utc"}'}},
            {"id": "b", "type": "function", "function": {"name": "date", "arguments": "{}"}},
        ]
