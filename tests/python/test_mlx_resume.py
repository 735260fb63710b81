"""MlxEngine with the tiny model: an answer that was begun elsewhere is continued as if nothing had happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from enginejobs import FakeJob, Running, job

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.model

STORY: dict[str, Any] = {"question": "Tell me a story.", "max_tokens": 50}
SAMPLED: dict[str, Any] = {"temperature": 4.0, "top_k": 300, "seed": 11}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": STORY,
    "seeded": STORY | SAMPLED,
    "penalties": SAMPLED | {"question": "Count to ten.", "max_tokens": 40, "frequency_penalty": 1.5},
    "to its end": {"question": "How many days are in a week?"},
    "characters of several tokens": {"question": "Show me some Unicode."},
    "a stop string": STORY | {"stop": ["upon a time there were", "a grey cat"]},
    "a plain prompt": {"prompt": "The capital of France", "max_tokens": 20},
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(max_concurrent=8)
    yield running
    running.stop()


@pytest.mark.parametrize("name", ASKED)
def test_a_resumed_answer_is_the_undisturbed_one(engine: Running, name: str) -> None:
    whole = engine.ask(**ASKED[name])
    assert len(whole.pieces) > 3
    resumed = []
    for place in range(len(whole.pieces) + 1):
        text = "".join(piece for piece, _ in whole.pieces[:place])
        ids = [token for _, piece in whole.pieces[:place] for token in piece]
        resumed.append((text, ids, job(**ASKED[name], resume={"tokenIds": ids, "text": text})))
    engine.ask_all(each for _, _, each in resumed)
    for text, ids, rest in resumed:
        assert text + rest.text == whole.text
        assert ids + rest.token_ids == whole.token_ids
        assert rest.end.finish_reason == whole.end.finish_reason
        assert rest.end.prompt_tokens == whole.end.prompt_tokens
        assert rest.end.completion_tokens == len(rest.token_ids)


@pytest.mark.parametrize("name", ["characters of several tokens", "a stop string"])
def test_every_token_is_a_place_to_resume_at(engine: Running, name: str) -> None:
    """Also in the midst of a character, or of what may become a stop string: another engine delivers otherwise."""
    whole = engine.ask(**ASKED[name])
    ids = whole.token_ids
    shown = [text for text, piece in whole.pieces for text in [*[""] * (len(piece) - 1), text]]
    for place in range(len(ids) + 1):
        before = "".join(shown[:place])
        rest = engine.ask(**ASKED[name], resume={"tokenIds": ids[:place], "text": before})
        assert before + rest.text == whole.text
        assert ids[:place] + rest.token_ids == ids


def test_text_that_was_shown_early_is_not_shown_again(engine: Running) -> None:
    """An engine that holds nothing back for stop strings has shown more."""
    whole = engine.ask("What is the capital of France?")
    ids = whole.token_ids[:5]
    shown = "".join(text for text, _ in whole.pieces[:5])
    held = {"question": "What is the capital of France?", "stop": [shown[-6:] + "?"]}
    rest = engine.ask(**held, resume={"tokenIds": ids, "text": shown})
    assert shown + rest.text == whole.text


def test_what_was_at_its_end_ends_at_once(engine: Running) -> None:
    whole = engine.ask("Count to ten.", max_tokens=10)
    resume = {"tokenIds": whole.token_ids, "text": whole.text}
    at_limit = engine.ask("Count to ten.", max_tokens=10, resume=resume)
    assert (at_limit.end.finish_reason, at_limit.end.completion_tokens, at_limit.pieces) == ("length", 0, [])
    stopped = engine.ask("Count to ten.", stop=["3"], resume=resume)
    assert (stopped.end.finish_reason, stopped.end.completion_tokens, stopped.pieces) == ("stop", 0, [])


@pytest.mark.parametrize(
    "resume",
    [
        {"tokenIds": [850], "text": ""},
        {"tokenIds": [300, 301], "text": "something else altogether"},
        {"tokenIds": "300", "text": ""},
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(engine: Running, resume: dict[str, Any]) -> None:
    refused = engine.ask("Count to ten.", resume=resume)
    assert (refused.end.code, refused.pieces) == ("REQUEST_VALIDATION_FAILED", [])


def test_an_empty_resume_is_a_beginning(engine: Running) -> None:
    asked: list[FakeJob] = [
        engine.ask("Hello"),
        engine.ask("Hello", resume={"tokenIds": [], "text": ""}),
    ]
    assert asked[0].token_ids == asked[1].token_ids
