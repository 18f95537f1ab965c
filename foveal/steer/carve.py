"""CARVE: ask, see where the question looks that a general instruction does not, and ask again about that part (arXiv 2509.06461)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, UnsupportedError
from ..hf import families
from ..hf.picture_tokens import painted, token_grid, visible_part
from .contrast import Mode, contrast, default_layers, fuse, shares
from .maps import Captured, capture
from .picture import pixels_of, refined_picture, regions, top_pixels

GENERAL = "Write a general description of the image."


@dataclass(frozen=True, eq=False)
class Carved:
    """What CARVE found.

    Attributes:
        base, refined: answers to the original and to the refined picture.
        map: ``(H, W)`` float64 scores on the picture; mask: ``(H, W)`` bool, what was kept.
        image: the refined picture, of the kind that was given. box: ``(left, top, right, bottom)`` that it shows.
        general: maps of the general instruction, to be given again for another question about the same picture.
        layer_passes: decoder layers run over a prompt in the three passes.
    """

    base: str
    refined: str
    map: Tensor
    mask: Tensor
    image: Any
    box: tuple[int, int, int, int]
    general: Captured
    layer_passes: int


class ProcessorDoor:
    """Questions and answers through a transformers processor and its chat template."""

    def __init__(self, processor: Any) -> None:
        for name in ("apply_chat_template", "batch_decode"):
            if not hasattr(processor, name):
                raise UnsupportedError(
                    f"processor is a {type(processor).__name__} without {name}; expected a transformers processor, or an object "
                    "with prepare(images, question) and decode(ids), such as foveal.models.vlm.Reader."
                )
        self.processor = processor

    def prepare(self, images: Sequence[Any], question: str) -> dict[str, Any]:
        """The model's inputs for pictures and a question."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        whole = (
            {"do_image_splitting": False}
            if hasattr(getattr(self.processor, "image_processor", None), "do_image_splitting")
            else {}
        )
        return dict(self.processor(images=list(images) or None, text=[text], return_tensors="pt", **whole))

    def decode(self, ids: Tensor) -> str:
        """Text of generated ids."""
        return str(self.processor.batch_decode([ids], skip_special_tokens=True)[0]).strip()


def door(processor: Any) -> Any:
    """The processor itself where it has ``prepare`` and ``decode``, else a :class:`ProcessorDoor`."""
    return processor if hasattr(processor, "prepare") and hasattr(processor, "decode") else ProcessorDoor(processor)


def score_map(
    question: Tensor,
    general: Tensor,
    *,
    lam_rel: float = 1.0,
    lam: float | None = None,
    mode: Mode = "end",
    raw: bool = False,
) -> Tensor:
    """Scores ``(N,)`` of image tokens from maps ``(T, L, N)`` of both passes.

    Args:
        lam_rel: regulariser in units of 1/N, on maps that sum to 1. lam: an absolute one, on maps as they are, as in the released code.
        mode: ``"start"`` and ``"full"`` pair steps by number up to the shorter run, ``"end"`` pairs each run's own last step.
        raw: leave the general map out (λ → ∞).
    """
    both = min(len(question), len(general))
    if mode == "end":
        question, general = question[-1:], general[-1:]
    else:
        question, general = question[:both], general[:both]
    if lam is None:
        question, general = shares(question), shares(general)
        lam = lam_rel / question.shape[-1]
    return fuse(question if raw else contrast(question, general, lam), mode)


def carve(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    *,
    layers: Sequence[int] | None = None,
    mode: Mode = "end",
    p: float = 0.4,
    k: int | None = 2,
    lam_rel: float = 1.0,
    lam: float | None = None,
    raw: bool = False,
    fill: tuple[int, int, int] = (0, 0, 0),
    crop: bool = True,
    canvas: bool = False,
    general: Captured | str = GENERAL,
    answer_with: Literal["refined", "both"] = "refined",
    max_new_tokens: int = 32,
) -> Carved:
    """Answer a question about a picture, and again about the part that the question's attention singles out.

    Args:
        model, processor: a vision-language model and its processor, or an object with ``prepare(images, question)`` and ``decode(ids)``.
        image: a Pillow image, or ``(H, W, 3)`` uint8. layers: default 20 to 25 of 28, scaled to the model.
        mode: steps that are fused; ``"start"`` stops both map passes after the last layer.
        p: share of pixels kept; 1 leaves the picture as it is. k: most regions kept; None, the released code's rule.
        lam_rel, lam, raw: see :func:`score_map`. fill: colour outside the regions; one that the model has seen.
        crop, canvas: see :func:`foveal.steer.picture.refined_picture`.
        general: the general instruction, or its maps from an earlier call on the same picture.
        answer_with: the refined picture alone, or the original and the refined one.

    Raises:
        UnsupportedError: a model without image tokens, or tokens that are no grid. ConfigError: settings out of range.
    """
    if answer_with not in ("refined", "both"):
        raise ConfigError(f"answer_with is {answer_with!r}; expected 'refined' or 'both'.")
    way, pixels = door(processor), pixels_of(image)
    height, width = pixels.shape[:2]
    chosen = default_layers(sum(s.index >= 0 for s in families.sites(model))) if layers is None else tuple(layers)
    inputs = way.prepare([image], question)
    first, passes = mode == "start", 0
    asked = capture(model, inputs, chosen, max_new_tokens=max_new_tokens, generate=not first)
    base = _answer(model, way, inputs, max_new_tokens) if first else way.decode(asked.ids)
    if isinstance(general, str):
        other = way.prepare([image], general)
        general = capture(model, other, chosen, max_new_tokens=max_new_tokens, generate=not first)
        passes = general.layer_passes
    at, grid = token_grid(model, inputs, asked.image)
    general_at, _ = token_grid(model, inputs, general.image)
    scores = score_map(asked.maps[..., at], general.maps[..., general_at], lam_rel=lam_rel, lam=lam, mode=mode, raw=raw)
    picture = painted(scores.view(grid), visible_part(processor, width, height), width, height)
    mask = torch.ones(height, width, dtype=torch.bool)
    if p < 1:
        mask = regions(top_pixels(picture, p), picture.clamp(min=0), k)
    elif p > 1:
        raise ConfigError(f"p is {p}; expected above 0 to 1, the share of pixels kept.")
    new, box = refined_picture(pixels, mask, fill=fill, crop=crop, canvas=canvas)
    given = type(image).__module__.startswith("PIL.")
    shown = _pillow(new) if given else new
    again = way.prepare([image, shown] if answer_with == "both" else [shown], question)
    refined = _answer(model, way, again, max_new_tokens)
    passes += asked.layer_passes + sum(s.index >= 0 for s in families.sites(model))
    return Carved(base, refined, picture, mask, shown, box, general, passes)


@torch.no_grad()
def _answer(model: nn.Module, way: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> str:
    out: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    return str(way.decode(out[0, inputs["input_ids"].shape[1] :].cpu()))


def _pillow(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)
