"""Settings that all tests share: reproducible property tests, no uninitialised memory that happens to hold zeros,
and Triton kernels on CPU where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "foveal",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("foveal")


@pytest.fixture(scope="module", autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread: small tensors run many times faster, above all on a busy machine.

    A module that runs a real model sets ``THREADS = None`` (torch's default) or a number.
    """
    wanted, before = getattr(request.module, "THREADS", 1), torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def poison() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN, so that reading memory which nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "this torch does not fill uninitialised memory"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
