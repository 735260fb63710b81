"""Which models lie on this machine: in a folder, and in the cache of the Hugging Face Hub.

Promises that what is found is a text model of a kind that mlx-lm knows, complete as far as its files tell without being
read. What is not is passed over.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mlx_serving_router.mlx._models import ModelLoadError, check_folder, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("mlx_serving_router.mlx")

#: How deep below a folder models may lie: in `name`, or in `organisation/name`.
_DEPTH: Final = 2


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model on this machine.

    Attributes:
        name: What it is served as: its id on the Hub, or its path below the folder that was looked into.
        path: Its folder.
        nbytes: Bytes of its files.
    """

    name: str
    path: Path
    nbytes: int


def scan_folder(folder: str | os.PathLike[str]) -> list[FoundModel]:
    """The models in a folder, by name: itself, where it is the folder of one; in its folders, and in theirs.

    Raises:
        ValueError: There is no such folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise ValueError(f"there is no folder {os.fspath(folder)} to look for models in")
    if (root / "config.json").exists():
        places = [(root.name, root)]
    else:
        places = [(path.relative_to(root).as_posix(), path) for path in _folders(root, _DEPTH)]
    return _models(places)


def scan_hugging_face_cache() -> list[FoundModel]:
    """The models in the cache of the Hugging Face Hub, by id, each as it was fetched last. Nothing is fetched."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    places = []
    for repo in cache.repos:
        if repo.repo_type == "model" and repo.revisions:
            main = [revision for revision in repo.revisions if "main" in revision.refs]
            newest = max(main or repo.revisions, key=lambda revision: revision.last_modified)
            places.append((repo.repo_id, newest.snapshot_path))
    return _models(places)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if (path / "config.json").exists():
            yield path
        elif depth > 1:
            yield from _folders(path, depth - 1)


def _models(places: list[tuple[str, Path]]) -> list[FoundModel]:
    found = []
    for name, path in sorted(places):
        try:
            check_folder(name, path)
            if _is_known(path):
                found.append(FoundModel(name=name, path=path, nbytes=size_of(path)))
        except (ModelLoadError, OSError, ValueError) as error:
            logger.debug("passed over: %s", error)
    return found


def _is_known(folder: Path) -> bool:
    """Whether mlx-lm has code for a model of this kind."""
    from mlx_lm.utils import MODEL_REMAPPING

    config = json.loads((folder / "config.json").read_bytes())
    kind = config.get("model_type")
    if (
        not isinstance(kind, str) or "model_file" in config
    ):  # the latter brings code of its own, which is not run
        return False
    kind = MODEL_REMAPPING.get(kind, kind)
    return kind.isidentifier() and find_spec(f"mlx_lm.models.{kind}") is not None
