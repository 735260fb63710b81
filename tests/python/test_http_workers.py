"""Real `mlx_lm.server` processes as workers: alone, beside a worker on NATS, and behind the front-end."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import sys
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from openai import AsyncOpenAI, NotFoundError

from cluster import ENDLESS, ask, settings
from enginejobs import MODEL
from mlx_serving_router import ControllerError, ControllerNode, WorkerNode
from mlx_serving_router.fastapi import create_app
from programs import PATIENCE, ROOT, Program, free_port, program
from serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlx_serving_router.nats_server import NatsServer

pytestmark = pytest.mark.model

MILLIS = int(PATIENCE * 1000)
LIMITS = {"timeoutMs": MILLIS, "streamingTimeoutMs": MILLIS, "streamIdleTimeoutMs": MILLIS}
BEES = "Bees make honey."
TLS = ROOT / "tests" / "fixtures" / "tls"


class Secure(BaseHTTPRequestHandler):
    """A server behind TLS that says one word."""

    def do_GET(self) -> None:
        """It is well."""
        self._answer("application/json", "{}")

    def do_POST(self) -> None:
        """Its word."""
        self.rfile.read(int(self.headers["content-length"]))
        chunk = {"choices": [{"index": 0, "delta": {"content": "safe"}, "finish_reason": "stop"}]}
        self._answer("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing of it."""

    def _answer(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def secure() -> Iterator[str]:
    """The address of such a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "localhost.pem", TLS / "localhost.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Secure) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://localhost:{server.server_address[1]}"
        server.shutdown()
        thread.join(PATIENCE)


async def test_a_server_behind_tls_is_known_by_its_certificate(
    secure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    static = {"workerId": "a", "url": secure, "models": ["tiny"]}
    settings = {"nats": {"mode": "none"}, "workers": {"static": [static]}}
    async with ControllerNode(settings) as stranger:
        with pytest.raises(TimeoutError):
            await stranger.wait_for_workers(1, timeout=0.5)
    assert "certificate" in caplog.text
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "localhost.pem"))
    async with ControllerNode(settings) as controller:
        await controller.wait_for_workers(1, timeout=PATIENCE)
        assert (await controller.handle_buffered_request(ask())).text == "safe"


class Server:
    """An `mlx_lm.server` process with the tiny model.

    Attributes:
        url: Its address.
        program: The process.
    """

    def __init__(self, url: str, running: Program) -> None:
        """Take what runs."""
        self.url = url
        self.program = running

    def kill(self) -> None:
        """End it as a crash would."""
        self.program.send(signal.SIGKILL)
        self.program.ends()


@contextmanager
def server(scratch: Path, port: int | None = None) -> Iterator[Server]:
    """A server that runs; it listens once the model can be asked for."""
    port = port or free_port()
    # Its models are those of a cache that is empty, so that nothing is ever downloaded.
    (scratch / "hub").mkdir(exist_ok=True)
    cache = {"HF_HUB_CACHE": str(scratch / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "server",
        "--model",
        MODEL,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with program(*command, scratch=scratch, **cache) as running:
        yield Server(f"http://127.0.0.1:{port}", running)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two of them, shared by the tests here: they are healthy, and have to stay so."""
    pytest.importorskip("mlx_lm")
    with ExitStack() as stack:
        yield [stack.enter_context(server(tmp_path_factory.mktemp("server"))) for _ in range(2)]


def config(*servers: Server, **more: Any) -> dict[str, Any]:
    """A configuration with these servers, `a`, `b` and so on; the first one is preferred. They serve `tiny`."""
    static = [
        {
            "workerId": "abc"[number],
            "url": server.url,
            "models": ["tiny=default_model"],
            "priority": 10 - number,
        }
        for number, server in enumerate(servers)
    ]
    return {
        "nats": {"mode": "none"},
        "discovery": {"heartbeatIntervalMs": 200},
        "workers": {"static": static},
        "requestRouting": LIMITS,
        **more,
    }


async def test_answers_in_one_piece_and_as_it_comes(pair: list[Server]) -> None:
    async with ControllerNode(config(*pair)) as controller:
        await controller.wait_for_workers(2, timeout=PATIENCE)
        response = await controller.handle_buffered_request(ask("What do bees make?"))
        assert (response.text, response.worker_id, response.finish_reason) == (BEES, "a", "stop")
        assert response.usage.prompt_tokens > 0
        assert response.usage.completion_tokens > 3

        stream = await controller.handle_streaming_request(ask("What do bees make?"))
        events = [event async for event in stream]
        assert len(events) > 2
        assert [event.index for event in events] == list(range(len(events)))
        assert "".join(event.text for event in events) == BEES
        assert stream.response is not None
        assert stream.response.usage.completion_tokens == response.usage.completion_tokens
        assert stream.response.usage.cached_tokens > 0

        short = await controller.handle_buffered_request(ask("Tell me a story.", max_tokens=5))
        assert (short.finish_reason, short.usage.completion_tokens) == ("length", 5)
        text = await controller.handle_buffered_request(
            ask(prompt="Once upon a time an old", messages=None, max_tokens=5)
        )
        assert "lighthouse" in text.text


async def test_a_model_may_be_left_for_the_server_to_name(pair: list[Server]) -> None:
    settings = config(pair[0])
    del settings["workers"]["static"][0]["models"]
    async with ControllerNode(settings) as controller:
        await controller.wait_for_workers(1, timeout=PATIENCE)
        worker = controller.worker("a")
        assert worker is not None
        assert (worker.models, worker.carrier, worker.features) == ([str(MODEL.resolve())], "http", [])
        response = await controller.handle_buffered_request(
            ask("What do bees make?", model_id=worker.models[0])
        )
        assert response.text == BEES


async def test_what_the_server_refuses_is_the_callers_mistake(pair: list[Server]) -> None:
    async with ControllerNode(config(pair[0])) as controller:
        await controller.wait_for_workers(1, timeout=PATIENCE)
        with pytest.raises(ValueError, match="top_logprobs must be at most 11") as refused:
            await controller.handle_buffered_request(ask("Hello", logprobs=15))
        assert getattr(refused.value, "code", None) == "REQUEST_VALIDATION_FAILED"
        assert controller.get_circuit_breaker_stats()["a"]["failure_count"] == 0


async def test_a_stream_that_is_left_is_no_burden(pair: list[Server]) -> None:
    async with ControllerNode(config(pair[0])) as controller:
        await controller.wait_for_workers(1, timeout=PATIENCE)
        for _ in range(3):
            stream = await controller.handle_streaming_request(ask("Tell me a story.", max_tokens=4000))
            await stream.aclose()
        response = await controller.handle_buffered_request(ask("What do bees make?"))
        assert (response.text, response.metadata.retry_count) == (BEES, 0)
        worker = controller.worker("a")
        assert worker is not None
        assert worker.in_flight == 0


async def test_a_server_that_is_killed_is_made_up_for(pair: list[Server], tmp_path: Path) -> None:
    with server(tmp_path) as victim:
        # Nobody is looked at meanwhile: it is the requests that find out.
        slow = {
            "discovery": {"heartbeatIntervalMs": MILLIS},
            "controller": {"workerOfflineTimeoutMs": 3 * MILLIS},
        }
        async with ControllerNode(config(victim, pair[1], **slow)) as controller:
            events = controller.events()
            await controller.wait_for_workers(2, timeout=PATIENCE)
            first = await controller.handle_buffered_request(ask("What do bees make?"))
            assert first.worker_id == "a"
            stream = await controller.handle_streaming_request(ask("Tell me a story.", **ENDLESS))
            victim.kill()
            with pytest.raises(ControllerError) as broken:
                async for _ in stream:
                    pass
            assert broken.value.code == "STREAM_INTERRUPTED"
            answers = await asyncio.gather(
                *(controller.handle_buffered_request(ask("What do bees make?")) for _ in range(4))
            )
            assert {(answer.text, answer.worker_id) for answer in answers} == {(BEES, "b")}
            async for event in events:
                if event.kind == "worker_offline":
                    break
            worker = controller.worker("a")
            assert worker is not None
            assert worker.status == "offline"


async def test_a_server_that_is_started_again_is_found(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    port = free_port()
    with server(tmp_path, port) as first:
        async with ControllerNode(config(first)) as controller:
            await controller.wait_for_workers(1, timeout=PATIENCE)
            before = controller.worker("a")
            events = controller.events()
            first.kill()
            with server(tmp_path, port):
                async for event in events:
                    if event.kind == "worker_replaced":
                        break
                after = controller.worker("a")
                assert before is not None
                assert after is not None
                assert (after.status, after.incarnation != before.incarnation) == ("online", True)
                response = await controller.handle_buffered_request(ask("What do bees make?"))
                assert response.text == BEES


@pytest.mark.nats
async def test_workers_on_nats_and_over_http_are_one_fleet(
    pair: list[Server], nats: NatsServer, nats_prefix: str
) -> None:
    from mlx_serving_router.mlx import MlxEngine

    nats_settings = settings(nats.url, nats_prefix)
    mixed = {**config(pair[0]), "nats": nats_settings["nats"]}
    mixed["workers"]["static"][0]["priority"] = 0
    async with (
        WorkerNode(MlxEngine({"tiny": MODEL}), config=mixed, worker_id="n"),
        ControllerNode(mixed) as controller,
    ):
        await controller.wait_for_workers(2, timeout=PATIENCE)
        assert {worker.carrier for worker in controller.workers()} == {"http", "nats"}
        answers = await asyncio.gather(
            *(controller.handle_buffered_request(ask("What do bees make?")) for _ in range(8))
        )
        assert {answer.text for answer in answers} == {BEES}
        assert {answer.worker_id for answer in answers} == {"a", "n"}
        named = await controller.handle_buffered_request(ask("What do bees make?"), worker_id="a")
        assert named.worker_id == "a"
        controller.drain_worker("a")
        drained = await controller.handle_buffered_request(ask("What do bees make?"))
        assert drained.worker_id == "n"


async def test_the_openai_client_is_answered_through_the_front_end(pair: list[Server]) -> None:
    with serve(create_app(config(*pair))) as url:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10) as client:
            messages: list[Any] = [{"role": "user", "content": "What do bees make?"}]
            answer = await client.chat.completions.create(model="tiny", messages=messages, temperature=0)
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (BEES, "stop")
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 3
            stream = await client.chat.completions.create(
                model="tiny",
                messages=messages,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == BEES
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
            assert [model.id async for model in client.models.list()] == ["tiny"]
            workers: Any = await client.get(f"{url}/api/cluster/workers", cast_to=object)
            assert "http" in str(workers)


async def test_endpoints_that_it_has_not_are_not_there(pair: list[Server]) -> None:
    with serve(create_app(config(*pair))) as url:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10) as client:
            for create in (client.embeddings.create, client.responses.create):
                with pytest.raises(NotFoundError) as caught:
                    await create(model="tiny", input="a")
                assert caught.value.code == "MODEL_NOT_FOUND"
            workers: Any = await client.get(f"{url}/api/cluster/workers", cast_to=object)
            assert [(worker["breaker"], worker["status"]) for worker in workers] == [("CLOSED", "online")] * 2
