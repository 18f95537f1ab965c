"""The command ``foveal``: thin verbs that parse, call and print; heavy modules load only when a verb needs them."""

from .app import app, main

__all__ = ["app", "main"]
