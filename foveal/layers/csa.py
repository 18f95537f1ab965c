"""Class semantics-based attention (CSA, arXiv 2109.02613): gates from recognition features, applied to localisation features.

w_c = σ(W_c·mean_t ReLU(Conv(R))) per channel and w_t = σ(W_t·mean_channels ReLU(Conv(R))) per time step; the output projects
[w_c ⊙ F; w_t ⊙ F] back to the channels of F. Sources, order and gate shapes are the paper's figure 1; kernel sizes, widths and pooling
axes are not readable there and are our reading, each an argument.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest

Source = Literal["R", "F"]
Branches = Literal["both", "channel", "temporal"]
TemporalFC = Literal["linear", "conv", "transpose"]

_KNOWN = {
    "source": ("R", "F"),
    "branches": ("both", "channel", "temporal"),
    "temporal_fc": ("linear", "conv", "transpose"),
    "fuse": ("concat", "add"),
}


class CSA(nn.Module):
    """A gate per channel and a gate per time step.

    Args:
        c_in: channels of R. c_out: channels of F. n_steps: T; ``temporal_fc="linear"`` and ``"transpose"`` are fixed to it.
        hidden: maps of the convolutions; default ``c_out``. kernel_size: of them, odd.
        source: what the gates read; ``"F"`` makes a gate like squeeze-and-excitation, for comparison.
        branches: both (the paper), or one of them.
        temporal_fc: ``"linear"``, a T × T layer after the mean over maps; ``"conv"``, a convolution in its place, for any length (an
            extension); ``"transpose"``, time as the channel axis, convolved along the channels of R and pooled over them.
        fuse: gated features side by side (the paper) or added.
        relu: after the projection.
        circular: time as a ring, which makes the channel gate blind to shifts.

    Raises:
        ConfigError: a size below 1, an even kernel, or an unknown word, with the nearest known one.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        n_steps: int,
        *,
        hidden: int | None = None,
        kernel_size: int = 3,
        source: Source = "R",
        branches: Branches = "both",
        temporal_fc: TemporalFC = "linear",
        fuse: Literal["concat", "add"] = "concat",
        relu: bool = False,
        circular: bool = False,
    ) -> None:
        super().__init__()
        words = {"source": source, "branches": branches, "temporal_fc": temporal_fc, "fuse": fuse}
        for name, value in words.items():
            if value not in _KNOWN[name]:
                raise ConfigError(f"CSA.{name} is {value!r}. {nearest(str(value), _KNOWN[name])}")
        hidden = c_out if hidden is None else hidden
        if min(c_in, c_out, n_steps, hidden, kernel_size) < 1 or kernel_size % 2 == 0:
            raise ConfigError(
                f"CSA has c_in={c_in}, c_out={c_out}, n_steps={n_steps}, hidden={hidden}, kernel_size={kernel_size}; expected sizes of at least 1 and an odd kernel."
            )
        self.c_in, self.c_out, self.n_steps = c_in, c_out, n_steps
        self.source, self.branches, self.temporal_fc, self.fuse = source, branches, temporal_fc, fuse
        read = c_in if source == "R" else c_out

        def convolution(inputs: int, outputs: int) -> nn.Conv1d:
            pad = kernel_size // 2
            if circular:
                return nn.Conv1d(inputs, outputs, kernel_size, padding=pad, padding_mode="circular")
            return nn.Conv1d(inputs, outputs, kernel_size, padding=pad)

        if branches != "temporal":
            self.channel_conv, self.channel_fc = convolution(read, hidden), nn.Linear(hidden, c_out)
        if branches != "channel":
            self.temporal_conv = convolution(n_steps if temporal_fc == "transpose" else read, hidden)
            self.temporal_out: nn.Module
            if temporal_fc == "linear":
                self.temporal_out = nn.Linear(n_steps, n_steps)
            elif temporal_fc == "conv":
                self.temporal_out = convolution(1, 1)
            else:
                self.temporal_out = nn.Linear(hidden, n_steps)
        side_by_side = branches == "both" and fuse == "concat"
        self.proj = nn.Conv1d(2 * c_out if side_by_side else c_out, c_out, 1)
        self.act = nn.ReLU() if relu else nn.Identity()

    def channel_gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """w_c ``(B, c_out, 1)`` from the source features ``(B, channels, T)``."""
        maps = self.channel_conv(_shown(x, valid)).relu()
        if valid is None:
            pooled = maps.mean(-1)
        else:
            pooled = _shown(maps, valid).sum(-1) / valid.sum(-1, keepdim=True).clamp(min=1)
        return self.channel_fc(pooled.to(x.dtype)).sigmoid()[..., None]

    def temporal_gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """w_t ``(B, 1, T)`` from the source features ``(B, channels, T)``."""
        x = _shown(x, valid)
        if self.temporal_fc == "transpose":
            return self.temporal_out(self.temporal_conv(x.mT).relu().mean(-1)).sigmoid()[:, None]
        pooled = _shown(self.temporal_conv(x).relu().mean(1, keepdim=True), valid)  # (B, 1, T)
        return self.temporal_out(pooled).sigmoid()

    def forward(self, r: Tensor, f: Tensor, valid: Tensor | None = None) -> Tensor:
        """Gate and project.

        Args:
            r: recognition features ``(B, c_in, T)``. f: localisation features ``(B, c_out, T)``.
            valid: ``(B, T)`` bool, False on padding, which the gates then do not see.

        Returns:
            ``(B, c_out, T)``.

        Raises:
            ShapeError: shapes that do not fit. UnsupportedError: ``valid`` with ``temporal_fc="transpose"``.
        """
        self._check(r, f, valid)
        x = r if self.source == "R" else f
        parts = []
        if self.branches != "temporal":
            parts.append(self.channel_gate(x, valid) * f)
        if self.branches != "channel":
            parts.append(self.temporal_gate(x, valid) * f)
        joined = torch.cat(parts, 1) if self.fuse == "concat" else torch.stack(parts).sum(0)
        return self.act(self.proj(joined))

    def _check(self, r: Tensor, f: Tensor, valid: Tensor | None) -> None:
        free = self.branches == "channel" or self.temporal_fc == "conv"
        steps = "T" if free else self.n_steps
        for name, x, channels in (("r", r, self.c_in), ("f", f, self.c_out)):
            if x.dim() != 3 or x.shape[1] != channels or (not free and x.shape[2] != self.n_steps):
                raise ShapeError(
                    f"{name} has shape {tuple(x.shape)}; expected (batch, {channels}, {steps})."
                    + ("" if free else " Pad or resample the windows, or use temporal_fc='conv'.")
                )
        if r.shape[::2] != f.shape[::2]:
            raise ShapeError(f"r has shape {tuple(r.shape)} and f {tuple(f.shape)}; expected the same batch and steps.")
        if valid is None:
            return
        if valid.dtype != torch.bool or valid.shape != (r.shape[0], r.shape[2]):
            raise ShapeError(
                f"valid is {valid.dtype} of shape {tuple(valid.shape)}; expected bool ({r.shape[0]}, {r.shape[2]})."
            )
        if self.branches != "channel" and self.temporal_fc == "transpose":
            raise UnsupportedError("temporal_fc='transpose' mixes time steps as channels and cannot leave padding out; use 'linear' or 'conv'.")  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.c_in}, {self.c_out}, {self.n_steps}, source={self.source!r}, branches={self.branches!r}"


def actionness_loss(gate: Tensor, action: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of w_t ``(B, 1, T)`` against labels ``(B, T)`` in [0, 1]: an extension, absent from the paper's figure."""
    loss = nn.functional.binary_cross_entropy(gate[:, 0].float(), action.float(), reduction="none")
    return loss.mean() if valid is None else (loss * valid).sum() / valid.sum().clamp(min=1)


def _shown(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x.masked_fill(~valid[:, None], 0)
