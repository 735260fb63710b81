"""The front-end under uvicorn's own command: several processes on one fleet, a proxy's path in front, and its end."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

from cluster import PACKAGES
from mlx_serving_router.testing import ANSWER, ScriptedWorker
from programs import PATIENCE, all_gone, free_port, program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlx_serving_router.nats_server import NatsServer
    from programs import Program

pytestmark = pytest.mark.nats

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@contextmanager
def uvicorn(
    nats: NatsServer,
    prefix: str,
    scratch: Path,
    *options: str,
    app: str = "mlx_serving_router.fastapi:create_app",
) -> Iterator[tuple[str, Program]]:
    """Its URL, once it listens, while a worker serves the model `tiny`."""
    port = free_port()
    settings = {"mode": "external", "serverUrl": nats.url, "subjectPrefix": prefix}
    command = [sys.executable, "-B", "-m", "uvicorn", app, "--factory", "--port", str(port), *options]
    environment = {
        "PYTHONPATH": f"{PACKAGES}:{scratch}",
        **{
            f"MLX_ROUTER__NATS__{name}": settings[key]
            for name, key in (
                ("MODE", "mode"),
                ("SERVER_URL", "serverUrl"),
                ("SUBJECT_PREFIX", "subjectPrefix"),
            )
        },
        "MLX_ROUTER__DISCOVERY__HEARTBEAT_INTERVAL_MS": "200",
    }
    worker = {"nats": settings, "discovery": {"heartbeatIntervalMs": 200}}
    with (
        ScriptedWorker(config=worker, models=["tiny"]),
        program(*command, scratch=scratch, **environment) as server,
    ):
        url = f"http://127.0.0.1:{port}"
        server.line_with("Application startup complete")
        yield url, server


def ready(url: str) -> None:
    """Waits until the process that answers has found the worker."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        assert time.monotonic() < deadline, f"nobody serves at {url}"
        time.sleep(0.05)


def test_each_process_has_its_own_controller_on_one_fleet(
    nats: NatsServer, nats_prefix: str, tmp_path: Path
) -> None:
    with uvicorn(nats, nats_prefix, tmp_path, "--workers", "2") as (url, server):
        answered: dict[str, int] = {}
        deadline = time.monotonic() + PATIENCE
        while len(answered) < 2 or min(answered.values()) < 2:
            assert time.monotonic() < deadline, answered
            ready(url)
            # One connection, so one process.
            with httpx.Client(base_url=url) as http:
                status = http.get("/api/cluster/status").json()
                answer = http.post("/v1/chat/completions", json=CHAT)
                if answer.status_code == 503:  # this one has not found the worker yet
                    continue
                assert answer.json()["choices"][0]["message"]["content"] == ANSWER
                stream = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
                assert stream.text.endswith("data: [DONE]\n\n")
                assert status["workers"]["total"] <= 1
            name = status["controllerId"]
            answered[name] = answered.get(name, 0) + 1
        server.send(signal.SIGTERM)
        assert server.ends() == 0
    assert all_gone(tmp_path)


def test_a_proxy_may_have_put_a_path_in_front(nats: NatsServer, nats_prefix: str, tmp_path: Path) -> None:
    with uvicorn(nats, nats_prefix, tmp_path, "--root-path", "/api") as (url, server):
        ready(url)
        # The proxy takes off what is its own; the application is told of it, and links have it in front.
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert answer.json()["choices"][0]["message"]["content"] == ANSWER
        unknown = httpx.get(f"{url}/v1/nothing").json()["error"]
        assert set(unknown) == {"message", "type", "param", "code"}
        assert "retryable" in httpx.get(f"{url}/api/nothing").json()["error"]
        assert httpx.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/api"}]
        server.send(signal.SIGINT)
        server.ends()


OWN = """
from fastapi import FastAPI
from mlx_serving_router import ClusterConfig, ControllerNode
from mlx_serving_router.fastapi import controller_router

def make():
    app = FastAPI()
    app.include_router(controller_router(ControllerNode(ClusterConfig.from_environment())), prefix="/llm")

    @app.get("/mine")
    async def mine() -> str:
        return "mine"

    @app.get("/v1/mine")
    async def below() -> str:
        return "mine too"

    return app
"""


def test_an_application_of_ones_own_is_served_with_the_routes_beside_its_own(
    nats: NatsServer, nats_prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with uvicorn(nats, nats_prefix, tmp_path, "--workers", "2", app="own:make") as (url, server):
        ready(f"{url}/llm")
        assert httpx.get(f"{url}/mine").json() == "mine"
        assert httpx.get(f"{url}/v1/mine").json() == "mine too"
        deadline = time.monotonic() + PATIENCE
        while (answer := httpx.post(f"{url}/llm/v1/chat/completions", json=CHAT)).status_code != 200:
            assert time.monotonic() < deadline, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == ANSWER
        stream = httpx.post(f"{url}/llm/v1/chat/completions", json={**CHAT, "stream": True})
        assert json.loads(stream.text.split("\n\n")[0].removeprefix("data: "))["id"].startswith("chatcmpl-")
        server.send(signal.SIGTERM)
        server.ends()
