"""`MlxEngine`: jobs in, answers out, on one thread.

Promises that everything of mlx happens on the thread that calls `MlxEngine.run` (mlx's streams belong to a thread),
that requests join and leave between steps, that one which fails harms no other, and that prompts and answers are
never logged. Refuses to know where jobs come from: that is the worker's runtime (`mlx_serving_router.engine` has the
protocol).
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Final

from mlx_serving_router.mlx._answer import Answer, fail
from mlx_serving_router.mlx._batch import Batch
from mlx_serving_router.mlx._cache import PromptCaches
from mlx_serving_router.mlx._models import Models, named
from mlx_serving_router.mlx._prompt import prompt_tokens
from mlx_serving_router.mlx._request import InvalidRequestError, Parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlx_serving_router.engine import EnginePhase, Job, JobQueue
    from mlx_serving_router.mlx._models import LoadedModel, Location

logger = logging.getLogger(__name__)


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
        batches: dict[str, Batch] = {}
        try:
            for _ in models.load_all():
                self._report(jobs, "loading", models)
            self._report(jobs, "ready", models)
            self._serve(jobs, models, batches)
        finally:
            self._phase = None
            for batch in batches.values():
                batch.close()
            batches.clear()
            models.close()
            mx.synchronize()
            mx.clear_cache()
            if wired_limit is not None:
                mx.set_wired_limit(wired_limit)

    def _report(self, jobs: JobQueue, phase: EnginePhase, models: Models) -> None:
        self._phase = phase
        jobs.report(phase, loaded_models=models.loaded, loading_models=models.missing)

    def _serve(self, jobs: JobQueue, models: Models, batches: dict[str, Batch]) -> None:
        """Steps, one after the other: who is gone leaves, who waits joins, and everybody gets on by a token."""
        caches = PromptCaches(self._prompt_cache_bytes)
        active = 0
        while active > 0 or not jobs.closed:
            # Without work it waits here; with some it only looks.
            while active < self._max_concurrent and (job := jobs.get(None if active == 0 else 0)) is not None:
                self._admit(job, models, batches, caches)
                del job  # a job is over when nobody holds it; the next one may be long in coming
                active = sum(map(len, batches.values()))
            for batch in batches.values():
                batch.step()
                batch.drop_cancelled()
            active = sum(map(len, batches.values()))

    def _admit(self, job: Job, models: Models, batches: dict[str, Batch], caches: PromptCaches) -> None:
        """Let a job join. Whatever goes wrong ends this job alone."""
        if job.cancelled:
            return
        model = models.get(job.request.model_id)
        if model is None:
            job.error("MODEL_NOT_FOUND", f"this worker serves {', '.join(models.loaded)}")
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
        if answer is None:
            return
        if model.name not in batches:
            batches[model.name] = Batch(
                model, caches, size=self._max_concurrent, prefill_step_size=self._prefill_step_size
            )
        batches[model.name].add(answer)

    def _answer(self, job: Job, model: LoadedModel) -> Answer | None:
        """The answer to a job, begun; none where it is over at once."""
        parameters = Parameters.from_request(
            job.request, default_max_tokens=self._max_tokens, vocabulary=model.vocabulary
        )
        answer = Answer(job, model, prompt_tokens(model, job.request), parameters)
        return answer if answer.begin() else None

    def __repr__(self) -> str:
        places = {name: os.fspath(location) for name, location in self._locations.items()}
        return f"MlxEngine({places!r}, max_tokens={self._max_tokens}, phase={self._phase!r})"
