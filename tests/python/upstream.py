"""A server with embeddings and responses, as those are that people have already."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_PATIENCE = 10.0
_PART = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
_ITEM = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [_PART]}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "inner",
    "status": "completed",
    "output": [_ITEM],
    "parallel_tool_calls": False,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1},
        "output_tokens": 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 4,
    },
}


class Upstream:
    """The server.

    Attributes:
        app: Its application.
        asked: The bodies that came.
        left: A client left in mid-stream.
        goes_on: Lets a stream that is late go on.
    """

    def __init__(self) -> None:
        """Make its application."""
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.goes_on = threading.Event()
        self.app = FastAPI()
        self.app.get("/health")(self.health)
        self.app.post("/v1/embeddings")(self.embeddings)
        self.app.post("/v1/responses")(self.responses)

    async def health(self) -> dict[str, str]:
        """It is well."""
        return {}

    async def embeddings(self, request: Request) -> Response:
        """Vectors of two numbers: 1 and 2."""
        body = await request.json()
        self.asked.append(body)
        if body["input"] == "wrong":
            return JSONResponse(
                {"error": {"message": "cannot embed that", "type": "invalid_request_error"}}, 400
            )
        vector = "AACAPwAAAEA=" if body.get("encoding_format") == "base64" else [1.0, 2.0]
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, _ in enumerate(texts)]
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": usage})

    async def responses(self, request: Request) -> Response:
        """A greeting, in one piece or as it comes."""
        body = await request.json()
        self.asked.append(body)
        if not body.get("stream"):
            return JSONResponse(RESPONSE)
        return StreamingResponse(self._events(body["input"]), media_type="text/event-stream")

    async def _events(self, what: Any) -> AsyncIterator[str]:
        begun = {**RESPONSE, "status": "in_progress", "output": [], "usage": None}
        begun_item = {**_ITEM, "status": "in_progress", "content": []}
        where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        yield _event("response.created", 0, response=begun)
        if what == "late":
            await asyncio.to_thread(self.goes_on.wait, _PATIENCE)
            return
        yield _event("response.in_progress", 1, response=begun)
        yield _event("response.output_item.added", 2, output_index=0, item=begun_item)
        yield _event("response.content_part.added", 3, part={**_PART, "text": ""}, **where)
        yield _event("response.output_text.delta", 4, delta="Hello", logprobs=[], **where)
        if what == "break":
            return
        if what == "stall":
            try:
                await asyncio.sleep(_PATIENCE)
            finally:
                self.left.set()
        yield _event("response.output_text.done", 5, text="Hello", logprobs=[], **where)
        yield _event("response.content_part.done", 6, part=_PART, **where)
        yield _event("response.output_item.done", 7, output_index=0, item=_ITEM)
        yield _event("response.completed", 8, response=RESPONSE)


def _event(kind: str, number: int, **more: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': number, **more})}\n\n"
