"""docs/testing.md: its examples pass as they are written, and its tables name all there is."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from cluster import PACKAGES, received
from mlx_serving_router import ControllerError, InferenceRequest, testing
from mlx_serving_router.testing import _scripts
from programs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCUMENT = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
ASK = InferenceRequest(model_id="tiny", prompt="Hello")
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


#: What pytest-asyncio would otherwise warn of.
OPTIONS = ("-o", "asyncio_default_fixture_loop_scope=function")


def pytest_of(folder: Path) -> str:
    """What pytest says of these tests, which have to pass."""
    ended = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *OPTIONS],
        cwd=folder,
        env={"PYTHONPATH": PACKAGES, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.nats
def test_every_example_passes_as_it_is_written(tmp_path: Path) -> None:
    for module in ("openai", "fastapi", "uvicorn", "httpx"):
        pytest.importorskip(module)
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"test_example_{number}.py").write_text(example, encoding="utf-8")
    assert f"{DOCUMENT.count('def test_')} passed" in pytest_of(tmp_path)


def first_cells() -> Iterator[str]:
    for line in DOCUMENT.splitlines():
        if line.startswith("| "):
            yield line.split(" | ")[0]


def test_every_script_and_everything_of_a_worker_is_described() -> None:
    said = " ".join(first_cells())
    for name in _scripts.__all__:
        assert f"{name}(" in said, name
    for name in ("then", "times"):
        assert f".{name}(" in said, name
    text = DOCUMENT.replace("wait_…_blocking", "")
    for name in public(testing.ScriptedWorker):
        plain = name.removesuffix("_blocking")
        assert re.search(rf"\bworker\.{plain}\b", text) or name in {"incarnation", "models", "worker_id"}, (
            name
        )
    for name in public(testing.TestCluster) - {"controller", "nats_url", "workers"}:
        assert re.search(rf"\b{name}\b", DOCUMENT), name
    for name in public(testing.ReceivedRequest):
        assert re.search(rf"\b{name}\b", said + DOCUMENT), name


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_short_limits_are_described() -> None:
    rows = re.findall(r"^\| `([a-z]\w*\.[\w.]+)` \| (\d+) \|$", DOCUMENT, re.MULTILINE)
    assert {key: int(value) for key, value in rows} == dict(flat(testing.SHORT_LIMITS))


def flat(settings: Any, path: str = "") -> Iterator[tuple[str, int]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def scripts() -> Iterator[tuple[str, str]]:
    """The scripts of the tables that can be written as they stand, with what is said of a stream from each."""
    before = ""
    for line in DOCUMENT.splitlines():
        match line.strip("| ").split(" | "):
            case [script, _, stream] if script.strip("`").split("(")[0] in _scripts.__all__:
                before = before if stream == "the same" else stream
                if "…" not in script:
                    yield script.strip("`"), before


@pytest.mark.parametrize(("script", "said"), list(scripts()))
async def test_a_stream_from_a_script_meets_what_the_table_says(script: str, said: str) -> None:
    code = (re.findall(r"[A-Z]+_[A-Z_]+", said) or [None])[-1]
    once = {"requestRouting": {"retry": {"enabled": False}}}
    made = eval(script, vars(testing))
    async with testing.TestCluster(1, transport="local", script=made, config=once) as cluster:
        text, error = "", None
        try:
            stream = await cluster.controller.handle_streaming_request(ASK)
            text, error = await received(stream)
        except ControllerError as before_the_first_token:
            error = before_the_first_token
    assert (error and error.code) == code
    if error is not None and "limit" in said and code == "WORKER_TIMEOUT":
        assert f"limit `{error.context['limit']}`" in said
    assert ("the text" in said) == (error is None)
    tokens = {"one": "Hel", "two": "Hello", "three": "Hello, wor"}
    if error is not None:
        assert text == tokens.get(said.split(maxsplit=1)[0], "")


def test_the_other_scripts_can_be_written_as_they_stand() -> None:
    [table] = re.findall(
        r"^\| script \| which request gets what \|\n.*\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE
    )
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        assert isinstance(eval(row, vars(testing)), testing.Script), row
