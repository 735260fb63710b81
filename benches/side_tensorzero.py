"""TensorZero's embedded gateway, in front of a list of addresses over HTTP (third argument, JSON).

The wheel has no provider that answers by itself: `dummy` is compiled into TensorZero's own tests alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RUST_LOG"] = "error"  # else it says at each start what it observes

from measure import Setup, WrongAnswerError, run, serve
from tensorzero import AsyncTensorZeroGateway


class _TensorZero:
    def __init__(self, gateway: AsyncTensorZeroGateway, setup: Setup) -> None:
        self._gateway = gateway
        self._setup = setup
        self._input: Any = {"messages": setup.messages()}
        self._parameters = {"chat_completion": {"max_tokens": setup.tokens}}

    async def _ask(self, *, stream: bool) -> Any:
        return await self._gateway.inference(
            function_name="chat", input=self._input, params=self._parameters, stream=stream
        )

    async def buffered(self, _number: int) -> None:
        response = await self._ask(stream=False)
        if response.content[0].text != self._setup.answer:
            raise WrongAnswerError("another text than the worker's")

    async def streaming(self, _number: int) -> int:
        first = tokens = 0
        async for chunk in await self._ask(stream=True):
            if chunk.content:
                tokens += 1
                first = first or time.perf_counter_ns()
        if tokens != self._setup.tokens:
            raise WrongAnswerError(f"{tokens} tokens instead of {self._setup.tokens}")
        return first


def _config(urls: list[str], model: str) -> str:
    """A function with a variant for each worker, of which the gateway takes one at random."""
    lines = ["[gateway]", "observability.enabled = false", "[functions.chat]", 'type = "chat"']
    for number, url in enumerate(urls):
        name = f"worker_{number}"
        lines += [f"[functions.chat.variants.{name}]", 'type = "chat_completion"', f'model = "{name}"']
        lines += [f"[models.{name}]", 'routing = ["http"]', f"[models.{name}.providers.http]"]
        lines += ['type = "openai"', f'api_base = "{url}/v1/"', f'model_name = "{model}"']
        lines += ['api_key_location = "none"']
    return "\n".join(lines)


async def _main(setup: Setup) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensorzero.toml"
        file.write_text(_config(json.loads(sys.argv[3]), setup.model), encoding="utf-8")
        building = AsyncTensorZeroGateway.build_embedded(config_file=str(file))
        async with await building as gateway:
            await serve(_TensorZero(gateway, setup), setup)


if __name__ == "__main__":
    run(_main, sys.argv[2])
