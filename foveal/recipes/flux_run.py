"""``foveal train flux``: routers for a model from nothing but a text, and a policy that runs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..bench.results import rounded, write_result
from ..core import serial
from ..core.base_mask import BaseMask
from ..core.context import SelectContext
from ..core.errors import ConfigError
from ..core.serial import check_range, check_types
from ..data import text
from ..hf.fingerprint import fingerprint
from ..hf.load import load_model
from ..patterns import Pattern
from ..patterns.flux import Flux
from ..patterns.presets import FLUX
from ..patterns.sliding_window import SlidingWindow
from ..policies.policy import ModelStamp, Policy
from .flux import FluxTraining, train_flux
from .flux_tasks import text_tasks

HELD_OUT = 0.2
"""Share of the text, its end, that training never sees."""
LAST = 20
"""Steps at the end over which what was reached is averaged."""


@dataclass(frozen=True)
class FluxRun:
    """What ``foveal train flux`` was asked to do.

    Attributes:
        model: as for ``foveal tune``. text: a file, or None for the embedded one. out: folder. tokens: per sample.
        targets: share of sparse layers for retrieval and for local prompts. tail: scored tokens of a local sample.
        dtype, device: as in ``load_model``. trust_remote_code: let a checkpoint run code of its own.
        how: settings of the training.
    """

    model: str
    text: str | None = None
    out: str = "foveal-flux"
    tokens: int = 1024
    targets: tuple[float, float] = (0.45, 1.0)
    tail: int = 64
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    how: FluxTraining = field(default_factory=FluxTraining)

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "tokens", low=64)
        check_range(self, "tail", low=1)


def sparse_option(name: str, tokens: int) -> Pattern:
    """The sparse branch by name: a preset of the paper, JSON of a pattern, or "" for a window that leaves something out.

    Raises:
        ConfigError: an unknown name, or a pattern that keeps everything at this length, so that nothing could be learned.
    """
    if not name:
        near = max(32, tokens // 8)
        found: Pattern = SlidingWindow(near - near % 32, 32, block=32) if near < 1024 else FLUX["streaming"]
    elif name in FLUX:
        found = FLUX[name]
    else:
        try:
            found = Pattern.from_json(json.loads(name), "--sparse")
        except json.JSONDecodeError:
            raise ConfigError(
                f'--sparse is {name!r}; expected one of {", ".join(FLUX)}, or JSON such as {{"pattern": "sliding_window", "window": 128}}.'
            ) from None
    q = torch.zeros(1, 1, tokens, 8)
    if found.static and found.select(q, q, SelectContext(BaseMask.build(tokens, tokens, causal=True)))[0] is None:
        raise ConfigError(
            f"the sparse pattern {found} keeps everything of {tokens} tokens, so full and sparse are the same; expected a smaller window, or longer --tokens."
        )
    return found


def run_flux(
    options: FluxRun,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and write ``router.safetensors``, ``policy.json`` and ``training.json`` into ``options.out``; go on where a run stopped.

    With ``backbone_lr`` above 0 the changed model is written to ``model/`` there, and the routers belong to it.

    Raises:
        FovealError: with one clear message; what was trained stays in the checkpoint.
    """
    folder, how = Path(options.out), options.how
    loaded = load_model(
        options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code,
        progress=say or (lambda _: None),
    )  # fmt: skip
    limit = loaded.context_limit
    if limit is not None and options.tokens > limit:
        raise ConfigError(f"tokens is {options.tokens}, but {loaded.name} was made for at most {limit}; pass --tokens {limit} or less.")  # fmt: skip
    content = text.load_text(options.text)
    ids = text.tokens(loaded.tokenizer, content)
    ids = ids[: int(len(ids) * (1 - HELD_OUT))]
    tasks = text_tasks(loaded.tokenizer, ids, options.tokens, options.targets, options.tail)
    told = {
        "model": loaded.fingerprint, "text": hashlib.sha256(content.encode()).hexdigest(), "tokens": options.tokens, "tail": options.tail,
        "dtype": loaded.dtype,
    }  # fmt: skip

    label = "training routers"

    def show(step: int, steps: int, said: dict[str, Any]) -> None:
        nonlocal label
        if step % LAST == 0:
            label = "sparse layers: " + ", ".join(f"{name} {share:.2f}" for name, share in said["sparsity"].items())
        if progress is not None:
            progress(label, step, steps)

    folder.mkdir(parents=True, exist_ok=True)
    trained = train_flux(
        loaded.model, tasks, how, checkpoint=folder / "checkpoint.safetensors", told=told, progress=show
    )
    architecture, weights = type(loaded.model).__name__, loaded.fingerprint
    if how.backbone_lr > 0:
        loaded.model.save_pretrained(folder / "model")
        loaded.tokenizer.save_pretrained(folder / "model")
        weights = fingerprint(loaded.model)
    branches = {name: json.dumps(pattern.to_json()) for name, pattern in (("sparse", how.sparse), ("full", how.full))}
    trained.routers.save(folder / "router.safetensors", model=weights, architecture=architecture, **branches)
    flux = Flux.of_file(folder / "router.safetensors")
    stamp = ModelStamp(architecture, len(trained.routers.layers), weights)
    policy = Policy.uniform(Flux("router.safetensors", flux.router_sha256, how.sparse, how.full), name="flux")
    Policy(policy.default, name="flux", model=stamp).save(folder / "policy.json")
    last = trained.history[-LAST:]
    reached = {
        task.name: {
            "target": task.target,
            "sparse": sum(h["sparsity"][task.name] for h in last) / len(last),
            "loss": sum(h["loss"][task.name] for h in last) / len(last),
        }
        for task in tasks
    }
    result = {
        "model": loaded.name, "fingerprint": weights, "text": text.text_name(options.text), "tokens": options.tokens,
        "training": serial.to_json(how), "steps": len(trained.history), "reached": reached,
        "multipliers": {name: p.tolist() for name, p in trained.multipliers.named_parameters()},
        "router_sha256": flux.router_sha256, "history": trained.history,
    }  # fmt: skip
    write_result(folder / "training.json", rounded(result))
    return result
