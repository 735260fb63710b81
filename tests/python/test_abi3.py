"""The wheel: one for every CPython from 3.11 on, with all its parts, and importable without any dependency."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # seconds: without an earlier build, this one compiles all

_DESCRIBE = """
import platform, sys, sysconfig
if platform.python_implementation() == "CPython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d.%d" % sys.version_info[:2])
"""

_SMOKE = """
import sys
sys.path.insert(0, sys.argv[1])
import mlx_serving_router as msr
assert msr.__file__.startswith(sys.argv[1]), msr.__file__
request = msr.InferenceRequest(model_id="tiny", prompt="Hello")
print(request.to_dict()["modelId"])
"""


@cache
def _interpreters() -> dict[str, Path]:
    """One ordinary CPython of each version: this one, those on the PATH, those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable]
    candidates += [found for minor in range(11, 15) if (found := shutil.which(f"python3.{minor}"))]
    candidates += map(str, sorted(pyenv.glob("versions/3.*/bin/python")))
    found: dict[str, Path] = {}
    for candidate in candidates:
        answer = subprocess.run(
            [candidate, "-I", "-c", _DESCRIBE], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0 and answer.stdout.strip():
            found.setdefault(answer.stdout.strip(), Path(candidate))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; quick where `make build` has compiled the same sources."""
    out = tmp_path_factory.mktemp("wheel")
    # As in `make build`: another interpreter or environment would make cargo compile once more.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    built = subprocess.run(
        [sys.executable, "-m", "maturin", "build", "--release", "--locked", "--out", out],
        cwd=ROOT,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents alone, as an installer would lay them out."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_it_is_tagged_for_the_stable_abi(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


def test_it_has_its_types_its_licence_and_one_extension_module(installed: Path) -> None:
    package = installed / "mlx_serving_router"
    assert [file.name for file in package.glob("_native*.so")] == ["_native.abi3.so"]
    assert (package / "py.typed").is_file()
    assert (package / "_native.pyi").is_file()
    assert len(list(installed.glob("*.dist-info/licenses/LICENSE"))) == 1


def test_it_needs_no_other_package(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    header = HeaderParser().parsestr(metadata.read_text(encoding="utf-8"))
    assert header["Requires-Python"] == ">=3.11"
    needed = header.get_all("Requires-Dist", [])
    assert [requirement for requirement in needed if "extra ==" not in requirement] == []
    assert set(header.get_all("Provides-Extra")) == {
        "fastapi",
        "mlx",
        "nats-server",
        "cli",
        "notebook",
        "all",
    }


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_it_is_imported_by(version: str, installed: Path) -> None:
    interpreter = _interpreters().get(version)
    if interpreter is None:
        pytest.skip(f"no CPython {version} on this machine")
    # -I and -S: nothing but the standard library and the wheel.
    command = [interpreter, "-I", "-S", "-B", "-W", "error", "-c", _SMOKE, installed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny\n", "")
