"""What the commands say of models, made into an engine: names and places, limits, pre-warming.

Importing this needs no mlx; an engine and a search do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlx_serving_router._command import CommandError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving_router._native import ClusterConfig
    from mlx_serving_router.mlx import FoundModel, MlxEngine

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_bytes(text: str) -> int:
    """A number of bytes: `17179869184`, `16G`, `16 GiB`.

    Raises:
        ValueError: It is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is no number of bytes; a number, alone or with K, M, G or T, is right: 16G"
        )
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def engine(
    models: Sequence[str] | None,
    config: ClusterConfig,
    *,
    models_dir: Path | None,
    hf_cache: bool,
    pre_warm: Sequence[str] | None,
    register_when: str | None,
    load_timeout: float | None,
    **limits: int | None,
) -> MlxEngine:
    """The engine of a worker. What is left out is as the configuration has it, or as the engine does.

    Args:
        models: Models as `named_models` takes them.
        config: Of it, `workers.preWarming`.
        models_dir: A folder to look for models in.
        hf_cache: Whether to look into the Hugging Face cache.
        pre_warm: Names of models to load at the start.
        register_when: `"complete"` or `"warming"`.
        load_timeout: Seconds that one model may take.
        limits: Further arguments of `MlxEngine`.

    Raises:
        CommandError: No model, two of one name, or an empty name.
        ModelLoadError: A folder is none of a model.
        ValueError: An argument of the engine cannot be used.
    """
    from mlx_serving_router.mlx import MlxEngine

    searched = models_dir is not None or hf_cache
    settings = config.to_dict()["workers"]["preWarming"]
    if load_timeout is None and settings["timeoutPerModelMs"] is not None:
        load_timeout = settings["timeoutPerModelMs"] / 1000
    options: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    options["register_when"] = register_when or settings["registerWhen"]
    return MlxEngine(
        None if searched and not models else named_models(models),
        models_dir=models_dir,
        hf_cache=hf_cache,
        pre_warm=pre_warm or settings["models"],
        load_timeout=load_timeout,
        **options,
    )


def found(models_dir: Path | None, *, hf_cache: bool) -> list[FoundModel]:
    """The models on this machine that a worker can serve, by name.

    Raises:
        ValueError: There is no such folder.
    """
    from mlx_serving_router.mlx import scan_folder, scan_hugging_face_cache

    models = scan_hugging_face_cache() if hf_cache else []
    return models + (scan_folder(models_dir) if models_dir is not None else [])


def where(models_dir: Path | None, *, hf_cache: bool) -> str:
    """Where `found` looks, for people."""
    places = [] if models_dir is None else [str(models_dir)]
    if hf_cache:
        from huggingface_hub.constants import HF_HUB_CACHE

        places.append(f"the Hugging Face cache ({HF_HUB_CACHE}; --models-dir DIR looks elsewhere)")
    return " and ".join(places)


def named_models(models: Sequence[str] | None) -> dict[str, str]:
    """Names, and where the models are: what `MlxEngine` takes. Folders are looked at.

    Raises:
        CommandError: No model, two of one name, or an empty name.
        ModelLoadError: A folder is none of a model.
    """
    from mlx_serving_router.mlx._models import check_folder, is_hub_id
    from mlx_serving_router.mlx._models import named as named_places

    if not models:
        raise CommandError(
            "no model was given: --model NAME=PATH, with the folder of an mlx-lm model or its id on the Hugging Face"
            " Hub, such as --model llama=mlx-community/Llama-3.2-3B-Instruct-4bit"
        )
    named: dict[str, str] = {}
    for option in models:
        name, separator, place = option.partition("=")
        if not separator:
            [(name, _)] = named_places(option).items()
            place = option
        if not name or not place:
            raise CommandError(f"--model {option!r} is not NAME=PATH: the name or the path is empty")
        if name in named:
            raise CommandError(
                f"two models have the name {name!r}: give one of them another, as --model NAME=PATH"
            )
        if not is_hub_id(place):
            check_folder(name, Path(place).expanduser())  # mlx takes seconds to say the same
        named[name] = place
    return named
