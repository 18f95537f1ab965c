"""The root of the command: its verbs, ``--version`` and ``--debug``."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from . import bench, compress, info, inspect, papers, patterns, reproduce, run, simulate, steer, train, tune
from . import eval as evaluate
from .guard import DEBUG, GuardedGroup

app = typer.Typer(
    name="foveal",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: foveal tune smollm2 --context 4096",
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"foveal {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also FOVEAL_DEBUG=1).")
    ] = False,
) -> None:
    """Find out which attention your model should use: measured on your model, your text and your machine."""
    if debug:
        os.environ[DEBUG] = "1"


for verb in (tune, run, evaluate, inspect, steer, bench, papers, reproduce, patterns, simulate, train, compress, info):
    verb.add_to(app)


def main() -> None:
    """Entry point of the command ``foveal``; ``--debug`` may stand anywhere before ``--``."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    if "--debug" in words[:end]:
        words = ["--debug", *[w for w in words[:end] if w != "--debug"], *words[end:]]
    app(args=words, prog_name="foveal")
