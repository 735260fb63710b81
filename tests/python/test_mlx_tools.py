"""Calls of tools: mlx-lm's own parsers on what models write, and a call that goes through the engine.

The tiny model calls no tools by itself. Where the engine is tested, a sampler draws the tokens of a call in its place.
"""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from enginejobs import Running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("mlx_lm")

from mlx_serving_router.mlx._tools import ToolCallReader

pytestmark = pytest.mark.model

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time", "parameters": {}}}


class Tokenizer:
    """What mlx-lm's tokenizer says of tools when a model's template is of this kind."""

    def __init__(self, kind: str) -> None:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{kind}")
        self.has_tool_calling = True
        self.tool_call_start = module.tool_call_start
        self.tool_call_end = module.tool_call_end
        self.tool_parser = module.parse_tool_call


def reader(kind: str) -> ToolCallReader:
    made = ToolCallReader.of(Tokenizer(kind), [WEATHER, TIME])
    assert made is not None
    return made


def read(kind: str, *pieces: str) -> tuple[str, list[tuple[str, Any]]]:
    """The text, and the calls with their arguments."""
    calls = reader(kind)
    shown = "".join(calls.push(piece) for piece in pieces) + calls.finish()
    for call in calls.calls:
        assert call["type"] == "function"
        assert call["id"]
    return shown, [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls.calls
    ]


WRITTEN = {
    "json_tools": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
    "qwen3_coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>"
    ),
    "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 2}',
    "pythonic": '<|tool_call_start|>[weather(city="Rome", days=2)]<|tool_call_end|>',
    "glm47": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    ),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_reads_a_call_however_the_text_is_cut(kind: str) -> None:
    expected = [("weather", {"city": "Rome", "days": 2})]
    text = "I will look. " + WRITTEN[kind]
    for size in (1, 2, 5, 11, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert read(kind, *pieces) == ("I will look. ", expected)


def test_reads_several_calls_and_the_text_around_them() -> None:
    rome, time = (
        f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in ("weather", "time")
    )
    calls = [("weather", {}), ("time", {})]
    assert read("json_tools", f"First.\n{rome}\n{time}\n") == ("First.\n", calls)
    assert read("json_tools", f"{rome} and {time} then") == (" and  then", calls)
    several = (
        '[TOOL_CALLS][{"name": "weather", "arguments": {}}, {"name": "time", "arguments": {}, "id": "abc"}]'
    )
    assert read("mistral", several) == ("", calls)


def test_keeps_the_models_own_id() -> None:
    calls = reader("mistral")
    calls.push('[TOOL_CALLS][{"name": "time", "arguments": {}, "id": "abc123"}]')
    calls.finish()
    assert [call["id"] for call in calls.calls] == ["abc123"]


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        "<tool_call>not JSON</tool_call> and on",
        '<tool_call>{"name": "weather"',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[7]</tool_call>",
        "<tool_ca",
        "a < b <tool",
    ],
)
def test_what_is_no_call_comes_out_as_it_was_written(text: str) -> None:
    for size in (1, 3, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert read("json_tools", *pieces) == (text, [])


def test_without_tools_or_a_parser_nothing_is_read() -> None:
    tokenizer = Tokenizer("json_tools")
    assert ToolCallReader.of(tokenizer, []) is None
    tokenizer.has_tool_calling = False
    assert ToolCallReader.of(tokenizer, [WEATHER]) is None


# === through the engine ===


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Running]]:
    """An engine whose answers are a given text, token by token."""
    import mlx.core as mx

    from mlx_serving_router.mlx import _batch

    running = Running.tiny()

    def writes(text: str) -> Running:
        from transformers import AutoTokenizer

        from enginejobs import MODEL

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

        def made(_: Any, first: int = 0) -> Callable[[Any], Any]:
            rest = iter([*ids[first:], *[ids[-1]] * 3])
            return lambda _: mx.array([next(rest)])

        monkeypatch.setattr(_batch, "make_sampler", made)
        return running

    yield writes
    running.stop()


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize(
    "choice", [None, "auto", "required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_ends_the_answer_as_one(scripted: Callable[[str], Running], choice: Any) -> None:
    job = scripted("Let me see." + CALL).ask("Hello", tools=[WEATHER, TIME], tool_choice=choice)
    assert (job.text, job.end.finish_reason) == ("Let me see.", "tool_calls")
    (call,) = job.end.tool_calls
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert job.end.completion_tokens == len(job.token_ids) > 20
    assert max(len(ids) for _, ids in job.pieces) <= 16, "whoever waits hears of a long call"


def test_a_call_that_is_cut_off_is_text(scripted: Callable[[str], Running]) -> None:
    job = scripted(CALL).ask("Hello", tools=[WEATHER], max_tokens=20)
    assert CALL.startswith(job.text)
    assert (job.end.finish_reason, job.end.tool_calls) == ("length", None)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}], ids=str)
def test_without_tools_a_call_is_text(scripted: Callable[[str], Running], fields: dict[str, Any]) -> None:
    job = scripted(CALL).ask("Hello", **fields)
    assert (job.text, job.end.finish_reason, job.end.tool_calls) == (CALL, "stop", None)


def test_a_call_is_resumed(scripted: Callable[[str], Running]) -> None:
    engine = scripted("Let me see." + CALL)
    whole = engine.ask("Hello", tools=[WEATHER])
    for place in range(len(whole.pieces) + 1):
        text = "".join(piece for piece, _ in whole.pieces[:place])
        ids = [token for _, piece in whole.pieces[:place] for token in piece]
        rest = engine.ask("Hello", tools=[WEATHER], resume={"tokenIds": ids, "text": text})
        assert text + rest.text == whole.text
        assert (rest.end.finish_reason, rest.end.tool_calls[0]["function"]) == (
            "tool_calls",
            whole.end.tool_calls[0]["function"],
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "sometimes"},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "time"}}, "tools": [WEATHER]},
        {"tool_choice": {"type": "function"}, "tools": [WEATHER]},
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_is_refused(
    scripted: Callable[[str], Running], fields: dict[str, Any]
) -> None:
    assert scripted("").ask("Hello", **fields).end.code == "REQUEST_VALIDATION_FAILED"
