"""The life of an engine: jobs join, models come and go, everybody gets on by a token.

Promises that requests join and leave between steps, that one which fails harms no other, and that what is short, places
or memory, is refused rather than waited for without end. Knows jobs, models and batches; says nothing of prompts.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from mlx_serving_router.mlx._answer import Answer, fail
from mlx_serving_router.mlx._batch import Batch
from mlx_serving_router.mlx._cache import PromptCaches
from mlx_serving_router.mlx._models import ModelLoadError
from mlx_serving_router.mlx._outgoing import Outgoing
from mlx_serving_router.mlx._prompt import prompt_tokens
from mlx_serving_router.mlx._reading import Reading, is_long
from mlx_serving_router.mlx._request import InvalidRequestError, Parameters
from mlx_serving_router.mlx._residency import Models, NoRoomError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    from mlx_serving_router.engine import EnginePhase, Job, JobQueue
    from mlx_serving_router.mlx._memory import Memory
    from mlx_serving_router.mlx._models import LoadedModel, Location

logger = logging.getLogger("mlx_serving_router.mlx")

#: Seconds between two reports of what the caches hold, while there is work; and how many hashes a heartbeat has.
_TELL_EVERY: Final = 1.0
_MOST_PREFIXES: Final = 256
#: Seconds between two looks: at a model that is being loaded or a prompt that is being read, while there is no work; at
#: the memory.
_LOOK_AT_LOADS: Final = 0.01
_MEASURE_EVERY: Final = 0.25
#: Seconds that the reading of a prompt may take to end when the engine does.
_LAST_READING: Final = 5.0


class Service:
    """What an engine does until its queue is closed.

    Args:
        jobs: Gives the jobs.
        locations: Names, and where the models are.
        memory: The limits of memory.
        max_concurrent: Requests that are answered at a time.
        max_tokens: Limit of an answer whose request sets none.
        prefill_step_size: Tokens of prompts computed at a time.
        prompt_cache_bytes: Memory for what was computed for earlier prompts.
        load_timeout: Seconds after which a load counts as failed; `None`: never.
    """

    def __init__(
        self,
        jobs: JobQueue,
        locations: Mapping[str, Location],
        memory: Memory,
        *,
        max_concurrent: int,
        max_tokens: int,
        prefill_step_size: int,
        prompt_cache_bytes: int,
        load_timeout: float | None,
    ) -> None:
        self._jobs = jobs
        self._locations = locations
        self._memory = memory
        self._models = Models(
            locations,
            memory,
            load_timeout=load_timeout,
            release=self._release,
            trim=self._trim,
            kept=lambda: self._caches.nbytes,
        )
        self._max_concurrent = max_concurrent
        self._max_tokens = max_tokens
        self._prefill_step_size = prefill_step_size
        self._caches = PromptCaches(prompt_cache_bytes)
        self._outgoing = Outgoing(jobs)
        self._batches: dict[str, Batch] = {}
        self._readings: list[Reading] = []
        self._told_version, self._told_at = -1, 0.0  # the caches that were told of last, and when
        self._told: object = None  # phase and models that were told of last
        self._ready = False
        self._refused: Literal["low", "high"] | None = None
        self._measure_at = 0.0
        self._to_measure = True  # there was work since the memory was looked at

    @property
    def phase(self) -> EnginePhase:
        """What the engine is doing."""
        return "ready" if self._ready and not self._models.loading else "loading"

    def serve(self, pre_warm: Sequence[str], *, ready_at_once: bool) -> None:
        """Steps, one after the other: who is gone leaves, who waits joins, everybody gets on by a token.

        Args:
            pre_warm: Models to load first.
            ready_at_once: Whether jobs are taken meanwhile.

        Raises:
            ModelLoadError: Each model of the engine is among those, and none can be loaded.
        """
        self._models.pre_warm(pre_warm)
        if ready_at_once:
            self._become_ready()
        active = 0
        warming = True
        while active > 0 or not self._jobs.closed:
            self._models.advance(self._busy)
            if warming and not self._models.warming:
                warming = False
                self._warmed_up()
            self._watch_memory()
            self._tell(at_once=active == 0)
            # Without work it waits here; with some it only looks.
            timeout = self._patience() if active == 0 else 0
            while active < self._max_concurrent and (job := self._jobs.get(timeout)) is not None:
                timeout = 0
                self._models.take_in()  # its model may have come while nobody asked
                self._admit(job)
                del job  # a job is over when nobody holds it; the next one may be long in coming
                active = self._active()
            self._to_measure |= active > 0 or self._models.pending
            self._begin_read()
            self._step()
            active = self._active()

    def close(self) -> None:
        """Let go of everything: what was computed, and the models."""
        for reading in self._readings:
            reading.wait(_LAST_READING)
        self._readings.clear()
        for batch in self._batches.values():
            batch.close()
        self._batches.clear()
        self._caches.shrink(0)
        self._models.close()

    def _step(self) -> None:
        for batch in self._batches.values():
            batch.step()
            batch.drop_cancelled()

    # === what is told ===

    def _become_ready(self) -> None:
        self._ready = True
        # Whatever the phase is: the first of these is what lets the worker register.
        self._jobs.report("ready", loaded_models=self._models.loaded, loading_models=self._models.loading)

    def _warmed_up(self) -> None:
        error = self._models.hopeless
        if error is not None:
            raise error
        if not self._ready:
            self._become_ready()

    def _tell(self, *, at_once: bool) -> None:
        """Report what has changed: models now, caches now or as often as heartbeats are worth it."""
        now = time.monotonic()
        state = (self.phase, self._models.loaded, self._models.loading)
        news = self._told_version != self._caches.version and (at_once or now - self._told_at > _TELL_EVERY)
        if state == self._told and not news:
            return
        self._told = state
        prefixes = None
        if news:
            self._told_version, self._told_at = self._caches.version, now
            prefixes = self._caches.prefixes(_MOST_PREFIXES)
        phase, loaded, loading = state
        self._jobs.report(phase, loaded_models=loaded, loading_models=loading, cached_prefixes=prefixes)

    # === jobs ===

    def _patience(self) -> float | None:
        """How long to wait for a job while there is no other work."""
        if self._models.pending:
            return _LOOK_AT_LOADS
        # Without work memory does not grow; where it is short, others may give some back.
        return _MEASURE_EVERY if self._to_measure or self._refused is not None else None

    def _admit(self, job: Job) -> None:
        """Let a job join. Whatever goes wrong ends this job alone."""
        if job.cancelled:
            return
        if self._refused == "high" or (self._refused == "low" and job.request.priority == "low"):
            job.error("WORKER_OVERLOADED", self._shortage(), retry_after_ms=round(_MEASURE_EVERY * 1000))
            return
        model = self._models.get(job.request.model_id)
        if model is None:
            self._send_for(job)
            return
        if is_long(job.request):
            try:
                self._readings.append(Reading(job, model, partial(self._answer, job, model)))
                return
            except RuntimeError:  # there is no thread to be had
                pass
        self._begin(job, model, partial(self._answer, job, model))

    def _begin(self, job: Job, model: LoadedModel, read: Callable[[], Answer]) -> None:
        try:
            answer = read()
        except InvalidRequestError as error:
            job.error("REQUEST_VALIDATION_FAILED", str(error))
            return
        except Exception as error:  # noqa: BLE001 - a tokenizer or template may raise anything
            # Its words may quote the prompt.
            fail(job, error, type(error).__name__)
            return
        if answer.begin():
            self._batch(model).add(answer)
        else:
            self._outgoing.flush()

    def _begin_read(self) -> None:
        """Let those join whose long prompt has been read. Where nobody else is answered, wait for it for a moment."""
        if self._readings and not any(map(len, self._batches.values())):
            self._readings[0].wait(_LOOK_AT_LOADS)
        for reading in [reading for reading in self._readings if reading.done]:
            self._readings.remove(reading)
            reading.wait(_LAST_READING)  # its thread has nothing left to do but to end
            if not reading.job.cancelled:
                self._begin(reading.job, reading.model, reading.result)

    def _send_for(self, job: Job) -> None:
        """Have a job's model loaded; the job waits for it in the queue."""
        name = job.request.model_id
        # Neither error says when to come back: that would keep requests for other models away, too.
        try:
            self._models.want(name)
        except KeyError:
            job.error("MODEL_NOT_FOUND", f"this worker serves {', '.join(self._locations)}")
        except ModelLoadError as error:
            job.error("MODEL_LOAD_FAILED", f"this worker cannot load model {name!r}: {error.reason}")
        except NoRoomError as error:
            job.error("WORKER_OVERLOADED", str(error))
        else:
            self._tell(at_once=False)
            job.put_back()

    def _answer(self, job: Job, model: LoadedModel) -> Answer:
        parameters = Parameters.from_request(
            job.request, default_max_tokens=self._max_tokens, vocabulary=model.vocabulary
        )
        return Answer(job, model, prompt_tokens(model, job.request), parameters, self._outgoing)

    def _batch(self, model: LoadedModel) -> Batch:
        if model.name not in self._batches:
            self._batches[model.name] = Batch(
                model,
                self._caches,
                self._outgoing,
                size=self._max_concurrent,
                prefill_step_size=self._prefill_step_size,
            )
        return self._batches[model.name]

    def _active(self) -> int:
        return sum(map(len, self._batches.values())) + len(self._readings)

    # === memory ===

    def _busy(self) -> set[str]:
        """The models that have requests, running or waiting."""
        running = {name for name, batch in self._batches.items() if len(batch)}
        running.update(reading.model.name for reading in self._readings)
        return running.union(self._jobs.waiting_models)

    def _release(self, name: str) -> None:
        """A model goes: so does what was computed with it."""
        batch = self._batches.pop(name, None)
        if batch is not None:
            batch.close()
        self._caches.forget(name)

    def _trim(self, nbytes: int) -> bool:
        """Give up so many bytes of what was kept for prompts. False: there is nothing."""
        if not self._caches.nbytes:
            return False
        self._caches.shrink(max(0, self._caches.nbytes - nbytes))
        self._memory.clear()
        return True

    def _watch_memory(self) -> None:
        """Keep to the limits: give up what can be computed again, then refuse work."""
        now = time.monotonic()
        if now < self._measure_at:
            return
        self._measure_at = now + _MEASURE_EVERY
        self._to_measure = False
        used = self._relieved()
        refused: Literal["low", "high"] | None = None
        if used > self._memory.soft:
            refused = "high" if used > self._memory.hard else "low"
        if refused != self._refused:
            self._refused = refused
            if refused is None:
                logger.info("there is memory again: requests of every priority are taken")
            else:
                logger.warning("%s: refusing %s", self._shortage(), _REFUSING[refused])
            self._jobs.refuse(refused, self._shortage())

    def _relieved(self) -> int:
        """Bytes in use, after what can be spared was given up."""
        used = self._memory.used()
        if used <= self._memory.soft:
            return used
        self._memory.clear()
        used = self._memory.used()
        if used > self._memory.soft and self._trim(used - self._memory.soft):
            used = self._memory.used()
        if used > self._memory.soft:
            busy = self._busy()
            while used > self._memory.soft and self._models.evict_idle(busy):
                used = self._memory.used()
        return used

    def _shortage(self) -> str:
        limit = "soft" if self._refused == "low" else "hard"
        return f"the worker's memory is beyond its {limit} limit"


_REFUSING: Final = {"low": "requests of low priority", "high": "all requests"}
