"""Keys and values travel round the ranks while each attends to what it holds: ring, double ring, all-gather.

Published as Ring Attention; zig-zag, reverse continuation and the double ring (LoongTrain) as LongCA-bench describes them
(arXiv 2510.17896). Every part is merged by :func:`foveal.merge`; backward keeps the inputs, the output and its
log-sum-exp, and (ring) the keys that came last, which it lets go as soon as they have been used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...core.base_mask import BaseMask
from ..call import AttentionCall, compute_dtype
from ..merge import merge
from . import local
from .masks import Part, part
from .mesh import RankMesh
from .partition import Partition

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """One call: who takes part, what is seen, and how it is computed.

    Attributes:
        mesh, partition, mask: the mask over the partition's places. impl, scale, softcap: of local attention.
    """

    mesh: RankMesh
    partition: Partition
    mask: BaseMask
    impl: str
    scale: float
    softcap: float | None

    def seen(self, source: int | None) -> Part | None:
        """What this rank's queries see of the keys of ring rank ``source``, or (None) of all keys in order."""
        mine = self.mesh.sequence.rank
        memo = ("ranks", self.partition, mine, source)
        if memo not in self.mask.cache:
            rows = self.partition.shard(mine)
            keys = torch.arange(self.partition.length) if source is None else self.partition.shard(source)
            self.mask.cache[memo] = part(self.mask, rows, keys)
        found = self.mask.cache[memo]
        assert found is None or isinstance(found, Part)
        return found

    def call(self, seen: Part, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
        """Local attention inside the box."""
        rows, keys = seen.rows, seen.keys
        base = seen.base.to(q.device)
        return AttentionCall(q[:, :, rows], k[:, :, keys], v[:, :, keys], None, base, self.scale, self.softcap)

    def pairs(self, seen: Part, q: Tensor) -> int:
        """Visible pairs over heads and batch rows."""
        shared = q.shape[0] if seen.base.area().shape[0] == 1 else 1
        return seen.pairs * shared * q.shape[1]


class _Sum:
    """Output and log-sum-exp over the parts so far."""

    def __init__(self, run: Run, q: Tensor, v: Tensor) -> None:
        self.run, self.q = run, q
        self.dtype, self.shape = compute_dtype(q.dtype), (*q.shape[:3], v.shape[3])
        self.found: Pair | None = None

    def add(self, source: int | None, k: Tensor, v: Tensor) -> None:
        seen = self.run.seen(source)
        if seen is None:
            return
        call = self.run.call(seen, self.q, k, v)
        with self.run.mesh.meter.computing(self.run.pairs(seen, self.q)):
            out, lse = local.forward(call, local.chosen(self.run.impl, call))
            part = out.to(self.dtype), lse.to(self.dtype)
            if self.found is None and seen.base.q_len == self.shape[2]:  # of all rows: nothing to merge with, no copy
                self.found = part
                return
            whole, total = (x[:, :, seen.rows] for x in self.result())
            whole[:], total[:] = merge([whole, part[0]], [total, part[1]])

    def result(self) -> Pair:
        """Both, as they are now: zero and −inf before any part."""
        if self.found is None:
            out = torch.zeros(self.shape, dtype=self.dtype, device=self.q.device)
            self.found = out, torch.full(self.shape[:3], -torch.inf, dtype=self.dtype, device=self.q.device)
        return self.found


class _Slopes:
    """Gradients of the parts: that of q stays here, those of k and v are handed out."""

    def __init__(self, run: Run, saved: tuple[Tensor, ...], grad_out: Tensor, grad_lse: Tensor | None) -> None:
        self.run, self.grad_out, self.grad_lse = run, grad_out, grad_lse
        self.q, self.out, self.lse = saved
        self.dtype = compute_dtype(self.q.dtype)
        self.found: Tensor | None = None

    def of(self, source: int | None, k: Tensor, v: Tensor) -> Pair:
        """What this rank adds to the gradients of ``k`` and ``v``."""
        seen = self.run.seen(source)
        if seen is None:
            return self._zeros(k), self._zeros(v)
        call = self.run.call(seen, self.q, k, v)
        rows, keys = seen.rows, seen.keys
        with self.run.mesh.meter.computing():
            dq, *parts = local.backward(
                call, local.chosen(self.run.impl, call), self.out[:, :, rows], self.lse[:, :, rows],
                self.grad_out[:, :, rows], None if self.grad_lse is None else self.grad_lse[:, :, rows],
            )  # fmt: skip
            if self.found is None and seen.base.q_len == self.q.shape[2]:
                self.found = dq.to(self.dtype)
            else:
                self.dq()[:, :, rows] += dq
            return self._placed(parts[0], keys, k), self._placed(parts[1], keys, v)

    def _placed(self, part: Tensor, keys: slice, of: Tensor) -> Tensor:
        """The gradient of all keys from that of some."""
        if part.shape[2] == of.shape[2]:
            return part.to(self.dtype)
        whole = self._zeros(of)
        whole[:, :, keys] = part.to(self.dtype)
        return whole

    def _zeros(self, of: Tensor) -> Tensor:
        return torch.zeros(of.shape, dtype=self.dtype, device=of.device)

    def dq(self) -> Tensor:
        """The gradient of q so far."""
        if self.found is None:
            self.found = self._zeros(self.q)
        return self.found


def _pack(pair: Pair) -> Tensor:
    return torch.cat([x.reshape(-1) for x in pair])


def _unpack(flat: Tensor, k: Tensor, v: Tensor) -> Pair:
    return flat[: k.numel()].view(k.shape), flat[k.numel() :].view(v.shape)


class _Attend(torch.autograd.Function):
    """Any of the transports below, as one differentiable function ``(q, k, v) → (out, lse)``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: Run, transport: type[Transport]) -> Pair:
        total = _Sum(run, q, v)
        kept = transport.forward(run, total, k, v)
        out, lse = total.result()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.run, ctx.transport, ctx.kept = run, transport, kept
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        slopes = _Slopes(ctx.run, (q, out, lse), grad_out, grad_lse)
        dk, dv = ctx.transport.backward(ctx.run, slopes, k, v, ctx.kept)
        return slopes.dq().to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class Transport:
    """How keys come to queries and gradients come home."""

    @staticmethod
    def forward(run: Run, total: _Sum, k: Tensor, v: Tensor) -> list[Tensor]:
        """Fill ``total``; the result is given to :meth:`backward`."""
        raise NotImplementedError

    @staticmethod
    def backward(run: Run, slopes: _Slopes, k: Tensor, v: Tensor, kept: list[Tensor]) -> Pair:
        """Gradients of this rank's own k and v. What it takes out of ``kept`` is gone in a second backward of the same graph."""
        raise NotImplementedError


class Ring(Transport):
    """R−1 hops forward; backward begins with the keys that came last and runs the other way, so they need not be resent."""

    @staticmethod
    def forward(run: Run, total: _Sum, k: Tensor, v: Tensor) -> list[Tensor]:
        ring = run.mesh.sequence
        held = _pack((k, v)) if ring.size > 1 else None
        for i in range(ring.size):
            following = ring.shift(held) if held is not None and i + 1 < ring.size else None
            total.add((ring.rank - i) % ring.size, *((k, v) if held is None or i == 0 else _unpack(held, k, v)))
            if following is not None:
                held = following()
        return [] if held is None else [held]

    @staticmethod
    def backward(run: Run, slopes: _Slopes, k: Tensor, v: Tensor, kept: list[Tensor]) -> Pair:
        ring = run.mesh.sequence
        if ring.size == 1:
            return slopes.of(0, k, v)
        held = kept.pop() if kept else ring.shift(_pack((k, v)), -1)()
        coming: Callable[[], Tensor] | None = None
        for i in range(1, ring.size):
            following = ring.shift(held, -1) if i + 1 < ring.size else None
            grads = _pack(slopes.of((ring.rank + i) % ring.size, *_unpack(held, k, v)))
            if coming is not None:
                grads += coming()
            if following is not None:
                held = following()
            coming = ring.shift(grads, -1)
        del held, grads  # the own keys need neither
        assert coming is not None
        own = slopes.of(ring.rank, k, v)
        for mine, rest in zip(own, _unpack(coming(), k, v), strict=True):
            mine += rest
        return own


class DoubleRing(Transport):
    """Rings inside windows, windows in a ring: W(S−1) hops to the neighbour and W−1 to the next window; so in backward too.

    The gradients of keys move one place after each of the S steps of a window, and one window on after each window.
    """

    @staticmethod
    def _walk(mesh: RankMesh, own: Tensor, visit: Callable[[int, Tensor, bool], None]) -> None:
        inner, outer = mesh.inner, mesh.outer
        window = held = own
        for w in range(outer.size):
            ahead = outer.shift(window) if w + 1 < outer.size else None
            for i in range(inner.size):
                following = inner.shift(held) if i + 1 < inner.size else None
                source = (outer.rank - w) % outer.size * inner.size + (inner.rank - i) % inner.size
                visit(source, held, i + 1 == inner.size)
                if following is not None:
                    held = following()
            if ahead is not None:
                window = held = ahead()

    @staticmethod
    def forward(run: Run, total: _Sum, k: Tensor, v: Tensor) -> list[Tensor]:
        DoubleRing._walk(run.mesh, _pack((k, v)), lambda source, held, _: total.add(source, *_unpack(held, k, v)))
        return []

    @staticmethod
    def backward(run: Run, slopes: _Slopes, k: Tensor, v: Tensor, kept: list[Tensor]) -> Pair:
        mesh = run.mesh
        coming: list[Callable[[], Tensor]] = []

        def visit(source: int, held: Tensor, ends: bool) -> None:
            grads = _pack(slopes.of(source, *_unpack(held, k, v)))
            if coming:
                grads += coming.pop()()
            moved = mesh.inner.shift(grads)
            coming.append(mesh.outer.shift(moved()) if ends else moved)

        DoubleRing._walk(mesh, _pack((k, v)), visit)
        return _unpack(coming.pop()(), k, v)


class AllGather(Transport):
    """All keys on every rank, put into order: one attention, nothing to merge; memory does not fall with the ranks."""

    @staticmethod
    def _everything(run: Run, k: Tensor, v: Tensor) -> tuple[Pair, Tensor]:
        """Keys and values in the order of their places, and that order: places of the shards one after another."""
        ring = run.mesh.sequence
        where = torch.cat([run.partition.shard(r) for r in range(ring.size)]).to(k.device)
        gathered = ring.all_gather(_pack((k, v)))
        order = where.argsort()
        split = k.numel()
        both = (gathered[:, :split].view(-1, *k.shape), gathered[:, split:].view(-1, *v.shape))
        whole = tuple(x.movedim(0, 2).flatten(2, 3).index_select(2, order) for x in both)
        return (whole[0], whole[1]), where

    @staticmethod
    def forward(run: Run, total: _Sum, k: Tensor, v: Tensor) -> list[Tensor]:
        total.add(None, *AllGather._everything(run, k, v)[0])
        return []

    @staticmethod
    def backward(run: Run, slopes: _Slopes, k: Tensor, v: Tensor, kept: list[Tensor]) -> Pair:
        ring = run.mesh.sequence
        whole, where = AllGather._everything(run, k, v)
        parts = [
            x.index_select(2, where).unflatten(2, (ring.size, -1)).movedim(2, 0).flatten(1)
            for x in slopes.of(None, *whole)
        ]
        return _unpack(ring.reduce_scatter(torch.cat(parts, 1)), k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, run: Run, transport: type[Transport]) -> Pair:
    """``(out, lse)`` of this rank's queries over the keys of all ranks; differentiable."""
    result: Pair = _Attend.apply(q, k, v, run, transport)
    return result
