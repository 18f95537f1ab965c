"""BaseNet (arXiv 2310.11198): a small convolutional network for motor-imagery EEG with one slot for channel attention.

Temporal convolution, spatial convolution over electrodes, pooling; projection to 16 channels; a separable convolution, the slot,
pooling; one linear layer. No biases but the last, no max-norm constraints. Module names are those of braindecode's
``AttentionBaseNet``, so weights can be exchanged.

The stem runs in another order than it is written, which is exact: the normalisation between the two convolutions is affine, so
electrodes may be summed first and filtered afterwards, F sums instead of F·E filters. In training, mean and variance of the filtered
electrodes follow from the first two moments of the windows that the filters see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, nearest
from ..layers.channel import ChannelAttention, build_channel_attention
from ..layers.channel.build import options_of

SETTINGS: dict[str, dict[str, Any]] = {
    "2a": {"reduction": 4, "kernel_size": 9, "codewords": 4, "cbam": (8, 15), "cat": (4, 3)},
    "2b": {"reduction": 1, "kernel_size": 11, "codewords": 2, "cbam": (1, 15), "cat": (2, 9)},
    "hgd": {"reduction": 8, "kernel_size": 15, "codewords": 4, "cbam": (4, 7), "cat": (4, 7)},
    "iva": {"reduction": 1, "kernel_size": 7, "codewords": 2, "cbam": (4, 3), "cat": (8, 7)},
}
"""The paper's attention settings per data set; ``cbam`` and ``cat`` have their own (reduction, kernel_size)."""


def paper_options(data: str, attention: str, **more: Any) -> dict[str, Any]:
    """The options that the paper gives a mechanism on a data set, restricted to those that the mechanism takes.

    Args:
        data: ``"2a"``, ``"2b"``, ``"hgd"`` or ``"iva"``. attention: name of the mechanism. more: further options, kept as they are.

    Raises:
        ConfigError: unknown data set or mechanism, with the nearest name.
    """
    if data not in SETTINGS:
        raise ConfigError(f"paper_options has data={data!r}. {nearest(data, SETTINGS)}")
    setting = {k: v for k, v in SETTINGS[data].items() if not isinstance(v, tuple)}
    own = SETTINGS[data].get({"catlite": "cat"}.get(attention, attention))
    if own is not None:
        setting |= {"reduction": own[0], "kernel_size": own[1]}
    taken = options_of(attention)
    return {k: v for k, v in setting.items() if k in taken} | more


class Stem(nn.Module):
    """Temporal and spatial convolution, pooling: ``(B, E, T)`` to ``(B, F·m, 1, L1)``."""

    def __init__(
        self, n_chans: int, filters: int, length: int, expansion: int, pool: int, stride: int, drop: float
    ) -> None:
        super().__init__()
        self.fast = True
        self.temporal_conv = nn.Conv2d(1, filters, (1, length), padding=(0, length // 2), bias=False)
        self.intermediate_bn = nn.BatchNorm2d(filters)
        self.spatial_conv = nn.Conv2d(filters, filters * expansion, (n_chans, 1), groups=filters, bias=False)
        self.bn = nn.BatchNorm2d(filters * expansion)
        self.nonlinearity = nn.ELU()
        self.pool = nn.AvgPool2d((1, pool), (1, stride))
        self.dropout = nn.Dropout(drop)

    def convolve(self, x: Tensor) -> Tensor:
        """The definition: filter every electrode, normalise, then sum electrodes."""
        return self.spatial_conv(self.intermediate_bn(self.temporal_conv(x[:, None])))

    def reordered(self, x: Tensor) -> Tensor:
        """The same: sum electrodes, then filter; the normalisation's shift becomes b·Σ_e w_e, added at every time."""
        norm, length = self.intermediate_bn, self.temporal_conv.kernel_size[1]
        mean, variance = self._statistics(x) if self.training else (norm.running_mean, norm.running_var)
        assert mean is not None and variance is not None
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        per = self.spatial_conv.out_channels // self.spatial_conv.groups
        electrodes = self.spatial_conv.weight[:, 0, :, 0]  # (F·m, E)
        taps = (self.temporal_conv.weight[:, 0] * scale[:, None, None]).repeat_interleave(per, 0)  # (F·m, 1, length)
        constant = shift.repeat_interleave(per) * electrodes.sum(1)
        summed = electrodes @ x
        return nn.functional.conv1d(summed, taps, constant, padding=length // 2, groups=len(taps))[:, :, None]

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(F,)`` of the filtered electrodes over the batch; the running ones move as they would."""
        norm, taps = self.intermediate_bn, self.temporal_conv.weight[:, 0, 0]  # (F, length)
        length = taps.shape[1]
        seen = nn.functional.pad(x, (length // 2, length // 2)).unfold(-1, length, 1).reshape(-1, length)
        centre = seen.mean(0)
        away = seen - centre
        covariance = away.mT @ away / len(seen)
        mean, variance = taps @ centre, ((taps @ covariance) * taps).sum(1)
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            with torch.no_grad():
                norm.num_batches_tracked += 1
                momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
                unbiased = variance * (len(seen) / max(1, len(seen) - 1))
                norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
        return mean, variance

    def forward(self, x: Tensor) -> Tensor:
        out = self.reordered(x) if self.fast else self.convolve(x)
        return self.dropout(self.pool(self.nonlinearity(self.bn(out))))


class AttentionBlock(nn.Module):
    """Separable convolution over time, the slot, pooling: ``(B, C, 1, L1)`` to ``(B, C, 1, L2)``."""

    def __init__(self, width: int, length: int, pool: int, stride: int, drop: float, gate: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, (1, length), padding=(0, length // 2), groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ELU(),
        )
        self.attention_block = gate
        self.pool, self.dropout = nn.AvgPool2d((1, pool), (1, stride)), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.attention_block is not None:
            out = self.attention_block(out.squeeze(2)).unsqueeze(2)
        return self.dropout(self.pool(out))


class BaseNet(nn.Module):
    """Classifier of EEG windows.

    Args:
        n_chans: E, electrodes. n_times: T, samples. n_outputs: classes.
        attention: name of a mechanism, a module ``(B, C, L1) → (B, C, L1)``, or None.
        n_temporal_filters, temp_filter_length_inp, spatial_expansion, pool_length_inp, pool_stride_inp: of the stem.
        ch_dim: C. temp_filter_length, pool_length, pool_stride: after it. drop_prob: of both dropouts.
        shrink: windows that are too short for these sizes get smaller ones, in proportion, instead of an error.
        fast_stem: compute the stem in the order that is faster; False computes it as written.
        options: of the mechanism; ``seq_len`` is filled in where it takes one and needs it.

    Raises:
        ConfigError: the window is too short, or options do not fit the mechanism.
    """

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        n_outputs: int,
        attention: str | nn.Module | None = None,
        *,
        n_temporal_filters: int = 40,
        temp_filter_length_inp: int = 25,
        spatial_expansion: int = 1,
        pool_length_inp: int = 75,
        pool_stride_inp: int = 15,
        ch_dim: int = 16,
        temp_filter_length: int = 15,
        pool_length: int = 8,
        pool_stride: int = 8,
        drop_prob: float = 0.5,
        shrink: bool = False,
        fast_stem: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = [temp_filter_length_inp, pool_length_inp, pool_stride_inp, temp_filter_length, pool_length, pool_stride]
        shortest = pool_stride_inp * (pool_length - 1) + pool_length_inp
        if n_times < shortest:
            if not shrink:
                raise ConfigError(
                    f"BaseNet.n_times is {n_times}; these kernels and pools need at least {shortest} samples. "
                    "Give shorter ones, or shrink=True to scale them all."
                )
            sizes = [max(1, int(size * n_times / shortest)) for size in sizes]
        first, pool1, stride1, second, pool2, stride2 = sizes
        self.n_chans, self.n_times = n_chans, n_times
        self.lengths = _lengths(n_times, first, pool1, stride1, second, pool2, stride2)
        maps = n_temporal_filters * spatial_expansion
        self.input_block = Stem(n_chans, n_temporal_filters, first, spatial_expansion, pool1, stride1, drop_prob)
        self.input_block.fast = fast_stem
        self.channel_expansion = nn.Sequential(nn.Conv2d(maps, ch_dim, 1, bias=False), nn.BatchNorm2d(ch_dim), nn.ELU())
        gate = _gate(attention, ch_dim, self.lengths[0], options)
        self.channel_attention_block = AttentionBlock(ch_dim, second, pool2, stride2, drop_prob, gate)
        self.final_layer = nn.Sequential(nn.Flatten(), nn.Linear(ch_dim * self.lengths[1], n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n_outputs)`` logits of windows ``(B, E, T)``.

        Raises:
            ShapeError: another shape.
        """
        if x.dim() != 3 or tuple(x.shape[1:]) != (self.n_chans, self.n_times):
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected (batch, {self.n_chans} electrodes, {self.n_times} samples)."
            )
        return self.final_layer(self.channel_attention_block(self.channel_expansion(self.input_block(x))))

    @torch.no_grad()
    def gates(self, x: Tensor) -> Tensor:
        """The gate that the slot applies to windows ``(B, E, T)``: ``(B, C, 1 or L1)``.

        Raises:
            ConfigError: the slot holds no channel attention.
        """
        slot = self.channel_attention_block.attention_block
        if not isinstance(slot, ChannelAttention):
            raise ConfigError("this BaseNet has no channel attention whose gate could be read; make it with attention='eca' or another name.")  # fmt: skip
        inner = self.channel_attention_block.conv(self.channel_expansion(self.input_block(x)))
        return slot.gate(inner.squeeze(2))


def _lengths(n_times: int, first: int, pool1: int, stride1: int, second: int, pool2: int, stride2: int) -> list[int]:
    """L1, the places in the slot, and L2; an even kernel makes a window longer by one."""
    pooled = (n_times + 1 - first % 2 - pool1) // stride1 + 1
    slot = pooled + 1 - second % 2
    return [slot, (slot - pool2) // stride2 + 1]


def _gate(attention: str | nn.Module | None, width: int, seq_len: int, options: dict[str, Any]) -> nn.Module | None:
    if isinstance(attention, str):
        needs_places = "seq_len" in options_of(attention) and (attention != "ge" or options.get("learned", False))
        return build_channel_attention(attention, width, **({"seq_len": seq_len} if needs_places else {}) | options)
    if options:
        raise ConfigError(f"BaseNet was given {', '.join(options)} without the name of a mechanism that takes them.")
    return attention
