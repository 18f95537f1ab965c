"""Image tokens of vision-language models: which ids they have, where they sit, and what surrounds them.

transformers' processors put one placeholder id per image token into ``input_ids``, so the positions of these ids are the
positions of the image tokens among the keys, in every family that does so (LLaVA, Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ShapeError, UnsupportedError

_IDS = ("image_token_id", "image_token_index", "video_token_id")
_WRAPPERS = ("vision_start_token_id", "vision_end_token_id")
_FAMILIES = "LLaVA, Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM or foveal.models.vlm"


@dataclass(frozen=True)
class ImageTokens:
    """Ids of a model's image tokens.

    Attributes:
        ids: placeholders that become image tokens. wrappers: tokens around an image that go when the image goes.
    """

    ids: tuple[int, ...]
    wrappers: tuple[int, ...] = ()

    def mask(self, input_ids: Tensor) -> Tensor:
        """``(B, N)`` bool, True on image tokens."""
        return torch.isin(input_ids, torch.tensor(self.ids, device=input_ids.device))

    def text(self, input_ids: Tensor) -> Tensor:
        """``(B, N)`` bool, True on what remains when the image and its wrappers are taken away."""
        return ~torch.isin(input_ids, torch.tensor(self.ids + self.wrappers, device=input_ids.device))


def image_tokens(model: nn.Module, processor: Any = None, wrappers: Sequence[int] = ()) -> ImageTokens:
    """Find the image token ids in the model's config, and the wrappers in the config and the processor.

    Args:
        model: a vision-language model of transformers.
        processor: its processor; Idefics3 and SmolVLM name their wrappers (``<fake_token_around_image>``, ``<row_1_col_1>``,
            ``<global-img>``) only there.
        wrappers: further wrapper ids.

    Raises:
        UnsupportedError: the model has no image tokens.
    """
    config: Any = getattr(model, "config", None)
    ids = [getattr(config, name, None) for name in _IDS]
    found = tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and i >= 0))
    if not found or not hasattr(config, "vision_config"):
        raise UnsupportedError(
            f"{type(model).__name__} has no image tokens: its config has no vision_config with an image_token_id. "
            f"Visual interventions need a vision-language model whose images are tokens of the text decoder: {_FAMILIES}. "
            "For text models use foveal.steer.HeadScale or foveal.steer.Knockout."
        )
    around = [getattr(config, name, None) for name in _WRAPPERS]
    more = [i for i in around if isinstance(i, int)] + list(wrappers) + _processor_wrappers(processor)
    return ImageTokens(found, tuple(dict.fromkeys(i for i in more if i not in found)))


def _processor_wrappers(processor: Any) -> list[int]:
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not hasattr(tokenizer, "get_added_vocab"):
        return []
    names = ("<fake_token_around_image>", "<global-img>")
    return [i for token, i in tokenizer.get_added_vocab().items() if token in names or token.startswith("<row_")]


def forward_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward by name; positional ones are matched with its signature."""
    import inspect

    names = [n for n in inspect.signature(module.forward).parameters if n != "self"]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def visual_mask(tokens: ImageTokens, inputs: Mapping[str, Any], module: nn.Module) -> Tensor:
    """``(B, N)`` bool over the tokens that a forward brings, from ``input_ids``, else from placeholder embeddings.

    Raises:
        UnsupportedError: the forward was given neither.
    """
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor):
        return tokens.mask(ids)
    embeds = inputs.get("inputs_embeds")
    if isinstance(embeds, Tensor) and hasattr(module, "get_input_embeddings"):
        find: Any = module.get_input_embeddings
        table = find()
        marks = table(torch.tensor(tokens.ids, device=embeds.device)).to(embeds.dtype)
        return (embeds[:, :, None] == marks).all(-1).any(-1)
    raise UnsupportedError(
        f"{type(module).__name__} was called without input_ids, so the image tokens cannot be found; pass input_ids."
    )


def require_images(mask: Tensor) -> None:
    """Raise :class:`ShapeError` when a prompt has no image token."""
    if not bool(mask.any()):
        raise ShapeError(
            f"the prompt has {mask.shape[1]} tokens and none is an image token; put the image's placeholder into the text "
            "(the processor does so when it is given images=...), or leave the visual intervention out for text prompts."
        )
