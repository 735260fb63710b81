"""`MlxEngine`: what serves models with mlx-lm, as programs make it.

Promises that everything of mlx happens on the thread that calls `MlxEngine.run` and on those on which it loads models
(mlx's streams belong to a thread), and that prompts and answers are never logged. Refuses to know where jobs come from:
that is the worker's runtime (`mlx_serving_router.engine` has the protocol).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Literal

from mlx_serving_router.mlx._memory import Memory
from mlx_serving_router.mlx._models import folder_of, named, size_of
from mlx_serving_router.mlx._scan import scan_folder, scan_hugging_face_cache
from mlx_serving_router.mlx._service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mlx_serving_router.engine import JobQueue
    from mlx_serving_router.mlx._models import Location
    from mlx_serving_router.mlx._scan import FoundModel

#: Seconds for which another thread may keep the interpreter while an engine wants it (`sys.setswitchinterval`).
_SWITCH_SECONDS: Final = 0.0005


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

    A model that is not in memory is loaded when a request asks for it, beside the answers of others; where there is no
    room, the one used least recently that has no requests makes it. One that cannot be loaded is answered as
    MODEL_LOAD_FAILED, and tried again after a pause of 5 seconds, which doubles up to 5 minutes. docs/models.md tells
    more.

    Args:
        models: Names and where the models are: `{"tiny": "examples/tiny-model/model"}`. Each place is a
            folder, or the id of a model on the Hugging Face Hub
            (`"mlx-community/Llama-3.2-3B-Instruct-4bit"`), which is fetched when it is loaded. Given one place or
            a sequence of them, a folder is named after its last component and a model of the Hub by its id.
        models_dir: A folder of models, served beside those: each by its path below it.
        hf_cache: Whether the models in the local cache of the Hugging Face Hub are served beside those, by their ids.
        max_concurrent: Requests that are answered at a time.
        max_tokens: Limit of an answer whose request sets none.
        prefill_step_size: Tokens of prompts computed at a time; between them every running answer gets its
            next token, and the engine looks for cancellations. Smaller: a long prompt holds up the others less;
            larger: it is computed faster.
        prompt_cache_bytes: Memory for what was computed for earlier prompts; 0 keeps nothing.
        memory_soft_bytes: Memory in use beyond which prompt caches and idle models are given up and requests of low
            priority refused, as WORKER_OVERLOADED. `None`: 85 % of what the machine has for models.
        memory_hard_bytes: Memory in use beyond which all requests are refused. `None`: 95 %.
        measure_memory: Gives the bytes in use. `None`: the arrays of mlx on a GPU, else the memory of the process.
        pre_warm: Names of models to load at the start. `None`: those of `models`.
        register_when: When the worker joins the fleet: `"complete"`, when each of these is loaded or has failed, or
            `"warming"`, at once; requests for a model that is still being loaded wait for it.
        load_timeout: Seconds after which loading a model counts as failed; `None`: never.

    Raises:
        ImportError: mlx or mlx-lm is missing.
        ValueError: No model, an empty name, two models of one name, a folder that is not there, a name in `pre_warm`
            that is none of the models', or a number out of range.
    """

    features: Final = ("batch", "resume")
    """What `WorkerNode` tells controllers that it can do."""

    def __init__(
        self,
        models: Mapping[str, Location] | Sequence[Location] | Location | None = None,
        *,
        models_dir: str | os.PathLike[str] | None = None,
        hf_cache: bool = False,
        max_concurrent: int = 16,
        max_tokens: int = 512,
        prefill_step_size: int = 512,
        prompt_cache_bytes: int = 2 * 1024**3,
        memory_soft_bytes: int | None = None,
        memory_hard_bytes: int | None = None,
        measure_memory: Callable[[], int] | None = None,
        pre_warm: Sequence[str] | None = None,
        register_when: Literal["complete", "warming"] = "complete",
        load_timeout: float | None = None,
    ) -> None:
        searched = models_dir is not None or hf_cache
        given = {} if models is None and searched else named(() if models is None else models)
        for name, value, least in (
            ("max_concurrent", max_concurrent, 1),
            ("max_tokens", max_tokens, 1),
            ("prefill_step_size", prefill_step_size, 1),
            ("prompt_cache_bytes", prompt_cache_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; a number of at least {least} is right")
        if register_when not in ("complete", "warming"):
            raise ValueError(f"register_when is {register_when!r}; 'complete' or 'warming' is right")
        if load_timeout is not None and not load_timeout > 0:
            raise ValueError(f"load_timeout is {load_timeout}; a number above 0, or None, is right")
        self._max_concurrent = max_concurrent
        self._max_tokens = max_tokens
        self._prefill_step_size = prefill_step_size
        self._prompt_cache_bytes = prompt_cache_bytes
        self._register_when = register_when
        self._load_timeout = load_timeout
        self._service: Service | None = None
        _check_installed()
        found = _found(models_dir, hf_cache=hf_cache)
        self._locations: dict[str, Location] = {model.name: model.path for model in found} | given
        if not self._locations:
            where = [os.fspath(models_dir)] if models_dir is not None else []
            where += ["the Hugging Face cache"] if hf_cache else []
            raise ValueError(f"there is no model that mlx-lm can load in {' and '.join(where)}")
        self._pre_warm = tuple(given if pre_warm is None else pre_warm)
        unknown = [name for name in self._pre_warm if name not in self._locations]
        if unknown:
            raise ValueError(f"pre_warm names {unknown[0]!r}; the models are {', '.join(self._locations)}")
        self._memory = Memory(memory_soft_bytes, memory_hard_bytes, measure_memory)
        folders = {name: folder_of(location) for name, location in self._locations.items()}
        self._folders = {name: at for name, at in folders.items() if at is not None and at.is_dir()}
        self._last_scanned = time.time_ns() // 1_000_000

    @property
    def models(self) -> tuple[str, ...]:
        """The names under which requests ask for the models."""
        return tuple(self._locations)

    @property
    def model_paths(self) -> dict[str, str]:
        """Where the models lie, by name: those that are on this machine."""
        return {name: os.fspath(folder.absolute()) for name, folder in self._folders.items()}

    @property
    def total_model_size(self) -> int:
        """Bytes of the files of those models together."""
        return sum(map(size_of, set(self._folders.values())))

    @property
    def last_scanned(self) -> int:
        """When they were looked for, in milliseconds since the epoch."""
        return self._last_scanned

    @property
    def max_concurrent(self) -> int:
        """Requests that are answered at a time."""
        return self._max_concurrent

    def run(self, jobs: JobQueue) -> None:
        """Load the models, answer jobs until the queue is closed, free everything: all on the calling thread.

        Meanwhile the threads of this process hand the interpreter on sooner than usual (`sys.setswitchinterval`).

        Raises:
            ModelLoadError: Each of the models was to be loaded at the start, and none can be. Nothing stays loaded.
        """
        import mlx.core as mx
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        # The compiler stalls the first use of every new sampling parameter, which pays on GPUs only.
        if mx.default_device().type == mx.cpu and "MLX_DISABLE_COMPILE" not in os.environ:
            mx.disable_compile()
        mx.random.seed(int.from_bytes(os.urandom(8), "big"))
        wired_limit = maybe_set_recommended_wired_limit()
        self._service = Service(
            jobs,
            self._locations,
            self._memory,
            max_concurrent=self._max_concurrent,
            max_tokens=self._max_tokens,
            prefill_step_size=self._prefill_step_size,
            prompt_cache_bytes=self._prompt_cache_bytes,
            load_timeout=self._load_timeout,
        )
        try:
            with _switching_soon():
                self._service.serve(self._pre_warm, ready_at_once=self._register_when == "warming")
        finally:
            self._service.close()
            self._service = None
            mx.synchronize()
            mx.clear_cache()
            if wired_limit is not None:
                mx.set_wired_limit(wired_limit)

    def __repr__(self) -> str:
        places = {name: os.fspath(location) for name, location in self._locations.items()}
        service = self._service
        phase = None if service is None else service.phase
        return f"MlxEngine({places!r}, max_tokens={self._max_tokens}, phase={phase!r})"


#: How many engines run in this process, and the interval that the first of them has found.
_running = 0
_interval_before = 0.0
_lock = threading.Lock()


@contextlib.contextmanager
def _switching_soon() -> Iterator[None]:
    """Within this block nobody who computes in Python keeps an engine waiting for long.

    An engine lets go of the interpreter and takes it again several times in each step of a few milliseconds; beside a
    thread that wants it all the time, such as one that loads a model, it would wait for 5 ms each time.
    """
    global _running, _interval_before  # noqa: PLW0603 there is one interval for each process
    with _lock:
        if _running == 0:
            _interval_before = sys.getswitchinterval()
            sys.setswitchinterval(min(_interval_before, _SWITCH_SECONDS))
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                sys.setswitchinterval(_interval_before)


def _check_installed() -> None:
    try:
        for module in ("mlx.core", "mlx_lm"):
            importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"MlxEngine needs mlx and mlx-lm ({error}): pip install 'mlx-serving-router[mlx]'",
            name=error.name,
        ) from error


def _found(models_dir: str | os.PathLike[str] | None, *, hf_cache: bool) -> list[FoundModel]:
    """The models on this machine; those of the folder last, so that they win over others of their name."""
    found = scan_hugging_face_cache() if hf_cache else []
    return found + (scan_folder(models_dir) if models_dir is not None else [])
