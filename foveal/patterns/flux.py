"""Flux Attention (arXiv 2604.07394): a router decides once per prompt and layer between full and sparse attention."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, Selection, State
from ..core.errors import ConfigError, UnsupportedError
from ..core.layouts import Layout
from ..core.registry import register
from ..core.serial import check_types
from ..core.weights import file_sha256
from ..kernels.pooling import real_rows
from .base import LookAhead, Pattern
from .by_rows import by_rows
from .dense import Dense
from .documents import documents
from .flux_router import load_routers, pooled_queries, read_routers
from .presets import FLUX


@dataclass(frozen=True, eq=False)
class Routed:
    """What a layer remembers of a request.

    Attributes:
        full: ``(B,)`` bool, True where the layer attends fully. logits: ``(B, 2)`` of the router.
        states: of the full and of the sparse pattern.
    """

    full: Tensor
    logits: Tensor
    states: tuple[State, State] = (None, None)


@register("pattern", "flux")
@dataclass(frozen=True)
class Flux(Pattern):
    """Full or sparse attention, decided by the layer's router at prefill and kept for decoding.

    Attributes:
        router: safetensors file of the routers of all layers (``foveal train flux``); another model than the one that they were trained
            for is refused.
        router_sha256: SHA-256 of that file; another file under this name is refused.
        sparse: what a sparse layer keeps; default one sink block and 16 local blocks of 128 tokens.
        full: what a full layer keeps; default everything. ``XAttention`` gives the authors' sparse–sparse hybrid.

    The router reads the first and last tokens of the prompt, so ``look_ahead`` is ``"prefill"``; a prompt fed in pieces is decided by
    its first piece. Every row of a batch has its own decision. State: ``Routed``; it stays when the cache is cropped. Keys and values
    of all layers stay in the cache: this saves computing, not memory.
    """

    router: str
    router_sha256: str
    sparse: Pattern = field(default=FLUX["streaming"])
    full: Pattern = field(default_factory=Dense)

    needs: ClassVar[frozenset[str]] = frozenset({"pre_rope_q"})

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of_file(cls, path: str | Path, **fields: Any) -> Self:
        """The routers in this file, their digest computed now; ``sparse`` and ``full`` default to what they were trained with."""
        if not Path(path).is_file():
            raise ConfigError(
                f"router {str(path)!r} is no file; make one with `foveal train flux MODEL --out DIR`, or pass the file that it wrote."
            )
        said = read_routers(path).metadata
        known = {n: Pattern.from_json(json.loads(said[n]), f"{path}: {n}") for n in ("sparse", "full") if n in said}
        return cls(str(path), file_sha256(path), **{**known, **fields})

    @property
    def look_ahead(self) -> LookAhead:
        return "prefill"

    def check_model(self, sha256: Callable[[], str], layers: int) -> None:
        """Refuse routers that were trained for another model."""
        routers = load_routers(self.router, self.router_sha256)
        if routers.layers != layers:
            raise ConfigError(
                f"router {self.router} was trained for {routers.layers} layers and this model has {layers}; train one with `foveal train flux`."
            )
        if routers.model and routers.model != (found := sha256()):
            raise ConfigError(
                f"router {self.router} was trained for weights {routers.model[:12]} ({routers.architecture or 'unknown architecture'}) and this "
                f"model's are {found[:12]}; train one for this model with `foveal train flux`."
            )

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """The chosen pattern's layout; the two joined where rows differ."""
        routed = self._decide(q, ctx) if ctx.q_offset == 0 else state
        if not isinstance(routed, Routed):
            raise UnsupportedError(
                f"flux: what {ctx.layer_name or 'this layer'} decided for this request is not known after {ctx.q_offset} tokens; expected the prompt "
                "to run under the same foveal.attach(...), with a cache that shows its keys, in one call or in pieces from its beginning."
            )
        if routed.full.shape[0] != q.shape[0]:
            raise UnsupportedError(
                f"flux: {routed.full.shape[0]} requests were routed and {q.shape[0]} rows go on; expected the rows of the prompt. "
                "Start the changed batch with a new cache."
            )
        some, every = bool(routed.full.any()), bool(routed.full.all())
        (one, a), (other, b) = (None, routed.states[0]), (None, routed.states[1])
        if some:
            one, a = self.full.select(q, k, ctx, a)
        if not every:
            other, b = self.sparse.select(q, k, ctx, b)
        layout = one if every else other if not some else by_rows(routed.full, one, other, ctx.base)
        return layout, Routed(routed.full, routed.logits, (a, b))

    def _decide(self, q: Tensor, ctx: SelectContext) -> Routed:
        if ctx.pre_rope_q is None:
            raise UnsupportedError(
                f"flux routes by queries before rotation, which {ctx.layer_name or 'this layer'} does not give; use another pattern in this layer."
            )
        routers = load_routers(self.router, self.router_sha256, q.device)
        with torch.autocast(q.device.type, enabled=False):
            pooled = pooled_queries(ctx.pre_rope_q.detach(), routers.pool, prompt_spans(ctx.base, q.shape[0]))
            logits = routers.logits(ctx.layer_index, pooled)
        return Routed(logits[:, 1] > logits[:, 0], logits)

    def after_move(self, state: State, reordered: bool) -> State:
        """The decisions stay with the rows; rows that were decided differently must not have been reordered."""
        if not isinstance(state, Routed):
            return None
        if reordered and bool(state.full.any()) and not bool(state.full.all()):
            raise UnsupportedError(
                "flux: the rows of the cache were reordered (beam search) and they were routed differently; run one request at a time."
            )
        return Routed(state.full, state.logits)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "sparse": self.sparse.to_json(), "full": self.full.to_json()}


def prompt_spans(base: BaseMask, batch: int) -> Tensor:
    """``(B, 2)`` int64: first token of each row that is no padding, and one after its last.

    Raises:
        UnsupportedError: documents packed into one row.
    """
    if documents(base):
        raise UnsupportedError(
            "flux decides once per row, and this row holds several packed documents; pass one document per row (use padding)."
        )
    real = real_rows(base).expand(batch, -1)
    at = torch.arange(base.q_len, device=base.device)
    first, stop = torch.where(real, at, base.q_len).amin(1), torch.where(real, at + 1, 0).amax(1)
    empty = stop == 0  # a row of padding alone has no prompt; whatever is decided, its output is zero
    return torch.stack([torch.where(empty, 0, first), torch.where(empty, 1, stop)], 1)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Which layers attended fully.

    Attributes:
        layers: routed layers, rising. full: ``(len(layers), B)`` bool on the CPU.
    """

    layers: tuple[int, ...]
    full: Tensor

    @property
    def omega(self) -> Tensor:
        """``(B,)`` share Ω of the routed layers that are sparse."""
        return 1.0 - self.full.double().mean(0)

    def __str__(self) -> str:
        said = []
        for row in range(self.full.shape[1]):
            sparse = [str(n) for n, full in zip(self.layers, self.full[:, row].tolist(), strict=True) if not full]
            said.append(f"{len(sparse)} of {len(self.layers)} layers sparse (Ω {float(self.omega[row]):.2f}): {', '.join(sparse) or 'none'}")  # fmt: skip
        return "\n".join(said)


def decisions(selections: Mapping[int, Selection]) -> Decisions | None:
    """The decisions in what a forward selected (a backbone's ``Pass.selections``); None where no layer was routed."""
    found = {i: s.state.full for i, s in sorted(selections.items()) if isinstance(s.state, Routed)}
    return Decisions(tuple(found), torch.stack(list(found.values())).cpu()) if found else None
