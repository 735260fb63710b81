"""Where the front-end is, and what it says of requests. Runs on the standard library in every client's environment."""

from __future__ import annotations

import json
import os
import time
import urllib.request
import uuid
from typing import Any

URL, LIVELY = os.environ["FRONT_ENDS"].split()
KEY = "right"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def session() -> str:
    """A session of one test's own."""
    return uuid.uuid4().hex


def requests_of(session_id: str) -> list[dict[str, Any]]:
    """What the fleet knows of a session's requests."""
    ask = urllib.request.Request(f"{URL}/api/controller/requests", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(ask, timeout=10) as response:
        return [one for one in json.load(response) if one["sessionId"] == session_id]


def cancelled(session_id: str) -> bool:
    """Whether the one request of a session ends as cancelled; nothing tells us of it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        [request] = requests_of(session_id)
        if request["status"] not in ("queued", "running"):
            return bool(request["status"] == "cancelled")
        time.sleep(0.01)
    return False
