"""The mlx-lm inference engine (extra `[mlx]`).

Promises that everything of mlx happens on the thread that calls `MlxEngine.run` (mlx's streams belong to a
thread), that a request which fails harms no other, that cancelled work ends within one token or one piece of
its prompt, and that prompts and answers are never logged. Refuses to know where jobs come from: that is the
worker's runtime (`mlx_serving_router.engine` has the protocol). One request is answered at a time.

Importing this module needs nothing; constructing an `MlxEngine` imports mlx and mlx-lm.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from mlx_serving_router._mlx_request import InvalidRequestError, Parameters, chat_messages
from mlx_serving_router._mlx_text import IncrementalDecoder, StopMatcher

if TYPE_CHECKING:
    from mlx_serving_router.engine import EnginePhase, EngineRequest, Job, JobQueue

__all__ = ["MlxEngine", "ModelLoadError"]

logger = logging.getLogger(__name__)

Location: TypeAlias = str | os.PathLike[str]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DECODER_CONTEXT: Final = 8  # tokens of a plain prompt that decide how the first new ones are written


class ModelLoadError(RuntimeError):
    """A model could not be loaded, so the engine cannot start.

    Attributes:
        model: The name it was to be served under.
        location: The folder or Hugging Face id.
        missing: Files that a model folder must have and this one has not.
    """

    def __init__(self, model: str, location: str, reason: str, *, missing: Sequence[str] = ()) -> None:
        super().__init__(f"cannot load model {model!r} from {location}: {reason}")
        self.model = model
        self.location = location
        self.missing = tuple(missing)


class MlxEngine:
    """Serves models with mlx-lm.

    Sampling follows mlx-lm: penalties look at the last 20 tokens, prompt included. What a request leaves open
    is decided here: `temperature` 0, always the most likely token; every other parameter off; `max_tokens` as
    below. An answer that reaches the model's context length ends with finish reason `length`. Tools are
    handed to the chat template unless `tool_choice` is `"none"`; the model's calls come back as the text it
    wrote.

    Args:
        models: Names and where the models are: `{"tiny": "examples/tiny-model/model"}`. Each place is a
            folder, or the id of a model on the Hugging Face Hub
            (`"mlx-community/Llama-3.2-3B-Instruct-4bit"`), which is fetched at the start. Given one place or
            a sequence of them, a folder is named after its last component and a model of the Hub by its id.
        max_tokens: Limit of an answer whose request sets none.
        prefill_step_size: Tokens of a prompt computed at a time; between them the engine looks for a
            cancellation.

    Raises:
        ImportError: mlx or mlx-lm is missing.
        ValueError: No model, an empty name, or two models of one name.
    """

    def __init__(
        self,
        models: Mapping[str, Location] | Sequence[Location] | Location,
        *,
        max_tokens: int = 512,
        prefill_step_size: int = 512,
    ) -> None:
        self._locations = _named(models)
        self._max_tokens = max_tokens
        self._prefill_step_size = prefill_step_size
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
        wired_limit = maybe_set_recommended_wired_limit()
        loaded: dict[str, _LoadedModel] = {}
        try:
            for name, location in self._locations.items():
                waiting = [other for other in self._locations if other not in loaded]
                self._report(jobs, "loading", loaded, waiting)
                loaded[name] = _LoadedModel.load(name, location)
            self._report(jobs, "ready", loaded)
            while (job := jobs.get()) is not None:
                for _ in self._answer(job, loaded):
                    pass
                del job  # a job is over when nobody holds it; the next one may be long in coming
        finally:
            self._phase = None
            loaded.clear()
            mx.synchronize()
            mx.clear_cache()
            if wired_limit is not None:
                mx.set_wired_limit(wired_limit)

    def _report(
        self,
        jobs: JobQueue,
        phase: EnginePhase,
        loaded: Mapping[str, _LoadedModel],
        loading: Sequence[str] = (),
    ) -> None:
        self._phase = phase
        jobs.report(phase, loaded_models=tuple(loaded), loading_models=tuple(loading))

    def _answer(self, job: Job, loaded: Mapping[str, _LoadedModel]) -> Iterator[None]:
        """Answer one job, a token a step. Whatever goes wrong ends this job alone."""
        model = loaded.get(job.request.model_id)
        if model is None:
            job.error("MODEL_NOT_FOUND", f"this worker serves {', '.join(loaded)}")
            return
        try:
            parameters = Parameters.from_request(
                job.request, default_max_tokens=self._max_tokens, vocabulary=model.vocabulary
            )
            prompt = model.prompt(job.request)
        except InvalidRequestError as error:
            job.error("REQUEST_VALIDATION_FAILED", str(error))
            return
        except Exception as error:  # noqa: BLE001 - a tokenizer or template may raise anything
            # Its words may quote the prompt.
            _fail(job, error, type(error).__name__)
            return
        try:
            yield from _generate(job, model, prompt, parameters, self._prefill_step_size)
        except _CancelledError:
            return
        except Exception as error:  # noqa: BLE001 - mlx raises many kinds, memory among them
            _fail(job, error, f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        places = {name: os.fspath(location) for name, location in self._locations.items()}
        return f"MlxEngine({places!r}, max_tokens={self._max_tokens}, phase={self._phase!r})"


# === one answer ===


class _CancelledError(Exception):
    """Nobody waits for the answer any more."""


def _generate(
    job: Job, model: _LoadedModel, prompt: list[int], parameters: Parameters, prefill_step_size: int
) -> Iterator[None]:
    """Generate one answer; suspends after every token."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    def check_cancelled(_done: int = 0, _total: int = 0) -> None:
        if job.cancelled:
            raise _CancelledError

    check_cancelled()
    if parameters.temperature > 0:
        seed = parameters.seed if parameters.seed is not None else int.from_bytes(os.urandom(8), "big")
        mx.random.seed(seed)
    tokens = generate_step(
        mx.array(prompt),
        model.model,
        max_tokens=min(parameters.max_tokens, model.context - len(prompt)),
        sampler=make_sampler(
            temp=parameters.temperature,
            top_p=parameters.top_p,
            min_p=parameters.min_p,
            top_k=parameters.top_k,
        ),
        logits_processors=make_logits_processors(
            logit_bias=dict(parameters.logit_bias) or None,
            repetition_penalty=parameters.repetition_penalty if parameters.repetition_penalty != 1 else None,
            presence_penalty=parameters.presence_penalty,
            frequency_penalty=parameters.frequency_penalty,
        ),
        prefill_step_size=prefill_step_size,
        prompt_progress_callback=check_cancelled,
    )
    # A plain prompt is continued, leading space and all; an answer to messages is a text of its own.
    decoder = IncrementalDecoder(
        model.tokenizer.decode, prompt[-_DECODER_CONTEXT:] if job.request.messages is None else ()
    )
    matcher = StopMatcher(parameters.stop)
    generated = 0
    undelivered: list[int] = []
    finish_reason = "length"
    with contextlib.closing(tokens):
        for token, _ in tokens:
            check_cancelled()
            if token in model.tokenizer.eos_token_ids:
                finish_reason = "stop"
                break
            generated += 1
            undelivered.append(token)
            text = matcher.push(decoder.push(token))
            if text:
                job.token(text, undelivered)
                undelivered = []
            if matcher.stopped:
                break
            yield
    text = matcher.finish(decoder.finish())
    if text or undelivered:
        job.token(text, undelivered)
    job.done(
        "stop" if matcher.stopped else finish_reason, prompt_tokens=len(prompt), completion_tokens=generated
    )


def _fail(job: Job, error: Exception, description: str) -> None:
    job.error("WORKER_UNAVAILABLE", f"the engine failed on this request: {description}")
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", job.request.request_id, description, frames)


# === a model ===


@dataclass(frozen=True, kw_only=True)
class _LoadedModel:
    model: Any
    tokenizer: Any
    context: int
    """Tokens of prompt and answer together."""
    vocabulary: int

    @classmethod
    def load(cls, name: str, location: Location) -> _LoadedModel:
        import mlx_lm

        started = time.monotonic()
        place = os.fspath(location)
        if not _is_hub_id(location):
            place = os.fspath(Path(location).expanduser())
            _check_folder(name, Path(place))
        try:
            model, tokenizer, config = mlx_lm.load(place, return_config=True)
        except Exception as error:
            if _is_hub_id(location):
                reason = f"no such folder, and the Hugging Face Hub did not give it ({_describe(error)})"
            else:
                reason = f"mlx-lm cannot read it; its files may be damaged or too new ({_describe(error)})"
            raise ModelLoadError(name, os.fspath(location), reason) from error
        logger.info("loaded model %s from %s in %.1f s", name, place, time.monotonic() - started)
        text = {**config, **config.get("text_config", {})}
        return cls(
            model=model,
            tokenizer=tokenizer,
            context=text.get("max_position_embeddings") or 2**31,
            vocabulary=text.get("vocab_size") or len(tokenizer),
        )

    def prompt(self, request: EngineRequest) -> list[int]:
        """The tokens that the model is to continue.

        Raises:
            InvalidRequestError: There is nothing to continue, or it does not fit.
        """
        if (request.messages is None) == (request.prompt is None):
            raise InvalidRequestError("exactly one of messages and prompt must be set")
        if request.messages is not None:
            ids = self._chat(chat_messages(request.messages), request)
        else:
            text = request.prompt or ""
            bos = self.tokenizer.bos_token
            ids = self.tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        if not ids:
            raise InvalidRequestError("the prompt must not be empty")
        if len(ids) >= self.context:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens; with the answer it must fit the model's {self.context}"
            )
        return list(ids)

    def _chat(self, messages: list[dict[str, Any]], request: EngineRequest) -> Any:
        from jinja2 import TemplateError

        if not self.tokenizer.has_chat_template:
            raise InvalidRequestError("this model has no chat template: send prompt instead of messages")
        tools = request.tools if request.tool_choice != "none" else None
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True
            )
        except TemplateError as error:
            # Templates raise for what they do not support; their words are the template's author's.
            raise InvalidRequestError(
                "the model's chat template does not accept these messages or tools"
            ) from error


def _named(models: Mapping[str, Location] | Sequence[Location] | Location) -> dict[str, Location]:
    if isinstance(models, Mapping):
        named = [(name, location) for name, location in models.items()]
    else:
        places = [models] if isinstance(models, str | os.PathLike) else models
        named = [
            (os.fspath(at) if _is_hub_id(at) else Path(at).expanduser().resolve().name, at) for at in places
        ]
    locations = dict(named)
    if not locations or not all(name for name in locations):
        raise ValueError("models must name at least one model, and no name may be empty")
    if len(locations) < len(named):
        raise ValueError("two models have the same name: give a mapping of names to their folders instead")
    return locations


def _is_hub_id(location: Location) -> bool:
    return (
        isinstance(location, str) and _HUB_ID.fullmatch(location) is not None and not Path(location).exists()
    )


def _check_folder(name: str, folder: Path) -> None:
    """Refuse, with what to do, a folder that mlx-lm would refuse with an error about something else."""

    def refuse(reason: str, missing: Sequence[str] = ()) -> ModelLoadError:
        advice = "give the folder of an mlx-lm model (mlx_lm.convert makes one) or a Hugging Face id"
        return ModelLoadError(name, os.fspath(folder), f"{reason}; {advice}", missing=missing)

    if not folder.is_dir():
        raise refuse("it is not a folder" if folder.exists() else "there is no such folder")
    needed = {
        "config.json": ("config.json",),
        "model.safetensors": ("model*.safetensors",),
        "tokenizer.json": ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.*"),
    }
    missing = [
        file for file, patterns in needed.items() if not any(any(folder.glob(each)) for each in patterns)
    ]
    for file in ("config.json", "model.safetensors.index.json"):
        if (folder / file).exists():
            try:
                shards = json.loads((folder / file).read_bytes()).get("weight_map", {}).values()
            except (ValueError, AttributeError, OSError) as error:
                raise refuse(f"its {file} cannot be read ({_describe(error)})") from error
            missing += [shard for shard in sorted(set(shards)) if not (folder / shard).exists()]
    if missing:
        raise refuse(f"it has no {', '.join(missing)}", missing)


def _describe(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
