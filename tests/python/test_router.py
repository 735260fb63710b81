"""`Router` and `Lease` from Python; how workers are chosen is tested in Rust."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving_router import CircuitState, ControllerError, Router

if TYPE_CHECKING:
    from mlx_serving_router import Lease


def fleet(*names: str, **options: Any) -> Router:
    router = Router(options or {}, seed=1)
    for name in names:
        router.add_worker(name, ["tiny"])
    return router


def in_flight(router: Router) -> dict[str, int]:
    return {worker.worker_id: worker.in_flight for worker in router.workers()}


def test_the_least_busy_worker_is_chosen() -> None:
    router = fleet("a", "b")
    held = [router.select("tiny") for _ in range(4)]
    assert in_flight(router) == {"a": 2, "b": 2}
    assert {lease.worker_id for lease in held} == {"a", "b"}


@pytest.mark.parametrize(
    "end", ["success", "failure", "release", "drop", "with"], ids=lambda end: f"ended by {end}"
)
def test_a_lease_gives_its_place_back(end: str) -> None:
    router = fleet("a")
    lease: Lease | None = router.select("tiny")
    assert lease is not None
    assert in_flight(router) == {"a": 1}
    match end:
        case "success":
            lease.success(ttft_ms=12.5)
        case "failure":
            assert lease.failure("WORKER_TIMEOUT") is False
        case "release":
            lease.release()
        case "with":
            with lease:
                pass
    if end != "drop":
        # Once is enough, and a second end changes nothing.
        lease.release()
        assert "ended" in repr(lease)
    lease = None
    gc.collect()
    assert in_flight(router) == {"a": 0}


def test_failures_open_the_breaker_and_say_so() -> None:
    router = fleet("a", requestRouting={"circuitBreaker": {"failureThreshold": 2}})
    assert router.select("tiny").failure("WORKER_TIMEOUT") is False
    assert router.select("tiny").failure("WORKER_TIMEOUT") is True
    stats = router.get_circuit_breaker_stats()["a"]
    assert stats["state"] is CircuitState.OPEN
    assert (stats["failure_count"], stats["success_count"], stats["opened_count"]) == (2, 0, 1)
    assert stats["opened_at"] is not None
    assert stats["last_failure_time"] is not None
    assert stats["last_success_time"] is None
    assert router.workers()[0].breaker is CircuitState.OPEN
    with pytest.raises(ControllerError) as caught:
        router.select("tiny")
    assert caught.value.code == "NO_HEALTHY_WORKERS"
    assert 0 < caught.value.context["retry_after_ms"] <= 36_000


def test_client_errors_open_nothing() -> None:
    router = fleet("a", requestRouting={"circuitBreaker": {"failureThreshold": 1}})
    assert router.select("tiny").failure("REQUEST_VALIDATION_FAILED") is False
    assert router.workers()[0].breaker is CircuitState.CLOSED
    with pytest.raises(ValueError, match="NONSENSE"):
        router.select("tiny").failure("NONSENSE")


def test_without_breakers_there_are_no_stats() -> None:
    router = fleet("a", requestRouting={"circuitBreaker": {"enabled": False}})
    assert router.get_circuit_breaker_stats() == {}
    assert router.workers()[0].breaker is CircuitState.DISABLED


def test_refusals_have_the_codes_of_the_contract() -> None:
    def code(router: Router, model: str = "tiny", exclude: tuple[str, ...] = ()) -> str:
        with pytest.raises(ControllerError) as caught:
            router.select(model, exclude=exclude)
        return caught.value.code

    router = fleet("a")
    assert code(Router({})) == "NO_WORKERS_AVAILABLE"
    assert code(router, "another") == "MODEL_NOT_FOUND"
    assert code(router, exclude=("a",)) == "NO_WORKERS_AVAILABLE"
    router.add_worker("a", ["tiny"], max_concurrent=1)
    lease = router.select("tiny")
    assert code(router) == "QUEUE_FULL"
    lease.release()
    assert router.select("tiny").worker_id == "a"


def test_a_session_stays_with_its_worker() -> None:
    router = fleet("a", "b", "c")
    first = router.select("tiny", session_id="s")
    again = [router.select("tiny", "s") for _ in range(5)]
    assert first.choice == "rendezvous"
    assert {lease.worker_id for lease in again} == {first.worker_id}
    assert {lease.choice for lease in again} == {"affinity"}


def test_a_prompt_returns_to_who_holds_its_beginning() -> None:
    router = fleet("a", "b", "c", loadBalancing={"strategy": "prefix_aware"})
    prompts = [f"{name}: " + "and so they went on talking. " * 50 for name in "xyz"]
    owners: list[str] = []
    for prompt in prompts:
        lease = router.select("tiny", prompt=prompt)
        assert lease.choice == "strategy"
        owners.append(lease.worker_id)
        lease.success()
    assert sorted(owners) == ["a", "b", "c"]
    for prompt, owner in reversed([*zip(prompts, owners, strict=True)]):
        lease = router.select("tiny", prompt=prompt + "And then?")
        assert (lease.worker_id, lease.choice) == (owner, "prefix")
        lease.failure("WORKER_TIMEOUT")
    assert router.select("tiny", prompt="Hello").choice == "strategy"
    assert router.select("tiny").choice == "strategy"
    assert router.select("tiny", "s", prompt=prompts[0]).choice == "rendezvous"


def test_a_decision_is_explained() -> None:
    router = fleet("a", "b")
    lease = router.select("tiny", exclude=["a"], explain=True)
    assert lease.worker_id == "b"
    assert lease.left_out == [{"worker_id": "a", "reason": "tried"}]
    assert router.select("tiny").left_out is None


def test_a_refusal_is_explained() -> None:
    router = fleet("a", "b", "c", requestRouting={"circuitBreaker": {"failureThreshold": 1}})
    router.add_worker("b", ["tiny"], max_concurrent=1)
    held = [router.select("tiny", exclude=["a", "c"])]
    router.select("tiny", exclude=["a", "b"]).failure("WORKER_TIMEOUT")
    with pytest.raises(ControllerError) as caught:
        router.select("tiny", exclude=["a"], explain=True)
    assert caught.value.code == "QUEUE_FULL"
    assert caught.value.context["left_out"] == [
        {"worker_id": "a", "reason": "tried"},
        {"worker_id": "b", "reason": "full"},
        {"worker_id": "c", "reason": "circuit_open"},
    ]
    with pytest.raises(ControllerError) as caught:
        router.select("tiny", exclude=["a"])
    assert "left_out" not in caught.value.context
    assert [lease.worker_id for lease in held] == ["b"]


def test_breakers_obey_the_operator_and_tell_what_they_do() -> None:
    router = fleet("a", requestRouting={"circuitBreaker": {"failureThreshold": 1}})
    assert [event.kind for event in router.take_events()] == ["worker_registered"]
    assert router.force_open_circuit_breaker("a") is True
    assert router.get_circuit_breaker_stats()["a"]["state"] is CircuitState.FORCED_OPEN
    with pytest.raises(ControllerError):
        router.select("tiny")
    assert router.reset_circuit_breaker("a") is True
    assert router.select("tiny").failure("WORKER_TIMEOUT") is True
    events = router.take_events()
    assert {(event.kind, event.worker_id, event.lost) for event in events} == {("breaker_changed", "a", 0)}
    assert [event.details for event in events] == [
        {"from": "CLOSED", "to": "FORCED_OPEN", "reason": "forced"},
        {"from": "FORCED_OPEN", "to": "CLOSED", "reason": "reset"},
        {"from": "CLOSED", "to": "OPEN", "reason": "consecutive_failures"},
    ]
    assert router.take_events() == []
    assert router.reset_circuit_breaker("b") is False
    assert router.force_open_circuit_breaker("b") is False


def test_events_that_nobody_takes_are_bounded() -> None:
    router = fleet("a")
    for _ in range(600):
        router.force_open_circuit_breaker("a")
        router.reset_circuit_breaker("a")
    events = router.take_events()
    assert (len(events), events[0].lost, events[1].lost) == (1_024, 177, 0)
    assert events[-1].details["to"] == "CLOSED"


def test_a_draining_worker_gets_nothing_new() -> None:
    router = fleet("a", "b")
    assert router.drain_worker("a") is True
    assert {router.select("tiny").worker_id for _ in range(4)} == {"b"}
    worker = router.worker("a")
    assert worker is not None
    assert worker.status == "draining"
    assert router.worker("c") is None
    assert router.drain_worker("c") is False


def test_a_worker_that_wants_to_be_left_alone_is() -> None:
    router = fleet("a")
    router.select("tiny").failure("WORKER_OVERLOADED", retry_after_ms=60_000)
    with pytest.raises(ControllerError) as caught:
        router.select("tiny", explain=True)
    assert caught.value.code == "QUEUE_FULL"
    assert caught.value.context["left_out"] == [{"worker_id": "a", "reason": "full"}]


def test_workers_come_and_go() -> None:
    router = fleet("a")
    assert router.remove_worker("a") is True
    assert router.remove_worker("a") is False
    assert router.workers() == []
    router.add_worker("a", ["tiny"])
    assert router.select("tiny").worker_id == "a"
    with pytest.raises(ValueError, match="no worker id"):
        router.add_worker("a.b", ["tiny"])


def test_heartbeats_tell_the_load() -> None:
    router = fleet("a", "b")
    router.heartbeat("a", active_requests=5, queue_depth=2, loaded_models=["tiny"])
    assert [router.select("tiny").worker_id for _ in range(3)] == ["b", "b", "b"]
    worker = router.workers()[0]
    assert (worker.foreign_requests, worker.queue_depth, worker.loaded_models) == (5, 2, ["tiny"])
    router.heartbeat("b", status="degraded")
    assert router.workers()[1].status == "degraded"
    with pytest.raises(ValueError, match="add_worker comes first"):
        router.heartbeat("c")
    with pytest.raises(ValueError, match="online, degraded, draining or offline"):
        router.heartbeat("a", status="tired")  # type: ignore[arg-type]


def test_a_seed_decides_every_choice() -> None:
    def picks(seed: int) -> list[str]:
        router = Router({"loadBalancing": {"strategy": "weighted_random"}}, seed=seed)
        for name in "abcd":
            router.add_worker(name, ["tiny"])
        return [router.select("tiny").worker_id for _ in range(20)]

    assert picks(1) == picks(1)
    assert picks(1) != picks(2)


@pytest.mark.parametrize("session", ["", "a\nb", "x" * 257])
def test_a_session_that_the_controller_would_refuse_is_refused(session: str) -> None:
    router = Router()
    router.add_worker("w", ["m"])
    with pytest.raises(ControllerError, match="session_id") as refused:
        router.select("m", session)
    assert refused.value.code == "INVALID_SESSION_ID"
