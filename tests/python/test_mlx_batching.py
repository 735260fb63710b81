"""MlxEngine with the tiny model: many requests at a time, which join, leave, fail and are cancelled."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import pytest

from enginejobs import FakeJob, Running, Steps, break_at, job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.model

QUESTIONS = [
    "Hello",
    "Who are you?",
    "What is the capital of France?",
    "What is two plus two?",
    "What color is the sky?",
    "Who wrote Hamlet?",
    "At what temperature does water boil?",
    "What do bees make?",
    "How many days are in a week?",
    "Count to ten.",
    "Show me some Unicode.",
    "Tell me a story.",
]
LONG = " ".join(f"The cat number {number} sat on the mat." for number in range(60))


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(max_concurrent=8, prompt_cache_bytes=0)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def alone(engine: Running) -> dict[str, FakeJob]:
    """What each question is answered when nothing runs beside it."""
    return {question: engine.ask(question) for question in QUESTIONS}


# === the same answers, alone and beside others ===


def test_answers_beside_others_as_it_does_alone(engine: Running, alone: dict[str, FakeJob]) -> None:
    together = engine.ask_all(job(question) for question in QUESTIONS * 2)  # more than run at a time
    for question, answered in zip(QUESTIONS * 2, together, strict=True):
        assert answered.text == alone[question].text
        assert answered.token_ids == alone[question].token_ids
        assert vars(answered.end) == vars(alone[question].end)


def test_really_answers_several_at_a_time(engine: Running) -> None:
    running: set[str] = set()
    most = 0

    def count(one: FakeJob) -> None:
        nonlocal most
        running.add(one.request.request_id)
        most = max(most, len(running))
        if len(one.pieces) == 40:
            running.discard(one.request.request_id)

    engine.ask_all(
        job("Tell me a story.", request_id=str(number), max_tokens=40, on_token=count) for number in range(12)
    )
    assert most == 8


def test_a_seed_gives_the_same_answer_alone_and_beside_others(engine: Running) -> None:
    sampled: list[dict[str, Any]] = [
        {"temperature": 4.0, "seed": 1},
        {"temperature": 4.0, "seed": 2},
        {"temperature": 4.0, "seed": -1, "top_p": 0.999},
        {"temperature": 3.0, "seed": 3, "top_k": 50, "min_p": 0.01},
        {"temperature": 4.0, "seed": 2**63, "frequency_penalty": 1.0, "logit_bias": {"300": 3.0}},
    ]
    unseeded: list[dict[str, Any]] = [{}, {"temperature": 1.5}, {"temperature": 1.5}]

    def ask(fields: dict[str, Any]) -> FakeJob:
        return job("Tell me a story.", max_tokens=60, **fields)

    lonely = [engine.ask_all([ask(fields)])[0] for fields in sampled]
    beside = engine.ask_all(ask(fields) for fields in [*unseeded, *sampled, *unseeded])[3:-3]
    assert [one.token_ids for one in beside] == [one.token_ids for one in lonely]
    assert len({tuple(one.token_ids) for one in lonely}) == len(sampled)


def test_requests_without_a_seed_differ(engine: Running) -> None:
    answers = engine.ask_all(job("Tell me a story.", temperature=2.0, max_tokens=30) for _ in range(6))
    assert len({answered.text for answered in answers}) == 6


# === joining and leaving ===


def test_joins_and_leaves_in_mid_stream(engine: Running, alone: dict[str, FakeJob]) -> None:
    order: list[str] = []
    late: list[FakeJob] = []

    def note(one: FakeJob) -> None:
        order.append(one.request.request_id)
        if one.request.request_id == "story" and len(one.pieces) in (5, 30, 60):
            late.append(job(QUESTIONS[len(late)], request_id="late", on_token=note))
            engine.jobs.put(late[-1])

    story = job("Tell me a story.", request_id="story", on_token=note)
    engine.ask_all([story])
    assert story.text == alone["Tell me a story."].text
    assert [one.text for one in late] == [alone[question].text for question in QUESTIONS[:3]]
    assert order[-1] == "story", "they joined it, and left before its end"


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(prefill_step_size=16, prompt_cache_bytes=0)
    order: list[str] = []

    def note(one: FakeJob) -> None:
        order.append(one.request.request_id)
        if order == ["story"] * 5:
            running.jobs.put(job(prompt=LONG, request_id="long", max_tokens=3, on_token=note))

    running.ask("Tell me a story.", request_id="story", on_token=note)
    tokens = running.ask(prompt=LONG, max_tokens=1).end.prompt_tokens
    running.stop()
    beside = order.index("long") - 5
    assert beside >= tokens // 16 > 20, "a token for each piece of the prompt"


def test_prompts_share_the_prefill_step() -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(prefill_step_size=32, prompt_cache_bytes=0)
    tokens = running.ask(prompt=LONG, max_tokens=1).end.prompt_tokens
    written, begun = 0, []
    long = [job(prompt=LONG, max_tokens=1, on_token=lambda _: begun.append(written)) for _ in range(4)]

    def note(_: FakeJob) -> None:
        nonlocal written
        written += 1
        if written == 5:
            running.jobs.put(*long)

    running.ask("Tell me a story.", on_token=note)
    running.stop()
    assert min(begun) - 5 >= tokens // 8, "each of four prompts gets a quarter of the step"


# === cancellation ===


class LookedAt(FakeJob):
    """Cancelled when the engine looks for the so-manieth time; notes the step of each look."""

    look: float = 3
    steps: Steps | None = None
    looked = 0
    at: tuple[int, ...] = ()

    @property  # type: ignore[override]
    def cancelled(self) -> bool:
        self.looked += 1
        if self.steps is not None:
            self.at += (self.steps.count,)
        return self.looked >= self.look

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        pass


@pytest.mark.parametrize(
    ("where", "asked", "look"),
    [
        ("queue", {"prompt": LONG}, 1),
        ("prefill", {"prompt": LONG}, 4),
        ("decode", {"prompt": "Once upon a time"}, 12),
    ],
    ids=["queue", "prefill", "decode"],
)
def test_a_cancelled_request_frees_its_place_within_two_steps_and_leaves_what_was_computed(
    monkeypatch: pytest.MonkeyPatch, where: str, asked: dict[str, Any], look: int
) -> None:
    pytest.importorskip("mlx_lm")
    steps = Steps(monkeypatch)
    running = Running.tiny(max_concurrent=1, prefill_step_size=16)
    first, second = LookedAt(job(**asked).request), LookedAt(job("Hello").request)
    first.look, second.look = look, float("inf")
    first.steps = second.steps = steps
    running.ask_all([first, second])
    assert (len(first.at), first.end) == (look, None)
    assert (first.pieces != []) == (where == "decode")
    assert second.at[0] - first.at[-1] <= 2
    assert second.text == "Hello! How can I help you?"
    again = running.ask(**asked, max_tokens=1).end
    running.stop()
    everything = again.prompt_tokens - 1  # the last token is always computed
    assert again.cached_tokens == {"queue": 0, "prefill": 16 * (look - 1), "decode": everything}[where]


@pytest.mark.parametrize("look", [1, 2, 3, 9])
def test_cancelling_ends_a_long_prompt(look: int) -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(prefill_step_size=16)
    one = LookedAt(job(prompt=LONG).request)
    one.look = look
    running.ask_all([one])
    assert (one.looked, one.pieces, one.end) == (look, [], None)
    assert running.ask("What do bees make?").text == "Bees make honey."
    # What was computed is kept: a piece before each look but the first.
    assert running.ask(prompt=LONG, max_tokens=1).end.cached_tokens == 16 * (look - 1)
    running.stop()


def test_cancelling_what_waits_for_its_prompt_harms_nobody() -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(prefill_step_size=64, max_concurrent=16, prompt_cache_bytes=0)
    jobs = [job(prompt=f"{number} {LONG}", max_tokens=5) for number in range(16)]
    # More than are computed side by side, so that the last ones wait in mlx-lm's own queue.
    for one in jobs[10:]:
        one.__class__ = LookedAt
    running.ask_all(jobs)
    lonely = [running.ask(prompt=f"{number} {LONG}", max_tokens=5).token_ids for number in range(10)]
    running.stop()
    assert [one.token_ids for one in jobs[:10]] == lonely
    assert all((one.pieces, one.end) == ([], None) for one in jobs[10:])


def test_any_mixture_of_cancellations_leaves_the_others_as_they_are(
    engine: Running, alone: dict[str, FakeJob]
) -> None:
    draw = random.Random(5)

    def cancel_at(place: int) -> Callable[[FakeJob], None]:
        def look(one: FakeJob) -> None:
            one.cancelled = one.cancelled or len(one.pieces) == place

        return look

    asked = []
    for question in draw.choices(QUESTIONS, k=80):
        one = job(question, on_token=cancel_at(draw.choice([0, 0, 1, 2, 5, 20])))
        one.cancelled = draw.random() < 0.1
        asked.append(one)
    engine.ask_all(asked)
    for one in asked:
        whole = alone[one.request.messages[0]["content"]]
        assert whole.text.startswith(one.text)
        if not one.cancelled:
            assert one.token_ids == whole.token_ids
            assert one.end.code is None


# === failure ===


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_p": 2.0},
        {"min_p": 1.5},
        {"repetition_penalty": -1.0},
        {"logit_bias": {"850": 1.0}},
        {"resume": {"tokenIds": [5000], "text": ""}},
        {"messages": None, "prompt": "cat" * 20000},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_a_bad_request_leaves_the_others_tokens_untouched(
    engine: Running, alone: dict[str, FakeJob], bad: dict[str, Any]
) -> None:
    refused: list[FakeJob] = []

    def interrupt(one: FakeJob) -> None:
        if len(one.pieces) == 4:
            refused.append(job(**{"messages": [{"role": "user", "content": "Hello"}], **bad}))
            engine.jobs.put(refused[-1])

    count = engine.ask("Count to ten.", on_token=interrupt)
    assert count.token_ids == alone["Count to ten."].token_ids
    assert [(one.end.code, one.pieces) for one in refused] == [("REQUEST_VALIDATION_FAILED", [])]


def test_a_request_that_breaks_leaves_the_others_as_they_are(
    engine: Running, alone: dict[str, FakeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, "broken", 3)
    good = [job(question) for question in QUESTIONS[-4:]]
    bad = [job("Tell me a story.", request_id="broken") for _ in range(2)]
    engine.ask_all([good[0], bad[0], *good[1:3], bad[1], good[3]])
    assert [one.text for one in good] == [alone[question].text for question in QUESTIONS[-4:]]
    assert [one.end.code for one in bad] == ["WORKER_UNAVAILABLE"] * 2


def test_a_batch_that_breaks_ends_its_requests_and_is_built_anew(
    monkeypatch: pytest.MonkeyPatch, engine: Running, alone: dict[str, FakeJob]
) -> None:
    from mlx_serving_router.mlx import _batch

    def breaking(parameters: Any, first: int = 0) -> Any:
        draws = itertools.count()
        sampler = made(parameters, first)

        def sample(logprobs: Any) -> Any:
            if parameters.seed == 666 and next(draws) == 3:
                raise RuntimeError("out of memory")
            return sampler(logprobs)

        return sample

    made = _batch.make_sampler
    monkeypatch.setattr(_batch, "make_sampler", breaking)
    after = job("Hello")

    def note(one: FakeJob) -> None:
        if len(one.pieces) == 1:
            engine.jobs.put(after)

    first, second = engine.ask_all(
        [job("Count to ten.", on_token=note), job("Count to ten.", temperature=1.0, seed=666)]
    )
    assert (first.end.code, second.end.code) == ("WORKER_UNAVAILABLE", "WORKER_UNAVAILABLE")
    assert after.end.code == "WORKER_UNAVAILABLE" or after.text == alone["Hello"].text
    assert alone["Count to ten."].text.startswith(first.text)
    monkeypatch.undo()
    assert engine.ask("Count to ten.").text == alone["Count to ten."].text


def test_the_wired_limit_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple silicon, where mlx-lm's generators set it as well and put back what they found."""
    import sys

    import mlx.core as mx
    import mlx_lm.utils

    from mlx_serving_router.mlx import _batch

    limits = [100]

    def change(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    def raised() -> int:
        return change(5000)

    def broken(*_: Any) -> Any:
        return lambda _: mx.array(["no token"])

    monkeypatch.setattr(mx, "set_wired_limit", change)
    monkeypatch.setattr(mlx_lm.utils, "maybe_set_recommended_wired_limit", raised)
    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "maybe_set_recommended_wired_limit", raised)
    running = Running.tiny()
    running.ask("Hello")
    with monkeypatch.context() as patch:
        patch.setattr(_batch, "make_sampler", broken)
        assert running.ask("Hello").end.code == "WORKER_UNAVAILABLE"
    assert limits[-1] == 5000, "the engine goes on"
    running.ask("Hello")
    running.stop()
    assert limits[-1] == 100


@pytest.mark.slow
def test_memory_is_flat_while_requests_come_and_go() -> None:
    pytest.importorskip("mlx_lm")
    import mlx.core as mx

    running = Running.tiny(prompt_cache_bytes=2_000_000)
    draw = random.Random(11)
    used = []

    def cancel_at(place: int) -> Callable[[FakeJob], None]:
        def look(one: FakeJob) -> None:
            one.cancelled = one.cancelled or len(one.pieces) == place

        return look

    for batch in range(8):
        running.ask_all(
            job(
                draw.choice(QUESTIONS),
                max_tokens=20,
                temperature=draw.choice([None, 2.0]),
                seed=draw.choice([None, 1]),
                on_token=cancel_at(draw.randint(1, 40)),
                session_id=str(batch),
            )
            for _ in range(60)
        )
        used.append(mx.get_active_memory())
    running.stop()
    assert max(used[4:]) - max(used[:4]) < 500_000


# === the end ===


def test_a_closed_queue_lets_answers_finish_and_ends_the_engine() -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny()

    def close(one: FakeJob) -> None:
        if len(one.pieces) == 3:
            running.jobs.close()

    count = job("Count to ten.", on_token=close)
    running.jobs.put(count)
    running.ended()
    assert count.text == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."


def test_a_worker_that_is_told_to_end_at_once_waits_for_no_answer() -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny()

    def end(one: FakeJob) -> None:
        if len(one.pieces) == 3:
            one.cancelled = True
            running.jobs.close()

    story = job("Tell me a story.", on_token=end)
    running.jobs.put(story)
    running.ended()
    assert (len(story.pieces), story.end) == (3, None)


# === several models ===


def test_answers_of_several_models_go_on_side_by_side() -> None:
    pytest.importorskip("mlx_lm")
    from enginejobs import MODEL, PATIENCE
    from mlx_serving_router.mlx import MlxEngine

    running = Running(MlxEngine({"first": MODEL, "second": MODEL}, max_concurrent=4))
    assert running.jobs.ready.wait(PATIENCE)
    order: list[str] = []
    stories = running.ask_all(
        job(
            "Tell me a story.",
            model_id=name,
            max_tokens=30,
            on_token=lambda one: order.append(one.request.model_id),
        )
        for name in ("first", "second")
    )
    running.stop()
    assert stories[0].text == stories[1].text
    assert order == ["first", "second"] * 30
