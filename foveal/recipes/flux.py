"""Train Flux's layer routers (arXiv 2604.07394) on a frozen causal language model: sparse where the task allows it.

Each step draws a batch of every task. The loss of a sample is its mean cross-entropy over the answer's tokens plus a penalty for
being off its task's share of sparse layers; samples are averaged inside a task, then over tasks. The routers descend, the penalty's
multipliers ascend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..core import serial
from ..core.errors import ConfigError, DataError
from ..core.serial import check_range, check_types
from ..layers.layer_router import LayerRouters, Mode, gate, gumbel
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..patterns.presets import FLUX
from .fit import resume_training, save_training, step_generator
from .flux_hosts import Host, TwoBranches, host_of
from .flux_loss import Multipliers, rate_at, sparsity, target_at, temperature

PROJECTIONS = re.compile(r"(^|\.)(q_proj|k_proj|v_proj|qkv_proj|qkv)\.(weight|bias)$")
"""Backbone parameters that ``backbone_lr`` trains, as the authors' script does by default."""


@dataclass(frozen=True, eq=False)
class Samples:
    """A batch of one task, padded on the right.

    Attributes:
        ids: ``(B, N)`` int64. scored: ``(B, N)`` bool, the answer's tokens; at least one a row.
        prompt: ``(B,)`` int64, tokens of each row's prompt: what its router reads.
    """

    ids: Tensor
    scored: Tensor
    prompt: Tensor


@dataclass(frozen=True, eq=False)
class RoutedTask:
    """A kind of prompts.

    Attributes:
        name: unique. target: share of layers that should be sparse, 0 to 1. draw: rows and a CPU generator → a batch.
    """

    name: str
    target: float
    draw: Callable[[int, torch.Generator], Samples]


@dataclass(frozen=True)
class FluxTraining:
    """How routers are trained; the defaults are the authors' script, its batch left to ``rows``.

    Attributes:
        steps: optimiser steps. rows: samples per task and step. chunk: samples that run together, for memory; 0 is all.
        pool: tokens that the router reads at either end of the prompt.
        sparse, full: what the branches keep. mode: the gate, ``"soft"`` (paper) or ``"st"``, straight-through (code).
        signed: see :class:`~foveal.recipes.flux_loss.Multipliers`.
        lr, multiplier_lr: peaks; warm-up over the share ``warmup`` of the steps, then a cosine to 0.
        weight_decay: of routers and backbone. multiplier_decay: of the multipliers; the authors' 0.1 pulls them back to 0.
        clip: largest norm of the gradient of routers and backbone.
        target_warmup: steps over which the targets rise from 0.
        backbone_lr: above 0, the q, k and v projections are trained too, with this peak; 0 freezes the model.
        seed: of weights, batches and noise.
    """

    steps: int = 300
    rows: int = 1
    chunk: int = 0
    pool: int = 100
    sparse: Pattern = field(default=FLUX["streaming"])
    full: Pattern = field(default_factory=Dense)
    mode: Mode = "soft"
    signed: bool = False
    lr: float = 5e-4
    multiplier_lr: float = 1e-3
    weight_decay: float = 0.1
    multiplier_decay: float = 0.0
    clip: float = 5.0
    warmup: float = 0.2
    target_warmup: int = 0
    backbone_lr: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "rows", "pool"):
            check_range(self, name, low=1)
        for name in ("chunk", "lr", "multiplier_lr", "weight_decay", "multiplier_decay", "target_warmup", "backbone_lr", "seed"):  # fmt: skip
            check_range(self, name, low=0)
        check_range(self, "warmup", low=0, high=1)
        if not self.clip > 0:
            raise ConfigError(f"FluxTraining.clip is {self.clip!r}; expected a value above 0.")


@dataclass(frozen=True, eq=False)
class FluxTrained:
    """What training gives.

    Attributes:
        routers: trained, in eval mode. multipliers: at their last values.
        history: for every step ``loss`` (answers' cross-entropy) and ``sparsity``, both by task.
    """

    routers: LayerRouters
    multipliers: Multipliers
    history: list[dict[str, Any]]


def train_flux(
    model: Any,
    tasks: Sequence[RoutedTask],
    how: FluxTraining | None = None,
    *,
    checkpoint: str | Path | None = None,
    every: int = 20,
    told: dict[str, Any] | None = None,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> FluxTrained:
    """Train routers for a ``DecoderLM`` or a transformers decoder; the model itself changes only where ``backbone_lr`` is above 0.

    Args:
        model: the language model. tasks: at least one. how: settings.
        checkpoint: safetensors file written every so many steps; when it is there, training goes on from it.
        told: what else makes the batches, as JSON values: a checkpoint made with something else is refused.
        progress: called with ``(step, steps, {"loss": …, "sparsity": …})``.

    Raises:
        ConfigError: no tasks, a target out of range, two of one name, or a checkpoint of other settings or another model.
        DataError: a loss that is not finite.
        UnsupportedError: a model whose layers cannot be routed.
    """
    how = FluxTraining() if how is None else how
    _check(tasks)
    with host_of(model) as host, _only(model, how.backbone_lr > 0) as trainable:
        device = next(model.parameters()).device
        routers = LayerRouters(host.layers, host.head_dim, how.pool, how.seed).to(device)
        multipliers = Multipliers(len(tasks), signed=how.signed, seed=how.seed).to(device)
        own = [(f"routers.{n}", p) for n, p in routers.named_parameters()]
        played = [(f"multipliers.{n}", p) for n, p in multipliers.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in own], "weight_decay": how.weight_decay, "peak": how.lr},
            {"params": [p for _, p in played], "weight_decay": how.multiplier_decay, "peak": how.multiplier_lr, "maximize": True},
        ]  # fmt: skip
        if trainable:
            groups.append({"params": [p for _, p in trainable], "weight_decay": how.weight_decay, "peak": how.backbone_lr})  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=(0.9, 0.95))
        named = [*own, *played, *trainable]
        setting = {**serial.to_json(how), "tasks": [[t.name, t.target] for t in tasks], **(told or {})}
        history = [] if checkpoint is None else resume_training(Path(checkpoint), named, optimizer, setting)
        for step in range(len(history), how.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(step, how.steps, how.warmup)
            optimizer.zero_grad(set_to_none=True)
            said = _step(host, routers, multipliers, tasks, how, step)
            nn.utils.clip_grad_norm_([p for _, p in (*own, *trainable)], how.clip)
            optimizer.step()
            history.append(said)
            if progress is not None:
                progress(step + 1, how.steps, said)
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == how.steps):
                save_training(Path(checkpoint), named, optimizer, setting, history)
    return FluxTrained(routers.eval(), multipliers, history)


def _step(host: Host, routers: LayerRouters, multipliers: Multipliers, tasks: Sequence[RoutedTask], how: FluxTraining, step: int) -> dict[str, Any]:  # fmt: skip
    """Gradients of one step, added up over tasks and chunks; the tasks' losses and shares of sparse layers."""
    generator = step_generator(how.seed, step)
    device = next(routers.parameters()).device
    tau = temperature(step, how.steps)
    said: dict[str, Any] = {"loss": {}, "sparsity": {}}
    for number, task in enumerate(tasks):
        batch = task.draw(how.rows, generator)
        noise = gumbel((len(routers.layers), how.rows, 2), generator)
        target = target_at(task.target, step, how.target_warmup)
        losses, shares = [], []
        size = how.chunk or how.rows
        for at in range(0, how.rows, size):
            rows = slice(at, min(at + size, how.rows))
            loss, share = sample_losses(host, routers, batch, rows, how, tau, noise[:, rows].to(device))
            total = (loss + multipliers(share, number, target)).sum() / (how.rows * len(tasks))
            if not bool(torch.isfinite(total)):
                raise DataError(
                    f"the loss of task {task.name!r} is {float(total.detach())} at step {step}; expected a finite number. Try a smaller lr than {how.lr}."
                )
            total.backward()  # type: ignore[no-untyped-call]
            losses += loss.detach().tolist()
            shares += share.detach().tolist()
        said["loss"][task.name] = sum(losses) / len(losses)
        said["sparsity"][task.name] = sum(shares) / len(shares)
    return said


def sample_losses(
    host: Host, routers: LayerRouters, batch: Samples, rows: slice, how: FluxTraining, tau: float, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(B,)`` mean cross-entropy over each row's scored tokens, and ``(B,)`` its share of sparse layers, with gates as in training."""
    device = next(routers.parameters()).device
    ids, scored, prompt = (x[rows].to(device) for x in (batch.ids, batch.scored, batch.prompt))
    spans = torch.stack([torch.zeros_like(prompt), prompt], 1)

    def weigh(layer: int, logits: Tensor) -> Tensor:
        return gate(logits, tau, how.mode, None if noise is None else noise[layer])

    branches = TwoBranches(routers, how.full, how.sparse, weigh, spans)
    logits = host.forward(ids[:, :-1], branches)
    entropy = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
    weight = scored[:, 1:].to(entropy.dtype)
    loss = (entropy * weight).sum(1) / weight.sum(1).clamp(min=1)
    return loss, sparsity([branches.gates[i] for i in range(host.layers)])


def _check(tasks: Sequence[RoutedTask]) -> None:
    names = [t.name for t in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ConfigError(f"tasks are {names!r}; expected at least one, each with a name of its own.")
    for task in tasks:
        if not 0 <= task.target <= 1:
            raise ConfigError(f"the target of task {task.name!r} is {task.target!r}; expected a share of sparse layers from 0 to 1.")  # fmt: skip


@contextmanager
def _only(model: nn.Module, projections: bool) -> Any:
    """The model frozen and in eval mode, its q, k, v projections trainable where asked; as it was afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    trainable = [(n, p) for n, p in model.named_parameters() if projections and PROJECTIONS.search(n)]
    if projections and not trainable:
        raise ConfigError("backbone_lr is above 0 and no parameter of the model is called q_proj, k_proj, v_proj or qkv; set it to 0.")  # fmt: skip
    try:
        model.requires_grad_(False).eval()
        for _, p in trainable:
            p.requires_grad_(True)
        yield trainable
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
        model.train(training)
