"""The command line, and its commands that serve: `up`, `serve`, `worker`, and `models`. Needs the extra `[cli]`.

It reads options and picks the configuration. What the commands do is in `_up`, `_serve` and `_work`, imported when
they are needed: `worker` needs no web server, `serve` no model. The commands that look at a fleet or use it are in
`_tools`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer

    from mlx_serving_router import _tools
    from mlx_serving_router._terminal import Config, Debug, Nats, Prefix, show, told
except ImportError as error:
    sys.exit(
        f'mlx-serving-router: the command line needs more ({error}): pip install "mlx-serving-router[cli]"'
    )

from mlx_serving_router._models import parse_bytes

if TYPE_CHECKING:
    from mlx_serving_router._serve import Address
    from mlx_serving_router.nats_server import NatsServer

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# === options ===

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
_Host = Annotated[str | None, typer.Option("--host", help="Address of the front-end.")]
_Port = Annotated[
    int | None, typer.Option("--port", "-p", min=0, max=65535, help="Port of the front-end; 0: any free one.")
]
_Concurrent = Annotated[
    int | None,
    typer.Option("--max-concurrent", min=1, metavar="N", help="Requests that a worker takes at a time."),
]
_ModelsDir = Annotated[
    Path | None,
    typer.Option(
        "--models-dir", metavar="DIR", help="A folder of models, each served under its path below it."
    ),
]
_HfCache = Annotated[
    bool,
    typer.Option(
        "--hf-cache", help="The models in the local cache of the Hugging Face Hub, under their ids."
    ),
]
_PromptCache = Annotated[
    int | None,
    typer.Option(
        "--prompt-cache",
        parser=parse_bytes,
        metavar="BYTES",
        help="Memory for what was computed for earlier prompts; 0 keeps nothing.",
    ),
]
_MemorySoft = Annotated[
    int | None,
    typer.Option(
        "--memory-soft",
        parser=parse_bytes,
        metavar="BYTES",
        help="Memory in use beyond which caches and idle models are given up, and requests of low priority refused.",
    ),
]
_MemoryHard = Annotated[
    int | None,
    typer.Option(
        "--memory-hard",
        parser=parse_bytes,
        metavar="BYTES",
        help="Memory in use beyond which all requests are refused.",
    ),
]


def _version(wanted: bool) -> None:  # noqa: FBT001 typer's
    if wanted:
        from mlx_serving_router._native import VERSION

        typer.echo(f"mlx-serving-router {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and end."),
    ] = False,
) -> None:
    """One OpenAI API in front of a fleet of mlx-lm workers."""


# === commands ===


@app.command()
def worker(
    model: _Models = None,
    models_dir: _ModelsDir = None,
    hf_cache: _HfCache = False,
    nats: Nats = None,
    worker_id: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="ID", help="Its name: 1 to 64 letters, digits, - and _; made where left out."
        ),
    ] = None,
    config: Config = None,
    max_concurrent: _Concurrent = None,
    pre_warm: Annotated[
        list[str] | None,
        typer.Option(
            "--pre-warm",
            metavar="NAME",
            help="A model to load at the start; left out: those of --model. May be repeated.",
        ),
    ] = None,
    register_when: Annotated[
        str | None,
        typer.Option(
            "--register-when",
            metavar="WHEN",
            help="When to join the fleet: complete, when those are loaded or have failed, or warming, at once.",
        ),
    ] = None,
    load_timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout-per-model",
            metavar="SECONDS",
            help="A model that takes longer to load counts as failed.",
        ),
    ] = None,
    prefill_step_size: Annotated[
        int | None,
        typer.Option(
            "--prefill-step-size",
            min=1,
            metavar="N",
            help="Tokens of prompts computed between two tokens of the answers beside them.",
        ),
    ] = None,
    prompt_cache: _PromptCache = None,
    memory_soft: _MemorySoft = None,
    memory_hard: _MemoryHard = None,
    prefix: Prefix = None,
    debug: Debug = False,
) -> None:
    """Serve models with mlx-lm, as a worker of the fleet on a NATS server.

    Models are given with --model, or found with --models-dir and --hf-cache; one that is not in memory is loaded when a
    request asks for it. BYTES is a number, alone or with K, M, G or T: 16G.
    """
    with told(debug=debug):
        from mlx_serving_router import _command, _logging, _models, _work

        settings = _command.changed(_command.load(config), _command.changes(nats=nats, prefix=prefix))
        _logging.configure(settings.to_dict()["logging"], name=worker_id or "worker", debug=debug)
        engine = _models.engine(
            model,
            settings,
            models_dir=models_dir,
            hf_cache=hf_cache,
            pre_warm=pre_warm,
            register_when=register_when,
            load_timeout=load_timeout,
            max_concurrent=max_concurrent,
            prefill_step_size=prefill_step_size,
            prompt_cache_bytes=prompt_cache,
            memory_soft_bytes=memory_soft,
            memory_hard_bytes=memory_hard,
        )
        asyncio.run(_work.work(engine, settings, worker_id=worker_id))


@app.command()
def models(models_dir: _ModelsDir = None, hf_cache: _HfCache = False, debug: Debug = False) -> None:
    """List the models on this machine that a worker can serve: of a folder, or of the Hugging Face cache."""
    with told(debug=debug):
        from mlx_serving_router import _models

        hf_cache = hf_cache or models_dir is None
        listed = _models.found(models_dir, hf_cache=hf_cache)
        for found in listed:
            typer.echo(f"{found.nbytes / 1e9:8.2f} GB  {found.name}  {found.path}")
        if not listed:
            typer.echo(f"no model was found in {_models.where(models_dir, hf_cache=hf_cache)}", err=True)


@app.command()
def serve(
    config: Config = None,
    host: _Host = None,
    port: _Port = None,
    nats: Nats = None,
    prefix: Prefix = None,
    debug: Debug = False,
) -> None:
    """Run the controller and its web front-end; workers join over NATS, or are servers of the configuration."""
    with told(debug=debug):
        from mlx_serving_router import _command, _logging, _serve

        changes = _command.changes(nats=nats, prefix=prefix, host=host, port=port)
        settings = _command.changed(_command.load(config), changes)
        _command.check(settings, config)
        shown = settings.to_dict()
        _logging.configure(shown["logging"], name="controller", debug=debug)
        address = _serve.listen(shown["controller"]["bindAddress"], shown["controller"]["port"])

        def announce(server: NatsServer | None) -> None:
            _show_addresses(address, shown["controller"])
            if server is not None:
                _show_server(server)
                show("a worker", f"mlx-serving-router worker --nats {server.url} --model NAME=PATH")
            elif shown["nats"]["mode"] == "none" and not shown["workers"]["static"]:
                show(
                    "warning",
                    "nats.mode is none and workers.static is empty: no worker can ever join, and nothing can be"
                    " answered; set nats.mode to embedded or external, or name servers in workers.static",
                )
            for worker in shown["workers"]["static"]:
                show("asks", f"{worker['url']} as {worker['workerId']}")
            known = [model for worker in shown["workers"]["static"] for model in worker["models"] or ()]
            name = known[0].partition("=")[0] if known else "NAME"
            _show_trial(address, name, shown["controller"])

        asyncio.run(_serve.serve(settings, address, announce))


@app.command()
def up(
    model: _Models = None,
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="Worker processes.")] = 1,
    config: Config = None,
    host: _Host = None,
    port: _Port = None,
    max_concurrent: _Concurrent = None,
    prefix: Prefix = None,
    debug: Debug = False,
) -> None:
    """Run all of it on this machine: a NATS server, worker processes, the controller and its web front-end.

    With `mode: controller` in the configuration it is all but the workers, with `mode: worker` the workers alone.
    """
    with told(debug=debug):
        from mlx_serving_router import _command, _logging, _models

        changes = _command.changes(prefix=prefix, host=host, port=port)
        loaded = _command.load(config)
        mode = loaded.to_dict()["mode"]
        own_nats = config is None and not any(name.startswith("MLX_ROUTER__NATS") for name in os.environ)
        if mode == "both" and own_nats:
            # Nobody has to know where the server is.
            changes.setdefault("nats", {})["embedded"] = {"port": 0}
        settings = _command.changed(loaded, changes)
        _command.check(settings, config)
        shown = settings.to_dict()
        _logging.configure(shown["logging"], name="up" if mode == "worker" else "controller", debug=debug)
        named = {} if mode == "controller" else _models.named_models(model)
        if shown["nats"]["mode"] == "none" and named:
            raise _command.CommandError(
                "worker processes are reached over NATS, and the configuration has nats.mode: none; use embedded or"
                " external"
            )

        from mlx_serving_router import _serve, _up

        options = _worker_options(named, config, prefix, max_concurrent, debug=debug)
        if mode == "worker":
            show("mode", "worker: no controller and no front-end here")
            show("workers", f"{workers} started; each loads {', '.join(named)}")
            asyncio.run(_up.workers_alone(workers, options))
            return
        address = _serve.listen(shown["controller"]["bindAddress"], shown["controller"]["port"], search=True)
        if address.moved_from is not None:
            show("note", f"port {address.moved_from} is taken by another program; using the next free one")

        def announce(server: NatsServer | None) -> None:
            _show_addresses(address, shown["controller"])
            if server is not None:
                _show_server(server)
            if named:
                show("workers", f"{workers} started; each loads {', '.join(named)}")

        def tell_online(count: int) -> None:
            show("online", f"{count} of {workers} workers")
            if count == 1:
                _show_trial(address, next(iter(named)), shown["controller"])
                show("to end", "Ctrl-C")

        if mode == "controller":
            show(
                "mode",
                "controller: no worker is started here" + (", and --model has no effect" if model else ""),
            )
            asyncio.run(_serve.serve(settings, address, announce))
            return
        asyncio.run(
            _up.up(
                settings,
                address,
                workers=workers,
                worker_options=options,
                announce=announce,
                tell_online=tell_online,
            )
        )


_tools.add_to(app)

# === options into configuration ===


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


def _show_addresses(address: Address, controller: dict[str, Any]) -> None:
    show("OpenAI", f"{address.url}/v1")
    show("fleet", f"{address.url}/api/cluster/status")
    show("requests", f"{address.url}/api/controller/requests")
    port = controller["metricsPort"]
    metrics = address.url if port is None else f"http://{controller['bindAddress']}:{port}"
    show("metrics", "on a free port, which the log names" if port == 0 else f"{metrics}/metrics")


def _show_server(server: NatsServer) -> None:
    show("NATS", f"{server.url} ({'it was there already' if server.joined else f'process {server.pid}'})")


def _show_trial(address: Address, model: str, controller: dict[str, Any]) -> None:
    from mlx_serving_router import _serve

    with_key = bool(controller["apiKeys"])
    show("to try", _serve.curl_line(address.url, model, with_key=with_key))
    key = ' --api-key "$API_KEY"' if with_key else ""
    show("or", f"mlx-serving-router chat --url {address.url}{key}")
