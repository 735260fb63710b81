"""What the application makes of good and bad workers. No model, no NATS server, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from main import MODEL, headline

from mlx_serving_router import testing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving_router.testing import ScriptedWorker, TestCluster

ARTICLE = "Bees make honey.\nThey live in hives."


@pytest.fixture
def cluster() -> Iterator[TestCluster]:
    with testing.TestCluster(1, transport="local", models=[MODEL]) as cluster:
        yield cluster


@pytest.fixture
def worker(cluster: TestCluster) -> ScriptedWorker:
    return cluster.workers[0]


def test_the_model_writes_the_headline(cluster: TestCluster, worker: ScriptedWorker) -> None:
    worker.script = testing.answer("Honey", " comes", " from bees")
    assert headline(cluster.controller, ARTICLE) == "Honey comes from bees"
    [asked] = worker.requests
    assert "They live in hives." in asked.request.messages[0]["content"]


def test_what_has_come_before_a_stall_is_used(cluster: TestCluster, worker: ScriptedWorker) -> None:
    worker.script = testing.stall(after_tokens=2)
    assert headline(cluster.controller, ARTICLE) == "Hello…"
    worker.wait_for_cancels_blocking(1)


@pytest.mark.parametrize(
    "script",
    [
        testing.fail("MODEL_LOAD_FAILED"),
        testing.refuse(retry_after_ms=-1),
        testing.die(),
        testing.babble(after_tokens=0),
    ],
    ids=repr,
)
def test_without_a_model_the_article_is_its_own_headline(
    cluster: TestCluster, worker: ScriptedWorker, script: testing.Script
) -> None:
    worker.script = script
    assert headline(cluster.controller, ARTICLE) == "Bees make honey. They live in hives."


def test_a_model_that_does_not_stop_is_stopped(cluster: TestCluster, worker: ScriptedWorker) -> None:
    worker.script = testing.answer(*["honey "] * 500, token_delay_ms=1)
    assert headline(cluster.controller, ARTICLE) == "honey " * 9 + "honey…"
    worker.wait_for_cancels_blocking(1)
    worker.wait_until_idle_blocking()
    assert worker.request_count == 1


def test_a_second_worker_steps_in(cluster: TestCluster, worker: ScriptedWorker) -> None:
    worker.script = testing.fail()
    cluster.add_worker(testing.answer("A second opinion"))
    headlines = {headline(cluster.controller, ARTICLE) for _ in range(4)}
    assert headlines == {"A second opinion"}
