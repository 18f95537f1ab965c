"""The report of ``foveal inspect``: what to look at, checked before any model is loaded, and writing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from ..hf.load import LoadedModel
    from ..lens.circuit_survey import CircuitSurvey
    from ..lens.patching import Comparison
    from ..lens.survey import Survey
    from ..policies import Policy

DEFAULT = Path("inspect.html")


@dataclass(frozen=True)
class Plan:
    """Where the report goes and what it holds beside its own figures."""

    report: Path
    probes: tuple[str, ...]
    policy: Policy | None
    arrays: Path | None
    circuits: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, report: Path | None, probes: str | None, compare: Path | None, arrays: Path | None, prompt: str | None,
        circuits: str | None,
    ) -> Plan | None:  # fmt: skip
        """The plan, or None when nothing asks for a report.

        Raises:
            ConfigError: an unknown probe or task, or a policy that cannot be read.
        """
        if all(option is None for option in (report, probes, compare, arrays, prompt, circuits)):
            return None
        from ..lens.record import named
        from ..policies import Policy

        names = listed(probes)
        if names:
            named(list(names))
        tasks = listed(circuits)
        if circuits is not None:
            from ..lens.circuit_survey import check_tasks

            check_tasks(tasks, prompt is not None)
        return cls(report or DEFAULT, names, Policy.load(compare) if compare is not None else None, arrays, tasks)


def listed(text: str | None) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(n.strip() for n in (text or "").split(",") if n.strip()))


def encode(loaded: LoadedModel, prompt: str) -> Tensor:
    """``(1, N)`` ids of the prompt, as the tokenizer prepares text.

    Raises:
        DataError: fewer than two tokens.
    """
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise DataError(f"the prompt has {ids.shape[1]} token; expected at least 2. Pass a longer --prompt.")
    return ids


def compare_pairs(plan: Plan, loaded: LoadedModel, prompt: str | None, count: int, seed: int) -> list[Comparison]:
    """Both sides of every task's pairs, run once: what cannot be patched is refused before anything is measured.

    Raises:
        ConfigError: prompts longer than the model's context. DataError: a tokenizer or prompt without what a task needs.
        UnsupportedError: a model that cannot be patched.
    """
    from ..lens.circuit_survey import task_pairs
    from ..lens.patching import compare
    from .guard import warn

    if plan.circuits and loaded.dtype != "float32":
        warn(f"the weights are {loaded.dtype}: effects below about 0.001 are noise; --dtype float32 tells more")
    out = []
    for task in plan.circuits:
        pairs = task_pairs(task, loaded.tokenizer, count, seed=seed, prompt=prompt)
        longest = pairs.clean.shape[1]
        if loaded.context_limit is not None and longest > loaded.context_limit:
            raise ConfigError(
                f"the prompts of {task} have up to {longest} tokens, but {loaded.name} was made for at most {loaded.context_limit}; "
                "choose another model, or leave --circuits out."
            )
        out.append(compare(loaded.model, pairs))
    return out


def write(
    plan: Plan, loaded: LoadedModel, ids: Tensor, facts: Mapping[str, Any], labels: Sequence[Sequence[str]],
    comparisons: Sequence[Comparison] = (),
) -> Mapping[str, Any] | None:  # fmt: skip
    """Measure and write the report, and the arrays where asked for; with circuits, what was found of them as JSON values.

    The report appears before the circuits are searched, and once more with them: an interrupt loses the circuits only.
    """
    from ..core.provenance import provenance
    from ..lens.circuit_survey import survey_circuit, to_json
    from ..lens.survey import survey
    from .guard import note
    from .progress import bar

    if ids.dim() == 1:
        ids = ids[None]
    with bar() as tell:
        found = survey(loaded.model, ids.to(loaded.model.device), probes=plan.probes, policy=plan.policy, progress=tell)
    here = provenance()
    about: dict[str, Any] = {
        **facts,
        "policy": plan.policy.name if plan.policy is not None else "",
        **{name: str(here[name]) for name in ("foveal", "torch", "python", "date") if name in here},
        "commit": (here.get("git") or {}).get("commit", "")[:12],
        "labels": labels if len(labels) == len(found.recording.layers) else None,
    }
    circuits: list[CircuitSurvey] = []
    _put(plan, loaded, ids, found, circuits, about)
    if comparisons:
        note(f"{plan.report} stands; searching circuits, and then it holds them too")
        with bar() as tell:
            circuits += [survey_circuit(c, progress=tell) for c in comparisons]
        _put(plan, loaded, ids, found, circuits, about)
    if plan.arrays is not None:
        typer.echo(plan.arrays)
    typer.echo(plan.report)
    return to_json(circuits) if circuits else None


def _put(
    plan: Plan, loaded: LoadedModel, ids: Tensor, found: Survey, circuits: Sequence[CircuitSurvey], about: Mapping[str, Any]
) -> None:  # fmt: skip
    from ..lens.circuit_survey import page_data
    from ..lens.labelled import save
    from ..lens.report import report_data, token_texts, write_report

    if plan.arrays is not None:
        arrays = {name: array for c in circuits for name, array in c.arrays.items()}
        save({**found.arrays, **arrays}, plan.arrays, {k: v for k, v in about.items() if k != "labels"})
    page = page_data(circuits, loaded.tokenizer) if circuits else None
    write_report(report_data(found, token_texts(loaded.tokenizer, ids[0]), about, page), plan.report)
