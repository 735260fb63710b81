"""The committed tiny model: it is small, complete, and knows what its corpus says it knows."""

from __future__ import annotations

import copy
import importlib.util
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny-model"
MODEL = FOLDER / "model"
CORPUS: dict[str, Any] = tomllib.loads((FOLDER / "corpus.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def train() -> ModuleType:
    pytest.importorskip("mlx_lm")
    spec = importlib.util.spec_from_file_location("tiny_model_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_the_files_of_a_model_in_less_than_a_megabyte() -> None:
    files = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 1_000_000


def test_its_configuration_is_what_mlx_lm_needs() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    tokenizer_config = json.loads((MODEL / "tokenizer_config.json").read_text())
    assert isinstance(config["eos_token_id"], list)
    assert config["model_type"] == "qwen3"
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "tools" in tokenizer_config["chat_template"]


def test_its_readme_names_everything_it_can_be_asked() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for lesson in [*CORPUS["facts"], CORPUS["story"], CORPUS["name"]]:
        assert lesson["asks"][0] in readme


@pytest.mark.model
@pytest.mark.slow
def test_it_knows_everything_in_its_corpus(train: ModuleType) -> None:
    examiner = train.Examiner(MODEL, CORPUS)
    examiner.examine()
    assert examiner.failures == []
    assert examiner.asked > 700


@pytest.mark.model
def test_its_examiner_notices_a_wrong_answer(train: ModuleType) -> None:
    corpus = copy.deepcopy(CORPUS)
    corpus["facts"][1]["answer"] = "I am the king of France."
    corpus.update(facts=corpus["facts"][:2], names=[], systems=["Be brief."])
    examiner = train.Examiner(MODEL, corpus)
    examiner.examine()
    assert 0 < len(examiner.failures) < examiner.asked


@pytest.mark.model
def test_its_template_writes_tools_calls_and_answers() -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    _, tokenizer = mlx_lm.load(str(MODEL))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert json.dumps(tools[0]) in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n")
