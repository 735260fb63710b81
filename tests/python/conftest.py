"""What every Python test shares. Markers, strictness and the time limit of a test are in pyproject.toml.

Nothing here needs the extension module.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import pytest

from mlx_serving_router.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import Iterator

_prefixes = itertools.count(1)


@pytest.fixture(scope="session")
def nats() -> Iterator[NatsServer]:
    """A nats-server on a free port, shared by the whole run: keep apart with `nats_prefix`, do not stop it."""
    with NatsServer(port=0) as server:
        yield server


@pytest.fixture
def nats_prefix() -> str:
    """A `nats.subjectPrefix` that no other test uses."""
    return f"t{os.getpid()}-{next(_prefixes)}."
