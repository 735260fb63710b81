"""The models of the OpenAPI document: what goes in and out of each address.

They describe and do nothing else: bodies are read and written by the codec in Rust, which alone decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Callable

_Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
_Session = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[!-~]+$")]
_Natural = Annotated[int, Field(ge=1, le=2**63 - 1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Whole = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_Stop = Annotated[str, Field(min_length=1)]


class _Open(BaseModel):
    """Further fields are ignored."""

    model_config = ConfigDict(extra="allow")


# === the OpenAI API: requests ===


class TextPart(_Open):
    """A part of a content."""

    type: Literal["text"]
    text: str


class Message(_Open):
    """A message of a conversation; further fields go to the worker as they are."""

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None


class StreamOptions(_Open):
    """How a stream ends."""

    include_usage: bool | None = Field(None, description="Whether its usage comes before its end")


class _Request(_Open):
    model: _Name = Field(description="One of `GET /v1/models`")
    max_tokens: _Natural | None = Field(None, description="The most tokens to generate")
    max_completion_tokens: _Natural | None = Field(None, description="The newer name of the same, which wins")
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    min_p: _Share | None = None
    seed: _Whole | None = None
    stop: _Stop | list[_Stop] | None = Field(None, description="Texts that end the answer")
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0)] | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="Functions that the model may call")
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session_id: _Session | None = Field(None, description="Its requests go to one worker where possible")
    prompt_cache_key: str | None = Field(None, description="The session, where none is named")
    user: str | None = Field(None, description="The session, where neither is named")
    priority: Literal["high", "normal", "low"] | None = None


class ChatCompletionRequest(_Request):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="Needs `logprobs`")


class CompletionRequest(_Request):
    """A text to continue."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class EmbeddingsRequest(_Open):
    """Texts to embed; the server judges all but the model."""

    model: _Name = Field(description="One of `GET /v1/models`")
    input: Any = Field(description="A text, a list of them, or tokens")


class ResponsesRequest(_Open):
    """What is to be responded to; the server judges all but what routing reads."""

    model: _Name = Field(description="One of `GET /v1/models`")
    input: Any = Field(None, description="A text, or a list of items")
    stream: bool | None = None
    session_id: _Session | None = Field(None, description="Its requests go to one worker where possible")


# === the OpenAI API: answers ===


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokens(_Answer):
    """What of the prompt was there already."""

    cached_tokens: int


class Usage(_Answer):
    """What an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class FunctionCall(_Answer):
    """What is called."""

    name: str
    arguments: str = Field(description="A text of JSON")


class Relayed(_Open):
    """An answer as the server wrote it."""


class ToolCall(_Answer):
    """A function that the model wants called."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(_Answer):
    """The answer to a conversation."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] = Field([], description="Left out where there are none")


class ChatChoice(_Answer):
    """The one choice."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class TextChoice(_Answer):
    """The one choice."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Answer):
    """An answer to a conversation. With `stream`, `chat.completion.chunk` events come in its place."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Completion(_Answer):
    """A text that goes on. With `stream`, events of the same kind come in its place."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(_Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Answer):
    """What is served."""

    object: Literal["list"]
    data: list[Model]


class OpenAIErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(_Answer):
    """An error in the OpenAI API's shape."""

    error: OpenAIErrorDetail


# === the fleet ===


class RouterErrorDetail(_Answer):
    """What went wrong."""

    code: str
    message: str
    context: dict[str, Any]
    timestamp: int
    retryable: bool


class RouterError(_Answer):
    """An error in the shape of `ControllerError.to_dict()`."""

    error: RouterErrorDetail


class RequestNotFound(_Answer):
    """Nothing is known of this request."""

    error: Literal["Request not found"]
    requestId: str  # noqa: N815 as it is written


class Health(_Answer):
    """The process is alive."""

    status: Literal["ok"]


class Ready(_Answer):
    """Whether a worker can serve."""

    status: Literal["ready", "not ready"]
    state: str
    workers: int
    reason: str | None = None
    """Why it is not ready."""


class _Facts(BaseModel):
    """Further fields may come."""

    model_config = ConfigDict(extra="allow")


class ControllerMetrics(_Facts):
    """Requests in numbers, and the circuit breakers by worker."""

    activeRequests: int  # noqa: N815
    completedRequests: int  # noqa: N815
    circuitBreaker: dict[str, dict[str, Any]]  # noqa: N815
    timestamp: int


class ClusterStatus(_Facts):
    """The fleet in numbers."""

    controllerId: str  # noqa: N815
    state: str
    workers: dict[str, int]
    requests: dict[str, int]
    models: list[str]
    timestamp: int


class Worker(_Facts):
    """A worker at one moment."""

    workerId: str  # noqa: N815
    incarnation: str
    status: Literal["online", "degraded", "draining", "offline"]
    phase: Literal["loading", "ready", "draining"]
    models: list[str]
    inFlight: int  # noqa: N815
    lastSeenMs: int  # noqa: N815
    breaker: str


class RequestFacts(_Facts):
    """What is known of a request."""

    requestId: str  # noqa: N815
    modelId: str  # noqa: N815
    sessionId: str | None  # noqa: N815
    startTime: int  # noqa: N815
    endTime: int | None  # noqa: N815
    durationMs: float | None  # noqa: N815
    timeToFirstTokenMs: float | None  # noqa: N815
    retryCount: int  # noqa: N815
    selectedWorker: str | None  # noqa: N815
    failedWorkers: list[str]  # noqa: N815
    finalError: dict[str, Any] | None  # noqa: N815
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    tokens: int
    attempts: list[dict[str, Any]]


# === addresses ===

_OPENAI: Final[dict[int | str, Any]] = {
    "4XX": {"model": OpenAIError, "description": "The request is at fault, or there is no room"},
    "5XX": {"model": OpenAIError, "description": "The fleet cannot serve it"},
}
_API: Final[dict[int | str, Any]] = {
    "4XX": {"model": RouterError, "description": "The request is at fault"},
    "5XX": {"model": RouterError, "description": "The controller cannot answer"},
}
# Without a schema: readers of documents differ in what it would describe, the text or each event.
_STREAM: Final[dict[str, Any]] = {"text/event-stream": {}}

_ADDRESSES: Final[dict[str, dict[int | str, Any]]] = {
    "/v1/chat/completions": {200: {"model": ChatCompletion, "content": _STREAM}, **_OPENAI},
    "/v1/completions": {200: {"model": Completion, "content": _STREAM}, **_OPENAI},
    "/v1/embeddings": {200: {"model": Relayed}, **_OPENAI},
    "/v1/responses": {200: {"model": Relayed, "content": _STREAM}, **_OPENAI},
    "/v1/models": {200: {"model": ModelList}, **_OPENAI},
    "/v1/models/{model_id:path}": {200: {"model": Model}, **_OPENAI},
    "/health": {200: {"model": Health}},
    "/ready": {200: {"model": Ready}, 503: {"model": Ready, "description": "No worker can serve"}},
    "/api/controller/metrics": {200: {"model": ControllerMetrics}, **_API},
    "/api/controller/requests": {200: {"model": list[RequestFacts]}, **_API},
    "/api/controller/requests/{request_id}": {
        200: {"model": RequestFacts},
        404: {"model": RequestNotFound, "description": "Nothing is known of this request"},
        **_API,
    },
    "/api/cluster/status": {200: {"model": ClusterStatus}, **_API},
    "/api/cluster/workers": {200: {"model": list[Worker]}, **_API},
    "/api/cluster/workers/{worker_id}": {200: {"model": Worker}, **_API},
    "/metrics": {
        200: {
            "description": "Metrics for Prometheus",
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            },
        }
    },
}
_BODIES: Final[dict[str, type[BaseModel]]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/responses": ResponsesRequest,
}
_HEADERS: Final = [
    {"name": name, "in": "header", "required": False, "description": description, "schema": schema}
    for name, description, schema in (
        (
            "x-session-id",
            "The session, before all fields that name one",
            {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[!-~]+$"},
        ),
        ("x-worker-id", "Asks for this worker and no other", {"type": "string"}),
    )
]
_QUERIES: Final = {
    "/api/controller/requests": [
        {
            "name": "limit",
            "in": "query",
            "required": False,
            "description": "The newest so many; all of them where it is left out",
            "schema": {"type": "integer", "minimum": 1},
        }
    ],
}


def document(path: str, endpoint: Callable[..., Any]) -> dict[str, Any]:
    """What `add_api_route` takes to describe an address.

    Args:
        path: The address.
        endpoint: Its docstring is the summary.
    """
    summary = (endpoint.__doc__ or "").partition("\n")[0].removesuffix(".")
    if path not in _ADDRESSES:
        return {"include_in_schema": False}
    described: dict[str, Any] = {"summary": summary, "responses": _ADDRESSES[path]}
    if path in _BODIES:
        schema = _inlined(_BODIES[path])
        described["openapi_extra"] = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "parameters": _HEADERS,
        }
    elif path in _QUERIES:
        described["openapi_extra"] = {"parameters": _QUERIES[path]}
    return described


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a model with its parts in their places: an application's document has no other home for them."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            reference = value.get("$ref")
            if reference is not None:
                rest = {key: kept for key, kept in value.items() if key != "$ref"}
                return {**resolved(parts[reference.rpartition("/")[2]]), **rest}
            return {key: resolved(inner) for key, inner in value.items()}
        return [resolved(inner) for inner in value] if isinstance(value, list) else value

    result: dict[str, Any] = resolved(schema)
    return result
