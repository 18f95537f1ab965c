"""What ``foveal compress`` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..core.serial import check_range, check_types


@dataclass(frozen=True)
class CompressOptions:
    """Options of one run.

    Attributes:
        model: ``minilm``, a folder, or a Hugging Face id of an encoder with BERT's layers.
        target: share of the encoder layers' parameters to cut; the last layers are pruned, as few as reach it.
        text: file with prose to train and evaluate on, or None for the embedded one.
        out: folder for the model, its checkpoints and ``results.json``.
        steps: of training with routing. post_steps: of training after pruning.
        batch: sentences of a step. tokens: of a sentence, at most.
        sentences, pairs: to train on and to evaluate, at most. expander: hidden width of the shared network.
        lr: highest learning rate. repeats: timed turns. seed: of everything.
    """

    model: str
    target: float = 0.45
    text: str | None = None
    out: str = "foveal-compressed"
    steps: int = 400
    post_steps: int = 200
    batch: int = 32
    tokens: int = 64
    sentences: int = 4000
    pairs: int = 400
    expander: int = 96
    lr: float = 1e-3
    repeats: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name, low in (("steps", 1), ("post_steps", 0), ("batch", 2), ("tokens", 8), ("sentences", 10), ("pairs", 10), ("expander", 0), ("repeats", 1), ("seed", 0)):  # fmt: skip
            check_range(self, name, low=low)
        if not 0 < self.target < 1 or not self.lr > 0:
            raise ConfigError(
                f"target is {self.target} and lr {self.lr}; expected a share between 0 and 1, such as 0.5, and a rate above 0."
            )

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)
