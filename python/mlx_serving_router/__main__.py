"""The command `mlx-serving-router`, and `python -m mlx_serving_router`."""

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from mlx_serving_router.cli import app  # half a second, in which somebody may press Ctrl-C
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="mlx-serving-router")


if __name__ == "__main__":
    main()
