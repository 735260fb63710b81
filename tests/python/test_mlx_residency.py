"""Which models MlxEngine has in memory: on demand, evicted, pre-warmed, failed, and within limits."""

from __future__ import annotations

import errno
import gc
import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from cluster import ENDLESS
from enginejobs import MODEL, PATIENCE, FakeJob, Running, job
from modelfiles import DAMAGES, WEIGHTS, HeldLoads, copy, memory_of_mlx

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.model

BEES = "Bees make honey."


@pytest.fixture(autouse=True)
def _mlx() -> None:
    pytest.importorskip("mlx_lm")


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


# === on demand ===


def test_a_request_loads_its_model_and_heartbeats_say_so() -> None:
    running = engine("a", "b")
    assert bees(running, "b") == BEES
    running.stop()
    assert running.jobs.reports == [
        ("ready", (), ()),
        ("loading", (), ("b",)),
        ("ready", ("b",), ()),
    ]


def test_a_load_holds_up_neither_answers_nor_requests_of_loaded_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = engine("a", "b")
    story = running.ask("Tell me a story.", model_id="a").text
    held = HeldLoads(monkeypatch, "b")
    waiting = job("What do bees make?", model_id="b")
    beside: list[FakeJob] = []

    def ask_for_b(asked: FakeJob) -> None:
        if len(asked.pieces) == 5:
            running.jobs.put(waiting)
        if len(asked.pieces) == 20:
            held.begun("b")
            beside.append(job("What do bees make?", model_id="a"))
            running.jobs.put(*beside)

    told = job("Tell me a story.", model_id="a", on_token=ask_for_b)
    running.jobs.put(told)
    running.jobs.wait_until(lambda: told.end and beside and beside[0].end)
    assert (told.text, beside[0].text, waiting.end) == (story, BEES, None)
    held.let_go()
    running.jobs.wait_for(waiting)
    assert waiting.text == BEES
    running.stop()


def test_requests_for_a_model_that_is_loaded_wait_together_and_load_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = engine("a", max_concurrent=2)
    held = HeldLoads(monkeypatch, "a")
    asked = [job("What do bees make?", model_id="a") for _ in range(5)]
    running.jobs.put(*asked)
    held.begun("a")
    held.let_go()
    running.jobs.wait_for(*asked)
    assert ([one.text for one in asked], held.loads) == ([BEES] * 5, ["a"])
    running.stop()


def test_an_engine_that_is_stopped_while_it_loads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_serving_router.mlx import _residency

    monkeypatch.setattr(_residency, "_LAST_LOAD", 0.05)
    running = engine("a")
    held = HeldLoads(monkeypatch, "a", fail=True)
    asked = job("Hello", model_id="a")
    running.jobs.put(asked)
    held.begun("a")
    running.stop()
    assert asked.end is None, "the runtime ends what an engine leaves"
    held.let_go()


def test_threads_hand_the_interpreter_on_sooner_while_an_engine_runs() -> None:
    before = sys.getswitchinterval()
    first, second = engine("a"), engine("a")
    assert sys.getswitchinterval() <= 0.001 < before
    first.stop()
    assert sys.getswitchinterval() <= 0.001
    second.stop()
    assert sys.getswitchinterval() == before


def test_what_a_model_holds_beside_its_parameters_is_computed_where_it_is_loaded() -> None:
    import mlx.core as mx
    from mlx import nn

    from mlx_serving_router.mlx._models import evaluate

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._frequencies = mx.arange(4) * 2
            self.more = {"a": [mx.arange(3) + 1]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer()]

    made: list[Any] = []

    def make() -> None:
        made.append(Model())
        evaluate(made[0])

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    layer = made[0].layers[0]
    assert layer._frequencies.tolist() == [0, 2, 4, 6]
    assert layer.more["a"][0].tolist() == [1, 2, 3]


# === eviction ===


def test_the_model_used_least_recently_makes_room_and_comes_back_when_asked_for() -> None:
    running = engine("a", "b", "c", room=2)
    for name, expected in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "cb"), ("a", "ba")):
        assert bees(running, name) == BEES
        assert loaded(running) == set(expected)
    running.stop()


def test_a_model_that_goes_frees_its_memory_and_its_caches() -> None:
    import mlx.core as mx

    used = memory_of_mlx()
    running = engine("a", "b", "c", room=1, max_concurrent=4, prompt_cache_bytes=0)
    for name in "abcabc":
        assert bees(running, name) == BEES
        assert used() < 1.5 * WEIGHTS
    running.stop()
    mx.clear_cache()
    assert used() < 0.1 * WEIGHTS


def test_a_model_with_a_running_request_stays_until_it_is_done() -> None:
    running = engine("a", "b", room=1)
    ends: list[str] = []
    wants_b = job("What do bees make?", model_id="b", on_token=lambda _: ends.append("b"))

    def ask_for_b(one: FakeJob) -> None:
        if len(one.pieces) == 3:
            running.jobs.put(wants_b)
        ends.append("a")

    story = job("Tell me a story.", model_id="a", on_token=ask_for_b, max_tokens=60)
    running.jobs.put(story)
    running.jobs.wait_for(story, wants_b)
    assert (wants_b.text, len(story.token_ids)) == (BEES, 60)
    assert ends == sorted(ends), "b is not begun before a is done"
    running.stop()


def test_a_model_with_a_waiting_request_stays_until_that_is_done() -> None:
    running = engine("a", "b", room=1, max_concurrent=1)
    order: list[str] = []
    jobs = [
        job(
            "What do bees make?",
            model_id=name,
            request_id=name,
            on_token=lambda one: order.append(one.request.request_id),
        )
        for name in "aba"
    ]
    running.ask_all(jobs[:1])
    running.jobs.put(*jobs[1:])
    running.jobs.wait_for(*jobs)
    assert [one.text for one in jobs] == [BEES] * 3
    assert "".join(dict.fromkeys(order[len(jobs[0].pieces) :])) == "ab"
    running.stop()


def test_a_model_for_which_there_is_no_room_for_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_serving_router.mlx import _residency

    monkeypatch.setattr(_residency, "ROOM_WITHIN", 0.0)
    running = engine("a", "b", room=1)
    wants_b = job("Hello", model_id="b")

    def ask_for_b(one: FakeJob) -> None:
        if len(one.pieces) == 3:
            running.jobs.put(wants_b)
        one.cancelled = wants_b.end is not None

    running.ask("Tell me a story.", model_id="a", on_token=ask_for_b, **ENDLESS)
    assert (wants_b.end.code, wants_b.end.retry_after_ms) == ("WORKER_OVERLOADED", None)
    assert loaded(running) == {"a"}
    running.stop()


def test_a_model_that_no_memory_can_hold_is_refused_with_its_size() -> None:
    running = engine("a", memory_soft_bytes=1000, memory_hard_bytes=1000, measure_memory=lambda: 0)
    refused = running.ask("Hello", model_id="a").end
    assert refused.code == "MODEL_LOAD_FAILED"
    assert all(str(number) in refused.message for number in (WEIGHTS, 1000))
    running.stop()


def test_a_model_for_which_there_is_never_room_pushes_nobody_out(tmp_path: Path) -> None:
    from mlx_serving_router.mlx import MlxEngine

    big = copy(tmp_path / "big")
    with (big / "model-2.safetensors").open("wb") as file:
        file.truncate(10 * WEIGHTS)  # it takes no place on the disk
    limits = {"memory_soft_bytes": 8 * WEIGHTS, "memory_hard_bytes": 9 * WEIGHTS}
    running = Running(
        MlxEngine(
            {"a": MODEL, "b": MODEL, "big": big}, pre_warm=["a"], measure_memory=memory_of_mlx(), **limits
        )
    )
    running.ask("Tell me a story.", model_id="b")
    running.jobs.wait_until(lambda: running.jobs.cached_prefixes)
    kept = running.jobs.cached_prefixes
    refused = running.ask("Hello", model_id="big").end
    assert refused.code == "MODEL_LOAD_FAILED"
    assert all(str(number) in refused.message for number in (11 * WEIGHTS, 9 * WEIGHTS))
    assert (loaded(running), running.jobs.cached_prefixes) == ({"a", "b"}, kept)
    running.stop()


def test_idle_models_stay_where_their_going_would_not_make_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlx_serving_router.mlx import _loading, _residency
    from mlx_serving_router.mlx._memory import Memory
    from mlx_serving_router.mlx._models import LoadedModel
    from mlx_serving_router.mlx._residency import Models

    sizes = {"busy": 30, "idle": 30, "big": 50}
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))

    class Loads(_loading.Load):
        def __init__(self, name: str, location: Any) -> None:
            self.name, self.location, self.began = name, location, 0.0
            self._result = LoadedModel(
                name=name,
                nbytes=sizes[name],
                model=None,
                tokenizer=None,
                context=1,
                vocabulary=1,
                decode=str,
                end_tokens=frozenset(),
            )

        def join(self, seconds: float) -> bool:
            return seconds > 0

    monkeypatch.setattr(_residency, "Load", Loads)
    now, others, kept = 1000.0, 0, 5
    monkeypatch.setattr(_residency.time, "monotonic", lambda: now)
    memory = Memory(100, 200, lambda: others + kept + sum(sizes[name] for name in models.loaded))
    cleared: list[float] = []
    monkeypatch.setattr(memory, "clear", lambda: cleared.append(now))

    def trim(nbytes: int) -> bool:
        nonlocal kept
        trimmed, kept = min(kept, nbytes), max(0, kept - nbytes)
        return trimmed > 0

    models = Models(
        {name: tmp_path / name for name in sizes},
        memory,
        load_timeout=None,
        release=lambda _: None,
        trim=trim,
        kept=lambda: kept,
    )

    def look() -> None:
        nonlocal now
        models.advance(lambda: {"busy", "big"})
        now += 0.05

    for name in ("busy", "idle"):
        models.want(name)
        look()
        look()
    others = 21  # with busy and big: 101
    models.want("big")
    while models.loading and now < 1100:
        look()
    assert (models.loaded, kept) == (("busy", "idle"), 5)
    assert len(cleared) < 1.1 * _residency.ROOM_WITHIN, "about once a second"
    now += _residency.CROWDED_FOR
    others = 20
    models.want("big")
    look()
    look()
    assert (models.loaded, kept) == (("busy", "big"), 0)


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


# === limits of memory ===


def test_beyond_the_limits_caches_and_idle_models_go_and_work_is_refused() -> None:
    used = 10
    running = engine("a", "b", memory_soft_bytes=2**40, memory_hard_bytes=2**41, measure_memory=lambda: used)
    for name in "ab":
        running.ask("Tell me a story.", model_id=name)
    assert running.jobs.cached_prefixes
    used = 2**40 + 1
    bees(running, "b")
    running.jobs.wait_until(lambda: running.jobs.refused == ["low"])
    running.jobs.wait_until(lambda: not running.jobs.cached_prefixes)
    assert loaded(running) == {"b"}, "the last one stays: it would have to be loaded again at once"
    assert running.ask("Hello", model_id="b", priority="low").end.code == "WORKER_OVERLOADED"
    assert bees(running, "b") == BEES

    used = 2**41 + 1
    running.jobs.wait_until(lambda: running.jobs.refused == ["low", "high"])
    refused = running.ask("Hello", model_id="b", priority="high").end
    assert (refused.code, refused.retry_after_ms > 0) == ("WORKER_OVERLOADED", True)

    used = 10
    running.jobs.wait_until(lambda: running.jobs.refused == ["low", "high", None])
    assert bees(running, "a") == BEES
    running.stop()


def test_limits_are_checked_and_have_sensible_defaults() -> None:
    from mlx_serving_router.mlx._memory import Memory, total_bytes, used_bytes

    memory = Memory()
    assert 0 < used_bytes() == pytest.approx(memory.used(), rel=0.5)
    assert memory.soft < memory.hard < total_bytes()
    assert (Memory(hard=7).soft, Memory(soft=2**60).hard) == (7, 2**60)
    for soft, hard in ((0, None), (None, -1), (2, 1)):
        with pytest.raises(ValueError, match="memory_"):
            Memory(soft, hard)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pre_warm": ["b"]}, "pre_warm names 'b'; the models are a"),
        ({"register_when": "later"}, "register_when"),
        ({"load_timeout": 0}, "load_timeout"),
        ({"memory_soft_bytes": 2, "memory_hard_bytes": 1}, "memory_soft_bytes"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    from mlx_serving_router.mlx import MlxEngine

    with pytest.raises(ValueError, match=words):
        MlxEngine({"a": MODEL}, **options)
