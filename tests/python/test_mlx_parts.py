"""What MlxEngine does before and after the model: parameters, messages, characters, stop strings. Needs no mlx."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlx_serving_router.mlx._request import InvalidRequestError, Parameters, chat_messages
from mlx_serving_router.mlx._text import IncrementalDecoder, StopMatcher

UNSET: dict[str, Any] = dict.fromkeys(
    [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "response_format",
        "resume",
    ]
)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_k": -2},
        {"min_p": 1.5},
        {"seed": 0.5},
        {"stop": [""]},
        {"stop": [7]},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("inf")},
        {"logit_bias": {"100": 1.0}},
        {"logit_bias": {"-1": 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {"1": 101.0}},
        {"logprobs": 21},
        {"logprobs": -1},
        {"response_format": {"type": "json_object"}},
        {"resume": {"tokenIds": [100], "text": "a"}},
        {"resume": {"tokenIds": [-1], "text": "a"}},
        {"resume": {"tokenIds": [1], "text": None}},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        Parameters.from_request(SimpleNamespace(**{**UNSET, **fields}), default_max_tokens=9, vocabulary=100)


def test_parameters_have_defaults_and_neutral_values() -> None:
    neutral = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    neutral |= {
        "logit_bias": {},
        "stop": [],
        "response_format": {"type": "text"},
        "temperature": 0,
    }
    unset, off = (
        Parameters.from_request(SimpleNamespace(**{**UNSET, **fields}), default_max_tokens=9, vocabulary=100)
        for fields in ({}, neutral)
    )
    assert unset == off
    assert (unset.max_tokens, unset.temperature, unset.seed) == (9, 0.0, None)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "assistant", "tool_calls": [5]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "{"}}]}],
    ],
    ids=str,
)
def test_messages_that_no_template_takes_are_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequestError):
        chat_messages(messages)


def test_arguments_of_tool_calls_become_objects() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    (message,) = chat_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        ([], "abc", "abc"),
        (["bc"], "abcd", "a"),
        (["abcd", "bc"], "xabcd", "xa"),  # the first one complete
        (["bc", "abc"], "xabc", "x"),  # complete together: the longer
        (["aab"], "aaab", "a"),
        (["abab"], "abaabab", "aba"),
        (["xyz"], "xyxy", "xyxy"),
        (["é🙂"], "café🙂!", "caf"),
    ],
)
def test_stop_strings_are_found_however_the_text_is_cut(stops: list[str], text: str, shown: str) -> None:
    for cuts in range(2 ** (len(text) - 1)):
        pieces, start = [], 0
        for position in range(1, len(text) + 1):
            if position == len(text) or cuts >> (position - 1) & 1:
                pieces.append(text[start:position])
                start = position
        matcher = StopMatcher(stops)
        out = ""
        for piece in pieces:
            out += matcher.push(piece)
            assert shown.startswith(out)
            if matcher.stopped:
                break
        assert out + matcher.finish() == shown
        assert matcher.stopped == (shown != text)


def test_the_decoder_holds_back_incomplete_characters() -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    decoder = IncrementalDecoder(decode)
    assert [decoder.push(byte) for byte in "aé🙂b".encode()] == ["a", "", "é", "", "", "", "🙂", "b"]
    assert decoder.push(0xF0) + decoder.finish() == ""
