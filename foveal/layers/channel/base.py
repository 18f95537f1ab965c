"""What all channel attention shares: the shape contract, pooling, the bottleneck, and loading of weights from other libraries.

A mechanism computes a gate from its input and multiplies: ``out = x · gate(x)``, for ``x`` ``(B, C, T)``, ``(B, C, H, W)`` or
any other number of trailing axes. Where a mechanism has no sense of place, all trailing axes count as one.

One vocabulary of options, each with one meaning wherever a mechanism takes it:

=============== ===================================================================================================
``reduction``   r, the bottleneck of a two-layer perceptron has C // r units
``kernel_size`` taps of a convolution over channels (``eca``) or places (``cbam``, ``cat``); odd
``seq_len``     places: an integer, or one size per trailing axis
``codewords``   K of ``encnet``
``freq``        frequency of ``fca``: an integer, or one per trailing axis
``groups``      of ``se_gc``
``squeeze``     ``"mean"`` or ``"l2"``: what is pooled
``gate``        the last function: ``"sigmoid"``, ``"hardsigmoid"`` or ``"none"``
``mlp``         a bottleneck before the gate (``ge``, ``srm``)
``ndim``        trailing axes of a mechanism with a convolution over places: 1 or 2
``bias``        of the bottleneck
=============== ===================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from ...core.serial import at_least

Gate = Literal["sigmoid", "hardsigmoid", "none"]
Squeeze = Literal["mean", "l2"]

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": nn.functional.hardsigmoid,
    "none": lambda u: u,
}
_LOW = (torch.bfloat16, torch.float16)


class ChannelAttention(nn.Module):
    """Base of every mechanism; a subclass defines :meth:`weights`.

    Args:
        channels: C of the input.

    Raises:
        ConfigError: an option out of range.
    """

    registered_name: str
    masks = True
    """Whether :meth:`gate` can leave padded places out."""
    ndim: int | None = None
    """Trailing axes that the mechanism is built for; None for any number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = at_least("channels", channels, 1, self)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The gate of ``x``: ``(B, C)``, or ``(B, C, …)`` with axes that broadcast to those of ``x``."""
        raise NotImplementedError

    def gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """What :meth:`forward` multiplies with, in the dtype of ``x``: ``(B, C, 1, …)``, or all of ``(B, C, …)`` where it
        differs from place to place.

        Args:
            x: ``(B, C, …)`` with at least one trailing axis.
            valid: ``(B, …)`` bool over the same trailing axes, False on padding, which is then not pooled. A row of padding
                alone pools to zero.

        Raises:
            ShapeError: other channels, axes or places than the mechanism was made for.
            UnsupportedError: ``valid`` for a mechanism that mixes places by a convolution or a fixed filter.
        """
        self._check(x, valid)
        found = self.weights(x, valid).to(x.dtype)
        return found.view(*found.shape, *(1,) * (x.dim() - found.dim()))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``x`` times its gate; arguments and errors of :meth:`gate`."""
        return x * self.gate(x, valid)

    def extra_repr(self) -> str:
        return str(self.channels)

    def _check(self, x: Tensor, valid: Tensor | None) -> None:
        if x.dim() < 3 or x.shape[1] != self.channels or 0 in x.shape[2:]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected (batch, {self.channels}, …) with one or more trailing axes that are not empty."
            )
        if self.ndim is not None and x.dim() - 2 != self.ndim:
            raise ShapeError(
                f"x has {x.dim() - 2} trailing axes and {type(self).__name__} was made for {self.ndim}. "
                f"Make it with ndim={x.dim() - 2}."
            )
        if valid is None:
            return
        if not self.masks:
            raise UnsupportedError(
                f"{type(self).__name__} cannot leave padding out: it weighs places by their position. "
                "Call it without `valid` on inputs of equal length, or use one of the pooling mechanisms such as 'eca' or 'se'."
            )
        if valid.dtype != torch.bool or valid.shape != x.shape[:1] + x.shape[2:]:
            raise ShapeError(
                f"valid is {valid.dtype} of shape {tuple(valid.shape)}; expected bool of shape {tuple(x.shape[:1] + x.shape[2:])}."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept weights that differ by axes of length one, as those of 1×1 convolutions do."""
        for name, mine in self.state_dict().items():
            theirs = state_dict.get(prefix + name)
            if theirs is not None and theirs.shape != mine.shape and _bare(theirs) == _bare(mine):
                state_dict[prefix + name] = theirs.reshape(mine.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _bare(x: Tensor) -> list[int]:
    return [n for n in x.shape if n != 1]


# --- pooling: every function takes x (B, C, …) and gives (B, C) in the dtype of x, summed in float32 or wider ---------------


def wide(x: Tensor) -> Tensor:
    """``x`` in a dtype that sums can be trusted to."""
    return x.float() if x.dtype in _LOW else x


def kept(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """``(B, C, N)`` with zeros on padding, and how many places count: a number, or ``(B, 1)``."""
    flat = wide(x.flatten(2))
    if valid is None:
        return flat, flat.shape[-1]
    seen = valid.flatten(1)[:, None]
    return flat.masked_fill(~seen, 0), seen.sum(-1).clamp(min=1)


def mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over places."""
    flat, count = kept(x, valid)
    return (flat.sum(-1) / count).to(x.dtype)


def deviation(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Standard deviation over places, with count − 1 in the divisor.

    Raises:
        ShapeError: one place, of which there is no deviation.
    """
    if x[0, 0].numel() < 2:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}: one place has no standard deviation; expected two places or more."
        )
    flat, count = kept(x, valid)
    away = flat - (flat.sum(-1) / count)[..., None]
    if valid is not None:
        away = away.masked_fill(~valid.flatten(1)[:, None], 0)
        count = count.clamp(min=2) if isinstance(count, Tensor) else count
    # the smallest normal number keeps the gradient of a constant channel finite
    variance = away.square().sum(-1) / (count - 1)
    return variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt().to(x.dtype)


def energy(x: Tensor, valid: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """√(Σ x² + ε) over places."""
    return (kept(x, valid)[0].square().sum(-1) + epsilon).sqrt().to(x.dtype)


def pool(x: Tensor, valid: Tensor | None, squeeze: Squeeze) -> Tensor:
    """One of the two squeezes by name."""
    return mean(x, valid) if squeeze == "mean" else energy(x, valid)


# --- small parts ---------------------------------------------------------------------------------------------------------------


def bottleneck(channels: int, reduction: int, bias: bool, where: nn.Module, inputs: int | None = None) -> nn.Sequential:
    """W2·ReLU(W1·) from ``inputs`` (default C) over C // r to C units.

    Raises:
        ConfigError: a reduction that leaves no unit.
    """
    inputs = channels if inputs is None else inputs
    hidden = inputs // at_least("reduction", reduction, 1, where)
    if hidden < 1:
        raise ConfigError(
            f"{type(where).__name__}.reduction is {reduction} and leaves {inputs} // {reduction} = 0 units; expected at most {inputs}."
        )
    return nn.Sequential(nn.Linear(inputs, hidden, bias), nn.ReLU(), nn.Linear(hidden, channels, bias))


def apply_gate(u: Tensor, gate: Gate) -> Tensor:
    """The gate function by name."""
    return _GATES[gate](u)


def one_of(name: str, value: str, known: tuple[str, ...], where: nn.Module) -> Any:
    """``value`` if it is known; otherwise a :class:`ConfigError` with the nearest known one."""
    if value not in known:
        raise ConfigError(f"{type(where).__name__}.{name} is {value!r}. {nearest(str(value), known)}")
    return value


def gate_name(value: str, where: nn.Module) -> Gate:
    """A gate function's name, checked."""
    found: Gate = one_of("gate", value, tuple(_GATES), where)
    return found


def odd(value: int, where: nn.Module) -> int:
    """A kernel size with a middle."""
    if at_least("kernel_size", value, 1, where) % 2 == 0:
        raise ConfigError(
            f"{type(where).__name__}.kernel_size is {value}, which has no middle; expected an odd number such as {value + 1}."
        )
    return value


def places(seq_len: int | tuple[int, ...] | None, where: nn.Module) -> tuple[int, ...]:
    """Sizes of the trailing axes.

    Raises:
        ConfigError: none were given, or one is below 1.
    """
    if seq_len is None:
        raise ConfigError(
            f"{type(where).__name__}.seq_len is missing; expected the places of the input, such as seq_len=62 or seq_len=(7, 7)."
        )
    sizes = (seq_len,) if isinstance(seq_len, int) else tuple(seq_len)
    for n in sizes:
        at_least("seq_len", n, 1, where)
    return sizes


def check_places(x: Tensor, sizes: tuple[int, ...], where: nn.Module) -> None:
    """Raise :class:`ShapeError` unless the places of ``x`` are those that the weights were made for."""
    if x[0, 0].numel() != math.prod(sizes):
        raise ShapeError(
            f"x has places {tuple(x.shape[2:])} and {type(where).__name__} was made for {sizes}; its weights belong to places. "
            f"Make it with seq_len={x.shape[2] if x.dim() == 3 else tuple(x.shape[2:])}."
        )
