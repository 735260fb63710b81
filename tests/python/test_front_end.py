"""What the configuration says of the front-end: signs of life, limits of keys, a port for metrics, other origins."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as classic_families

from mlx_serving_router import ControllerError
from mlx_serving_router._command import CommandError
from mlx_serving_router._http import HttpError
from mlx_serving_router._keys import Keys, place
from mlx_serving_router._serve import front_end, listen
from mlx_serving_router.fastapi import create_app
from programs import free_port
from serving import PATIENCE, Fleet, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mlx_serving_router import InferenceRequest

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
QUICKLY = {"sseKeepaliveIntervalMs": 10}


def chat(model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, **fields}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Gate:
    """A worker that says nothing until it is opened; then an answer, or an error."""

    def __init__(self, fleet: Fleet) -> None:
        self.reached = threading.Event()
        self._opened: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: str | None = None
        fleet.controller.add_local_worker(self.waits, worker_id="waits", models=["waits"])

    async def waits(self, _request: InferenceRequest) -> AsyncIterator[str]:
        self._loop, self._opened = asyncio.get_running_loop(), asyncio.Event()
        self.reached.set()
        await self._opened.wait()
        if self._error is not None:
            raise ControllerError(self._error, "it broke")
        yield "Hel"
        yield "lo"

    def open(self, error: str | None = None) -> None:
        assert self.reached.wait(PATIENCE)
        assert self._loop is not None
        assert self._opened is not None
        self._error = error
        self._loop.call_soon_threadsafe(self._opened.set)


@contextmanager
def waiting(**controller: Any) -> Iterator[tuple[httpx.Client, Gate]]:
    fleet = Fleet(**controller)
    gate = Gate(fleet)
    with serve(create_app(controller=fleet.controller)) as url, httpx.Client(base_url=url) as http:
        yield http, gate


def data(lines: list[str]) -> list[Any]:
    """The events of a stream, without its `[DONE]`."""
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def text(events: list[Any]) -> str:
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


# === signs of life ===


def test_a_stream_that_waits_for_its_first_token_carries_comments() -> None:
    with (
        waiting(**QUICKLY) as (http, gate),
        http.stream("POST", "/v1/chat/completions", json=chat("waits", stream=True)) as response,
    ):
        assert response.status_code == 200
        assert "x-worker-id" not in response.headers
        lines = response.iter_lines()
        assert next(lines) == ": keepalive"
        gate.open()
        rest = list(lines)
    events = data(rest)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert text(events) == "Hello"
    assert rest[-2:] == ["data: [DONE]", ""]
    assert {line.partition(":")[0] for line in rest} == {"", "data"}


def test_a_stream_that_falls_silent_carries_them_too() -> None:
    with (
        waiting(**QUICKLY) as (http, _),
        http.stream("POST", "/v1/chat/completions", json=chat("babbles", stream=True)) as response,
    ):
        received = ""
        for line in response.iter_lines():
            received += text(data([line]))
            if received and line.startswith(":"):
                break
    assert received == "Hel"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_sign_of_life_can_be_a_chunk(path: str) -> None:
    body = chat("waits", stream=True, prompt="Hello")
    with (
        waiting(sseKeepalive="chunk", **QUICKLY) as (http, gate),
        http.stream("POST", path, json=body) as response,
    ):
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["choices"][0]["finish_reason"] is None
        gate.open()
        events = [first, *data(list(lines))]
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    if path == "/v1/completions":
        assert "".join(event["choices"][0]["text"] for event in events) == "Hello"
    else:
        roles = [event["choices"][0]["delta"].get("role") for event in events]
        assert (roles[0], set(roles[1:])) == ("assistant", {None})
        assert text(events) == "Hello"


def test_an_error_after_a_sign_of_life_is_an_event() -> None:
    for keepalive in ("comment", "chunk"):
        with waiting(sseKeepalive=keepalive, **QUICKLY) as (http, gate):
            body = chat("waits", stream=True)
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                gate.open("WORKER_UNAVAILABLE")
                rest = list(lines)
            assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "WORKER_UNAVAILABLE"
            assert "[DONE]" not in "".join(rest)


def test_without_signs_of_life_an_error_has_its_status() -> None:
    with waiting(sseKeepalive="off", **QUICKLY) as (http, gate):
        opener = threading.Thread(target=gate.open, args=["WORKER_UNAVAILABLE"])
        opener.start()
        response = http.post("/v1/chat/completions", json=chat("waits", stream=True))
        opener.join()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "WORKER_UNAVAILABLE")
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("keepalive", ["comment", "chunk"])
def test_the_openai_client_reads_streams_with_signs_of_life(keepalive: str) -> None:
    with (
        waiting(sseKeepalive=keepalive, **QUICKLY) as (http, gate),
        OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        # The client returns with the status, which the first sign of life took along.
        stream = client.chat.completions.create(model="waits", messages=MESSAGES, stream=True)
        gate.open()
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert answer == "Hello"

        gate.reached.clear()
        stream = client.chat.completions.create(model="waits", messages=MESSAGES, stream=True)
        gate.open("MODEL_LOAD_FAILED")
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "MODEL_LOAD_FAILED"


def test_a_client_that_leaves_between_signs_of_life_stops_the_generation() -> None:
    fleet = Fleet(**QUICKLY)
    with serve(create_app(controller=fleet.controller)) as url:
        body = json.dumps(chat("stalls", stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
        at = urlsplit(url)
        with socket.create_connection((at.hostname, at.port), timeout=PATIENCE) as connection:
            connection.sendall(head.encode() + body)
            received = b""
            while received.count(b": keepalive") < 2:
                received += connection.recv(65536)
            assert not fleet.cancelled.is_set()
        assert fleet.cancelled.wait(PATIENCE)


# === keys ===


def test_a_key_has_so_many_completions_at_a_time() -> None:
    keys = ["free", {"key": "a secret", "name": "mine", "maxConcurrent": 1}]
    fleet = Fleet(apiKeys=keys)
    with serve(create_app(controller=fleet.controller)) as url, httpx.Client(base_url=url) as http:
        mine = bearer("a secret")
        # What has ended, well or not, has given its place back.
        for _ in range(3):
            for stream in (False, True):
                body = chat(stream=stream)
                assert http.post("/v1/chat/completions", json=body, headers=mine).status_code == 200
        assert http.post("/v1/chat/completions", json=chat("fails"), headers=mine).status_code == 503
        assert http.post("/v1/chat/completions", content=b"{", headers=mine).status_code == 400

        body = chat("babbles", stream=True)
        with http.stream("POST", "/v1/chat/completions", json=body, headers=mine) as running:
            lines = running.iter_lines()  # kept: the client leaves when it goes
            assert next(lines).startswith("data: ")
            for stream in (False, True):
                refused = http.post("/v1/chat/completions", json=chat(stream=stream), headers=mine)
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                assert refused.headers["x-request-id"]
                error = refused.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
                assert "mine" in error["message"]
                assert "secret" not in refused.text
            assert http.get("/v1/models", headers=mine).status_code == 200
            assert http.post("/v1/chat/completions", json=chat(), headers=bearer("free")).status_code == 200
        # The place is back when the worker's is, moments after the client has left.
        deadline = time.monotonic() + PATIENCE
        while http.post("/v1/chat/completions", json=chat(), headers=mine).status_code == 429:
            assert time.monotonic() < deadline


def test_a_key_begins_so_many_completions_a_minute() -> None:
    fleet = Fleet(apiKeys=[{"key": "k", "requestsPerMinute": 2}])
    with (
        serve(create_app(controller=fleet.controller)) as url,
        OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        for stream in (False, True):
            client.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert caught.value.code == "rate_limit_exceeded"
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
        assert client.models.list().data


def test_a_minute_later_there_is_room_again() -> None:
    times = iter([0.0, 59.0, 59.5, 60.0, 60.0])
    keys = Keys([{"key": "k", "requestsPerMinute": 2}], clock=lambda: next(times))
    request = with_key(keys, "k")
    for _ in range(2):
        with place(request):
            pass
    with pytest.raises(HttpError) as caught, place(request):
        pass
    assert caught.value.headers is not None
    assert caught.value.headers["retry-after-ms"] == "500"
    assert str(caught.value) == (
        "key number 1 has reached its limit of completions that begin in a minute (requestsPerMinute: 2);"
        " the next may begin in 1 s"
    )
    with place(request):
        pass
    with pytest.raises(HttpError), place(request):
        pass


def with_key(keys: Keys, key: str) -> Any:
    from starlette.requests import Request

    header = (b"authorization", f"Bearer {key}".encode())
    request = Request({"type": "http", "headers": [header], "state": {}})
    keys.check(request)
    return request


def test_keys_of_any_characters_are_compared_as_bytes() -> None:
    keys = Keys(["schlüssel", "b"])
    with_key(keys, "schlüssel")
    for wrong in ("schlussel", "", "b ü"):
        with pytest.raises(HttpError):
            with_key(keys, wrong)
    assert "schl" not in repr(vars(keys))


# === limits ===


ENDLESS = {
    "headers": (b"GET /health HTTP/1.1\r\n", b"x-more: %s\r\n" % (b"y" * 1000) * 64),
    "a header": (b"GET /health HTTP/1.1\r\nx-long: ", b"y" * 65_536),
    "an address": (b"GET /", b"y" * 65_536),
    "trailers": (
        b"POST /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
        b"x-more: %s\r\n" % (b"y" * 1000) * 64,
    ),
}


async def flood(writer: asyncio.StreamWriter, piece: bytes) -> None:
    for _ in range(1024):
        writer.write(piece)
        await writer.drain()


async def is_refused(port: int, begin: bytes, piece: bytes) -> None:
    """The other side closes before it has taken 64 MiB."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begin)
    with pytest.raises(ConnectionError):
        await flood(writer, piece)
    writer.transport.abort()


@pytest.mark.parametrize("of", ENDLESS)
@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_a_head_without_end_is_refused(of: str, http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if http == "h11":
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    own = free_port()
    async with Fleet(metricsPort=own).controller as controller:
        address = listen("127.0.0.1", 0)
        async with front_end(controller, address, 1):
            for port in (urlsplit(address.url).port, own):
                assert port is not None
                await is_refused(port, *ENDLESS[of])
            async with httpx.AsyncClient(base_url=address.url) as client:
                # What is long and ends is taken, as a body is.
                assert (await client.get("/health", headers={"x-long": "y" * 32_000})).status_code == 200
                content = json.dumps(chat(user="y" * 1_000_000))
                assert (await client.post("/v1/chat/completions", content=content)).status_code == 200


def test_the_size_of_bodies_can_be_set() -> None:
    fleet = Fleet(maxBodyBytes=100)
    with serve(create_app(controller=fleet.controller)) as url, httpx.Client(base_url=url) as http:
        assert http.post("/v1/chat/completions", json=chat()).status_code == 200
        refused = http.post("/v1/chat/completions", json=chat(user="u" * 100))
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")


def test_a_body_that_nests_too_deep_is_refused() -> None:
    with serve(create_app(controller=Fleet().controller)) as url:
        deep = f'{{"model": "tiny", "messages": {"[" * 200}{"]" * 200}}}'
        refused = httpx.post(f"{url}/v1/chat/completions", content=deep)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "REQUEST_VALIDATION_FAILED")


# === metrics ===


def test_metrics_can_have_a_port_of_their_own(closed: int) -> None:
    fleet = Fleet(metricsPort=closed, apiKeys=["k"])
    with serve(create_app(controller=fleet.controller)) as url:
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert httpx.get(f"{url}/health").status_code == 200
        own = f"http://127.0.0.1:{closed}"
        assert "mlx_router_requests_active" in httpx.get(f"{own}/metrics").text
        for path in ("/health", "/ready"):
            assert httpx.get(f"{own}{path}").status_code == 200
        assert httpx.get(f"{own}/v1/models").status_code == 404
        assert httpx.post(f"{own}/health").status_code == 405
        for path in ("/metrics", "/health", "/ready", "/v1/models"):
            answer = httpx.get(f"{own}{path}", headers={"x-request-id": "mine"})
            assert answer.headers["x-request-id"] == "mine"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{own}/health")


async def test_a_port_for_metrics_that_is_taken_stops_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fleet = Fleet(metricsPort=taken.getsockname()[1])
        app = create_app(controller=fleet.controller)
        with pytest.raises(OSError, match=r"controller\.metricsPort"):
            async with app.router.lifespan_context(app):
                pass
    assert fleet.controller.state == "stopped"


async def test_the_command_says_so_where_that_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with Fleet(metricsPort=taken.getsockname()[1]).controller as controller:
            with pytest.raises(CommandError, match=r"controller\.metricsPort"):
                async with front_end(controller, listen("127.0.0.1", 0), 1) as ended:
                    await asyncio.wait((ended,))


def test_prometheus_reads_both_formats() -> None:
    with serve(create_app(controller=Fleet().controller)) as url, httpx.Client(base_url=url) as http:
        for model, stream in (
            ("tiny", False),
            ("tiny", True),
            ("fails", False),
            ("none", False),
            ("x" * 99, True),
        ):
            http.post("/v1/chat/completions", json=chat(model, stream=stream))
        newer = http.get(
            "/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.1"}
        )
        older = http.get("/metrics", headers={"accept": "text/plain"})
    assert newer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert older.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in openmetrics_families(newer.text)}
    classic = {family.name: family for family in classic_families(older.text)}
    assert {name: family.type for name, family in families.items()} == {
        name: family.type for name, family in classic.items()
    }
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}
    assert all(name.startswith("mlx_router_") for name in families)
    for name in (
        "requests",
        "attempts",
        "retries",
        "breaker_transitions",
        "worker_breaker",
        "requests_active",
        "requests_queued",
        "worker_in_flight",
        "time_to_first_token_seconds",
        "request_duration_seconds",
        "tokens",
    ):
        assert families[f"mlx_router_{name}"].documentation, name
    # Labels come from the fleet and from the program, never from callers.
    models = {
        sample.labels["model"]
        for family in families.values()
        for sample in family.samples
        if "model" in sample.labels
    }
    assert models == {"tiny", "fails", "unknown"}
    [requests] = [
        sample.value
        for sample in families["mlx_router_requests"].samples
        if sample.labels == {"model": "tiny", "code": "OK"}
    ]
    assert requests == 2
    for family in (families, classic):
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for sample in family["mlx_router_requests"].samples
        }
        assert samples["mlx_router_requests_total", (("code", "WORKER_UNAVAILABLE"), ("model", "fails"))] == 1


# === other origins ===


def test_other_origins_are_let_in_where_they_are_named() -> None:
    here = "https://chat.example"
    asks = {
        "origin": here,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-session-id",
    }
    fleet = Fleet(apiKeys=["k"], cors={"allowOrigins": [here]})
    with serve(create_app(controller=fleet.controller)) as url, httpx.Client(base_url=url) as http:
        # A preflight carries no key.
        allowed = http.options("/v1/chat/completions", headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == here
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        assert allowed.headers["x-request-id"]
        answer = http.post("/v1/chat/completions", json=chat(), headers={**bearer("k"), "origin": here})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == here
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        refused = http.post("/v1/chat/completions", json=chat(), headers={"origin": here})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, here)
        other = http.options("/v1/chat/completions", headers={**asks, "origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        named = http.options("/v1/models", headers={**asks, "x-request-id": "mine"})
        assert named.headers["x-request-id"] == "mine"
    with serve(create_app(controller=Fleet().controller)) as url, httpx.Client(base_url=url) as http:
        unknown = http.options("/v1/chat/completions", headers=asks)
        assert unknown.status_code == 405
        assert unknown.headers["x-request-id"]
        answer = http.post("/v1/chat/completions", json=chat(), headers={"origin": here})
        assert "access-control-allow-origin" not in answer.headers
