"""A worker as a process of its own: `mlx-serving-router worker`.

It ends by a signal, after its requests; or by itself, with an error, when its engine fails or another worker takes its
name.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from mlx_serving_router._command import CommandError, stop_signals, unless
from mlx_serving_router._errors import ControllerError, ControllerErrorCode
from mlx_serving_router._worker import WorkerNode

if TYPE_CHECKING:
    from mlx_serving_router._native import ClusterConfig
    from mlx_serving_router.engine import Engine

#: Seconds that running requests get when a worker is told to end.
DRAIN_SECONDS: Final = 60.0

_logger = logging.getLogger(__name__)


async def work(engine: Engine, config: ClusterConfig, *, worker_id: str | None) -> None:
    """Runs a worker until a signal comes.

    Args:
        engine: What answers.
        config: The configuration.
        worker_id: The worker's name; one is made where it is None.

    Raises:
        CommandError: NATS cannot be reached, or the worker stopped by itself.
        ControllerError: Another worker has taken the name.
        ModelLoadError: No model can be loaded.
        ValueError: The name is unsuitable.
    """
    node = WorkerNode(engine, config=config, worker_id=worker_id)
    with stop_signals() as stopping:
        try:
            _logger.info("%s starts, with %s", node.worker_id, ", ".join(engine.models))
            await unless(stopping, node.start())
            if not stopping.is_set():
                _logger.info("%s is ready", node.worker_id)
                await unless(stopping, node.wait())
                if not stopping.is_set():
                    raise CommandError(f"worker {node.worker_id} stopped, and nobody had told it to")
            _logger.info("%s finishes what it has; a second signal ends it at once", node.worker_id)
        except ControllerError as error:
            if error.code is not ControllerErrorCode.NATS_ERROR:
                raise
            raise CommandError(
                f"{error.message}. A worker joins a NATS server and never starts one: run `mlx-serving-router serve`"
                " first, which does, or name a server with --nats URL (`up` is both in one)"
            ) from error
        finally:
            await node.stop(DRAIN_SECONDS)
    _logger.info("%s has ended", node.worker_id)
