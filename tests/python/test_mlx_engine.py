"""MlxEngine with the tiny model: one request at a time."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from enginejobs import MODEL, FakeJob, Running, break_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    pytest.importorskip("mlx_lm")
    running = Running.tiny()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def story(engine: Running) -> FakeJob:
    return engine.ask("Tell me a story.")


# === answers ===


@pytest.mark.model
def test_answers_a_question_and_counts_its_tokens(engine: Running) -> None:
    job = engine.ask("What is the capital of France?")
    assert job.text == "The capital of France is Paris."
    assert (job.end.code, job.end.finish_reason) == (None, "stop")
    assert job.end.completion_tokens == len(job.token_ids) > 1
    longer = engine.ask("What is the capital of France? What is the capital of France?", max_tokens=1)
    assert longer.end.prompt_tokens > job.end.prompt_tokens > 5


@pytest.mark.model
def test_streams_a_long_answer_piece_by_piece(story: FakeJob) -> None:
    assert len(story.token_ids) > 150
    assert len(story.pieces) > 150
    assert story.text.startswith("Once upon a time")
    assert story.end.finish_reason == "stop"


@pytest.mark.model
def test_reads_the_whole_conversation(engine: Running) -> None:
    messages: list[dict[str, Any]] = []
    for question in ("My name is Clara.", "What color is the sky?", "What is my name?"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": engine.ask(messages=list(messages)).text})
    assert messages[-1]["content"] == "Your name is Clara."


@pytest.mark.model
def test_continues_a_plain_prompt_with_its_leading_space(engine: Running) -> None:
    assert engine.ask(prompt="The capital of France", max_tokens=12).text.startswith(" is Paris.")


@pytest.mark.model
def test_reads_contents_in_parts(engine: Running) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    job = engine.ask(messages=[{"role": "user", "content": parts}])
    assert job.text == "The capital of France is Paris."


@pytest.mark.model
def test_hands_tools_to_the_chat_template(engine: Running) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    without = engine.ask("Hello", max_tokens=1)
    assert engine.ask("Hello", max_tokens=1, tools=tools).end.prompt_tokens > without.end.prompt_tokens
    refused = engine.ask("Hello", max_tokens=1, tools=tools, tool_choice="none")
    assert refused.end.prompt_tokens == without.end.prompt_tokens


@pytest.mark.model
def test_never_shows_part_of_a_character(engine: Running) -> None:
    job = engine.ask("Show me some Unicode.")
    assert job.text == "Grüße: 日本 🙂🚀 ok."
    assert all("\N{REPLACEMENT CHARACTER}" not in text for text, _ in job.pieces)
    assert any(len(ids) > 2 for _, ids in job.pieces), "a character of several tokens comes with all of them"
    assert job.end.completion_tokens == len(job.token_ids)


@pytest.mark.model
def test_drops_a_character_that_the_limit_cuts(engine: Running) -> None:
    whole = engine.ask("Show me some Unicode.")
    for limit in range(1, len(whole.token_ids)):
        cut = engine.ask("Show me some Unicode.", max_tokens=limit)
        assert whole.text.startswith(cut.text)
        assert cut.token_ids == whole.token_ids[:limit]
        assert cut.end.finish_reason == "length"


# === limits and stop strings ===


@pytest.mark.model
def test_max_tokens_ends_with_length(engine: Running, story: FakeJob) -> None:
    job = engine.ask("Tell me a story.", max_tokens=10)
    assert job.token_ids == story.token_ids[:10]
    assert (job.end.finish_reason, job.end.completion_tokens) == ("length", 10)


@pytest.mark.model
@pytest.mark.parametrize(
    "stop", [["house stood"], ["stood on a", "e stood"], ["t", "house"], ["o", "ld light"]]
)
def test_stops_before_a_stop_string_wherever_tokens_end(
    engine: Running, story: FakeJob, stop: list[str]
) -> None:
    job = engine.ask("Tell me a story.", stop=stop)
    end = min((story.text.find(text) + len(text), story.text.find(text)) for text in stop)[1]
    assert job.text == story.text[:end]
    assert job.end.finish_reason == "stop"
    assert job.end.completion_tokens == len(job.token_ids)


@pytest.mark.model
def test_releases_what_only_began_like_a_stop_string(engine: Running) -> None:
    job = engine.ask("What is the capital of France?", stop=["Paris. And", "France was"])
    assert job.text == "The capital of France is Paris."
    assert job.end.completion_tokens == len(job.token_ids)


@pytest.mark.model
def test_the_context_length_bounds_prompt_and_answer(engine: Running) -> None:
    context = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    job = engine.ask(prompt="cat" * 10 * context)
    assert job.end.code == "REQUEST_VALIDATION_FAILED"
    tokens_of_a_word = engine.ask(prompt=" cat" * 10, max_tokens=1).end.prompt_tokens // 10
    nearly = engine.ask(
        prompt=" cat" * (context // tokens_of_a_word - 3), max_tokens=100, logit_bias={"5": 100}
    )
    assert nearly.end.finish_reason == "length"
    assert nearly.end.prompt_tokens + nearly.end.completion_tokens == context


# === sampling ===


@pytest.mark.model
def test_a_seed_makes_sampling_repeatable(engine: Running) -> None:
    def sample(seed: int | None) -> list[int]:
        job = engine.ask("Tell me a story.", temperature=4.0, top_k=200, min_p=1e-9, seed=seed, max_tokens=40)
        assert job.end.code is None
        return job.token_ids

    assert sample(7) == sample(7)
    assert len({tuple(sample(seed)) for seed in (1, 2, 3, -4, None, None)}) == 6


@pytest.mark.model
def test_biases_and_penalties_change_the_answer(engine: Running) -> None:
    plain = engine.ask("Count to ten.", max_tokens=12)
    comma = plain.token_ids[1]
    assert (
        engine.ask("Count to ten.", max_tokens=12, logit_bias={str(comma): -100.0}).token_ids
        != plain.token_ids
    )
    for name, value in (("repetition_penalty", 40.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        job = engine.ask("Count to ten.", max_tokens=12, **{name: value})
        assert job.end.code is None, name
    assert engine.ask("Count to ten.", max_tokens=12, repetition_penalty=40.0).token_ids != plain.token_ids


@pytest.mark.model
@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_no_temperature_is_greedy(engine: Running, temperature: float) -> None:
    job = engine.ask("What is the capital of France?", temperature=temperature)
    assert job.text == "The capital of France is Paris."


@pytest.mark.model
@pytest.mark.parametrize(
    "asked",
    [
        {"question": "What is the capital of France?"},
        {"question": "Show me some Unicode."},
        {"question": "Tell me a story.", "stop": ["stood"]},
        {"question": "Count to ten.", "temperature": 2.0, "seed": 4},
        {"prompt": "The capital of France", "max_tokens": 10},
    ],
    ids=str,
)
def test_reports_log_probabilities_of_every_token(engine: Running, asked: dict[str, Any]) -> None:
    job = engine.ask(**asked, logprobs=3)
    assert job.token_ids == engine.ask(**asked).token_ids
    assert len(job.logprobs) == len(job.token_ids)
    for entry in job.logprobs:
        values = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry["logprob"] <= values[0] <= 0
        if "temperature" not in asked:
            assert entry["token"] == entry["top_logprobs"][0]["token"]
        if entry["bytes"] is not None:
            assert bytes(entry["bytes"]).decode() == entry["token"]
    assert engine.ask(**asked, logprobs=0).logprobs[0] == job.logprobs[0] | {"top_logprobs": []}
    assert engine.ask(**asked).logprobs == []


# === failure and cancellation ===


@pytest.mark.model
def test_cancelling_ends_within_a_token(engine: Running) -> None:
    def cancel_after_five(job: FakeJob) -> None:
        job.cancelled = len(job.pieces) >= 5

    job = engine.ask("Tell me a story.", on_token=cancel_after_five)
    assert len(job.pieces) == 5
    assert job.end is None, "the runtime answers a cancelled job, the engine lets go of it"
    assert engine.ask("What is two plus two?").text == "Two plus two is four."


@pytest.mark.model
def test_an_unknown_model_is_refused(engine: Running) -> None:
    assert engine.ask("Hello", model_id="large").end.code == "MODEL_NOT_FOUND"


@pytest.mark.model
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": None},
        {"prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}]},
        {"messages": None, "prompt": ""},
        {"max_tokens": 0},
        {"temperature": -1.0},
    ],
)
def test_a_bad_request_is_refused_and_harms_no_other(engine: Running, fields: dict[str, Any]) -> None:
    good = {"messages": [{"role": "user", "content": "Hello"}]}
    job = engine.ask(**{**good, **fields})
    assert (job.end.code, job.pieces) == ("REQUEST_VALIDATION_FAILED", [])
    assert engine.ask(**good).text == "Hello! How can I help you?"


@pytest.mark.model
def test_a_request_that_breaks_fails_alone_and_quotes_nothing(
    engine: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, "broken", 3)
    job = engine.ask("Hello", request_id="broken")
    assert (job.end.code, len(job.token_ids)) == ("WORKER_UNAVAILABLE", 3)
    assert "sesame" not in job.end.message + caplog.text
    job = engine.ask("open sesame \ud83d")  # half a surrogate pair: no tokenizer takes it
    assert job.end.code == "WORKER_UNAVAILABLE"
    assert "sesame" not in job.end.message + caplog.text
    assert engine.ask("Hello").text == "Hello! How can I help you?"


# === loading ===


@pytest.mark.model
def test_serves_several_models_and_runs_again() -> None:
    pytest.importorskip("mlx_lm")
    from mlx_serving_router.mlx import MlxEngine

    engine = MlxEngine({"first": MODEL, "second": MODEL})
    for _ in range(2):
        running = Running(engine)
        for name in engine.models:
            assert running.ask("What do bees make?", model_id=name).text == "Bees make honey."
        running.stop()
    assert running.jobs.reports == [
        ("loading", (), ("first", "second")),
        ("loading", ("first",), ("second",)),
        ("ready", ("first", "second"), ()),
    ]


@pytest.mark.model
def test_reports_loading_then_ready(engine: Running) -> None:
    assert engine.jobs.reports == [("loading", (), ("tiny",)), ("ready", ("tiny",), ())]


@pytest.mark.model
@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (shutil.rmtree, ()),
        (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
        (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors",)),
        (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer.json",)),
        (lambda folder: (folder / "config.json").write_text("{"), ()),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"), ()),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'), ()),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-2.safetensors"}}'
            ),
            ("model-2.safetensors",),
        ),
    ],
    ids=["folder", "config", "weights", "tokenizer", "bad config", "bad weights", "unknown type", "shard"],
)
def test_a_missing_or_broken_folder_is_named(
    tmp_path: Path, damage: Callable[[Path], object], missing: tuple[str, ...]
) -> None:
    pytest.importorskip("mlx_lm")
    from mlx_serving_router.mlx import MlxEngine, ModelLoadError

    folder = tmp_path / "broken"
    shutil.copytree(MODEL, folder)
    damage(folder)
    running = Running(MlxEngine({"tiny": str(folder)}))
    with pytest.raises(ModelLoadError) as raised:
        running.ended()
    assert (raised.value.model, raised.value.location) == ("tiny", str(folder))
    assert raised.value.missing == missing
    assert not running.jobs.ready.is_set()


@pytest.mark.model
def test_models_are_named_by_mapping_folder_or_hub_id(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    from mlx_serving_router.mlx import MlxEngine

    assert MlxEngine({"tiny": MODEL}).models == ("tiny",)
    assert MlxEngine(str(MODEL)).models == ("model",)
    assert MlxEngine([tmp_path / "a", "org/Some-Model-4bit"]).models == ("a", "org/Some-Model-4bit")
    assert repr(MlxEngine({"tiny": "a/b/c"})) == "MlxEngine({'tiny': 'a/b/c'}, max_tokens=512, phase=None)"
    for bad in ({}, [], {"": MODEL}, [tmp_path / "x" / "a", tmp_path / "y" / "a"]):
        with pytest.raises(ValueError, match="model"):
            MlxEngine(bad)


def test_without_mlx_only_construction_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_serving_router.mlx import MlxEngine

    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(ImportError, match=r"mlx-serving-router\[mlx\]"):
        MlxEngine({"tiny": MODEL})
