"""HyLRA (arXiv 2602.00777): spread layers stay dense, the others reuse the keys that an earlier layer chose.

Offline: profile a model on a long text, mark the layers whose attention is spread, plan the anchors of the others, write a policy.
The paper's body was not readable; what is done here is what its authors' public tool does, see ``foveal papers show hylra``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import serial
from ..core.errors import ConfigError
from ..core.serial import check_range, check_types
from ..lens.chunks import ChunkMass, ChunkSettings, chunk_overlap, model_chunks, sensitivity
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..patterns.reuse import Anchor, Reuse
from .anchors import Objective, best_anchors, sources, value
from .policy import Policy, Rule

_ROUNDING = 1e-9
"""Taken off before rounding up: 20·(1 − 0.85) is 3, not 3.0000000000000004."""


@dataclass(frozen=True, eq=False)
class ReuseProfile:
    """What the plan is made from.

    Attributes:
        sensitivity: ``(L,)`` share of the chunks that hold 90 % of a layer's mass; higher is more spread.
        overlap: ``(L, L)`` share of layer j's chunks that layer i selects too, for i ≤ j; the smallest over KV heads.
        mass_overlap: ``(L, L)`` the same by mass without forced chunks, the mean over KV heads: less pessimistic.
    """

    sensitivity: Tensor
    overlap: Tensor
    mass_overlap: Tensor

    @classmethod
    def of(cls, layers: Sequence[ChunkMass], settings: ChunkSettings) -> ReuseProfile:
        """From every layer's mass."""
        shared, caught = chunk_overlap(layers, max(1, settings.keep // settings.chunk))
        spread = torch.tensor([sensitivity(layer) for layer in layers], dtype=torch.float64)
        return cls(spread, shared.amin(0).clamp(0, 1), caught.mean(0).clamp(0, 1))

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in ("sensitivity", "overlap", "mass_overlap")}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReuseProfile:
        return cls(*(torch.tensor(data[n], dtype=torch.float64) for n in ("sensitivity", "overlap", "mass_overlap")))


def profile(model: nn.Module, ids: Tensor, settings: ChunkSettings, progress: Callable[[int], None] | None = None) -> ReuseProfile:  # fmt: skip
    """Profile a causal transformers model on ``ids`` ``(B, N)``; see :func:`foveal.lens.chunks.model_chunks`."""
    return ReuseProfile.of(model_chunks(model, ids, settings, progress), settings)


@dataclass(frozen=True)
class Plan:
    """Roles of all layers.

    Attributes:
        reuse: per layer −1 for an anchor, else the anchor it follows. dense: layers that stay dense, rising.
        classes: 3, where anchors outside ``dense`` attend to what they chose (the authors' code); 2, where every anchor is dense and
            hands its choice on (the abstract).
        bottleneck, total: smallest and summed value of the plan; 0 where it was made without a profile.
    """

    reuse: tuple[int, ...]
    dense: tuple[int, ...] = ()
    classes: int = 3
    bottleneck: float = 0.0
    total: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        layers = len(self.reuse)
        if not layers or self.reuse[0] != -1:
            raise ConfigError(
                f"Plan.reuse is {self.reuse!r}; expected it to begin with -1: layer 0 has nobody to follow."
            )
        for j, a in enumerate(self.reuse):
            if a != -1 and (not 0 <= a < j or self.reuse[a] != -1):
                raise ConfigError(f"Plan.reuse[{j}] is {a}; expected -1 or an earlier layer that is an anchor itself.")
        if list(self.dense) != sorted(set(self.dense)) or any(not 0 <= j < layers for j in self.dense):
            raise ConfigError(f"Plan.dense is {self.dense!r}; expected rising layer numbers from 0 to {layers - 1}.")
        if self.classes not in (2, 3):
            raise ConfigError(f"Plan.classes is {self.classes!r}; expected 2 or 3.")

    @property
    def anchors(self) -> tuple[int, ...]:
        """Layers that follow nobody."""
        return tuple(j for j, a in enumerate(self.reuse) if a == -1)

    def role(self, layer: int) -> str:
        """``"full"``, ``"compute"`` or ``"reuse"``."""
        if layer in self.dense or (self.classes == 2 and self.reuse[layer] == -1):
            return "full"
        return "compute" if self.reuse[layer] == -1 else "reuse"

    def attended(self, kept: float) -> float:
        """Share of the dense keys that all layers attend to when a selection keeps this share."""
        full = sum(self.role(j) == "full" for j in range(len(self.reuse)))
        return (full + (len(self.reuse) - full) * kept) / len(self.reuse)

    def to_json(self) -> dict[str, Any]:
        return {"reuse": list(self.reuse), **serial.to_json(self)}

    @classmethod
    def from_json(cls, data: Any, where: str = "plan") -> Plan:
        """Validate and build; raises :class:`ConfigError`."""
        return serial.from_json(cls, data, where)

    def policy(self, choose: Pattern, *, dense_prefill: bool = False, name: str = "hylra") -> Policy:
        """The policy for any model of so many layers.

        Args:
            choose: what a computing layer keeps, such as ``BlockTopK(Budget(tokens=2048), per_head=False)``.
            dense_prefill: reuse in decoding only, as the authors do; otherwise in prefill too.

        In classes=3 a layer that would follow a dense one (possible where the plan's bottleneck is 0) takes the latest choice of a
        computing layer, as the authors' engine does; where there is none, that dense layer hands its own on.
        """
        source = [self._source(j) for j in range(len(self.reuse))]
        handing = {s for j, s in enumerate(source) if self.role(j) == "reuse" and self.role(s) == "full"}
        rules = []
        for j in range(len(self.reuse)):
            role = self.role(j)
            pattern: Pattern = Reuse(source[j]) if role == "reuse" else choose
            if role == "full":
                pattern = Anchor(choose) if j in handing else Dense()
            rules.append((j, Rule(Dense(), pattern) if dense_prefill else Rule(pattern)))
        return Policy(layers=tuple(rules), name=name)

    def _source(self, layer: int) -> int:
        anchor = self.reuse[layer]
        if anchor == -1 or self.role(anchor) == "compute" or self.classes == 2:
            return anchor
        return max((j for j in range(layer) if self.role(j) == "compute"), default=anchor)


def budgets(layers: int, sparsity: float = 0.9, recompute: float = 0.3) -> tuple[int, int]:
    """``(dense layers, changes)``: ``⌈L·(1 − σ)⌉`` and ``⌈L·σ·κ⌉ + dense layers``."""
    dense = math.ceil(layers * (1 - sparsity) - _ROUNDING)
    return dense, math.ceil(layers * sparsity * recompute - _ROUNDING) + dense


@dataclass(frozen=True)
class HyLRA:
    """How a plan is made from a profile.

    Attributes:
        sparsity: share σ of the layers that do not stay dense. recompute: share κ of these that may choose anew.
        objective: see :func:`foveal.policies.anchors.best_anchors`. classes: as in :class:`Plan`.
        by_mass: plan with ``mass_overlap`` instead of ``overlap``.
    """

    sparsity: float = 0.9
    recompute: float = 0.3
    objective: Objective = "bottleneck"
    classes: int = 3
    by_mass: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("sparsity", "recompute"):
            check_range(self, name, low=0, high=1)
        check_range(self, "classes", low=2, high=3)

    def plan(self, found: ReuseProfile) -> Plan:
        """Dense layers by sensitivity, anchors by the dynamic programme. Warns when the budget leaves a layer with value 0."""
        layers = len(found.sensitivity)
        count, changes = budgets(layers, self.sparsity, self.recompute)
        order = sorted(range(layers), key=lambda j: (-float(found.sensitivity[j]), j))
        dense = tuple(sorted(order[:count]))
        overlap = cleared(found.mass_overlap if self.by_mass else found.overlap, dense, rows=self.classes == 3)
        anchors = best_anchors(overlap, changes, self.objective)
        low, total = value(overlap, anchors)
        if low == 0:
            warnings.warn(
                f"HyLRA: {changes + 1} anchors leave a layer whose anchor shares nothing with it (value 0), so only the sum was "
                "maximised; raise recompute or lower sparsity, or use classes=2.",
                stacklevel=2,
            )
        follows = tuple(-1 if a == j else a for j, a in enumerate(sources(anchors, layers)))
        return Plan(follows, dense, self.classes, low, total)


def cleared(overlap: Tensor, dense: Sequence[int], *, rows: bool) -> Tensor:
    """The overlaps with the columns of dense layers, and their rows where they hand nothing on, set to 0; the diagonal stays 1."""
    out = overlap.clone()
    out[:, list(dense)] = 0.0
    if rows:
        out[list(dense)] = 0.0
    return out.fill_diagonal_(1.0)


def uniform_plan(layers: int, dense: int, compute: int, classes: int = 3) -> Plan:
    """As many dense and computing layers at even distances, chosen without a profile, for comparison at the same density.

    Raises:
        ConfigError: more of them than layers, or no layer that chooses.
    """
    if not (0 <= dense <= layers and 0 <= compute <= layers - dense and layers > 0):
        raise ConfigError(f"dense is {dense} and compute {compute}; expected together at most the {layers} layers.")
    if compute == 0 and dense < layers and (classes == 3 or dense == 0):
        raise ConfigError("compute is 0; expected at least 1: some layer has to choose for those that follow.")
    full = [i * layers // dense for i in range(dense)]
    rest = [j for j in range(layers) if j not in full]
    anchors = {*full, *(rest[i * len(rest) // compute] for i in range(compute))}
    if classes == 2:
        full = sorted(anchors)
    reuse: list[int] = []
    last = -1
    for j in range(layers):
        reuse.append(-1 if j in anchors else last)
        if j in anchors and (classes == 2 or j not in full):
            last = j
    return Plan(tuple(reuse), tuple(full), classes)
