"""Which models MlxEngine has in memory: on demand, evicted, and within limits."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from cluster import ENDLESS
from enginejobs import MODEL, FakeJob, Running, job
from modelfiles import BEES, WEIGHTS, HeldLoads, bees, copy, engine, loaded, memory_of_mlx

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _mlx() -> None:
    pytest.importorskip("mlx_lm")


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
