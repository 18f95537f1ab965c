"""Preplan and anchor tokens: how far text looks back, and what it keeps returning to (arXiv 2510.13554).

Local heads look near, global heads far. WAAD, from the local heads, is how far a token looks back inside a short window; its peaks
start phrases ("preplan"). FAI, from the global heads, is how much later tokens look at a token; its peaks are "anchors". Both are
linear in the maps, so the probes' figures per head are averaged over a set of heads afterwards, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, UnsupportedError
from .probe import Probe
from .probes import Influence, LookBack, WindowedDistance
from .record import Recording, record

SHARE = 0.3
"""Share of the heads in the local and in the global set."""


def rhythm_layers(num_layers: int) -> list[int]:
    """The five layers that the paper reads in training: evenly spaced in the middle third, both ends included."""
    low, high = num_layers // 3, 2 * num_layers // 3
    return sorted({round(low + i * (high - low) / 4) for i in range(5)})


@dataclass(frozen=True)
class HeadSets:
    """Heads as ``(layer, head)``: those that look nearest and those that look furthest, and the mean distance of each head."""

    local: tuple[tuple[int, int], ...]
    far: tuple[tuple[int, int], ...]
    distance: dict[tuple[int, int], float]


def split_heads(distance: Tensor, layers: tuple[int, ...] | None = None, share: float = SHARE) -> HeadSets:
    """The lowest and the highest ``share`` of heads by ``d[l, h]``, their mean look-back distance over the response.

    Args:
        distance: ``(L, H)``. layers: numbers of the rows, default 0, 1, …. share: at least one head each is taken.

    Raises:
        ConfigError: a share outside (0, 0.5].
    """
    if not 0 < share <= 0.5:
        raise ConfigError(f"share is {share}; expected more than 0 and at most 0.5.")
    names = layers or tuple(range(distance.shape[0]))
    by_head = {(names[i], h): float(distance[i, h]) for i in range(distance.shape[0]) for h in range(distance.shape[1])}
    by_head = {head: d for head, d in by_head.items() if d == d}
    order = sorted(by_head, key=lambda head: (by_head[head], head))
    count = max(1, int(share * len(order)))
    return HeadSets(tuple(order[:count]), tuple(order[-count:]), by_head)


def delta(waad: np.ndarray) -> np.ndarray:
    """``|WAAD[t] − WAAD[t + 1]|``, 0 at the last token."""
    return np.append(np.abs(np.diff(waad)), 0.0)


def peaks(values: np.ndarray, prominence: float | None = None) -> np.ndarray:
    """Positions of local maxima that stand out by ``prominence``, by default half of the standard deviation (the paper names no
    finder).

    Raises:
        UnsupportedError: scipy is not installed.
    """
    try:
        from scipy.signal import find_peaks
    except ImportError as error:
        raise UnsupportedError("peaks need scipy: pip install 'foveal[data]'.") from error
    if prominence is None:
        prominence = 0.5 * float(np.std(values))
    return find_peaks(values, prominence=max(prominence, 1e-12))[0]


@dataclass(frozen=True, eq=False)
class Rhythm:
    """One text's rhythm, over its response.

    Attributes:
        start: position of the first token of the response; every array counts from there.
        waad, fai, entropy: ``(T,)``; entropy of the next-token prediction in nats, NaN at the last token of a text.
        preplan, anchors: positions (from ``start``) of WAAD and FAI peaks.
        heads: the two sets. recording: per-head figures.
    """

    start: int
    waad: np.ndarray
    fai: np.ndarray
    entropy: np.ndarray
    preplan: np.ndarray
    anchors: np.ndarray
    heads: HeadSets
    recording: Recording

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "start": self.start,
            "local_heads": [list(h) for h in self.heads.local],
            "global_heads": [list(h) for h in self.heads.far],
            **{name: _round(getattr(self, name)) for name in ("waad", "fai", "entropy")},
            "preplan": self.preplan.tolist(),
            "anchors": self.anchors.tolist(),
        }  # fmt: skip


def _round(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]


def rhythm_probes(
    window: int = 10, near: int = 10, far: int | None = None, start: int = 0, skip: int = 0
) -> dict[str, Probe]:
    """What :func:`rhythm_of` reads: ``lookback``, ``waad`` and ``fai``, each ``(layer, head, token)``."""
    return {"lookback": LookBack(skip), "waad": WindowedDistance(window), "fai": Influence(near, far, start)}


def rhythm_of(
    rec: Recording, entropy: np.ndarray | None = None, start: int = 0, heads: HeadSets | None = None, prominence: float | None = None
) -> Rhythm:  # fmt: skip
    """Rhythm from a recording of :func:`rhythm_probes` of one text.

    Args:
        entropy: ``(N,)`` of the next-token prediction at each token, or None. start: first token of the response.
        heads: a frozen split; default the split of this text. prominence: of the peaks.

    Raises:
        ShapeError: a batch of several texts, or no tokens after ``start``.
    """
    found = {name: rec[name] for name in ("lookback", "waad", "fai")}
    if "sequence" in found["waad"].dims:
        raise ShapeError("the recording holds several sequences; record one text at a time for its rhythm.")
    tokens = found["waad"].shape[-1]
    if not 0 <= start < tokens:
        raise ShapeError(f"start is {start}, but the text has {tokens} tokens; the response must begin inside it.")
    layers = found["waad"].labels("layer")
    if heads is None:
        heads = split_heads(found["lookback"].values[..., start:].nanmean(-1), layers)

    def mean(name: str, members: tuple[tuple[int, int], ...]) -> np.ndarray:
        rows = [found[name].values[layers.index(layer), h, start:] for layer, h in members]
        return torch.stack(rows).double().mean(0).nan_to_num(0.0).numpy()

    waad, fai = mean("waad", heads.local), mean("fai", heads.far)
    nothing = np.full(tokens - start, np.nan)
    return Rhythm(
        start, waad, fai, nothing if entropy is None else np.asarray(entropy, dtype=float)[start:],
        peaks(waad, prominence), peaks(fai, prominence), heads, rec,
    )  # fmt: skip


def model_rhythm(
    model: nn.Module, inputs: Tensor | Mapping[str, Any], *, start: int = 0, layers: list[int] | None = None, window: int = 10,
    near: int = 10, far: int | None = None, skip: int = 0, heads: HeadSets | None = None, prominence: float | None = None,
) -> Rhythm:  # fmt: skip
    """Run a causal language model once over one text and find its rhythm.

    The defaults are the paper's analysis (all layers, FAI to the end); its training reads ``layers=rhythm_layers(L)``, ``far=50``.

    Args:
        inputs: ``(1, N)`` ids, or the forward's keyword arguments. start: first token of the response. skip: first tokens whose
            columns do not count for the head split (not in the paper: heads that look at a first-token sink count as global).

    Raises:
        ShapeError, ConfigError, UnsupportedError: as :func:`rhythm_of` and :func:`foveal.lens.record`.
    """
    given: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    with torch.no_grad(), record(model, rhythm_probes(window, near, far, start, skip), layers=layers) as rec:
        hidden = getattr(model, "base_model", model)(**given, use_cache=False)[0]
        entropy = prediction_entropy(model, hidden)
    return rhythm_of(rec, entropy, start, heads, prominence)


@torch.no_grad()
def prediction_entropy(model: nn.Module, hidden: Tensor, rows: int = 512) -> np.ndarray:
    """``(N,)`` entropy in nats of the next-token distribution at every token of one text, some rows of logits at a time."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return np.full(hidden.shape[1], np.nan)
    cap = getattr(model.config, "final_logit_softcapping", None)
    out = []
    for part in hidden[0].split(rows):
        logits = head(part).float()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        logp = logits.log_softmax(-1)
        out.append(-(logp.exp() * logp).sum(-1).cpu())
    return torch.cat(out).double().numpy()


# --- what the rhythm shows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """``observed / reference`` with a 95 % bootstrap interval over texts."""

    observed: float
    reference: float
    ratio: float
    low: float
    high: float


def bootstrap_ratio(observed: np.ndarray, reference: np.ndarray, seed: int = 0, draws: int = 2000) -> Ratio:
    """Ratio of means over texts, with the percentile interval from resampling texts.

    Args:
        observed, reference: ``(texts,)`` paired figures; texts where either is NaN are left out.

    Raises:
        ShapeError: fewer than two texts are left.
    """
    keep = np.isfinite(observed) & np.isfinite(reference)
    a, b = observed[keep], reference[keep]
    if len(a) < 2:
        raise ShapeError(f"{len(a)} texts have both figures; a bootstrap over texts needs at least 2.")
    pick = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    ratios = a[pick].mean(1) / np.maximum(b[pick].mean(1), 1e-30)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(float(a.mean()), float(b.mean()), float(a.mean() / max(b.mean(), 1e-30)), float(low), float(high))


def entropy_at_peaks(texts: list[Rhythm], seed: int = 0) -> Ratio:
    """Mean prediction entropy at WAAD peaks over that of all tokens."""
    at = np.array([np.nanmean(t.entropy[t.preplan]) if len(t.preplan) else np.nan for t in texts])
    return bootstrap_ratio(at, np.array([np.nanmean(t.entropy) for t in texts]), seed)


def follows(anchors: np.ndarray, preplan: np.ndarray, within: int = 1) -> float:
    """Share of anchors at, or at most ``within`` tokens after, a preplan token; NaN without anchors."""
    if not len(anchors):
        return float("nan")
    marked = {int(p) + e for p in preplan for e in range(within + 1)}
    return sum(int(a) in marked for a in anchors) / len(anchors)


def coupling(texts: list[Rhythm], within: int = 1, seed: int = 0, shuffles: int = 200) -> Ratio:
    """How often anchors follow preplan tokens, over how often they follow as many tokens drawn at random from the response."""
    rng = np.random.default_rng(seed)
    observed, chance = [], []
    for t in texts:
        observed.append(follows(t.anchors, t.preplan, within))
        drawn = [rng.choice(len(t.waad), len(t.preplan), replace=False) for _ in range(shuffles)]
        chance.append(float(np.mean([follows(t.anchors, d, within) for d in drawn])))
    return bootstrap_ratio(np.array(observed), np.array(chance), seed)


def receivers(text: Rhythm, share: float = 0.1) -> tuple[tuple[int, int], ...]:
    """Heads whose FAI over tokens has the highest kurtosis: few tokens receive much."""
    fai = text.recording["fai"]
    values = fai.values[..., text.start :].double().nan_to_num(0.0)
    centred = values - values.mean(-1, keepdim=True)
    spread = centred.square().mean(-1).clamp(min=1e-30)
    kurtosis = centred.pow(4).mean(-1) / spread.square()
    layers, heads = fai.labels("layer"), values.shape[1]
    count = max(1, int(share * kurtosis.numel()))
    return tuple((layers[int(i) // heads], int(i) % heads) for i in kurtosis.flatten().topk(count).indices)


def receiver_agreement(texts: list[Rhythm], share: float = 0.1, seed: int = 0, shuffles: int = 200) -> Ratio:
    """Share of FAI peaks of receiver heads that are anchors, over the same for anchors drawn at random."""
    rng = np.random.default_rng(seed)
    observed, chance = [], []
    for t in texts:
        fai = t.recording["fai"]
        of = [
            peaks(fai.select(layer=layer, head=h).values[t.start :].double().nan_to_num(0.0).numpy())
            for layer, h in receivers(t, share)
        ]
        own = np.concatenate(of) if of else np.array([], dtype=int)
        observed.append(follows(own, t.anchors, 0))
        drawn = [rng.choice(len(t.waad), len(t.anchors), replace=False) for _ in range(shuffles)]
        chance.append(float(np.mean([follows(own, d, 0) for d in drawn])))
    return bootstrap_ratio(np.array(observed), np.array(chance), seed)
