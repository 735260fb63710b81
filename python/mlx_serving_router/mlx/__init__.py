"""The mlx-lm inference engine (extra `[mlx]`): `MlxEngine`, its error, and what finds models on this machine.

Importing this package needs nothing; constructing an `MlxEngine` imports mlx and mlx-lm.
"""

from __future__ import annotations

from mlx_serving_router.mlx._engine import MlxEngine
from mlx_serving_router.mlx._models import ModelLoadError
from mlx_serving_router.mlx._scan import FoundModel, scan_folder, scan_hugging_face_cache

__all__ = ["FoundModel", "MlxEngine", "ModelLoadError", "scan_folder", "scan_hugging_face_cache"]
