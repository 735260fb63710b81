"""How the next token is drawn: mlx-lm's samplers and logits processors, made of checked parameters.

Promises that the draws of a seeded request depend on its seed and on the place of the token in the answer alone, not
on what runs beside it nor on where the answer was taken up again; and that requests with the same parameters share
one sampler, which mlx-lm needs to draw for all of them at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving_router.mlx._request import Parameters

Sampler: TypeAlias = "Callable[[Any], Any]"

_MASK: Final = 2**64 - 1


def make_sampler(parameters: Parameters, first: int = 0) -> Sampler:
    """What draws the tokens of one answer from log probabilities, in order.

    Args:
        parameters: Of the request.
        first: The place of the first token that it is to draw.
    """
    if parameters.temperature == 0:
        return _shared(0.0, 1.0, 0.0, 0)  # the filters leave the most likely token, whatever they are set to
    how = (parameters.temperature, parameters.top_p, parameters.min_p, parameters.top_k)
    if parameters.seed is None:
        return _shared(*how)
    return _seeded(*how, seed=parameters.seed, first=first)


def make_processors(parameters: Parameters) -> list[Any]:
    """What changes the logits of one answer beforehand: biases and penalties."""
    from mlx_lm.sample_utils import make_logits_processors

    processors: list[Any] = make_logits_processors(
        logit_bias=dict(parameters.logit_bias) or None,
        repetition_penalty=parameters.repetition_penalty if parameters.repetition_penalty != 1 else None,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
    )
    return processors


@lru_cache(maxsize=256)
def _shared(temperature: float, top_p: float, min_p: float, top_k: int) -> Sampler:
    from mlx_lm import sample_utils

    sampler: Sampler = sample_utils.make_sampler(temp=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    return sampler


def _seeded(temperature: float, top_p: float, min_p: float, top_k: int, *, seed: int, first: int) -> Sampler:
    import mlx.core as mx
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    # The filters of mlx-lm's make_sampler, in its order; it has no place for a key.
    filters: list[Callable[[Any], Any]] = []
    if top_p < 1:
        filters.append(lambda logprobs: apply_top_p(logprobs, top_p))
    if min_p > 0:
        filters.append(lambda logprobs: apply_min_p(logprobs, min_p))
    if top_k > 0:
        filters.append(lambda logprobs: apply_top_k(logprobs, top_k))
    place = first

    def sampler(logprobs: Any) -> Any:
        nonlocal place
        key = mx.random.key(_scattered(_scattered(seed) + place))
        place += 1
        for each in filters:
            logprobs = each(logprobs)
        return mx.random.categorical(logprobs * (1 / temperature), key=key)

    return sampler


def _scattered(number: int) -> int:
    """A step of SplitMix64 (Steele, Lea and Flood 2014): near numbers give keys that have nothing in common."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
