"""A conversation with the fleet in a terminal: `mlx-serving-router chat`."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mlx_serving_router._client import AnswerError, FrontEnd
from mlx_serving_router._command import CommandError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_HELP: Final = "/new: another conversation, /quit: the end; Ctrl-C stops an answer"
#: Seconds between the first and the last token; of less than that a rate would be one of the terminal.
_RATE_SECONDS: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every question is asked with; what is None is left to the worker."""

    model: str
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None

    def opening(self) -> list[dict[str, str]]:
        """The messages before the first question."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """A request."""
        fields = {"model": self.model, "max_tokens": self.max_tokens, "temperature": self.temperature}
        return {
            "messages": messages,
            **{name: value for name, value in fields.items() if value is not None},
        }


@dataclass
class _Turn:
    """An answer, as far as it came."""

    text: list[str] = field(default_factory=list)
    worker: str | None = None
    tokens: int | None = None
    begun: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None

    async def run(self, front_end: FrontEnd, body: dict[str, Any], session_id: str | None) -> None:
        """Ask, and write the answer as it comes."""
        async with front_end.answer(body, session_id=session_id) as (self.worker, pieces):
            async for piece in pieces:
                self.tokens = piece.completion_tokens or self.tokens
                if piece.text:
                    self.last = time.monotonic()
                    self.first = self.first or self.last
                    self.text.append(piece.text)
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()

    def facts(self, note: str) -> str:
        """Who answered, and how fast."""
        facts = [self.worker or "", note]
        if self.first is not None and self.last is not None:
            facts.append(f"the first token after {(self.first - self.begun) * 1000:.0f} ms")
            if self.tokens is not None:
                facts.append(f"{self.tokens} tokens")
                if self.tokens > 1 and self.last - self.first >= _RATE_SECONDS:
                    facts.append(f"{(self.tokens - 1) / (self.last - self.first):.0f} tokens/s")
        return ", ".join(fact for fact in facts if fact)


async def ask(front_end: FrontEnd, settings: Settings, question: str) -> None:
    """Ask one question, and write nothing but its answer.

    Raises:
        AnswerError: It is answered with an error.
        CommandError: Nobody answers.
    """
    messages = [*settings.opening(), {"role": "user", "content": question}]
    await _Turn().run(front_end, settings.body(messages), None)
    sys.stdout.write("\n")


def converse(
    runner: asyncio.Runner, front_end: FrontEnd, settings: Settings, say: Callable[[str], None]
) -> None:
    """Talk until the input ends. Each conversation is a session: it stays on its worker."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # input() can edit, and remembers, once it is there
    say(f"{settings.model} at {front_end.url} ({_HELP})")
    messages, session_id = settings.opening(), uuid.uuid4().hex
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if question in {"/quit", "/exit"}:
            return
        if question == "/new":
            messages, session_id = settings.opening(), uuid.uuid4().hex
            say("another conversation")
        elif question.startswith("/"):
            say(_HELP)
        elif question:
            messages.append({"role": "user", "content": question})
            turn, note = _Turn(), ""
            try:
                runner.run(turn.run(front_end, settings.body(messages), session_id))
            except AnswerError as error:
                note = f"{error.code}: {error}"
            except CommandError as error:  # it may be back for the next question
                note = str(error)
            except KeyboardInterrupt:
                note = "stopped"
            sys.stdout.write("\n")
            say(f"  {turn.facts(note)}")
            if turn.text:
                messages.append({"role": "assistant", "content": "".join(turn.text)})
            else:
                messages.pop()  # a question without an answer is not asked again
