"""The project's own environment, `.venv`: made, filled and rebuilt only when what it is made from changed.

Three stages, each with a stamp in `.venv/.stamps` that holds a digest of its inputs and is written when the stage
has succeeded: the virtual environment (the interpreter), the packages (the requirements in pyproject.toml), and the
extension module (every file that Cargo and maturin read). A stage whose stamp matches does nothing and asks no network.

Runs on the standard library of any CPython 3.11 or newer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progress import StepError, note, run_logged

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
PYTHON = BIN / "python"
LOGS = VENV / "logs"
PACKAGE = ROOT / "python" / "mlx_serving_router"

_STAMPS = VENV / ".stamps"
_MINIMUM_RUST = (1, 89)

#: What each profile installs: extras and dependency groups of pyproject.toml. `dev` contains `demo`.
_PROFILES: dict[str, tuple[list[str], list[str]]] = {
    "demo": (["fastapi", "mlx", "nats-server", "cli"], ["build", "demo"]),
    "dev": (["all"], ["dev"]),
}
_COVERED_BY = {"demo": ["demo", "dev"], "dev": ["dev"]}


def environment() -> dict[str, str]:
    """The environment that every tool runs in: `.venv` is active, and nothing leaks in from another one."""
    env = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONPATH", "CONDA_PREFIX", "__PYVENV_LAUNCHER__"):
        env.pop(name, None)
    env["VIRTUAL_ENV"] = str(VENV)
    env["PATH"] = os.pathsep.join([str(BIN), env.get("PATH", os.defpath)])
    return env


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Only one `make` at a time prepares this checkout; a second one waits for the first."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another make in this checkout to finish its set-up", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# === the virtual environment ===


def ensure_venv() -> None:
    """Makes `.venv` with the running interpreter, unless one made with it is there and works."""
    digest = _digest(sys.version, str(Path(sys.base_prefix).resolve()), str(VENV))
    if _fresh("venv", digest) and _runs(PYTHON):
        return
    if VENV.exists():
        note("the existing .venv was made with another interpreter, or does not work: made anew")
        shutil.rmtree(VENV)
    if _has_module(sys.executable, "ensurepip"):
        _quietly([sys.executable, "-m", "venv", VENV], "virtual environment")
    else:
        # Debian without python3-venv: there is the venv module and perhaps pip, but not the wheel that venv installs.
        if not _has_module(sys.executable, "pip"):
            raise StepError(
                f"{sys.executable} has neither ensurepip nor pip.\n"
                "Debian, Ubuntu: apt install python3-venv; or name another one: make PYTHON=/path/to/python3 ..."
            )
        _quietly([sys.executable, "-m", "venv", "--without-pip", VENV], "virtual environment")
        _pip([sys.executable, "-m", "pip", "--python", PYTHON], ["pip"])
    # The pip that an older CPython brings does not know today's metadata in full.
    _pip([PYTHON, "-m", "pip"], ["--upgrade", "pip>=25.1"])
    _stamp("venv", digest)


def _runs(python: Path) -> bool:
    return subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode == 0


def _has_module(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


# === the packages ===


def ensure_packages(profile: str) -> None:
    """Installs what a profile (`demo` or `dev`) needs, unless exactly that is installed already.

    Raises:
        StepError: The installation failed.
    """
    if any(_fresh(f"packages-{name}", _digest(*requirements(name))) for name in _COVERED_BY[profile]):
        return
    wanted = requirements(profile)
    note("from PyPI; only needed once")
    _pip([PYTHON, "-m", "pip"], wanted)
    _stamp(f"packages-{profile}", _digest(*wanted))


def requirements(profile: str) -> list[str]:
    """The requirements of a profile, in the order and words of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        document = tomllib.load(file)
    extras, groups = _PROFILES[profile]
    found: dict[str, None] = {}
    for extra in extras:
        found.update(dict.fromkeys(_extra(document, extra)))
    for group in groups:
        found.update(dict.fromkeys(_group(document, group)))
    return list(found)


def _extra(document: dict[str, Any], extra: str) -> Iterator[str]:
    project = document["project"]
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{re.escape(project['name'])}\[([\w,-]+)\]", requirement)
        if own is None:
            yield requirement
        else:
            for other in own[1].split(","):
                yield from _extra(document, other)


def _group(document: dict[str, Any], group: str) -> Iterator[str]:
    for entry in document["dependency-groups"][group]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _group(document, entry["include-group"])


def _pip(pip: list[str | Path], arguments: list[str]) -> None:
    def describe(line: str) -> str | None:
        words = line.split()
        if line.startswith(("Collecting ", "Downloading ", "  Downloading ")):
            return f"{words[0].lower()} {words[1]}"
        return "installing" if line.startswith("Installing collected") else None

    def failure(output: str) -> str:
        if "No space left" in output:
            return "the disk is full"
        if re.search(r"Could not find a version|No matching distribution|ConnectionError|NewConnection|Timeout", output):
            return "pip could not get a package; is PyPI (or the mirror that pip is set to) within reach?"
        return "pip could not install the Python packages"

    run_logged(
        [*pip, "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off", *arguments],
        log=LOGS / "pip.log", env=environment(), cwd=ROOT, describe=describe, failure=failure,
    )  # fmt: skip


def _quietly(command: list[str | Path], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StepError(f"{done.stdout}{done.stderr}\ncannot make the {what} in {VENV}")


# === the extension module ===


def ensure_extension() -> None:
    """Builds the Rust core in release mode and installs the package into `.venv`, editable, if sources changed.

    Raises:
        StepError: cargo is missing or too old, or the build failed.
    """
    digest = _digest(*_source_files(), sys.version)
    if _fresh("extension", digest) and any(PACKAGE.glob("_native*.so")):
        return
    _require_rust()
    crates = 0

    def describe(line: str) -> str | None:
        nonlocal crates
        words = line.split()
        if len(words) > 2 and words[0] == "Compiling":
            crates += 1
            return f"compiling {words[1]} ({crates} of at most {_crates_in_lock()} crates)"
        return None

    def failure(output: str) -> str:
        if re.search(r"linker `?\S+`? not found", output):
            return "a C compiler is missing (Debian: apt install gcc; macOS: xcode-select --install)"
        if "No space left" in output:
            return "the disk is full"
        if re.search(r"failed to download|failed to get|Could not resolve host", output):
            return "cargo could not get the crates; is crates.io within reach?"
        return "the Rust core did not build"

    # cargo may change Cargo.lock while somebody works on Cargo.toml, but never in CI.
    locked = ["--locked"] if os.environ.get("CI") else []
    run_logged(
        [PYTHON, "-m", "maturin", "develop", "--release", *locked],
        log=LOGS / "extension.log", env=environment(), cwd=ROOT, describe=describe, failure=failure,
    )  # fmt: skip
    _stamp("extension", digest)


def _source_files() -> Iterator[str]:
    """Every input of the build as `path digest`. The Python sources are no part of it: the install is editable."""
    files = [ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "pyproject.toml", ROOT / "build.rs"]
    files += sorted(path for path in (ROOT / "src").rglob("*") if path.is_file())
    for path in files:
        if path.is_file():
            yield f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _crates_in_lock() -> int:
    lock = ROOT / "Cargo.lock"
    return lock.read_text(encoding="utf-8").count("[[package]]") if lock.is_file() else 0


def _require_rust() -> None:
    try:
        answer = subprocess.run(["cargo", "--version"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise StepError("cargo was not found or does not run: install Rust from https://rustup.rs") from error
    version = re.search(r"(\d+)\.(\d+)", answer)
    if version is not None and (int(version[1]), int(version[2])) < _MINIMUM_RUST:
        needed = ".".join(map(str, _MINIMUM_RUST))
        raise StepError(f"{answer.strip()} is too old: Rust {needed} or newer is needed (rustup update stable)")


# === stamps ===


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _fresh(stage: str, digest: str) -> bool:
    try:
        return (_STAMPS / stage).read_text(encoding="utf-8") == digest
    except OSError:
        return False


def _stamp(stage: str, digest: str) -> None:
    _STAMPS.mkdir(exist_ok=True)
    (_STAMPS / stage).write_text(digest, encoding="utf-8")
