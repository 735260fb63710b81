"""How much memory there is, how much is in use, and from where on that is too much.

Knows nothing about models and requests.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: Parts of the machine's memory for models that are the limits where none are set.
_SOFT: Final = 0.85
_HARD: Final = 0.95


class Memory:
    """Limits of memory, and what is in use.

    Args:
        soft: Bytes beyond which the less important is given up; `None`: 85 % of `total`.
        hard: Bytes beyond which nothing new is taken; `None`: 95 % of `total`, and not less than `soft`.
        measure: Bytes in use; `None`: as `used_bytes`.

    Raises:
        ValueError: A limit is no positive number, or the soft one is above the hard one.
    """

    def __init__(
        self, soft: int | None = None, hard: int | None = None, measure: Callable[[], int] | None = None
    ) -> None:
        for name, value in (("memory_soft_bytes", soft), ("memory_hard_bytes", hard)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; a number of at least 1 is right")
        if hard is None:
            hard = max(int(total_bytes() * _HARD), soft or 0)
        self.soft = min(int(total_bytes() * _SOFT), hard) if soft is None else soft
        self.hard = hard
        if self.soft > self.hard:
            raise ValueError(
                f"memory_soft_bytes is {self.soft}, above memory_hard_bytes, {self.hard}; at most that is right"
            )
        self._measure = measure or used_bytes

    def used(self) -> int:
        """Bytes in use."""
        return self._measure()

    def clear(self) -> None:
        """Give back what mlx, and the C library below it, keep for what is to come."""
        import mlx.core as mx

        mx.clear_cache()
        if sys.platform.startswith("linux"):
            with contextlib.suppress(AttributeError):  # not every C library has it
                ctypes.CDLL(None).malloc_trim(0)


def total_bytes() -> int:
    """Bytes that models may take on this machine.

    On Apple silicon what Metal recommends as working set; elsewhere the memory of the machine, or of the control group
    that the process is in where that is less.
    """
    import mlx.core as mx

    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_control_group_bytes()])


def used_bytes() -> int:
    """Bytes in use: with a GPU the arrays of mlx and what it keeps for others, else the memory of the process."""
    import mlx.core as mx

    if mx.metal.is_available() or not sys.platform.startswith("linux"):
        return mx.get_active_memory() + mx.get_cache_memory()
    resident = int(Path("/proc/self/statm").read_bytes().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def _control_group_bytes() -> list[int]:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return [int(Path(file).read_text())]
        except (OSError, ValueError):  # there is none, or it says max
            continue
    return []
