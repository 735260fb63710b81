"""`python -m mlx_serving_router`: the same as the command `mlx-serving-router`."""

from mlx_serving_router.cli import main

if __name__ == "__main__":
    main()
