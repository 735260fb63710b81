"""Models of an MlxEngine that fail, come late, or are to be loaded at the start."""

from __future__ import annotations

import errno
import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from enginejobs import MODEL, PATIENCE, FakeJob, Running, job
from modelfiles import BEES, DAMAGES, HeldLoads, bees, copy, engine, loaded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _mlx() -> None:
    pytest.importorskip("mlx_lm")


# === failures ===


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_fails_alone_and_is_served_once_it_is_repaired(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_serving_router.mlx import MlxEngine, _residency

    monkeypatch.setattr(_residency, "FIRST_PAUSE", 0.2)
    held = HeldLoads(monkeypatch)
    bad = copy(tmp_path / "bad")
    damage(bad)
    running = Running(MlxEngine({"good": MODEL, "bad": bad}, pre_warm=["good"]))
    story = running.ask("Tell me a story.", model_id="good").text
    broken = [job("What do bees make?", model_id="bad") for _ in range(3)]

    def ask_for_bad(one: FakeJob) -> None:
        if len(one.pieces) == 5:
            running.jobs.put(*broken)

    told = job("Tell me a story.", model_id="good", on_token=ask_for_bad)
    running.jobs.put(told)
    running.jobs.wait_for(told, *broken)
    assert told.text == story
    assert [one.end.code for one in broken] == ["MODEL_LOAD_FAILED"] * 3
    assert "'bad'" in broken[0].end.message
    assert broken[0].end.retry_after_ms is None, "that would keep requests for other models away"
    assert held.loads == ["good", "bad"], "one try for all of them"

    for file in MODEL.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    again = job("What do bees make?", model_id="bad")
    while again.end is None or again.end.code is not None:
        again = running.ask("What do bees make?", model_id="bad")
    assert (again.text, held.loads) == (BEES, ["good", "bad", "bad"])
    running.stop()


def test_the_pauses_between_tries_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlx_serving_router.mlx import _loading, _residency
    from mlx_serving_router.mlx._memory import Memory
    from mlx_serving_router.mlx._residency import ModelLoadError, Models

    now = 1000.0
    monkeypatch.setattr(_residency.time, "monotonic", lambda: now)
    tries = 0

    class Fails(_loading.Load):
        def __init__(self, name: str, location: Any) -> None:
            nonlocal tries
            tries += 1
            self.name, self.location, self.began = name, location, now
            self._result = ModelLoadError(name, str(location), "broken")

        def join(self, seconds: float) -> bool:
            return seconds > 0

    monkeypatch.setattr(_residency, "Load", Fails)
    models = Models(
        {"a": tmp_path},
        Memory(1, 1, lambda: 0),
        load_timeout=None,
        release=lambda _: None,
        trim=lambda _: False,
        kept=lambda: 0,
    )

    def is_refused() -> bool:
        try:
            models.want("a")
        except ModelLoadError:
            return True
        return False

    waited = []
    assert not is_refused()
    for _ in range(8):
        models.advance(tuple)  # it begins
        models.advance(tuple)  # it has failed
        failed_at = now
        while is_refused():
            now += 1.0
        waited.append(now - failed_at)
    assert waited == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    assert tries == 8


def test_a_refused_job_and_what_a_failed_load_had_built_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_serving_router.mlx import ModelLoadError, _models

    built: list[weakref.ref[Any]] = []

    def refuse(name: str, location: Any, model: Any) -> None:
        built.append(weakref.ref(model))
        raise ModelLoadError(name, str(location), "it does not fit")

    monkeypatch.setattr(_models, "_check_batching", refuse)
    running = engine("a")
    refused = [job(f"Question {number}", model_id="a") for number in range(3)]
    for one in refused:
        running.ask_all([one])
        assert "it does not fit" in one.end.message
    jobs = [weakref.ref(one) for one in refused]
    refused.clear()
    del one
    gc.collect()
    assert [held() for held in (*jobs, *built)] == [None] * 4
    running.stop()


@pytest.mark.parametrize("place", ["size_of", "folder_of", "Load"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ESTALE, "Stale file handle"), RuntimeError("cannot start a thread"), ValueError("no id")],
    ids=lambda error: type(error).__name__,
)
def test_what_the_machine_refuses_about_one_model_fails_that_model_alone(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_serving_router.mlx import _residency

    running = engine("good", "bad")
    assert bees(running, "good") == BEES

    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(_residency, place, broken)
    refused = running.ask("Hello", model_id="bad").end
    assert (refused.code, str(error) in refused.message) == ("MODEL_LOAD_FAILED", True)
    assert bees(running, "good") == BEES
    running.stop()


# === pre-warming ===


@pytest.mark.parametrize("register_when", ["complete", "warming"])
def test_a_model_that_fails_does_not_keep_the_others_from_being_warmed(
    register_when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_serving_router.mlx import MlxEngine

    running = Running(
        MlxEngine(
            {"bad": tmp_path / "none", "good": MODEL, "cold": MODEL},
            pre_warm=["bad", "good"],
            register_when=register_when,
        )
    )
    assert running.jobs.ready.wait(PATIENCE)
    assert bees(running, "good") == BEES
    assert running.ask("Hello", model_id="bad").end.code == "MODEL_LOAD_FAILED"
    running.stop()
    waited = [("ready", (), ("bad", "good"))] if register_when == "warming" else []
    assert running.jobs.reports == [
        *waited,
        ("loading", (), ("bad", "good")),
        ("loading", (), ("good",)),
        ("ready", ("good",), ()),
    ]
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [("'bad'" in record.getMessage(), "none" in record.getMessage()) for record in failures] == [
        (True, True)
    ]


def test_without_any_model_there_is_no_start(tmp_path: Path) -> None:
    from mlx_serving_router.mlx import MlxEngine, ModelLoadError

    running = Running(MlxEngine({"a": tmp_path / "a", "b": tmp_path / "b"}))
    with pytest.raises(ModelLoadError, match="'a'"):
        running.ended()


def test_a_model_that_takes_too_long_counts_as_failed_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = HeldLoads(monkeypatch, "slow")
    running = engine("slow", "quick", pre_warm=None, load_timeout=0.3)
    assert loaded(running) == {"quick"}
    assert running.ask("Hello", model_id="slow").end.code == "MODEL_LOAD_FAILED"
    assert "0.3 s" in running.ask("Hello", model_id="slow").end.message
    held.let_go()
    again = running.ask("What do bees make?", model_id="slow")
    while again.end.code is not None:
        again = running.ask("What do bees make?", model_id="slow")
    assert (again.text, held.loads) == (BEES, ["slow", "quick"])
    running.stop()


def test_a_model_that_is_late_is_taken_in_without_anybody_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_serving_router.mlx import _service

    monkeypatch.setattr(_service, "_MEASURE_EVERY", 0.001)  # nothing else wakes the engine
    held = HeldLoads(monkeypatch, "slow")
    running = engine("slow", "quick", pre_warm=None, load_timeout=0.3)
    assert running.ask("Hello", model_id="slow").end.code == "MODEL_LOAD_FAILED"
    held.let_go()
    running.jobs.wait_until(lambda: loaded(running) == {"slow", "quick"})
    assert bees(running, "slow") == BEES
    running.stop()


def test_the_log_tells_of_a_load_that_is_long_in_coming(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_serving_router.mlx import _residency

    monkeypatch.setattr(_residency, "_LONG_LOAD", 0.01)
    held = HeldLoads(monkeypatch, "slow")
    running = engine("slow", "quick", pre_warm=["quick"])
    asked = job("What do bees make?", model_id="slow")
    running.jobs.put(asked)

    def times_told() -> int:
        return sum("model slow is still being loaded" in record.getMessage() for record in caplog.records)

    running.jobs.wait_until(lambda: times_told() >= 3)
    beside = job("What do bees make?", model_id="quick")
    running.jobs.put(beside)
    running.jobs.wait_for(beside)
    held.let_go()
    running.jobs.wait_for(asked)
    assert (beside.text, asked.text, times_told() < 30) == (BEES, BEES, True)
    running.stop()


def test_pre_warming_pushes_nobody_out(caplog: pytest.LogCaptureFixture) -> None:
    running = engine("a", "b", "c", pre_warm=["a", "b", "c"], room=2)
    assert loaded(running) == {"a", "b"}
    assert "model c is not pre-warmed" in caplog.text
    assert bees(running, "c") == BEES
    assert loaded(running) == {"b", "c"}
    running.stop()
