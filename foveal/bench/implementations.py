"""Implementations of attention that the benchmark of kernels compares: ours, torch's, and what else is installed.

Each says what it supports (:func:`Implementation.refusal`), builds whatever it needs for a mask once (:func:`Implementation.prepare`,
not timed with the calls), and then runs ``q, k, v → out``. The packages for CUDA are in ``implementations_cuda``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, nearest
from ..core.layouts import BlockMask, narrow
from ..core.machine import memory_gb
from ..kernels import flex as foveal_flex
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute, refusals
from .workload import BACKWARD, Work

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(1, H, T, D), (1, Hkv, T, D), (1, Hkv, T, D) → (1, H, T, D)``"""


@dataclass(frozen=True)
class Prepared:
    """An implementation ready for one mask.

    Attributes:
        run: one call. metadata: bytes of what was built for the mask.
        note: what a reader of its figures should know. heads_last: wants memory ordered ``(1, T, H, D)``.
    """

    run: Run
    metadata: int = 0
    note: str = ""
    heads_last: bool = False


class Implementation:
    """One way to compute attention."""

    name: str
    what: str
    everywhere: bool = True
    """Part of ``auto`` where it is available; otherwise only when named."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        return None

    def refusal(self, work: Work) -> str | None:
        """Why it cannot run this case, or None."""
        return None

    def prepare(self, work: Work) -> Prepared:
        """Build what the mask needs."""
        raise NotImplementedError


def attention_call(work: Work) -> AttentionCall:
    """The case as foveal's kernels take it."""
    layout, base = work.mask.layout(work.q.shape[1], work.q.device)
    return AttentionCall(work.q, work.k, work.v, layout, base, work.q.shape[-1] ** -0.5, return_lse=False)


def size_of(*things: Any) -> int:
    """Bytes of the tensors in these tensors, block masks and interval masks."""
    total = 0
    for thing in things:
        if isinstance(thing, BlockMask):
            total += size_of(*thing.as_tuple())
        elif isinstance(thing, BaseMask):
            total += size_of(thing.lo, thing.hi, thing.valid)
        elif isinstance(thing, Tensor):
            total += thing.numel() * thing.element_size()
    return total


class Ours(Implementation):
    """A kernel of foveal by its name."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    def unavailable(self, device: torch.device) -> str | None:
        q = torch.empty(1, 1, 16, 16, device=device)
        base = BaseMask.build(16, 16, causal=False, device=device)
        return "; ".join(refusals(self.name, AttentionCall(q, q, q, None, base, 1.0, return_lse=False))) or None

    def refusal(self, work: Work) -> str | None:
        return "; ".join(refusals(self.name, attention_call(work))) or None

    def prepare(self, work: Work) -> Prepared:
        call = attention_call(work)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return compute(call.replace(q=q, k=k, v=v), self.name)[0]

        return Prepared(run, size_of(call.layout, call.base))


class Flex(Implementation):
    """Compiled FlexAttention, its ``BlockMask`` built once."""

    name, what = "flex", "torch's FlexAttention, compiled for every case (about a minute on CPU)"

    def __init__(self) -> None:
        self.everywhere = torch.cuda.is_available()

    def unavailable(self, device: torch.device) -> str | None:
        return foveal_flex.unavailable()

    def refusal(self, work: Work) -> str | None:
        return "; ".join(foveal_flex.refusals(attention_call(work))) or None

    def prepare(self, work: Work) -> Prepared:
        from torch._functorch import config
        from torch.nn.attention.flex_attention import flex_attention

        call = attention_call(work)
        mask = narrow(call.layout, call.base, transpose=work.direction == BACKWARD)  # type: ignore[arg-type]
        torch._dynamo.reset()  # a limit on recompilations would send later cases to the uncompiled form
        config.donated_buffer = False  # the graph is kept, so that the backward pass can be timed alone
        compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return compiled(q, k, v, block_mask=mask, scale=call.scale, enable_gqa=work.groups > 1)

        return Prepared(run, size_of(mask), "compiled before it is timed")


class Sdpa(Implementation):
    """Torch's ``scaled_dot_product_attention`` with a backend, or with the one that torch picks.

    Masks other than full and causal become a dense N×N tensor, which is built once.
    """

    def __init__(self, backend: str | None, what: str) -> None:
        self.name = "sdpa" if backend is None else f"sdpa-{backend}"
        self.what, self.backend = what, backend
        self.everywhere = backend is None or (backend != "math" and torch.cuda.is_available())

    def unavailable(self, device: torch.device) -> str | None:
        if self.backend in ("efficient", "cudnn") and device.type != "cuda":
            return "runs on CUDA only"
        return None

    def refusal(self, work: Work) -> str | None:
        dense = self._dense(work)
        if dense and self.backend == "flash" and work.q.device.type == "cuda":
            return "takes no mask on CUDA except causal; this one would need a dense tensor"
        pairs = work.mask.length**2
        need = pairs * self._masks(work) * (1 + work.q.element_size()) if dense else 0
        if self.backend == "math":
            need += 3 * pairs * work.q.shape[1] * max(4, work.q.element_size())
        room = free_memory(work.q.device)
        if room is not None and need > room / 2:
            what = "scores" if self.backend == "math" else "dense mask"
            return f"its {what} would take about {need / 2**30:.1f} GiB, more than half of the {room / 2**30:.1f} GiB there are"
        return None

    @staticmethod
    def _dense(work: Work) -> bool:
        plain = work.mask.plain()
        return plain is None or plain.window != (-1, -1) or bool(plain.documents)

    @staticmethod
    def _masks(work: Work) -> int:
        return work.q.shape[1] if work.mask.heads > 1 else 1

    def prepare(self, work: Work) -> Prepared:
        kinds = {
            "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        }  # fmt: skip
        plain, mask = work.mask.plain(), None
        if self._dense(work):
            mask = work.mask.pairs(torch.arange(work.mask.length, device=work.q.device))
            if mask.shape[0] > 1:
                mask = mask.repeat_interleave(work.groups, 0)
            mask = mask[None]
        options: dict[str, Any] = {
            "attn_mask": mask,
            "is_causal": mask is None and plain is not None and plain.causal,
            "enable_gqa": work.groups > 1,
        }

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.backend is None:
                return sdpa(q, k, v, **options)
            with sdpa_kernel(kinds[self.backend]):
                return sdpa(q, k, v, **options)

        return Prepared(run, size_of(mask), "with a dense mask" if mask is not None else "")


def free_memory(device: torch.device) -> float | None:
    """Bytes that can still be had, None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return 1024.0 * found["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        total = memory_gb()
        return None if total is None else 1e9 * total


def implementations() -> dict[str, Implementation]:
    """All implementations by name, in the order of tables."""
    from .implementations_cuda import FlashAttn, FlashInfer, Natten

    found: list[Implementation] = [
        Ours("native", "foveal's C++ kernels"),
        Ours("gather", "foveal's block-sparse attention in plain PyTorch"),
        Sdpa(None, "torch's SDPA, the backend that torch picks"),
        Sdpa("math", "torch's SDPA, plain matrix products"),
        Sdpa("flash", "torch's SDPA, FlashAttention backend"),
        Sdpa("efficient", "torch's SDPA, memory-efficient backend"),
        Sdpa("cudnn", "torch's SDPA, cuDNN backend"),
        Flex(),
        FlashAttn(),
        Natten(),
        FlashInfer(),
    ]
    return {one.name: one for one in found}


def choose(names: Iterable[str], device: torch.device | str) -> tuple[list[Implementation], dict[str, str]]:
    """The implementations that a user named, and why others are left out.

    Args:
        names: names; ``auto`` is what runs here, without what is very slow (torch's math backend, compiling on CPU); ``all`` adds these.
        device: where they run.

    Returns:
        ``(implementations, {name: reason})``; a reason for each that was meant and cannot run on this machine.

    Raises:
        ConfigError: an unknown name, or nothing that runs here.
    """
    known, device = implementations(), torch.device(device)
    wanted: dict[str, None] = {}
    for name in names:
        if name == "all":
            wanted.update(dict.fromkeys(known))
        elif name == "auto":
            wanted.update(dict.fromkeys(n for n, one in known.items() if one.everywhere))
        elif name in known:
            wanted[name] = None
        else:
            raise ConfigError(f"implementation {name!r} is unknown. {nearest(name, [*known, 'auto', 'all'])}")
    absent = {name: why for name in wanted if (why := known[name].unavailable(device)) is not None}
    chosen = [one for name, one in known.items() if name in wanted and name not in absent]
    if not chosen:
        reasons = "; ".join(f"{name} {why}" for name, why in absent.items())
        raise ConfigError(f"no implementation runs on {device}: {reasons or 'none is named'}. Name others with --impl.")
    return chosen, absent
