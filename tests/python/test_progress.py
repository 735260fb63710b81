"""How the Makefile's targets show that a long step lives."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING

from programs import ROOT

if TYPE_CHECKING:
    from types import ModuleType

    import pytest


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(name)


def test_a_log_gets_what_is_new_and_now_and_then_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = script("progress", monkeypatch)
    texts = iter(["first", "first", "second", *["second"] * 9])
    ticker = progress._Ticker(lambda: next(texts))
    ends = iter([False] * 12 + [True])
    ticker._terminal, ticker._stop = False, SimpleNamespace(wait=lambda _seconds: next(ends))
    ticker._run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second", "second"]


def test_the_crate_that_takes_longest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    describe = script("environment", monkeypatch)._cargo([], "log", "it").describe
    assert describe("   Compiling serde v1.0.0").startswith("compiling serde (1 of at most")
    assert "takes longest" in describe("   Compiling mlx_serving_router v0.1.0 (/somewhere)")
