"""Compile every Triton kernel for a GPU that need not be there, and print what each program needs.

Usage: python -m tests.kernels.compiled [HEAD_DIM …]

Fails where a kernel keeps more than ``MOST_BESIDE`` bytes of a thread outside its registers, or needs more shared memory than there is.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveal.core.base_mask import BaseMask
from foveal.core.layouts import Groups, KeySelection, Layout
from foveal.kernels.call import AttentionCall
from foveal.kernels.triton import device, ops
from foveal.kernels.triton.work import work_of

TARGET = GPUTarget("cuda", 90, 32)
MOST_BESIDE, MOST_SHARED = 256, 99 << 10
"""Bytes per thread, and per program: consumer GPUs have 99 KiB."""
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TYPES = {
    "fp32": ("factor", "cap", "scale"),
    "*fp32": ("lse", "part_lse", "base", "term", "parts", "grad_k", "grad_v"),
    "*u8": ("valid",),
    "*i64": ("lo", "hi", "q_index", "cu_q", "k_index", "cu_k", "tile_piece", "tile_first", "order", "begins"),
}
ONES = {
    "lists": ("row_heads",),
    "tokens": ("per_row",),
    "groups": ("row_heads", "per_row", "width"),
}
"""Arguments that are 1: for these Triton compiles a kernel of its own."""
STEPS = ("k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row")
"""Strides that heads of 64 and more make multiples of 16, as tensors begin at multiples of 16 bytes."""


def signature(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, str]:
    """The type of every argument, as a call of :mod:`foveal.kernels.triton.ops` passes it."""
    found = dict.fromkeys(kernel.arg_names, "i32")
    found |= dict.fromkeys(("q", "k", "v", "out", "grad_out", "grad_q"), f"*{NAMES[dtype]}")
    found |= {name: kind for kind, names in TYPES.items() for name in names} | dict.fromkeys(constants, "constexpr")
    return {name: found[name] for name in kernel.arg_names}


def compile_one(name: str, kernel: Any, dtype: torch.dtype, options: dict[str, Any]) -> str:
    """Compile a kernel for one kind of layout; what it needs, as a line."""
    constants = {key: value for key, value in options.items() if key in kernel.arg_names}
    constants |= {one: 1 for one in ONES[name] if one in kernel.arg_names}
    types = signature(kernel, dtype, constants)
    even = [kind.startswith("*") or one in STEPS for one, kind in types.items()]
    aligned = {(at,): [["tt.divisibility", 16]] for at, yes in enumerate(even) if yes}
    launch = {key: options[key] for key in ("num_warps", "enable_fp_fusion")}
    built = triton.compile(ASTSource(kernel, types, constants, aligned), target=TARGET, options=launch)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    tile = f"{options['ROWS']:2d}×{options['KEYS']:2d} by {options['num_warps']} warps" if "ROWS" in constants else ""
    line = (
        f"{name:6s} {NAMES[dtype]} {options['DV']:3d} {kernel.__name__:12s} {tile:16s} {found[1]:>3s} registers, "
        f"{found[2]} bytes beside them, {built.metadata.shared} shared"
    )
    assert int(found[2]) <= MOST_BESIDE and built.metadata.shared <= MOST_SHARED, line
    return line


def layouts() -> dict[str, Layout]:
    """Lists of 64 rows, lists of one row and head, and groups that share rows."""
    keys, bounds = torch.arange(256), torch.tensor([0, 256])
    return {
        "lists": KeySelection(keys.view(1, 1, 1, -1), 64, torch.full((1, 64), 256)),
        "tokens": KeySelection(keys.expand(1, 2, 64, -1), 1),
        "groups": Groups(keys % 64, bounds, keys, bounds),
    }


def main() -> None:
    dims = [int(x) for x in sys.argv[1:]] or [64, 128, 256]
    for (name, layout), dtype, dim in itertools.product(layouts().items(), NAMES, dims):
        q, k = torch.zeros(1, 2, 64, dim, dtype=dtype), torch.zeros(1, 1, 256, dim, dtype=dtype)
        call = AttentionCall(q, k, k, layout, BaseMask.build(64, 256, causal=True), 1.0)
        work, seen = work_of(call), ops.seen_of(call)
        for kernel in (device.forward, device.join, device.grad_queries, device.grad_keys):
            backward = kernel in (device.grad_queries, device.grad_keys)
            options = ops.options(work, seen, name == "groups", None, q.view(-1, dim), k.view(-1, dim), backward)
            print(compile_one(name, kernel, dtype, options), flush=True)


if __name__ == "__main__":
    main()
