"""``foveal.context_parallel_attention``: attention over a sequence that is spread over ranks, equal to that of one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ...core.base_mask import BaseMask
from ...core.errors import ConfigError, FovealError, ShapeError, nearest
from ..call import AttentionCall
from ..dispatch import check_tensors
from . import local, ring, ulysses
from .masks import placed
from .mesh import RankMesh, check_fits, rank_mesh
from .partition import Partition

METHODS: dict[str, tuple[type[ring.Transport], str]] = {
    "ulysses": (ring.Ring, "all-to-all over heads"),
    "ring": (ring.Ring, "keys travel from rank to rank"),
    "all_gather": (ring.AllGather, "every rank receives all keys"),
    "usp": (ring.Ring, "Ulysses inside, a ring outside"),
    "double_ring": (ring.DoubleRing, "Ulysses and a ring of rings (LoongTrain)"),
}
"""Every method: what carries its keys, and how it works in a few words."""


def mesh_for(
    method: str, group: Any = None, *, ulysses: int | None = None, windows: int | None = None, innermost: str = "ulysses",
    timeout: float = 300.0,
) -> RankMesh:  # fmt: skip
    """The mesh on which ``method`` runs; every rank calls this alike, once.

    Args:
        method: a name in :data:`METHODS`. group, innermost, timeout: as in :func:`rank_mesh`.
        ulysses: U; default all ranks for ``"ulysses"``, 2 for ``"usp"`` where the ranks are even, else 1.
        windows: W; default 1, for ``"double_ring"`` the largest divisor of the ring that is at most its square root.

    Raises:
        ConfigError: an unknown method, or sizes that do not divide. RankError: ranks that disagree.
    """
    _known(method)
    size = _size(group)
    if ulysses is None:
        ulysses = size if method == "ulysses" else 2 if method == "usp" and size % 2 == 0 else 1
    left = size // max(ulysses, 1)
    if windows is None:
        windows = max(w for w in range(1, math.isqrt(left) + 1) if left % w == 0) if method == "double_ring" else 1
    mesh = rank_mesh(group, ulysses=ulysses, windows=windows, innermost=innermost, timeout=timeout)
    _suits(method, mesh)
    return mesh


def _size(group: Any) -> int:
    import torch.distributed as dist

    if group is None:
        return dist.get_world_size() if dist.is_initialized() else 1
    if hasattr(group, "mesh"):
        return int(group.mesh.numel())
    return dist.get_world_size(group)


def _known(method: str) -> None:
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown. {nearest(method, METHODS)}")


def _suits(method: str, mesh: RankMesh) -> None:
    shape = f"{mesh.ulysses} Ulysses × {mesh.ring} ring ranks in {mesh.windows} windows"
    if method == "ulysses" and mesh.ring > 1:
        raise ConfigError(f"method 'ulysses' needs a mesh without a ring; this one has {shape}. Use 'usp'.")
    if method in ("ring", "all_gather") and mesh.ulysses > 1:
        raise ConfigError(f"method {method!r} needs a mesh without Ulysses; this one has {shape}. Use 'usp'.")
    if method != "double_ring" and mesh.windows > 1:
        raise ConfigError(f"method {method!r} has no windows; this mesh has {shape}. Use 'double_ring'.")


def mask_of(
    total: int, *, causal: bool = False, window: int | None = None, documents: Sequence[int] | None = None, valid: Tensor | None = None
) -> BaseMask:  # fmt: skip
    """The mask of a whole sequence in O(total) numbers, the same on every rank.

    Args:
        causal, window: as in :meth:`BaseMask.build`; the window counts the query itself.
        documents: lengths of packed documents, each of which sees itself alone. valid: ``(B, total)``, False on padding.
    """
    segments = None
    if documents is not None:
        if sum(documents) != total:
            raise ShapeError(f"documents have {sum(documents)} tokens in all; expected {total}, the whole sequence.")
        segments = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(list(documents)))[None]
    return BaseMask.build(total, total, causal=causal, window=window, segments=segments, valid=valid)


@dataclass(frozen=True, eq=False)
class _Checked:
    run: ring.Run
    facts: dict[str, Any]


@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BaseMask | None = ..., *, mesh: RankMesh, method: str = ..., partition: str | Partition = ...,
    causal: bool = ..., window: int | None = ..., documents: Sequence[int] | None = ..., scale: float | None = ...,
    softcap: float | None = ..., impl: str = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BaseMask | None = ..., *, mesh: RankMesh, method: str = ..., partition: str | Partition = ...,
    causal: bool = ..., window: int | None = ..., documents: Sequence[int] | None = ..., scale: float | None = ...,
    softcap: float | None = ..., impl: str = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BaseMask | None = None,
    *,
    mesh: RankMesh,
    method: str = "ring",
    partition: str | Partition = "zigzag",
    causal: bool = False,
    window: int | None = None,
    documents: Sequence[int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a sequence of which this rank holds ``n = t/P`` tokens; exact, with gradients.

    Args:
        q: ``(B, H, n, D)``; k: ``(B, Hkv, n, D)``; v: ``(B, Hkv, n, Dv)``: this rank's tokens, as the partition cuts them.
        mask: of the whole sequence, ``t`` queries and keys, the same on every rank; None builds it from ``causal``,
            ``window`` (counting the query itself) and ``documents`` (lengths). Build it once for many layers
            (:func:`mask_of`): what follows from it is remembered in it.
        mesh: from :func:`mesh_for`. method: a name in :data:`METHODS`.
        partition: which tokens this rank holds: a name, or a :class:`Partition` (documents cut one by one, padding).
        scale, softcap: as in :func:`foveal.attention`. impl: ``auto``, ``native``, ``gather``, ``sdpa`` (torch's kernel),
            ``reference``, or another implementation of :func:`foveal.attention`.
        return_lse: also return ``(B, H, n)`` log-sum-exps, of the padding −inf.

    Returns:
        ``(B, H, n, Dv)`` for this rank's queries.

    Raises:
        ShapeError, ConfigError, UnsupportedError: on a mesh of one rank. RankError: on every rank, where ranks disagree, an
            argument is wrong on some rank, or a rank does not answer.

    Source: Ulysses (arXiv 2309.14509), Ring Attention (2310.01889), USP (2405.07719), LoongTrain (2406.18485), as
    LongCA-bench (2510.17896) compares them.
    """
    error: FovealError | None = None
    checked: _Checked | None = None
    try:
        checked = _check(q, k, v, mask, mesh, method, partition, causal, window, documents, scale, softcap, impl)
    except FovealError as wrong:
        error = wrong
    mesh.agree({} if checked is None else checked.facts, error)
    assert checked is not None
    heads = mesh.heads
    q, k, v = (ulysses.to_heads(x, heads) for x in (q, k, v))
    out, lse = ring.attend(q, k, v, checked.run, METHODS[method][0])
    out = ulysses.to_tokens(out, heads)
    if not return_lse:
        return out
    return out, ulysses.to_tokens(lse[..., None], heads)[..., 0]


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: BaseMask | None, mesh: RankMesh, method: str, partition: str | Partition, causal: bool,
    window: int | None, documents: Sequence[int] | None, scale: float | None, softcap: float | None, impl: str,
) -> _Checked:  # fmt: skip
    """One call's arguments, and what all ranks must have in common."""
    _known(method)
    _suits(method, mesh)
    check_tensors(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"q has {q.shape[2]} tokens and k {k.shape[2]}; expected as many: this rank's part of the sequence."
        )
    check_fits(mesh, q.shape[1], k.shape[1])
    n = q.shape[2]
    if isinstance(partition, str):
        total = n * mesh.size if mask is None else mask.q_len
        partition = Partition(total, mesh.ring, mesh.ulysses, partition)
    if (partition.ring, partition.ulysses) != (mesh.ring, mesh.ulysses):
        raise ShapeError(
            f"the partition is for {partition.ring} ring × {partition.ulysses} Ulysses ranks; expected the mesh's {mesh.ring} × {mesh.ulysses}."
        )
    if partition.local != n:
        raise ShapeError(
            f"q has {n} tokens on this rank; expected {partition.local}: {partition.total} tokens over {mesh.size} ranks. "
            "Cut the sequence with Partition.dispatch."
        )
    if mask is None:
        mask = mask_of(partition.total, causal=causal, window=window, documents=documents)
    elif causal or window is not None or documents is not None:
        raise ConfigError(
            "mask and causal, window or documents are given; expected one or the other. Put them into the mask."
        )
    memo = ("placed", partition)
    if memo not in mask.cache:
        mask.cache[memo] = placed(mask, partition)
    if scale is not None and not math.isfinite(scale):
        raise ConfigError(f"scale is {scale!r}; expected a finite number or None.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    base = mask.cache[memo]
    local.check(impl, AttentionCall(q, k, v, None, base, scale, softcap))
    facts = {
        "method": method, "partition": partition.kind, "tokens": partition.total, "q": list(q.shape), "k": list(k.shape),
        "v": list(v.shape), "dtype": str(q.dtype), "scale": scale, "softcap": softcap,
        "gradients": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    }  # fmt: skip
    return _Checked(ring.Run(mesh, partition, base, impl, scale, softcap), facts)
