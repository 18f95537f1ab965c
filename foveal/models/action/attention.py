"""What may stand between BMN's encoder and its heads: modules ``(r, f) → f′`` by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...core.errors import ConfigError, nearest
from ...layers.channel.squeeze_excite import SE
from ...layers.csa import CSA

ActionAttention = Callable[[int, int, int], nn.Module]
"""``(channels of R, channels of F, steps) → module``."""


class SelfGate(nn.Module):
    """Squeeze-and-excitation of F; R is not read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = SE(channels, reduction=min(16, channels))

    def forward(self, r: Tensor, f: Tensor) -> Tensor:
        return self.gate(f)


class GateThenCSA(nn.Module):
    """A gate from F itself, then CSA's gates from R."""

    def __init__(self, c_in: int, c_out: int, steps: int) -> None:
        super().__init__()
        self.first, self.csa = SelfGate(c_out), CSA(c_in, c_out, steps)

    def forward(self, r: Tensor, f: Tensor) -> Tensor:
        return self.csa(r, self.first(r, f))


class Wider(nn.Module):
    """No gate: two 1×1 convolutions with a ReLU between, as wide as CSA's weights allow. The control for its parameters."""

    def __init__(self, c_in: int, c_out: int, steps: int) -> None:
        super().__init__()
        budget = sum(p.numel() for p in CSA(c_in, c_out, steps).parameters())
        hidden = max(1, (budget - c_out) // (2 * c_out + 1))
        self.body = nn.Sequential(nn.Conv1d(c_out, hidden, 1), nn.ReLU(), nn.Conv1d(hidden, c_out, 1))

    def forward(self, r: Tensor, f: Tensor) -> Tensor:
        return self.body(f)


NAMED: dict[str, ActionAttention] = {
    "csa": CSA,
    "se": lambda c_in, c_out, steps: SelfGate(c_out),
    "csa+se": GateThenCSA,
    "wider": Wider,
}


def attention_named(name: str) -> ActionAttention:
    """The factory of ``"csa"``, ``"se"``, ``"csa+se"`` or ``"wider"``.

    Raises:
        ConfigError: no such name; the message offers the nearest.
    """
    if name not in NAMED:
        raise ConfigError(f"BMN.attention is {name!r}. {nearest(name, NAMED)}")
    return NAMED[name]
