"""Overwrite the last row of some heads' attention and see what the model answers (the four-head edit of arXiv 2310.08744).

A head's row at the end becomes uniform over a place of the pairs, such as the two wrong colours, and 0 elsewhere; values are untouched.
Knowing which colours are wrong requires the label: this is a diagnostic, not a fix.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError
from ..data.pairs import END
from .effects import Head, HeadEffects
from .hooks import Edit, Rows
from .patching import Comparison, _checked


@dataclass(frozen=True, eq=False)
class RowEdit:
    """Answers under an edit.

    Attributes:
        heads: edited. correct: ``(B,)`` bool, the right answer beats the other choices. difference: ``(B,)`` logit difference.
        attention: ``(B, heads watched, N)`` last rows of the heads that were watched.
    """

    heads: list[Head]
    correct: Tensor
    difference: Tensor
    attention: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.double().mean())


def uniform_row(c: Comparison, place: str) -> Tensor:
    """``(B, N)`` uniform over a place of every prompt."""
    row = torch.zeros(c.pairs.clean.shape, dtype=torch.float64, device=c.pairs.clean.device)
    where = c.pairs.place(place)
    row.scatter_(1, where, 1.0)
    return row / row.sum(-1, keepdim=True)


@torch.no_grad()
def edit_rows(
    comparison: Comparison, heads: Sequence[Head], row: Tensor | Mapping[Head, Tensor] | str = "wrong", *, watch: Sequence[Head] = ()
) -> RowEdit:  # fmt: skip
    """Run the clean prompts with the last attention row of ``heads`` overwritten.

    Args:
        comparison: from :func:`foveal.lens.patching.compare`. heads: to edit; none gives the clean answers.
        row: a place (uniform over it), ``(B, N)`` weights that sum to 1, or such weights by head.
        watch: heads whose last rows are kept.

    Raises:
        ConfigError: no such head or place. ShapeError: weights of another shape or sum.
    """
    c, edited, watched = comparison, _checked(comparison, heads), _checked(comparison, watch)
    if isinstance(row, str):
        row = uniform_row(c, row) if edited else {}
    weights = {head: row[head] if isinstance(row, Mapping) else row for head in edited}
    shape = tuple(c.pairs.clean.shape)
    for head, given in weights.items():
        if tuple(given.shape) != shape or not bool(((given.sum(-1) - 1).abs() < 1e-4).all()):
            raise ShapeError(
                f"the row of head {head} has shape {tuple(given.shape)}; expected {shape} weights, each prompt's summing to 1."
            )
    seen = torch.zeros(len(c.pairs), len(watched), shape[1], dtype=torch.float64, device=c.pairs.clean.device)

    def edit(layer: int, p: Tensor) -> Tensor:
        mine = [head for at, head in edited if at == layer]
        if mine:
            p = p.clone()
            for head in mine:
                p[:, head, 0] = weights[layer, head].to(p.dtype)
        for i, (at, head) in enumerate(watched):
            if at == layer:
                seen[:, i] = p[:, head, 0].double()
        return p

    logits = _last(c, {"weights": edit})
    every = torch.arange(len(c.pairs), device=logits.device)
    return RowEdit(edited, answered(c, logits), c.difference(logits, every), seen)


def clean_logits(c: Comparison) -> Tensor:
    """``(B, V)`` logits at the end of the clean prompts."""
    return _last(c, None)


@torch.no_grad()
def _last(c: Comparison, edits: Mapping[str, Edit] | None) -> Tensor:
    every = torch.arange(len(c.pairs), device=c.pairs.clean.device)
    logits = c.points.run(c.clean, Rows(every, c.pairs.place(END)), edits)
    assert logits is not None
    return logits


def answered(c: Comparison, logits: Tensor) -> Tensor:
    """``(B,)`` bool: does the correct answer beat the other choices?"""
    return logits.gather(1, c.pairs.choices).argmax(-1) == 0


@dataclass(frozen=True, eq=False)
class Sweep:
    """Accuracy under the edits, beside controls.

    Attributes:
        prompts: number of them. rows: by name, ``{"accuracy", "low", "high", "new_errors", "difference"}``; "none" is the unedited model.
            "random heads" and "random tokens" are means over ``controls`` draws, with ``spread``.
        settings: what was asked for.
    """

    prompts: int
    rows: dict[str, dict[str, float]]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"prompts": self.prompts, **self.settings, "rows": self.rows}

    def html(self) -> str:
        """A table for a report."""
        from .circuit_show import sweep_html

        return sweep_html(self)


def sweep(
    comparison: Comparison, groups: Mapping[str, Sequence[Head]], row: str = "wrong", *, controls: int = 10, seed: int = 0
) -> Sweep:  # fmt: skip
    """Edit each group of heads, all groups together, as many random other heads, and the same heads pointed at random tokens.

    Args:
        comparison: pairs with the place ``row``. groups: heads by name, such as ``{"inhibition": …, "negative mover": …}``.
        row: the place that edited rows attend to. controls: draws of each control. seed: of the draws.

    Raises:
        ConfigError: no groups or heads, or no such place.
    """
    everyone = list(dict.fromkeys(head for heads in groups.values() for head in heads))
    if not everyone:
        raise ConfigError(
            "groups names no head; expected at least one group with a head, such as {'inhibition': [(12, 3)]}."
        )
    c, base = comparison, edit_rows(comparison, [])
    rows = {"none": _figures(base, base, seed)}
    named = dict(groups) if len(groups) < 2 else {**groups, "all": everyone}
    for name, heads in named.items():
        rows[name] = _figures(edit_rows(c, heads, row), base, seed)
    draw = random.Random(seed)
    others = [head for head in c.heads if head not in set(everyone)]
    count = c.pairs.place(row).shape[1]
    drawn: dict[str, list[RowEdit]] = {"random heads": [], "random tokens": []}
    for _ in range(controls):
        if len(others) >= len(everyone):
            drawn["random heads"].append(edit_rows(c, draw.sample(others, len(everyone)), row))
        drawn["random tokens"].append(edit_rows(c, everyone, _random_row(c, count, draw)))
    for name, some in drawn.items():
        if some:
            values = torch.tensor([edit.accuracy for edit in some], dtype=torch.float64)
            spread = float(values.std()) if len(some) > 1 else 0.0
            rows[name] = {"accuracy": float(values.mean()), "spread": spread, "draws": len(some)}
    settings = {"row": row, "groups": {name: [f"{a}.{b}" for a, b in heads] for name, heads in groups.items()}, "controls": controls, "seed": seed}  # fmt: skip
    return Sweep(len(c.pairs), rows, settings)


def _random_row(c: Comparison, count: int, draw: random.Random) -> Tensor:
    row = torch.zeros(c.pairs.clean.shape, dtype=torch.float64, device=c.pairs.clean.device)
    for b, end in enumerate(c.pairs.place(END)[:, 0].tolist()):
        row[b, draw.sample(range(end + 1), min(count, end + 1))] = 1.0
    return row / row.sum(-1, keepdim=True)


def _figures(edit: RowEdit, base: RowEdit, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    correct = edit.correct.double().cpu()
    draws = correct[torch.randint(len(correct), (1000, len(correct)), generator=generator)].mean(-1)
    low, high = (float(draws.quantile(q)) for q in (0.025, 0.975))
    return {
        "accuracy": edit.accuracy, "low": low, "high": high, "difference": float(edit.difference.mean()),
        "new_errors": float((base.correct & ~edit.correct).double().mean()),
    }  # fmt: skip


@dataclass(frozen=True)
class Reaction:
    """How heads downstream react to an edit: mean change of their last row's mass, and rank correlation with their own effects.

    Attributes:
        right, wrong: mean change of attention on the places "right" and "wrong", over heads and prompts.
        spearman: between the change of (right − wrong) and the heads' original |E|; NaN below three heads.
    """

    right: float
    wrong: float
    spearman: float


def reaction(
    comparison: Comparison, edited: Sequence[Head], movers: HeadEffects, share: float = 0.02, row: str = "wrong"
) -> Reaction:
    """What the movers' attention does when the rows of ``edited`` are overwritten; only movers in later layers are looked at.

    Raises:
        ConfigError: no mover lies behind the edited heads.
    """
    c = comparison
    behind = [
        head for head in movers.top(share) if head[0] > min(layer for layer, _ in edited) and head not in set(edited)
    ]
    if not behind:
        raise ConfigError(
            f"none of the top {share:.0%} heads lies behind the edited heads {list(edited)}; edit earlier heads."
        )
    rows = [edit_rows(c, heads, row, watch=behind).attention for heads in ([], edited)]
    moved = rows[1] - rows[0]
    change = {
        name: moved.gather(2, c.pairs.place(name)[:, None].expand(-1, len(behind), -1)).sum(-1).mean(0)
        for name in ("right", "wrong")
    }
    gain = change["right"] - change["wrong"]
    strength = torch.stack([movers.change[head].mean().abs() for head in behind])
    rank = float("nan")
    if len(behind) > 2:
        ranks = torch.stack([x.cpu().argsort().argsort().double() for x in (gain, strength)])
        rank = float(torch.corrcoef(ranks)[0, 1])
    return Reaction(float(change["right"].mean()), float(change["wrong"].mean()), rank)
