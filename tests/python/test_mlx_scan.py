"""Which models are found in a folder and in the cache of the Hugging Face Hub."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from enginejobs import MODEL
from mlx_serving_router._models import parse_bytes
from mlx_serving_router.cli import app
from modelfiles import copy

if TYPE_CHECKING:
    from pathlib import Path

SIZE = sum(file.stat().st_size for file in MODEL.iterdir())


@pytest.fixture(autouse=True)
def _mlx() -> None:
    pytest.importorskip("mlx_lm")


def test_a_folder_has_models_in_its_folders_and_in_theirs(tmp_path: Path) -> None:
    from mlx_serving_router.mlx import scan_folder

    for name in ("tiny", "org/tiny", "org/deep/tiny", ".hidden"):
        copy(tmp_path / name)
    (tmp_path / "linked").symlink_to(MODEL)
    (tmp_path / "notes.txt").touch()
    found = scan_folder(tmp_path)
    assert [(model.name, model.nbytes) for model in found] == [
        ("linked", SIZE),
        ("org/tiny", SIZE),
        ("tiny", SIZE),
    ]
    assert found[1].path == tmp_path / "org" / "tiny"
    assert [model.name for model in scan_folder(tmp_path / "tiny")] == ["tiny"], (
        "the folder of a model is one, too"
    )
    with pytest.raises(ValueError, match="nowhere"):
        scan_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"model_type": "bert"}',
        '{"model_type": "../llama"}',
        '{"model_type": 7}',
        "{}",
        '{"model_type": "llama", "model_file": "code.py"}',
    ],
)
def test_what_mlx_lm_cannot_load_is_passed_over(tmp_path: Path, config: str) -> None:
    from mlx_serving_router.mlx import scan_folder

    (copy(tmp_path / "other") / "config.json").write_text(config)
    for missing in ("model.safetensors", "tokenizer.json"):
        (copy(tmp_path / f"without {missing}") / missing).unlink()
    index = copy(tmp_path / "half") / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    copy(tmp_path / "whole")
    assert [model.name for model in scan_folder(tmp_path)] == ["whole"]


def hub_cache(folder: Path, *repositories: str) -> Path:
    """A cache as huggingface_hub lays it out: blobs, and snapshots that link to them."""
    for repository in repositories:
        root = folder / f"models--{repository.replace('/', '--')}"
        for commit in ("0" * 40, "1" * 40):
            snapshot = root / "snapshots" / commit
            snapshot.mkdir(parents=True)
            (root / "blobs").mkdir(exist_ok=True)
            for file in MODEL.iterdir():
                blob = root / "blobs" / file.name
                shutil.copy(file, blob)
                (snapshot / file.name).symlink_to(blob)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("1" * 40)
    return folder


def test_the_cache_has_models_by_their_ids_as_they_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_serving_router.mlx import MlxEngine, scan_hugging_face_cache

    cache = hub_cache(tmp_path / "hub", "org/tiny", "org/embeddings")
    for config in cache.glob("models--org--embeddings/blobs/config.json"):
        config.write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"))
    [found] = scan_hugging_face_cache()
    assert (found.name, found.path.name, found.nbytes) == ("org/tiny", "1" * 40, SIZE)
    engine = MlxEngine(hf_cache=True)
    assert (engine.models, engine.total_model_size) == (("org/tiny",), SIZE)
    assert engine.model_paths == {"org/tiny": str(found.path)}
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "none"))
    assert scan_hugging_face_cache() == []


def test_a_model_that_is_given_wins_over_one_that_is_found(tmp_path: Path) -> None:
    from mlx_serving_router.mlx import MlxEngine

    copy(tmp_path / "tiny")
    engine = MlxEngine({"tiny": MODEL}, models_dir=tmp_path)
    assert (engine.models, engine.model_paths) == (("tiny",), {"tiny": str(MODEL)})
    assert MlxEngine(models_dir=tmp_path).model_paths == {"tiny": str(tmp_path / "tiny")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model .* in .*empty"):
        MlxEngine(models_dir=tmp_path / "empty")


def test_the_command_lists_them(tmp_path: Path) -> None:
    copy(tmp_path / "org" / "tiny")
    shown = CliRunner().invoke(app, ["models", "--models-dir", str(tmp_path)])
    assert shown.exit_code == 0
    assert shown.output.split() == ["0.00", "GB", "org/tiny", str(tmp_path / "org" / "tiny")]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("0", 0),
        ("1024", 1024),
        ("16G", 16 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512mb", 512 * 2**20),
        ("2t", 2**41),
    ],
)
def test_bytes_are_written_as_people_do(written: str, meant: int) -> None:
    assert parse_bytes(written) == meant


@pytest.mark.parametrize("written", ["", "G", "-1", "1e9", "3X", "16 giga"])
def test_what_is_no_number_of_bytes_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="16G"):
        parse_bytes(written)
