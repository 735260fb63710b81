"""The front-end as HTTP: headers, addresses, disconnects, life, and a place in somebody else's application."""

from __future__ import annotations

import json
import re
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Response

from mlx_serving_router import ControllerNode, ControllerState
from mlx_serving_router.fastapi import controller_router, create_app, get_controller
from mlx_serving_router.testing import TestCluster
from serving import LOCAL, PATIENCE, Fleet, serve, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.middleware.base import RequestResponseEndpoint

UUID = re.compile(r"[0-9a-f-]{36}")


def chat(model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], **fields}


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture(scope="module")
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    with serve(create_app(controller=fleet.controller)) as url, httpx.Client(base_url=url) as client:
        yield client


# === headers ===


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    for response in [
        http.get("/health"),
        http.get("/nowhere"),
        http.delete("/v1/models"),
        http.post("/v1/chat/completions", content=b"nonsense"),
        http.post("/v1/chat/completions", json=chat()),
        http.post("/v1/chat/completions", json=chat(stream=True)),
        http.get("/api/controller/requests/none"),
        http.get("/docs"),
        http.get("/openapi.json"),
    ]:
        assert UUID.fullmatch(response.headers["x-request-id"]), response.request.url
        assert not response.text.startswith('{"detail"')


def test_a_sane_request_id_is_kept_and_names_the_request(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "chatcmpl-mine-1"
    assert http.get("/api/controller/requests/mine-1").json()["status"] == "succeeded"
    other = http.get("/health", headers={"x-request-id": "a b"})
    assert UUID.fullmatch(other.headers["x-request-id"])


def test_the_worker_is_told_and_can_be_named(http: httpx.Client) -> None:
    for stream in (False, True):
        response = http.post("/v1/chat/completions", json=chat(stream=stream))
        assert response.headers["x-worker-id"] == "tiny"
    named = http.post("/v1/chat/completions", json=chat(), headers={"x-worker-id": "tiny"})
    assert named.status_code == 200
    nobody = http.post("/v1/chat/completions", json=chat(), headers={"x-worker-id": "nobody"})
    assert nobody.json()["error"]["code"] == "WORKER_OFFLINE"


def test_the_session_comes_from_the_header_first(http: httpx.Client) -> None:
    body = chat("echo", session_id="body", user="user")
    response = http.post("/v1/chat/completions", json=body, headers={"x-session-id": "header"})
    asked = json.loads(response.json()["choices"][0]["message"]["content"])
    assert asked["sessionId"] == "header"
    refused = http.post("/v1/chat/completions", json=chat(session_id="x" * 257))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "INVALID_SESSION_ID")


# === streams ===


def test_a_stream_is_data_lines_alone(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=chat(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_a_broken_stream_ends_with_its_error(http: httpx.Client) -> None:
    events = http.post("/v1/chat/completions", json=chat("breaks", stream=True)).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "STREAM_INTERRUPTED"
    assert "[DONE]" not in "".join(events)


# === disconnects ===


@pytest.mark.parametrize(
    ("model", "stream"), [("stalls", False), ("stalls", True), ("babbles", False), ("babbles", True)]
)
def test_a_client_that_leaves_stops_the_generation(
    http: httpx.Client, fleet: Fleet, model: str, *, stream: bool
) -> None:
    fleet.begun.clear()
    fleet.cancelled.clear()
    body = json.dumps(chat(model, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    at = urlsplit(str(http.base_url))
    with socket.create_connection((at.hostname, at.port), timeout=PATIENCE) as connection:
        connection.sendall(head + body)
        assert fleet.begun.wait(PATIENCE)
        if stream and model == "babbles":
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert not fleet.cancelled.is_set()
    assert fleet.cancelled.wait(PATIENCE)


# === errors ===


def test_errors_have_the_shape_of_their_area(http: httpx.Client) -> None:
    broken = http.post("/v1/chat/completions", content=b'{"model": "tiny",')
    assert broken.status_code == 400
    assert set(broken.json()["error"]) == {"message", "type", "param", "code"}
    assert broken.json()["error"]["type"] == "invalid_request_error"
    assert "line 1 column 17" in broken.json()["error"]["message"]

    unknown = http.get("/api/cluster/workers/nobody")
    assert unknown.status_code == 404
    assert set(unknown.json()["error"]) == {"code", "message", "context", "timestamp", "retryable"}

    request = http.get("/api/controller/requests/none")
    assert (request.status_code, request.json()) == (404, {"error": "Request not found", "requestId": "none"})


def test_the_list_of_requests_can_be_limited_to_the_newest(http: httpx.Client) -> None:
    ids = [
        http.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "Hello"},
            headers={"x-request-id": f"r-{number}"},
        ).headers["x-request-id"]
        for number in range(3)
    ]
    newest = http.get("/api/controller/requests", params={"limit": 2}).json()
    assert [metadata["requestId"] for metadata in newest] == ids[1:]
    for limit in ("0", "-1", "x", "1.5"):
        refused = http.get("/api/controller/requests", params={"limit": limit})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "REQUEST_VALIDATION_FAILED")


async def test_a_defect_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    never_started = httpx.ASGITransport(app=create_app(LOCAL))
    async with httpx.AsyncClient(transport=never_started, base_url="http://here") as http:
        response = await http.post("/v1/chat/completions", json=chat())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "INTERNAL_ERROR")
    assert response.headers["x-should-retry"] == "false"
    [record] = [record for record in caplog.records if record.name == "mlx_serving_router._http"]
    assert record.exc_info
    assert "lifespan" in str(record.exc_info[1])


def test_a_body_without_end_is_refused(http: httpx.Client) -> None:
    refused = http.post("/v1/chat/completions", content=b" " * (16 * 1024 * 1024 + 1))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")


def test_without_a_worker_everything_says_so() -> None:
    with serve(create_app(LOCAL)) as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "no worker is known")
        assert http.get("/v1/models").json() == {"object": "list", "data": []}
        refused = http.post("/v1/chat/completions", json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "NO_WORKERS_AVAILABLE")


# === keys ===


def test_keys_guard_the_apis_and_nothing_else() -> None:
    with (
        serve(create_app(controller=Fleet(apiKeys=["right"]).controller)) as url,
        httpx.Client(base_url=url) as http,
    ):
        for path in ("/health", "/ready", "/metrics"):
            assert http.get(path).status_code == 200
        for path in ("/v1/models", "/api/cluster/status", "/api/controller/requests/none"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
                refused = http.get(path, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
                assert refused.headers["www-authenticate"] == "Bearer"
            assert http.get(path, headers={"authorization": "Bearer right"}).status_code in (200, 404)
        assert http.post("/v1/chat/completions", content=b"{").status_code == 401
        # What is not there is nobody's business either.
        right = {"authorization": "Bearer right"}
        for method, path, status in (
            ("GET", "/v1", 404), ("GET", "/v1/nothing", 404), ("GET", "/api/nothing", 404), ("DELETE", "/api", 404),
            ("DELETE", "/v1/models", 405), ("POST", "/api/cluster/status", 405),
        ):  # fmt: skip
            refused = http.request(method, path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["x-request-id"]
            assert http.request(method, path, headers=right).status_code == status
        assert http.get("/v1nothing").status_code == 404


def test_a_router_in_another_application_guards_its_own_addresses() -> None:
    app = FastAPI()
    app.include_router(controller_router(Fleet(apiKeys=["right"]).controller), prefix="/llm")
    with serve(app) as url, httpx.Client(base_url=url) as http:
        assert http.delete("/llm/v1/models").status_code == 401
        assert http.delete("/llm/v1/models", headers={"authorization": "Bearer right"}).status_code == 405
        assert http.get("/llm/v1/nothing").status_code == 404, "what is not ours is the application's"


def test_life_can_be_asked_for_without_a_body(http: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["x-request-id"]
        assert http.post(path).status_code == 405


# === the fleet ===


def test_the_fleet_is_shown(http: httpx.Client, fleet: Fleet) -> None:
    http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "shown"})
    status = http.get("/api/cluster/status").json()
    assert status["controllerId"] == fleet.controller.controller_id
    assert (status["state"], status["workers"]["online"]) == ("ready", 8)
    workers = {worker["workerId"]: worker for worker in http.get("/api/cluster/workers").json()}
    assert http.get("/api/cluster/workers/tiny").json()["models"] == workers["tiny"]["models"] == ["tiny"]
    metrics = http.get("/api/controller/metrics").json()
    assert set(metrics) == {"activeRequests", "completedRequests", "circuitBreaker", "timestamp"}
    assert metrics["completedRequests"] > 0
    assert "shown" in [request["requestId"] for request in http.get("/api/controller/requests").json()]
    assert http.get("/ready").json()["status"] == "ready"
    assert "mlx_router_" in http.get("/metrics").text


def test_breakers_are_shown_under_the_names_of_their_workers() -> None:
    controller = ControllerNode({"nats": {"mode": "none"}})
    controller.add_local_worker(tiny, worker_id="snake_case_id", models=["tiny"])
    with serve(create_app(controller=controller)) as url:
        breakers = httpx.get(f"{url}/api/controller/metrics").json()["circuitBreaker"]
    assert list(breakers) == ["snake_case_id"]
    assert breakers["snake_case_id"]["state"] == "CLOSED"
    assert "failureCount" in breakers["snake_case_id"]


# === life, and other applications ===


def test_a_router_lives_beside_other_routes_under_a_prefix() -> None:
    fleet = Fleet()
    app = FastAPI()
    app.include_router(controller_router(fleet.controller), prefix="/llm")

    @app.get("/mine")
    async def mine(controller: ControllerNode = Depends(get_controller)) -> dict[str, str]:  # noqa: B008
        return {"controller": controller.controller_id}

    with serve(app) as url, httpx.Client(base_url=url) as http:
        assert http.get("/mine").json() == {"controller": fleet.controller.controller_id}
        answer = http.post("/llm/v1/chat/completions", json=chat())
        assert answer.json()["choices"][0]["message"]["content"] == "Hello, world"
        assert http.get("/v1/models").status_code == 404
        refused = http.post("/llm/v1/chat/completions", content=b"{")
        assert refused.json()["error"]["code"] == "REQUEST_VALIDATION_FAILED"
        assert refused.headers["x-request-id"]
    assert fleet.controller.state is ControllerState.STOPPED


def test_middleware_of_an_application_is_around_completions_and_reads_their_route(fleet: Fleet) -> None:
    app = create_app(controller=fleet.controller)
    seen = []

    @app.middleware("http")
    async def note(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        seen.append((request.scope["route"].path, response.status_code))
        return response

    with serve(app) as url, httpx.Client(base_url=url) as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        client.post("/v1/completions", json={"model": "nobody's", "prompt": "Hello"})
        client.get("/health")
    assert seen == [("/v1/chat/completions", 200), ("/v1/completions", 404), ("/health", 200)]


def test_completions_below_a_root_are_found_where_the_router_finds_them(fleet: Fleet) -> None:
    app = create_app(controller=fleet.controller)
    app.root_path = "/v1"  # what is left of the address is the router's business
    with serve(app) as url, httpx.Client(base_url=url) as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 404
        assert client.post("/v1/v1/chat/completions", json=chat()).status_code == 200


def test_what_an_applications_own_dependency_refuses_keeps_its_status() -> None:
    async def closed(number: int = 0) -> None:
        if number == 1:
            raise HTTPException(418, "closed today", {"x-why": "tea"})

    fleet = Fleet()
    app = FastAPI()
    app.include_router(controller_router(fleet.controller), prefix="/llm", dependencies=[Depends(closed)])
    with serve(app) as url, httpx.Client(base_url=f"{url}/llm") as http:
        assert http.post("/v1/chat/completions", json=chat()).status_code == 200
        refused = http.post("/v1/chat/completions", params={"number": 1}, json=chat())
        assert (refused.status_code, refused.headers["x-why"]) == (418, "tea")
        assert refused.json()["error"]["message"] == "closed today"
        wrong = http.post("/v1/chat/completions", params={"number": "x"}, json=chat())
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "REQUEST_VALIDATION_FAILED")
        assert "number" in wrong.json()["error"]["message"]
        method = http.delete("/v1/models")
        assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
        assert method.headers["allow"] == "GET"
        assert method.headers["x-request-id"]


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_model_without_a_name_is_none_that_is_served(prefix: str) -> None:
    app = FastAPI()
    app.include_router(controller_router(Fleet().controller), prefix=prefix)
    with serve(app) as url:
        for path in ("/v1/models/", "/v1/models//"):
            refused = httpx.get(f"{url}{prefix}{path}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "MODEL_NOT_FOUND")
            assert refused.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses"])
@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_what_no_worker_serves_is_a_404_that_clients_read(path: str, prefix: str) -> None:
    app = FastAPI()
    app.include_router(controller_router(Fleet().controller), prefix=prefix)
    with serve(app) as url:
        refused = httpx.post(f"{url}{prefix}{path}", json={"model": "tiny", "input": "Hello"})
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_url")
    assert "workers.static" in error["message"]
    assert refused.headers["x-request-id"]


def test_an_application_can_be_served_twice() -> None:
    app = create_app(LOCAL)
    for _ in range(2):
        with serve(app) as url:
            assert httpx.get(f"{url}/api/cluster/status").json()["state"] == "ready"


def in_process(app: FastAPI, state: Any) -> httpx.ASGITransport:
    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    return httpx.ASGITransport(app=with_state)


async def test_a_controller_that_runs_already_is_left_to_its_owner() -> None:
    async with ControllerNode(LOCAL) as controller:
        controller.add_local_worker(tiny, models=["tiny"])
        app = create_app(controller=controller)
        async with (
            app.router.lifespan_context(app) as state,
            httpx.AsyncClient(transport=in_process(app, state), base_url="http://here") as http,
        ):
            answer = await http.post("/v1/chat/completions", json=chat())
            assert answer.json()["choices"][0]["message"]["content"] == "Hello, world"
        assert controller.state is ControllerState.READY


def test_a_config_and_a_controller_are_not_given_together() -> None:
    with pytest.raises(ValueError, match="not both"):
        create_app(LOCAL, controller=ControllerNode(LOCAL))


def test_answers_name_the_model_that_stood_in() -> None:
    config = {"requestRouting": {"fallbackModels": {"big": ["tiny"]}}}
    with (
        TestCluster(1, transport="local", config=config) as cluster,
        httpx.Client(base_url=cluster.api_url) as http,
    ):
        whole = http.post("/v1/chat/completions", json=chat("big"))
        assert whole.json()["model"] == "tiny"
        lines = http.post("/v1/chat/completions", json=chat("big", stream=True)).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert len(chunks) > 2
        assert {chunk["model"] for chunk in chunks} == {"tiny"}
