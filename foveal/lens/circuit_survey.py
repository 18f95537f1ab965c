"""The circuits of ``foveal inspect``: the fast screen, activation patching, the staged circuit, and overlaps beside chance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..data import ioi
from ..data.pairs import END, PromptPairs
from .circuit_show import paths_to
from .circuits import SHARES, STAGES, Circuit, Overlap, build_pairs, chance, find_circuit, jaccard, names, overlaps
from .effects import HeadEffects
from .labelled import Labelled
from .patching import Comparison, attribute_heads, patch_heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class CircuitSurvey:
    """What patching says of one task.

    Attributes:
        pairs: that were patched. circuit: by staged path patching.
        screen, patched: every head at the end, estimated from one backward pass and patched for real.
    """

    pairs: PromptPairs
    circuit: Circuit
    screen: HeadEffects
    patched: HeadEffects

    @property
    def maps(self) -> list[tuple[str, str, HeadEffects]]:
        """``(name, what was patched, effects)`` in the order of a report."""
        stages = [(f.stage.name, f"paths to {paths_to(f.stage)}", f.effects) for f in self.circuit.stages]
        return [
            ("screen", "attribution at the end", self.screen),
            ("heads", "activation at the end", self.patched),
            *stages,
        ]

    def agreement(self) -> Overlap | None:
        """The heads that screen and patching rank highest, as many of each as a stage keeps; None where no head has an effect."""
        share, total = self.circuit.share, self.circuit.total
        a, b = (set(effects.top(share)) for effects in (self.screen, self.patched))
        if not a or not b:
            return None
        luck = chance(len(a), len(b), total, len(a & b))
        return Overlap(share, (len(a), len(b)), names(a & b), jaccard(a, b), luck)

    @property
    def arrays(self) -> dict[str, Labelled]:
        """``circuits.TASK.NAME``, ``(layer, head, prompt)`` changes of the logit difference."""
        task = self.circuit.task
        return {f"circuits.{task}.{name}": Labelled(e.change, ("layer", "head", "prompt")) for name, _, e in self.maps}


def check_tasks(tasks: Sequence[str], prompt: bool = False) -> None:
    """Refuse what no pairs could be made for, before a model is loaded.

    Raises:
        ConfigError: no task, an unknown one, or one that only builds its own prompts where there is a ``prompt``.
    """
    if not tasks:
        raise ConfigError(f"circuits names no task; expected one or more of {', '.join(STAGES)}.")
    for task in tasks:
        if task not in STAGES:
            raise ConfigError(f"circuits names the task {task!r}. {nearest(task, STAGES)}")
        if prompt and task != "ioi":
            raise ConfigError(
                f"the task {task!r} builds its own prompts; leave the prompt out, or look for the circuit of 'ioi' in it."
            )


def task_pairs(
    task: str, tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0, prompt: str | None = None
) -> PromptPairs:
    """Pairs of a task, or the one that a prompt of one's own gives.

    Raises:
        ConfigError: an unknown task, or a prompt for one that only builds its own.
        DataError: a prompt without a subject to patch, or a tokenizer that splits the words which the task needs.
    """
    check_tasks([task], prompt is not None)
    if prompt is None:
        return build_pairs(task, tokenizer, count, seed)
    return ioi.from_text(tokenizer, [prompt])


def survey_circuit(c: Comparison, *, progress: Progress | None = None) -> CircuitSurvey:
    """Screen, patch, and find the circuit of the pairs compared.

    Args:
        c: from :func:`foveal.lens.patching.compare`, over pairs of a task in :data:`foveal.lens.circuits.STAGES`.
        progress: called with (what, rows done, rows in all).
    """
    task = c.pairs.name

    def told(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{task}: {what}", done, total)

    told("estimating every head's effect", 0, 1)
    screen = attribute_heads(c)
    patched = patch_heads(c, END, progress=lambda done, total: told("patching every head", done, total))
    circuit = find_circuit(
        c.points.model, c.pairs, progress=lambda stage, done, total: told(f"paths of the {stage}", done, total)
    )
    return CircuitSurvey(c.pairs, circuit, screen, patched)


def compared(found: Sequence[CircuitSurvey]) -> list[tuple[str, str, list[Overlap]]]:
    """``(task, task, overlaps)`` of every two circuits that have heads."""
    some = [f.circuit for f in found if f.circuit.heads]
    return [(a.task, b.task, overlaps(a, b, SHARES)) for a, b in itertools.combinations(some, 2)]


def to_json(found: Sequence[CircuitSurvey]) -> dict[str, Any]:
    """Plain JSON values: everything that was found."""
    return {
        "tasks": [
            {**f.circuit.to_json(), "screen": f.screen.to_json(), "activation": f.patched.to_json(), "screen_and_activation": _plain(f.agreement())}
            for f in found
        ],
        "overlaps": [{"tasks": [a, b], "at": [row.to_json() for row in rows]} for a, b, rows in compared(found)],
    }  # fmt: skip


def page_data(found: Sequence[CircuitSurvey], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the report draws; see the section "Circuits" of ``templates/inspect.html.j2``."""
    return {
        "tasks": [_task(f, tokenizer) for f in found],
        "overlaps": [{"tasks": [a, b], "at": [row.to_json() for row in rows]} for a, b, rows in compared(found)],
    }


def _plain(found: Overlap | None) -> dict[str, Any] | None:
    return None if found is None else found.to_json()


def _task(f: CircuitSurvey, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    kept = {found.stage.name: found.heads for found in f.circuit.stages}
    pairs = f.pairs
    length = int(pairs.place(END)[0, 0]) + 1
    difference = [
        float(x.mean()) for x in (f.circuit.stages[0].effects.clean_difference, f.circuit.stages[0].effects.corrupt_difference)
    ]  # fmt: skip
    return {
        "task": f.circuit.task, "pairs": len(pairs), "accuracy": f.circuit.accuracy, "chance": 1 / f.circuit.choices,
        "difference": difference, "circuit": names(f.circuit.heads), "agreement": _plain(f.agreement()),
        "example": {
            "clean": tokenizer.decode(pairs.clean[0, :length].tolist()), "corrupt": tokenizer.decode(pairs.corrupt[0, :length].tolist()),
            "correct": tokenizer.decode([int(pairs.correct[0])]), "foil": tokenizer.decode([int(pairs.foil[0])]),
        },
        "maps": [_map(name, what, effects, kept.get(name)) for name, what, effects in f.maps],
    }  # fmt: skip


def _map(name: str, what: str, effects: HeadEffects, kept: Sequence[tuple[int, int]] | None) -> dict[str, Any]:
    low, high = effects.interval()
    grids = {key: _short(values) for key, values in (("effect", effects.effect), ("low", low), ("high", high))}
    return {"name": name, "what": what, "kept": [list(h) for h in kept or ()], "stage": kept is not None, **grids}


def _short(values: Tensor) -> list[list[float | None]]:
    return [[float(f"{v:.4g}") if v == v else None for v in row] for row in values.tolist()]
