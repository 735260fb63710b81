"""Every example runs as its README says."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from programs import ROOT, load, program
from serving import serve

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = ROOT / "examples"


def test_each_has_a_readme_and_something_to_run() -> None:
    folders = [folder for folder in EXAMPLES.iterdir() if folder.is_dir()]
    assert {"demo", "engines", "fastapi-app", "in-process", "notebook", "testing", "tiny-model"} <= {
        folder.name for folder in folders
    }
    for folder in folders:
        assert (folder / "README.md").is_file(), folder
        assert [*folder.glob("*.py"), *folder.glob("*.ipynb")], folder


def test_in_process_prints_what_its_readme_shows(tmp_path: Path) -> None:
    with program(sys.executable, EXAMPLES / "in-process" / "main.py", scratch=tmp_path) as example:
        assert example.ends() == 0, example.output
    readme = (EXAMPLES / "in-process" / "README.md").read_text(encoding="utf-8")
    assert f"```\n{example.output}```" in readme


def test_the_web_service_answers_beside_the_openai_api() -> None:
    example = load(EXAMPLES / "fastapi-app" / "main.py")
    with serve(example.app) as url:
        note = {"text": "Bees make honey. They live in hives.", "author": "ada"}
        assert post(f"{url}/summaries", note)["summary"] == "Bees make honey."
        asked = {"model": "summary", "messages": [{"role": "user", "content": "One. Two."}]}
        answer = post(f"{url}/llm/v1/chat/completions", asked)
        assert answer["choices"][0]["message"]["content"].strip() == "One."


def test_the_tests_of_the_tested_application_pass(tmp_path: Path) -> None:
    tests = EXAMPLES / "testing"
    command = ("-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    with program(sys.executable, *command, scratch=tmp_path) as example:
        assert example.ends() == 0, example.output
    assert " passed" in example.output


def post(url: str, body: object) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


@pytest.mark.slow
def test_the_notebook_runs_and_holds_the_readmes_first_program() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "notebook" / "first-steps.ipynb", as_version=4)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source == re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0].rstrip()

    client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3")
    executed = client.execute()

    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert "".join(output.text for output in code[0].outputs) == "HELLO FROM ONE PROCESS \n"
    in_turn, by_time = (eval(cell.outputs[0].data["text/plain"]) for cell in code[-2:])
    assert in_turn == {"also-fast": 20, "fast": 20, "slow": 20}
    assert by_time.get("slow", 0) < 20
