"""What the commands share: a configuration with options on top, failures told in words, signals that first ask.

Runs no controller and no worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlx_serving_router._errors import ConfigError
from mlx_serving_router._native import ClusterConfig, Controller

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping
    from pathlib import Path

_T = TypeVar("_T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class CommandError(Exception):
    """A command cannot do what it was asked; the message says why and what to do."""


# === the configuration ===


def load(path: Path | None) -> ClusterConfig:
    """The configuration of a file, or the defaults; either way with the overrides of the environment.

    Raises:
        ConfigError: It cannot be used.
    """
    return ClusterConfig.from_environment() if path is None else ClusterConfig.load(path)


def changed(config: ClusterConfig, changes: Mapping[str, Any]) -> ClusterConfig:
    """The configuration with some keys changed, which win over file and environment.

    Raises:
        ConfigError: A value cannot be used.
    """
    return ClusterConfig.from_dict(_merged(config.to_dict(), changes)) if changes else config


def check(config: ClusterConfig, path: Path | None) -> None:
    """Refuses what a controller refuses: what can be said in a configuration, and is not there in this version.

    Args:
        config: The configuration.
        path: The file that it was read from, for the message.

    Raises:
        ConfigError: A controller cannot be made with it.
    """
    try:
        Controller(config)
    except ConfigError as error:
        if path is None:
            raise
        raise ConfigError(f"{path}: {error}", error.message, path=str(path), key=error.key) from error


def changes(
    *,
    nats: str | None = None,
    prefix: str | None = None,
    host: str | None = None,
    port: int | None = None,
) -> dict[str, Any]:
    """The keys of the configuration that options set."""
    mode = None if nats is None else "external"
    sections: dict[str, dict[str, Any]] = {
        "nats": {"mode": mode, "serverUrl": nats, "subjectPrefix": prefix},
        "controller": {"bindAddress": host, "port": port},
    }
    given = {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in sections.items()
    }
    return {section: keys for section, keys in given.items() if keys}


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(settings)
    for key, value in changes.items():
        result[key] = _merged(result[key], value) if isinstance(value, dict) else value
    return result


# === signals ===


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stopping
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def unless(stopping: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T | None:
    """Does the work; None when the event comes first: the work has been cancelled then, and has ended."""
    task = asyncio.create_task(work)
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        stop.cancel()
        if task.cancel():
            await asyncio.wait((task,))
