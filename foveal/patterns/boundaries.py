"""Where content changes: DHSA's boundary predictor as a function of its weights, and the choice of boundaries.

For position i the predictor reads keys i−w+1…i (left) and i+1…i+w (right), all KV heads side by side, zero outside the
sequence. With C = Hkv·D: attention over the 2w tokens, LayerNorm, l and r = the mean of either half,
f = [l, r, |l−r|, l⊙r, cos(l, r)], logit = Linear(ReLU(Linear(f))). The parameters live in ``foveal.layers.boundary``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, linear, pad, relu

from ..core.errors import ConfigError, ShapeError
from ..core.weights import check_digest, read_tensors

FORMAT, KIND = "foveal.boundary_predictor", "boundary predictor"
PACKAGED = Path(__file__).parent / "weights"


@dataclass(frozen=True, eq=False)
class Predictor:
    """A loaded predictor.

    Attributes:
        tensors: parameters by their names in ``foveal.layers.BoundaryPredictor``.
        window: w, tokens on either side.
        heads: attention heads it was trained with.
    """

    tensors: Mapping[str, Tensor]
    window: int
    heads: int

    @property
    def key_dim(self) -> int:
        """C, the width of all KV heads of a token together."""
        return self.tensors["norm.weight"].numel()


def key_features(k: Tensor, valid: Tensor | None = None) -> Tensor:
    """``(B, N, Hkv·D)`` from keys ``(B, Hkv, N, D)``; padding becomes zero."""
    x = k.transpose(1, 2).flatten(2)
    return x if valid is None else torch.where(valid[..., None], x, 0.0)


def boundary_logits(x: Tensor, tensors: Mapping[str, Tensor], window: int, heads: int, rows: int = 2048) -> Tensor:
    """``(B, N)`` logits that a chunk ends with token i.

    Args:
        x: ``(B, N, C)`` keys of all KV heads.
        tensors: the predictor's parameters.
        window: w.
        heads: attention heads, a divisor of C.
        rows: positions computed at a time, so that memory stays O(N).
    """
    width = tensors["norm.weight"].numel()
    if x.shape[-1] != width:
        raise ShapeError(
            f"the keys have {x.shape[-1]} features per token (KV heads × head_dim); this boundary predictor was made for {width}."
        )
    if width % heads:
        raise ConfigError(
            f"a boundary predictor of {width} features cannot have {heads} heads; expected a divisor of {width}."
        )
    x = x.to(tensors["norm.weight"].dtype)
    projected = linear(
        pad(x, (0, 0, window - 1, window)), tensors["attention.in_proj_weight"], tensors["attention.in_proj_bias"]
    )
    windows = projected.unfold(1, 2 * window, 1)  # (B, N, 3C, 2w)
    parts = [_logits(part, tensors, window, heads) for part in windows.split(rows, dim=1)]
    return torch.cat(parts, 1) if parts else x.new_zeros(x.shape[:2])


def _logits(windows: Tensor, tensors: Mapping[str, Tensor], window: int, heads: int) -> Tensor:
    width = windows.shape[2] // 3
    q, k, v = windows.unflatten(2, (3, heads, width // heads)).transpose(-1, -2).unbind(2)  # (B, n, heads, 2w, C/heads)
    weights = torch.softmax(q @ k.transpose(-1, -2) / (width // heads) ** 0.5, -1)
    mixed = (weights @ v).transpose(2, 3).flatten(3)  # (B, n, 2w, C)
    mixed = linear(mixed, tensors["attention.out_proj.weight"], tensors["attention.out_proj.bias"])
    mixed = layer_norm(mixed, (width,), tensors["norm.weight"], tensors["norm.bias"])
    left, right = (_pool(half, tensors) for half in mixed.split(window, dim=2))
    features = [left, right, (left - right).abs(), left * right, cosine_similarity(left, right, dim=-1)[..., None]]
    hidden = relu(linear(torch.cat(features, -1), tensors["hidden.weight"], tensors["hidden.bias"]))
    return linear(hidden, tensors["score.weight"], tensors["score.bias"])[..., 0]


def _pool(rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean over ``(B, n, w, C)``, or the softmax-gated mean when the predictor has a gate."""
    if "gate.weight" not in tensors:
        return rows.mean(2)
    return (torch.softmax(linear(rows, tensors["gate.weight"], tensors["gate.bias"]), 2) * rows).sum(2)


def pick_boundaries(logits: Tensor, threshold: float, gap: int, limit: int | None = None) -> list[int]:
    """Positions with a logit above ``threshold``, best first, none within ``gap`` of a better one, at most ``limit``; sorted.

    Args:
        logits: ``(N,)``; −inf where no boundary may be.
        threshold: a logit (the authors' 1.1 is a probability of 0.75).
    """
    above = (logits > threshold).nonzero()[:, 0]
    order = above[logits[above].argsort(descending=True, stable=True)].tolist()
    blocked = bytearray(logits.numel() + 2 * gap + 1)
    picked: list[int] = []
    for i in order:
        if limit is not None and len(picked) >= limit:
            break
        if not blocked[i + gap]:
            picked.append(i)
            blocked[i : i + 2 * gap + 1] = b"\1" * (2 * gap + 1)
    return sorted(picked)


def find_file(name: str) -> Path:
    """The predictor file ``name``: a path, or the name of one that ships with foveal."""
    for path in (Path(name).expanduser(), PACKAGED / name):
        if path.is_file():
            return path
    known = sorted(p.name for p in PACKAGED.glob("*.safetensors")) if PACKAGED.is_dir() else []
    shipped = f"; shipped with foveal: {', '.join(known)}" if known else ""
    raise ConfigError(
        f"boundary predictor {name!r} is no file{shipped}. Train one with foveal.recipes.dhsa.train_boundaries, or leave predictor empty for chunks of fixed length."
    )


def load_predictor(
    name: str, sha256: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Predictor:
    """Read a predictor and check its digest; the result is cached by file and digest.

    Raises:
        ConfigError: the file is missing, is no predictor, or has another digest.
    """
    return _load(str(find_file(name).resolve()), sha256, str(device), dtype)


@lru_cache(maxsize=8)
def _load(path: str, sha256: str, device: str, dtype: torch.dtype) -> Predictor:
    check_digest(path, sha256, KIND, "predictor_sha256")
    tensors, meta = read_predictor(path)
    return Predictor({n: t.to(device, dtype) for n, t in tensors.items()}, int(meta["window"]), int(meta["heads"]))


def read_predictor(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a predictor file; raises :class:`ConfigError` when it is none."""
    tensors, meta = read_tensors(path, KIND)
    if meta.get("format") != FORMAT or meta.get("version") != "1":
        raise ConfigError(
            f"{path} has the format {meta.get('format')!r} version {meta.get('version')!r}; expected {FORMAT!r} version '1', written by BoundaryPredictor.save."
        )
    return tensors, meta
