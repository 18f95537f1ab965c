"""The collectives, each counted: how many bytes this rank sent to others, in how many messages, and what it computed."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...core.errors import FovealError

T = TypeVar("T")


class RankError(FovealError):
    """A rank died, timed out or disagrees; raised on every rank that is left, once."""


@dataclass
class Meter:
    """What one rank did since :meth:`reset`.

    Attributes:
        sent: bytes sent to other ranks, by kind: ``"hop"``, ``"all_to_all"``, ``"all_gather"``, ``"reduce_scatter"``.
        messages: how often, by kind. pairs: query-key pairs attended, over heads and batch rows.
        compute_s: CPU seconds of this thread inside local attention.
    """

    sent: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    compute_s: float = 0.0

    @property
    def bytes(self) -> int:
        """All bytes sent."""
        return sum(self.sent.values())

    def reset(self) -> None:
        """Forget everything."""
        self.sent.clear()
        self.messages.clear()
        self.pairs, self.compute_s = 0, 0.0

    def count(self, kind: str, sent: int) -> None:
        """Note one message (or one call of a collective)."""
        self.sent[kind] += sent
        self.messages[kind] += 1

    @contextlib.contextmanager
    def computing(self, pairs: int = 0) -> Iterator[None]:
        """Time local attention by this thread's CPU clock."""
        start = time.thread_time()
        yield
        self.compute_s += time.thread_time() - start
        self.pairs += pairs


@dataclass(frozen=True, eq=False)
class Line:
    """One process group, with this rank's place in it.

    Attributes:
        group: of torch.distributed, or None for a rank alone. ranks: its members' global ranks, rising.
        rank: this rank's place among them. meter: where it counts.
    """

    group: Any
    ranks: tuple[int, ...]
    rank: int
    meter: Meter

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    def shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        """Send ``x`` to the rank ``by`` places ahead and receive as much from behind; the result waits for both."""
        if self.size == 1:
            return lambda: x
        x = x.contiguous()
        ahead, behind = ((self.rank + step) % self.size for step in (by, -by))
        got = torch.empty_like(x)
        self.meter.count("hop", x.nbytes)

        def start() -> list[Any]:
            to, source = self.ranks[ahead], self.ranks[behind]
            ops = [dist.P2POp(dist.isend, x, to, self.group), dist.P2POp(dist.irecv, got, source, self.group)]
            return dist.batch_isend_irecv(ops)

        works = self._tried("a hop of the ring", start)

        def wait() -> Tensor:
            self._tried("a hop of the ring", lambda: [work.wait() for work in works])
            return got

        return wait

    def all_to_all(self, x: Tensor) -> Tensor:
        """Row ``i`` of ``x`` ``(size, …)`` goes to rank ``i``; row ``i`` of the result came from rank ``i``."""
        if self.size == 1:
            return x
        x, got = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        self.meter.count("all_to_all", x.nbytes // self.size * (self.size - 1))
        self._tried("an all-to-all", lambda: dist.all_to_all_single(got, x, group=self.group))
        return got

    def all_gather(self, x: Tensor) -> Tensor:
        """``(size, n)``: what every rank passed, ``x`` ``(n,)``."""
        if self.size == 1:
            return x[None]
        got = x.new_empty(self.size * x.numel())
        self.meter.count("all_gather", x.nbytes * (self.size - 1))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._tried("an all-gather", lambda: gather(got, x.contiguous(), group=self.group))
        return got.view(self.size, -1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """``(n,)``: the sum over ranks of row ``rank`` of ``x`` ``(size, n)``."""
        if self.size == 1:
            return x[0]
        got = x.new_empty(x.shape[1])
        self.meter.count("reduce_scatter", x.nbytes // self.size * (self.size - 1))
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._tried("a reduce-scatter", lambda: scatter(got, x.contiguous().view(-1), group=self.group))
        return got

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; not part of attention, so not counted."""
        if self.size > 1:
            self._tried("an all-reduce", lambda: dist.all_reduce(x, group=self.group))
        return x

    def barrier(self, seconds: float | None = None) -> None:
        """Wait for every rank; over gloo the ranks that do not come in time are named."""
        if self.size == 1:
            return
        if dist.get_backend(self.group) == "gloo":
            limit = None if seconds is None else datetime.timedelta(seconds=seconds)
            self._tried("a barrier", lambda: dist.monitored_barrier(self.group, timeout=limit, wait_all_ranks=True))
        else:
            self._tried("a barrier", lambda: dist.barrier(self.group))

    def _tried(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            reason = reason.split("] ", 1)[-1] if reason.startswith("[") else reason
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank during {what}: {reason[:160]}. The run ends on every rank; "
                "look for the rank that failed first, and start again."
            ) from error
