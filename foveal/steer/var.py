"""VAR: attention that image sinks receive goes to the rest of the image, in heads that look at it (arXiv 2503.03321).

Per head and text row: the sinks give away the share ``transfer`` of their weight, Ω = transfer · Σ_sinks α; the image tokens
that are no sinks receive it in proportion, α' = α (1 + Ω / Σ α). Only in rows with image mass of at least ``min_mass`` of which
at least the share ``rho`` is not on sinks, and not in the last layer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, UnsupportedError, nearest
from ..hf.interventions import Act, Moment, Reweigh
from ..hf.vision import ImageTokens, forward_inputs, image_tokens, visual_mask
from .keys import check_layers, over_keys, over_rows
from .sinks import SINK_DIMS, TauMode, blocks, find_sink_dims, on_inputs, sink_values, threshold

if TYPE_CHECKING:
    from ..hf import Handle

__all__ = ["VAR", "find_sink_dims", "redistribute"]

REST, IMAGE, IMAGE_SINK, TEXT_SINK = range(4)
"""Groups of keys: other text, image tokens that are no sinks, image sinks, text sinks."""


@dataclass(frozen=True, eq=False)
class VAR:
    """Visual attention redistribution.

    Attributes:
        profile: a base model in ``SINK_DIMS``; or dims: sink dimensions, see :func:`find_sink_dims`; or sinks: ``(N,)`` or
            ``(B, N)`` bool, sinks that are known already, the same in every layer.
        tau, tau_mode: a token is a sink when φ ≥ tau; with ``"energy"`` when one sink dimension holds the share tau of its energy.
        rho: least share of a row's image mass that is not on sinks (0.8 general questions, 0.5 against hallucination, 0.9 vision).
        transfer: share of the sinks' weight that moves (the paper's p; the released code's p is 1 − transfer).
        min_mass: least image mass of a row.
        layers: default all but the last. exclude: ``(N,)`` or ``(B, N)`` bool, tokens that never count as sinks.
        generated: whether tokens that are decoded one by one may be sinks: ``"never"`` or ``"test"``.
        strict: φ > tau; needs_image_sink: rows of layers without an image sink stay. Both are rules of the released code.
    """

    profile: str | None = None
    dims: tuple[int, ...] = ()
    sinks: Tensor | None = None
    tau: float = 20.0
    tau_mode: TauMode = "paper"
    rho: float = 0.8
    transfer: float = 0.6
    min_mass: float = 0.2
    layers: Collection[int] | None = None
    exclude: Tensor | None = None
    generated: Literal["never", "test"] = "never"
    strict: bool = False
    needs_image_sink: bool = False
    alone = True

    def __post_init__(self) -> None:
        given = [self.profile is not None, bool(self.dims), self.sinks is not None]
        if sum(given) != 1:
            raise ConfigError(
                f"VAR needs one of profile ({', '.join(SINK_DIMS)}), dims and sinks; received {sum(given)} of them. "
                "For another model, foveal.steer.find_sink_dims(model, prompts) looks for its dims."
            )
        if self.profile is not None and self.profile not in SINK_DIMS:
            raise ConfigError(f"profile is {self.profile!r}. {nearest(self.profile, SINK_DIMS)}")
        if not 0 <= self.transfer <= 1:
            raise ConfigError(
                f"transfer is {self.transfer}; expected 0 to 1, the share of the sinks' weight that moves."
            )
        if self.generated not in ("never", "test"):
            raise ConfigError(f"generated is {self.generated!r}; expected 'never' or 'test'.")

    @property
    def names_positions(self) -> bool:
        """Whether tokens are given by position."""
        return self.sinks is not None or self.exclude is not None

    def on(self, handle: Handle) -> Act:
        """Find image tokens, blocks and sink dimensions, and start."""
        check_layers(self.layers, handle)
        return _Redistributing(self, handle, image_tokens(handle.model))

    def step(
        self, image: Tensor, sink: Tensor, rows: Tensor, count: Callable[[Tensor], None] = lambda selected: None
    ) -> Reweigh:  # fmt: skip
        """The reweighing for given flags: image, sink ``(B, Nk)`` over keys, rows ``(B, Nq)`` that may change.

        ``count`` is called with the selected (head, row) pairs ``(B, H, R)``.
        """
        groups = torch.where(image, torch.where(sink, IMAGE_SINK, IMAGE), torch.where(sink, TEXT_SINK, REST))

        def factors(mass: Tensor) -> Tensor:
            found, selected = redistribute(
                mass, rho=self.rho, transfer=self.transfer, min_mass=self.min_mass, needs_image_sink=self.needs_image_sink
            )  # fmt: skip
            count(selected)
            return found

        return Reweigh(groups, 4, rows, factors)


def redistribute(
    mass: Tensor, *, rho: float, transfer: float, min_mass: float, needs_image_sink: bool = False
) -> tuple[Tensor, Tensor]:
    """Factors of the four groups of keys, from their masses ``(4, ...)``: ``(factors (4, ...), selected (...))``.

    Rows without weight on sinks, or without weight on image tokens that are no sinks, are not selected (0/0).
    """
    image, image_sink, text_sink = mass[IMAGE], mass[IMAGE_SINK], mass[TEXT_SINK]
    visual, sinks = image + image_sink, image_sink + text_sink
    selected = (visual >= min_mass) & (image >= rho * visual) & (sinks > 0) & (image > 0)
    if needs_image_sink:
        selected = selected & (image_sink > 0)
    gain = 1 + transfer * sinks / torch.where(image > 0, image, 1.0)
    one = torch.ones_like(gain)
    factors = torch.stack([one, gain, one * (1 - transfer), one * (1 - transfer)])
    return torch.where(selected, factors, 1.0), selected


class _Now(threading.local):
    """Flags of the forward that runs in this thread: ``"image"`` and, by layer, sinks, over its new tokens."""

    def __init__(self) -> None:
        self.flags: dict[Any, Tensor] = {}


class _Redistributing(Act):
    """Flags per request: which tokens are image tokens, and which are sinks in which layer."""

    def __init__(self, what: VAR, handle: Handle, tokens: ImageTokens) -> None:
        self.what, self.handle, self.tokens = what, handle, tokens
        self.dims = SINK_DIMS[what.profile] if what.profile is not None else tuple(what.dims)
        layers = range(handle.num_layers - 1) if what.layers is None else what.layers
        self.layers = {int(layer) for layer in layers}
        self.requests: weakref.WeakKeyDictionary[Any, dict[Any, Tensor]] = weakref.WeakKeyDictionary()
        self.now = _Now()
        self.rows: dict[int, list[int]] = {}
        self.reading = ExitStack()
        if self.dims:
            config: Any = handle.model.config
            width = int(getattr(config.get_text_config(), "hidden_size", 0))
            wrong = [d for d in self.dims if not 0 <= d < width]
            if wrong:
                raise ConfigError(
                    f"sink dimension {wrong[0]} does not exist: {type(handle.model).__name__} has width {width}."
                )
            self.limit = threshold(what.tau, what.tau_mode, width)
            around = blocks(handle.model)
            self.reading.enter_context(on_inputs({i: around[i] for i in self.layers & around.keys()}, self._see))

    def close(self) -> None:
        self.reading.close()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now.flags = {"image": visual_mask(self.tokens, forward_inputs(module, args, kwargs), module)}

    def _see(self, layer: int, hidden: Tensor) -> None:
        phi = sink_values(hidden.detach(), self.dims)
        self.now.flags[layer] = phi > self.limit if self.what.strict else phi >= self.limit

    def _flags(self, name: Any, moment: Moment) -> Tensor:
        """``(B, Nk)`` flags of one kind over the keys: those of earlier calls of the request, then those of this one."""
        new, offset = self.now.flags[name], moment.ctx.q_offset
        if moment.ctx.decoding and offset > 0 and not (name != "image" and self.what.generated == "test"):
            new = torch.zeros_like(new)
        if offset > 0:
            before = self.requests.get(moment.cache, {}).get(name) if moment.cache is not None else None
            if before is None or before.shape[1] < offset:
                raise UnsupportedError(
                    f"VAR meets a cache of {offset} tokens that was filled outside this block, so their sinks are unknown; "
                    "run the prompt inside `with foveal.steer.apply(...)` too."
                )
            before = before.repeat_interleave(new.shape[0] // before.shape[0], 0)  # beams of the same prompt
            new = torch.cat([before[:, :offset], new], 1)
        if moment.cache is not None:
            self.requests.setdefault(moment.cache, {})[name] = new
        return over_keys(new, moment)

    def reweigh(self, moment: Moment) -> Reweigh | None:
        layer, what = moment.ctx.layer_index, self.what
        image = self._flags("image", moment)
        if layer not in self.layers:
            return None
        sink = over_keys(what.sinks, moment) if what.sinks is not None else self._flags(layer, moment)
        if what.exclude is not None:
            sink = sink & ~over_keys(what.exclude, moment)
        if what.transfer == 0 or what.rho > 1 or not bool(sink.any()) or not bool((image & ~sink).any()):
            return None
        if what.needs_image_sink and not bool((image & sink).any()):
            return None

        def count(selected: Tensor) -> None:
            log = self.rows.setdefault(layer, [0, 0])
            log[0] += int(selected.sum())
            log[1] += selected.numel()

        return what.step(image, sink, ~over_rows(image, moment), count)

    def report(self) -> dict[str, Any]:
        """``rows``: per layer, (head, row) pairs changed and looked at; rows of padding count among the latter."""
        changed = sum(a for a, _ in self.rows.values())
        return {
            "intervention": "VAR",
            "fired": changed > 0,
            "changed": changed,
            "rows": {str(k): tuple(v) for k, v in sorted(self.rows.items())},
        }
