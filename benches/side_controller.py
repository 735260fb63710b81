"""Our controller, called from Python, with everything on: routing, affinity, breaker, limits, metadata, metrics.

Its workers are those on NATS; or, by a third argument in JSON, so many in its own process that answer from a script, or
those behind a list of addresses over HTTP.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from measure import Setup, WrongAnswerError, run, serve

from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.testing import ScriptedWorker, answer

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Controller:
    def __init__(self, controller: ControllerNode, setup: Setup) -> None:
        self._controller = controller
        self._setup = setup
        self._messages = setup.messages()

    def _request(self, number: int) -> InferenceRequest:
        setup = self._setup
        return InferenceRequest(
            model_id=setup.model,
            messages=self._messages,
            max_tokens=setup.tokens,
            session_id=setup.session(number),
        )

    async def buffered(self, number: int) -> None:
        response = await self._controller.handle_buffered_request(self._request(number))
        if response.text != self._setup.answer:
            raise WrongAnswerError("another text than the worker's")

    async def streaming(self, number: int) -> int:
        stream = await self._controller.handle_streaming_request(self._request(number))
        first = tokens = 0
        async with stream:
            async for _event in stream:
                tokens += 1
                first = first or time.perf_counter_ns()
        if tokens != self._setup.tokens:
            raise WrongAnswerError(f"{tokens} tokens instead of {self._setup.tokens}")
        return first


def over_http(urls: Sequence[str], model: str) -> dict[str, Any]:
    """The configuration of a controller with workers over HTTP."""
    static = [{"workerId": f"http-{n}", "url": url, "models": [model]} for n, url in enumerate(urls)]
    return {"nats": {"mode": "none"}, "workers": {"static": static}}


def over_nats(url: str) -> dict[str, Any]:
    """The configuration of a controller with workers on NATS."""
    return {"nats": {"mode": "external", "serverUrl": url}}


async def _main(setup: Setup) -> None:
    workers: int | list[str] = json.loads(sys.argv[3]) if len(sys.argv) > 3 else []
    config: dict[str, Any] = {"nats": {"mode": "none"}}
    if isinstance(workers, list):
        config = over_http(workers, setup.model) if workers else over_nats(setup.url)
    async with ControllerNode(config) as controller:
        with contextlib.ExitStack() as scripted:
            if isinstance(workers, int):
                for _ in range(workers):
                    worker = ScriptedWorker(answer(setup.answer), controller=controller, models=[setup.model])
                    scripted.enter_context(worker)
            await controller.wait_for_workers(
                workers if isinstance(workers, int) else max(len(workers), 1), timeout=10
            )
            await serve(_Controller(controller, setup), setup)


if __name__ == "__main__":
    run(_main, sys.argv[2])
