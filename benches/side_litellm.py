"""LiteLLM's Router as it comes: so many mocked deployments, or a list of addresses (third argument, JSON)."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
os.environ["LITELLM_LOG"] = "ERROR"

from litellm import Router
from measure import Setup, WrongAnswerError, run, serve


class _LiteLlm:
    def __init__(self, router: Router, setup: Setup) -> None:
        self._router = router
        self._setup = setup
        self._messages = setup.messages()

    async def _ask(self, *, stream: bool) -> Any:
        setup = self._setup
        return await self._router.acompletion(
            model=setup.model, messages=self._messages, max_tokens=setup.tokens, stream=stream
        )

    async def buffered(self, _number: int) -> None:
        response = await self._ask(stream=False)
        if response.choices[0].message.content != self._setup.answer:
            raise WrongAnswerError("another text than the worker's")

    async def streaming(self, _number: int) -> int:
        first = tokens = 0
        async for chunk in await self._ask(stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                tokens += 1
                first = first or time.perf_counter_ns()
        if tokens != self._setup.tokens:
            raise WrongAnswerError(f"{tokens} tokens instead of {self._setup.tokens}")
        return first


async def _main(setup: Setup) -> None:
    workers: int | list[str] = json.loads(sys.argv[3])
    model = {"model": f"openai/{setup.model}", "api_key": "unused"}
    if isinstance(workers, int):
        # Never asked: the mocked answer is taken instead.
        unused = [f"http://127.0.0.1:9/{number}" for number in range(workers)]
        parameters = [{**model, "api_base": url, "mock_response": setup.answer} for url in unused]
    else:
        parameters = [{**model, "api_base": f"{url}/v1"} for url in workers]
    router = Router(model_list=[{"model_name": setup.model, "litellm_params": each} for each in parameters])
    await serve(_LiteLlm(router, setup), setup)


if __name__ == "__main__":
    run(_main, sys.argv[2])
