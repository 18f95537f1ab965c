"""Primary and secondary attention sinks: which tokens, born where, alive how long (arXiv 2512.22213).

Layer ``l`` is the output of block ``l``; the embedding is no layer. Definitions are those of the authors' detector: the primary
sink is the first token whose residual stream becomes massive, its window runs from the block that writes the vector to the one
before it is erased, and a later token is a sink in a layer of the window when ``|cos|`` to the primary exceeds 0.9.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from .gating import FirstKey, MassiveActivations, first_key
from .probes import Mass, SinkScore
from .record import Recording, record
from .stream import Trace, Tracer, decoder_blocks, on_outputs

COSINE = 0.9
JUMP = 5.0
"""The primary's norm must rise by this many median norms in one block, else there is no primary sink."""
SHALLOW = 20
"""Up to this many blocks the paper's rule leaves no lifetime for secondary sinks."""

Rule = Literal["relative", "paper"]


@dataclass(frozen=True)
class Primary:
    """The primary sink of one sequence: position, window ``[on, off)`` of layers, its norm at ``on`` and the median norm there."""

    position: int
    on: int
    off: int
    norm: float
    median_norm: float


@dataclass(frozen=True)
class Sink:
    """A token that turns along the primary's direction.

    Attributes:
        position: in the sequence. birth: first layer. lifetime: number of layers in which it is a sink.
        contiguous: whether these follow one another. sign: −1 when it points against the primary.
        label: ``"candidate"`` (another of the first tokens), ``"primary"``, ``"secondary"`` or ``"noise"``.
        cosine, norm: at birth. score: mean attention received from a later token, averaged over heads, at its best layer; NaN when
            it was not measured.
    """

    position: int
    birth: int
    lifetime: int
    contiguous: bool
    sign: int
    label: str
    cosine: float
    norm: float
    score: float = float("nan")

    @property
    def level(self) -> tuple[int, int]:
        """``(birth, lifetime)``."""
        return self.birth, self.lifetime


@dataclass(frozen=True)
class Sinks:
    """What one sequence has; without a primary sink there are no others."""

    primary: Primary | None
    found: tuple[Sink, ...]

    @property
    def secondary(self) -> tuple[Sink, ...]:
        return tuple(s for s in self.found if s.label == "secondary")

    def levels(self) -> dict[tuple[int, int], int]:
        """How many secondary sinks each ``(birth, lifetime)`` has."""
        return dict(sorted(Counter(s.level for s in self.secondary).items()))


def find_primary(norms: Tensor, first: int = 0, candidates: int = 2, jump: float = JUMP) -> Primary | None:
    """The primary sink, or None when no candidate's norm rises by ``jump`` median norms in one block.

    Args:
        norms: ``(L, N)``, NaN on padding. first: position of the first real token. candidates: tokens from there that may be it; the
            authors use 3 under a chat template, else 2.
    """
    count = min(candidates, norms.shape[1] - first)
    position = first + int(norms[:, first : first + count].mean(0).argmax())
    path = norms[:, position].double()
    median = norms.nanmedian(-1).values.double()
    change = path.diff()
    at_once = float(path[0] - median[0])  # written by block 0 already, before any change of norm
    if len(change) == 0 or at_once > float(change.max()):
        on, rise = 0, at_once
    else:
        on, rise = int(change.argmax()) + 1, float(change.max())
    if rise < jump * float(median[on]):
        return None
    falls = change[on:]
    off = len(path) if len(falls) == 0 or float(falls.min()) >= 0 else on + int(falls.argmin()) + 1
    return Primary(position, on, off, float(path[on]), float(median[on]))


def find_sinks(
    trace: Trace, *, rule: Rule = "relative", cosine: float = COSINE, jump: float = JUMP, score: Tensor | None = None
) -> list[Sinks]:
    """Every sequence's sinks.

    Args:
        trace: of one prefill.
        rule: ``"paper"``: lifetime ≥ L − 15 is primary, 4 < lifetime < L − 15 secondary, less is noise. ``"relative"``, for models of
            any depth: born more than two blocks after the primary and alive for less than 0.8 of its window is secondary; a lifetime
            of at most an eighth of the window (4 at most) is noise; everything else is primary.
        cosine, jump: thresholds. score: ``(B, L, N)`` sink scores over heads, or None.

    Raises:
        ConfigError: the paper's rule for a model of 20 blocks or fewer, where it leaves no secondary sinks.
    """
    if rule not in ("relative", "paper"):
        raise ConfigError(f"rule is {rule!r}; expected 'relative' or 'paper'.")
    if rule == "paper" and trace.layers <= SHALLOW:
        raise ConfigError(
            f"rule='paper' calls a lifetime below L − 15 secondary, and this model has L = {trace.layers} blocks: nothing above noise is left. "
            "Use rule='relative'."
        )
    out = []
    for b in range(trace.norms.shape[0]):
        first, candidates = int(trace.first[b]), trace.cosines.shape[1]
        primary = find_primary(trace.norms[b], first, candidates, jump)
        if primary is None:
            out.append(Sinks(None, ()))
            continue
        along = trace.cosines[b, primary.position - first, primary.on : primary.off]  # (layers of the window, N)
        hit = along.abs() > cosine  # NaN on padding is no hit
        hit[:, : primary.position + 1] = False
        found = []
        for t in hit.any(0).nonzero().flatten().tolist():
            layers = hit[:, t].nonzero().flatten()
            birth, lifetime = int(layers[0]) + primary.on, len(layers)
            label = "candidate" if t < first + candidates else _label(birth, lifetime, primary, trace.layers, rule)
            at = float(along[birth - primary.on, t])
            best = float("nan") if score is None else float(score[b, primary.on : primary.off, t].max())
            contiguous = int(layers[-1] - layers[0]) + 1 == lifetime
            norm = float(trace.norms[b, birth, t])
            found.append(Sink(t, birth, lifetime, contiguous, 1 if at > 0 else -1, label, at, norm, best))
        out.append(Sinks(primary, tuple(found)))
    return out


def _label(birth: int, lifetime: int, primary: Primary, layers: int, rule: Rule) -> str:
    if rule == "paper":
        return "primary" if lifetime >= layers - 15 else "secondary" if lifetime > 4 else "noise"
    window = primary.off - primary.on
    if lifetime <= min(4, window // 8):
        return "noise"
    return "secondary" if birth > primary.on + 2 and lifetime < 0.8 * window else "primary"


@dataclass(frozen=True, eq=False)
class SinkScan:
    """A model's sinks on one batch of text.

    Attributes:
        sinks: one per sequence. trace: norms and cosines. recording: ``sink_score`` and ``mass`` on the first token.
        attention: F-Attn of every layer. activations: M-Act (both as in arXiv 2505.06708).
    """

    sinks: list[Sinks]
    trace: Trace
    recording: Recording
    attention: tuple[FirstKey, ...]
    activations: MassiveActivations

    def scores(self) -> Tensor:
        """``(B, L, N)`` mean attention received from a later token, averaged over heads; NaN on padding."""
        return _over_heads(self.recording)

    def to_json(self) -> dict[str, Any]:
        """Plain values: per sequence the primary, its others, levels; per layer the two ratios."""
        from dataclasses import asdict

        return {
            "sequences": [
                {
                    "primary": None if s.primary is None else asdict(s.primary),
                    "sinks": [asdict(x) for x in s.found],
                    "levels": [[*level, count] for level, count in s.levels().items()],
                }
                for s in self.sinks
            ],
            "first_key": [asdict(f) for f in self.attention],
            "massive_activation": {"largest": self.activations.largest, "token": self.activations.token, "mean": self.activations.mean},
        }  # fmt: skip


def scan_sinks(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    rule: Rule = "relative",
    candidates: int = 2,
    jump: float = JUMP,
) -> SinkScan:
    """Run a decoder once and find its sinks.

    Args:
        model: a decoder that :func:`foveal.attach` takes. inputs: ``(B, N)`` token ids, or the forward's keyword arguments.
        rule, jump: as in :func:`find_sinks`. candidates: first tokens that may be the primary (3 under a chat template).

    Raises:
        UnsupportedError: a model without blocks. ShapeError: fewer tokens than candidates. ConfigError: as :func:`find_sinks`.
    """
    given: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    mask = given.get("attention_mask")
    tracer = Tracer(candidates, mask if mask is not None and mask.dim() == 2 else None)
    body = getattr(model, "base_model", model)
    watching = on_outputs(decoder_blocks(model), lambda _, h: tracer.take(h))
    with torch.no_grad(), record(model, [SinkScore(), Mass()]) as rec, watching:
        body(**given, use_cache=False)
    trace = tracer.trace()
    sinks = find_sinks(trace, rule=rule, jump=jump, score=_over_heads(rec))
    mass = rec["mass"].values[..., 0]
    mass = (mass if mass.dim() == 4 else mass[None]).nan_to_num(0.0)  # (B, L, H, N)
    skip = min(16, mass.shape[-1] - 1)
    attention = tuple(first_key(mass[:, i], trace.valid, skip) for i in range(mass.shape[1]))
    activations = MassiveActivations(tuple(trace.largest.tolist()), tuple(trace.token.tolist()))
    return SinkScan(sinks, trace, rec, attention, activations)


def _over_heads(rec: Recording) -> Tensor:
    values = rec["sink_score"].values
    return (values if values.dim() == 4 else values[None]).nanmean(2)
