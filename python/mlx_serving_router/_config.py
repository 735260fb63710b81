"""What stands for a configuration wherever one is taken."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mlx_serving_router._native import ClusterConfig

__all__ = ["as_config"]


def as_config(value: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None) -> ClusterConfig:
    """The configuration that is meant.

    Args:
        value: One as it is; a dictionary of the file's shape; the path of a file, whose values the environment
            (`MLX_ROUTER__…`) overrides; or nothing: the defaults with the overrides of the environment.

    Raises:
        ConfigError: It is no valid configuration.
        TypeError: It is none of these.
    """
    if value is None:
        return ClusterConfig.from_environment()
    if isinstance(value, ClusterConfig):
        return value
    if isinstance(value, Mapping):
        return ClusterConfig.from_dict(value)
    if isinstance(value, str | os.PathLike):
        return ClusterConfig.load(value)
    raise TypeError(
        f"a configuration is a ClusterConfig, a dict, the path of a file, or None, not {type(value).__name__}"
    )
