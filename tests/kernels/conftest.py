"""Fixtures of the native kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .isas import VARIANTS, on


@pytest.fixture(params=VARIANTS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine runs, in turn."""
    with on(request.param):
        yield request.param
