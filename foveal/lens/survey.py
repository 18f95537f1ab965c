"""Everything that the report of ``foveal inspect`` shows, measured in one dense forward pass and one under the compared policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from .gating import FirstKey, MassiveActivations, first_key
from .labelled import Labelled
from .probe import Probe
from .probes import Atlas, Entropy, Lost, Mass, SinkScore, TopEdges
from .record import Recording, named, record
from .rhythm import Rhythm, prediction_entropy, rhythm_of, rhythm_probes
from .sinks import Sinks, find_sinks
from .stream import Tracer, decoder_blocks, on_outputs

if TYPE_CHECKING:
    from ..policies import Policy

Progress = Callable[[str, int, int], None]
CELLS = 32
EDGES = 12


class Survey:
    """What was measured on one text.

    Attributes:
        recording: of the dense pass. sinks, rhythm: what it shows.
        attention, activations: F-Attn and M-Act per layer. extras: names of the probes asked for beside the report's own.
        compared: the recording under the policy, with ``lost``; None without one.
    """

    def __init__(
        self, recording: Recording, sinks: Sinks, rhythm: Rhythm, attention: Sequence[FirstKey], activations: MassiveActivations,
        extras: Sequence[str], compared: Recording | None,
    ) -> None:  # fmt: skip
        self.recording, self.sinks, self.rhythm = recording, sinks, rhythm
        self.attention, self.activations, self.extras, self.compared = attention, activations, extras, compared

    @property
    def arrays(self) -> dict[str, Labelled]:
        """Every array, those under the policy with ``compared.`` before their names."""
        other = {} if self.compared is None else self.compared.arrays()
        return {**self.recording.arrays(), **{f"compared.{name}": a for name, a in other.items()}}


@torch.no_grad()
def survey(
    model: nn.Module, ids: Tensor, *, probes: Sequence[str] = (), policy: Policy | None = None, progress: Progress | None = None
) -> Survey:  # fmt: skip
    """Look at one text.

    Args:
        model: a causal decoder that :func:`foveal.attach` takes. ids: ``(1, N)`` with N ≥ 2.
        probes: further registered probes, with their default settings. policy: what to compare with dense attention.
        progress: called with (what, layers done, layers).

    Raises:
        ShapeError: more than one text, or fewer than two tokens. ConfigError: unknown probes. UnsupportedError: other models.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ShapeError(f"ids has shape {tuple(ids.shape)}; expected (1, N), one text of at least 2 tokens.")
    own: dict[str, Probe] = {
        "atlas": Atlas(CELLS), "edges": TopEdges(EDGES), "entropy": Entropy(), "sink_score": SinkScore(), "mass": Mass(),
        **rhythm_probes(),
    }  # fmt: skip
    extras = {name: p for name, p in named(probes).items() if name not in own} if probes else {}
    for name, probe in extras.items():
        if probe.needs_gradients or probe.needs_policy:
            why = "a backward pass" if probe.needs_gradients else "a policy; --compare POLICY records it"
            raise ConfigError(f"the probe {name!r} needs {why}, and this looks at one dense forward pass.")
    blocks = decoder_blocks(model)
    tracer = Tracer()
    body = getattr(model, "base_model", model)
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}

    def told(what: str) -> Callable[[int, Tensor], None]:
        def see(layer: int, hidden: Tensor) -> None:
            if what == "recording attention":
                tracer.take(hidden)
            if progress is not None:
                progress(what, layer + 1, len(blocks))

        return see

    with record(model, {**own, **extras}) as rec, on_outputs(blocks, told("recording attention")):
        hidden = body(input_ids=ids, **kwargs)[0]
    compared = None
    if policy is not None:
        from ..hf import attach

        watching = on_outputs(blocks, told("comparing with the policy"))
        with attach(model, policy), record(model, Lost(EDGES)) as compared, watching:
            body(input_ids=ids, **kwargs)
    trace = tracer.trace()
    scores = rec["sink_score"].values.nanmean(1)[None]
    (sinks,) = find_sinks(trace, score=scores)
    mass = rec["mass"].values[..., 0].nan_to_num(0.0)
    attention = [first_key(m[None], None, min(16, ids.shape[1] - 1)) for m in mass]
    activations = MassiveActivations(tuple(trace.largest.tolist()), tuple(trace.token.tolist()))
    rhythm = rhythm_of(rec, prediction_entropy(model, hidden))
    return Survey(rec, sinks, rhythm, attention, activations, list(extras), compared)


def token_figures(found: Survey) -> dict[str, np.ndarray]:
    """Figures per token that text is coloured by, ``(N,)`` each, by the name that the report shows."""
    rhythm, rec = found.rhythm, found.recording
    out = {
        "WAAD (look-back in a window)": rhythm.waad,
        "FAI (influence on later tokens)": rhythm.fai,
        "prediction entropy": rhythm.entropy,
        "sink score (best layer)": rec["sink_score"].values.nanmean(1).amax(0).double().numpy(),
        "attention entropy": rec["entropy"].values.nanmean((0, 1)).double().numpy(),
    }
    for name in found.extras:
        for full, array in rec.arrays().items():
            if full.split(".")[0] == name and array.dims == ("layer", "head", "token"):
                out[full] = array.values.double().nanmean((0, 1)).numpy()
    if found.compared is not None:
        out["mass lost to the policy"] = found.compared["lost.mass"].values.nanmean((0, 1)).double().numpy()
    return {name: values for name, values in out.items() if np.isfinite(values).any()}


def head_figures(found: Survey) -> dict[str, np.ndarray]:
    """Figures per layer and head, ``(L, H)`` each."""
    rec = found.recording
    out: dict[str, Tensor] = {
        "mass on the first token": rec["mass"].values[..., 0].nanmean(-1),
        "attention entropy (nats)": rec["entropy"].values.nanmean(-1),
        "look-back distance (tokens)": rec["lookback"].values.nanmean(-1),
    }
    for name in found.extras:
        for full, array in rec.arrays().items():
            if full.split(".")[0] == name and array.dims == ("layer", "head", "token"):
                out[f"mean {full}"] = array.values.nanmean(-1)
    if found.compared is not None:
        out["mass lost to the policy"] = found.compared["lost.mass"].values.nanmean(-1)
    return {name: values.double().numpy() for name, values in out.items()}


def summary(found: Survey) -> Mapping[str, Any]:
    """What a terminal or a JSON file wants of it: sinks, ratios, rhythm without its arrays, what was lost."""
    from dataclasses import asdict

    rhythm = found.rhythm
    out: dict[str, Any] = {
        "primary_sink": None if found.sinks.primary is None else asdict(found.sinks.primary),
        "sinks": [asdict(s) for s in found.sinks.found],
        "first_key": [f.share for f in found.attention],
        "massive_activation": list(found.activations.largest),
        "local_heads": [list(h) for h in rhythm.heads.local],
        "global_heads": [list(h) for h in rhythm.heads.far],
        "preplan_tokens": len(rhythm.preplan),
        "anchor_tokens": len(rhythm.anchors),
    }
    if found.compared is not None:
        lost = found.compared["lost.mass"].values.nanmean(-1)
        out["lost_mass"] = {"by_layer": lost.mean(-1).tolist(), "by_head": lost.tolist()}
    return out
