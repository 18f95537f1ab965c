"""One layer's attention, per head: where the mass goes, how concentrated it is, which keys it selects. O(N) memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError
from ..kernels.call import AttentionCall
from .exact import Role, RowMasses, row_masses
from .labels import head_labels
from .rows import key_weights, row_figures
from .stats import Estimate, Rows, stratified_mean, stratified_rows, weighted_quantile

TOP_RECEIVERS = 8
"""Keys per head that the profile lists as receiving the most attention."""


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """Attention of one layer, one figure per query head; means are over all real (not padded) rows of the batch.

    Figures named ``…_mass``, under a causal mask ``distance``, and with the C++ kernels ``entropy`` come from all rows. The
    others come from the sampled
    rows and carry 95 % intervals. Masses are shares of everything a row attends to, the learned sink included; entropy,
    keys, distance and what keys receive describe the distribution over keys.

    Attributes:
        layer_index, layer_name, role: where in the model; index −1 for cross-attention.
        num_heads, num_kv_heads, q_len, kv_len: sizes. real_rows: rows that the means are over.
        window, sinks: the settings that ``window_mass`` and ``sink_mass`` refer to, in tokens.
        sink_mass: ``(H,)`` mass on the first ``sinks`` tokens of the row's own sequence.
        window_mass: ``(H,)`` mass on the last ``window`` tokens, the row's own included, sinks among them excluded.
        rest_mass: ``(H,)`` mass on all other keys.
        learned_sink_mass: ``(H,)`` mass on a learned sink logit; 0 without one. The four sum to 1.
        distance: ``(H,)`` mean distance in tokens between a row and what it attends to; NaN in cross-attention.
        entropy: ``(H,)`` mean entropy in nats.
        entropy_normalized: ``(H,)`` mean of entropy / log(allowed keys), over rows that may see two keys or more.
        keys90: ``(H,)`` mean number of keys that hold 90 % of a row's mass.
        keys90_share: ``(H,)`` mean of that number / allowed keys.
        keys90_q10, keys90_median, keys90_q90: ``(H,)`` quantiles over rows.
        received: ``(B, H, Nk)`` estimated share of a sequence's attention that each key receives; sums to 1.
        top_keys: ``(B, H, m)`` indices of the keys that receive most, best first; top_keys_share: ``(B, H, m)`` how much.
            Keys were chosen by the same rows that measure them, so the shares of the last ones lean upwards.
        output_rms: ``(H,)`` root mean square of the heads' outputs, or None when the output was not given.
        rows: the rows drawn. allowed: ``(B, R)`` keys that each may see.
        selected: ``(B, 1 + Hkv, R, top)`` int32 top keys per row: by all heads' mean weights, then per key head; −1 pads.
    """

    layer_index: int
    layer_name: str
    role: Role
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    real_rows: int
    window: int
    sinks: int
    sink_mass: Tensor
    window_mass: Tensor
    rest_mass: Tensor
    learned_sink_mass: Tensor
    distance: Estimate
    entropy: Estimate
    entropy_normalized: Estimate
    keys90: Estimate
    keys90_share: Estimate
    keys90_q10: Estimate
    keys90_median: Estimate
    keys90_q90: Estimate
    received: Tensor
    top_keys: Tensor
    top_keys_share: Estimate
    output_rms: Tensor | None
    rows: Rows
    allowed: Tensor
    selected: Tensor

    @property
    def labels(self) -> list[str]:
        """One word per head: dead, sink, local, global or mixed (``foveal.lens.labels`` holds the thresholds)."""
        return head_labels(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one list over heads per figure; NaN becomes null; the sampled sets are left out."""
        plain = (
            "layer_index",
            "layer_name",
            "role",
            "num_heads",
            "num_kv_heads",
            "q_len",
            "kv_len",
            "real_rows",
            "window",
            "sinks",
        )
        out: dict[str, Any] = {name: getattr(self, name) for name in plain}
        out["sampled_rows"] = self.rows.drawn
        out["labels"] = self.labels
        for name in ("sink_mass", "window_mass", "rest_mass", "learned_sink_mass", "output_rms"):
            value = getattr(self, name)
            out[name] = None if value is None else numbers(value)
        for name in (
            "distance", "entropy", "entropy_normalized", "keys90", "keys90_share",
            "keys90_q10", "keys90_median", "keys90_q90", "top_keys_share",
        ):  # fmt: skip
            estimate = getattr(self, name)
            out[name] = {"mean": numbers(estimate.mean), "low": numbers(estimate.low), "high": numbers(estimate.high)}
        out["top_keys"] = self.top_keys.tolist()
        return out


def numbers(value: Tensor) -> Any:
    """Nested lists with six significant digits; NaN and infinities become None."""

    def fix(x: Any) -> Any:
        if isinstance(x, list):
            return [fix(v) for v in x]
        return float(f"{x:.6g}") if math.isfinite(x) else None

    return fix(value.double().tolist())


def profile_attention(
    q: Tensor,
    k: Tensor,
    base: BaseMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    rows: int = 256,
    window: int = 128,
    sinks: int = 4,
    top: int = 64,
    seed: int = 0,
    role: Role = "self",
    layer_index: int = 0,
    layer_name: str = "",
    out: Tensor | None = None,
) -> LayerProfile:
    """Measure the dense attention of one layer without materialising it.

    Costs about one dense attention, one over ``window + sinks`` keys, and ``rows / Nq`` of another.

    Args:
        q: ``(B, H, Nq, D)``, k: ``(B, Hkv, Nk, D)`` as the softmax uses them (after RoPE).
        base: the mask that the model demands; default causal.
        scale: factor of q·k, default ``1/sqrt(D)``. softcap, bias, sink_logits: as in :func:`foveal.attention`.
        rows: rows sampled per head from the whole batch, one per stratum of consecutive positions.
        window: tokens of the local window, counting the row's own; opens to both sides when the mask is not causal.
        sinks: first tokens of each sequence, counted after left padding and inside a packed document.
        top: keys in the selected set of a row.
        seed: of the draw. Layers of equal length and padding get the same rows from the same seed.
        role: "cross" when rows and keys are different sequences: then there is no window and no distance.
        layer_index, layer_name: recorded.
        out: ``(B, H, Nq, Dv)`` the attention's output, to find heads that put out nothing.

    Raises:
        ShapeError: tensors that do not fit each other or the mask.
        ConfigError: a setting out of range.
    """
    call = _checked_call(q, k, base, scale, softcap, bias, sink_logits, {"window": window, "sinks": sinks, "top": top})
    masses = row_masses(call, sink_logits, window=window, sinks=sinks, role=role)
    draw = stratified_rows(masses.real, rows, seed)
    figures = row_figures(call, masses.lse, draw, top=min(top, call.base.kv_len))
    allowed = figures.allowed

    def mean(values: Tensor, keep: Tensor | None = None) -> Estimate:
        return stratified_mean(values.transpose(0, 1), draw, keep).to("cpu")

    def quantile(p: float) -> Estimate:
        return weighted_quantile(figures.keys90.transpose(0, 1), draw, p).to("cpu")

    if role == "cross":
        distance = Estimate.exact(torch.full((q.shape[1],), torch.nan, dtype=torch.float64))
    elif masses.distance is not None:
        distance = Estimate.exact(_over_rows(masses.distance, masses.real))
    else:
        distance = mean(figures.distance)
    if masses.entropy is None:
        entropy = mean(figures.entropy)
    else:
        entropy = Estimate.exact(_over_rows(masses.entropy, masses.real))
    top_keys = figures.received.topk(min(TOP_RECEIVERS, call.base.kv_len), dim=-1).indices
    return LayerProfile(
        layer_index=layer_index, layer_name=layer_name, role=role, num_heads=q.shape[1], num_kv_heads=k.shape[1],
        q_len=q.shape[2], kv_len=k.shape[2], real_rows=int(masses.real.sum()), window=window, sinks=sinks,
        sink_mass=_over_rows(masses.sink, masses.real), window_mass=_over_rows(masses.window, masses.real),
        rest_mass=_over_rows(masses.rest, masses.real), learned_sink_mass=_over_rows(masses.learned_sink, masses.real),
        distance=distance, entropy=entropy,
        entropy_normalized=mean(figures.entropy / allowed.clamp(min=2).log()[:, None], allowed > 1),
        keys90=mean(figures.keys90), keys90_share=mean(figures.keys90 / allowed.clamp(min=1)[:, None]),
        keys90_q10=quantile(0.1), keys90_median=quantile(0.5), keys90_q90=quantile(0.9),
        received=figures.received.cpu(), top_keys=top_keys.cpu(), top_keys_share=_received_by(call, masses, draw, top_keys),
        output_rms=None if out is None else _over_rows(out.detach().float().square().mean(-1), masses.real).sqrt(),
        rows=Rows(draw.index.cpu(), draw.weight.cpu(), draw.fraction.cpu()), allowed=allowed.cpu(), selected=figures.selected.cpu(),
    )  # fmt: skip


def _checked_call(
    q: Tensor, k: Tensor, base: BaseMask | None, scale: float | None, softcap: float | None, bias: Tensor | None,
    sink_logits: Tensor | None, counts: dict[str, int],
) -> AttentionCall:  # fmt: skip
    from ..kernels.dispatch import prepare

    for name, value in counts.items():
        least = 0 if name == "sinks" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; expected a whole number of tokens, at least {least}.")
    call = prepare(
        q, k, k, causal=True, scale=scale, softcap=softcap, sink_logits=sink_logits, bias=bias, return_lse=True
    )
    if base is None:
        return call
    if (base.q_len, base.kv_len) != (q.shape[2], k.shape[2]) or base.batch not in (1, q.shape[0]):
        raise ShapeError(
            f"base was built for {base.batch} sequences of {base.q_len} queries and {base.kv_len} keys; q and k have {q.shape[0]} "
            f"sequences of {q.shape[2]} and {k.shape[2]}. Build it for these lengths with BaseMask.build."
        )
    return call.replace(base=base)


def _over_rows(values: Tensor, real: Tensor) -> Tensor:
    """``(B, H, Nq)`` -> ``(H,)`` float64 mean over the real rows of the batch; NaN without any."""
    keep = real[:, None]
    return (torch.where(keep, values, 0.0).double().sum((0, 2)) / real.sum()).cpu()


def _received_by(call: AttentionCall, masses: RowMasses, draw: Rows, keys: Tensor) -> Estimate:
    """Shares ``(B, H, m)`` of the listed keys, with intervals; each sequence is an estimate of its own."""
    weights = key_weights(call, masses.lse, draw, keys)  # (B, H, m, R)
    parts = []
    for b in range(keys.shape[0]):
        one = Rows(draw.index[b : b + 1], draw.weight[b : b + 1], draw.fraction[b : b + 1])
        parts.append(stratified_mean(weights[b][:, :, None], one).to("cpu"))
    return Estimate(*(torch.stack([getattr(p, name) for p in parts]) for name in ("mean", "low", "high")))
