"""A controller's side of the wire, played with nats-py: what a worker is asked and what it answers, each message."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlx_serving_router import ClusterConfig

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.subscription import Subscription

PATIENCE = 20
"""Seconds within which a message must have come."""


class Fleet:
    """A controller's side of the wire, played by the test."""

    def __init__(self, client: Client, url: str, prefix: str) -> None:
        self.client = client
        self.url = url
        self.prefix = prefix
        self.asked = 0

    def config(self, heartbeat_interval_ms: int = 60_000) -> ClusterConfig:
        return ClusterConfig.from_dict(
            {
                "nats": {"mode": "external", "serverUrl": self.url, "subjectPrefix": self.prefix},
                "discovery": {"heartbeatIntervalMs": heartbeat_interval_ms},
            }
        )

    async def listen(self, subject: str) -> Subscription:
        subscription = await self.client.subscribe(self.prefix + subject)
        await self.client.flush()
        return subscription

    async def say(self, subject: str, body: Any = None) -> None:
        payload = b"" if body is None else json.dumps(body).encode()
        await self.client.publish(self.prefix + subject, payload)
        await self.client.flush()

    async def ask(self, worker: str, *, timeout_ms: int | None = None, **fields: Any) -> Answers:
        self.asked += 1
        fields = {
            "requestId": f"r-{self.asked}",
            "modelId": "echo",
            "prompt": "a b c",
            "stream": True,
            **fields,
        }
        inbox = self.client.new_inbox()
        answers = Answers(fields["requestId"], await self.client.subscribe(inbox))
        headers = {"Request-Id": fields["requestId"], "Attempt": "1", "Controller-Id": "c"}
        if timeout_ms is not None:
            headers["Timeout-Ms"] = str(timeout_ms)
        subject = f"{self.prefix}inference.{worker}"
        await self.client.publish(subject, json.dumps(fields).encode(), reply=inbox, headers=headers)
        return answers


class Answers:
    def __init__(self, request_id: str, subscription: Subscription) -> None:
        self.request_id = request_id
        self._subscription = subscription

    async def next(self) -> dict[str, Any]:
        message = await self._subscription.next_msg(timeout=PATIENCE)
        body: dict[str, Any] = json.loads(message.data)
        assert body["requestId"] == self.request_id
        return body

    async def rest(self) -> list[dict[str, Any]]:
        got = [await self.next()]
        while got[-1]["type"] not in {"done", "response", "error"}:
            got.append(await self.next())
        return got


async def heard(subscription: Subscription) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((await subscription.next_msg(timeout=PATIENCE)).data)
    return body
