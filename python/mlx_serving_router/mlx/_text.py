"""From token ids to text that may be shown: what `MlxEngine` does between the model and `Job.token`.

Promises that the pieces put together are the text of all tokens up to a stop string, that no piece holds part
of a character or part of a stop string, and that where a stop string ends does not depend on how the text was
cut into tokens. Knows nothing about models, requests or mlx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode a cut-off UTF-8 sequence to


class IncrementalDecoder:
    """Turns token ids into text as they come, in constant time for each.

    The text of a token depends on its neighbours (spaces, joined bytes), so the last tokens are decoded again
    with and without the new one, and the difference is what it adds.

    Args:
        decode: Gives the text of a sequence of token ids.
        context: Tokens in front of the first one, whose text is not part of the answer but decides its
            leading space.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context)
        self._shown = len(self._ids)  # tokens in front of here have been turned into text
        self._before = decode(self._ids) if self._ids else ""  # the text of those

    def push(self, token: int) -> str:
        """The text that is complete with this token; empty while a character is still missing bytes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._before) or text.endswith(_INCOMPLETE):
            return ""
        added = text[len(self._before) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        self._before = self._decode(self._ids)
        return added

    def finish(self) -> str:
        """What `push` still holds back, without the bytes of a character that never became complete."""
        return self._decode(self._ids)[len(self._before) :].rstrip(_INCOMPLETE)


class StopMatcher:
    """Finds stop strings in text that comes in pieces.

    Of several matches the one that is complete first counts, and of those complete at the same character the
    longest; thus the result is the same however the text is cut.

    Args:
        stops: Non-empty strings. Without any, text passes through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can no longer become part of a stop string. Sets `stopped` when one is complete."""
        if not self._stops:
            return text
        held = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if matches:
            self.stopped = True
            self._held = ""
            return held[: min(matches)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self, text: str = "") -> str:
        """The last piece, and what is held back: the answer ended before that became a stop string."""
        if self.stopped:
            return ""
        shown = self.push(text)
        held, self._held = self._held, ""
        return shown + held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
