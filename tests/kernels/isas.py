"""The instruction sets of the native kernels, for tests that hold on each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from foveal.kernels import native

VARIANTS: list[str] = []
if native.unavailable() is None:
    from foveal.kernels.native import _native

    VARIANTS = _native.variants()


@contextmanager
def on(name: str) -> Iterator[None]:
    """Run the block with one of ``VARIANTS``."""
    before = _native.variant()
    _native.choose(name)
    yield
    _native.choose(before)
