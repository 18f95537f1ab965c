"""How the C++ kernels behave in a process: threads, forks, large results, the choice of an instruction set, builds."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.layouts import Groups, KeySelection, Layout
from foveal.kernels import native

from ..strategies import random_blocks, random_groups, random_lists
from .compare import attend, gradients, lowered, random_call
from .isas import VARIANTS

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(native.unavailable() is not None, reason=f"native {native.unavailable()}"),
]


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["blocks", "lists", "short lists", "groups"])
def test_runs_are_bitwise_equal_at_a_fixed_number_of_threads(kind: str, kv_heads: int, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    if kind == "blocks":
        mask: Layout = random_blocks(make, 1, 3, 700, 700, (64, 64), True)
    elif kind == "lists":
        mask = random_lists(make, 1, kv_heads, 700, 700, 64, 200, True)
    elif kind == "short lists":  # many in one task
        mask = random_lists(make, 1, kv_heads, 700, 700, 1, 40, True)
    else:
        mask = random_groups(make, (1, 3, kv_heads, 700, 700), 12, True, "softmax")
    call, _ = lowered(random_call(6, (1, 3, kv_heads, 700, 700, 64, 64), mask), dtype)
    for threads in (2, 5):  # more threads than processors, too
        torch.set_num_threads(threads)
        first = [*attend(call, "native"), *gradients(call, "native").values()]
        for _ in range(3):
            again = [*attend(call, "native"), *gradients(call, "native").values()]
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.set_num_threads(1)
    if kind in ("blocks", "short lists"):
        alone = attend(call, "native")
        assert all(torch.equal(a, b) for a, b in zip(first, alone, strict=False)), "forward does not depend on threads"


@pytest.mark.parametrize("kind", ["dense", "lists", "windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_that_no_cache_holds(isa: str, kind: str, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(8)
    rows = 16384 if dtype == torch.float32 else 32768
    q, k, v = (torch.randn(1, 8, n, 64, generator=make).to(dtype) for n in (rows, 96, 96))

    def some(first: int, end: int) -> Tensor:
        count = end - first
        mask: Layout | None = None
        if kind == "lists":
            index = torch.arange(96)[None].expand(count // 64, -1)[None, None, :, :40]
            mask = KeySelection((index + torch.arange(first // 64, end // 64)[:, None]) % 96, 64)
        elif kind == "windows":
            ends = torch.arange(0, count + 1, 2048)
            keys = torch.arange(first // 2048, end // 2048)[:, None] + torch.arange(40)
            mask = Groups(torch.arange(count), ends, keys.flatten(), torch.arange(len(ends)) * 40)
        return foveal.attention(q[:, :, first:end], k, v, mask, impl="native")

    whole = some(0, rows)
    assert whole.numel() * whole.element_size() == 32 << 20
    for first in (0, rows // 2):
        part = some(first, first + rows // 2)
        assert torch.equal(whole[:, :, first : first + rows // 2], part), "as what is written in the ordinary way"


def test_calls_from_many_threads_at_once() -> None:
    call, _ = lowered(random_call(7, (1, 4, 2, 300, 300, 32, 32)), torch.float32)
    torch.set_num_threads(2)
    want = attend(call, "native")[0]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: attend(call, "native")[0], range(48)))
    torch.set_num_threads(1)
    assert all(torch.equal(out, want) for out in found)


FORKED = """
import os, sys, torch, foveal
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 4, 300, 32) for _ in range(3))
want = foveal.attention(q, k, v, causal=True, impl="native")  # the helpers now exist
child = os.fork()
if child == 0:
    out = foveal.attention(q, k, v, causal=True, impl="native")  # torch's own operators may hang in a forked child
    os._exit(0 if out.numpy().tobytes() == want.numpy().tobytes() else 3)
assert os.waitpid(child, 0)[1] == 0, "the forked child failed"
assert torch.equal(foveal.attention(q, k, v, causal=True, impl="native"), want), "the parent failed after the fork"

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return foveal.attention(q, k, v, causal=True, impl="native")

for out in torch.utils.data.DataLoader(Data(), batch_size=1, num_workers=2, multiprocessing_context="fork"):
    assert torch.allclose(out[0], want)
print("fine")
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_fork_and_data_loader_workers() -> None:
    done = python(FORKED)
    assert done.stdout == "fine\n", done.stderr


def test_the_environment_forces_an_instruction_set() -> None:
    code = "import foveal.kernels.native as n; print(n.unavailable(), n._native.variant())"
    for name in VARIANTS:
        assert python(code, FOVEAL_ISA=name).stdout == f"None {name}\n"
    wrong = python("import foveal.kernels.native as n; print(n.unavailable())", FOVEAL_ISA="sse9")
    assert wrong.stdout.startswith("cannot start: FOVEAL_ISA is 'sse9'; this machine runs "), wrong.stderr
    assert VARIANTS[0] in wrong.stdout


def test_a_build_of_older_sources_is_named() -> None:
    code = """
import foveal.kernels.native as n
from foveal.kernels.native import _native
del _native.softmax_rows
print(n.unavailable())
"""
    assert python(code).stdout == "was built from older sources, which have no softmax_rows: reinstall foveal\n"


def test_without_the_compiled_part_everything_else_works() -> None:
    code = """
import sys
sys.modules["foveal.kernels.native._native"] = None
import torch, foveal
from foveal.core.info import info
q = torch.randn(1, 2, 20, 16)
said = foveal.explain(q, q, q, causal=True)
assert said.impl == "sdpa", said
print(said.refused["native"][0] == info()["implementations"]["native"]["problem"], said.refused["native"][0])
"""
    done = python(code)
    assert done.stdout.startswith("True needs its C++ part"), done.stderr
    assert "install g++ or clang" in done.stdout
