"""VHD: how much each head's output changes when the image is taken away, and T-VHD of a token (arXiv 2412.13949, eqs. of §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..hf.interventions import Act, Moment
from ..hf.vision import image_tokens, require_images
from .apply import apply
from .streams import extended, image_stream, kept_deltas, text_stream, whole_prompt

if TYPE_CHECKING:
    from ..hf import Handle

Metric = Literal["l2", "sq"]


def divergence(image: Tensor, text: Tensor, metric: Metric = "l2") -> Tensor:
    """VHD of head outputs with and without the image: ``(..., Dv)`` → ``(...)``, Euclidean or its square, float32 at least."""
    if metric not in ("l2", "sq"):
        raise ConfigError(f"metric is {metric!r}; expected 'l2' (the paper's) or 'sq'.")
    wide = torch.promote_types(image.dtype, torch.float32)
    squared = (image.to(wide) - text.to(wide)).square().sum(-1)
    return squared if metric == "sq" else squared.sqrt()


def without_outliers(values: Tensor, text: Tensor) -> Tensor:
    """VHD ``(..., H)`` with 0 for heads that surge when the image goes: both VHD and ‖A_text‖² above mean + deviation of the layer.

    Args:
        text: ``(..., H, Dv)`` head outputs without the image. The deviation is the population's.
    """
    strength = text.to(values.dtype).square().sum(-1)

    def high(x: Tensor) -> Tensor:
        return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=0)

    return values.masked_fill(high(values) & high(strength), 0.0)


def upper_half(values: Tensor) -> Tensor:
    """``(..., H)`` bool: above the lower median, zeros excluded; ⌊H/2⌋ heads without ties, none when all are equal."""
    heads = values.shape[-1]
    median = values.sort(-1).values[..., (heads - 1) // 2 : (heads - 1) // 2 + 1]
    return (values > median) & (values > 0)


class _Recorder(Act):
    """Keeps the last ``count`` rows of every layer's head outputs."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, {}  # type: tuple[int, dict[int, Tensor]]

    def on(self, handle: Handle) -> Act:
        return self

    def rewrite(self, moment: Moment, out: Tensor) -> Tensor:
        self.seen[moment.ctx.layer_index] = out[:, :, -self.count :].detach()
        return out


@torch.no_grad()
def vhd(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    count: int = 1,
    metric: Metric = "l2",
    keep_positions: bool = False,
    processor: Any = None,
    wrappers: Sequence[int] = (),
) -> Tensor:
    """Vision-aware head divergence ``(B, L, H, count)`` at the last ``count`` positions of a request.

    Args:
        model: a vision-language model. inputs: what its processor makes, with the image.
        count: positions; all of them must be the same tokens in both streams, so none of them an image token.
        metric: ``"l2"`` or ``"sq"``. keep_positions: number the text as if the image were there, so that nothing is positional.
        processor, wrappers: where the tokens around an image are found, see :func:`foveal.hf.vision.image_tokens`.

    Raises:
        UnsupportedError: a model without image tokens. ShapeError: a prompt without an image, or padded on the right.
    """
    tokens = image_tokens(model, processor, wrappers)
    ids, mask = whole_prompt(inputs)
    require_images(tokens.mask(ids))
    if bool(tokens.mask(ids[:, -count:]).any()) or not bool(mask[:, -count:].all()):
        raise ConfigError(
            f"count is {count}, but the last {count} positions hold image tokens or padding; expected text alone."
        )
    recorder = _Recorder(count)
    with apply(model, [recorder]), kept_deltas(model):
        model(**image_stream(model, inputs))
        seen = recorder.seen
    recorder = _Recorder(count)
    with apply(model, [recorder]), kept_deltas(model):
        model(**text_stream(model, inputs, tokens, keep_positions=keep_positions, last=count))
    return torch.stack([divergence(seen[layer], recorder.seen[layer], metric) for layer in sorted(seen)], 1)


def t_vhd(
    model: nn.Module, inputs: Mapping[str, Any], generated: Tensor, *, k: int | None = None, **options: Any
) -> Tensor:
    """T-VHD ``(B, T)`` of each generated token: Σ over layers of the k largest VHD, at the position that predicts the token.

    Two forwards over the whole text give all of them, because the streams are causal.

    Args:
        inputs: the prompt with its image. generated: ``(B, T)`` token ids behind it.
        k: heads summed per layer; default ⌈H/10⌉ (the paper does not say). options: of :func:`vhd`.
    """
    values = vhd(model, extended(inputs, generated[:, :-1]), count=generated.shape[1], **options)
    heads = values.shape[2]
    return values.topk(-(-heads // 10) if k is None else k, dim=2).values.sum((1, 2))
