"""Log probabilities of tokens, in the shape of the OpenAI API's chat completions.

They are those that the tokens were drawn from: after biases and penalties, before temperature and filters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST: Final = -9999.0  # stands for minus infinity, for which JSON has no word
_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"


def token_logprob(
    decode: Callable[[list[int]], str], token: int, logprobs: Any, alternatives: int
) -> dict[str, Any]:
    """An entry of `content`.

    Args:
        decode: Gives the text of token ids.
        token: The token that was drawn.
        logprobs: Of all tokens, computed.
        alternatives: How many of the most likely tokens to name.
    """
    import mlx.core as mx

    entry = _entry(decode, token, logprobs[token].item())
    entry["top_logprobs"] = []
    if alternatives > 0:
        likely: Any = mx.argpartition(-logprobs, kth=alternatives - 1)[:alternatives]
        pairs = zip(likely.tolist(), logprobs[likely].tolist(), strict=True)
        ranked = sorted(pairs, key=lambda pair: -pair[1])
        entry["top_logprobs"] = [_entry(decode, other, value) for other, value in ranked]
    return entry


def _entry(decode: Callable[[list[int]], str], token: int, value: float) -> dict[str, Any]:
    text = decode([token])
    # The bytes of half a character cannot be told from its text.
    known = _INCOMPLETE not in text
    return {
        "token": text,
        "logprob": max(value, _LEAST),
        "bytes": list(text.encode()) if known else None,
    }
