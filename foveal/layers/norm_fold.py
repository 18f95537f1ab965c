"""Fold trained RepBN norms into the linear layers beside them (SLAB, arXiv 2405.11582), exactly, in any model.

In eval mode RepBN is ``a ⊙ x + b``. Into a following layer: ``W' = W·diag(a)``, ``c' = c + W·b``. Into a preceding one:
``W' = diag(a)·W``, ``c' = a ⊙ c + b``.

Which layers follow or precede is observed while the model runs an example, and every fold is tried with random ``a`` and ``b`` first:
a fold that changes the model's output is not made. A norm without a fold stays as one multiplication and addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError
from .prepbn import PRepBN, RepBN

Run = Callable[[nn.Module], Tensor]
"""Runs the model on an example and returns one output tensor."""


class Affine(nn.Module):
    """``weight ⊙ x + bias``: what is left of a norm that found no layer to go into."""

    eps = float("nan")  # see PRepBN.eps

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


class FoldedNorm(nn.Identity):
    """The place of a norm that now lives in its neighbours."""

    eps = float("nan")


@dataclass(frozen=True)
class Fold:
    """Where one norm went: ``into`` names the layers; ``how`` is ``"following"``, ``"preceding"`` or ``"affine"``."""

    norm: str
    into: tuple[str, ...]
    how: str


@dataclass
class FoldReport:
    """What :func:`fold_norms` did.

    Attributes:
        folds: one per norm. gained_bias: layers that had no bias before. untied: layers whose weight was shared with another
            module and is their own now.
        error: largest difference of the output on the example, over the output's largest value.
    """

    folds: list[Fold] = field(default_factory=list)
    gained_bias: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    error: float = 0.0


@torch.no_grad()
def fold_norms(model: nn.Module, run: Run, *, tolerance: float | None = None, seed: int = 0) -> FoldReport:
    """Fold every :class:`PRepBN` and :class:`RepBN` of a model, in place; the model is left in eval mode.

    Args:
        model: after training, with γ = 0 everywhere.
        run: takes the model, calls it on an example with several different tokens, and returns its output, such as logits.
        tolerance: relative difference that all folds together may make on the example; default 1e-3, in half precision 5e-2.
        seed: of the trial maps.

    Raises:
        ConfigError: no such norm, or γ is not 0 yet. ModelError: the example never reaches a norm, or the folded model differs.
    """
    norms: dict[str, nn.Module] = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, PRepBN) or (isinstance(m, RepBN) and not _inner(model, name))
    }
    if not norms:
        raise ConfigError("fold_norms found no PRepBN or RepBN in the model; call convert_norms before training.")
    for name, m in norms.items():
        if isinstance(m, PRepBN) and m.phase != "done":
            raise ConfigError(
                f"{name} has γ = {float(m.gamma):.3g}; expected 0: RepBN is not trained alone yet. Train to step {m.warmup + m.total_steps}, or set_progress there."
            )
    model.eval()
    before = run(model).clone()
    if tolerance is None:
        tolerance = 1e-3 if before.dtype in (torch.float32, torch.float64) else 5e-2
    share = 0.01 if before.dtype in (torch.float32, torch.float64) else 0.1
    calls = _observe(model, norms, run)
    g, report = torch.Generator().manual_seed(seed), FoldReport()
    shared = _shared(model)
    for name, m in norms.items():
        rep = m.rep if isinstance(m, PRepBN) else m
        assert isinstance(rep, RepBN)
        a, b = rep.affine()
        if name not in calls.outputs:
            raise ModelError(f"the example never reaches {name}; run one that passes every norm.")
        for how, layers in _candidates(model, calls, name, len(a)):
            if _works(model, name, how, layers, run, share, g, len(a)):
                for layer in layers:
                    target = model.get_submodule(layer)
                    if _bias_of(target) is None:
                        report.gained_bias.append(layer)
                    if id(_weight_of(target)) in shared:
                        report.untied.append(layer)
                _apply(model, name, how, layers, a, b)
                report.folds.append(Fold(name, layers, how))
                break
        else:
            like = next(m.parameters())
            model.set_submodule(name, Affine(a.to(like), b.to(like)))
            report.folds.append(Fold(name, (), "affine"))
    report.error = _difference(run(model), before)
    if not report.error <= tolerance:
        raise ModelError(
            f"the folded model differs by {report.error:.2g}, more than {tolerance:.2g}; its example may not be deterministic in eval mode."
        )
    return report


def _inner(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return name.endswith(".rep") and isinstance(model.get_submodule(parent), PRepBN)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


# --- what runs beside a norm ------------------------------------------------------------------------------------------


@dataclass
class _Calls:
    """Tensors seen in one run, kept alive so that their memory tells them apart."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    layers: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)


def _foldable(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.groups == 1
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) and _weight_of(module) is not None


def _observe(model: nn.Module, norms: dict[str, nn.Module], run: Run) -> _Calls:
    calls, handles = _Calls(), []

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            calls.inputs[name], calls.outputs[name], calls.order[name] = args[0], out, len(calls.layers)

        return hook

    def layer_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given = args[0] if args else next((x for x in kwargs.values() if isinstance(x, Tensor)), None)
            made = out[0] if isinstance(out, tuple) else out
            if isinstance(given, Tensor) and isinstance(made, Tensor):
                calls.layers.append((name, given, made))

        return hook

    for name, m in norms.items():
        handles.append(m.register_forward_hook(norm_hook(name)))
    for name, m in model.named_modules():
        if _foldable(m):
            handles.append(m.register_forward_hook(layer_hook(name), with_kwargs=True))
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _candidates(model: nn.Module, calls: _Calls, name: str, channels: int) -> list[tuple[str, tuple[str, ...]]]:
    """Folds to try, the likeliest first."""
    place, made, given = calls.order[name], calls.outputs[name], calls.inputs[name]

    def fits(layer: str, axis: int) -> bool:
        weight = _weight_of(model.get_submodule(layer))
        return weight is not None and weight.shape[axis] == channels

    after = tuple(dict.fromkeys(n for n, x, _ in calls.layers[place:] if _memory(x) == _memory(made) and fits(n, 1)))
    ahead = tuple(dict.fromkeys(n for n, _, y in calls.layers[:place] if _memory(y) == _memory(given) and fits(n, 0)))
    found = [("following", after)] if after else []
    # a reshape that copies hides the neighbour: the nearest layers that fit are tried too
    later = next((n for n, _, _ in calls.layers[place:] if fits(n, 1)), None)
    earlier = next((n for n, _, _ in reversed(calls.layers[:place]) if fits(n, 0)), None)
    found += [("following", (later,))] if later is not None and (later,) != after else []
    found += [("preceding", ahead)] if ahead else []
    found += [("preceding", (earlier,))] if earlier is not None and (earlier,) != ahead else []
    return found


def _shared(model: nn.Module) -> set[int]:
    """Ids of weights that several modules hold."""
    seen: dict[int, int] = {}
    for m in model.modules():
        for p in m.parameters(recurse=False):
            seen[id(p)] = seen.get(id(p), 0) + 1
    return {key for key, count in seen.items() if count > 1}


# --- folding ----------------------------------------------------------------------------------------------------------


def _weight_of(layer: nn.Module) -> Tensor | None:
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else getattr(layer, "weight", None)


def _bias_of(layer: nn.Module) -> Tensor | None:
    return layer.in_proj_bias if isinstance(layer, nn.MultiheadAttention) else getattr(layer, "bias", None)


def _put(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    prefix = "in_proj_" if isinstance(layer, nn.MultiheadAttention) else ""
    setattr(layer, prefix + "weight", nn.Parameter(weight))
    setattr(layer, prefix + "bias", nn.Parameter(bias))


def folded(layer: nn.Module, how: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``layer`` with ``a ⊙ x + b`` taken in, computed in float64, in the layer's own dtype."""
    weight, bias = _weight_of(layer), _bias_of(layer)
    assert weight is not None
    w = weight.detach().double()
    c = w.new_zeros(w.shape[0]) if bias is None else bias.detach().double()
    a, b = a.to(w), b.to(w)
    if how == "following":
        spread = a.view(1, -1, *[1] * (w.dim() - 2))
        c = c + (w * b.view(spread.shape)).flatten(1).sum(1)
        w = w * spread
    else:
        w, c = w * a.view(-1, *[1] * (w.dim() - 1)), a * c + b
    return w.to(weight.dtype), c.to(weight.dtype)


def _apply(model: nn.Module, name: str, how: str, layers: tuple[str, ...], a: Tensor, b: Tensor) -> None:
    for layer in layers:
        target = model.get_submodule(layer)
        _put(target, *folded(target, how, a, b))
    model.set_submodule(name, FoldedNorm())


def _works(
    model: nn.Module, name: str, how: str, layers: tuple[str, ...], run: Run, share: float, g: torch.Generator, channels: int
) -> bool:  # fmt: skip
    """Whether folding a random map in place of this norm leaves the output as it is; the model is then as before.

    The difference is held against what another random map does to the output, so that a norm of little effect hides no mistake; where
    rounding is too large to tell, the answer is no.
    """
    norm, targets = model.get_submodule(name), [model.get_submodule(layer) for layer in layers]
    kept = [(_weight_of(t), _bias_of(t)) for t in targets]
    at = next(norm.parameters())

    def some_map() -> tuple[Tensor, Tensor]:
        a = 0.5 + torch.rand(channels, generator=g, dtype=torch.float64)
        return a.to(at.device), torch.randn(channels, generator=g, dtype=torch.float64).to(at.device)

    (a, b), (other_a, other_b) = some_map(), some_map()
    try:
        model.set_submodule(name, Affine(other_a.to(at), other_b.to(at)))
        other = run(model).clone()
        model.set_submodule(name, Affine(a.to(at), b.to(at)))
        wanted = run(model).clone()
        _apply(model, name, how, layers, a, b)
        difference = (run(model).double() - wanted.double()).abs().max()
        return bool(difference <= share * (wanted.double() - other.double()).abs().max())
    finally:
        model.set_submodule(name, norm)
        for target, (weight, bias) in zip(targets, kept, strict=True):
            prefix = "in_proj_" if isinstance(target, nn.MultiheadAttention) else ""
            setattr(target, prefix + "weight", weight)
            setattr(target, prefix + "bias", bias)
