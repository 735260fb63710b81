"""Bars with their ranges, as SVG. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from report import number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_WIDTH = 560
_LABELS = 132  # of which the names of the bars take so much
_VALUES = 78  # and the numbers behind them
_TOP = 44
_ROW = 24
_BOTTOM = 26
#: Where bars differ by more than this factor, the scale is logarithmic: the short ones could not be told apart.
_LOGARITHMIC = 10.0


@dataclass(frozen=True)
class Bar:
    """A median with its range; `kind` is a class of the style sheet: `ours`, `other` or `bound`."""

    label: str
    median: float
    least: float
    most: float
    kind: str = "other"


@dataclass(frozen=True)
class _Scale:
    """From a figure to its place on the axis."""

    least: float
    most: float
    logarithmic: bool

    @classmethod
    def of(cls, bars: Sequence[Bar]) -> _Scale:
        most = max(bar.most for bar in bars)
        smallest = min((bar.median for bar in bars if bar.median > 0), default=most)
        if most <= 0 or max(bar.median for bar in bars) <= _LOGARITHMIC * smallest:
            return cls(0.0, most or 1.0, logarithmic=False)
        # A decade starts below the smallest, so that its bar can be seen.
        lowest = min(bar.least for bar in bars if bar.least > 0)
        return cls(10.0 ** math.floor(math.log10(lowest) - 0.15), most, logarithmic=True)

    def place(self, value: float) -> float:
        if self.logarithmic:
            value = max(value, self.least)
            share = math.log(value / self.least) / math.log(self.most / self.least)
        else:
            share = value / self.most
        return round(_LABELS + share * (_WIDTH - _LABELS - _VALUES), 1)

    def ticks(self) -> Iterator[float]:
        if self.logarithmic:
            exponent = round(math.log10(self.least))
            while 10.0**exponent <= self.most:
                yield 10.0**exponent
                exponent += 1
            return
        step = 10.0 ** math.floor(math.log10(self.most))
        step = next(step * part for part in (1.0, 0.5, 0.2, 0.1) if self.most / (step * part) >= 3)
        for count in range(int(self.most / step) + 1):
            yield count * step


def bars(title: str, unit: str, shown: Sequence[Bar]) -> str:
    """An SVG element: a bar for each median, a line from the least to the most, the medians in figures."""
    scale = _Scale.of(shown)
    height = _TOP + _ROW * len(shown) + _BOTTOM
    below = height - _BOTTOM + 4
    unit += ", logarithmic scale" if scale.logarithmic else ""
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img"',
        f' xmlns="http://www.w3.org/2000/svg" aria-label="{escape(title)}">',
        f'<text class="title" x="0" y="15">{escape(title)}</text>',
        f'<text class="unit" x="0" y="32">{escape(unit)}</text>',
    ]
    for tick in scale.ticks():
        x = scale.place(tick)
        parts.append(f'<line class="grid" x1="{x}" y1="{_TOP}" x2="{x}" y2="{below}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{below + 13}">{number(tick)}</text>')
    for row, bar in enumerate(shown):
        y = _TOP + _ROW * row + 4
        middle = y + 8
        start, end = scale.place(scale.least), scale.place(bar.median)
        least, most = scale.place(bar.least), scale.place(bar.most)
        parts += [
            f'<text class="label" x="{_LABELS - 8}" y="{middle + 4}">{escape(bar.label)}</text>',
            f'<rect class="{bar.kind}" x="{start}" y="{y}" width="{max(end - start, 1):.1f}" height="16"/>',
            f'<path class="range" d="M{least} {middle}H{most}M{least} {middle - 4}v8M{most} {middle - 4}v8"/>',
            f'<text class="value" x="{max(end, most) + 6}" y="{middle + 4}">{number(bar.median)}</text>',
        ]
    return "".join([*parts, "</svg>"])
