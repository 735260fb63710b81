"""A router behind a router: the inner front-end is a server over HTTP like any other, under a real uvicorn."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from cluster import ask
from mlx_serving_router import ControllerError, ControllerNode
from mlx_serving_router.fastapi import create_app
from serving import PATIENCE, Fleet, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def before(inner: Fleet) -> AsyncIterator[ControllerNode]:
    """A controller whose only worker is the front-end of another one."""
    with serve(create_app(controller=inner.controller)) as url:
        config: dict[str, Any] = {
            "nats": {"mode": "none"},
            "workers": {"static": [{"workerId": "inner", "url": url}]},
            "requestRouting": {"retry": {"enabled": False}},
        }
        async with ControllerNode(config) as outer:
            await outer.wait_for_workers(1, timeout=PATIENCE)
            yield outer


async def test_answers_and_errors_come_through_both() -> None:
    async with before(Fleet()) as outer:
        answer = await outer.handle_buffered_request(ask(model_id="tiny"))
        assert (answer.text, answer.finish_reason, answer.worker_id) == ("Hello, world", "stop", "inner")
        stream = await outer.handle_streaming_request(ask(model_id="tiny"))
        assert [event.text async for event in stream] == ["Hello", ", ", "world"]
        # What is wanted in one piece is asked for in one piece.
        echoed = json.loads((await outer.handle_buffered_request(ask(model_id="echo"))).text)
        assert echoed["stream"] is False
        for model, code in (("refuses", "REQUEST_VALIDATION_FAILED"), ("full", "WORKER_OVERLOADED")):
            with pytest.raises(ControllerError) as caught:
                await outer.handle_buffered_request(ask(model_id=model))
            assert caught.value.code == code
        stream = await outer.handle_streaming_request(ask(model_id="breaks"))
        with pytest.raises(ControllerError) as caught:
            assert [event.text async for event in stream] == ["Hel"]
        assert caught.value.code == "STREAM_INTERRUPTED"


@pytest.mark.parametrize("handle", ["handle_buffered_request", "handle_streaming_request"])
async def test_a_caller_that_leaves_ends_the_work_behind_both(handle: str) -> None:
    inner = Fleet()
    async with before(inner) as outer:
        asking = asyncio.create_task(getattr(outer, handle)(ask(model_id="stalls")))
        assert await asyncio.to_thread(inner.begun.wait, PATIENCE)
        asking.cancel()
        assert await asyncio.to_thread(inner.cancelled.wait, PATIENCE)
        with pytest.raises(asyncio.CancelledError):
            await asking
        (known,) = inner.controller.get_all_request_metrics()
        assert known.status == "cancelled"
        assert outer.worker("inner").breaker == "CLOSED"
