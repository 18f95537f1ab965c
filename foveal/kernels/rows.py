"""What the small attentions of ``gather`` are made of: batches of row numbers, scratch memory, masked logits.

A *plan* is a sequence of batches. In each batch, R small attentions run at once: attention ``r`` takes the query rows
``q_rows[r]`` and the key rows ``k_rows[r]`` (in units of ``q_unit`` and ``k_unit`` consecutive rows of the flattened
tensors), and hides the pairs that ``hide`` names. Scores of one batch live in a reused buffer that fits the cache.

Inside, logits are in base 2 (``log2(e)`` is folded into the matrix product): ``exp2`` costs a third of ``exp`` on CPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)
CONVERT_READS = 2
"""Keys and values in half precision are converted as a whole when each is read at least this often on average."""

KEYS_AT_ONCE = 1024
"""Keys of an attention whose scores are made at once on CPU, at least. Twice as many are split: with fewer keys more attentions run at
once, whose rows often read the same keys."""

KEPT_BYTES = 1 << 24
"""Scratch memory that a thread keeps between calls, at most."""


@dataclass(frozen=True, eq=False)
class Batch:
    """R small attentions of the same shape; what ``hide`` holds may be overwritten when the next batch is made.

    Attributes:
        q_rows: ``(R, M/q_unit)`` int64 row units of the flattened q; every row is in at most one attention, unless the plan repeats
            rows.
        k_rows: ``(R, L/k_unit)`` int64 row units of the flattened k and v.
        hide: None, or ``(first_column, mask)``, True (bool) or −inf (float penalties) hides: ``mask`` is ``(R or 1, G or 1, M/G, *columns)`` where the sizes of
            ``columns`` multiply to ``L − first_column`` and consecutive rows are split into G equal parts.
        bias: None, or ``(R, M, L)`` indices into the flattened bias table.
        start: None, or ``(table, entries)``: what hides pairs comes row by row out of ``table`` ``(·, width)``, −inf hides; ``entries``
            are ``(R, M, L/width)`` int64. For masks of which every attention has its own: logits are added to it, so that it needs no
            memory of its own.
        run: ``q_rows`` as a slice, where they are consecutive and the plan does not repeat rows.
        first, last: whether these are the first and the last of the keys of its rows; their batches follow each other, in order.
    """

    q_rows: Tensor
    k_rows: Tensor
    hide: tuple[int, Tensor] | None = None
    bias: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None
    run: slice | None = None
    first: bool = True
    last: bool = True

    @property
    def hides(self) -> bool:
        """Whether a row may be left without any key."""
        return self.hide is not None or self.start is not None or self.bias is not None


@dataclass(frozen=True, eq=False)
class Plan:
    """Batches, made afresh each time they are walked so that masks never pile up, and the sizes of a row unit.

    Attributes:
        batches: called once for forward and once for backward.
        q_unit, k_unit: consecutive rows per unit.
        key_reads: how many key rows all batches gather together, roughly; decides how half precision is converted.
        covers: every row of q is written by a batch, so that outputs need no initial value.
        repeats: a row of q may occur in several attentions, which are merged.
        plain: ``(rows_q,)`` bool, or one answer for all: rows whose logits are weighted without looking for their maximum first.
    """

    batches: Callable[[], Iterable[Batch]]
    q_unit: int = 1
    k_unit: int = 1
    key_reads: int = 0
    covers: bool = False
    repeats: bool = False
    plain: Tensor | bool = False


@dataclass(frozen=True)
class Scores:
    """How logits are made: ``bias + softcap·tanh(scale·q·k / softcap)``."""

    scale: float
    softcap: float | None = None


class Buffers:
    """Scratch memory by role, reused between batches of one pass (batches differ in size, never in role)."""

    def __init__(self, device: torch.device) -> None:
        self._store: dict[tuple[str, torch.dtype], Tensor] = {}
        self._shaped: dict[tuple[str, torch.dtype], Tensor] = {}
        self._device = device

    def get(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of this shape; what ``role`` held before is gone."""
        last = self._shaped.get((role, dtype))
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        flat = self._store.get((role, dtype))
        if flat is None or flat.numel() < size:
            with torch.inference_mode(False):  # so that later calls in any mode may write into it
                flat = self._store[role, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        last = self._shaped[role, dtype] = flat[:size].view(shape)
        return last

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._store.values())

    def take(
        self, role: str, source: Tensor, rows: Tensor, dtype: torch.dtype, width: int, run: slice | None = None
    ) -> Tensor:
        """Row units ``rows`` ``(R, units)`` of ``source`` ``(all_units, unit·C)`` as ``(R, units·unit, C = width)`` in ``dtype``.

        ``run``: the same rows as a slice, which is a view where nothing is to be converted.
        """
        if run is None:
            flat = rows.reshape(-1)
            out = self.get(role, (flat.shape[0], source.shape[1]), source.dtype)
            torch.index_select(source, 0, flat, out=out)
        else:
            out = source[run]
        if source.dtype != dtype:
            out = self.get(role + " converted", tuple(out.shape), dtype).copy_(out)
        return out.view(rows.shape[0], -1, width)


_kept = threading.local()


@contextmanager
def scratch(device: torch.device) -> Iterator[Buffers]:
    """Buffers for one pass. On CPU small ones stay with the thread: touching fresh memory costs more than a small attention."""
    buffers = getattr(_kept, "buffers", None) if device.type == "cpu" else None
    _kept.buffers = None  # a call inside this one gets its own
    buffers = Buffers(device) if buffers is None else buffers
    try:
        yield buffers
    finally:
        if device.type == "cpu" and buffers.bytes <= KEPT_BYTES:
            _kept.buffers = buffers


def pair_products(a: Tensor, b: Tensor, out: Tensor, start: Tensor | None = None) -> Tensor:
    """``out = start + a·bᵀ`` for ``(R, M, C)`` and ``(R, L, C)``; ``start`` is ``(R, M, 1)``, or ``out`` itself.

    A single product is run as two halves, because a batch of one keeps only one core busy.
    """
    r, m, length = out.shape
    view = out
    if r == 1 and m % 2 == 0 and out.device.type == "cpu":
        a, b, view = a.view(2, m // 2, -1), b.expand(2, -1, -1), out.view(2, m // 2, length)
        start = None if start is None else start.view(2, m // 2, -1)
    if start is None:  # torch.bmm is a tenth faster than torch.baddbmm with beta=0, which clears its output first
        torch.bmm(a, b.transpose(1, 2), out=view)
    else:
        torch.baddbmm(start.expand(view.shape), a, b.transpose(1, 2), out=view)
    return out


def logits(
    buffers: Buffers,
    qg: Tensor,
    kg: Tensor,
    batch: Batch,
    scores: Scores,
    table: Tensor | None,
    minus: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Masked base-2 logits ``(R, M, L)``, less ``minus`` ``(R, M, 1)``; and, under a softcap, the tanh that backward needs."""
    s = buffers.get("scores", (qg.shape[0], qg.shape[1], kg.shape[1]), qg.dtype)
    factor = scores.scale * LOG2_E if scores.softcap is None else scores.scale / scores.softcap
    qs = torch.mul(qg, factor, out=buffers.get("scaled", tuple(qg.shape), qg.dtype))
    tanh = None
    if scores.softcap is None:
        start = None if minus is None else minus.neg()
        if batch.start is not None:
            start = _starting(s, batch.start) if start is None else _starting(s, batch.start).add_(start)
        pair_products(qs, kg, s, start)
    else:
        pair_products(qs, kg, s).tanh_()
        if minus is not None:
            tanh = buffers.get("tanh", tuple(s.shape), s.dtype).copy_(s)
        s.mul_(scores.softcap * LOG2_E)
        if minus is not None:
            s.sub_(minus)
        if batch.start is not None:
            s.add_(_starting(buffers.get("start", tuple(s.shape), s.dtype), batch.start))
    if batch.bias is not None and table is not None:
        s.add_(table[batch.bias], alpha=LOG2_E)
    if batch.hide is not None:
        first, mask = batch.hide
        part = s.view(s.shape[0], -1, mask.shape[2], s.shape[2])[..., first:]
        part = part.unflatten(-1, mask.shape[3:])
        if mask.dtype == torch.bool:
            part.masked_fill_(mask, -torch.inf)
        else:
            part.add_(mask)
    return s, tanh


def _starting(s: Tensor, start: tuple[Tensor, Tensor]) -> Tensor:
    """``s`` ``(R, M, L)`` as rows of a table hide its pairs; see :class:`Batch`."""
    table, entries = start
    flat = s.view(-1, table.shape[1])
    if s.dtype == table.dtype:
        torch.index_select(table, 0, entries.flatten(), out=flat)
    else:
        flat.copy_(table[entries.flatten()])
    return s


def penalties(hidden: Tensor) -> Tensor:
    """In place: 0 stays, and what is positive becomes −inf."""
    return hidden.mul_(-torch.finfo(hidden.dtype).max).mul_(2.0)


def key_units(k: Tensor, v: Tensor, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values in row units; converted to the compute dtype here when converting each gathered tile would cost more."""
    if k.dtype != dtype and plan.key_reads >= CONVERT_READS * k.shape[0]:
        k, v = k.to(dtype), v.to(dtype)
    return k.view(-1, plan.k_unit * k.shape[1]), v.view(-1, plan.k_unit * v.shape[1])


def split_rows(total: int, score_elements: int, budget: int) -> Iterator[slice]:
    """Slices of ``range(total)`` of at most about ``budget`` score elements each, in even counts where possible.

    An even count splits evenly over two cores; one attention that exceeds the budget alone runs together with a second
    one as long as both stay below four budgets.

    Args:
        total: number of attentions.
        score_elements: scores of one attention.
        budget: score elements per slice.
    """
    step = max(1, budget // max(score_elements, 1))
    if step == 1 and 2 * score_elements <= 4 * budget:
        step = 2
    step -= step % 2 if step > 1 else 0
    return (slice(i, min(i + step, total)) for i in range(0, total, step))


def split_keys(units: int, unit: int, device: torch.device) -> list[slice]:
    """Slices of ``range(units)``, as equal as can be, each of at least ``KEYS_AT_ONCE`` keys; a single one on a GPU.

    Args:
        units: what the keys of an attention are listed in. unit: keys of each.
        device: where they are.
    """
    parts = max(1, units * unit // KEYS_AT_ONCE) if device.type == "cpu" else 1
    step = max(1, -(-units // parts))
    return [slice(i, min(i + step, units)) for i in range(0, units, step)]


def consecutive_rows(index: Tensor, sizes: Sequence[int], length: int) -> int:
    """Most rows, up to 16, that can be read at once: lists of these sizes are runs of so many, which begin at multiples of it.

    Args:
        index: the lists one after the other, rows of sequences of ``length``.
    """
    flat = index.reshape(-1)
    for unit in (16, 8, 4, 2):
        if length % unit == 0 and not any(size % unit for size in sizes):
            runs, steps = flat.view(-1, unit), torch.arange(unit, device=index.device)
            for some in (runs[:1], runs):  # most lists that have no runs show it at once
                if bool((some[:, 0] % unit).any()) or bool((some != some[:, :1] + steps).any()):
                    break
            else:
                return unit
    return 1
