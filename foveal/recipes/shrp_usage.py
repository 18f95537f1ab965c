"""Which heads the tokens choose, counted while SHRP's converted layers run (arXiv 2512.20635)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError
from ..layers.shrp import ExpertAttention, Routing, share_entropy
from .shrp_hosts import Converted, places

Run = Callable[[nn.Module, Any], object]


def call(model: nn.Module, batch: Any) -> object:
    """How batches meet models unless told otherwise: dicts as keyword arguments, tuples as arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@dataclass(frozen=True, eq=False)
class Usage:
    """How often each head was chosen.

    Attributes:
        layers: indices of the routed layers. counts: ``(len(layers), H)`` tokens that are not padding.
        gates: mean probability of the chosen head over the tokens that chose it, same shape; 0 where none did.
    """

    layers: tuple[int, ...]
    counts: Tensor
    gates: Tensor

    @property
    def share(self) -> Tensor:
        """Counts over their sum, per layer."""
        return self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)

    @property
    def concentration(self) -> Tensor:
        """The largest share, per layer."""
        return self.share.amax(-1)

    @property
    def entropy(self) -> Tensor:
        """Of the shares, in nats, per layer."""
        return share_entropy(self.share)

    def most_concentrated(self, count: int) -> list[int]:
        """The ``count`` layers whose tokens agree most, in order of depth."""
        rank = sorted(range(len(self.layers)), key=lambda i: (-float(self.concentration[i]), i))
        return sorted(self.layers[i] for i in rank[:count])


class Evaluating:
    """Eval mode inside, every module's own mode again afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exc: object) -> None:
        for module, mode in self.modes:
            module.training = mode


def routed(model: nn.Module) -> dict[int, ExpertAttention]:
    """The layers that still route, by index."""
    found = {}
    for index, (_, _, layer) in enumerate(places(model)):
        if isinstance(layer, Converted) and isinstance(layer.layer, ExpertAttention):
            found[index] = layer.layer
    return found


class Watch:
    """Sees the routing of every converted layer while it is open.

    Attributes:
        latest: per layer index the last forward's :class:`Routing` and padding, differentiable.
        counts: per layer index ``(H,)`` float64: tokens per head, as sums, or as moving averages where ``decay`` is above 0.
    """

    def __init__(self, model: nn.Module, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"Watch: decay is {decay}; expected 0 (sums) to below 1 (moving averages, such as 0.99).")
        self.layers, self.decay = routed(model), decay
        self.latest: dict[int, tuple[Routing, Tensor]] = {}
        self.counts: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}

    def __enter__(self) -> Self:
        self._hooks = [
            layer.register_forward_pre_hook(lambda module, args, i=index: self._see(i, module, *args))  # type: ignore[misc]
            for index, layer in self.layers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, index: int, layer: nn.Module, x: Tensor, valid: Tensor | None = None) -> None:
        assert isinstance(layer, ExpertAttention)
        routing = layer.route(x, valid)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        self.latest[index] = routing, real
        with torch.no_grad():
            choice, p = routing.choice[real], routing.probabilities[real].double()
            new = choice.bincount(minlength=layer.num_heads).double()
            gate = torch.zeros_like(new).index_add_(0, choice, p.gather(-1, choice[:, None])[:, 0])
            for table, value in ((self.counts, new), (self.gates, gate)):
                if index in table:
                    value = self.decay * table[index] + (1 - self.decay) * value if self.decay else table[index] + value
                table[index] = value

    def entropy(self) -> Tensor:
        """Mean over the layers of the entropy of the last forward's mean probabilities; add it to a loss to force agreement.

        Raises:
            DataError: nothing has passed the layers yet.
        """
        if not self.latest:
            raise DataError("Watch: no batch has passed the converted layers yet.")
        parts = [share_entropy(routing.probabilities[real].mean(0)) for routing, real in self.latest.values()]
        return torch.stack(parts).mean()

    def usage(self) -> Usage:
        """What was counted so far.

        Raises:
            DataError: nothing has passed the layers yet.
        """
        if not self.counts:
            raise DataError(
                "usage: no batch has passed a routed layer; expected at least one batch and a converted model."
            )
        order = sorted(self.counts)
        counts, gates = (torch.stack([table[i] for i in order]) for table in (self.counts, self.gates))
        return Usage(tuple(order), counts, gates / counts.clamp(min=1e-30))


def count_usage(model: nn.Module, batches: Iterable[Any], run: Run = call) -> Usage:
    """One pass in eval mode over ``batches``: whole counts, the same in any order and batch size.

    Raises:
        DataError: no batch, or no layer routes.
    """
    with Watch(model) as watch, torch.no_grad(), Evaluating(model):
        for batch in batches:
            run(model, batch)
    return watch.usage()
