"""What decoding costs in eFLOPs: arithmetic plus memory traffic at the device's FLOP per byte (Kinetics, arXiv 2506.05333).

Reading the cache grows with the square of the generated length, so it soon outweighs the parameters; with a budget of
``B`` keys it grows linearly. The terms are the authors' (``cost_model/utils.py``), with the sign of their top-k term corrected.
Prefill, weight reads, activations and sampling are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..core.errors import ConfigError, nearest

Combine = Literal["sum", "max"]
Search = Literal["floor", "exact"]


def at_least(name: str, value: float, least: float) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a finite number from ``least``."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name} is {value}; expected a finite number of at least {least}.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}. {nearest(value, allowed)}")


@dataclass(frozen=True)
class ModelShape:
    """What the cost of decoding depends on.

    Attributes:
        parameters: active ones. layers, num_heads, num_kv_heads, head_dim: of the attention.

    Raises:
        ConfigError: a value below 1, or heads that the key-value heads do not divide.
    """

    name: str
    parameters: float
    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in ("parameters", "layers", "num_heads", "num_kv_heads", "head_dim"):
            at_least(field, getattr(self, field), 1)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; num_heads must be a multiple of num_kv_heads."
            )

    @property
    def group(self) -> int:
        """Query heads per key-value head, the paper's r."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_elements(self) -> int:
        """Elements of keys and values per token, the paper's D."""
        return 2 * self.layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Hardware:
    """Peak arithmetic (FLOP/s) and memory bandwidth (byte/s) of a device.

    Raises:
        ConfigError: a value that is not positive and finite.
    """

    name: str
    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field} of hardware {self.name!r} is {value}; expected a positive number.")

    @property
    def intensity(self) -> float:
        """FLOP that the device does while it reads one byte, the paper's I."""
        return self.flops / self.bandwidth


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("qwen3-0.6b", 0.752e9, 28, 16, 8, 128),
        ModelShape("qwen3-1.7b", 2.03e9, 28, 16, 8, 128),
        ModelShape("qwen3-4b", 4.02e9, 36, 32, 8, 128),
        ModelShape("qwen3-8b", 8.19e9, 36, 32, 8, 128),
        ModelShape("qwen3-14b", 14.77e9, 40, 40, 8, 128),
        ModelShape("qwen3-32b", 32.76e9, 64, 64, 8, 128),
        ModelShape("smollm2-135m", 134_515_008, 30, 9, 3, 64),
    )
}
"""Known shapes; the sizes of Qwen3 are those of the authors' cost script."""

HARDWARE = {
    one.name: one
    for one in (
        Hardware("b200", 4500e12, 8e12),
        Hardware("b200-bf16", 2250e12, 8e12),
        Hardware("h200", 989e12, 4.8e12),
        Hardware("h100", 989e12, 3.35e12),
        Hardware("a100", 312e12, 2.039e12),
    )
}
"""``b200`` is the paper's convention: the FP8 peak beside a 16-bit cache, 562.5 FLOP/byte. ``b200-bf16`` takes the dense
bf16 peak, 281.25, in which memory weighs half as much. The others are dense bf16 peaks."""


@dataclass(frozen=True)
class Method:
    """How decoding attends: dense, the best ``budget`` keys, or ``blocks`` blocks of ``block`` keys beside ``local`` ones.

    Attributes:
        kind: "dense", "topk" (an oracle: it needs all logits and pays no search) or "block_topk".
        budget: keys of "topk". block, blocks, local: of "block_topk".

    Raises:
        ConfigError: an unknown kind, or a size out of range.
    """

    kind: str = "dense"
    budget: int = 0
    block: int = 0
    blocks: int = 0
    local: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "topk", "block_topk"):
            raise ConfigError(f"method is {self.kind!r}. {nearest(self.kind, ('dense', 'topk', 'block_topk'))}")
        if self.kind == "topk":
            at_least("budget", self.budget, 1)
        if self.kind == "block_topk":
            at_least("block", self.block, 1)
            at_least("blocks", self.blocks, 1)
            at_least("local", self.local, 0)

    @property
    def keys(self) -> float:
        """Keys that a token reads at most."""
        if self.kind == "dense":
            return math.inf
        return self.budget if self.kind == "topk" else self.local + self.block * self.blocks

    def __str__(self) -> str:
        if self.kind == "dense":
            return "dense"
        return f"top-k {self.budget}" if self.kind == "topk" else f"block top-k {self.block}×{self.blocks}"


DENSE = Method()
BUDGETS = (128, 256, 512, 1024, 2048)
"""The experiments' budgets."""


def token_methods() -> tuple[Method, ...]:
    """Token top-k at the experiments' budgets."""
    return tuple(Method("topk", budget=b) for b in BUDGETS)


def block_methods() -> tuple[Method, ...]:
    """Block top-k at the experiments' budgets: blocks of ``16384 / B`` keys, from 128×1 to 8×256."""
    return tuple(Method("block_topk", block=16384 // b, blocks=b * b // 16384) for b in BUDGETS)


@dataclass(frozen=True)
class Cost:
    """eFLOPs of decoding, by term; ``combine`` "sum" lets arithmetic and memory take turns, "max" lets them overlap.

    Attributes:
        linear, attention, search: FLOPs. kv, search_reads: bytes. intensity: FLOP per byte.
    """

    linear: float
    attention: float
    search: float
    kv: float
    search_reads: float
    intensity: float
    combine: Combine = "sum"

    @property
    def compute(self) -> float:
        return self.linear + self.attention + self.search

    @property
    def memory(self) -> float:
        """Memory traffic in eFLOPs."""
        return self.intensity * (self.kv + self.search_reads)

    @property
    def total(self) -> float:
        return self.compute + self.memory if self.combine == "sum" else max(self.compute, self.memory)

    def seconds(self, hardware: Hardware) -> float:
        """Of ``hardware`` at its peaks, whose ``intensity`` this cost was made with."""
        return self.total / hardware.flops


def visits(budget: float, prompt: float, output: float) -> float:
    """Keys read over ``output`` steps of at most ``budget`` keys after ``prompt`` tokens: ``B·L_out − ½·max(0, B − L_in)²``, B clamped.

    Below the exact sum by ``(B − L_in) / 2`` where B exceeds the prompt. The authors' top-k cost adds the square instead."""
    budget = min(budget, prompt + output)
    return budget * output - 0.5 * max(0.0, budget - prompt) ** 2


def exact_visits(budget: int, prompt: int, output: int) -> int:
    """The sum that :func:`visits` abbreviates, term by term."""
    return sum(min(budget, prompt + t) for t in range(1, output + 1))


def decode_cost(
    shape: ModelShape,
    method: Method = DENSE,
    *,
    prompt: float,
    output: float,
    trials: int = 1,
    intensity: float = HARDWARE["b200"].intensity,
    kv_bytes: float = 2.0,
    combine: Combine = "sum",
    share_prompt: bool = True,
    search: Search = "floor",
) -> Cost:
    """The cost of generating ``trials`` answers of ``output`` tokens to one prompt of ``prompt`` tokens.

    Args:
        intensity: FLOP per byte of the device; 0 gives the compute-only law.
        kv_bytes: per element of the cache; the 2 that the published formulas hide.
        combine: "sum" (the paper) or "max" (roofline).
        share_prompt: dense attention reads the prompt's cache once for all trials, as published; sparse methods never
            share it, because every trial chooses its own keys. False lets dense read it per trial too.
        search: "floor": the published search term, a step function; "exact": whole blocks counted at every step.

    Raises:
        ConfigError: a value out of range or an unknown word.
    """
    at_least("prompt", prompt, 0)
    at_least("output", output, 0)
    at_least("trials", trials, 1)
    at_least("intensity", intensity, 0)
    if not (math.isfinite(kv_bytes) and kv_bytes > 0):
        raise ConfigError(f"kv_bytes is {kv_bytes}; expected a positive number, such as 2 for a 16-bit cache.")
    _one_of("combine", combine, ("sum", "max"))
    _one_of("search", search, ("floor", "exact"))
    per_key = 2.0 * shape.group * shape.kv_elements
    read = visits(method.keys, prompt, output)
    elements = trials * read
    if method.kind == "dense" and share_prompt:
        elements = prompt * output + trials * output**2 / 2
    searched = reads = 0.0
    if method.kind == "block_topk":
        blocks, shared = _blocks_seen(method.block, prompt, output, trials, search)
        # a mean key per block and layer: half the elements that a token has, keys without values
        searched = blocks * trials * per_key / 2
        reads = shared * kv_bytes * shape.kv_elements / 2
    return Cost(
        linear=2.0 * trials * shape.parameters * output,
        attention=trials * per_key * read,
        search=searched,
        kv=kv_bytes * shape.kv_elements * elements,
        search_reads=reads,
        intensity=intensity,
        combine=combine,
    )


def _blocks_seen(block: int, prompt: float, output: float, trials: int, search: Search) -> tuple[float, float]:
    """Mean keys scored by one trial, and read by all of them when the prompt's are shared, summed over the steps."""
    if search == "floor":
        scored = (2 * prompt + output) // block * output / 2
        return scored, (2 * prompt + trials * output) // block * output / 2
    start, steps = int(prompt), int(output)
    own = _floors(start + steps, block) - _floors(start, block)
    common = start // block * steps
    return own, common + trials * (own - common)


def _floors(last: int, block: int) -> int:
    """``Σ_{j ≤ last} ⌊j / block⌋``."""
    whole = last // block
    return block * whole * (whole - 1) // 2 + whole * (last - whole * block + 1)


def crossover(shape: ModelShape, *, intensity: float = HARDWARE["b200"].intensity, kv_bytes: float = 2.0) -> float:
    """Generated tokens from which reading the cache costs more than the parameters, without a prompt; inf at intensity 0."""
    weight = intensity * kv_bytes * shape.kv_elements
    return 4.0 * shape.parameters / weight if weight else math.inf
