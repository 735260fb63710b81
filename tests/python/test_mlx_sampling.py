"""How MlxEngine draws tokens: keys, shares and sharing. Needs mlx, and no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from mlx_serving_router.mlx._sampling import make_sampler

pytestmark = pytest.mark.model

SHARES = [0.5, 0.3, 0.15, 0.05]


def parameters(**fields: Any) -> Any:
    plain = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "seed": 5}
    return SimpleNamespace(**plain | fields)


def drawn(count: int, first: int = 0, **fields: Any) -> list[int]:
    sampler = make_sampler(parameters(**fields), first)
    logprobs = mx.log(mx.array([SHARES]))
    return [int(sampler(logprobs).item()) for _ in range(count)]


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({}, SHARES),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),  # their squares, scaled
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.9}, [0.526, 0.316, 0.158, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0, 0]),
    ],
    ids=str,
)
def test_seeded_draws_have_the_shares_that_they_should(fields: dict[str, Any], shares: list[float]) -> None:
    tokens = drawn(2000, **fields)
    for token, share in enumerate(shares):
        # Four standard deviations, of draws that are the same in every run.
        assert abs(tokens.count(token) / 2000 - share) <= 4 * (share * (1 - share) / 2000) ** 0.5 + 0.001


def test_a_draw_depends_on_the_seed_and_its_place_alone() -> None:
    tokens = drawn(200)
    mx.random.seed(99)
    assert drawn(200) == tokens
    assert all(drawn(3, first=place) == tokens[place : place + 3] for place in range(0, 190, 17))
    assert drawn(200, seed=6) != tokens
    assert drawn(200, seed=2**64 - 1) != tokens


def test_requests_with_the_same_parameters_share_a_sampler() -> None:
    first, second = (make_sampler(parameters(seed=None, top_k=7)) for _ in range(2))
    assert first is second
    assert first is not make_sampler(parameters(seed=None, top_k=8))
    assert make_sampler(parameters(temperature=0.0)) is make_sampler(
        parameters(temperature=0.0, seed=None, top_p=0.5, top_k=3, min_p=0.1)
    )
    assert make_sampler(parameters()) is not make_sampler(parameters())
