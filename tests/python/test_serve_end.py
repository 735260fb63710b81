"""The end of `mlx-serving-router serve` while requests run: they are told, and a second signal does not wait."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from mlx_serving_router import WorkerNode
from programs import program

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mlx_serving_router import InferenceRequest
    from mlx_serving_router.nats_server import NatsServer

ROUTER = (sys.executable, "-B", "-m", "mlx_serving_router")


async def endless(_request: InferenceRequest) -> AsyncIterator[str]:
    while True:
        yield "x"
        await asyncio.sleep(0.05)


@pytest.mark.nats
async def test_a_second_signal_does_not_wait_for_requests(nats: NatsServer, tmp_path: Path) -> None:
    settings = {"nats": {"mode": "external", "serverUrl": nats.url, "subjectPrefix": "twice."}}
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({**settings, "controller": {"port": 0, "drainTimeoutMs": 600_000}}))
    async with WorkerNode(endless, config=settings, worker_id="w", models=["tiny"]):
        with program(*ROUTER, "serve", "-c", str(file), scratch=tmp_path) as front_end:
            line = await asyncio.to_thread(front_end.line_with, "OpenAI", "/v1")
            await asyncio.to_thread(front_end.line_with, "worker_id=w")
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 10**6}
            async with (
                httpx.AsyncClient(timeout=30) as client,
                client.stream(
                    "POST", f"{line.split()[-1]}/chat/completions", json={**body, "stream": True}
                ) as stream,
            ):
                assert (await anext(stream.aiter_lines())).startswith("data:")
                front_end.send(signal.SIGINT)
                await asyncio.to_thread(front_end.line_with, "a second signal ends it at once", "active=1")
                assert front_end.process.poll() is None
                front_end.send(signal.SIGINT)
                assert await asyncio.to_thread(front_end.ends) == 130


@pytest.mark.nats
async def test_a_front_end_that_ends_tells_those_whose_time_is_over(nats: NatsServer, tmp_path: Path) -> None:
    settings = {"nats": {"mode": "external", "serverUrl": nats.url, "subjectPrefix": "drain."}}
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({**settings, "controller": {"port": 0, "drainTimeoutMs": 200}}))

    async with WorkerNode(endless, config=settings, models=["tiny"]):
        with program(*ROUTER, "serve", "-c", str(file), scratch=tmp_path) as front_end:
            line = await asyncio.to_thread(front_end.line_with, "OpenAI", "/v1")
            url = line.split()[-1].removesuffix("/v1")
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                body = {
                    "model": "tiny",
                    "messages": [{"role": "user", "content": "Hello"}],
                    "max_tokens": 10**6,
                }
                while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110 nobody tells
                    await asyncio.sleep(0.05)
                whole = asyncio.create_task(client.post("/v1/chat/completions", json=body))
                async with client.stream(
                    "POST", "/v1/chat/completions", json={**body, "stream": True}
                ) as stream:
                    lines = stream.aiter_lines()
                    first = await anext(lines)
                    assert first.startswith("data:")
                    front_end.send(signal.SIGTERM)
                    events = [line async for line in lines if line]
                assert json.loads(events[-1].removeprefix("data:"))["error"]["code"] == "CONTROLLER_NOT_READY"
                answer = await whole
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "CONTROLLER_NOT_READY")
