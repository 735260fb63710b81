"""What every Python test shares. Markers, strictness and the time limit of a test are in pyproject.toml.

Nothing here needs the extension module.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
from typing import TYPE_CHECKING

import pytest

from mlx_serving_router.nats_server import NatsServer
from programs import free_port, modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from cluster import WorkerProcess

_prefixes = itertools.count(1)


def pytest_collection_finish() -> None:
    """What was imported stays: a test that collects garbage need not have all of it looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def nats() -> Iterator[NatsServer]:
    """A nats-server on a free port, shared by the whole run: keep apart with `nats_prefix`, do not stop it."""
    with NatsServer(port=0) as server:
        yield server


@pytest.fixture
def nats_prefix() -> str:
    """A `nats.subjectPrefix` that no other test uses."""
    return f"t{os.getpid()}-{next(_prefixes)}."


@pytest.fixture(scope="session")
def tiny_prefix() -> str:
    """The `nats.subjectPrefix` of `tiny_workers`."""
    return f"tiny{os.getpid()}."


@pytest.fixture(scope="session")
def tiny_workers(nats: NatsServer, tiny_prefix: str) -> Iterator[list[WorkerProcess]]:
    """Two worker processes with the tiny model, shared by the whole run: they are healthy, and have to stay so."""
    from cluster import WorkerProcess

    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("the extra [mlx] is not installed")
    workers = [WorkerProcess(nats.url, tiny_prefix, f"tiny-{number}") for number in range(2)]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture
def closed() -> int:
    """A port on which nothing listens."""
    return free_port()


@pytest.fixture
def benches() -> Iterator[Callable[[str], ModuleType]]:
    """The modules of benches/, by name."""
    with modules_of("benches") as modules:
        yield modules


@pytest.fixture
def scripts() -> Iterator[Callable[[str], ModuleType]]:
    """The modules of scripts/, by name."""
    with modules_of("scripts") as modules:
        yield modules
