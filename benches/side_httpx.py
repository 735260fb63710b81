"""A worker over HTTP, asked without a router by httpx: what a Python program does that has no router."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
from measure import Setup, WrongAnswerError, run, serve


class _Direct:
    def __init__(self, client: httpx.AsyncClient, setup: Setup) -> None:
        self._client = client
        self._url = f"{setup.workers[0]}/v1/chat/completions"
        self._setup = setup

    def _question(self, **how: Any) -> dict[str, Any]:
        setup = self._setup
        return {"model": setup.model, "messages": setup.messages(), "max_tokens": setup.tokens, **how}

    async def buffered(self, _number: int) -> None:
        response = await self._client.post(self._url, json=self._question())
        if response.json()["choices"][0]["message"]["content"] != self._setup.answer:
            raise WrongAnswerError("another text than the worker's")

    async def streaming(self, _number: int) -> int:
        first = tokens = 0
        question = self._question(stream=True, stream_options={"include_usage": True})
        async with self._client.stream("POST", self._url, json=question) as response:
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    choices = json.loads(data)["choices"]
                    if choices and "content" in choices[0]["delta"]:
                        tokens += 1
                        first = first or time.perf_counter_ns()
        if tokens != self._setup.tokens:
            raise WrongAnswerError(f"{tokens} tokens instead of {self._setup.tokens}")
        return first


async def _main(setup: Setup) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        await serve(_Direct(client, setup), setup)


if __name__ == "__main__":
    run(_main, "asyncio")
