"""Endpoints that the fleet has no words for: the real client before the front-end, a server behind it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from openai import OpenAI

from mlx_serving_router import ControllerNode
from mlx_serving_router.fastapi import create_app
from serving import PATIENCE, serve
from upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def fronted(upstream: str, **controller: Any) -> Iterator[str]:
    """The address of a front-end before a server."""
    static = [{"workerId": "a", "url": upstream, "models": ["outer=inner"]}]
    config = {"nats": {"mode": "none"}, "workers": {"static": static}, "controller": controller}
    node = ControllerNode(config)
    with serve(create_app(controller=node)) as url:
        for _ in range(int(PATIENCE * 20)):
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        else:
            pytest.fail("the server was not found")
        yield url


@pytest.fixture
def upstream() -> Upstream:
    """A server's application."""
    return Upstream()


@pytest.fixture
def url(upstream: Upstream) -> Iterator[str]:
    """The address of a front-end before that server."""
    with serve(upstream.app) as behind, fronted(behind) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    """The real client before the front-end."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_embeddings_are_the_servers(client: OpenAI, upstream: Upstream, url: str) -> None:
    raw = client.embeddings.with_raw_response.create(model="outer", input=["a", "b"], dimensions=2)
    answer = raw.parse()
    assert [one.embedding for one in answer.data] == [[1.0, 2.0], [1.0, 2.0]]
    assert (answer.model, answer.usage.prompt_tokens) == ("inner", 7)
    assert upstream.asked == [
        {"model": "inner", "input": ["a", "b"], "dimensions": 2, "encoding_format": "base64"}
    ]
    assert raw.headers["x-worker-id"] == "a"
    assert raw.headers["content-type"] == "application/json"
    known = httpx.get(f"{url}/api/controller/requests/{raw.headers['x-request-id']}").json()
    assert (known["status"], known["modelId"], known["selectedWorker"]) == ("succeeded", "outer", "a")
    metrics = httpx.get(f"{url}/metrics").text
    assert 'mlx_router_tokens_total{model="outer",kind="prompt"} 7' in metrics


def test_a_server_says_itself_what_is_wrong(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot embed that"):
        client.embeddings.create(model="outer", input="wrong")
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="another", input="a")
    assert (caught.value.code, caught.value.param) == ("MODEL_NOT_FOUND", "model")


def test_a_response_is_the_servers(client: OpenAI, upstream: Upstream) -> None:
    response = client.responses.create(model="outer", input="Hi", instructions="Be kind.")
    assert (response.output_text, response.id) == ("Hello", "resp_1")
    assert upstream.asked == [{"model": "inner", "input": "Hi", "instructions": "Be kind."}]


def test_events_come_as_they_are(client: OpenAI) -> None:
    events = list(client.responses.create(model="outer", input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(9))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    with client.responses.stream(model="outer", input="Hi") as stream:
        assert "".join(one.delta for one in stream if one.type == "response.output_text.delta") == "Hello"
        assert stream.get_final_response().output_text == "Hello"


def test_a_stream_of_events_that_breaks_raises(client: OpenAI, url: str) -> None:
    seen: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        seen.extend(
            event.type for event in client.responses.create(model="outer", input="break", stream=True)
        )
    assert (len(seen), seen[-1]) == (5, "response.output_text.delta")
    assert caught.value.code == "STREAM_INTERRUPTED"
    body = {"model": "outer", "input": "break", "stream": True}
    last = httpx.post(f"{url}/v1/responses", json=body).text.split("\n\n")[-2]
    name, _, data = last.partition("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (name, told["type"], told["code"]) == ("event: error", "error", "STREAM_INTERRUPTED")
    assert told["sequence_number"] == 5


def test_a_client_that_leaves_ends_the_work(client: OpenAI, upstream: Upstream) -> None:
    with client.responses.create(model="outer", input="stall", stream=True) as stream:
        assert next(iter(stream)).type == "response.created"
    assert upstream.left.wait(PATIENCE)


def test_signs_of_life_come_before_the_first_word(upstream: Upstream) -> None:
    body = {"model": "outer", "input": "late", "stream": True}
    with (
        serve(upstream.app) as behind,
        fronted(behind, sseKeepaliveIntervalMs=1000) as url,
        httpx.stream("POST", f"{url}/v1/responses", json=body, timeout=PATIENCE) as answer,
    ):
        lines = answer.iter_lines()
        assert (answer.status_code, next(lines)) == (200, ": keepalive")
        upstream.goes_on.set()
        rest = [line for line in lines if line and not line.startswith(":")]
    assert rest[0] == "event: error"
    assert json.loads(rest[1].removeprefix("data: "))["error"]["code"] == "NO_WORKERS_AVAILABLE"


def test_keys_and_bodies_are_looked_at_as_everywhere(upstream: Upstream) -> None:
    with serve(upstream.app) as behind, fronted(behind, apiKeys=["right"], maxBodyBytes=100) as url:
        body = {"model": "outer", "input": "a"}
        for path in ("/v1/embeddings", "/v1/responses"):
            assert httpx.post(f"{url}{path}", json=body).status_code == 401
            key = {"authorization": "Bearer right"}
            assert httpx.post(f"{url}{path}", json=body, headers=key).status_code == 200
            large = httpx.post(f"{url}{path}", json={**body, "input": "a" * 100}, headers=key)
            assert (large.status_code, large.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
            bad = httpx.post(f"{url}{path}", json={"input": "a"}, headers=key)
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "model")
