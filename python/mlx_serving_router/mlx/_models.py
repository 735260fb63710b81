"""Models: where they are, and how one comes into memory.

Promises that a model which is loaded has computed a token, can be batched and holds nothing that is still to be
computed, so that another thread than the one that loaded it may use it; and that one which cannot be loaded is refused
with what to do about it. Knows nothing about requests, nor who is loaded when (`_residency`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

logger = logging.getLogger("mlx_serving_router.mlx")

Location: TypeAlias = str | os.PathLike[str]

WEIGHTS: Final = "model*.safetensors"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelLoadError(RuntimeError):
    """A model cannot be loaded.

    Attributes:
        model: The name it was to be served under.
        location: The folder or Hugging Face id.
        reason: Why it cannot be loaded.
        missing: Files that a model folder must have and this one has not.
    """

    def __init__(self, model: str, location: str, reason: str, *, missing: Sequence[str] = ()) -> None:
        super().__init__(f"cannot load model {model!r} from {location}: {reason}")
        self.model = model
        self.location = location
        self.reason = reason
        self.missing = tuple(missing)

    def anew(self) -> ModelLoadError:
        """The same error without where it was raised and why: that holds what those functions work with."""
        return ModelLoadError(self.model, self.location, self.reason, missing=self.missing)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory, and what the engine has to know of it."""

    name: str
    nbytes: int
    """What its weights take in memory."""
    model: Any
    tokenizer: Any
    context: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    """Token ids lie below it."""
    decode: Callable[[list[int]], str]
    """The text of token ids, special ones included, just as they are written."""
    end_tokens: frozenset[int]
    """Tokens that end an answer and are no part of it."""

    @classmethod
    def load(cls, name: str, location: Location) -> LoadedModel:
        """Load a model, and let it compute a token: what is damaged shows here, and not in somebody's request.

        Raises:
            ModelLoadError: It is missing or broken, or mlx-lm cannot batch it.
        """
        import mlx_lm

        started = time.monotonic()
        place = os.fspath(location)
        if not is_hub_id(location):
            place = os.fspath(Path(location).expanduser())
            check_folder(name, Path(place))
        try:
            model, tokenizer, config = mlx_lm.load(place, return_config=True)
            vocabulary = _logits_of_one_token(model)
            evaluate(model)
            # The first time may change the tokenizer's settings, which must not be while another thread uses it.
            tokenizer.encode("a", add_special_tokens=False)
            nbytes = _weights_of(model)
        except Exception as error:
            if is_hub_id(location):
                reason = f"no such folder, and the Hugging Face Hub did not give it ({describe(error)})"
            else:
                reason = f"mlx-lm cannot read it; its files may be damaged or too new ({describe(error)})"
            raise ModelLoadError(name, os.fspath(location), reason) from error
        _check_batching(name, location, model)
        logger.info("loaded model %s from %s in %.1f s", name, place, time.monotonic() - started)
        text = {**config, **config.get("text_config", {})}
        return cls(
            name=name,
            nbytes=nbytes,
            model=model,
            tokenizer=tokenizer,
            context=text.get("max_position_embeddings") or 2**31,
            vocabulary=vocabulary,
            decode=_decoder(tokenizer),
            end_tokens=frozenset(tokenizer.eos_token_ids),
        )


def _logits_of_one_token(model: Any) -> int:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    logits = model(mx.array([[0]]), cache=make_prompt_cache(model))
    mx.eval(logits)
    return int(logits.shape[-1])


def _weights_of(model: Any) -> int:
    from mlx.utils import tree_flatten

    leaves: list[Any] = tree_flatten(model.parameters())
    return sum(leaf.nbytes for _, leaf in leaves)


def evaluate(model: Any) -> None:
    """Compute what a model holds beside its parameters, such as frequencies of positions.

    An array that is still to be computed belongs to the thread that made it.
    """
    import mlx.core as mx
    from mlx.nn import Module
    from mlx.utils import tree_flatten

    held = [value for module in model.modules() for value in (*module.values(), *vars(module).values())]
    leaves: list[Any] = tree_flatten(held, is_leaf=lambda value: isinstance(value, Module))
    mx.eval([leaf for _, leaf in leaves if isinstance(leaf, mx.array)])


def _check_batching(name: str, location: Location, model: Any) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    kinds = {type(each) for each in make_prompt_cache(model)}
    unfit = sorted(kind.__name__ for kind in kinds if not hasattr(kind, "merge"))
    if unfit:
        reason = (
            f"mlx-lm cannot answer several requests at a time with it (its caches are {', '.join(unfit)})"
        )
        raise ModelLoadError(name, os.fspath(location), reason)


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """The tokenizer's own way into text, past the layers of Python around it where they add nothing."""
    from transformers import PreTrainedTokenizerBase

    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    fast = getattr(inner, "backend_tokenizer", None)
    if fast is not None and type(inner).decode is PreTrainedTokenizerBase.decode:
        return partial(fast.decode, skip_special_tokens=False)
    decode: Callable[[list[int]], str] = tokenizer.decode
    return decode


# === places ===


def named(models: Mapping[str, Location] | Sequence[Location] | Location) -> dict[str, Location]:
    """Names, and where the models are, of what `MlxEngine` takes.

    Raises:
        ValueError: No model, an empty name, or two models of one name.
    """
    if isinstance(models, Mapping):
        pairs = [(name, location) for name, location in models.items()]
    else:
        places = [models] if isinstance(models, str | os.PathLike) else models
        pairs = [
            (os.fspath(at) if is_hub_id(at) else Path(at).expanduser().resolve().name, at) for at in places
        ]
    locations = dict(pairs)
    if not locations or not all(name for name in locations):
        raise ValueError("models must name at least one model, and no name may be empty")
    if len(locations) < len(pairs):
        raise ValueError("two models have the same name: give a mapping of names to their folders instead")
    return locations


def is_hub_id(location: Location) -> bool:
    """Whether it is to be fetched from the Hugging Face Hub: it looks like an id, and there is no such folder."""
    return (
        isinstance(location, str) and _HUB_ID.fullmatch(location) is not None and not Path(location).exists()
    )


def folder_of(location: Location) -> Path | None:
    """Where a model lies on this machine; `None` where it is still to be fetched."""
    if not is_hub_id(location):
        return Path(location).expanduser()
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(os.fspath(location), "config.json")
    return Path(config).parent if isinstance(config, str) else None


def size_of(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files of a model; of the weights alone, with `WEIGHTS`: about what it takes in memory."""
    return sum(file.stat().st_size for file in folder.glob(pattern) if file.is_file())


def check_folder(name: str, folder: Path) -> None:
    """Refuse, with what to do, a folder that mlx-lm would refuse with an error about something else.

    Raises:
        ModelLoadError: It is no folder of a model.
    """

    def refuse(reason: str, missing: Sequence[str] = ()) -> ModelLoadError:
        advice = "give the folder of an mlx-lm model (mlx_lm.convert makes one) or a Hugging Face id"
        return ModelLoadError(name, os.fspath(folder), f"{reason}; {advice}", missing=missing)

    if not folder.is_dir():
        raise refuse("it is not a folder" if folder.exists() else "there is no such folder")
    needed = {
        "config.json": ("config.json",),
        "model.safetensors": (WEIGHTS,),
        "tokenizer.json": ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.*"),
    }
    missing = [
        file for file, patterns in needed.items() if not any(any(folder.glob(each)) for each in patterns)
    ]
    for file in ("config.json", "model.safetensors.index.json"):
        if (folder / file).exists():
            try:
                shards = json.loads((folder / file).read_bytes()).get("weight_map", {}).values()
            except (ValueError, AttributeError, OSError) as error:
                raise refuse(f"its {file} cannot be read ({describe(error)})") from error
            missing += [shard for shard in sorted(set(shards)) if not (folder / shard).exists()]
    if missing:
        raise refuse(f"it has no {', '.join(missing)}", missing)


def describe(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
