"""The front-end of a `TestCluster`: clients of the OpenAI API, blocking ones too, meet what workers are told to do."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from fastapi import FastAPI, Request  # noqa: E402

from mlx_serving_router import InferenceRequest  # noqa: E402
from mlx_serving_router.fastapi import controller_router, get_controller  # noqa: E402
from mlx_serving_router.testing import (  # noqa: E402
    ANSWER,
    TestCluster,
    answer,
    fail,
    refuse,
    stall,
)

ASKED = [{"role": "user", "content": "Hello"}]


def client_of(cluster: TestCluster) -> Any:
    return openai.AsyncOpenAI(base_url=f"{cluster.api_url}/v1", api_key="x", max_retries=0)


def front_ends() -> int:
    return sum(thread.name == "mlx_serving_router-front-end" for thread in threading.enumerate())


@pytest.mark.nats
async def test_an_asynchronous_client_meets_good_and_bad_workers() -> None:
    once = {"requestRouting": {"retry": {"enabled": False}}}
    async with TestCluster(2, config=once) as cluster, client_of(cluster) as client:
        completion = await client.chat.completions.create(model="tiny", messages=ASKED)
        assert completion.choices[0].message.content == ANSWER
        for worker in cluster.workers:
            worker.script = stall(after_tokens=2)
        stream = await client.chat.completions.create(model="tiny", messages=ASKED, stream=True)
        text, words = await broken(stream)
        assert (text, "broke after tokens" in words) == ("Hello", True)
        for worker in cluster.workers:
            worker.script = refuse(retry_after_ms=1000)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(model="tiny", messages=ASKED)
        assert refused.value.response.headers["retry-after"]
    assert front_ends() == 0


def test_a_blocking_client_works_in_the_same_thread() -> None:
    with TestCluster(2, transport="local") as cluster:
        cluster.workers[0].script = fail().then(answer())
        with openai.OpenAI(base_url=f"{cluster.api_url}/v1", api_key="x", max_retries=0) as client:
            completion = client.chat.completions.create(model="tiny", messages=ASKED)
            assert completion.choices[0].message.content == ANSWER
            assert [model.id for model in client.models.list()] == ["tiny"]
    assert front_ends() == 0


async def test_a_blocking_client_works_while_the_event_loop_stands_still() -> None:
    async with TestCluster(1, transport="local") as cluster:
        with openai.OpenAI(base_url=f"{cluster.api_url}/v1", api_key="x") as client:
            completion = client.chat.completions.create(model="tiny", messages=ASKED)
    assert completion.choices[0].message.content == ANSWER


async def test_a_client_that_leaves_is_told_to_the_worker() -> None:
    async with TestCluster(1, transport="local", script=stall(after_tokens=1)) as cluster:
        [worker] = cluster.workers
        async with client_of(cluster) as client:
            stream = await client.chat.completions.create(model="tiny", messages=ASKED, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            await worker.wait_for_cancels(1)


async def test_the_front_end_comes_with_the_first_look_or_with_its_port() -> None:
    async with TestCluster(1, transport="local") as cluster:
        assert front_ends() == 0
        url = cluster.api_url
        assert (front_ends(), cluster.api_url) == (1, url)
    port = int(url.rsplit(":", 1)[1])
    async with TestCluster(1, 0, port, transport="local") as cluster:
        assert front_ends() == 1
        assert cluster.api_url == f"http://127.0.0.1:{port}"
    with pytest.raises(RuntimeError, match="does not run"):
        _ = cluster.api_url


async def test_leaving_ends_streams_that_stall() -> None:
    async with TestCluster(1, transport="local", script=stall(after_tokens=1)) as cluster:
        client = client_of(cluster)
        stream = await client.chat.completions.create(model="tiny", messages=ASKED, stream=True)
        await cluster.workers[0].wait_for_requests(1)
        reading = asyncio.create_task(broken(stream))
        begun = time.monotonic()
    assert await reading == ("Hel", "the controller stopped before the request was finished")
    assert time.monotonic() - begun < 3
    await client.close()


async def broken(stream: Any) -> tuple[str, str]:
    """What a stream gave, and the words that it broke with."""
    text = ""
    try:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        return text, str(error)
    raise AssertionError("it did not break")


async def test_without_the_extra_everything_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("_serve", "testing._front_end"):
        monkeypatch.delitem(sys.modules, f"mlx_serving_router.{name}", raising=False)
    async with TestCluster(1, transport="local") as cluster:
        with pytest.raises(RuntimeError, match=r'pip install "mlx-serving-router\[fastapi\]"'):
            _ = cluster.api_url
        response = await cluster.controller.handle_buffered_request(
            InferenceRequest(model_id="tiny", prompt="x")
        )
        assert response.text == ANSWER
    with pytest.raises(RuntimeError, match="pip install"):
        await TestCluster(1, 0, 45678, transport="local").start()


def test_an_application_of_ones_own_is_tested_with_the_clusters_controller() -> None:
    testclient = pytest.importorskip("fastapi.testclient")

    app = FastAPI()

    @app.get("/joke")
    async def joke(request: Request) -> str:
        asked = InferenceRequest(model_id="tiny", prompt="a joke")
        return (await get_controller(request).handle_buffered_request(asked)).text

    with TestCluster(1, transport="local", script=answer("Knock")) as cluster:
        app.include_router(controller_router(cluster.controller))
        with testclient.TestClient(app) as client:
            assert client.get("/joke").json() == "Knock"
        assert cluster.workers[0].requests[0].request.prompt == "a joke"
