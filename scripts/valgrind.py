"""Where valgrind comes from: the one that is installed, else, on Debian and its likes, its package without root."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from environment import VENV
from progress import StepError, note

if TYPE_CHECKING:
    from pathlib import Path

_HOME = VENV / "valgrind"


@dataclass(frozen=True)
class Valgrind:
    """A valgrind that runs.

    Args:
        program: Its path.
        environment: Variables by which it finds its own files.
    """

    program: str
    environment: dict[str, str]


def find() -> Valgrind:
    """Returns the valgrind on PATH, else one of our own, fetched once.

    Raises:
        StepError: There is none, and no Debian package of it could be had.
    """
    installed = shutil.which("valgrind")
    if installed is not None:
        return Valgrind(installed, {})
    if not (_HOME / "usr" / "bin" / "valgrind").exists():
        _fetch()
    tools = next((_HOME / "usr").glob("lib*/**/valgrind"), None)
    if tools is None:
        raise StepError(f"the package of valgrind in {_HOME} has none of its tools; remove that folder")
    return Valgrind(str(_HOME / "usr" / "bin" / "valgrind"), {"VALGRIND_LIB": str(tools)})


def _fetch() -> None:
    needed = (
        "valgrind counts the instructions, and is not installed.\n"
        "Debian, Ubuntu: apt install valgrind; Fedora: dnf install valgrind; Arch: pacman -S valgrind"
    )
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise StepError(needed)
    note("the Debian package of valgrind, into .venv/valgrind; only needed once")
    # Unpacked beside, and moved when it is whole.
    unpacked = _HOME.with_suffix(".part")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    _do(["apt-get", "download", "valgrind"], unpacked, f"apt-get cannot download its package. {needed}")
    for package in sorted(unpacked.glob("*.deb")):
        _do(["dpkg", "-x", os.fspath(package), "."], unpacked, f"dpkg cannot unpack {package.name}. {needed}")
        package.unlink()
    shutil.rmtree(_HOME, ignore_errors=True)
    unpacked.rename(_HOME)


def _do(command: list[str], where: Path, failure: str) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StepError(f"{done.stdout}{done.stderr}\n{failure}")
