"""mlx-lm workers for the benchmarks, each a process of its own: how they are started, and what runs in them.

A worker ends with its standard input, so that none is left behind. Each line there is answered with what it remembers:
memory in bytes, and how many objects Python tracks.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sides import Process, SideError

from mlx_serving_router import ClusterConfig
from mlx_serving_router.nats_server import NatsServerError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny-model" / "model"
NAME = "bench"
_LOADING = 60.0


def conduct(work: Coroutine[Any, Any, int]) -> int:
    """Tells the load of the machine, does the work and returns the exit status; what fails is told in words."""
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    try:
        return asyncio.run(work)
    except (NatsServerError, SideError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def config(url: str, **changes: Any) -> ClusterConfig:
    """What controllers and workers of a benchmark are told, with changes of whole sections."""
    return ClusterConfig.from_dict(
        {"nats": {"mode": "external", "serverUrl": url}, "logging": {"level": "warning"}, **changes}
    )


def start(
    url: str, worker_id: str, *, model: Path = MODEL, heartbeat_ms: int = 5000, **engine: Any
) -> Process:
    """A worker that has yet to load its model; its first answer says that it is ready.

    Args:
        url: The NATS server.
        worker_id: Its name.
        model: The model's folder.
        heartbeat_ms: `discovery.heartbeatIntervalMs`.
        engine: Options of `MlxEngine`.
    """
    setup = {
        "url": url,
        "worker_id": worker_id,
        "model": os.fspath(model),
        "heartbeat_ms": heartbeat_ms,
        "engine": engine,
    }
    return Process(worker_id, [sys.executable, __file__, json.dumps(setup)])


@contextlib.contextmanager
def ready(processes: list[Process]) -> Iterator[list[Process]]:
    """The processes, once each has said that it is ready; they are gone afterwards."""
    try:
        for process in processes:
            process.read(_LOADING)
        yield processes
    finally:
        for process in processes:
            process.end()
        for process in processes:
            process.wait()


def resident(pid: int) -> int:
    """The resident memory of a process in bytes."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024


# === in the worker's process ===


def _memory() -> dict[str, int]:
    import mlx.core as mx

    gc.collect()
    return {
        "resident": resident(os.getpid()),
        "mlx": mx.get_active_memory(),
        "mlx_cache": mx.get_cache_memory(),
        "objects": len(gc.get_objects()),
    }


async def _work(setup: dict[str, Any]) -> None:
    from mlx_serving_router import WorkerNode
    from mlx_serving_router.mlx import MlxEngine

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    engine = MlxEngine({NAME: setup["model"]}, **setup["engine"])
    told = config(setup["url"], discovery={"heartbeatIntervalMs": setup["heartbeat_ms"]})
    async with WorkerNode(engine, config=told, worker_id=setup["worker_id"]):
        say({"ready": True})
        while await asyncio.to_thread(sys.stdin.readline):
            say(_memory())


if __name__ == "__main__":
    asyncio.run(_work(json.loads(sys.argv[1])))
