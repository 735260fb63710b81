"""The project's own environment, `.venv`: made, filled and rebuilt only when what it is made from changed.

Each stage has a stamp in `.venv/.stamps` that holds a digest of its inputs and is written when the stage has succeeded:
the virtual environment (the interpreter) and its build tools, the packages (the requirements in pyproject.toml), the
extension module (every file that Cargo and maturin read), and its editable installation (the package's metadata).
A stage whose stamp matches does nothing and asks no network.

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

from progress import Job, StepError, note, run_together

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
    # A worker imports thousands of modules: compiled once, they cost half as much in each process after that.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
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
    if not (_fresh("venv", digest) and _has_module(PYTHON, "pip")):
        _make_venv(digest)
    # The pip that an older CPython brings does not know today's metadata in full.
    tools = ["pip>=25.1", *_group(_pyproject(), "build")]
    if not _fresh("tools", _digest(*tools)):
        _run(_pip([PYTHON, "-m", "pip"], ["--upgrade", *tools]))
        _stamp("tools", _digest(*tools))


def _make_venv(digest: str) -> None:
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
        _run(_pip([sys.executable, "-m", "pip", "--python", PYTHON], ["pip"]))
    _stamp("venv", digest)


def _has_module(python: str | Path, module: str) -> bool:
    try:
        return (
            subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode
            == 0
        )
    except OSError:  # a link to an interpreter that is no longer there
        return False


# === the packages and the extension module ===


def ensure_contents(profile: str) -> None:
    """Fills `.venv`: the packages that a profile (`demo` or `dev`) needs, and the Rust core in release mode.

    The two are made side by side, as one waits for the network and the other for the processor.

    Raises:
        StepError: An installation failed, cargo is missing or too old, or the build failed.
    """
    jobs = []
    packages = _digest(*requirements(profile))
    if not any(_fresh(f"packages-{name}", _digest(*requirements(name))) for name in _COVERED_BY[profile]):
        note("packages from PyPI; only needed once")
        # Compiled to bytecode when they are imported: that is a small part of them, and pip compiles everything.
        job = _pip([PYTHON, "-m", "pip"], ["--no-compile", *requirements(profile)])
        jobs.append((f"packages-{profile}", packages, job))
    extension = _digest(*_source_files(), sys.version)
    if not (_fresh("extension", extension) and any(PACKAGE.glob("_native*.so"))):
        _require_rust()
        note(
            "release build; the first time 5 minutes of two idle cores, more on busy ones; then only what changed"
        )
        jobs.append(("extension", extension, _maturin("develop", "--release", "--skip-install")))
    if jobs:
        _run(*(job for _, _, job in jobs))
    for stage, digest, _ in jobs:
        _stamp(stage, digest)
    metadata = _digest(*(_file_digest(ROOT / name) for name in ("Cargo.toml", "pyproject.toml")))
    if not _fresh("installation", metadata):
        # An explicit group, as maturin installs the group `dev` of its own accord.
        _run(_maturin("develop", "--release", "--group", "build"))
        _stamp("installation", metadata)


def build_benchmarks(*names: str) -> dict[str, Path]:
    """Builds Rust programs of benchmarks in release mode and returns where they are, by name.

    Raises:
        StepError: The build failed.
    """
    _require_rust()
    command: list[str | Path] = [
        "cargo",
        "bench",
        "--no-run",
        *(f"--bench={name}" for name in names),
        "--message-format=json-render-diagnostics",
    ]
    job = _cargo(command, "benchmarks.log", "the Rust side of the benchmark")
    _run(job)
    built = re.findall(r'"executable":"([^"]+)"', job.log.read_text(encoding="utf-8"))
    found = {name: Path(path) for name in names for path in built if Path(path).name.startswith(f"{name}-")}
    if len(found) < len(names):
        raise StepError(f"cargo does not say where the Rust side of the benchmark is; its log: {job.log}")
    return found


def ensure_clients() -> dict[str, Path]:
    """Makes the environments of others' clients, `.venv/clients/*`, and returns their interpreters by name.

    Raises:
        StepError: One could not be made or filled.
    """
    groups = [group for group in _pyproject()["dependency-groups"] if group.startswith("clients-")]
    names = {group: group.removeprefix("clients-") for group in groups}
    return {name: _ensure_group(group, VENV / "clients" / name) for group, name in names.items()}


def ensure_peer(name: str) -> Path:
    """Makes the environment of a peer in benchmarks, `target/bench/env/NAME`, and returns its interpreter.

    Raises:
        StepError: It could not be made or filled.
    """
    return _ensure_group(f"peers-{name}", ROOT / "target" / "bench" / "env" / name)


def peer_requirements(name: str) -> list[str]:
    """What the environment of a peer is filled with: exact versions."""
    return list(_group(_pyproject(), f"peers-{name}"))


def _ensure_group(group: str, home: Path) -> Path:
    """Makes an environment with a dependency group, unless it is there, and returns its interpreter."""
    interpreter = home / "bin" / "python"
    wanted = list(_group(_pyproject(), group))
    digest = _digest(sys.version, *wanted)
    if not (_fresh(group, digest) and home.exists()):
        note(f"packages of {group} in {home.relative_to(ROOT)}; only needed once")
        # What was there is no longer: its stamp would hold for a half-filled environment, too.
        (_STAMPS / group).unlink(missing_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        _quietly([PYTHON, "-m", "venv", "--without-pip", home], f"environment {home.name}")
        _run(_pip([PYTHON, "-m", "pip", "--python", interpreter], ["--no-compile", *wanted]))
        _stamp(group, digest)
    return interpreter


def requirements(profile: str) -> list[str]:
    """The requirements of a profile, in the order and words of pyproject.toml."""
    document = _pyproject()
    extras, groups = _PROFILES[profile]
    found: dict[str, None] = {}
    for extra in extras:
        found.update(dict.fromkeys(_extra(document, extra)))
    for group in groups:
        found.update(dict.fromkeys(_group(document, group)))
    return list(found)


def _pyproject() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


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


def _run(*jobs: Job) -> None:
    run_together(jobs, env=environment(), cwd=ROOT)


def _pip(pip: list[str | Path], arguments: list[str]) -> Job:
    def describe(line: str) -> str | None:
        words = line.split()
        if line.startswith(("Collecting ", "Downloading ", "  Downloading ")):
            return f"{words[0].lower()} {words[1]}"
        return "installing packages" if line.startswith("Installing collected") else None

    def failure(output: str) -> str:
        if "No space left" in output:
            return "the disk is full"
        if re.search(
            r"Could not find a version|No matching distribution|Connection|Timeout|timed out", output
        ):
            return "pip could not get a package; is PyPI (or the mirror that pip is set to) within reach?"
        return "pip could not install the Python packages"

    command = [
        *pip,
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
        *arguments,
    ]
    return Job(command, LOGS / "pip.log", describe, failure)


def _maturin(*arguments: str) -> Job:
    return _cargo([PYTHON, "-m", "maturin", *arguments], "extension.log", "the Rust core")


def _cargo(command: list[str | Path], log: str, what: str) -> Job:
    crates = 0
    in_lock = (ROOT / "Cargo.lock").read_text(encoding="utf-8").count("[[package]]")

    def describe(line: str) -> str | None:
        nonlocal crates
        words = line.split()
        if len(words) > 2 and words[0] == "Compiling":
            crates += 1
            if words[1] == "mlx_serving_router":
                return "compiling mlx_serving_router, the last crate, which takes longest"
            return f"compiling {words[1]} ({crates} of at most {in_lock} crates)"
        return "waiting for another cargo in this checkout" if words[:1] == ["Blocking"] else None

    def failure(output: str) -> str:
        if re.search(r"linker `?\S+`? not found", output):
            return "a C compiler is missing (Debian: apt install gcc; macOS: xcode-select --install)"
        if "No space left" in output:
            return "the disk is full"
        if re.search(r"failed to download|failed to get|Could not resolve host", output):
            return "cargo could not get the crates; is crates.io within reach?"
        return f"{what} did not build"

    # cargo may change Cargo.lock while somebody works on Cargo.toml, but never in CI.
    locked = ["--locked"] if os.environ.get("CI") else []
    return Job([*command, *locked], LOGS / log, describe, failure)


def _quietly(command: list[str | Path], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StepError(f"{done.stdout}{done.stderr}\ncannot make the {what} in {VENV}")


def _source_files() -> Iterator[str]:
    """Every input of the build as `path digest`. The Python sources are no part of it: the install is editable."""
    files = [ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "pyproject.toml", ROOT / "build.rs"]
    files += sorted(path for path in (ROOT / "src").rglob("*") if path.is_file())
    for path in files:
        if path.is_file():
            yield _file_digest(path)


def _file_digest(path: Path) -> str:
    return f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _require_rust() -> None:
    try:
        answer = subprocess.run(
            ["cargo", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise StepError("cargo was not found or does not run: install Rust from https://rustup.rs") from error
    version = re.search(r"(\d+)\.(\d+)", answer)
    if version is not None and (int(version[1]), int(version[2])) < _MINIMUM_RUST:
        needed = ".".join(map(str, _MINIMUM_RUST))
        raise StepError(
            f"{answer.strip()} is too old: Rust {needed} or newer is needed (rustup update stable)"
        )


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
