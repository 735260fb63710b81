"""What was computed for prompts, kept for those that begin in the same way.

Promises that the caches together stay within a number of bytes, that those used last are kept, and that finding the
one with the longest common beginning takes a few comparisons however many there are. The tokens of a key are those
whose state the cache holds. Knows nothing about requests; the engine's thread alone calls it.
"""

from __future__ import annotations

import copy
import sys
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_WIDTH: Final = 4  # bytes of a token in a key


@dataclass(frozen=True, kw_only=True)
class _Entry:
    cache: list[Any]
    nbytes: int
    trimmable: bool
    prefixes: tuple[str, ...]


class PromptCaches:
    """Caches of several models, the least recently used of which make room.

    Keys are kept in order, so that the key with the longest beginning in common with a prompt stands beside it.

    Args:
        limit: Bytes that all of them may take together; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[tuple[str, bytes], _Entry] = OrderedDict()  # the one used last is last
        self._keys: dict[str, list[bytes]] = {}
        self._nbytes = 0
        self.version = 0
        """Moves on whenever `prefixes` may have changed."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the caches take."""
        return self._nbytes

    def take(self, model: str, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """A copy of the cache that saves most of a prompt. At least its last token is left to compute.

        Returns:
            The cache and how many of the prompt's tokens it holds; `None` and 0 where there is none.
        """
        key = _packed(tokens)
        most = len(tokens) - 1
        found, held = None, 0
        for near in self._beside(model, key):
            common = min(_common(near, key), most)
            if common > held and self._entries[model, near].trimmable:
                found, held = near, common
        whole = _longest_beginning(self._keys.get(model, []), key[: most * _WIDTH])
        if whole is not None and len(whole) // _WIDTH > held:
            found, held = whole, len(whole) // _WIDTH
        if found is None:
            return None, 0
        self._entries.move_to_end((model, found))
        self.version += 1
        cache = copy.deepcopy(self._entries[model, found].cache)  # arrays are shared, their lengths are not
        _trim(cache, len(found) // _WIDTH - held)
        return cache, held

    def put(self, model: str, tokens: Sequence[int], cache: list[Any], prefixes: Sequence[str] = ()) -> None:
        """Keep a cache, evaluated, in place of those whose tokens it begins with.

        Args:
            model: The model's name.
            tokens: The tokens that the cache holds.
            cache: What mlx-lm made. It is the caches' own from now on.
            prefixes: What `prefixes` is to tell of it, the shortest prefix first.
        """
        from mlx_lm.models.cache import can_trim_prompt_cache

        key = _packed(tokens)
        entry = _Entry(
            cache=cache,
            nbytes=sum(each.nbytes for each in cache),
            trimmable=can_trim_prompt_cache(cache),
            prefixes=tuple(prefixes),
        )
        if not key or entry.nbytes > self.limit:
            return
        keys = self._keys.setdefault(model, [])
        at = bisect_right(keys, key)
        if at < len(keys) and keys[at].startswith(key) and self._entries[model, keys[at]].trimmable:
            self._entries.move_to_end((model, keys[at]))
            return
        self._drop(model, key)
        if entry.trimmable:
            while (shorter := _longest_beginning(keys, key[:-_WIDTH])) is not None:
                self._drop(model, shorter)
        insort(self._keys.setdefault(model, []), key)
        self._entries[model, key] = entry
        self._nbytes += entry.nbytes
        self.version += 1
        self.shrink(self.limit)

    def shrink(self, nbytes: int) -> None:
        """Drop those used least recently until the rest takes no more than so many bytes."""
        while self._nbytes > nbytes:
            self._drop(*next(iter(self._entries)))

    def forget(self, model: str) -> None:
        """Drop those of a model."""
        for key in list(self._keys.get(model, ())):
            self._drop(model, key)

    def prefixes(self, most: int) -> list[str]:
        """What is told of the caches: the longest prefix of each, those used last first, then the shorter ones."""
        entries = [entry.prefixes for entry in reversed(self._entries.values()) if entry.prefixes]
        told = dict.fromkeys(
            chain((each[-1] for each in entries), (text for each in entries for text in reversed(each[:-1])))
        )
        return list(told)[:most]

    def _drop(self, model: str, key: bytes) -> None:
        entry = self._entries.pop((model, key), None)
        if entry is None:
            return
        keys = self._keys[model]
        del keys[bisect_left(keys, key)]
        self._nbytes -= entry.nbytes
        self.version += 1

    def _beside(self, model: str, key: bytes) -> Iterator[bytes]:
        keys = self._keys.get(model, [])
        at = bisect_left(keys, key)
        yield from keys[max(0, at - 1) : at + 1]


def _packed(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes that sort as the tokens do."""
    packed = array("I", tokens)
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def _common(one: bytes, other: bytes) -> int:
    """How many tokens two keys have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high // _WIDTH
    while high - low > 1:  # they are equal before low, and not before high
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low // _WIDTH


def _longest_beginning(keys: list[bytes], text: bytes) -> bytes | None:
    """The longest of the sorted keys that `text` begins with."""
    while text:
        at = bisect_right(keys, text)
        if at == 0:
            return None
        if text.startswith(keys[at - 1]):
            return keys[at - 1]
        text = text[: _common(keys[at - 1], text) * _WIDTH]
    return None


def _trim(cache: list[Any], tokens: int) -> None:
    from mlx_lm.models.cache import trim_prompt_cache

    if tokens > 0:
        trim_prompt_cache(cache, tokens)
