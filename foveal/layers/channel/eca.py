"""Efficient channel attention (ECA-Net, arXiv 1910.03151): one small convolution across the channel index.

ω = σ(Conv1d_k(y)) with y the mean over places, zero padding, no bias: row i of the equivalent matrix holds the kernel around
the diagonal (centred, as released; the paper's eq. 6 draws it from the diagonal onwards). ECA-NS gives every channel a kernel of
its own. With ``circular`` the first and the last channel are neighbours (timm's "ceca").
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.registry import register
from .base import ChannelAttention, Gate, apply_gate, gate_name, mean, odd

SMALL = 16_384
"""Channels times batch up to which one 2-D convolution is the fastest form on a CPU. Above it, and in place of a 1-D convolution
over a batch at any size, products of shifted views are several times faster in training."""


def adaptive_kernel(channels: int, gamma: float = 2.0, beta: float = 1.0) -> int:
    """The kernel size for C channels: |(log2 C + β)/γ| cut to an integer, plus one if that is even (eq. 12, as released).

    Raises:
        ConfigError: channels below 1 or a γ of zero.
    """
    if channels < 1 or gamma == 0:
        raise ConfigError(
            f"adaptive_kernel has channels={channels}, gamma={gamma}; expected channels of at least 1 and a gamma that is not 0."
        )
    size = int(abs((math.log2(channels) + beta) / gamma))
    return size if size % 2 else size + 1


class _Local(ChannelAttention):
    """What ECA and ECA-NS share: the kernel's size and the padding."""

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | Literal["adaptive"] = "adaptive",
        gamma: float = 2.0,
        beta: float = 1.0,
        circular: bool = False,
        gate: Gate = "sigmoid",
    ) -> None:
        super().__init__(channels)
        size = adaptive_kernel(channels, gamma, beta) if kernel_size == "adaptive" else kernel_size
        self.kernel_size = odd(size, self)
        if circular and self.kernel_size // 2 > channels:
            raise ConfigError(
                f"{type(self).__name__}.kernel_size is {size} with circular=True and {channels} channels; expected at most {2 * channels + 1}."
            )
        self.circular, self.gate_function = circular, gate_name(gate, self)
        self._make_weights()

    def _make_weights(self) -> None:
        raise NotImplementedError

    def padded(self, y: Tensor) -> Tensor:
        """``(B, C + k − 1)``."""
        pad = self.kernel_size // 2
        return nn.functional.pad(y[:, None], (pad, pad), mode="circular" if self.circular else "constant")[:, 0]

    def matrix(self) -> Tensor:
        """The ``(C, C)`` matrix W with ω = σ(W·y): the definition that the convolution computes."""
        eye = torch.eye(self.channels, dtype=self._rows().dtype, device=self._rows().device)
        return torch.einsum("ik,jik->ij", self._rows(), self.padded(eye).unfold(1, self.kernel_size, 1))

    def _rows(self) -> Tensor:
        """``(C, k)``: the weights that channel i applies to its neighbours."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}" + (", circular=True" if self.circular else "")


@register("channel", "eca")
class ECA(_Local):
    """One kernel of k weights for all channels.

    Args:
        channels: C. kernel_size: k, odd; ``"adaptive"`` takes :func:`adaptive_kernel`. gamma, beta: of the latter.
        circular: channels form a ring. gate: last function.
    """

    def _make_weights(self) -> None:
        self.conv = nn.Conv1d(1, 1, self.kernel_size, bias=False)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        y, weight = self.padded(mean(x, valid)), self.conv.weight
        if y.numel() <= SMALL:  # the batch as the height of one picture
            u = nn.functional.conv2d(y[None, None], weight[None])[0, 0]
        else:
            u = y.unfold(1, self.kernel_size, 1) @ weight[0, 0]
        return apply_gate(u, self.gate_function)

    def _rows(self) -> Tensor:
        return self.conv.weight[0].expand(self.channels, -1)


@register("channel", "eca_ns")
class ECANS(_Local):
    """A kernel of its own for every channel: k·C parameters. Arguments of :class:`ECA`."""

    def _make_weights(self) -> None:
        self.weight = nn.Parameter(torch.empty(self.channels, self.kernel_size))
        nn.init.uniform_(self.weight, -(self.kernel_size**-0.5), self.kernel_size**-0.5)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        near = self.padded(mean(x, valid)).unfold(1, self.kernel_size, 1)
        return apply_gate(torch.einsum("bck,ck->bc", near, self.weight), self.gate_function)

    def _rows(self) -> Tensor:
        return self.weight
