"""Errors: their classes, what they carry, and that the enums are the core's."""

from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import pytest

from mlx_serving_router import (
    CircuitState,
    ConfigError,
    ControllerError,
    ControllerErrorCode,
    ControllerState,
    _native,
)

RETRYABLE = {
    "WORKER_OFFLINE",
    "WORKER_UNAVAILABLE",
    "WORKER_TIMEOUT",
    "WORKER_OVERLOADED",
    "MODEL_LOAD_FAILED",
    "NO_WORKERS_AVAILABLE",
    "NO_HEALTHY_WORKERS",
    "CIRCUIT_BREAKER_OPEN",
    "ALL_RETRIES_EXHAUSTED",
    "QUEUE_FULL",
    "NATS_ERROR",
    "CONTROLLER_NOT_READY",
}


def test_the_enums_are_those_of_the_core() -> None:
    assert [code.value for code in ControllerErrorCode] == list(_native.ERROR_CODES)
    assert [state.value for state in CircuitState] == list(_native.CIRCUIT_STATES)
    assert [state.value for state in ControllerState] == list(_native.CONTROLLER_STATES)


def test_a_member_is_its_text() -> None:
    assert CircuitState.OPEN == "OPEN"
    assert str(CircuitState.HALF_OPEN) == "HALF_OPEN"
    assert f"{ControllerState.READY}" == "ready"
    assert {ControllerErrorCode.QUEUE_FULL: 1}["QUEUE_FULL"] == 1  # type: ignore[index]


def test_which_codes_are_retryable() -> None:
    assert {code for code in ControllerErrorCode if ControllerError.is_retryable(code)} == RETRYABLE
    assert ControllerError.is_retryable("QUEUE_FULL")
    with pytest.raises(ValueError, match="NONSENSE"):
        ControllerError.is_retryable("NONSENSE")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("WORKER_TIMEOUT", TimeoutError),
        ("REQUEST_VALIDATION_FAILED", ValueError),
        ("INVALID_SESSION_ID", ValueError),
    ],
)
def test_some_codes_are_standard_exceptions_too(code: str, kind: type[Exception]) -> None:
    for given in (code, ControllerErrorCode(code)):
        error = ControllerError(given, "why")
        assert isinstance(error, kind)
        assert isinstance(error, ControllerError)
        assert (error.code, error.message, error.args) == (code, "why", ("why",))
        assert type(error).__name__ == "ControllerError"
    others = [ControllerError(other, "why") for other in ControllerErrorCode if other != code]
    assert kind is ValueError or not any(isinstance(error, kind) for error in others)


def test_an_error_says_what_and_why() -> None:
    before = time.time_ns() // 1_000_000
    error = ControllerError("QUEUE_FULL", "too many wait", context={"retry_after_ms": 5})
    assert str(error) == "QUEUE_FULL: too many wait"
    assert repr(error) == "ControllerError('QUEUE_FULL', 'too many wait', context={'retry_after_ms': 5})"
    assert before <= error.timestamp <= time.time_ns() // 1_000_000
    assert error.retryable
    with pytest.raises(ValueError, match="NONSENSE"):
        ControllerError("NONSENSE", "")


def test_its_dictionary_is_camel_case_throughout() -> None:
    context = {"total_workers": 2, "attempts": [{"worker_id": "a_b", "duration_ms": 1.5}]}
    error = ControllerError(ControllerErrorCode.NO_WORKERS_AVAILABLE, "none", context=context, timestamp=7)
    assert error.to_dict() == {
        "error": {
            "code": "NO_WORKERS_AVAILABLE",
            "message": "none",
            "context": {"totalWorkers": 2, "attempts": [{"workerId": "a_b", "durationMs": 1.5}]},
            "timestamp": 7,
            "retryable": True,
        }
    }


def raised(code: str) -> ControllerError:
    error = ControllerError(code, "after all", context={"request_id": "r"}, timestamp=5)
    error.__cause__ = ControllerError("WORKER_TIMEOUT", "late", context={"limit": "accept"})
    return error


@pytest.mark.parametrize("code", ["ALL_RETRIES_EXHAUSTED", "WORKER_TIMEOUT", "INVALID_SESSION_ID"])
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_it_pickles_with_its_cause(code: str, again: Any) -> None:
    error = raised(code)
    copied = again(error)
    assert type(copied) is type(error)
    assert copied.to_dict() == error.to_dict()
    assert copied.context == {"request_id": "r"}
    assert isinstance(copied.__cause__, TimeoutError)
    assert copied.__cause__.context == {"limit": "accept"}


def test_a_configuration_error_says_where() -> None:
    error = ConfigError("c.yaml:1:2: a: is bad", "is bad", path="c.yaml", line=1, column=2, key="a")
    assert isinstance(error, ValueError)
    assert str(error) == "c.yaml:1:2: a: is bad"
    assert (error.path, error.line, error.column, error.key) == ("c.yaml", 1, 2, "a")
    assert error.message == "is bad"
