"""Do latent tokens do any work? X → Z → Y as a causal chain: interventions, effects, probes and guards (after arXiv 2602.22766).

Input X are the prompt's tokens, Z the ``steps`` hidden states fed back after them, Y the answer read after a fixed suffix (teacher
forcing). A change near zero has several meanings, so every figure comes with guards: did the hook fire, did it reach the logits, did
any answer change. For free generation with control tokens see :class:`foveal.lens.latents.LatentLoop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError
from .chain import Chain
from .latents import Hook, Similarity, similarity
from .profile import numbers

CHANGED = 0.05
"""A share of changed answers below this says that a null result rests on the logits alone."""


# --- effects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Effects:
    """Causal mediation over instances ``(M,)``: what changing X does in all, through Z alone, and with Z held.

    ``total = Y(x', Z(x')) − Y(x, Z(x))``, ``indirect = Y(x, Z(x')) − Y(x, Z(x))``, ``direct = Y(x', Z(x)) − Y(x, Z(x))``.
    """

    total: Tensor
    indirect: Tensor
    direct: Tensor

    @property
    def proportion(self) -> float:
        """Mean indirect over mean total; NaN where the total is not clearly different from 0 (two standard errors)."""
        mean = float(self.total.mean())
        error = float(self.total.std()) / math.sqrt(len(self.total)) if len(self.total) > 1 else 0.0
        return float(self.indirect.mean()) / mean if abs(mean) > 2 * error and mean else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        means = {name: numbers(getattr(self, name).mean()) for name in ("total", "indirect", "direct")}
        return {
            **means,
            "instances": len(self.total),
            "proportion_mediated": None if math.isnan(self.proportion) else self.proportion,
        }


def mediate(outcome: Callable[[Any, Any], Tensor], mediator: Callable[[Any], Any], x: Any, other: Any) -> Effects:
    """Effects of going from ``x`` to ``other``; ``outcome(x, z)`` gives ``(M,)``, ``mediator(x)`` the mediator's value."""
    z, z_other = mediator(x), mediator(other)
    start = outcome(x, z)
    return Effects(outcome(other, z_other) - start, outcome(x, z_other) - start, outcome(other, z) - start)


@torch.no_grad()
def latent_effects(chain: Chain, ids: Tensor, other: Tensor, gold: Tensor) -> Effects:
    """Effects on the log-probability of ``gold`` ``(B,)``, the right answer for ``ids``, of other prompts ``(B, N)``."""

    def outcome(x: Tensor, z: Tensor) -> Tensor:
        return chain.answer(x, z).double().log_softmax(-1).gather(1, gold[:, None])[:, 0]

    return mediate(outcome, chain.think, ids, other)


# --- do(Z) --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Corruption:
    """One do(Z) beside the clean run.

    Attributes:
        accuracy, change: under the corruption, and minus clean. low, high: paired 95 % bootstrap interval of the change.
        lost, won: shares of instances that became wrong and right. changed: share whose answer changed at all.
        fired: share of latent steps that the hook changed. moved: mean absolute change of the logits.
    """

    accuracy: float
    change: float
    low: float
    high: float
    lost: float
    won: float
    changed: float
    fired: float
    moved: float

    @property
    def verdict(self) -> str:
        """What may be said, and on what it rests."""
        if self.fired == 0:
            return "withheld: the hook changed no latent"
        if self.moved == 0:
            return "withheld: the change never reached the logits"
        if self.high < 0:
            return "the answer depends on the latents"
        if self.changed <= CHANGED:
            return "no effect found; hardly any answer changed, though the logits moved"
        return "no effect found on accuracy"


@dataclass(frozen=True, eq=False)
class Audit:
    """Clean accuracy, what each corruption does, and how alike the latents are.

    Attributes:
        instances: number of them. clean: accuracy. corruptions: by name. raw, centered: similarity of the latents.
    """

    instances: int
    clean: float
    corruptions: dict[str, Corruption]
    raw: Similarity
    centered: Similarity

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = {name: {**vars(c), "verdict": c.verdict} for name, c in self.corruptions.items()}
        alike = {
            name: {"inter": numbers(s.inter), "intra": numbers(s.intra), "effective_rank": s.rank}
            for name, s in (("raw", self.raw), ("centered", self.centered))
        }
        return {"instances": self.instances, "clean_accuracy": self.clean, "corruptions": rows, "similarity": alike}

    def html(self) -> str:
        """A table for a report."""
        cells = "".join(
            f"<tr><td>{name}</td><td>{c.accuracy:.1%}</td><td>{c.change:+.1%} [{c.low:+.1%}, {c.high:+.1%}]</td>"
            f"<td>{c.changed:.1%}</td><td>{c.fired:.0%}</td><td>{c.verdict}</td></tr>"
            for name, c in self.corruptions.items()
        )
        head = "<tr><th>do(Z)</th><th>accuracy</th><th>change</th><th>answers changed</th><th>hook fired</th><th>verdict</th></tr>"
        return f'<table class="mediation"><caption>clean {self.clean:.1%}, {self.instances} instances</caption>{head}{cells}</table>'


@torch.no_grad()
def audit(chain: Chain, ids: Tensor, gold: Tensor, corruptions: Mapping[str, Hook], *, seed: int = 0) -> Audit:
    """Corrupt the latents in every named way and compare answers, with the same prompts and greedy reading.

    Args:
        chain: the model. ids: ``(M, N)``. gold: ``(M,)`` right answers. corruptions: see :mod:`foveal.lens.latents`.
        seed: of the bootstrap.

    Raises:
        ConfigError: no latent steps to corrupt. ShapeError: gold of another shape.
    """
    if chain.steps == 0:
        raise ConfigError("the chain has steps=0; expected at least one latent step to corrupt.")
    if gold.shape != ids.shape[:1]:
        raise ShapeError(f"gold has shape {tuple(gold.shape)}; expected ({ids.shape[0]},), one answer per prompt.")
    z = chain.think(ids)
    logits = chain.answer(ids, z)
    rows = {}
    for name, hook in corruptions.items():
        fired: list[bool] = []

        def watched(b: int, step: int, one: Tensor, hook: Hook = hook, fired: list[bool] = fired) -> Tensor:
            new = hook(b, step, one)
            fired.append(not torch.equal(new.to(one), one))
            return new

        other = chain.answer(ids, chain.think(ids, watched))
        rows[name] = compare_answers(logits, other, gold, sum(fired) / max(len(fired), 1), seed)
    right = float((logits.argmax(-1) == gold).double().mean())
    return Audit(len(ids), right, rows, similarity(z), similarity(z, centered=True))


def compare_answers(clean: Tensor, corrupt: Tensor, gold: Tensor, fired: float, seed: int = 0) -> Corruption:
    """A corruption's figures from ``(M, V)`` logits of both runs."""
    before, after = clean.argmax(-1), corrupt.argmax(-1)
    was, now = before == gold, after == gold
    gain = now.double() - was.double()
    draws = gain[torch.randint(len(gain), (1000, len(gain)), generator=torch.Generator().manual_seed(seed))].mean(-1)
    low, high = (float(draws.quantile(q)) for q in (0.025, 0.975))
    shares = [float(flags.double().mean()) for flags in (now, was & ~now, now & ~was, before != after)]
    return Corruption(
        shares[0],
        float(gain.mean()),
        low,
        high,
        shares[1],
        shares[2],
        shares[3],
        fired,
        float((clean - corrupt).abs().mean()),
    )


# --- probing, and the instrument ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Held-out accuracy of a linear probe, that of always naming the commonest label, and of the same probe on shuffled labels."""

    accuracy: float
    majority: float
    shuffled: float


def probe(features: Tensor, labels: Tensor, *, folds: int = 5, ridge: float = 1.0, seed: int = 0) -> Probe:
    """Can labels ``(M,)`` be read from features ``(M, F)`` by ridge regression on one-hot labels, cross-validated?

    Raises:
        ShapeError: shapes that do not fit. ConfigError: fewer instances than folds.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ShapeError(
            f"features has shape {tuple(features.shape)} and labels {tuple(labels.shape)}; expected (M, F) and (M,)."
        )
    if not 2 <= folds <= len(labels):
        raise ConfigError(f"folds is {folds} for {len(labels)} instances; expected 2 up to the number of instances.")
    generator = torch.Generator().manual_seed(seed)
    kinds, coded = labels.unique(return_inverse=True)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = coded[torch.randperm(len(labels), generator=generator)]
    x = features.double()
    x = torch.cat(
        [(x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-8), torch.ones(len(x), 1, dtype=torch.float64)], 1
    )

    def score(target: Tensor) -> float:
        hits = 0
        for fold in order.chunk(folds):
            train = torch.ones(len(x), dtype=torch.bool)
            train[fold] = False
            onehot = torch.nn.functional.one_hot(target[train], len(kinds)).double()
            gram = x[train].T @ x[train] + ridge * torch.eye(x.shape[1], dtype=torch.float64)
            weights = torch.linalg.solve(gram, x[train].T @ onehot)
            hits += int(((x[fold] @ weights).argmax(-1) == target[fold]).sum())
        return hits / len(x)

    return Probe(score(coded), float(coded.bincount().max()) / len(coded), score(shuffled))


CRITERIA = (
    "noise hurts the bottleneck 5 times as much", "proportion mediated above 0.8 and below 0.3", "latents of the bottleneck differ more",
)  # fmt: skip


@dataclass(frozen=True)
class Instrument:
    """The two-model check: can the audit tell latents that carry the answer from latents that can be bypassed?

    Attributes:
        drop_open, drop_bottleneck: accuracy lost under matched noise. mediated_open, mediated_bottleneck: proportion mediated.
        inter_open, inter_bottleneck: mean inter-instance similarity, raw (mean-centred it is near −1/(M − 1) in any model).
    """

    drop_open: float
    drop_bottleneck: float
    mediated_open: float
    mediated_bottleneck: float
    inter_open: float
    inter_bottleneck: float

    @property
    def criteria(self) -> dict[str, bool]:
        """The three criteria of the check; NaN fulfils none."""
        return {
            CRITERIA[0]: self.drop_bottleneck > 0 and self.drop_bottleneck >= 5 * self.drop_open,
            CRITERIA[1]: self.mediated_bottleneck > 0.8 and self.mediated_open < 0.3,
            CRITERIA[2]: self.inter_bottleneck < self.inter_open,
        }

    @property
    def valid(self) -> bool:
        """Whether the audit may be trusted on other models."""
        return all(self.criteria.values())


def instrument(
    open_: tuple[Audit, Effects], bottleneck: tuple[Audit, Effects], noise: str = "matched noise"
) -> Instrument:
    """Compare a model that may bypass its latents with one that may not; both audits hold a corruption named ``noise``.

    Raises:
        ConfigError: an audit without it.
    """
    for audited, _ in (open_, bottleneck):
        if noise not in audited.corruptions:
            raise ConfigError(
                f"the audit has no corruption {noise!r}; it has {', '.join(audited.corruptions) or 'none'}."
            )
    (a, ea), (b, eb) = open_, bottleneck
    return Instrument(
        -a.corruptions[noise].change, -b.corruptions[noise].change, ea.proportion, eb.proportion,
        float(a.raw.inter.mean()), float(b.raw.inter.mean()),
    )  # fmt: skip
