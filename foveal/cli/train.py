"""``foveal train``: recipes that train something small beside a model. Each recipe is a module ``train_<name>`` here."""

from __future__ import annotations

import importlib
import pkgutil

import typer


def add_to(app: typer.Typer) -> None:
    verbs = typer.Typer(no_args_is_help=True, help="Train what a method needs beside a model.")
    verbs.callback()(lambda: None)
    package = importlib.import_module(__package__)
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("train_")):
        importlib.import_module(f"{__package__}.{module}").add_to(verbs)
    app.add_typer(verbs, name="train")
