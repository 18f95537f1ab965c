"""Circuits: the heads that path patching finds stage by stage, and how much two tasks share (arXiv 2310.08744).

Stages walk back from the answer: heads that write to the final residual, heads that set those heads' queries, heads that feed the values
and keys of the latter, and so on. Each stage keeps the top share (2 % in the paper) of all heads by |E|; the circuit is their union.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import ConfigError, nearest
from ..data import colored_objects, ioi
from ..data.pairs import END, PromptPairs
from .effects import Head, HeadEffects, Receivers
from .patching import Comparison, compare, patch_paths

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

SHARE = 0.02
SHARES = (0.01, 0.02, 0.05, 0.1)

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, rows done, rows in all)."""


@dataclass(frozen=True)
class Stage:
    """One step back from the answer.

    Attributes:
        name: of the heads it finds. kind: of receivers, see :class:`foveal.lens.effects.Receivers`.
        of: the earlier stage whose heads receive; "" for the final residual. at: the place where it acts.
    """

    name: str
    kind: str
    of: str
    at: str


STAGES: dict[str, tuple[Stage, ...]] = {
    "ioi": (
        Stage("movers", "final", "", END),
        Stage("inhibition", "q", "movers", END),
        Stage("induction", "kv", "inhibition", "s2"),
    ),
    "colored_objects": (
        Stage("movers", "final", "", END),
        Stage("inhibition", "q", "movers", END),
        Stage("induction", "kv", "inhibition", "asked"),
    ),
}
"""Stages by task. Both corruptions leave every token before S2, or before the thing asked for, as it was; a stage at an earlier place
(keys of induction heads at S1+1) would find exactly 0 and is left out. With ``ioi.build(..., corruption="abc")`` add
:data:`PREVIOUS`."""

PREVIOUS = Stage("previous", "k", "induction", "s1+1")


@dataclass(frozen=True, eq=False)
class Found:
    """One stage's result: its effects and the heads kept, best first."""

    stage: Stage
    effects: HeadEffects
    heads: list[Head]


@dataclass(frozen=True, eq=False)
class Circuit:
    """What the stages found.

    Attributes:
        task: the pairs' name. settings: how they were made. model: its class. total: heads of the model. share: kept per stage.
        stages: in order. accuracy: of the clean prompts, correct answer against the other choices. choices: how many there are.
    """

    task: str
    settings: dict[str, Any]
    model: str
    total: int
    share: float
    stages: list[Found]
    accuracy: float
    choices: int

    @property
    def heads(self) -> set[Head]:
        """The union over stages."""
        return {head for found in self.stages for head in found.heads}

    def at(self, share: float) -> set[Head]:
        """The union with another share kept per stage; receivers stay those of ``self.share``."""
        return {head for found in self.stages for head in found.effects.top(share)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; heads as ``"layer.head"``."""
        return {
            "task": self.task, "pairs": self.settings, "model": self.model, "heads_in_model": self.total, "share": self.share,
            "accuracy": self.accuracy, "chance": 1 / self.choices, "circuit": names(self.heads),
            "stages": [
                {"name": f.stage.name, "receivers": f.effects.receiver, "at": f.stage.at, "heads": names(f.heads), "effects": f.effects.to_json()}
                for f in self.stages
            ],
        }  # fmt: skip

    def plot(self) -> Figure:
        """A heat map of layer × head per stage; see :func:`foveal.lens.circuit_show.plot`."""
        from .circuit_show import plot

        return plot(self)

    def html(self) -> str:
        """A fragment for a report: one small map per stage, hover names head and effect."""
        from .circuit_show import html

        return html(self)


def names(heads: Sequence[Head] | set[Head]) -> list[str]:
    """Heads as ``"layer.head"``; a set in order."""
    return [f"{layer}.{head}" for layer, head in (sorted(heads) if isinstance(heads, set) else heads)]


def parse_heads(text: str) -> list[Head]:
    """Heads from ``"12.3,13.4"``.

    Raises:
        ConfigError: anything else.
    """
    try:
        found = [(int(a), int(b)) for a, b in (part.strip().split(".") for part in text.split(",") if part.strip())]
    except ValueError:
        raise ConfigError(f"heads is {text!r}; expected layer.head separated by commas, such as '12.3,13.4'.") from None
    if not found:
        raise ConfigError(f"heads is {text!r}; expected at least one head, such as '12.3'.")
    return found


def build_pairs(task: str, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> PromptPairs:
    """The pairs of a task by name, ``"ioi"`` or ``"colored_objects"``.

    Raises:
        ConfigError: another name. DataError: the tokenizer splits the words that the task needs.
    """
    builders = {"ioi": ioi.build, "colored_objects": colored_objects.build}
    if task not in builders:
        raise ConfigError(f"task is {task!r}. {nearest(task, builders)}")
    return builders[task](tokenizer, count, seed=seed)


def find_circuit(
    model: nn.Module, pairs: PromptPairs, *, stages: Sequence[Stage] | None = None, share: float = SHARE,
    freeze_mlps: bool = False, rows: int = 512, progress: StageProgress | None = None,
) -> Circuit:  # fmt: skip
    """Find a task's circuit by staged path patching; it ends where a stage finds no head with any effect.

    Args:
        model: a decoder in eval mode. pairs: from :func:`build_pairs`, :mod:`foveal.data.ioi` or :mod:`foveal.data.colored_objects`.
        stages: default those of the pairs' task in :data:`STAGES`. share: of all heads, kept per stage.
        freeze_mlps: as in :func:`foveal.lens.patching.patch_paths`. rows: of one batch. progress: called after each.

    Raises:
        ConfigError: no stages for the task, a stage that names no earlier one, or a share out of range.
        UnsupportedError: a family that cannot be patched.
    """
    if stages is None and pairs.name not in STAGES:
        raise ConfigError(
            f"there are no stages for {pairs.name!r}. {nearest(pairs.name, STAGES)} Pass stages=[Stage(...), …]."
        )
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share}; expected a number above 0 and at most 1, such as {SHARE}.")
    c = compare(model, pairs)
    kept: dict[str, Found] = {}
    ended: set[str] = set()  # stages whose receivers are no heads
    for stage in stages if stages is not None else STAGES[pairs.name]:
        if stage.of in ended or (stage.of in kept and not kept[stage.of].heads):
            ended.add(stage.name)
            continue
        receivers = _receivers(stage, kept)
        told = None if progress is None else _told(progress, stage.name)
        effects = patch_paths(c, receivers, stage.at, freeze_mlps=freeze_mlps, rows=rows, progress=told)
        kept[stage.name] = Found(stage, effects, effects.top(share))
    return Circuit(
        pairs.name,
        dict(pairs.settings),
        type(model).__name__,
        len(c.heads),
        share,
        list(kept.values()),
        accuracy(c),
        pairs.choices.shape[1],
    )


def accuracy(c: Comparison) -> float:
    """Share of clean prompts whose correct answer beats the other choices."""
    from .row_edit import answered, clean_logits

    return float(answered(c, clean_logits(c)).double().mean())


def _told(progress: StageProgress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _receivers(stage: Stage, kept: dict[str, Found]) -> Receivers:
    if stage.kind == "final":
        return Receivers()
    if stage.of not in kept:
        raise ConfigError(
            f"stage {stage.name!r} receives at heads of {stage.of!r}, which is no earlier stage. {nearest(stage.of, kept)}"
        )
    return Receivers(stage.kind, tuple(kept[stage.of].heads))


# --- overlap ------------------------------------------------------------------------------------------------------------


def jaccard(a: set[Head], b: set[Head]) -> float:
    """``|A ∩ B| / |A ∪ B|``; NaN for two empty sets."""
    return len(a & b) / len(a | b) if a | b else math.nan


@dataclass(frozen=True)
class Chance:
    """Jaccard overlap of two random sets of these sizes, exactly (the intersection is hypergeometric).

    Attributes:
        mean, q95: expectation and 95th percentile. p: probability of at least the overlap that was seen.
    """

    mean: float
    q95: float
    p: float


def chance(a: int, b: int, total: int, seen: int = 0) -> Chance:
    """What two random sets of ``a`` and ``b`` of ``total`` heads share; ``seen`` is the intersection found.

    Raises:
        ConfigError: sets larger than the model.
    """
    if not 0 < min(a, b) <= max(a, b) <= total:
        raise ConfigError(f"sets of {a} and {b} of {total} heads; expected sizes from 1 to the number of heads.")
    weights = [math.comb(a, k) * math.comb(total - a, b - k) for k in range(min(a, b) + 1)]
    ways = math.comb(total, b)
    mean = sum(w * k / (a + b - k) for k, w in enumerate(weights)) / ways
    below, quantile = 0, 0
    for k, w in enumerate(weights):
        below += w
        if below >= 0.95 * ways:
            quantile = k
            break
    return Chance(mean, quantile / (a + b - quantile), sum(weights[seen:]) / ways)


@dataclass(frozen=True)
class Overlap:
    """Two circuits at one share: set sizes, shared heads, Jaccard and chance."""

    share: float
    sizes: tuple[int, int]
    shared: list[str]
    jaccard: float
    chance: Chance

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "share": self.share, "sizes": list(self.sizes), "shared": self.shared, "jaccard": self.jaccard,
            "chance_mean": self.chance.mean, "chance_q95": self.chance.q95, "p": self.chance.p,
        }  # fmt: skip


def overlaps(a: Circuit, b: Circuit, shares: Sequence[float] = SHARES) -> list[Overlap]:
    """How many heads two circuits of one model share, at several shares, beside two random sets of the same sizes.

    Raises:
        ConfigError: circuits of different models.
    """
    if (a.model, a.total) != (b.model, b.total):
        raise ConfigError(
            f"the circuits are of {a.model} with {a.total} heads and {b.model} with {b.total}; expected one model."
        )
    out = []
    for share in shares:
        x, y = a.at(share), b.at(share)
        out.append(
            Overlap(share, (len(x), len(y)), names(x & y), jaccard(x, y), chance(len(x), len(y), a.total, len(x & y)))
        )
    return out
