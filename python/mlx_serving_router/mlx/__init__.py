"""The mlx-lm inference engine (extra `[mlx]`): `MlxEngine`, and what it raises when a model cannot be loaded.

Importing this package needs nothing; constructing an `MlxEngine` imports mlx and mlx-lm.
"""

from __future__ import annotations

from mlx_serving_router.mlx._engine import MlxEngine
from mlx_serving_router.mlx._models import ModelLoadError

__all__ = ["MlxEngine", "ModelLoadError"]
