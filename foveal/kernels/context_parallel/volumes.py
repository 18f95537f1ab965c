"""How many elements each rank sends, by formula (LongCA-bench, arXiv 2510.17896, section on context parallelism).

Two of the sheet's rows are tightened here: the ring's backward does not send a rank's keys home to the rank that still has
them (P−2 hops of keys instead of P−1), and a hop inside a window of one rank is none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Volume:
    """Elements that one rank sends in one call.

    Attributes:
        forward: all of it. backward: elements of q, k, v and out's type. sums: elements of gradients of keys that travel
            or are added up in the accumulation type (float32 for anything below).
    """

    forward: int
    backward: int
    sums: int

    def bytes(self, itemsize: int) -> tuple[int, int]:
        """Forward and backward, for inputs of ``itemsize`` bytes."""
        return self.forward * itemsize, self.backward * itemsize + self.sums * max(itemsize, 4)


def volume(
    method: str, tokens: int, heads: int, kv_heads: int, head_dim: int, *, ulysses: int = 1, ring: int = 1, windows: int = 1, batch: int = 1
) -> Volume:  # fmt: skip
    """Elements that each rank sends.

    Args:
        method: as in :func:`foveal.context_parallel_attention`. tokens: of the whole sequence, padding included.
        heads, kv_heads, head_dim: of the whole model; keys and values have the same. ulysses, ring, windows: U, R, W.
    """
    u, r, w = ulysses, ring, windows
    local = batch * tokens // (u * r)
    shared = max(kv_heads, u)  # fewer key heads than ranks are repeated
    exchange = 2 * local * (heads + shared) * head_dim * (u - 1) // u
    hop = 2 * batch * (tokens // r) * (shared // u) * head_dim  # keys and values of one shard
    if method == "all_gather":
        return Volume(exchange + (r - 1) * hop, exchange + (r - 1) * hop, (r - 1) * hop)
    if method == "double_ring":
        s = r // w
        keys = (w * (s - 1) + w - 1) * hop
        return Volume(exchange + keys, exchange + keys, ((r if s > 1 else 0) + (w if w > 1 else 0)) * hop)
    return Volume(exchange + (r - 1) * hop, exchange + max(r - 2, 0) * hop, (r - 1) * hop)


FORMULAS = {
    "ulysses": ("2(P−1)/P²·t(Hq+Hk)d", "the same"),
    "ring": ("2(P−1)/P·t·Hk·d", "2(2P−3)/P·t·Hk·d"),
    "all_gather": ("2(P−1)/P·t·Hk·d", "4(P−1)/P·t·Hk·d"),
    "usp": ("2(U−1)/U·n(Hq+Hk)d + 2(R−1)/P·t·Hk·d", "2(U−1)/U·n(Hq+Hk)d + 2(2R−3)/P·t·Hk·d"),
    "double_ring": ("2(U−1)/U·n(Hq+Hk)d + 2(R−1)/P·t·Hk·d", "2(U−1)/U·n(Hq+Hk)d + 2(2R+W−1)/P·t·Hk·d"),
}
"""Elements that each rank sends forward and backward, for more than one rank; n = t/P."""
