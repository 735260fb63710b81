"""Which models of an engine are in memory: who comes, who has to go, and who is not tried again for a while.

Promises that a model which is asked for comes into memory where there is room, that the one used least recently makes
room for it, that none with requests running or waiting does, and that one which cannot be loaded is tried again after
growing pauses and costs nobody else anything. Knows nothing about requests and batches; the engine's thread alone
calls it.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mlx_serving_router.mlx._loading import Load
from mlx_serving_router.mlx._models import WEIGHTS, ModelLoadError, describe, folder_of, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mlx_serving_router.mlx._memory import Memory
    from mlx_serving_router.mlx._models import LoadedModel, Location

logger = logging.getLogger("mlx_serving_router.mlx")

#: Seconds in which a model that failed is not tried again: the first time, and at most; they double.
FIRST_PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 300.0
#: Seconds that a model waits for those in memory to have no requests, and for which none for it is taken afterwards.
ROOM_WITHIN: Final = 30.0
CROWDED_FOR: Final = 2.0
#: Seconds between two looks whether there is room by now.
_LOOK_AGAIN: Final = 0.05
#: Seconds that a load may take to end when the engine does.
_LAST_LOAD: Final = 5.0
#: Seconds after which the log tells of a load that is not over; after twice as many it does again, and so on.
_LONG_LOAD: Final = 60.0


class NoRoomError(RuntimeError):
    """The models in memory have requests, and there is no room for another beside them."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    error: ModelLoadError
    """Never raised itself: it would gather, and hold, the frames of all requests that it is raised for."""
    times: int
    until: float


class Models:
    """The models of one engine.

    Args:
        locations: Names, and where the models are.
        memory: The limits that they have to keep to.
        load_timeout: Seconds after which a load counts as failed; `None`: never.
        release: Called with the name of a model that goes: nothing may hold it any longer.
        trim: Called with bytes that are wanted: gives up what was kept for prompts, or says that nothing is.
        kept: Gives the bytes that are kept for prompts.
    """

    def __init__(
        self,
        locations: Mapping[str, Location],
        memory: Memory,
        *,
        load_timeout: float | None,
        release: Callable[[str], None],
        trim: Callable[[int], bool],
        kept: Callable[[], int],
    ) -> None:
        self._locations = dict(locations)
        self._memory = memory
        self._load_timeout = load_timeout
        self._release = release
        self._trim = trim
        self._kept = kept
        self._loaded: dict[str, LoadedModel] = {}  # the one used last is last
        self._load: Load | None = None
        self._late: list[Load] = []  # they count as failed, and are not over
        self._wanted: dict[
            str, float | None
        ] = {}  # since when somebody waits for it; None: nobody, it is pre-warmed
        self._warming: set[str] = set()
        self._failures: dict[str, _Failure] = {}
        self._crowded: dict[str, float] = {}
        self._look_at = 0.0
        self._told_of_load = _LONG_LOAD  # how long the load had taken by then when the log tells of it next
        self._cleared: object = None  # the occasion on which memory was given back last

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of those that can answer at once, in the order of the locations."""
        return tuple(name for name in self._locations if name in self._loaded)

    @property
    def loading(self) -> tuple[str, ...]:
        """The names of those that are on their way, or wait for their turn."""
        return (*(() if self._load is None else (self._load.name,)), *self._wanted)

    @property
    def pending(self) -> bool:
        """Whether anything is on its way, or waits for its turn: also what is late, and comes after all."""
        return bool(self._late or self.loading)

    @property
    def warming(self) -> bool:
        """Whether models are still to be pre-warmed."""
        return bool(self._warming)

    @property
    def hopeless(self) -> ModelLoadError | None:
        """The first failure, where every model has failed."""
        if self._locations.keys() <= self._failures.keys():
            return self._failures[next(iter(self._locations))].error.anew()
        return None

    def get(self, name: str) -> LoadedModel | None:
        """A loaded model, which is thereby the one used last."""
        model = self._loaded.pop(name, None)
        if model is not None:
            self._loaded[name] = model
        return model

    def pre_warm(self, names: Sequence[str]) -> None:
        """Load these, one after the other, as far as there is room."""
        for name in names:
            self._warming.add(name)
            self._wanted.setdefault(name, None)

    def want(self, name: str) -> None:
        """Somebody waits for a model that is not loaded.

        Raises:
            KeyError: There is no such model.
            ModelLoadError: It failed a short while ago.
            NoRoomError: There was no room for it a short while ago.
        """
        if name not in self._locations:
            raise KeyError(name)
        now = time.monotonic()
        failure = self._failures.get(name)
        if failure is not None and (now < failure.until or any(load.name == name for load in self._late)):
            raise failure.error.anew()
        if now < self._crowded.get(name, now):
            raise NoRoomError(f"there is no memory for model {name!r} beside those that have requests")
        if self._load is None or self._load.name != name:
            self._wanted[name] = self._wanted.get(name) or now
            self._look_at = 0.0

    def advance(self, busy: Callable[[], Collection[str]]) -> None:
        """Take in what has been loaded, and begin with the next. Never waits.

        Args:
            busy: Gives the models that have requests, running or waiting.
        """
        now = time.monotonic()
        self.take_in()
        if self._load is not None and self._is_late(self._load, now):
            load, self._load = self._load, None
            self._late.append(load)
            words = f"it is not loaded after {self._load_timeout:g} s"
            self._fail(ModelLoadError(load.name, os.fspath(load.location), words), now)
        if self._load is not None and now - self._load.began > self._told_of_load:
            self._told_of_load *= 2
            logger.warning(
                "model %s is still being loaded, after %.0f s", self._load.name, now - self._load.began
            )
        if self._load is None and self._wanted and now >= self._look_at:
            self._look_at = now + _LOOK_AGAIN
            self._begin(busy(), now)

    def take_in(self) -> None:
        """Take in what has been loaded, and nothing else."""
        now = time.monotonic()
        for load in [load for load in self._late if load.done]:
            self._late.remove(load)
            self._receive(load, now)
        if self._load is not None and self._load.done:
            load, self._load = self._load, None
            self._receive(load, now)

    def evict_idle(self, busy: Collection[str]) -> bool:
        """Let the idle model go that was used least recently, unless it is the only one that is left."""
        victim = next((name for name in self._loaded if name not in busy), None)
        if victim is None or len(self._loaded) == 1:
            return False
        self._evict(victim)
        return True

    def close(self) -> None:
        """Let go of all of them. What is being loaded is waited for, for a while."""
        self._wanted.clear()
        loads = [*self._late, *(() if self._load is None else (self._load,))]
        self._late, self._load = [], None
        deadline = time.monotonic() + _LAST_LOAD
        for load in loads:
            if not load.join(max(0.0, deadline - time.monotonic())):
                logger.warning("model %s is still being loaded, and nobody waits for it", load.name)
        self._loaded.clear()

    def _is_late(self, load: Load, now: float) -> bool:
        return self._load_timeout is not None and now - load.began > self._load_timeout

    def _receive(self, load: Load, now: float) -> None:
        load.join(
            _LAST_LOAD
        )  # it has nothing left to do but to end, and may not do so beside the interpreter's own end
        try:
            model = load.result()
        except ModelLoadError as error:
            self._fail(error, now)
            return
        self._loaded[load.name] = model
        self._failures.pop(load.name, None)
        self._wanted.pop(load.name, None)
        self._warming.discard(load.name)

    def _fail(self, error: ModelLoadError, now: float) -> None:
        before = self._failures.get(error.model)
        times = 1 if before is None else before.times + 1
        pause = min(FIRST_PAUSE * 2.0 ** (times - 1), LONGEST_PAUSE)
        self._failures[error.model] = _Failure(error=error.anew(), times=times, until=now + pause)
        self._warming.discard(error.model)
        logger.error(
            "%s; it is tried again when a request asks for it, in %.0f s at the earliest", error, pause
        )

    def _begin(self, busy: Collection[str], now: float) -> None:
        """Load the first of those that are wanted for which there is room."""
        for name, since in list(self._wanted.items()):
            try:
                # What is pre-warmed pushes nobody out.
                if self._make_room(name, self._loaded if since is None else busy, now):
                    self._load = Load(name, self._locations[name])
                    self._told_of_load = _LONG_LOAD
                    del self._wanted[name]
                    return
            except ModelLoadError as error:
                del self._wanted[name]
                self._fail(error, now)
                continue
            except (OSError, RuntimeError, ValueError) as error:
                # Its folder cannot be read or goes just now, its id is none, or there is no thread to be had.
                del self._wanted[name]
                words = f"loading it cannot begin ({describe(error)})"
                self._fail(ModelLoadError(name, os.fspath(self._locations[name]), words), now)
                continue
            if since is None:
                del self._wanted[name]
                self._warming.discard(name)
                logger.warning(
                    "model %s is not pre-warmed: there is no memory left; a request loads it", name
                )
            elif now - since > ROOM_WITHIN:
                del self._wanted[name]
                self._crowded[name] = now + CROWDED_FOR

    def _make_room(self, name: str, busy: Collection[str], now: float) -> bool:
        """Whether there is room by now. What is in memory stays there unless it is enough that it goes.

        Raises:
            ModelLoadError: There will never be.
            OSError: Its folder cannot be read.
            RuntimeError, ValueError: Its location is none.
        """
        folder = folder_of(self._locations[name])
        need = 0 if folder is None or not folder.is_dir() else size_of(folder, WEIGHTS)
        if need > self._memory.hard:
            raise self._too_large(name, need)
        if self._memory.used() + need <= self._memory.soft:
            return True
        idle = [other for other in self._loaded if other not in busy]
        # That takes a while: not at every look, but when it may have changed something.
        occasion = (name, idle, int(now))
        if self._cleared != occasion:
            self._cleared = occasion
            self._memory.clear()
        alone = len(idle) == len(self._loaded)
        limit = self._memory.hard if alone else self._memory.soft
        spare = self._kept() + sum(self._loaded[other].nbytes for other in idle)
        used = self._memory.used()
        if used - spare + need > limit:
            if alone:
                raise self._too_large(name, need, used - spare)
            return False
        while (missing := self._memory.used() + need - self._memory.soft) > 0:
            victim = next((other for other in self._loaded if other not in busy), None)
            if victim is not None:
                self._evict(victim)
            elif not self._trim(missing):
                break
        if missing <= 0:
            return True
        if self._loaded:
            return False
        used = self._memory.used()
        if used + need <= self._memory.hard:
            return True
        raise self._too_large(name, need, used)

    def _too_large(self, name: str, need: int, others: int = 0) -> ModelLoadError:
        beside = f", {others} are in use by others" if others > 0 else ""
        reason = f"its weights have {need} bytes{beside}, and the memory limit is {self._memory.hard}"
        return ModelLoadError(name, os.fspath(self._locations[name]), reason)

    def _evict(self, name: str) -> None:
        self._release(name)
        del self._loaded[name]
        self._memory.clear()
        logger.info("model %s has left the memory", name)
