"""The models of an MlxEngine as a fleet sees them: WorkerNode, NATS and ControllerNode around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import nats as nats_py
import pytest

from cluster import CALM, ask, failure, read, routing, settings, text, until
from enginejobs import MODEL
from mlx_serving_router import ControllerError, ControllerNode, WorkerNode
from modelfiles import DAMAGES, WEIGHTS, HeldLoads, copy, memory_of_mlx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from mlx_serving_router.nats_server import NatsServer

pytestmark = [pytest.mark.model, pytest.mark.nats]

PATIENCE = 60_000  # milliseconds: a machine may be busy
PATIENT = {
    "timeoutMs": PATIENCE,
    "streamingTimeoutMs": PATIENCE,
    "acceptTimeoutMs": PATIENCE,
    "streamIdleTimeoutMs": PATIENCE,
}
BEES = "Bees make honey."


class Fleet:
    """A controller, and workers with engines of their own, in this process."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url = url
        self.prefix = prefix
        self.controller: ControllerNode = None  # type: ignore[assignment] # set by the fixture
        self._stack = contextlib.AsyncExitStack()

    async def join(self, worker_id: str, models: Mapping[str, Path], **options: Any) -> WorkerNode:
        from mlx_serving_router.mlx import MlxEngine

        config = settings(self.url, self.prefix, **CALM)
        worker = WorkerNode(MlxEngine(models, **options), config=config, worker_id=worker_id)
        await self._stack.enter_async_context(worker)
        return worker

    async def control(self, **limits: Any) -> ControllerNode:
        strategy = {"loadBalancing": {"strategy": limits.pop("strategy", "least_requests")}}
        config = settings(self.url, self.prefix, **CALM, **routing(**{**PATIENT, **limits}), **strategy)
        self.controller = await self._stack.enter_async_context(ControllerNode(config))
        return self.controller

    async def close(self) -> None:
        await self._stack.aclose()

    async def bees(self, model: str, **fields: Any) -> str:
        asked = ask("What do bees make?", model_id=model, **fields)
        return (await self.controller.handle_buffered_request(asked)).text

    async def story(self, model: str) -> str:
        asked = ask("Tell me a story.", model_id=model)
        return text(await read(await self.controller.handle_streaming_request(asked)))

    def seen(self, worker_id: str = "w") -> tuple[str, list[str], list[str]]:
        worker = self.controller.worker(worker_id)
        assert worker is not None
        return worker.phase, worker.loaded_models, worker.loading_models


@pytest.fixture
async def fleet(nats: NatsServer, nats_prefix: str) -> AsyncIterator[Fleet]:
    pytest.importorskip("mlx_lm")
    fleet = Fleet(nats.url, nats_prefix)
    yield fleet
    await fleet.close()


@pytest.mark.parametrize("way", ["buffered", "streaming"])
async def test_a_request_waits_for_its_model_however_short_its_own_limits_are(
    fleet: Fleet, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoads(monkeypatch, "cold")
    await fleet.join("w", {"cold": MODEL}, pre_warm=[])
    # The load takes longer than an answer may.
    controller = await fleet.control(timeoutMs=3000, streamingTimeoutMs=3000, acceptTimeoutMs=3000)
    await controller.wait_for_workers(1, timeout=30)
    waiting = asyncio.create_task(fleet.story("cold") if way == "streaming" else fleet.bees("cold"))
    await until(lambda: fleet.seen() == ("loading", [], ["cold"]), "it says that it loads")
    asyncio.get_running_loop().call_later(5.0, held.let_go)
    assert (await waiting).startswith("Once upon a time" if way == "streaming" else BEES)
    await until(lambda: fleet.seen() == ("ready", ["cold"], []), "it is loaded")
    assert all(entry["failure_count"] == 0 for entry in controller.get_circuit_breaker_stats().values())


async def test_a_controller_knows_that_a_worker_of_its_own_process_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_serving_router.mlx import MlxEngine

    held = HeldLoads(monkeypatch, "cold")
    # The load takes longer than an answer may.
    config = {"nats": {"mode": "none"}, "requestRouting": {"timeoutMs": 3000, "retry": {"enabled": False}}}
    async with ControllerNode(config) as controller:
        engine = MlxEngine({"cold": MODEL}, pre_warm=[])
        await asyncio.to_thread(controller.add_local_worker, engine, models=["cold"])

        def seen() -> tuple[str, list[str], list[str]]:
            [worker] = controller.workers()
            return worker.phase, worker.loaded_models, worker.loading_models

        asked = ask("What do bees make?", model_id="cold")
        answer = asyncio.create_task(controller.handle_buffered_request(asked))
        await until(lambda: seen() == ("loading", [], ["cold"]), "it says that it loads")
        asyncio.get_running_loop().call_later(3.5, held.let_go)
        assert (await answer).text == BEES
        await until(lambda: seen() == ("ready", ["cold"], []), "it is loaded")


async def test_the_other_models_answer_while_one_is_loaded(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoads(monkeypatch, "cold")
    await fleet.join("w", {"warm": MODEL, "cold": MODEL}, pre_warm=["warm"], max_concurrent=4)
    await (await fleet.control()).wait_for_workers(1, timeout=30)
    waiting = [asyncio.create_task(fleet.bees("cold")) for _ in range(2)]
    await until(lambda: fleet.seen() == ("loading", ["warm"], ["cold"]), "it says that it loads")
    assert await fleet.story("warm") == await fleet.story("warm")
    assert not any(task.done() for task in waiting)
    held.let_go()
    assert await asyncio.gather(*waiting) == [BEES] * 2


async def test_models_take_turns_where_memory_holds_one(fleet: Fleet) -> None:
    limits = {"memory_soft_bytes": WEIGHTS * 3 // 2, "memory_hard_bytes": WEIGHTS * 100}
    options = {"measure_memory": memory_of_mlx(), "prompt_cache_bytes": 0, **limits}
    await fleet.join("w", {"a": MODEL, "b": MODEL}, pre_warm=["a"], **options)
    await (await fleet.control()).wait_for_workers(1, timeout=30)
    for name in "baab":
        assert await fleet.bees(name) == BEES
        await until(lambda name=name: fleet.seen()[1] == [name], "the other one has left")  # type: ignore[misc]
    stories = await asyncio.gather(*(fleet.story(name) for name in "abab"))
    assert len(set(stories)) == 1


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
async def test_a_damaged_model_harms_no_stream_beside_it(
    fleet: Fleet, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    bad = copy(tmp_path / "bad")
    damage(bad)
    await fleet.join("w", {"good": MODEL, "bad": bad}, pre_warm=["good"])
    controller = await fleet.control(retry={"enabled": False})
    await controller.wait_for_workers(1, timeout=30)
    undisturbed = await fleet.story("good")
    stories = [asyncio.create_task(fleet.story("good")) for _ in range(3)]
    for _ in range(2):
        error = await failure(fleet.bees("bad"))
        assert error.code == "MODEL_LOAD_FAILED"
        assert "'bad'" in str(error)
    assert await asyncio.gather(*stories) == [undisturbed] * 3
    breaker = controller.get_circuit_breaker_stats()["w"]
    assert (breaker["state"], breaker["failure_count"]) == ("CLOSED", 0)


async def test_another_worker_answers_where_one_cannot_load_the_model(fleet: Fleet, tmp_path: Path) -> None:
    bad = copy(tmp_path / "bad")
    DAMAGES["weights"](bad)
    await fleet.join("sound", {"m": MODEL})
    await fleet.join("ill", {"m": bad, "other": MODEL}, pre_warm=["other"])
    await (await fleet.control()).wait_for_workers(2, timeout=30)
    assert [await fleet.bees("m") for _ in range(6)] == [BEES] * 6
    assert await fleet.bees("other") == BEES


async def test_a_warming_worker_joins_at_once_and_has_requests_wait(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoads(monkeypatch, "a", "b")
    controller = await fleet.control()
    await fleet.join("w", {"a": MODEL, "b": MODEL}, register_when="warming")
    await controller.wait_for_workers(1, timeout=30)
    await until(lambda: fleet.seen() == ("loading", [], ["a", "b"]), "it warms up")
    answers = [asyncio.create_task(fleet.bees(name)) for name in "ba"]
    held.let_go("a")
    assert await answers[1] == BEES
    assert (fleet.seen()[2], answers[0].done()) == (["b"], False)
    held.let_go("b")
    assert await answers[0] == BEES
    await until(lambda: fleet.seen()[0] == "ready", "it is warm")


async def test_a_worker_that_warms_up_completely_joins_afterwards(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoads(monkeypatch, "a")
    controller = await fleet.control()
    joining = asyncio.create_task(fleet.join("w", {"a": MODEL, "none": tmp_path / "none"}))
    await asyncio.to_thread(held.begun, "a")
    assert controller.workers() == []
    held.let_go()
    await joining
    await controller.wait_for_workers(1, timeout=30)
    assert fleet.seen()[1:] == (["a"], [])
    assert await fleet.bees("a") == BEES


async def test_a_start_without_any_model_fails(fleet: Fleet, tmp_path: Path) -> None:
    from mlx_serving_router.mlx import ModelLoadError

    with pytest.raises(ModelLoadError, match="'none'"):
        await fleet.join("w", {"none": tmp_path / "none"})


async def test_a_worker_short_of_memory_refuses_the_less_important_first(fleet: Fleet) -> None:
    used = 0
    limits = {"memory_soft_bytes": 2**40, "memory_hard_bytes": 2**41, "measure_memory": lambda: used}
    await fleet.join("w", {"m": MODEL}, **limits)
    controller = await fleet.control(retry={"enabled": False})
    await controller.wait_for_workers(1, timeout=30)

    async def refuses(priority: str) -> bool:
        try:
            await fleet.bees("m", priority=priority)
        except ControllerError as error:
            overloaded = error
        else:
            return False
        assert (overloaded.code, overloaded.context["retry_after_ms"] > 0) == ("WORKER_OVERLOADED", True)
        return True

    async def become(expected: tuple[bool, bool]) -> None:
        async with asyncio.timeout(30):
            while (await refuses("low"), await refuses("high")) != expected:  # noqa: ASYNC110 it tells nobody
                await asyncio.sleep(0.3)

    await become((False, False))
    used = 2**40 + 1
    await become((True, False))
    used = 2**41 + 1
    await become((True, True))
    used = 0
    await become((False, False))


async def test_a_worker_that_loads_another_model_keeps_its_place_in_routing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoads(monkeypatch, "b")
    await fleet.join("busy", {"a": MODEL, "b": MODEL}, register_when="warming")
    await fleet.join("cold", {"a": MODEL}, pre_warm=[])
    controller = await fleet.control(strategy="skills_based")
    await controller.wait_for_workers(2, timeout=30)
    await until(lambda: fleet.seen("busy") == ("loading", ["a"], ["b"]), "it has one and loads the other")
    for _ in range(4):
        response = await controller.handle_buffered_request(ask("What do bees make?", model_id="a"))
        assert (response.worker_id, response.text) == ("busy", BEES)
    held.let_go()


async def test_the_registration_tells_what_there_is_and_where(fleet: Fleet, tmp_path: Path) -> None:
    folder = copy(tmp_path / "org" / "tiny")
    client = await nats_py.connect(fleet.url)
    registrations = await client.subscribe(f"{fleet.prefix}worker.register")
    await client.flush()
    await fleet.join("w", {"given": MODEL}, models_dir=tmp_path, pre_warm=[])
    skills = json.loads((await registrations.next_msg(timeout=30)).data)["skills"]
    await client.close()
    assert skills["availableModels"] == ["org/tiny", "given"]
    assert skills["modelPaths"] == {"org/tiny": str(folder), "given": str(MODEL)}
    assert skills["totalModelSize"] == 2 * sum(file.stat().st_size for file in MODEL.iterdir())
    assert skills["lastScanned"] > 1_700_000_000_000
    await fleet.control()
    await fleet.controller.wait_for_workers(1, timeout=30)
    assert await fleet.bees("org/tiny") == BEES
