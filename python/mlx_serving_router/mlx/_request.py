"""What a request means to mlx-lm: parameters checked and given their defaults, messages ready for a template.

Refuses with `InvalidRequestError` what no worker could do, before any work is done for it. Knows the ranges
of parameters and the shape of messages; knows nothing about mlx, tokenizers or jobs, and never repeats a
prompt in an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mlx_serving_router.engine import EngineRequest

MAX_SEED: Final = 2**64
"""Seeds are taken modulo this: mlx's generator takes 64 bits, and a negative seed is as good as another."""

_MOST_ALTERNATIVES: Final = 20  # the OpenAI API's
_GREEDY_BELOW: Final = 1e-5  # a lower temperature would overflow float32 logits; it means greedy anyway


class InvalidRequestError(ValueError):
    """The request cannot be answered as it stands, by any worker. The message says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of one generation, all set and within their ranges. `EngineRequest` explains them."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: tuple[str, ...]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    """How many alternatives to report beside each token's own; `None` for no report."""
    resumed: tuple[int, ...]
    """Tokens of the answer that were delivered already."""
    resumed_text: str
    """What was shown of them."""

    @classmethod
    def from_request(cls, request: EngineRequest, *, default_max_tokens: int, vocabulary: int) -> Parameters:
        """Check a request.

        Args:
            request: As it came.
            default_max_tokens: Stands for `max_tokens` where that is not set.
            vocabulary: Number of tokens of the model: ids in `logit_bias` lie below it.

        Raises:
            InvalidRequestError: A value is out of its range, or asks for something that this engine cannot
                do.
        """
        if request.response_format and request.response_format.get("type") != "text":
            raise InvalidRequestError(
                "this engine does not constrain its answers; the only response_format is text"
            )
        top_k = _integer("top_k", request.top_k, 0, low=-1)
        temperature = _number("temperature", request.temperature, 0.0, low=0.0)
        resumed, resumed_text = _resumed(request.resume or {}, vocabulary)
        return cls(
            max_tokens=_integer("max_tokens", request.max_tokens, default_max_tokens, low=1),
            temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
            top_p=_number("top_p", request.top_p, 1.0, low=0.0, high=1.0, above_low=True),
            top_k=top_k if 0 < top_k < vocabulary else 0,
            min_p=_number("min_p", request.min_p, 0.0, low=0.0, high=1.0),
            seed=None if request.seed is None else _integer("seed", request.seed, 0) % MAX_SEED,
            stop=_stop_strings(request.stop),
            repetition_penalty=_number(
                "repetition_penalty", request.repetition_penalty, 1.0, low=0.0, above_low=True
            ),
            presence_penalty=_number("presence_penalty", request.presence_penalty, 0.0, low=-2.0, high=2.0),
            frequency_penalty=_number(
                "frequency_penalty", request.frequency_penalty, 0.0, low=-2.0, high=2.0
            ),
            logit_bias=_logit_bias(request.logit_bias or {}, vocabulary),
            logprobs=_logprobs(request.logprobs, vocabulary),
            resumed=resumed,
            resumed_text=resumed_text,
        )


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: contents are strings, arguments of tool calls are objects.

    Contents that come in parts are joined.

    Raises:
        InvalidRequestError: There are none, or one has no role, or a content that is not text.
    """
    if not messages:
        raise InvalidRequestError("messages must not be empty")
    return [_chat_message(index, message) for index, message in enumerate(messages)]


def _chat_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{where}.role must be a string such as user, assistant or system")
    content = message.get("content")
    if content is None:
        content = ""
    elif isinstance(content, list):
        texts = [
            part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"
        ]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError(
                f"{where}.content may only have parts of type text: the model reads nothing else"
            )
        content = "".join(str(text) for text in texts)
    elif not isinstance(content, str):
        raise InvalidRequestError(f"{where}.content must be a string or a list of text parts")
    ready = {**message, "content": content}
    if calls := message.get("tool_calls"):
        ready["tool_calls"] = [_tool_call(f"{where}.tool_calls[{at}]", call) for at, call in enumerate(calls)]
    return ready


def _tool_call(where: str, call: Mapping[str, Any]) -> dict[str, Any]:
    # The OpenAI API sends arguments as a string of JSON; templates write them as JSON once more.
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (KeyError, TypeError, ValueError):
        raise InvalidRequestError(f"{where}.function.arguments must be a string of JSON") from None


def _number(
    name: str,
    value: Any,
    default: float,
    *,
    low: float,
    high: float = math.inf,
    above_low: bool = False,
) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number")
    if not low <= value <= high or (above_low and value == low):
        least = f"above {low:g}" if above_low else f"at least {low:g}"
        raise InvalidRequestError(
            f"{name} must be {least}" + (f" and at most {high:g}" if high < math.inf else "")
        )
    return float(value)


def _integer(name: str, value: Any, default: int, *, low: int | None = None) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer")
    if low is not None and value < low:
        raise InvalidRequestError(f"{name} must be at least {low}")
    return value


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise InvalidRequestError("stop must be a list of strings that are not empty")
    return stops


def _logit_bias(bias: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    checked: dict[int, float] = {}
    for key, value in bias.items():
        try:
            token = int(key)
        except ValueError:
            token = -1
        if not 0 <= token < vocabulary:
            raise InvalidRequestError(f"the keys of logit_bias must be token ids from 0 to {vocabulary - 1}")
        checked[token] = _number("a value of logit_bias", value, 0.0, low=-100.0, high=100.0)
    return checked


def _logprobs(wanted: Any, vocabulary: int) -> int | None:
    if wanted is None:
        return None
    most = min(_MOST_ALTERNATIVES, vocabulary)
    if _integer("logprobs", wanted, 0, low=0) > most:
        raise InvalidRequestError(f"logprobs must be at most {most}")
    return int(wanted)


def _resumed(resume: Mapping[str, Any], vocabulary: int) -> tuple[tuple[int, ...], str]:
    tokens, text = resume.get("tokenIds", ()), resume.get("text", "")
    if not isinstance(tokens, list | tuple) or not isinstance(text, str):
        raise InvalidRequestError("resume must have tokenIds, a list, and text, a string")
    if not all(isinstance(token, int) and 0 <= token < vocabulary for token in tokens):
        raise InvalidRequestError(f"resume.tokenIds must be token ids from 0 to {vocabulary - 1}")
    return tuple(tokens), text
