"""Random calls for property tests: every shape, layout and option of ``foveal.attention``, and every demand of a host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.layouts import BlockMask, Groups, KeySelection, Layout, block_mask
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import prepare

from .support import Host


@dataclass
class Call:
    """Arguments of one call and the host that means the same."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout | None
    causal: bool
    options: dict[str, Any]

    @property
    def host(self) -> Host:
        pads = ((0, 0),) * self.q.shape[0]
        return Host(self.q.shape[2], self.k.shape[2], causal=self.causal, pads=pads)

    def prepared(self) -> AttentionCall:
        options = {name: self.options.get(name) for name in ("scale", "softcap", "bias")}
        return prepare(self.q, self.k, self.v, self.layout, causal=self.causal, **options, return_lse=True)

    def leaves(self) -> dict[str, Tensor]:
        """Everything that can have a gradient."""
        found = {"q": self.q, "k": self.k, "v": self.v, **{n: self.options[n] for n in ("bias", "sink_logits")}}
        return {name: t for name, t in found.items() if t is not None}


def random_blocks(
    make: torch.Generator, batch: int, heads: int, q_len: int, kv_len: int, size: tuple[int, int], mod: bool
) -> BlockMask:
    """Tiles of all three kinds at random; with ``mod``, single pairs of partial tiles at random too."""
    tiles = -(-q_len // size[0]), -(-kv_len // size[1])
    lead = [n if torch.rand(1, generator=make) < 0.5 else 1 for n in (batch, heads)]
    kinds = torch.randint(0, 3, (*lead, *tiles), generator=make).to(torch.int8)
    table = torch.rand(batch, heads, q_len, kv_len, generator=make) < 0.5
    return block_mask(kinds, size, (q_len, kv_len), (lambda b, h, q, k: table[b, h, q, k]) if mod else None)


def random_lists(
    make: torch.Generator, batch: int, heads: int, q_len: int, kv_len: int, block: int, width: int, limit: bool
) -> KeySelection:
    """Lists of random keys, with pads in random places."""
    lead = batch if torch.rand(1, generator=make) < 0.5 else 1
    order = torch.rand(lead, heads, -(-q_len // block), kv_len, generator=make).argsort(-1)[..., :width]
    index = torch.where(torch.rand(order.shape, generator=make) < 0.3, -1, order)
    ends = torch.randint(0, kv_len + 1, (lead, q_len), generator=make) if limit else None
    return KeySelection(index, block, ends)


def random_groups(
    make: torch.Generator, sizes: tuple[int, int, int, int, int], count: int, per_head: bool, combine: Any
) -> Groups:
    """Random subsets of queries and keys, overlapping, some empty; ``sizes`` is ``(B, H, Hkv, Nq, Nk)``."""
    batch, heads, kv_heads, q_len, kv_len = sizes
    q_all, k_all, n_q, n_k = [], [], [0], [0]
    for _ in range(count):
        b, h = int(torch.randint(batch, (1,), generator=make)), int(torch.randint(heads, (1,), generator=make))
        share = torch.rand(2, generator=make) * 1.2 - 0.1
        q = (torch.rand(q_len, generator=make) < share[0]).nonzero()[:, 0]
        k = (torch.rand(kv_len, generator=make) < share[1]).nonzero()[:, 0]
        q_all.append(q + ((b * heads + h) if per_head else b) * q_len)
        k_all.append(k + ((b * kv_heads + h * kv_heads // heads) if per_head else b) * kv_len)
        n_q.append(q.numel())
        n_k.append(k.numel())
    none = torch.zeros(0, dtype=torch.long)
    cu_q, cu_k = torch.tensor(n_q).cumsum(0), torch.tensor(n_k).cumsum(0)
    return Groups(torch.cat([none, *q_all]), cu_q, torch.cat([none, *k_all]), cu_k, per_head, combine)


@st.composite
def calls(draw: st.DrawFn, kind: str | None = None, longest: int = 40, rows: int | None = None) -> Call:
    """A random call in float64; ``kind`` is one of dense, blocks, lists, groups; ``rows`` fixes the number of queries."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * group
    q_len, kv_len = rows or draw(st.integers(1, longest)), draw(st.integers(1, longest))
    dim, dim_v = draw(st.sampled_from([1, 3, 4, 7])), draw(st.sampled_from([1, 2, 5]))
    kind = kind or draw(st.sampled_from(["dense", "blocks", "lists", "groups"]))
    layout: Layout | None = None
    if kind == "blocks":
        size = draw(st.sampled_from([(16, 16), (32, 8), (128, 128), (1, 4), (5, 7), (8, 1)]))
        layout = random_blocks(make, batch, heads, q_len, kv_len, size, draw(st.booleans()))
    elif kind == "lists":
        per = draw(st.sampled_from([1, kv_heads, heads]))
        block, width = draw(st.sampled_from([1, 3, 16])), draw(st.integers(0, kv_len))
        layout = random_lists(make, batch, per, q_len, kv_len, block, width, draw(st.booleans()))
    elif kind == "groups":
        sizes = (batch, heads, kv_heads, q_len, kv_len)
        layout = random_groups(
            make, sizes, draw(st.integers(0, 6)), draw(st.booleans()), draw(st.sampled_from(["softmax", "mean"]))
        )

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size, generator=make, dtype=torch.float64)

    reach = draw(st.sampled_from([None, 0, 1, 5]))
    options = {
        "scale": draw(st.sampled_from([None, 0.0, -0.7, 1.3])),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "sink_logits": tensor(heads) if draw(st.booleans()) else None,
        "bias": None if reach is None else tensor(heads, 2 * reach + 1),
    }
    return Call(
        tensor(batch, heads, q_len, dim), tensor(batch, kv_heads, kv_len, dim), tensor(batch, kv_heads, kv_len, dim_v),
        layout, draw(st.booleans()), options,
    )  # fmt: skip


@st.composite
def hosts(draw: st.DrawFn, lengths: tuple[int, int] | None = None, batch: int = 2) -> Host:
    """Every combination of demands that ``BaseMask.build`` takes; ``lengths`` fixes ``(q_len, kv_len)``."""
    kv_len = lengths[1] if lengths else draw(st.integers(1, 40))
    documents: tuple[tuple[int, ...], ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    q_len = lengths[0] if lengths else draw(st.integers(1, 40))
    kind = draw(
        st.sampled_from(["plain", "padding", "documents"] if q_len == kv_len or not lengths else ["plain", "padding"])
    )
    q_len = kv_len if kind == "documents" else q_len
    if kind == "documents":
        cuts = [sorted(draw(st.sets(st.integers(1, kv_len), max_size=3)) | {kv_len}) for _ in range(batch)]
        documents = tuple(tuple(np.diff([0, *c]).tolist()) for c in cuts)
    if kind == "padding":
        pads = tuple((left := draw(st.integers(0, kv_len)), draw(st.integers(0, kv_len - left))) for _ in range(batch))
    causal = draw(st.booleans())
    shift = draw(st.sampled_from([None, 0, 3])) if causal and not documents else None
    window, chunk = draw(st.sampled_from([None, 1, 2, 7, 50])), draw(st.sampled_from([None, 1, 5, 64]))
    return Host(q_len, kv_len, causal, shift, window, chunk, pads, documents)


def finite(lse: Tensor) -> Tensor:
    """``lse`` with −inf replaced by 0, so that it can enter a loss."""
    return torch.where(lse == -math.inf, torch.zeros_like(lse), lse)
