"""The command line: `mlx-serving-router up`, `serve` and `worker`. Needs the extra `[cli]`.

It reads options, picks the configuration, and tells every failure in one message that says what to do. What the
commands do is in `_up`, `_serve` and `_work`, imported when they are needed: `worker` needs no web server, `serve` no
model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

try:
    import typer
except ImportError:
    sys.exit('mlx-serving-router: the command line needs typer: pip install "mlx-serving-router[cli]"')

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_serving_router._serve import Address
    from mlx_serving_router.nats_server import NatsServer

__all__ = ["app", "main"]

app = typer.Typer(
    help="One OpenAI API in front of a fleet of mlx-lm workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# === options ===

_Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file, YAML or JSON (docs/configuration.md)."),
]
_Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME=PATH",
        help="A model and the name it is served under; or its folder, or its id on the Hugging Face Hub, alone."
        " May be repeated.",
    ),
]
_Nats = Annotated[
    str | None, typer.Option("--nats", metavar="URL", help="The NATS server: nats://host:4222.")
]
_Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix", metavar="PREFIX", help="Subject prefix of the fleet, with a dot at its end: team-a."
    ),
]
_Host = Annotated[str | None, typer.Option("--host", help="Address of the front-end.")]
_Port = Annotated[
    int | None, typer.Option("--port", "-p", min=0, max=65535, help="Port of the front-end; 0: any free one.")
]
_Concurrent = Annotated[
    int | None,
    typer.Option("--max-concurrent", min=1, metavar="N", help="Requests that a worker takes at a time."),
]
_Debug = Annotated[bool, typer.Option("--debug", help="Log everything, and show tracebacks.")]

# === commands ===


@app.command()
def worker(
    model: _Models = None,
    nats: _Nats = None,
    worker_id: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="ID", help="Its name: 1 to 64 letters, digits, - and _; made where left out."
        ),
    ] = None,
    config: _Config = None,
    max_concurrent: _Concurrent = None,
    prefix: _Prefix = None,
    debug: _Debug = False,
) -> None:
    """Serve models with mlx-lm, as a worker of the fleet on a NATS server."""
    with _told(debug=debug):
        from mlx_serving_router import _command, _logging

        settings = _command.changed(_command.load(config), _changes(nats=nats, prefix=prefix))
        _logging.configure(settings.to_dict()["logging"], name=worker_id or "worker", debug=debug)
        models = _named_models(model)

        from mlx_serving_router import _work
        from mlx_serving_router.mlx import MlxEngine

        limits = {} if max_concurrent is None else {"max_concurrent": max_concurrent}
        asyncio.run(_work.work(MlxEngine(models, **limits), settings, worker_id=worker_id))


@app.command()
def serve(
    config: _Config = None,
    host: _Host = None,
    port: _Port = None,
    nats: _Nats = None,
    prefix: _Prefix = None,
    debug: _Debug = False,
) -> None:
    """Run the controller and its web front-end; workers join over NATS, or are servers of the configuration."""
    with _told(debug=debug):
        from mlx_serving_router import _command, _logging, _serve

        changes = _changes(nats=nats, prefix=prefix, host=host, port=port)
        settings = _command.changed(_command.load(config), changes)
        shown = settings.to_dict()
        _logging.configure(shown["logging"], name="controller", debug=debug)
        address = _serve.listen(shown["controller"]["bindAddress"], shown["controller"]["port"])

        def announce(server: NatsServer | None) -> None:
            _show_addresses(address)
            if server is not None:
                _show_server(server)
                _show("a worker", f"mlx-serving-router worker --nats {server.url} --model NAME=PATH")
            elif shown["nats"]["mode"] == "none" and not shown["workers"]["static"]:
                _show("note", "nats.mode is none: no worker of another process can join")
            for worker in shown["workers"]["static"]:
                _show("asks", f"{worker['url']} as {worker['workerId']}")
            _show(
                "to try", _serve.curl_line(address.url, "NAME", with_key=bool(shown["controller"]["apiKeys"]))
            )

        asyncio.run(_serve.serve(settings, address, announce))


@app.command()
def up(
    model: _Models = None,
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="Worker processes.")] = 1,
    config: _Config = None,
    host: _Host = None,
    port: _Port = None,
    max_concurrent: _Concurrent = None,
    prefix: _Prefix = None,
    debug: _Debug = False,
) -> None:
    """Run all of it on this machine: a NATS server, worker processes, the controller and its web front-end."""
    with _told(debug=debug):
        from mlx_serving_router import _command, _logging

        changes = _changes(prefix=prefix, host=host, port=port)
        if config is None and not any(name.startswith("MLX_ROUTER__NATS") for name in os.environ):
            # Nobody has to know where the server is.
            changes.setdefault("nats", {})["embedded"] = {"port": 0}
        settings = _command.changed(_command.load(config), changes)
        shown = settings.to_dict()
        _logging.configure(shown["logging"], name="controller", debug=debug)
        models = _named_models(model)
        if shown["nats"]["mode"] == "none":
            raise _command.CommandError(
                "worker processes are reached over NATS, and the configuration has nats.mode: none; use embedded or"
                " external"
            )

        from mlx_serving_router import _serve, _up

        address = _serve.listen(shown["controller"]["bindAddress"], shown["controller"]["port"], search=True)
        if address.moved_from is not None:
            _show("note", f"port {address.moved_from} is taken by another program; using the next free one")

        def announce(server: NatsServer | None) -> None:
            _show_addresses(address)
            if server is not None:
                _show_server(server)
            _show("workers", f"{workers} started; each loads {', '.join(models)}")

        def tell_online(count: int) -> None:
            _show("online", f"{count} of {workers} workers")
            if count == 1:
                line = _serve.curl_line(
                    address.url, next(iter(models)), with_key=bool(shown["controller"]["apiKeys"])
                )
                _show("to try", line)
                _show("to end", "Ctrl-C")

        asyncio.run(
            _up.up(
                settings,
                address,
                workers=workers,
                worker_options=_worker_options(models, config, prefix, max_concurrent, debug=debug),
                announce=announce,
                tell_online=tell_online,
            )
        )


# === options into configuration ===


def _changes(
    *,
    nats: str | None = None,
    prefix: str | None = None,
    host: str | None = None,
    port: int | None = None,
) -> dict[str, Any]:
    """The keys of the configuration that the options set."""
    mode = None if nats is None else "external"
    sections: dict[str, dict[str, Any]] = {
        "nats": {"mode": mode, "serverUrl": nats, "subjectPrefix": prefix},
        "controller": {"bindAddress": host, "port": port},
    }
    given = {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in sections.items()
    }
    return {section: keys for section, keys in given.items() if keys}


def _named_models(models: Sequence[str] | None) -> dict[str, str]:
    """Names, and where the models are: what `MlxEngine` takes. Folders are looked at."""
    from mlx_serving_router._command import CommandError
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


def _worker_options(
    models: dict[str, str],
    config: Path | None,
    prefix: str | None,
    max_concurrent: int | None,
    *,
    debug: bool,
) -> list[str]:
    options = [f"--model={name}={place}" for name, place in models.items()]
    for option, value in (("--config", config), ("--prefix", prefix), ("--max-concurrent", max_concurrent)):
        if value is not None:
            options += [option, str(value)]
    return [*options, "--debug"] if debug else options


# === what is shown ===


def _show(what: str, text: str) -> None:
    typer.echo(f"{what:<10}{text}")


def _show_addresses(address: Address) -> None:
    _show("OpenAI", f"{address.url}/v1")
    _show("fleet", f"{address.url}/api/cluster/status")
    _show("requests", f"{address.url}/api/controller/requests")
    _show("metrics", f"{address.url}/metrics")


def _show_server(server: NatsServer) -> None:
    _show("NATS", f"{server.url} ({'it was there already' if server.joined else f'process {server.pid}'})")


# === failures ===

#: What to do on the command line, beside what the error itself says.
_ADVICE: Final = {"NATS_ERROR": "--nats URL names another server", "WORKER_OFFLINE": "--id names a worker"}


@contextlib.contextmanager
def _told(*, debug: bool) -> Iterator[None]:
    """Tells every failure in one message and exits with status 1; `--debug` adds the traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:  # noqa: BLE001 whatever it is, a person reads it
        if debug:
            traceback.print_exception(error)
        typer.echo(f"mlx-serving-router: {_describe(error)}", err=True)
        raise typer.Exit(1) from None


def _describe(error: Exception) -> str:
    from mlx_serving_router._command import CommandError
    from mlx_serving_router._errors import ConfigError, ControllerError
    from mlx_serving_router.mlx import ModelLoadError
    from mlx_serving_router.nats_server import NatsServerError

    if isinstance(error, ControllerError):
        advice = _ADVICE.get(str(error.code))
        return f"{error.message}; {advice}" if advice else error.message
    if isinstance(
        error, CommandError | ConfigError | ModelLoadError | NatsServerError | ImportError | ValueError
    ):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where it comes from)"


def main() -> None:
    """Runs the command line."""
    app(prog_name="mlx-serving-router")
