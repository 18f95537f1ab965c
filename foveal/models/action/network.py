"""The boundary-matching network (BMN, arXiv 1907.09702): where actions start and end, and how good every proposal is.

Layers and sampling follow the public reimplementation. The sampled map ``(B, C, N, T, T)`` and the convolution over its N samples
are one linear map of the features, so it is never built: 0.33 GB a video at the published size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, ShapeError
from .attention import ActionAttention, attention_named
from .sampling import Mode, sampling_weights, valid_cells


class Maps(NamedTuple):
    """What BMN says, all from 0 to 1.

    Attributes:
        start, end: ``(B, T)``, of the boundary being there.
        regression, confidence: ``(B, T, T)`` at ``[start, end]``, of the proposal; cells below the diagonal mean nothing.
    """

    start: Tensor
    end: Tensor
    regression: Tensor
    confidence: Tensor


class BMN(nn.Module):
    """Proposals of actions from a video's features per time step.

    Args:
        c_in: channels of the recognition features R. n_steps: T.
        widths: channels along time, of the proposal map, and after sampling. samples: N, per proposal.
        groups: of the convolutions of the encoder and the boundary heads.
        attention: between encoder and heads: a name (``"csa"``, ``"se"``, ``"csa+se"``, ``"wider"``), a factory
            ``(c_in, width, n_steps) → module (r, f) → f′``, or None.
        mode: of :func:`~foveal.models.action.sampling.sampling_weights`.

    Raises:
        ConfigError: sizes below 1, groups that do not divide the channels, or an unknown name.
    """

    weights: Tensor
    cells: Tensor

    def __init__(
        self,
        c_in: int = 400,
        n_steps: int = 100,
        *,
        widths: tuple[int, int, int] = (256, 128, 512),
        samples: int = 32,
        groups: int = 4,
        attention: str | ActionAttention | None = None,
        mode: Mode = "symmetric",
    ) -> None:
        super().__init__()
        width, plane, sampled = widths
        if min(c_in, n_steps, width, plane, sampled, groups) < 1 or c_in % groups or width % groups:
            raise ConfigError(
                f"BMN has c_in={c_in}, n_steps={n_steps}, widths={widths}, groups={groups}; expected sizes of at least 1 and groups that "
                "divide c_in and the first width."
            )
        self.c_in, self.n_steps = c_in, n_steps
        self.register_buffer("weights", sampling_weights(n_steps, samples, mode).flatten(0, 1), persistent=False)
        self.register_buffer("cells", valid_cells(n_steps).flatten().nonzero()[:, 0], persistent=False)

        def along(inputs: int, outputs: int = width, parts: int = groups) -> list[nn.Module]:
            return [nn.Conv1d(inputs, outputs, 3, padding=1, groups=parts), nn.ReLU()]

        self.base = nn.Sequential(*along(c_in), *along(width))
        self.start, self.end = (nn.Sequential(*along(width), nn.Conv1d(width, 1, 1)) for _ in range(2))
        self.reduce = nn.Sequential(*along(width, parts=1))
        self.sampled = nn.Conv3d(width, sampled, (samples, 1, 1))
        self.plane = nn.Sequential(
            nn.Conv2d(sampled, plane, 1), nn.ReLU(),
            nn.Conv2d(plane, plane, 3, padding=1), nn.ReLU(),
            nn.Conv2d(plane, plane, 3, padding=1), nn.ReLU(),
            nn.Conv2d(plane, 2, 1),
        )  # fmt: skip
        factory = attention_named(attention) if isinstance(attention, str) else attention
        self.attention = (
            None if factory is None else factory(c_in, width, n_steps)
        )  # last: seeds give the rest as without

    def encode(self, r: Tensor) -> Tensor:
        """Localisation features ``(B, width, T)`` that the heads read.

        Raises:
            ShapeError: ``r`` is not ``(B, c_in, T)``.
        """
        if r.dim() != 3 or tuple(r.shape[1:]) != (self.c_in, self.n_steps):
            raise ShapeError(
                f"r has shape {tuple(r.shape)}; expected (batch, {self.c_in}, {self.n_steps}). Resample or window longer videos."
            )
        f = self.base(r)
        return f if self.attention is None else self.attention(r, f)

    def match(self, f: Tensor) -> Tensor:
        """``(B, sampled, T, T)`` features of all proposals from ``(B, width, T)``; the bias alone below the diagonal."""
        kernel = self.sampled.weight[..., 0, 0]  # (sampled, width, N)
        mixed = torch.einsum("ocn,bct->bont", kernel, f).flatten(2) @ self.weights  # (B, sampled, cells)
        bias = self.sampled.bias
        assert bias is not None
        whole = mixed.new_zeros(*mixed.shape[:2], self.n_steps**2).index_copy(2, self.cells, mixed)
        return (whole + bias[:, None]).unflatten(2, (self.n_steps, self.n_steps))

    def forward(self, r: Tensor) -> Maps:
        """Raises :class:`ShapeError` unless ``r`` is ``(B, c_in, T)``."""
        f = self.encode(r)
        quality = self.plane(self.match(self.reduce(f)).relu()).sigmoid()
        return Maps(self.start(f)[:, 0].sigmoid(), self.end(f)[:, 0].sigmoid(), quality[:, 0], quality[:, 1])
