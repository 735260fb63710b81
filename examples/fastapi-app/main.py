"""A web service of one's own with the router inside: no extra hop, and the OpenAI API comes along under a prefix.

python examples/fastapi-app/main.py [PORT]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import uvicorn
from fastapi import Depends, FastAPI
from pydantic import BaseModel

import mlx_serving_router as msr
from mlx_serving_router.fastapi import controller_router, get_controller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def first_sentence(request: msr.InferenceRequest) -> AsyncIterator[str]:
    """Stands for a model, so that the example runs as it is."""
    text = (request.messages or [])[-1]["content"]
    for word in (text.partition(".")[0] + ".").split():
        yield f"{word} "


# With a fleet: ControllerNode("cluster.yaml"), and no local worker.
controller = msr.ControllerNode({"nats": {"mode": "none"}})
controller.add_local_worker(first_sentence, models=["summary"])

app = FastAPI(title="Notes")
app.include_router(
    controller_router(controller), prefix="/llm"
)  # starts and stops the controller with the app


class Note(BaseModel):
    """What somebody wrote."""

    text: str
    author: str | None = None


@app.post("/summaries")
async def summarize(
    note: Note, controller: Annotated[msr.ControllerNode, Depends(get_controller)]
) -> dict[str, str]:
    """A route of the service's own. Notes of one author go to the same worker, whose cache may know them."""
    request = msr.InferenceRequest(
        model_id="summary",
        messages=[{"role": "user", "content": note.text}],
        max_tokens=100,
        session_id=note.author,
    )
    response = await controller.handle_buffered_request(request, timeout=20)
    return {"summary": response.text.strip(), "worker": response.worker_id}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
