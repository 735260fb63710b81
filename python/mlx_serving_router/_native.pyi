"""The Rust core. What is public here is exported by `mlx_serving_router`; everything else is for the package alone."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Generic, Literal, NoReturn, Self, TypeAlias, TypeVar, final

from mlx_serving_router._errors import CircuitState, ControllerError, ControllerErrorCode, ControllerState
from mlx_serving_router._types import (
    Attempt,
    BreakerStats,
    FinalError,
    LeftOut,
    RequestCounts,
    WorkerCounts,
)

_T_co = TypeVar("_T_co", covariant=True)

_Priority: TypeAlias = Literal["high", "normal", "low"]
_LogRecord: TypeAlias = tuple[str, int, str, float, str | None, int | None, dict[str, Any]]

VERSION: Final[str]
ERROR_CODES: Final[dict[str, bool]]
"""Every code of the core, and whether it is retryable."""
CIRCUIT_STATES: Final[tuple[str, ...]]
CONTROLLER_STATES: Final[tuple[str, ...]]

# === runtime.rs, logs.rs ===

def forked() -> None:
    """Notice, in a forked child, that this is another process."""

def exits() -> None:
    """Notice that the interpreter begins to exit, in this thread: what other threads wait for ends without a word."""

def shutdown() -> None:
    """End the runtime with all that it runs."""

def take_logs(level: int, timeout: float) -> list[_LogRecord] | None:
    """Wait for log records and take all; `None`: nothing will come any more."""

def close_logs() -> None:
    """End the gathering of log records."""

# === bridge.rs ===

@final
class Call(Awaitable[Any]):
    """Work on the runtime, to be awaited once. Dropping it aborts the work."""

    def __await__(self) -> Generator[Any, None, Any]: ...
    def __iter__(self) -> Generator[Any, None, Any]: ...
    def __next__(self) -> Any: ...
    def throw(self, kind: Any, value: Any = None, _traceback: Any = None) -> NoReturn:
        """A cancellation, or whatever else ends the await: the work is aborted at once."""

    def close(self) -> None:
        """The await is given up."""

# === request.rs ===

def prefix_hashes(
    model_id: str, *, prompt: str | None = None, messages: Sequence[Mapping[str, Any]] | None = None
) -> list[str]:
    """The hashes of the prefixes of a prompt, as docs/prefix-hashes.md defines them, the shortest first.

    Raises:
        ValueError: Something that JSON has no word for.
    """

@final
class InferenceRequest:
    """What is asked of a model. What is not set is left to the worker.

    Types are checked here, meaning where the request is used.

    Args:
        model_id: The model.
        messages: A conversation, in the OpenAI API's shape. Either this or `prompt`.
        prompt: A text to continue as it stands.
        request_id: Names the request everywhere; made where it is left out.
        session_id: Requests of one session go to the same worker where that is possible.
        max_tokens: The most tokens to generate.
        temperature: 0 is greedy decoding.
        top_p: Nucleus sampling.
        top_k: Only the k likeliest tokens; 0 is all.
        min_p: Only tokens at least so likely as this share of the likeliest.
        seed: Makes sampling repeatable.
        stop: Texts that end the answer and are not part of it.
        repetition_penalty: Above 1 makes what was said less likely.
        presence_penalty: Taken once from every token that was said.
        frequency_penalty: Taken from a token as often as it was said.
        logit_bias: Added to the logits, by token id.
        logprobs: How many alternatives to report for each token.
        tools: Functions that the model may call, in the OpenAI API's shape.
        tool_choice: Whether and which of them it has to call.
        response_format: The shape of the answer.
        stream: Whether tokens are wanted as they come. The method called decides, not this.
        priority: Who goes first in a queue; `normal` where it is left out.
        resume: Continues after what another worker delivered: `tokenIds` and `text`.

    Raises:
        TypeError: A field has the wrong type, or is unknown.
        ValueError: A value that JSON has no word for.
    """

    def __new__(
        cls,
        *,
        model_id: str,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt: str | None = None,
        request_id: str | None = None,
        session_id: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[str, float] | Mapping[int, float] | None = None,
        logprobs: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        stream: bool | None = None,
        priority: _Priority | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> Self: ...
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> InferenceRequest:
        """A request from the dictionary of the wire, with camelCase keys. Unknown keys are ignored."""

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of the wire, with camelCase keys and without what is not set."""

    @property
    def request_id(self) -> str:
        """Names the request everywhere."""
    @property
    def model_id(self) -> str:
        """The model."""
    @property
    def prompt(self) -> str | None:
        """A text to continue; instead of `messages`."""
    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """A conversation, in the OpenAI API's shape."""
    @property
    def max_tokens(self) -> int | None:
        """The most tokens to generate."""
    @property
    def temperature(self) -> float | None:
        """0 is greedy decoding."""
    @property
    def top_p(self) -> float | None:
        """Nucleus sampling."""
    @property
    def top_k(self) -> int | None:
        """Only the k likeliest tokens; 0 is all."""
    @property
    def min_p(self) -> float | None:
        """Only tokens at least so likely as this share of the likeliest."""
    @property
    def seed(self) -> int | None:
        """Makes sampling repeatable."""
    @property
    def stop(self) -> list[str] | None:
        """Texts that end the answer and are not part of it."""
    @property
    def repetition_penalty(self) -> float | None:
        """Above 1 makes what was said less likely."""
    @property
    def presence_penalty(self) -> float | None:
        """Taken once from every token that was said."""
    @property
    def frequency_penalty(self) -> float | None:
        """Taken from a token as often as it was said."""
    @property
    def logit_bias(self) -> dict[str, float] | None:
        """Added to the logits, by token id."""
    @property
    def logprobs(self) -> int | None:
        """How many alternatives to report for each token."""
    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Functions that the model may call, in the OpenAI API's shape."""
    @property
    def tool_choice(self) -> str | dict[str, Any] | None:
        """Whether and which of them it has to call."""
    @property
    def response_format(self) -> dict[str, Any] | None:
        """The shape of the answer."""
    @property
    def session_id(self) -> str | None:
        """The conversation that the request belongs to."""
    @property
    def stream(self) -> bool:
        """Whether tokens are wanted as they come. The method called decides, not this."""
    @property
    def priority(self) -> _Priority:
        """Who goes first in a queue."""
    @property
    def resume(self) -> dict[str, Any] | None:
        """Continues after what another worker delivered: `tokenIds` and `text`."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

# === answer.rs ===

@final
class Usage:
    """Tokens of a request and its answer.

    Args:
        prompt_tokens: Of the prompt.
        completion_tokens: Of the answer.
        cached_tokens: Of the prompt, those that a cache held.
    """

    def __new__(cls, prompt_tokens: int = 0, completion_tokens: int = 0, cached_tokens: int = 0) -> Self: ...
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Usage:
        """A usage from its dictionary, with camelCase keys; `totalTokens` is not read."""

    def to_dict(self) -> dict[str, int]:
        """Its dictionary, with camelCase keys."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer."""
    @property
    def cached_tokens(self) -> int:
        """Of the prompt's tokens, those that a cache held."""
    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class TokenEvent:
    """A piece of an answer: one token, or several.

    Args:
        text: The text, perhaps empty: a character may need several tokens.
        index: The place of its first token in the answer, from 0. What a local worker yields is counted for it.
        token_ids: The tokens, where they are known.
        logprobs: Log probabilities, in the OpenAI API's shape.
    """

    def __new__(
        cls,
        text: str,
        *,
        index: int = 0,
        token_ids: Sequence[int] = (),
        logprobs: Mapping[str, Any] | None = None,
    ) -> Self: ...
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TokenEvent:
        """An event from its dictionary: as `to_dict` gives it, or a token message of the wire."""

    def to_dict(self) -> dict[str, Any]:
        """Its dictionary, with camelCase keys."""

    @property
    def text(self) -> str:
        """The text, perhaps empty."""
    @property
    def index(self) -> int:
        """The place of its first token in the answer, from 0."""
    @property
    def token_ids(self) -> list[int]:
        """The tokens, where the worker says them."""
    @property
    def logprobs(self) -> dict[str, Any] | None:
        """Log probabilities, in the OpenAI API's shape."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class InferenceResponse:
    """A whole answer, and how it came about."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> InferenceResponse:
        """A response from its dictionary, as `to_dict` gives it."""

    def to_dict(self) -> dict[str, Any]:
        """Its dictionary, with camelCase keys."""

    @property
    def text(self) -> str:
        """The text; whole also after a stream."""
    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """Why it ended."""
    @property
    def usage(self) -> Usage:
        """What it cost."""
    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The functions that the model wants called, in the OpenAI API's shape; empty where it wants none."""
    @property
    def logprobs(self) -> dict[str, Any] | None:
        """Log probabilities, in the OpenAI API's shape; of a stream they went with its tokens."""
    @property
    def worker_id(self) -> str:
        """The worker that answered."""
    @property
    def model_id(self) -> str:
        """The model that answered."""
    @property
    def request_id(self) -> str:
        """The request."""
    @property
    def metadata(self) -> RequestMetadata:
        """How it came about; final."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

# === metadata.rs ===

@final
class RequestMetadata:
    """What is known of one request. Points in time are milliseconds since the epoch, durations milliseconds."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RequestMetadata:
        """Metadata from its dictionary, as `to_dict` gives it."""

    def to_dict(self) -> dict[str, Any]:
        """Its dictionary, with camelCase keys."""

    @property
    def request_id(self) -> str:
        """Its name."""
    @property
    def model_id(self) -> str:
        """The model that was asked for."""
    @property
    def session_id(self) -> str | None:
        """The session it belongs to."""
    @property
    def start_time(self) -> int:
        """When it came."""
    @property
    def end_time(self) -> int | None:
        """When it ended; `None` while it has not."""
    @property
    def duration_ms(self) -> float | None:
        """How long it took, waiting and retries included; `None` while it has not ended."""
    @property
    def time_to_first_token_ms(self) -> float | None:
        """From its arrival to its first token; `None` for an answer without tokens of its own."""
    @property
    def retry_count(self) -> int:
        """Attempts after the first."""
    @property
    def selected_worker(self) -> str | None:
        """The worker that was chosen last; `None` until one is."""
    @property
    def failed_workers(self) -> list[str]:
        """The workers at which an attempt failed, each once, in the order of their failures."""
    @property
    def circuit_breaker_trips(self) -> int:
        """Breakers that this request opened."""
    @property
    def timeouts(self) -> int:
        """Limits on time that passed."""
    @property
    def final_error(self) -> FinalError | None:
        """What the caller met, where it failed."""
    @property
    def status(self) -> Literal["queued", "running", "succeeded", "failed", "cancelled"]:
        """How far it is."""
    @property
    def tokens(self) -> int:
        """Tokens generated for it."""
    @property
    def attempts(self) -> list[Attempt]:
        """What was tried, why there, and who was left out."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

# === fleet.rs ===

@final
class WorkerInfo:
    """A worker at one moment."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WorkerInfo:
        """A worker from its dictionary, as `to_dict` gives it."""

    def to_dict(self) -> dict[str, Any]:
        """Its dictionary, with camelCase keys."""

    @property
    def worker_id(self) -> str:
        """Its name."""
    @property
    def incarnation(self) -> str:
        """Which life of it; empty for workers of the older dialect."""
    @property
    def status(self) -> Literal["online", "degraded", "draining", "offline"]:
        """How it stands with this controller."""
    @property
    def phase(self) -> Literal["loading", "ready", "draining"]:
        """What it is doing."""
    @property
    def models(self) -> list[str]:
        """What it serves."""
    @property
    def loaded_models(self) -> list[str]:
        """Models in memory."""
    @property
    def loading_models(self) -> list[str]:
        """Models on their way into memory."""
    @property
    def in_flight(self) -> int:
        """Requests of this controller on it."""
    @property
    def foreign_requests(self) -> int:
        """Requests of other controllers on it, as far as it said so lately."""
    @property
    def queue_depth(self) -> int:
        """Requests that wait at the worker."""
    @property
    def max_concurrent(self) -> int:
        """Requests that it takes at a time; 0: it does not say."""
    @property
    def last_seen_ms(self) -> int:
        """How long ago it was last heard from, in milliseconds."""
    @property
    def breaker(self) -> CircuitState:
        """The state of its circuit breaker; `DISABLED` where there are none."""
    @property
    def features(self) -> list[str]:
        """What it can do beyond answering: `resume`, `cancel`, `batch`."""
    @property
    def hostname(self) -> str:
        """The machine's name."""
    @property
    def carrier(self) -> Literal["nats", "http", "local"]:
        """Who carries requests to it."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class ClusterStatus:
    """The fleet and its requests in numbers, at one moment."""

    def to_dict(self) -> dict[str, Any]:
        """Its dictionary, with camelCase keys."""

    @property
    def controller_id(self) -> str:
        """The controller."""
    @property
    def state(self) -> ControllerState:
        """Its state."""
    @property
    def workers(self) -> WorkerCounts:
        """How many workers are known."""
    @property
    def requests(self) -> RequestCounts:
        """How many requests there are and were."""
    @property
    def models(self) -> list[str]:
        """What online workers serve, sorted."""
    @property
    def timestamp(self) -> int:
        """When this was, in milliseconds since the epoch."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

# === events.rs ===

@final
class ControllerEvent:
    """Something that happened."""

    @property
    def kind(
        self,
    ) -> Literal[
        "worker_registered",
        "worker_replaced",
        "worker_offline",
        "worker_removed",
        "worker_draining",
        "breaker_changed",
        "session_moved",
        "failover",
    ]:
        """What."""
    @property
    def worker_id(self) -> str | None:
        """The worker that it concerns."""
    @property
    def timestamp(self) -> int:
        """When, in milliseconds since the epoch."""
    @property
    def details(self) -> dict[str, Any]:
        """The facts, under snake_case keys."""
    @property
    def lost(self) -> int:
        """How many events this reader missed right before this one."""
    def to_dict(self) -> dict[str, Any]:
        """Its dictionary, with camelCase keys."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class ControllerEvents(AsyncIterator[ControllerEvent]):
    """What happens from now on, until the controller has stopped.

    A slow reader loses the oldest events, and the next one tells how many.
    """

    def __aiter__(self) -> Self: ...
    def __anext__(self) -> Awaitable[ControllerEvent]: ...

# === config.rs ===

@final
class ClusterConfig:
    """The whole configuration; without arguments, all defaults.

    Errors name the file, line, column and key, and say what would be right.
    """

    def __new__(cls) -> Self: ...
    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClusterConfig:
        """Read a YAML or JSON file, and the overrides `MLX_ROUTER__…` of the environment.

        Raises:
            ConfigError: The file cannot be read, or something in it or in the environment is no valid configuration.
        """

    @classmethod
    def from_environment(cls) -> ClusterConfig:
        """The defaults with the overrides `MLX_ROUTER__…` of the environment.

        Raises:
            ConfigError: Something in the environment is no valid configuration.
        """

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClusterConfig:
        """A configuration of the shape of the file, with camelCase or snake_case keys.

        The environment is not looked at.

        Raises:
            ConfigError: Something in it is no valid configuration.
            TypeError: It holds what no file can hold.
        """

    def to_dict(self) -> dict[str, Any]:
        """All of it with camelCase keys. Secrets are in it."""

    def redacted(self) -> dict[str, Any]:
        """All of it with camelCase keys, to be shown: `***` stands for each secret."""

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON Schema (2020-12) of a configuration file."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

# === stream.rs ===

@final
class _Next(Awaitable[_T_co], Generic[_T_co]):
    def __await__(self) -> Generator[Any, None, _T_co]: ...
    def __iter__(self) -> Generator[Any, None, _T_co]: ...
    def __next__(self) -> Any: ...

@final
class TokenStream(AsyncIterator[TokenEvent]):
    """An answer as it comes: an async iterator of `TokenEvent`, for one reader.

    Leaving its `async with` early, `aclose` and dropping it cancel the work on the worker. One that is not read is
    paused, and after `streamIdleTimeoutMs` ended with STREAM_INTERRUPTED.
    """

    def __aiter__(self) -> Self: ...
    def __anext__(self) -> _Next[TokenEvent]: ...
    def batches(self) -> TokenBatches:
        """All events that are ready at a time, as lists: fewer steps where tokens come faster than they are read."""

    def aclose(self) -> Awaitable[None]:
        """End it.

        The work on the worker is cancelled where it still runs; all that the request held is back when this returns.
        What was not read is lost.
        """

    def __aenter__(self) -> Awaitable[Self]: ...
    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> Awaitable[None]: ...
    @property
    def response(self) -> InferenceResponse | None:
        """The whole answer, once it is complete; `None` before, and where it failed."""
    @property
    def request_id(self) -> str:
        """The request."""
    @property
    def model_id(self) -> str:
        """The model that answers: the one asked for, or one that stands in for it."""
    @property
    def worker_id(self) -> str:
        """The worker that answers now."""

@final
class TokenBatches(AsyncIterator[list[TokenEvent]]):
    """An answer as it comes, all events that are ready at a time."""

    def __aiter__(self) -> Self: ...
    def __anext__(self) -> _Next[list[TokenEvent]]: ...

@final
class BlockingTokenStream(Iterator[TokenEvent]):
    """An answer as it comes, for scripts and notebooks: it waits with the interpreter released."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> TokenEvent: ...
    def close(self) -> None:
        """End it, as `TokenStream.aclose` does."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    @property
    def response(self) -> InferenceResponse | None:
        """The whole answer, once it is complete; `None` before, and where it failed."""
    @property
    def request_id(self) -> str:
        """The request."""
    @property
    def model_id(self) -> str:
        """The model that answers: the one asked for, or one that stands in for it."""
    @property
    def worker_id(self) -> str:
        """The worker that answers now."""

# === controller.rs ===

@final
class Controller:
    """The controller of the core; `ControllerNode` is its public face."""

    def __new__(cls, config: ClusterConfig, controller_id: str | None = None) -> Self: ...
    @property
    def controller_id(self) -> str:
        """Its name."""
    @property
    def config(self) -> ClusterConfig:
        """Its configuration."""
    @property
    def state(self) -> ControllerState:
        """Where it is in its life."""
    def start(self, nats_url: str | None = None) -> Awaitable[None]:
        """Start. `nats_url` stands in place of `nats.serverUrl`."""

    def start_blocking(self, nats_url: str | None = None) -> None:
        """As `start`, blocking."""

    def stop(self, drain_timeout: float) -> Awaitable[None]:
        """Stop: running requests may finish for so many seconds."""

    def stop_blocking(self, drain_timeout: float) -> None:
        """As `stop`, blocking."""

    def wait_for_workers(self, count: int, timeout: float | None) -> Awaitable[bool]:
        """True once so many workers are online, false when so many seconds have passed."""

    def wait_for_workers_blocking(self, count: int, timeout: float | None) -> bool:
        """As `wait_for_workers`, blocking."""

    def buffered(
        self,
        request: InferenceRequest,
        *,
        timeout: float | None = None,
        worker_id: str | None = None,
        traceparent: str | None = None,
    ) -> Awaitable[InferenceResponse]:
        """An answer in one piece."""

    def buffered_blocking(
        self, request: InferenceRequest, *, timeout: float | None = None, worker_id: str | None = None
    ) -> InferenceResponse:
        """As `buffered`, blocking."""

    def streaming(
        self,
        request: InferenceRequest,
        *,
        timeout: float | None = None,
        worker_id: str | None = None,
        traceparent: str | None = None,
    ) -> Awaitable[TokenStream]:
        """An answer as it comes."""

    def streaming_blocking(
        self, request: InferenceRequest, *, timeout: float | None = None, worker_id: str | None = None
    ) -> BlockingTokenStream:
        """As `streaming`, blocking."""

    def workers(self) -> list[WorkerInfo]:
        """Every known worker, by id."""

    def worker(self, worker_id: str) -> WorkerInfo | None:
        """One worker; `None` where it is not known."""

    def cluster_status(self) -> ClusterStatus:
        """The fleet and its requests in numbers."""

    def breaker_stats(self) -> dict[str, BreakerStats]:
        """The breakers, by worker; empty where they are disabled."""

    def reset_breaker(self, worker_id: str) -> bool:
        """False: there is no such worker, or there are no breakers."""

    def force_open_breaker(self, worker_id: str) -> bool:
        """False: there is no such worker, or there are no breakers."""

    def drain_worker(self, worker_id: str) -> bool:
        """False: there is no such worker."""

    def request_metrics(self, request_id: str) -> RequestMetadata | None:
        """What is known of a request; `None` where nothing is."""

    def all_request_metrics(self, limit: int | None = None) -> list[RequestMetadata]:
        """What is known of all requests."""

    def metrics_text(self) -> str:
        """Numbers for Prometheus."""

    def events(self) -> ControllerEvents:
        """What happens from now on."""

# === router.rs ===

@final
class Router:
    """The decision engine of a controller, for people with their own transport: who gets a request.

    Args:
        config: `requestRouting` and `loadBalancing` of it count. As `ControllerNode` takes it.
        seed: Decides every random choice; a random one where it is left out.

    Raises:
        ConfigError: The configuration cannot be used.
    """

    def __new__(
        cls,
        config: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        seed: int | None = None,
    ) -> Self: ...
    def add_worker(
        self, worker_id: str, models: Sequence[str], *, max_concurrent: int = 0, memory_gb: float = 0.0
    ) -> None:
        """Add a worker, or say anew what it can do. It stays until it is removed.

        Args:
            worker_id: Its name: 1 to 64 letters, digits, `-` and `_`.
            models: What it serves.
            max_concurrent: Requests that it takes at a time; 0: no limit.
            memory_gb: Its memory, for the strategy `skills_based`.

        Raises:
            ValueError: The name is unsuitable, or there are `controller.maxWorkers` already.
        """

    def remove_worker(self, worker_id: str) -> bool:
        """Forget a worker. False: it is not known."""

    def heartbeat(
        self,
        worker_id: str,
        *,
        active_requests: int = 0,
        queue_depth: int = 0,
        status: Literal["online", "degraded", "draining", "offline"] = "online",
        loaded_models: Sequence[str] = (),
        loading_models: Sequence[str] = (),
        memory_used_gb: float = 0.0,
    ) -> None:
        """A worker tells its load.

        Args:
            worker_id: Who.
            active_requests: Requests on it, whoever sent them; what is beyond this router's own counts as load.
            queue_depth: Requests that wait there.
            status: `degraded`: to be chosen only when no other is free.
            loaded_models: Models in memory.
            loading_models: Models on their way into memory.
            memory_used_gb: For the strategy `skills_based`.

        Raises:
            ValueError: The worker is not known, or the status is no word for one.
        """

    def select(
        self,
        model_id: str,
        session_id: str | None = None,
        exclude: Sequence[str] = (),
        *,
        explain: bool = False,
        prompt: str | None = None,
    ) -> Lease:
        """Choose a worker and take a place on it.

        Args:
            model_id: The model.
            session_id: The conversation that the request belongs to.
            exclude: Workers that failed this request.
            explain: Whether the lease (`left_out`), or the error (`context["left_out"]`), says who was left out, and
                why.
            prompt: What will be asked, as one text; only the strategy `prefix_aware` looks at it, and keeps hashes
                alone.

        Raises:
            ControllerError: NO_WORKERS_AVAILABLE, MODEL_NOT_FOUND, NO_HEALTHY_WORKERS, or QUEUE_FULL where all are
                full or want to be left alone; INVALID_SESSION_ID.
        """

    def workers(self) -> list[WorkerInfo]:
        """Every known worker, by id."""

    def worker(self, worker_id: str) -> WorkerInfo | None:
        """One worker; `None` where it is not known."""

    def drain_worker(self, worker_id: str) -> bool:
        """Give a worker nothing new; to have it back, remove it and add it again. False: it is not known."""

    def get_circuit_breaker_stats(self) -> dict[str, BreakerStats]:
        """What the circuit breakers have seen, by worker; empty where they are disabled."""

    def reset_circuit_breaker(self, worker_id: str) -> bool:
        """Close a circuit breaker and forget what it has seen.

        False: there is no such worker, or there are no breakers.
        """

    def force_open_circuit_breaker(self, worker_id: str) -> bool:
        """Open a circuit breaker until it is reset. False: there is no such worker, or there are no breakers."""

    def take_events(self) -> list[ControllerEvent]:
        """What happened since the last call, the oldest first: workers come and go, breakers change, sessions move.

        At most the latest 1,024 are kept; the first one says in `lost` how many came before.
        """

@final
class Lease:
    """A worker's promise to take one request.

    End it with `success`, `failure` or `release`; the first one counts. Dropped, or left as a context manager, it is
    released: that says nothing about the worker.
    """

    @property
    def worker_id(self) -> str:
        """Who takes the request."""
    @property
    def choice(self) -> Literal["strategy", "prefix", "affinity", "rendezvous"]:
        """What decided for this worker.

        `prefix`: it most likely holds most of the prompt in its cache; `affinity`: the session belongs to it;
        `rendezvous`: a new session, or its worker cannot take the request.
        """
    @property
    def left_out(self) -> list[LeftOut] | None:
        """With `explain`: who was no candidate, and why (`tried`, `circuit_open`, `full`, `degraded`)."""
    def first_token(self, ttft_ms: float) -> None:
        """The first token came, so many milliseconds after the request was sent."""

    def success(self, ttft_ms: float | None = None) -> None:
        """The answer came, to its end.

        Args:
            ttft_ms: Its first token came so many milliseconds after the request was sent.
        """

    def failure(self, code: ControllerErrorCode | str, *, retry_after_ms: int | None = None) -> bool:
        """It failed. The code decides what the breaker makes of it. True: this opened the breaker.

        Args:
            code: What it met.
            retry_after_ms: The worker wants to be left alone for so many milliseconds, and is.

        Raises:
            ValueError: There is no such code.
        """

    def release(self) -> None:
        """Give the place back; says nothing about the worker."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

# === worker.rs, job.rs ===

@final
class Worker:
    """The worker of the core; `WorkerNode` is its public face."""

    def __new__(
        cls,
        config: ClusterConfig,
        *,
        models: Sequence[str],
        worker_id: str | None = None,
        max_concurrent: int = 1,
        max_queue: int = 64,
        features: Sequence[str] = ...,
        model_paths: Mapping[str, str] = ...,
        total_model_size: int = 0,
        last_scanned: int | None = None,
    ) -> Self: ...
    @property
    def worker_id(self) -> str:
        """Its name."""
    @property
    def incarnation(self) -> str:
        """This life of it."""
    @property
    def state(self) -> Literal["idle", "starting", "ready", "draining", "stopped"]:
        """Where it is in its life."""
    @property
    def models(self) -> list[str]:
        """What it serves."""
    def jobs(self) -> JobQueue:
        """The work for its engine."""

    def run_engine(self, engine: object) -> None:
        """Call `engine.run` with the queue on a thread of its own. Once."""

    def engine_error(self) -> BaseException | None:
        """What the engine raised; `None` where it raised nothing."""

    def engine_joined(self, timeout: float) -> Call:
        """Wait until the engine's thread is gone. False: it is still there after so many seconds."""

    def engine_joined_blocking(self, timeout: float) -> bool:
        """As `engine_joined`, blocking."""

    def engine_ready_blocking(self) -> None:
        """Wait until the engine can take work."""

    def start(self) -> Call:
        """Connect, wait for the engine, register."""

    def start_blocking(self) -> None:
        """As `start`, blocking."""

    def start_local(self, controller: Controller) -> None:
        """Join a controller of this process, whose engine is ready. Returns at once."""

    def stop(self, drain_timeout: float) -> Call:
        """Stop: running jobs may finish for so many seconds."""

    def stop_blocking(self, drain_timeout: float) -> None:
        """As `stop`, blocking."""

    def begin_stop(self, drain_timeout: float) -> None:
        """As `stop`, without waiting for it."""

    def wait(self) -> Call:
        """Return when it has stopped; raise why where it did so by itself."""

    def wait_blocking(self) -> None:
        """As `wait`, blocking."""

@final
class Thread:
    """A thread that calls `target` at once, and can be waited for as the operating system understands it."""

    def __new__(cls, target: Callable[[], object], name: str) -> Self: ...
    def join(self, timeout: float) -> bool:
        """Wait until it is gone. False: it is still there after so many seconds."""

@final
class JobQueue:
    """The work of one engine, in the order in which it is to be done."""

    @property
    def closed(self) -> bool:
        """Whether the worker is stopping and no further job will come."""
    def get(self, timeout: float | None = None) -> Job | None:
        """The next job; `None` when so many seconds have passed or the queue is closed."""

    def next(self) -> Call:
        """The next job, awaited; `None` when the queue is closed."""

    def deliver(self, pieces: Sequence[tuple[Job, str, Sequence[int], Mapping[str, Any] | None]]) -> None:
        """Deliver pieces of several jobs together, without waiting for slow readers.

        Each has the job, the text, the tokens, and their log probabilities.
        """

    def report(
        self,
        phase: Literal["loading", "ready", "draining"],
        *,
        loaded_models: Sequence[str] = ...,
        loading_models: Sequence[str] = ...,
        cached_prefixes: Sequence[str] | None = None,
    ) -> None:
        """What heartbeats say from now on. The first `ready` lets the worker register.

        Jobs for `loading_models` are not handed out. `cached_prefixes` that are left out stay as they are.

        Raises:
            ValueError: `phase` is none, or a prefix is no hash, or there are more than 256.
        """

    @property
    def waiting_models(self) -> list[str]:
        """The models that waiting jobs ask for, each once."""
    def refuse(
        self,
        up_to: Literal["low", "normal", "high"] | None,
        message: str = "",
        *,
        retry_after_ms: int | None = None,
    ) -> None:
        """Refuse requests of this priority and of lower ones from now on, waiting jobs too; `None`: nobody.

        Raises:
            ValueError: `up_to` is no priority.
        """

@final
class Job:
    """One attempt at one request."""

    @property
    def request(self) -> InferenceRequest:
        """What is asked for."""
    @property
    def attempt(self) -> int:
        """1 for the first worker that was asked, 2 for the second, and so on."""
    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more: cancelled, past its deadline, or the worker is stopping."""
    @property
    def has_room(self) -> bool:
        """Whether the answer goes out as fast as it comes."""
    def token(
        self,
        text: str,
        token_ids: Sequence[int] = ...,
        *,
        logprobs: Mapping[str, Any] | None = None,
    ) -> None:
        """Deliver a piece of the answer. One that nobody takes off holds up the engine, for a second at most."""

    def event(self, event: TokenEvent) -> None:
        """Deliver a piece of the answer, without waiting: the caller looks at `has_room` and awaits `room`."""

    def piece(self, text: str) -> None:
        """As `event`, for a text alone."""

    def room(self) -> Call:
        """Return when `has_room`."""

    def gone(self) -> Call:
        """Return when `cancelled`."""

    def put_back(self) -> None:
        """Give it back to the queue, where it waits as before: its model is loaded first."""

    def let_go(self) -> None:
        """Give the place of a job of `next` back: nobody works on it any more."""

    def done(
        self,
        finish_reason: str = "stop",
        *,
        prompt_tokens: int = 0,
        completion_tokens: int | None = None,
        cached_tokens: int = 0,
        tool_calls: list[dict[str, Any]] | None = None,
    ) -> None:
        """End the job with success. `completion_tokens` is counted where it is `None`."""

    def error(self, code: str, message: str, *, retry_after_ms: int | None = None) -> None:
        """End the job with a failure."""

# === script.rs, scripted.rs ===

@final
class Script:
    """What a scripted worker does with the requests that reach it: a value, made by the functions of `testing`.

    Two scripts are equal where they are written alike; `repr` shows the calls that made them.
    """

    @staticmethod
    def answer(
        *pieces: str,
        delay_ms: int = 0,
        token_delay_ms: int = 0,
        finish_reason: str = "stop",
        prompt_tokens: int = 4,
        cached_tokens: int = 0,
        tool_calls: Sequence[Mapping[str, Any]] | None = None,
        streamed: bool = False,
    ) -> Script:
        """Answer, at once or slowly."""

    @staticmethod
    def stall(after_tokens: int = 0, *, accept: bool = True) -> Script:
        """Begin, then say nothing more until told to stop."""

    @staticmethod
    def fail(
        code: ControllerErrorCode | str | None,
        message: str,
        *,
        after_tokens: int = 0,
        retry_after_ms: int | None = None,
        delay_ms: int = 0,
        accept: bool = True,
    ) -> Script:
        """Begin, then fail."""

    @staticmethod
    def refuse(retry_after_ms: int | None = None) -> Script:
        """Refuse with WORKER_OVERLOADED: there is no room."""

    @staticmethod
    def die(after_tokens: int = 0, *, accept: bool = True) -> Script:
        """Begin, then be gone without a word: the worker itself, with all its requests, as `kill -9` has it."""

    @staticmethod
    def babble(
        how: Literal["malformed", "duplicate", "reordered", "missing"] = "malformed", *, after_tokens: int = 1
    ) -> Script:
        """Answer in tokens, break the protocol once, and go on as if nothing had been."""

    @staticmethod
    def say(*messages: Mapping[str, Any] | str | bytes) -> Script:
        """Say these messages and nothing else."""

    @staticmethod
    def every(n: int, script: Script, *, otherwise: Script | None = None) -> Script:
        """Do this with each n-th request, and something else with the others."""

    def then(self, script: Script) -> Script:
        """This for one request, or as many as `times` says, then another script for all further ones."""

    def times(self, n: int) -> Script:
        """This for so many requests, before what comes with `then`.

        Raises:
            ValueError: `n` is below 1.
        """

@final
class ReceivedRequest:
    """A request as it reached a scripted worker."""

    @property
    def request_id(self) -> str:
        """Names the request everywhere."""
    @property
    def attempt(self) -> int:
        """1 for the first worker that was asked, 2 for the second, and so on."""
    @property
    def model_id(self) -> str:
        """The model."""
    @property
    def session_id(self) -> str | None:
        """The conversation that it belongs to."""
    @property
    def stream(self) -> bool:
        """Whether tokens are wanted as they come."""
    @property
    def timeout(self) -> float:
        """How many seconds it may take, to its end."""
    @property
    def controller_id(self) -> str:
        """Who asked."""
    @property
    def request(self) -> InferenceRequest:
        """All of it, the prompt included."""

@final
class ReceivedCancel:
    """A cancellation as it reached a scripted worker."""

    @property
    def request_id(self) -> str:
        """The request."""
    @property
    def attempt(self) -> int:
        """Its attempt."""

@final
class ScriptedWorker:
    """The scripted worker of the core; that of `mlx_serving_router.testing` is its public face."""

    def __new__(
        cls,
        config: ClusterConfig,
        script: Script,
        *,
        models: Sequence[str],
        worker_id: str | None = None,
        max_concurrent: int = 0,
        features: Sequence[str] = ...,
        loading_ms: int = 0,
    ) -> Self: ...
    @property
    def worker_id(self) -> str:
        """Its name."""
    @property
    def incarnation(self) -> str:
        """This life of it, or the next."""
    @property
    def state(self) -> Literal["idle", "running", "frozen", "draining", "dead", "stopped"]:
        """Where it is in its life."""
    @property
    def models(self) -> list[str]:
        """What it serves."""
    def start(self) -> None:
        """Connect to NATS and register."""

    def start_local(self, controller: Controller) -> None:
        """Join a controller of this process."""

    def die(self) -> None:
        """Be gone without a word."""

    def stop(self) -> None:
        """Say goodbye and go."""

    def drain(self) -> None:
        """Want nothing new."""

    def listen(self, *, listens: bool) -> None:
        """Take requests, or have nobody listen for them."""

    def freeze(self) -> None:
        """Stand still."""

    def thaw(self) -> None:
        """Go on."""

    def now_does(self, script: Script) -> None:
        """Do this from the next request on."""

    def set_loading(self, loading_ms: int) -> None:
        """How long its models take to load after its next start."""

    def set_heartbeats(self, beats: bool) -> None:
        """Whether it gives signs of life."""

    def set_obeys_cancels(self, obeys: bool) -> None:
        """Whether a cancellation ends what it does."""

    def requests(self) -> list[ReceivedRequest]:
        """What it was asked, oldest first: the last thousand."""

    def cancels(self) -> list[ReceivedCancel]:
        """What it was told to stop, oldest first: the last thousand."""

    def counts(self) -> tuple[int, int, int]:
        """How many requests came, how many cancellations, and how many requests it works on."""

    def wait_until(
        self, timeout: float, *, requests: int = 0, cancels: int = 0, idle: bool = False
    ) -> Awaitable[bool]:
        """Wait until at least so many came, or it is idle. False: not within so many seconds."""

    def wait_until_blocking(
        self, timeout: float, *, requests: int = 0, cancels: int = 0, idle: bool = False
    ) -> bool:
        """As `wait_until`, blocking."""

# === openai.rs ===

@final
class CompletionCall:
    """A client's call: what is asked of the fleet, and how its answer is written."""

    @staticmethod
    def chat(body: bytes, *, request_id: str, session_id: str | None = None) -> CompletionCall:
        """Read a body of `/v1/chat/completions`.

        Args:
            body: The body.
            request_id: Becomes the request's name.
            session_id: The header `x-session-id`.

        Raises:
            ControllerError: REQUEST_VALIDATION_FAILED, INVALID_SESSION_ID.
        """

    @staticmethod
    def text(body: bytes, *, request_id: str, session_id: str | None = None) -> CompletionCall:
        """Read a body of `/v1/completions`; as `chat` otherwise."""

    @property
    def request(self) -> InferenceRequest:
        """What is asked of the fleet."""
    @property
    def stream(self) -> bool:
        """Whether the answer is wanted as it comes."""
    def encode(self, response: InferenceResponse, created: int) -> bytes:
        """The answer in one piece. `created` is in seconds since the epoch."""

    def stream_encoder(self, created: int) -> StreamEncoder:
        """The writer of the answer as it comes. `created` is in seconds since the epoch."""

@final
class StreamEncoder:
    """Writes one stream of server-sent events. Each method gives the bytes of one write."""

    def answered_by(self, model: str) -> None:
        """The model that answers, where it is not the one that was asked for. What is written from now on names it."""

    def tokens(self, events: Sequence[TokenEvent]) -> bytes:
        """Pieces of the answer."""

    def finish(self, response: InferenceResponse) -> bytes:
        """The end of the answer, up to `[DONE]`."""

    def keepalive(self) -> bytes:
        """A sign of life: a chunk without text."""

    def error(self, error: ControllerError) -> bytes:
        """The end of a stream that broke."""

@final
class RelayedCall:
    """A call that goes to a server as it came. The same methods as those of `CompletionCall`."""

    @staticmethod
    def embeddings(body: bytes, *, request_id: str, session_id: str | None = None) -> RelayedCall:
        """Read a body of `/v1/embeddings`; as `CompletionCall.chat` otherwise."""

    @staticmethod
    def responses(body: bytes, *, request_id: str, session_id: str | None = None) -> RelayedCall:
        """Read a body of `/v1/responses`; as `CompletionCall.chat` otherwise."""

    @property
    def request(self) -> InferenceRequest:
        """What is asked of the fleet."""
    @property
    def stream(self) -> bool:
        """Whether the answer is wanted as it comes."""
    def encode(self, response: InferenceResponse, created: int) -> bytes:
        """The answer in one piece, as the server wrote it."""

    def stream_encoder(self, created: int) -> RelayedStream:
        """What hands the answer on as it comes."""

@final
class RelayedStream:
    """Hands a relayed stream on. The same methods as those of `StreamEncoder`."""

    def answered_by(self, model: str) -> None:
        """The events name the model themselves."""

    def tokens(self, events: Sequence[TokenEvent]) -> bytes:
        """Events of the answer."""

    def finish(self, response: InferenceResponse) -> bytes:
        """Nothing: the last event has said it."""

    def keepalive(self) -> bytes:
        """A sign of life: a comment. The API has no event that says nothing."""

    def error(self, error: ControllerError) -> bytes:
        """The end of a stream that broke."""

def openai_error(error: ControllerError) -> tuple[int, list[tuple[str, str]], bytes]:
    """A `ControllerError` as status, headers and body."""

def openai_error_body(status: int, code: str, message: str) -> bytes:
    """The body of an error that no request can end with: a missing key, an unknown address."""

def openai_models(ids: Sequence[str], created: int) -> bytes:
    """The body of `/v1/models`. `created` is in seconds since the epoch."""

def openai_model(id: str, created: int) -> bytes:  # noqa: A002 the name is Rust's
    """The body of `/v1/models/{id}`. `created` is in seconds since the epoch."""

# === survey.rs ===

def survey(config: ClusterConfig, name: str, seconds: float) -> dict[str, Any]:
    """Connect to the NATS server of a configuration, ask who is there, and listen for so many seconds.

    No controller is made, and no worker is asked to do anything but to say who it is.

    Returns:
        `server` with `name`, `version`, `maxPayload` (bytes) and `roundTripMs`; `workers`, each with `workerId`,
        `hostname`, `models`, `older` (it speaks the older dialect), `clockAheadMs` (None: it says no time) and
        `incarnations`, how many lives of that name spoke.

    Raises:
        ControllerError: NATS_ERROR: no server answers, or it refuses us.
    """
