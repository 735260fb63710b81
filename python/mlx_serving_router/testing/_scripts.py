"""What a scripted worker does with the requests that reach it: one function for each kind of good and bad behaviour.

Scripts are values. They are checked when they are written, may be shared between workers (each counts its own
requests) and put together::

    every(3, fail())                        # each third request fails, the others are answered
    fail().then(answer())                   # the first fails
    refuse(retry_after_ms=200).times(2).then(answer())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from mlx_serving_router._errors import ControllerErrorCode
from mlx_serving_router._native import Script

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["answer", "babble", "die", "every", "fail", "refuse", "say", "stall"]

_CODES: Final = frozenset(map(str, ControllerErrorCode))


def answer(
    *pieces: str,
    delay_ms: int = 0,
    token_delay_ms: int = 0,
    finish_reason: Literal["stop", "length", "tool_calls"] = "stop",
    prompt_tokens: int = 4,
    cached_tokens: int = 0,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
    streamed: bool = False,
) -> Script:
    """Answer, at once or slowly.

    Args:
        pieces: The texts of the tokens; without any, four that make `Hello, world`.
        delay_ms: Milliseconds before the first token.
        token_delay_ms: Milliseconds before each further one. An answer that is not streamed takes as long.
        finish_reason: Why it ends.
        prompt_tokens: What it says that the prompt cost.
        cached_tokens: How much of that it says was cached.
        tool_calls: The functions that the model wants called, in the OpenAI API's shape.
        streamed: Answer in tokens also where no stream is wanted.

    Raises:
        ValueError: A number is negative, or the reason is no word for one.
    """
    return Script.answer(
        *pieces,
        delay_ms=delay_ms,
        token_delay_ms=token_delay_ms,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        tool_calls=tool_calls,
        streamed=streamed,
    )


def stall(after_tokens: int = 0, *, accept: bool = True) -> Script:
    """Begin, then say nothing more until told to stop.

    Args:
        after_tokens: How many tokens come before. Where no stream is wanted they are kept, and nothing comes.
        accept: Whether the request is accepted first; without it the worker says nothing at all.

    Raises:
        ValueError: The number is negative or beyond 100000.
    """
    return Script.stall(after_tokens, accept=accept)


def fail(
    code: ControllerErrorCode | str | None = "WORKER_UNAVAILABLE",
    message: str = "as scripted",
    *,
    after_tokens: int = 0,
    retry_after_ms: int | None = None,
    delay_ms: int = 0,
    accept: bool = True,
) -> Script:
    """Begin, then fail.

    Args:
        code: What the worker's error says; one that is unknown, or `None`, is read as WORKER_UNAVAILABLE.
        message: Its words.
        after_tokens: How many tokens come before.
        retry_after_ms: When the worker says it may be asked again; -1: the request is not to be tried anywhere.
        delay_ms: Milliseconds before it fails.
        accept: Whether the request is accepted first.

    Raises:
        ValueError: A number is out of range, the code is empty, or it is a code of ours in small letters.
    """
    if code is not None and code not in _CODES and code.upper() in _CODES:
        raise ValueError(f"code is {code!r}; did you mean {code.upper()!r}?")
    return Script.fail(
        code,
        message,
        after_tokens=after_tokens,
        retry_after_ms=retry_after_ms,
        delay_ms=delay_ms,
        accept=accept,
    )


def refuse(retry_after_ms: int | None = None) -> Script:
    """Refuse with WORKER_OVERLOADED: there is no room.

    Args:
        retry_after_ms: When there may be; -1: the request is not to be tried anywhere.

    Raises:
        ValueError: The number is below -1.
    """
    return Script.refuse(retry_after_ms)


def die(after_tokens: int = 0, *, accept: bool = True) -> Script:
    """Begin, then be gone without a word: the worker itself, with all its requests, as `kill -9` has it.

    Args:
        after_tokens: How many tokens come before.
        accept: Whether the request is accepted first.

    Raises:
        ValueError: The number is negative or beyond 100000.
    """
    return Script.die(after_tokens, accept=accept)


def babble(
    how: Literal["malformed", "duplicate", "reordered", "missing"] = "malformed", *, after_tokens: int = 1
) -> Script:
    """Answer in tokens, break the protocol once, and go on as if nothing had been.

    Args:
        how: A message that is no reply, a token twice, two tokens in the wrong order, or one left out.
        after_tokens: How many tokens come before.

    Raises:
        ValueError: `how` is none of these, or the number is out of range.
    """
    return Script.babble(how, after_tokens=after_tokens)


def say(*messages: Mapping[str, Any] | str | bytes) -> Script:
    """Say these messages and nothing else.

    Args:
        messages: An object of the wire, which gets the request's id where it has none, such as
            `{"type": "token", "token": "Hel", "index": 0}`; or any text or bytes.

    Raises:
        TypeError: A message is none of these.
        ValueError: There is none, or JSON has no word for a value.
    """
    return Script.say(*messages)


def every(n: int, script: Script, *, otherwise: Script | None = None) -> Script:
    """Do this with each n-th request, and something else with the others.

    Args:
        n: 3: with the third, the sixth and so on of the requests that reach the worker.
        script: This.
        otherwise: The other; `answer()` where it is left out.

    Raises:
        TypeError: One of them is no script.
        ValueError: `n` is below 1.
    """
    others = None if otherwise is None else checked("otherwise", otherwise)
    return Script.every(n, checked("script", script), otherwise=others)


def checked(name: str, script: object) -> Script:
    """The script.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(script, Script):
        shown = getattr(script, "__name__", None) or repr(script)
        raise TypeError(f"{name} is {shown}, no script; a call such as stall() or answer('Hello') makes one")
    return script
