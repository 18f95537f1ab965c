"""The report of ``foveal inspect``: what to look at, checked before any model is loaded, and writing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from ..hf.load import LoadedModel
    from ..policies import Policy

DEFAULT = Path("inspect.html")


@dataclass(frozen=True)
class Plan:
    """Where the report goes and what it holds beside its own figures."""

    report: Path
    probes: tuple[str, ...]
    policy: Policy | None
    arrays: Path | None

    @classmethod
    def of(
        cls, report: Path | None, probes: str | None, compare: Path | None, arrays: Path | None, prompt: str | None
    ) -> Plan | None:
        """The plan, or None when nothing asks for a report.

        Raises:
            ConfigError: an unknown probe, or a policy that cannot be read.
        """
        if all(option is None for option in (report, probes, compare, arrays, prompt)):
            return None
        from ..lens.record import named
        from ..policies import Policy

        names = tuple(n.strip() for n in (probes or "").split(",") if n.strip())
        if names:
            named(list(names))
        return cls(report or DEFAULT, names, Policy.load(compare) if compare is not None else None, arrays)


def encode(loaded: LoadedModel, prompt: str) -> Tensor:
    """``(1, N)`` ids of the prompt, as the tokenizer prepares text.

    Raises:
        DataError: fewer than two tokens.
    """
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise DataError(f"the prompt has {ids.shape[1]} token; expected at least 2. Pass a longer --prompt.")
    return ids


def write(
    plan: Plan, loaded: LoadedModel, ids: Tensor, facts: Mapping[str, Any], labels: Sequence[Sequence[str]]
) -> None:
    """Measure and write the report, and the arrays where asked for."""
    from ..core.provenance import provenance
    from ..lens.labelled import save
    from ..lens.report import report_data, token_texts, write_report
    from ..lens.survey import survey
    from .progress import bar

    if ids.dim() == 1:
        ids = ids[None]
    with bar() as tell:
        found = survey(loaded.model, ids.to(loaded.model.device), probes=plan.probes, policy=plan.policy, progress=tell)
    if plan.arrays is not None:
        save(found.arrays, plan.arrays, facts)
        typer.echo(plan.arrays)
    here = provenance()
    about: dict[str, Any] = {
        **facts,
        "policy": plan.policy.name if plan.policy is not None else "",
        **{name: str(here[name]) for name in ("foveal", "torch", "python", "date") if name in here},
        "commit": (here.get("git") or {}).get("commit", "")[:12],
    }
    kept = labels if len(labels) == len(found.recording.layers) else None
    data = report_data(found, token_texts(loaded.tokenizer, ids[0]), {**about, "labels": kept})
    write_report(data, plan.report)
    typer.echo(plan.report)
