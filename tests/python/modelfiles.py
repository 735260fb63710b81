"""Engines with several tiny models, copies of the model, whole and damaged, and loads that wait for a word."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING, Any, Final

from enginejobs import MODEL, PATIENCE, Running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

BEES: Final = "Bees make honey."
WEIGHTS: Final = (MODEL / "model.safetensors").stat().st_size


def copy(folder: Path) -> Path:
    """A copy of the tiny model."""
    shutil.copytree(MODEL, folder)
    return folder


def cut_weights(folder: Path) -> None:
    """As a download that broke off leaves them."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(WEIGHTS // 2)


def wrong_config(folder: Path) -> None:
    """The sizes of another model."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": 128'))


def wrong_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')


DAMAGES: Final[dict[str, Callable[[Path], None]]] = {
    "weights": cut_weights,
    "config": wrong_config,
    "tokenizer": wrong_tokenizer,
}


class HeldLoads:
    """Loads of some models wait until they are let go, and fail then where they shall. All are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str, fail: bool = False) -> None:
        from mlx_serving_router.mlx._models import LoadedModel

        self.loads: list[str] = []
        self._gates = {name: threading.Event() for name in names}
        self._changed = threading.Condition()
        load = LoadedModel.load

        def held(name: str, location: Any) -> LoadedModel:
            with self._changed:
                self.loads.append(name)
                self._changed.notify_all()
            if name in self._gates:
                assert self._gates[name].wait(PATIENCE)
                assert not fail
            return load(name, location)

        monkeypatch.setattr(LoadedModel, "load", held)

    def begun(self, name: str, times: int = 1) -> None:
        """Wait until a load has begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.loads.count(name) >= times, PATIENCE)

    def let_go(self, *names: str) -> None:
        """Let loads go on, those of the names or all."""
        for name in names or tuple(self._gates):
            self._gates[name].set()


def memory_of_mlx() -> Callable[[], int]:
    """Measures the arrays of mlx that come from now on."""
    import mlx.core as mx

    mx.clear_cache()
    before = mx.get_active_memory()
    return lambda: mx.get_active_memory() - before


def engine(*names: str, **options: Any) -> Running:
    """An engine with the tiny model under these names, none of it loaded, and room for so many of them."""
    from mlx_serving_router.mlx import MlxEngine

    room = options.pop("room", None)
    if room is not None:
        # One and a half models more leave room for what answers need.
        options |= {"memory_soft_bytes": int((room + 0.5) * WEIGHTS), "memory_hard_bytes": 100 * WEIGHTS}
        options |= {"measure_memory": memory_of_mlx(), "prompt_cache_bytes": 0}
    options.setdefault("pre_warm", [])
    running = Running(MlxEngine(dict.fromkeys(names, MODEL), **options))
    assert running.jobs.ready.wait(PATIENCE)
    return running


def bees(running: Running, name: str) -> str:
    return running.ask("What do bees make?", model_id=name).text


def loaded(running: Running) -> set[str]:
    return set(running.jobs.reports[-1][1])
