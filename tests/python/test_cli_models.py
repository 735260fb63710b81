"""The models of `mlx-serving-router worker`, as a process of its own."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from cluster import LOADING, Process, ask, settings, until
from enginejobs import MODEL
from mlx_serving_router import ClusterConfig, ControllerNode
from mlx_serving_router._models import engine
from modelfiles import copy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mlx_serving_router.nats_server import NatsServer

pytestmark = [pytest.mark.model, pytest.mark.nats]

CALM = {
    "requestRouting": {"timeoutMs": 60_000, "acceptTimeoutMs": 60_000},
    "controller": {"workerOfflineTimeoutMs": 15_000},
}


@pytest.fixture
async def controller(nats: NatsServer, nats_prefix: str) -> AsyncIterator[ControllerNode]:
    pytest.importorskip("mlx_lm")
    async with ControllerNode(settings(nats.url, nats_prefix, **CALM)) as controller:
        yield controller


async def test_a_worker_loads_what_it_is_configured_to_and_the_rest_on_demand(
    nats: NatsServer, nats_prefix: str, controller: ControllerNode, tmp_path: Path
) -> None:
    copy(tmp_path / "models" / "org" / "tiny")
    config = tmp_path / "worker.json"
    warming: dict[str, Any] = {"preWarming": {"models": ["warm"], "timeoutPerModelMs": 60_000}}
    config.write_text(json.dumps(settings(nats.url, nats_prefix, **CALM, workers=warming)))
    models = ("--model", f"warm={MODEL}", "--model", f"cold={MODEL}", "--models-dir", tmp_path / "models")
    limits = (
        "--memory-hard",
        "1T",
        "--memory-soft",
        "900G",
        "--prompt-cache",
        "64M",
        "--prefill-step-size",
        "128",
    )
    with Process(
        "-m", "mlx_serving_router", "worker", "--config", config, "--id", "w", *models, *limits
    ) as worker:
        await until(lambda: controller.worker("w") or worker.process.poll() is not None, "it joins", LOADING)
        assert worker.process.poll() is None, worker.errors()
        await until(
            lambda: [each.loaded_models for each in controller.workers()] == [["warm"]], "it says what it has"
        )
        assert [each.models for each in controller.workers()] == [["org/tiny", "warm", "cold"]]
        response = await controller.handle_buffered_request(ask("What do bees make?", model_id="org/tiny"))
        assert response.text == "Bees make honey."
        worker.signal(signal.SIGTERM)  # right after a thread that loaded a model has ended
        assert await worker.ended() == 0, worker.errors()
        assert "Traceback" not in worker.errors()


async def test_a_worker_that_is_ended_while_it_warms_up_ends(
    nats: NatsServer, nats_prefix: str, controller: ControllerNode, tmp_path: Path
) -> None:
    config = tmp_path / "worker.json"
    config.write_text(json.dumps(settings(nats.url, nats_prefix, **CALM)))
    models = [f"--model=m{number}={MODEL}" for number in range(50)]
    options = ("--config", config, "--id", "w", "--register-when", "warming")
    with Process("-m", "mlx_serving_router", "worker", *options, *models) as worker:
        await until(lambda: controller.worker("w") or worker.process.poll() is not None, "it joins", LOADING)
        seen = controller.worker("w")
        assert seen is not None, worker.errors()
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0, worker.errors()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pre_warm": ["other"]}, "pre_warm names 'other'; the models are tiny"),
        ({"register_when": "soon"}, "register_when is 'soon'"),
        (
            {"memory_soft_bytes": 9, "memory_hard_bytes": 8},
            "memory_soft_bytes is 9, above memory_hard_bytes, 8",
        ),
    ],
)
def test_what_cannot_be_used_is_named(given: dict[str, Any], words: str) -> None:
    pytest.importorskip("mlx_lm")
    left_out: dict[str, Any] = dict.fromkeys(("models_dir", "pre_warm", "register_when", "load_timeout"))
    with pytest.raises(ValueError, match=words):
        engine([f"tiny={MODEL}"], ClusterConfig(), hf_cache=False, **{**left_out, **given})
