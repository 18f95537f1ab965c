"""VHR: multiply the outputs of the heads that react to the image, for a whole generation (arXiv 2412.13949, Algorithm 1).

At a request's prefill both streams run in lock-step: in each chosen layer the more divergent half of the heads is chosen at the
last position and reinforced at once, so that later layers see reinforced states. The choice then stays for the request.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, UnsupportedError
from ..hf.interventions import Act, Moment
from ..hf.vision import ImageTokens, forward_inputs, image_tokens, require_images
from .keys import check_layers
from .streams import Enough, image_stream, kept_deltas, lock_step, text_stream, turns_in_3d, whole_prompt
from .vhd import Metric, divergence, upper_half, without_outliers

if TYPE_CHECKING:
    from ..hf import Handle


def default_layers(count: int) -> tuple[int, ...]:
    """The second layer and the last 14 of 32, scaled to ``count`` layers."""
    return tuple(sorted({1, *range(count - round(14 * count / 32), count)} & set(range(count))))


@dataclass(frozen=True, eq=False)
class VHR:
    """Vision-aware head reinforcement.

    Attributes:
        alpha: factor of the chosen heads; 1 changes no bit.
        layers: default :func:`default_layers`.
        outlier: leave out heads that surge without the image. metric: ``"l2"`` or ``"sq"``.
        reinforce_reference: reinforce the stream without image too while choosing (the paper does not say).
        fixed_heads: layer → ``(H,)`` or ``(B, H)`` bool, such as a handle's ``heads`` of another request: nothing is chosen.
        lock_step: one batch of both streams; False runs them again for every layer, which models with 3-D positions need and get.
        keep_positions: number the text as if the image were there.
        processor, wrappers: where the tokens around an image are found, see :func:`foveal.hf.vision.image_tokens`.
    """

    alpha: float = 2.0
    layers: Collection[int] | None = None
    outlier: bool = True
    metric: Metric = "l2"
    reinforce_reference: bool = True
    fixed_heads: Mapping[int, Tensor] | None = None
    lock_step: bool = True
    keep_positions: bool = False
    processor: Any = None
    wrappers: Sequence[int] = ()
    alone = True

    def on(self, handle: Handle) -> Act:
        """Find image tokens, and start."""
        check_layers(self.layers, handle)
        if self.alpha < 0:
            raise ConfigError(f"alpha is {self.alpha}; expected 0 or more.")
        return _Reinforcing(self, handle, image_tokens(handle.model, self.processor, self.wrappers))

    @property
    def takes_the_image_away(self) -> bool:
        """Whether a stream without the image will run."""
        return self.fixed_heads is None

    def choose(self, image: Tensor, text: Tensor) -> Tensor:
        """``(B, H)`` bool from head outputs ``(B, H, Dv)`` of both streams at the last position."""
        values = divergence(image, text, self.metric)
        return upper_half(without_outliers(values, text) if self.outlier else values)


class _Now(threading.local):
    """What goes on in this thread: heads of the request that runs, by layer; and while they are being chosen, which stream runs,
    up to which layer, and its head outputs there."""

    def __init__(self) -> None:
        self.chosen: dict[int, Tensor] = {}
        self.mode = ""
        self.until = 0
        self.record: dict[str, Tensor] = {}


class _Reinforcing(Act):
    """What the request of a cache chose is kept with the cache."""

    def __init__(self, what: VHR, handle: Handle, tokens: ImageTokens) -> None:
        self.what, self.handle, self.tokens = what, handle, tokens
        self.layers = sorted(default_layers(handle.num_layers) if what.layers is None else what.layers)
        self.requests: weakref.WeakKeyDictionary[Any, dict[int, Tensor]] = weakref.WeakKeyDictionary()
        self.now = _Now()

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.now.mode:
            return
        inputs = forward_inputs(module, args, kwargs)
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return
        if self.what.fixed_heads is not None:
            self.now.chosen = {k: v for k, v in self.what.fixed_heads.items() if k in self.layers}
            return
        ids, _ = whole_prompt(inputs)
        require_images(self.tokens.mask(ids))
        self.now.chosen = {}
        image = image_stream(module, inputs)
        text = text_stream(module, inputs, self.tokens, keep_positions=self.what.keep_positions)
        with torch.no_grad(), kept_deltas(module):
            if self.what.lock_step and not turns_in_3d(module):
                self._run(module, "both", lock_step(module, image, text))
            else:
                for layer in self.layers:
                    self.now.until = layer
                    for mode, stream in (("image", image), ("text", text)):
                        with kept_deltas(module):
                            self._run(module, mode, stream)
                    self.now.chosen[layer] = self.what.choose(self.now.record["image"], self.now.record["text"])

    def _run(self, module: nn.Module, mode: str, stream: dict[str, Any]) -> None:
        self.now.mode = mode
        try:
            module(**stream)
        except Enough:
            pass
        finally:
            self.now.mode = ""

    def rewrite(self, moment: Moment, out: Tensor) -> Tensor:
        layer = moment.ctx.layer_index
        if layer not in self.layers:
            return out
        if self.now.mode == "both":
            half = out.shape[0] // 2
            image, text = out[:half], out[half:]
            self.now.chosen[layer] = heads = self.what.choose(image[:, :, -1], text[:, :, -1])
            return torch.cat([self._scale(image, heads), self._reference(text, heads)])
        if self.now.mode:
            if layer == self.now.until:
                self.now.record[self.now.mode] = out[:, :, -1].detach()
                raise Enough
            heads = self.now.chosen[layer]
            return self._scale(out, heads) if self.now.mode == "image" else self._reference(out, heads)
        chosen = self.now.chosen
        if moment.ctx.q_offset > 0:
            chosen = self.requests.get(moment.cache, {}) if moment.cache is not None else {}
            if not chosen:
                raise UnsupportedError(
                    f"VHR meets a cache of {moment.ctx.q_offset} tokens that was filled outside this block, so its heads are not "
                    "chosen; run the prompt inside `with foveal.steer.apply(...)` too."
                )
        elif moment.cache is not None:
            self.requests[moment.cache] = dict(self.now.chosen)
        return self._scale(out, chosen[layer]) if layer in chosen else out

    def _reference(self, out: Tensor, heads: Tensor) -> Tensor:
        return self._scale(out, heads) if self.what.reinforce_reference else out

    def _scale(self, out: Tensor, heads: Tensor) -> Tensor:
        """Chosen heads times alpha, computed in float32 at least; ``heads`` of a prompt serve all of its beams."""
        wide = torch.promote_types(out.dtype, torch.float32)
        heads = heads.to(out.device)[None] if heads.dim() == 1 else heads.to(out.device)
        if heads.shape[0] not in (1, out.shape[0]):
            heads = heads.repeat_interleave(out.shape[0] // heads.shape[0], 0)
        factor = torch.where(heads, self.what.alpha, 1.0).to(wide)
        return (out * factor[:, :, None, None]).to(out.dtype)

    def report(self) -> dict[str, Any]:
        """``heads``: per layer and row of the batch, the heads of the last request."""
        heads = {
            str(layer): [row.nonzero()[:, 0].tolist() for row in (h if h.dim() == 2 else h[None])]
            for layer, h in self.now.chosen.items()
        }
        fired = any(row for rows in heads.values() for row in rows)
        return {"intervention": "VHR", "fired": fired, "alpha": self.what.alpha, "heads": heads}
