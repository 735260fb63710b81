"""The whole router in one process: local workers, no NATS, first with asyncio, then without.

python examples/in-process/main.py
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import mlx_serving_router as msr

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CONFIG = {"nats": {"mode": "none"}, "loadBalancing": {"strategy": "round_robin"}}


async def spell(request: msr.InferenceRequest) -> AsyncIterator[str]:
    """A worker: whatever yields texts may be one. Here goes the call of a model, or of a server elsewhere."""
    for letter in request.prompt or "":
        await asyncio.sleep(0.01)  # work
        yield f"{letter}."


async def broken(_request: msr.InferenceRequest) -> AsyncIterator[str]:
    """A worker that fails before its first token: the request goes on to another one."""
    raise msr.ControllerError("WORKER_UNAVAILABLE", "it is broken")
    yield ""


def request(prompt: str) -> msr.InferenceRequest:
    """What is asked for."""
    return msr.InferenceRequest(model_id="spell", prompt=prompt)


def tell(response: msr.InferenceResponse) -> None:
    """The answer, and what each attempt met."""
    attempts = ", then ".join(
        f"{attempt['worker_id']} {attempt['code'] or 'answered'}" for attempt in response.metadata.attempts
    )
    print(f"{response.text} ({attempts})")


async def with_asyncio() -> None:
    """Coroutines: for services."""
    async with msr.ControllerNode(CONFIG) as controller:
        controller.add_local_worker(broken, worker_id="a", models=["spell"])
        controller.add_local_worker(spell, worker_id="b", models=["spell"])
        tell(await controller.handle_buffered_request(request("mlx")))
        answers = await asyncio.gather(
            *(controller.handle_buffered_request(request(word)) for word in ("one", "two", "three"))
        )
        print(" ".join(answer.text for answer in answers))
        stream = await controller.handle_streaming_request(request("stream"))
        async with stream:  # leaving it early ends the work on the worker
            async for event in stream:
                print(event.text, end="", flush=True)
        print()


def without_asyncio() -> None:
    """The blocking twins: for scripts and notebooks."""
    with msr.ControllerNode(CONFIG) as controller:
        controller.add_local_worker(spell, worker_id="c", models=["spell"])
        tell(controller.generate(request("mlx")))
        for event in controller.generate_stream(request("stream")):
            print(event.text, end="", flush=True)
        print()


if __name__ == "__main__":
    logging.getLogger("mlx_serving_router").setLevel("ERROR")  # one of the workers fails on purpose
    asyncio.run(with_asyncio())
    without_asyncio()
