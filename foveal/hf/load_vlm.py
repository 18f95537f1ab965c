"""Load a vision-language model and its processor, from a folder or a Hugging Face id; never by pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ModelError
from ..core.info import PACKAGED
from .checkpoint import model_folder
from .fingerprint import fingerprint
from .load import LoadedModel, facts, from_pretrained, resolve, tidy


@dataclass(frozen=True, eq=False)
class LoadedVLM(LoadedModel):
    """A vision-language model that is ready to run; ``processor`` makes its inputs from text and pictures."""

    processor: Any


def reads_pictures(name: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model with a vision tower; False for everything that is no folder."""
    config = Path(name).expanduser() / "config.json"
    try:
        return "vision_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def load_vlm(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LoadedVLM:
    """Load a vision-language model for inference.

    Args:
        name: a folder with ``config.json``, safetensors weights and a processor, or a Hugging Face id. The rest as in
            :func:`foveal.hf.load.load_model`.

    Raises:
        ModelError: nothing is there, it cannot be read, or it reads no pictures.
        ConfigError: an unknown dtype or device. UnsupportedError: a CUDA device where there is none.
    """
    wanted, place = resolve(dtype, device)
    path, text = Path(name).expanduser(), os.fspath(name)
    folder = path.is_dir()
    if not folder and (
        text in PACKAGED or path.is_file() or text.endswith(".gguf") or text.startswith((".", "~", os.sep))
    ):
        raise ModelError(
            f"model {text!r} reads no pictures; expected a folder with a vision-language model and its processor, or a Hugging Face id."
        )
    shown = path.name if folder else text
    say = progress or (lambda line: None)
    with tidy():
        where = str(model_folder(path)) if folder else text
        model, processor = from_pretrained(where, wanted, place, trust_remote_code, say, pictures=True)
        model = model.to(place).eval()
    if not hasattr(processor, "tokenizer"):  # transformers gives what it finds
        raise ModelError(f"{shown} has no readable processor; put one there: processor.save_pretrained(folder).")
    source = f"folder {shown}" if folder else f"Hugging Face {text}"
    return LoadedVLM(model, processor.tokenizer, shown, source, fingerprint(model), *facts(model), processor)
