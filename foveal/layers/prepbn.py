"""PRepBN (SLAB, arXiv 2405.11582): a norm that begins as LayerNorm or RMSNorm and ends as one affine map per channel.

``RepBN(x) = BN(x) + η·x``; ``PRepBN(x) = γ·Norm(x) + (1 − γ)·RepBN(x)`` while γ falls from 1 to 0 in training, RepBN alone in eval
mode. Statistics are per channel over all tokens of a batch, so in training a token's output depends on the others, later ones
included; in eval mode it does not. Folding what is left into linear layers: :mod:`foveal.layers.norm_fold`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, nearest

Start = Literal["auto", "one", "zero"]
STARTS = ("auto", "one", "zero")
Kind = Literal["prepbn", "repbn", "batchnorm"]
KINDS = ("prepbn", "repbn", "batchnorm")


class RepBN(nn.Module):
    """``BN(x) + η·x`` over the last axis of ``(…, C)``.

    Args:
        channels: C. start: ``"one"``: η and the batch norm's weight are 1 (vision); ``"zero"``: both are 0, so the output is 0 at
            first (LLaMA). skip: False leaves η·x out: plain batch norm.
        eps, momentum: of the batch norm.
    """

    def __init__(
        self, channels: int, start: Start = "one", *, skip: bool = True, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        if start not in ("one", "zero"):
            raise ConfigError(f"RepBN.start is {start!r}; expected 'one' or 'zero'.")
        self.bn = nn.BatchNorm1d(channels, eps=eps, momentum=momentum)
        value = 1.0 if start == "one" else 0.0
        nn.init.constant_(self.bn.weight, value if skip else 1.0)
        self.eta = nn.Parameter(torch.tensor(value)) if skip else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``valid`` ``(…)`` bool: tokens that count in the statistics; the others get zeros from the batch norm."""
        if x.shape[-1] != self.bn.num_features:
            raise ShapeError(f"x has {x.shape[-1]} channels; expected {self.bn.num_features}.")
        assert self.bn.running_mean is not None
        with torch.autocast(x.device.type, enabled=False):  # statistics stay in the module's precision
            flat = x.reshape(-1, x.shape[-1]).to(self.bn.running_mean.dtype)
            if valid is None or not self.bn.training:
                normed = self.bn(flat)
            else:
                kept = valid.expand(x.shape[:-1]).reshape(-1)
                normed = torch.zeros_like(flat).index_put((kept.nonzero()[:, 0],), self.bn(flat[kept]))
            if self.eta is not None:
                normed = normed + self.eta * flat
        return normed.view(x.shape).to(x.dtype)

    def affine(self) -> tuple[Tensor, Tensor]:
        """``(a, b)`` in float64: in eval mode the module is ``a ⊙ x + b``."""
        mean, deviation, weight, bias = self._parts()
        a = weight / deviation
        return (a if self.eta is None else a + self.eta.detach().double()), bias - weight * mean / deviation

    def as_batch_norm(self) -> nn.BatchNorm1d:
        """One batch norm that is the same in eval mode: weight w + η·σ̂, bias β + η·μ, with σ̂ including eps."""
        mean, deviation, weight, bias = self._parts()
        eta = 0.0 if self.eta is None else self.eta.detach().double()
        one = nn.BatchNorm1d(self.bn.num_features, eps=self.bn.eps).to(self.bn.weight)
        one.load_state_dict({**self.bn.state_dict(), "weight": weight + eta * deviation, "bias": bias + eta * mean})
        return one.eval()

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        deviation = (self.bn.running_var.double() + self.bn.eps).sqrt()
        return (
            self.bn.running_mean.double(),
            deviation,
            self.bn.weight.detach().double(),
            self.bn.bias.detach().double(),
        )


class PRepBN(nn.Module):
    """γ·norm + (1 − γ)·RepBN in training, RepBN in eval mode.

    Args:
        norm: what it begins as; kept as it is. channels: its width.
        total_steps: T, over which γ falls linearly to 0. warmup: steps of pure ``norm`` before; RepBN is not even run then.
        every: None: γ moves by :meth:`set_progress` alone. A number: it moves by one step after that many training forwards, as
            the authors' code counts, which checkpointing or several forwards per step make too fast.
        start: see :class:`RepBN`. mixed_eval: blend in eval mode too, to watch a training; never for use.
    """

    gamma: Tensor

    def __init__(
        self, norm: nn.Module, channels: int, total_steps: int, *, warmup: int = 0, every: int | None = None, start: Start = "one",
        mixed_eval: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if total_steps < 1 or warmup < 0 or (every is not None and every < 1):
            raise ConfigError(
                f"PRepBN has total_steps={total_steps}, warmup={warmup}, every={every}; expected at least 1, 0, and 1 or None."
            )
        self.norm, self.rep = norm, RepBN(channels, start)
        self.total_steps, self.warmup, self.every, self.mixed_eval = total_steps, warmup, every, mixed_eval
        self.valid: Tensor | None = None
        self.register_buffer("gamma", torch.ones(()))
        self._forwards = 0
        self.set_progress(0)

    def set_progress(self, step: int) -> None:
        """γ for optimiser step ``step``: 1 up to ``warmup``, 0 from ``warmup + total_steps`` on."""
        self.step = step
        left = min(1.0, max(0.0, 1 - (step - self.warmup) / self.total_steps))
        self.phase = "norm" if step < self.warmup else "blend" if left > 0 else "done"
        self.gamma.fill_(left)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(…, C)``; ``valid`` ``(…)`` bool says which tokens count, default what :func:`valid_tokens` set."""
        valid = self.valid if valid is None else valid
        if not self.training and not self.mixed_eval:
            return self.rep(x, valid)
        if self.phase == "norm":
            out = self.norm(x)
        elif self.phase == "done":
            out = self.rep(x, valid)
        else:
            gamma = self.gamma.to(x.dtype)
            out = gamma * self.norm(x) + (1 - gamma) * self.rep(x, valid)
        if self.training and self.every is not None:
            self._forwards += 1
            if self._forwards % self.every == 0:
                self.set_progress(self.step + 1)
        return out

    def get_extra_state(self) -> dict[str, Any]:
        """Where the schedule is; part of the state_dict."""
        return {"step": self.step, "forwards": self._forwards}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._forwards = state["forwards"]
        self.set_progress(state["step"])

    @property
    def eps(self) -> float:
        """Not a number, and so equal to no other: PyTorch's encoder layer compares it and leaves its fused path, which would read
        a LayerNorm's weights here."""
        return float("nan")


def convert_norms(
    model: nn.Module, total_steps: int, *, warmup: int = 0, every: int | None = None, start: Start = "auto", kind: Kind = "prepbn",
    where: Callable[[str, nn.Module], bool] | None = None,
) -> list[str]:  # fmt: skip
    """Replace the LayerNorms and RMSNorms of a model, in place.

    Args:
        model: any transformer; ``nn.LayerNorm`` over one axis, ``nn.RMSNorm``, and classes named ``…RMSNorm`` with one weight per
            channel are found.
        total_steps, warmup, every: of :class:`PRepBN`.
        start: ``"auto"``: ``"one"`` for LayerNorm, ``"zero"`` for RMSNorm.
        kind: ``"prepbn"``; ``"repbn"`` or ``"batchnorm"`` for the bare forms, as baselines.
        where: takes a module's name and itself; False leaves it alone.

    Returns:
        The names of the replaced modules.

    Raises:
        ConfigError: no norm was found, or an option is unknown.
    """
    for label, value, known in (("kind", kind, KINDS), ("start", start, STARTS)):
        if value not in known:
            raise ConfigError(f"convert_norms: {label} is {value!r}. {nearest(str(value), known)}")
    made: dict[nn.Module, nn.Module] = {}
    names = []
    inside = [f"{name}.norm" for name, m in model.named_modules() if isinstance(m, PRepBN)]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        channels = _channels(module)
        if not name or not channels or name in inside or (where is not None and not where(name, module)):
            continue
        if module not in made:
            began = ("one" if isinstance(module, nn.LayerNorm) else "zero") if start == "auto" else start
            made[module] = (
                PRepBN(module, channels, total_steps, warmup=warmup, every=every, start=began)
                if kind == "prepbn"
                else RepBN(channels, "one" if kind == "batchnorm" else began, skip=kind == "repbn")
            )
            weight = next(module.parameters(), None)
            made[module].to(weight.device if weight is not None else None).train(module.training)
        model.set_submodule(name, made[module])
        names.append(name)
    if not names:
        raise ConfigError(
            "convert_norms found no LayerNorm or RMSNorm over one axis in the model; check `where`, or wrap norms of other classes in PRepBN."
        )
    return names


def _channels(module: nn.Module) -> int:
    """Width of a norm that can be replaced, 0 for anything else."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else 0
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm")
    return weight.numel() if named and isinstance(weight, Tensor) and weight.dim() == 1 else 0


def progressive(model: nn.Module) -> list[PRepBN]:
    """The :class:`PRepBN` modules of a model."""
    return [m for m in model.modules() if isinstance(m, PRepBN)]


def set_progress(model: nn.Module, step: int) -> None:
    """Move every γ of the model to optimiser step ``step``; call it once per step, before the forward."""
    for module in progressive(model):
        module.set_progress(step)


@contextmanager
def valid_tokens(model: nn.Module, valid: Tensor) -> Iterator[None]:
    """Inside, every :class:`PRepBN` that gets no mask of its own counts only the tokens that ``valid`` ``(B, N)`` names."""
    modules = progressive(model)
    before = [m.valid for m in modules]
    for m in modules:
        m.valid = valid
    try:
        yield
    finally:
        for m, old in zip(modules, before, strict=True):
            m.valid = old


@torch.no_grad()
def refresh_statistics(model: nn.Module, run: Callable[[nn.Module, Any], Any], batches: Iterable[Any]) -> None:
    """Run batches in eval mode with the batch norms alone in training mode, so that only running statistics move.

    Args:
        run: ``(model, batch)`` → anything; calls the model.
    """
    was = {m: m.training for m in model.modules()}
    model.eval()
    for module in model.modules():
        if isinstance(module, RepBN):
            module.bn.train()
    try:
        for batch in batches:
            run(model, batch)
    finally:
        for module, training in was.items():
            module.training = training
