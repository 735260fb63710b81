"""A worker of the older dialect on plain nats-py, as existing mlx-serving fleets run them.

It registers once, at its start, on subjects without a prefix; it has no incarnation, accepts nothing, cannot be
told to stop, and answers on `response.<requestId>`. Its plans are those of rawworker.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rawworker import Job, RawWorker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from nats.aio.msg import Msg


class OlderJob(Job):
    """One attempt, as it reached the worker."""

    def __init__(self, worker: OlderWorker, message: Msg) -> None:
        super().__init__(worker, message)
        assert message.reply == ""
        assert not message.headers
        self.reply = f"response.{self.request_id}"
        self._counts = worker.counts

    async def accept(self, position: int = 0) -> None:
        """It does not say so."""

    async def token(
        self,
        text: str,
        ids: Iterable[int] | None = None,  # noqa: ARG002 it names no tokens
        **fields: Any,
    ) -> None:
        index, self._index = self._index, self._index + 1
        await self.say("token", token=text, **({"index": index} if self._counts else {}), **fields)

    def _end(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"totalTokens": self._index, "latencyMs": 1.5, **fields}


class OlderWorker(RawWorker):
    """A worker that does as it is told.

    Attributes:
        counts: Whether its tokens have an index.
    """

    def __init__(self, url: str, *, counts: bool = True, **options: Any) -> None:
        super().__init__(url, **options)
        self.prefix = ""
        self.counts = counts

    def subjects(self) -> list[tuple[str, Callable[[Msg], Awaitable[None]]]]:
        """Where it listens, and what it does there."""
        return [(f"worker.{self.worker_id}.inference", self._on_request)]

    def job(self, message: Msg) -> Job:
        """An attempt, as it reached it."""
        return OlderJob(self, message)

    def registration(self) -> dict[str, Any]:
        return self._of("registration", super().registration())

    def heartbeat(self) -> dict[str, Any]:
        return self._of("heartbeat", super().heartbeat())

    @staticmethod
    def _of(kind: str, message: dict[str, Any]) -> dict[str, Any]:
        """What the older dialect has of a message."""
        unknown = {
            "registration": {"protocol", "incarnation", "capacity", "features"},
            "heartbeat": {
                "incarnation", "sequence", "queueDepth", "activeRequestIds", "tokensGenerated", "phase",
                "loadingModels", "cachedPrefixes",
            },
        }[kind]  # fmt: skip
        return {key: value for key, value in message.items() if key not in unknown}
