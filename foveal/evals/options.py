"""What ``foveal eval`` was asked to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.serial import check_range, check_types
from .base import task


@dataclass(frozen=True)
class EvalOptions:
    """Options of one run.

    Attributes:
        model: ``smollm2``, a folder, a GGUF file, or a Hugging Face id.
        policies: policy files, measured beside the model's own attention.
        context: tokens of the longest contexts.
        tasks: names of tasks; empty for all.
        text: file with the text, or None for the embedded one.
        out: folder for ``report.html``, ``results.json`` and the journal that makes a run resumable.
        trials: contexts of each setting, each with its own text, facts and places.
        chat: ask in the chat template; None: where there is one. Passages are always plain text.
        dtype, device, impl: as in ``load_model`` and ``attach``.
        seed: of all random choices.
        trust_remote_code: let a checkpoint run code of its own.
    """

    model: str
    policies: tuple[str, ...] = ()
    context: int = 4096
    tasks: tuple[str, ...] = ()
    text: str | None = None
    out: str = "foveal-eval"
    trials: int = 2
    chat: bool | None = None
    dtype: str = "auto"
    device: str = "auto"
    impl: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "context", low=64)
        check_range(self, "trials", low=1)
        check_range(self, "seed", low=0)
        for name in self.tasks:
            task(name)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)

    def digest(self, **measured: str) -> str:
        """Identity of the measurements: a journal goes on when these are the same; tasks, trials and policies may be added."""
        left_out = ("out", "policies", "tasks", "trials", "text")
        said = {k: v for k, v in asdict(self).items() if k not in left_out}
        return hashlib.sha256(json.dumps({**said, **measured}, sort_keys=True).encode()).hexdigest()
