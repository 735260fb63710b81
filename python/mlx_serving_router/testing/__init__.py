"""A whole cluster for tests of your own application, with workers that misbehave as they are told.

`TestCluster` is a NATS server, a controller, its web front-end and scripted workers, in one `async with` or `with`::

    from mlx_serving_router import testing

    async with testing.TestCluster(worker_count=2) as cluster:
        cluster.workers[0].script = testing.stall(after_tokens=3)
        client = AsyncOpenAI(base_url=cluster.api_url + "/v1", api_key="unused")
        ...
        await cluster.workers[0].wait_for_cancels(1)

`docs/testing.md` describes every script and has examples. `ScriptedWorker` is one such worker for a fleet of yours.
"""

from __future__ import annotations

from typing import Final

from mlx_serving_router._native import ReceivedCancel, ReceivedRequest, Script
from mlx_serving_router.testing._cluster import SHORT_LIMITS, TestCluster
from mlx_serving_router.testing._scripts import answer, babble, die, every, fail, refuse, say, stall
from mlx_serving_router.testing._worker import ScriptedWorker

__all__ = [
    "ANSWER",
    "SHORT_LIMITS",
    "ReceivedCancel",
    "ReceivedRequest",
    "Script",
    "ScriptedWorker",
    "TestCluster",
    "answer",
    "babble",
    "die",
    "every",
    "fail",
    "refuse",
    "say",
    "stall",
]

#: What `answer()` says.
ANSWER: Final = "Hello, world"
