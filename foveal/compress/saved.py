"""A pruned encoder on disk: safetensors, the host's config and tokenizer, and ``shrp.json`` with what was pruned."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import ModelError
from ..hf.encoder import LoadedEncoder
from ..recipes import shrp
from ..recipes.shrp import Kept, Usage
from ..tune.journal import write_whole

SCHEMA = 1


def save_compressed(
    folder: Path, encoder: LoadedEncoder, model: nn.Module, kept: list[Kept], expander: int, tokens: int
) -> None:
    """Write ``model.safetensors``, ``config.json``, ``shrp.json`` and the tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    part = folder / "model.safetensors.part"
    save_file(state, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")
    encoder.model.config.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    said = {
        "foveal_shrp": SCHEMA, "original": encoder.name, "fingerprint": encoder.fingerprint, "pooling": encoder.pooling,
        "tokens": tokens, "expander": expander, "kept": [asdict(k) for k in kept],
    }  # fmt: skip
    write_whole(folder / "shrp.json", json.dumps(said, indent=1) + "\n")


def load_compressed(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """``(model, tokenizer)`` that ``foveal compress`` saved; the model is a transformers encoder in ``eval`` mode.

    Raises:
        ModelError: the folder was not written by ``foveal compress``, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    place = Path(folder).expanduser()
    try:
        said = json.loads((place / "shrp.json").read_text(encoding="utf-8"))
        state = load_file(place / "model.safetensors")
        kept, expander = [Kept(**k) for k in said["kept"]], said["expander"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"folder {place} holds no pruned encoder: {error}. Expected what `foveal compress` writes.") from None  # fmt: skip
    if said.get("foveal_shrp") != SCHEMA:
        raise ModelError(f"{place}/shrp.json has version {said.get('foveal_shrp')!r}; this foveal reads {SCHEMA}. Run `foveal compress` again.")  # fmt: skip
    model: Any = AutoModel.from_config(AutoConfig.from_pretrained(place))
    model.pooler = None
    layers = shrp.convert(model, [k.layer for k in kept], expander=expander)
    counts = torch.nn.functional.one_hot(torch.tensor([k.head for k in kept]), model.config.num_attention_heads)
    shrp.prune(model, Usage(tuple(layers), counts.double(), torch.ones(counts.shape)))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{place}/model.safetensors does not fit its shrp.json: {str(error).splitlines()[0]}") from None  # fmt: skip
    return model.eval(), AutoTokenizer.from_pretrained(place)
