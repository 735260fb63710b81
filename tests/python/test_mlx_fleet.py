"""MlxEngine as a worker of a fleet: the tiny model behind WorkerNode, NATS and ControllerNode."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from cluster import ask, routing, settings
from enginejobs import MODEL
from mlx_serving_router import ControllerNode, WorkerNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from mlx_serving_router import InferenceResponse
    from mlx_serving_router.nats_server import NatsServer

pytestmark = [pytest.mark.model, pytest.mark.nats]

PATIENCE = 60_000  # milliseconds: a machine may be busy
STORY = "Once upon a time an old lighthouse stood on a cliff"


@pytest.fixture
async def controller(nats: NatsServer, nats_prefix: str) -> AsyncIterator[ControllerNode]:
    pytest.importorskip("mlx_lm")
    from mlx_serving_router.mlx import MlxEngine

    limits = {
        "timeoutMs": PATIENCE,
        "streamingTimeoutMs": PATIENCE,
        "acceptTimeoutMs": PATIENCE,
        "streamIdleTimeoutMs": PATIENCE,
    }
    config = settings(nats.url, nats_prefix, **routing(**limits))
    engine = MlxEngine({"tiny": MODEL}, max_concurrent=4)
    async with (
        WorkerNode(engine, config=config, worker_id="w"),
        ControllerNode(config) as controller,
    ):
        await controller.wait_for_workers(1, timeout=30)
        yield controller


async def test_answers_many_at_a_time_and_says_how_many(controller: ControllerNode) -> None:
    worker = controller.worker("w")
    assert worker is not None
    assert (worker.max_concurrent, set(worker.features)) == (4, {"batch", "resume", "cancel"})

    async def streamed() -> str:
        stream = await controller.handle_streaming_request(ask("Tell me a story.", max_tokens=60))
        return "".join([event.text async for event in stream])

    answers = await asyncio.gather(
        *(streamed() for _ in range(6)),
        *(controller.handle_buffered_request(ask("What do bees make?")) for _ in range(6)),
    )
    assert len(set(answers[:6])) == 1
    assert str(answers[0]).startswith(STORY)
    assert {answer.text for answer in answers[6:] if not isinstance(answer, str)} == {"Bees make honey."}


async def test_a_seed_gives_the_same_text_alone_and_beside_others(controller: ControllerNode) -> None:
    def sampled(seed: int | None) -> Awaitable[InferenceResponse]:
        return controller.handle_buffered_request(
            ask("Tell me a story.", temperature=4.0, seed=seed, max_tokens=60)
        )

    alone = [(await sampled(seed)).text for seed in (1, 2)]
    _, first, _, second = await asyncio.gather(*(sampled(seed) for seed in (None, 1, None, 2)))
    assert [first.text, second.text] == alone
    assert alone[0] != alone[1]


async def test_a_stream_that_is_left_makes_room_at_once(controller: ControllerNode) -> None:
    streams = [
        await controller.handle_streaming_request(ask("Tell me a story.", temperature=4.0)) for _ in range(4)
    ]
    for stream in streams:
        await stream.aclose()
    response = await controller.handle_buffered_request(ask("What do bees make?"))
    assert response.text == "Bees make honey."
    assert response.metadata.retry_count == 0


async def test_the_next_turn_finds_the_last_one(controller: ControllerNode) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "My name is Clara."}]
    first = await controller.handle_buffered_request(ask(messages=messages))
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "What is my name?"},
    ]
    second = await controller.handle_buffered_request(ask(messages=messages, logprobs=2))
    assert second.text == "Your name is Clara."
    assert second.usage.cached_tokens == first.usage.total_tokens + 1
    assert second.logprobs is not None
    assert "".join(entry["token"] for entry in second.logprobs["content"]) == second.text


async def test_what_a_model_cannot_do_is_the_callers_mistake(controller: ControllerNode) -> None:
    for fields in ({"prompt": "cat " * 3000, "messages": None}, {"logit_bias": {"9999": 1.0}}):
        with pytest.raises(ValueError, match="must") as refused:
            await controller.handle_buffered_request(ask(**fields))
        assert getattr(refused.value, "code", None) == "REQUEST_VALIDATION_FAILED"
