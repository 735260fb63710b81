"""Our controller, called from Python, with everything on: routing, affinity, breaker, limits, metadata, metrics."""

from __future__ import annotations

import sys
import time

from measure import Setup, WrongAnswerError, run, serve

from mlx_serving_router import ClusterConfig, ControllerNode, InferenceRequest


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


async def _main(setup: Setup) -> None:
    config = ClusterConfig.from_dict({"nats": {"mode": "external", "serverUrl": setup.url}})
    async with ControllerNode(config) as controller:
        await controller.wait_for_workers(1, timeout=10)
        await serve(_Controller(controller, setup), setup)


if __name__ == "__main__":
    run(_main, sys.argv[2])
