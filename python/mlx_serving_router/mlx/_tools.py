"""Calls of tools in what a model writes, by the parsers that come with mlx-lm.

Promises that text which is no call passes through, and that a call which cannot be read comes out as the text that the
model wrote rather than getting lost. Knows the marks around a call and what comes of it; knows no model.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TEXT: Final = "normal"
_CALL: Final = "tool"


class ToolCallReader:
    """Takes the calls out of a text that comes in pieces.

    Args:
        start: What stands in front of a call.
        end: What stands behind it; empty where a call goes on to the end of the answer.
        parse: mlx-lm's parser: gives one call or several, or raises.
        tools: The tools that the model knows of, in the OpenAI API's shape.
    """

    def __init__(
        self, start: str, end: str, parse: Callable[[str, Any], Any], tools: Sequence[dict[str, Any]]
    ) -> None:
        from mlx_lm.generate import TextStateMachine

        self._machine = TextStateMachine
        self._state = TextStateMachine(
            {_TEXT: [(start, _CALL)], _CALL: [(end, _TEXT)] if end else []}
        ).make_state(_TEXT)
        self._marks = (start, end)
        self._parse = parse
        self._tools = list(tools)
        self._call: str | None = None
        self._gap = ""
        self.calls: list[dict[str, Any]] = []

    @classmethod
    def of(cls, tokenizer: Any, tools: Sequence[dict[str, Any]]) -> ToolCallReader | None:
        """The reader for a model's tokenizer; none where there are no tools, or it knows no calls."""
        if not tools or not tokenizer.has_tool_calling or tokenizer.tool_parser is None:
            return None
        return cls(tokenizer.tool_call_start, tokenizer.tool_call_end or "", tokenizer.tool_parser, tools)

    def push(self, text: str) -> str:
        """The text that is certainly not part of a call."""
        if not text:
            return ""
        self._state, segments = self._machine.split(self._state, text)
        return "".join(self._pass(state, piece) for state, piece in segments)

    def finish(self, text: str = "") -> str:
        """The last piece, and what is held back: the answer is at its end. A call that was cut off is text."""
        shown = self.push(text)
        self._state, held, state = self._machine.flush(self._state)
        shown += self._pass(state, held)
        if self._call is not None:
            call, self._call = self._call, None
            shown += self._read(call, closed=False)
        return shown

    def _pass(self, state: str, piece: str) -> str:
        if state == _CALL:
            self._call = (self._call or "") + piece
            return ""
        shown = ""
        if self._call is not None:
            call, self._call = self._call, None
            shown = self._read(call, closed=True)
        # Space between calls and behind the last one is no text of the answer's.
        if self.calls and not piece.strip():
            self._gap += piece
            return shown
        gap, self._gap = self._gap, ""
        return shown + gap + piece

    def _read(self, text: str, *, closed: bool) -> str:
        try:
            parsed = self._parse(text, self._tools)
            calls = [_call(each) for each in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # noqa: BLE001 a parser meets whatever a model writes, and raises many kinds
            start, end = self._marks
            return start + text + (end if closed else "")
        self.calls += calls
        return ""


def _call(parsed: dict[str, Any]) -> dict[str, Any]:
    """A call in the OpenAI API's shape."""
    name, arguments = parsed["name"], parsed.get("arguments", {})
    if not isinstance(name, str):
        raise TypeError("the name of a function must be text")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    given = parsed.get("id")
    return {
        "id": given if isinstance(given, str) and given else f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
