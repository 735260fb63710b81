"""The programs of the README, docs/routing.md and docs/worker.md run as they are written; links lead somewhere."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from mlx_serving_router import ClusterConfig, ControllerErrorCode
from programs import ROOT, program

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("examples/*/README.md"),
]
PROGRAMS = [
    program
    for document in ("README.md", "docs/routing.md", "docs/worker.md")
    for program in re.findall(
        r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL
    )
]
PRINTED = [
    "HELLO FROM ONE PROCESS \n",
    "to the worker and back \nstop 5\n",
    "rendezvous []\n",
    "an engine in fifteen lines  stop 10\n",
    "NO MORE THAN  length 8\n",
]


def test_every_program_is_tested() -> None:
    assert len(PROGRAMS) == len(PRINTED)


@pytest.mark.parametrize(
    ("source", "printed"),
    list(zip(PROGRAMS, PRINTED, strict=False)),
    ids=["first", "nats", "router", "engine", "handler"],
)
def test_a_program_prints_what_it_should_and_ends_quietly(source: str, printed: str, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(source, encoding="utf-8")
    with program(sys.executable, "-W", "error", file, scratch=tmp_path) as started:
        assert started.ends() == 0, started.output
    assert started.output == printed


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def anchors(document: Path) -> set[str]:
    """The names of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_configuration_for_several_machines_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "cluster.yaml").write_text(block, encoding="utf-8")
    settings = ClusterConfig.load(tmp_path / "cluster.yaml").to_dict()
    assert settings["nats"]["mode"] == "external"


def test_every_error_code_is_documented() -> None:
    documented = re.findall(
        r"^\| ([A-Z_]+) \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(documented) == {code.value for code in ControllerErrorCode}
