"""`MlxEngine`: jobs in, answers out, on one thread.

Promises that everything of mlx happens on the thread that calls `MlxEngine.run` (mlx's streams belong to a thread),
that requests join and leave between steps, that one which fails harms no other, and that prompts and answers are
never logged. Refuses to know where jobs come from: that is the worker's runtime (`mlx_serving_router.engine` has the
protocol).
"""

from __future__ import annotations

import importlib
import os
import time
from typing import TYPE_CHECKING, Final

from mlx_serving_router.mlx._answer import Answer, fail
from mlx_serving_router.mlx._batch import Batch
from mlx_serving_router.mlx._cache import PromptCaches
from mlx_serving_router.mlx._models import Models, named
from mlx_serving_router.mlx._outgoing import Outgoing
from mlx_serving_router.mlx._prompt import prompt_tokens
from mlx_serving_router.mlx._request import InvalidRequestError, Parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlx_serving_router.engine import EnginePhase, Job, JobQueue
    from mlx_serving_router.mlx._models import LoadedModel, Location

#: Seconds between two reports of what the caches hold, while there is work; and how many hashes a heartbeat has.
_TELL_EVERY: Final = 1.0
_MOST_PREFIXES: Final = 256


class MlxEngine:
    """Serves models with mlx-lm, several requests at a time (continuous batching).

    Sampling follows mlx-lm: penalties look at the last 20 tokens, prompt included. What a request leaves open
    is decided here: `temperature` 0, always the most likely token; every other parameter off; `max_tokens` as
    below. An answer that reaches the model's context length ends with finish reason `length`.

    The same seed and request give the same answer, alone or beside others, as far as the rounding of the machine
    allows: a batch of another size may round the last bit of a probability differently.

    What was computed for a request is kept for the next one that begins in the same way: the turns of a
    conversation, or prompts with the same instructions (`cached_tokens` of the usage tells).

    Tools are handed to the chat template unless `tool_choice` is `"none"`; a `tool_choice` that names a function
    hands on that one alone; nothing forces a model to call. Calls are read by mlx-lm's parser for the model. Where
    it has none, they come back as the text that the model wrote.

    Args:
        models: Names and where the models are: `{"tiny": "examples/tiny-model/model"}`. Each place is a
            folder, or the id of a model on the Hugging Face Hub
            (`"mlx-community/Llama-3.2-3B-Instruct-4bit"`), which is fetched at the start. Given one place or
            a sequence of them, a folder is named after its last component and a model of the Hub by its id.
        max_concurrent: Requests that are answered at a time.
        max_tokens: Limit of an answer whose request sets none.
        prefill_step_size: Tokens of prompts computed at a time; between them every running answer gets its
            next token, and the engine looks for cancellations. Smaller: a long prompt holds up the others less;
            larger: it is computed faster.
        prompt_cache_bytes: Memory for what was computed for earlier prompts; 0 keeps nothing.

    Raises:
        ImportError: mlx or mlx-lm is missing.
        ValueError: No model, an empty name, two models of one name, or a number out of range.
    """

    features: Final = ("batch", "resume")
    """What `WorkerNode` tells controllers that it can do."""

    def __init__(
        self,
        models: Mapping[str, Location] | Sequence[Location] | Location,
        *,
        max_concurrent: int = 16,
        max_tokens: int = 512,
        prefill_step_size: int = 512,
        prompt_cache_bytes: int = 2 * 1024**3,
    ) -> None:
        self._locations = named(models)
        for name, value, least in (
            ("max_concurrent", max_concurrent, 1),
            ("max_tokens", max_tokens, 1),
            ("prefill_step_size", prefill_step_size, 1),
            ("prompt_cache_bytes", prompt_cache_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; a number of at least {least} is right")
        self._max_concurrent = max_concurrent
        self._max_tokens = max_tokens
        self._prefill_step_size = prefill_step_size
        self._prompt_cache_bytes = prompt_cache_bytes
        self._phase: EnginePhase | None = None
        try:
            for module in ("mlx.core", "mlx_lm"):
                importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"MlxEngine needs mlx and mlx-lm ({error}): pip install 'mlx-serving-router[mlx]'",
                name=error.name,
            ) from error

    @property
    def models(self) -> tuple[str, ...]:
        """The names under which requests ask for the models."""
        return tuple(self._locations)

    @property
    def max_concurrent(self) -> int:
        """Requests that are answered at a time."""
        return self._max_concurrent

    def run(self, jobs: JobQueue) -> None:
        """Load the models, answer jobs until the queue is closed, free everything: all on the calling thread.

        Raises:
            ModelLoadError: A model is missing or broken. Nothing stays loaded.
        """
        import mlx.core as mx
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        # The compiler stalls the first use of every new sampling parameter, which pays on GPUs only.
        if mx.default_device().type == mx.cpu and "MLX_DISABLE_COMPILE" not in os.environ:
            mx.disable_compile()
        mx.random.seed(int.from_bytes(os.urandom(8), "big"))
        wired_limit = maybe_set_recommended_wired_limit()
        models = Models(self._locations)
        service = _Service(
            jobs,
            models,
            max_concurrent=self._max_concurrent,
            max_tokens=self._max_tokens,
            prefill_step_size=self._prefill_step_size,
            prompt_cache_bytes=self._prompt_cache_bytes,
        )
        try:
            self._phase = "loading"
            for _ in models.load_all():
                jobs.report("loading", loaded_models=models.loaded, loading_models=models.missing)
            self._phase = "ready"
            service.serve()
        finally:
            self._phase = None
            service.close()
            models.close()
            mx.synchronize()
            mx.clear_cache()
            if wired_limit is not None:
                mx.set_wired_limit(wired_limit)

    def __repr__(self) -> str:
        places = {name: os.fspath(location) for name, location in self._locations.items()}
        return f"MlxEngine({places!r}, max_tokens={self._max_tokens}, phase={self._phase!r})"


class _Service:
    """The life of an engine between its models being loaded and its queue being closed."""

    def __init__(
        self,
        jobs: JobQueue,
        models: Models,
        *,
        max_concurrent: int,
        max_tokens: int,
        prefill_step_size: int,
        prompt_cache_bytes: int,
    ) -> None:
        self._jobs = jobs
        self._models = models
        self._max_concurrent = max_concurrent
        self._max_tokens = max_tokens
        self._prefill_step_size = prefill_step_size
        self._caches = PromptCaches(prompt_cache_bytes)
        self._outgoing = Outgoing(jobs)
        self._batches: dict[str, Batch] = {}
        self._told = (-1, 0.0)  # the caches that were told of last, and when

    def serve(self) -> None:
        """Steps, one after the other: who is gone leaves, who waits joins, everybody gets on by a token."""
        active = 0
        while active > 0 or not self._jobs.closed:
            self._tell(at_once=active == 0)
            # Without work it waits here; with some it only looks.
            while (
                active < self._max_concurrent
                and (job := self._jobs.get(None if active == 0 else 0)) is not None
            ):
                self._admit(job)
                del job  # a job is over when nobody holds it; the next one may be long in coming
                active = sum(map(len, self._batches.values()))
            for batch in self._batches.values():
                batch.step()
                batch.drop_cancelled()
            active = sum(map(len, self._batches.values()))

    def close(self) -> None:
        """Let go of everything that was computed."""
        for batch in self._batches.values():
            batch.close()
        self._batches.clear()
        self._caches.shrink(0)

    def _tell(self, *, at_once: bool) -> None:
        """Report what the caches hold, where that has changed: now, or as often as heartbeats are worth it."""
        version, when = self._told
        if version == self._caches.version or not (at_once or time.monotonic() - when > _TELL_EVERY):
            return
        self._told = (self._caches.version, time.monotonic())
        self._jobs.report(
            "ready",
            loaded_models=self._models.loaded,
            loading_models=self._models.missing,
            cached_prefixes=self._caches.prefixes(_MOST_PREFIXES),
        )

    def _admit(self, job: Job) -> None:
        """Let a job join. Whatever goes wrong ends this job alone."""
        if job.cancelled:
            return
        model = self._models.get(job.request.model_id)
        if model is None:
            job.error("MODEL_NOT_FOUND", f"this worker serves {', '.join(self._models.loaded)}")
            return
        try:
            answer = self._answer(job, model)
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
