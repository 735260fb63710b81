"""What MlxEngine keeps of prompts: the caches alone, and turns of conversations with the tiny model."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from enginejobs import FakeJob, Running, job

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("mlx_lm")

from mlx_serving_router._native import prefix_hashes
from mlx_serving_router.mlx._cache import PromptCaches

pytestmark = pytest.mark.model


class Layer:
    """A cache of mlx-lm's that remembers tokens alone."""

    def __init__(self, tokens: list[int], *, trimmable: bool = True, nbytes: int = 1) -> None:
        self.tokens = list(tokens)
        self.nbytes = nbytes
        self._trimmable = trimmable

    def is_trimmable(self) -> bool:
        return self._trimmable

    def trim(self, count: int) -> int:
        del self.tokens[len(self.tokens) - count :]
        return count


def keep(caches: PromptCaches, tokens: list[int], **options: Any) -> None:
    prefixes = options.pop("prefixes", ())
    caches.put("m", tokens, [Layer(tokens, **options), Layer(tokens, **options)], prefixes)


def held(caches: PromptCaches, tokens: list[int], model: str = "m") -> list[int]:
    """The tokens that a cache saves, which are what every layer holds."""
    cache, count = caches.take(model, tokens)
    if cache is None:
        assert count == 0
        return []
    assert all(layer.tokens == tokens[:count] for layer in cache)
    return tokens[:count]


# === the caches alone ===


def test_finds_the_longest_beginning_and_leaves_a_token_to_compute() -> None:
    caches = PromptCaches(100)
    keep(caches, [1, 2, 3, 4])
    assert held(caches, [1, 2, 3, 4, 5, 6]) == [1, 2, 3, 4]
    assert held(caches, [1, 2, 3, 4]) == [1, 2, 3], "the very same prompt"
    assert held(caches, [1, 2, 9, 9]) == [1, 2], "the rest is trimmed"
    assert held(caches, [1]) == []
    assert held(caches, [2, 2]) == []
    assert held(caches, [1, 2, 3, 4, 5], model="other") == []
    assert held(caches, [1, 2, 3, 4, 5]) == [1, 2, 3, 4], "what was taken was a copy"


def test_what_cannot_be_trimmed_is_used_as_a_whole() -> None:
    caches = PromptCaches(100)
    keep(caches, [1, 2], trimmable=False)
    keep(caches, [1, 2, 3, 4], trimmable=False)
    assert held(caches, [1, 2, 3, 9]) == [1, 2]
    assert held(caches, [1, 2, 3, 4]) == [1, 2], "the last token has to be computed"
    assert held(caches, [1, 2, 3, 4, 5]) == [1, 2, 3, 4]
    assert held(caches, [1, 9]) == []


def test_a_longer_one_takes_the_place_of_its_beginnings() -> None:
    caches = PromptCaches(100)
    for tokens in ([1], [1, 2], [2], [1, 2, 3], [1, 2]):
        keep(caches, tokens)
    assert (len(caches), caches.nbytes) == (2, 4)


def test_the_one_used_longest_ago_makes_room() -> None:
    caches = PromptCaches(6)
    for first in (1, 2, 3):
        keep(caches, [first, 0])
    assert held(caches, [1, 0, 0]) == [1, 0]
    keep(caches, [4, 0])
    assert [held(caches, [first, 0, 0]) != [] for first in (1, 2, 3, 4)] == [True, False, True, True]
    keep(caches, [5, 0], nbytes=100)
    assert caches.nbytes == 6, "one that is too large for all of the room drives nothing out"
    caches.shrink(2)
    assert (len(caches), caches.nbytes) == (1, 2)


def test_finds_what_comparing_with_all_of_them_finds() -> None:
    draw = random.Random(3)
    for trimmable in (True, False):
        caches = PromptCaches(10_000)
        kept: list[list[int]] = []
        for _ in range(300):
            tokens = [draw.choice([0, 1, 255, 256, 70_000]) for _ in range(draw.randint(1, 7))]
            best = 0
            for other in kept:
                common = next(
                    (at for at, (a, b) in enumerate(zip(other, tokens, strict=False)) if a != b),
                    min(len(other), len(tokens)),
                )
                if trimmable:
                    best = max(best, min(common, len(tokens) - 1))
                elif common == len(other) < len(tokens):
                    best = max(best, common)
            assert len(held(caches, tokens)) == best
            keep(caches, tokens, trimmable=trimmable)
            kept.append(tokens)


def test_tells_the_longest_prefix_of_each_first() -> None:
    caches = PromptCaches(100)
    keep(caches, [1, 0], prefixes=["a1", "a2", "a3"])
    keep(caches, [2, 0], prefixes=["b1"])
    keep(caches, [3, 0])
    keep(caches, [4, 0], prefixes=["a1", "c2"])
    version = caches.version
    assert caches.prefixes(256) == ["c2", "b1", "a3", "a1", "a2"]
    assert caches.prefixes(2) == ["c2", "b1"]
    assert caches.version == version
    held(caches, [1, 0, 0])
    assert caches.version > version
    assert caches.prefixes(3) == ["a3", "c2", "b1"]
    caches.shrink(0)
    assert caches.prefixes(256) == []


# === the engine's ===


@pytest.fixture
def engine() -> Iterator[Running]:
    running = Running.tiny()
    yield running
    running.stop()


def talk(engine: Running, *questions: str) -> list[FakeJob]:
    messages: list[dict[str, Any]] = []
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answers.append(engine.ask(messages=list(messages)))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


def test_the_next_turn_computes_only_what_is_new(engine: Running) -> None:
    first, second, third = talk(engine, "My name is Clara.", "What color is the sky?", "What is my name?")
    assert first.end.cached_tokens == 0
    # The answer's tokens and the one that ended it are held, too.
    assert second.end.cached_tokens == first.end.prompt_tokens + first.end.completion_tokens + 1
    assert third.end.cached_tokens == second.end.prompt_tokens + second.end.completion_tokens + 1
    assert third.text == "Your name is Clara."


def test_the_same_prompt_again_computes_one_token(engine: Running) -> None:
    answers = [engine.ask("Count to ten.") for _ in range(3)]
    assert len({tuple(answered.token_ids) for answered in answers}) == 1
    assert [answered.end.cached_tokens for answered in answers] == [
        0,
        *[answers[0].end.prompt_tokens - 1] * 2,
    ]


def test_a_prompt_that_is_all_of_a_cache_works(engine: Running) -> None:
    """The key of a cache is a prompt and its answer: here the next prompt is just that."""
    whole = engine.ask("Count to ten.", max_tokens=20)
    cut = engine.ask("Count to ten.", max_tokens=8)
    resume = {"tokenIds": cut.token_ids, "text": cut.text}
    rest = engine.ask("Count to ten.", max_tokens=20, resume=resume)
    assert cut.token_ids + rest.token_ids == whole.token_ids
    assert rest.end.cached_tokens == rest.end.prompt_tokens


def test_what_begins_in_the_same_way_shares_the_beginning(engine: Running) -> None:
    system = {"role": "system", "content": "You answer in one short sentence. " * 10}
    asked = [
        engine.ask(messages=[system, {"role": "user", "content": question}])
        for question in ("What do bees make?", "Who wrote Hamlet?")
    ]
    assert asked[1].end.cached_tokens > 50
    fresh = Running.tiny()
    assert (
        asked[1].text == fresh.ask(messages=[system, {"role": "user", "content": "Who wrote Hamlet?"}]).text
    )
    fresh.stop()


def test_two_turns_at_a_time_share_a_cache_and_do_not_meet(engine: Running) -> None:
    (first,) = talk(engine, "My name is Clara.")
    history = [{"role": "user", "content": "My name is Clara."}, {"role": "assistant", "content": first.text}]
    questions = ["What is my name?", "What do bees make?", "What is my name?", "Count to ten."]
    answers = engine.ask_all(
        job(messages=[*history, {"role": "user", "content": question}]) for question in questions
    )
    assert [answered.text for answered in answers] == [
        "Your name is Clara.",
        "Bees make honey.",
        "Your name is Clara.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10.",
    ]
    assert all(answered.end.cached_tokens > 10 for answered in answers)


def test_what_was_computed_for_a_cancelled_answer_is_kept(engine: Running) -> None:
    def cancel(one: FakeJob) -> None:
        one.cancelled = len(one.pieces) == 30

    cut = engine.ask("Tell me a story.", on_token=cancel)
    resume = {"tokenIds": cut.token_ids, "text": cut.text}
    rest = engine.ask("Tell me a story.", resume=resume, max_tokens=40)
    assert rest.end.cached_tokens == rest.end.prompt_tokens
    assert len(rest.token_ids) == 10


def test_a_stop_string_keeps_the_cache(engine: Running) -> None:
    first = engine.ask("Count to ten.", stop=["5"])
    assert first.text == "1, 2, 3, 4, "
    assert engine.ask("Count to ten.").end.cached_tokens == first.end.prompt_tokens - 1


def test_caches_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PromptCaches] = []

    class Watched(PromptCaches):
        most = kept = 0

        def __init__(self, limit: int) -> None:
            super().__init__(limit)
            made.append(self)

        def put(self, *args: Any) -> None:
            super().put(*args)
            self.most = max(self.most, self.nbytes)
            self.kept = len(self)

    from mlx_serving_router.mlx import _service

    monkeypatch.setattr(_service, "PromptCaches", Watched)
    limit = 300_000
    engine = Running.tiny(prompt_cache_bytes=limit)
    for number in range(20):
        engine.ask(f"Who is number {number}?", max_tokens=4)
    nothing = Running.tiny(prompt_cache_bytes=0)
    again = [nothing.ask("Hello") for _ in range(2)]
    engine.stop()
    nothing.stop()
    assert limit // 2 < made[0].most <= limit
    assert 1 < made[0].kept < 20
    assert [one.end.cached_tokens for one in again] == [0, 0]


def test_a_kept_cache_does_not_hold_on_to_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    longer_than_its_tokens: list[int] = []

    class Watched(PromptCaches):
        def put(self, model: str, tokens: Any, cache: list[Any], *rest: Any) -> None:
            longer_than_its_tokens.extend(each.keys.shape[2] - len(tokens) for each in cache)
            super().put(model, tokens, cache, *rest)

    from mlx_serving_router.mlx import _service

    monkeypatch.setattr(_service, "PromptCaches", Watched)
    engine = Running.tiny()
    engine.ask_all(job("Tell me a story.", max_tokens=number) for number in (5, 50, 100))
    engine.stop()
    assert longer_than_its_tokens == [0] * 6


def test_heartbeats_may_tell_what_is_held(engine: Running) -> None:
    system = {
        "role": "system",
        "content": "You answer in one short sentence, and say so when you do not know. " * 6,
    }
    first = engine.ask(messages=[system, {"role": "user", "content": "What do bees make?"}])
    told = engine.jobs.cached_prefixes
    turn = [
        system,
        {"role": "user", "content": "What do bees make?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Who wrote Hamlet?"},
    ]
    of_next_turn = prefix_hashes("tiny", messages=turn)
    assert of_next_turn[0] in told
    assert told == prefix_hashes("tiny", messages=turn[:3])[::-1]
    for number in range(5):
        engine.ask(prompt=f"{number} " * 300, max_tokens=2)
    assert len(engine.jobs.cached_prefixes) > len(told)
    assert set(told) <= set(engine.jobs.cached_prefixes)
    engine.jobs.cached_prefixes.clear()
    engine.ask(messages=[], model_id="tiny")
    assert engine.jobs.cached_prefixes == [], "nothing has changed, nothing is told"
