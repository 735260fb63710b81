"""The commands that look at a fleet or use it: `top`, `chat`, `bench`, `doctor` and `config`.

`top`, `chat` and `bench` are clients of a front-end, over HTTP. This module reads their options; what they do is in
modules of their own, imported when they are needed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_serving_router._terminal import Config, Debug, Nats, Prefix, told

_Url = Annotated[
    str,
    typer.Option(
        "--url", "-u", envvar="MLX_ROUTER_URL", metavar="URL", help="The front-end: http://host:port."
    ),
]
_URL = "http://127.0.0.1:8080"
_Key = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="MLX_ROUTER_API_KEY", metavar="KEY", help="One of its keys, if it wants one."
    ),
]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="NAME", help="The model; may be left out where one alone is served."
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]

_config_app = typer.Typer(help="Check, show and describe configuration files.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (top, chat, bench, doctor):
        app.command()(command)
    app.add_typer(_config_app, name="config")


# === clients of a front-end ===


def top(
    url: _Url = _URL,
    api_key: _Key = None,
    every: Annotated[
        float, typer.Option("--every", min=0.1, metavar="SECONDS", help="How often it is looked at.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    debug: Debug = False,
) -> None:
    """Show workers, breakers, load and requests, live; Ctrl-C ends it."""
    with told(debug=debug):
        from rich.console import Console

        from mlx_serving_router import _client, _top

        console = Console(markup=False, emoji=False, highlight=False)

        async def run() -> None:
            async with _client.FrontEnd(url, api_key) as front_end:
                await _top.top(front_end, console, every=every, once=once or not console.is_terminal)

        asyncio.run(run())


def chat(
    question: Annotated[
        list[str] | None, typer.Argument(help="Asked once; left out: a conversation.", show_default=False)
    ] = None,
    model: _Model = None,
    url: _Url = _URL,
    api_key: _Key = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told at first.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="N", help="The longest answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, metavar="T", help="0: always the likeliest token.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Talk to the fleet. A question, or a text on standard input, or both, is answered with nothing but the answer."""
    with told(debug=debug):
        from mlx_serving_router import _chat, _client

        asked = " ".join(question or ())
        if not sys.stdin.isatty():
            asked = f"{asked}\n\n{sys.stdin.read()}".strip()
            if not asked:
                raise typer.BadParameter(
                    "there is no question: neither an argument nor a text on standard input"
                )
        with asyncio.Runner() as runner:
            front_end = _client.FrontEnd(url, api_key)
            try:
                settings = _chat.Settings(
                    model=runner.run(front_end.choose(model)),
                    system=system,
                    max_tokens=max_tokens,
                    temperature=temperature,
                )
                if asked:
                    runner.run(_chat.ask(front_end, settings, asked))
                    return
                _chat.converse(runner, front_end, settings, lambda text: typer.secho(text, dim=True))
            finally:
                runner.run(front_end.aclose())


def bench(
    model: _Model = None,
    url: _Url = _URL,
    api_key: _Key = None,
    requests: Annotated[
        int, typer.Option("--requests", "-n", min=1, max=1_000_000, metavar="N", help="How many.")
    ] = 100,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, max=10_000, metavar="N", help="How many at a time.")
    ] = 8,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What each asks.")
    ] = "Tell me a story about a lighthouse.",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="The longest answer, in tokens.")
    ] = 64,
    stream: Annotated[
        bool,
        typer.Option("--stream/--no-stream", help="Whether answers are streamed; else no times of tokens."),
    ] = True,
    as_json: _Json = False,
    debug: Debug = False,
) -> None:
    """Put load on the fleet, so many requests at a time, and tell what it made of it."""
    with told(debug=debug):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from mlx_serving_router import _client, _load

        named = TextColumn("{task.description}", markup=False)
        columns = (named, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

        async def run() -> _load.Outcome:
            async with _client.FrontEnd(url, api_key, concurrency=concurrency) as front_end:
                body: dict[str, Any] = {
                    "model": await front_end.choose(model),
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": max_tokens,
                }
                with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                    task = progress.add_task(body["model"], total=requests)
                    return await _load.load(
                        front_end,
                        body,
                        requests=requests,
                        concurrency=concurrency,
                        stream=stream,
                        tell=lambda: progress.advance(task),
                    )

        outcome = asyncio.run(run())
        if as_json:
            typer.echo(json.dumps(outcome.to_dict()))
        else:
            for table in outcome.tables():
                Console(markup=False, emoji=False, highlight=False).print(table)
        if not outcome.succeeded:
            raise typer.Exit(1)


# === a set-up ===


def doctor(
    config: Config = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="NAME=PATH", help="A model to look at. May be repeated."),
    ] = None,
    nats: Nats = None,
    prefix: Prefix = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.3, max=600, metavar="S", help="How long workers may take to answer."),
    ] = 1.0,
    debug: Debug = False,
) -> None:
    """Check versions, configuration, NATS, ports, workers, clocks and models, and say what to do."""
    with told(debug=debug):
        from mlx_serving_router import _command, _doctor

        models = {}
        for option in model or ():
            name, separator, place = option.partition("=")
            models[name] = place if separator else option
        colours = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "wrong": typer.colors.RED}
        wrong = 0
        changes = _command.changes(nats=nats, prefix=prefix)
        for finding in _doctor.examine(config, changes, models, seconds):
            wrong += finding.level == "wrong"
            level = typer.style(f"{finding.level:<7}", fg=colours[finding.level])
            typer.echo(f"{level}{finding.what:<10}{finding.text}")
        if wrong:
            raise typer.Exit(1)


@_config_app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A configuration file, YAML or JSON.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Check a file, with the overrides of the environment: silence and 0, or where it is wrong and 1."""
    with told(debug=debug):
        from mlx_serving_router import _command

        _command.check(_command.load(file), file)


@_config_app.command("show")
def show_config(config: Config = None, debug: Debug = False) -> None:
    """Write all that holds, defaults and overrides of the environment too, as JSON; `***` stands for secrets."""
    with told(debug=debug):
        from mlx_serving_router import _command

        typer.echo(json.dumps(_command.load(config).redacted(), indent=2))


@_config_app.command()
def schema() -> None:
    """Write the JSON Schema of configuration files, for editors."""
    from mlx_serving_router._native import ClusterConfig

    typer.echo(json.dumps(ClusterConfig.json_schema(), indent=2))
