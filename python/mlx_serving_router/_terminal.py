"""What the commands have in common: options, lines of two columns, and failures told in one message with what to do."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import click
import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

# === options ===

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file, YAML or JSON (docs/configuration.md)."),
]
Nats = Annotated[str | None, typer.Option("--nats", metavar="URL", help="The NATS server: nats://host:4222.")]
Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix", metavar="PREFIX", help="Subject prefix of the fleet, with a dot at its end: team-a."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Log everything, and show tracebacks.")]

# === what is shown ===

#: What to do on the command line, beside what the error itself says.
_ADVICE: Final = {"NATS_ERROR": "--nats URL names another server", "WORKER_OFFLINE": "--id names a worker"}


def show(what: str, text: str) -> None:
    """Write a line: what it is about, and what is so."""
    typer.echo(f"{what:<10}{text}")


@contextlib.contextmanager
def told(*, debug: bool) -> Iterator[None]:
    """Tell every failure in one message and exit with status 1; `debug` adds the traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # whoever read our output has gone: the interpreter knows what to do
    except (typer.Exit, click.ClickException):
        raise
    except Exception as error:  # noqa: BLE001 whatever it is, a person reads it
        if debug:
            traceback.print_exception(error)
        typer.echo(f"mlx-serving-router: {_describe(error)}", err=True)
        raise typer.Exit(1) from None


def _describe(error: Exception) -> str:
    from mlx_serving_router._client import AnswerError
    from mlx_serving_router._command import CommandError
    from mlx_serving_router._errors import ConfigError, ControllerError
    from mlx_serving_router.mlx import ModelLoadError
    from mlx_serving_router.nats_server import NatsServerError

    if isinstance(error, AnswerError):
        return f"{error.code}: {error}"
    if isinstance(error, ControllerError):
        advice = _ADVICE.get(str(error.code))
        return f"{error.message}; {advice}" if advice else error.message
    if isinstance(
        error, CommandError | ConfigError | ModelLoadError | NatsServerError | ImportError | ValueError
    ):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where it comes from)"
