"""`ClusterConfig` from Python; what a configuration may hold is tested in Rust."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving_router import ClusterConfig, ConfigError, ControllerNode, Router
from mlx_serving_router._config import as_config

if TYPE_CHECKING:
    from pathlib import Path

SECRET: dict[str, Any] = {
    "nats": {"mode": "external", "user": "me", "password": "a secret", "serverUrl": "nats://me:secret@host"},
    "controller": {"apiKeys": ["a secret"]},
}


def test_defaults_need_nothing() -> None:
    config = ClusterConfig()
    assert config.to_dict()["requestRouting"]["retry"]["maxRetries"] == 2
    assert config == ClusterConfig.from_dict({})
    assert repr(config) == "ClusterConfig()"


def test_a_file_is_overridden_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster:\n  requestRouting:\n    retry:\n      maxRetries: 5\n      retryDelayMs: 7\n")
    monkeypatch.setenv("MLX_ROUTER__REQUEST_ROUTING__RETRY__MAX_RETRIES", "3")
    for path in (file, str(file)):
        retry = ClusterConfig.load(path).to_dict()["requestRouting"]["retry"]
        assert (retry["maxRetries"], retry["retryDelayMs"]) == (3, 7)
    assert as_config(None).to_dict()["requestRouting"]["retry"]["maxRetries"] == 3
    assert as_config({}).to_dict()["requestRouting"]["retry"]["maxRetries"] == 2


def test_keys_in_either_style() -> None:
    assert ClusterConfig.from_dict({"request_routing": {"timeout_ms": 5}}) == ClusterConfig.from_dict(
        {"requestRouting": {"timeoutMs": 5}}
    )


def test_an_error_says_where(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("requestRouting:\n  retry:\n    maxRetris: 5\n")
    with pytest.raises(ConfigError, match="did you mean maxRetries") as caught:
        ClusterConfig.load(file)
    error = caught.value
    assert (error.path, error.line, error.column) == (str(file), 3, 5)
    assert error.key == "requestRouting.retry.maxRetris"
    assert str(error).startswith(f"{file}:3:5: requestRouting.retry.maxRetris: unknown key")
    with pytest.raises(ConfigError, match="cannot be read"):
        ClusterConfig.load(tmp_path / "none.yaml")


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ROUTER__NATS__PROT", "1")
    with pytest.raises(ConfigError, match="MLX_ROUTER__NATS__PROT") as caught:
        ClusterConfig.from_environment()
    assert caught.value.variable == "MLX_ROUTER__NATS__PROT"


def test_secrets_are_kept_but_not_shown() -> None:
    config = ClusterConfig.from_dict(SECRET)
    assert config.to_dict()["nats"]["password"] == "a secret"
    assert "secret" not in repr(config)
    assert repr(config).startswith("ClusterConfig.from_dict({")
    assert repr(config).count("***") >= 2


def test_a_configuration_survives_its_copies() -> None:
    config = ClusterConfig.from_dict(SECRET)
    assert pickle.loads(pickle.dumps(config)) == config
    assert ClusterConfig.from_dict(config.to_dict()) == config
    assert hash(ClusterConfig.from_dict(SECRET)) == hash(config)
    assert config != ClusterConfig()


def test_the_schema_has_every_key() -> None:
    schema = ClusterConfig.json_schema()
    assert set(ClusterConfig().to_dict()) <= set(schema["$defs"]["ClusterConfig"]["properties"])


def test_what_is_no_configuration_is_refused() -> None:
    for wrong in (5, ["a"], b"cluster.yaml"):
        with pytest.raises(TypeError, match="a configuration is"):
            as_config(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config\.nats: is of type object"):
        ClusterConfig.from_dict({"nats": object()})


def test_what_this_version_cannot_do_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="hedging") as caught:
        ControllerNode({"nats": {"mode": "none"}, "requestRouting": {"hedging": {"enabled": True}}})
    assert caught.value.key == "requestRouting.hedging.enabled"


def test_every_strategy_can_be_had() -> None:
    names = [choice["const"] for choice in ClusterConfig.json_schema()["$defs"]["Strategy"]["oneOf"]]
    assert "prefix_aware" in names
    for name in names:
        for make in (Router, ControllerNode):
            make({"nats": {"mode": "none"}, "loadBalancing": {"strategy": name}})
