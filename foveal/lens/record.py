"""``with foveal.lens.record(model, probes) as rec: model(...)``: several probes in one forward pass, beside any kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, UnsupportedError, nearest
from ..core.registry import lookup
from ..kernels.call import compute_dtype
from .blocks import blocks, real_rows
from .kept import Kept
from .labelled import Labelled, save
from .probe import Probe, Result, Site

if TYPE_CHECKING:
    from ..hf import AttentionEvent

Probes = str | Probe | Sequence[str | Probe] | Mapping[str, str | Probe]


def named(probes: Probes) -> dict[str, Probe]:
    """Probes by the name under which their results are found: their own, with ``_2``, ``_3``, … where two are alike.

    Raises:
        ConfigError: an unknown name, something that is no probe, or none at all.
    """
    if isinstance(probes, (str, Probe)):
        probes = [probes]
    pairs: Iterable[tuple[str, str | Probe]]
    pairs = probes.items() if isinstance(probes, Mapping) else (("", p) for p in probes)
    out: dict[str, Probe] = {}
    for name, given in pairs:
        probe = lookup("probe", given)() if isinstance(given, str) else given
        if not isinstance(probe, Probe):
            raise ConfigError(
                f"probes holds a {type(probe).__name__}; expected names such as 'entropy', or probes such as TopEdges(32)."
            )
        name = name or probe.registered_name
        count = 1
        while (free := name if count == 1 else f"{name}_{count}") in out:
            count += 1
        out[free] = probe
    if not out:
        raise ConfigError("probes is empty; expected at least one, such as 'entropy'.")
    return out


class Recording:
    """What probes found in one request, per layer; ``rec["entropy"]`` is a :class:`Labelled` array.

    Axes are ``layer``, ``head`` and what the probe adds (mostly ``token``, its position in the request); a batch of more than one
    sequence puts ``sequence`` first. Layers with fewer heads than others are filled up with NaN.
    """

    def __init__(self, probes: dict[str, Probe], weights: str, layers: frozenset[int] | None) -> None:
        self.probes = probes
        self._only_kept = weights == "kept"
        self._layers = layers
        self._sites: dict[int, Site] = {}
        self._states: dict[tuple[int, str], Any] = {}
        self._arrays: dict[str, Labelled] | None = None

    # --- recording --------------------------------------------------------------------------------------------------

    def __call__(self, event: AttentionEvent) -> None:
        """Record one attention call; what :func:`record` gives to the dispatcher."""
        from ..hf.recompute import in_backward

        if in_backward():  # gradient checkpointing runs the layer again; it was recorded the first time
            return
        if event.role == "cross" or (self._layers is not None and event.layer_index not in self._layers):
            return
        self._arrays = None
        for name, probe in self.probes.items():
            if probe.needs_gradients and not (torch.is_grad_enabled() and event.out.requires_grad):
                raise UnsupportedError(_no_gradients(name, event))
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(event.call.q.device.type, enabled=False):
            self._record(event)

    def _record(self, event: AttentionEvent) -> None:
        call = event.call
        site = self._site(event)
        kept = Kept(event.parts, call.base)
        policy = None if kept.everything else kept
        base = call.base
        real = torch.stack([real_rows(base, b) for b in range(call.q.shape[0])])
        site.real.append(real)
        looking: list[tuple[Probe, Any]] = []
        for name, probe in self.probes.items():
            key = (event.layer_index, name)
            if key not in self._states:
                self._states[key] = probe.start(site)
            self._states[key] = probe.call(event, site, self._states[key])
            if probe.needs_blocks:
                looking.append((probe, self._states[key]))
        if looking:
            for block in blocks(call, event.sink_logits, policy, self._only_kept):
                for probe, state in looking:
                    probe.see(block, site, state)
        site.seen = site.end

    def _site(self, event: AttentionEvent) -> Site:
        call, start = event.call, event.ctx.q_offset
        batch, heads, q_len = call.q.shape[:3]
        site = self._sites.get(event.layer_index)
        if site is None:
            site = Site(event.layer_index, heads, batch, compute_dtype(call.q.dtype), call.q.device, start, start)
            self._sites[event.layer_index] = site
            if start:
                site.real.append(_before(call.base, batch, start))
        if start != site.seen or batch != site.batch:
            raise UnsupportedError(
                f"this recording holds {site.seen} tokens of {site.batch} sequences, and {event.layer_name} now runs on {batch} from token "
                f"{start}: another text. A recording is of one request; open another record(...), or go on with the same cache."
            )
        site.start, site.end = start, start + q_len
        site.first_key = start - call.base.shift
        return site

    # --- results ----------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens of the request so far."""
        return max((s.end for s in self._sites.values()), default=0)

    @property
    def layers(self) -> list[int]:
        """Layers that were recorded."""
        return sorted(self._sites)

    def arrays(self) -> dict[str, Labelled]:
        """Every result by name.

        Raises:
            ConfigError: nothing ran, or a probe asks for something that the text does not have.
        """
        if self._arrays is None:
            if not self._sites:
                raise ConfigError("nothing was recorded; call the model inside the `with record(...)` block.")
            with torch.inference_mode(False), torch.no_grad():
                found = {name: a for name, p in self.probes.items() for name, a in self._arrays_of(name, p).items()}
            self._arrays = found
        return self._arrays

    def _arrays_of(self, name: str, probe: Probe) -> dict[str, Labelled]:
        per_layer = [probe.finish(self._sites[i], self._states[i, name]) for i in self.layers]
        return {
            name + ("." + part if part else ""): self._stack(name, [layer[part] for layer in per_layer])
            for part in per_layer[0]
        }

    def _stack(self, name: str, results: list[Result]) -> Labelled:
        heads = max(r.values.shape[1] for r in results)
        tails = {tuple(r.values.shape[2:]) for r in results}
        if len(tails) != 1:
            raise UnsupportedError(
                f"layers of this model see texts of different lengths ({', '.join(map(str, sorted(tails)))}), so {name!r} is no single array. "
                "Record the layers of one stack at a time: record(model, probes, layers=range(…))."
            )
        values = torch.stack([_pad_heads(r.values.detach().cpu(), heads) for r in results], 1)
        dims = ("sequence", "layer", "head", *results[0].dims)
        coords: dict[str, tuple[Any, ...]] = {"layer": tuple(self.layers), **results[0].coords}
        if values.shape[0] == 1:
            values, dims = values[0], dims[1:]
        return Labelled(values, dims, coords)

    def __getitem__(self, name: str) -> Labelled:
        arrays = self.arrays()
        if name not in arrays:
            raise ConfigError(f"this recording has no {name!r}. {nearest(name, arrays)}")
        return arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays())

    def save(self, path: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write all arrays to one safetensors file; ``foveal.lens.load`` reads it.

        Raises:
            DataError: the file cannot be written.
        """
        save(self.arrays(), path, {"tokens": self.tokens, **(facts or {})})


def _before(base: BaseMask, batch: int, start: int) -> Tensor:
    """``(B, start)`` bool: which tokens that were cached before the recording began are no padding, as far as the mask tells."""
    real = torch.ones(batch, start, dtype=torch.bool, device=base.device)
    if base.valid is not None and base.shift > 0:
        real[:, start - base.shift :] = base.valid[:, : base.shift]
    return real


def _pad_heads(values: Tensor, heads: int) -> Tensor:
    missing = heads - values.shape[1]
    if not missing:
        return values
    fill = -1 if not values.is_floating_point() else torch.nan
    return torch.cat([values, values.new_full((values.shape[0], missing, *values.shape[2:]), fill)], 1)


def _no_gradients(name: str, event: AttentionEvent) -> str:
    where = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
    if torch.is_grad_enabled():
        where = "parameters and inputs without requires_grad"
    return (
        f"the probe {name!r} needs gradients, and {event.layer_name} runs under {where}. Run the model with gradients, "
        "and call loss.backward() inside the `with record(...)` block."
    )


@contextmanager
def record(
    model: nn.Module, probes: Probes, *, weights: Literal["dense", "kept"] = "dense", layers: Iterable[int] | None = None
) -> Iterator[Recording]:  # fmt: skip
    """Measure attention while the model runs, in O(N) memory; what the model computes does not change by a bit.

    Without more, the model's own attention runs, with whatever kernel it uses; inside ``foveal.attach(model, policy)`` the policy
    runs and the probes see what it keeps. The weights themselves are computed once more, in blocks of rows, for all probes together.

    Args:
        model: any model that :func:`foveal.attach` takes.
        probes: names of registered probes, or probes with their settings; a mapping names the results.
        weights: ``"dense"``, the softmax over all keys that the model allows; ``"kept"``, over those that the policy keeps.
        layers: self-attention layers to record; default all.

    Yields:
        A :class:`Recording`. It holds one request: a prefill, or its chunks and decode steps with one cache.

    Raises:
        ConfigError: an unknown probe or setting; a position that the text does not have (on leaving the block).
        UnsupportedError: a model that cannot be attached to, or a probe that needs gradients where there are none.
    """
    from ..hf import attach, interface
    from ..hf.families import depth, sites
    from ..patterns import Dense

    if weights not in ("dense", "kept"):
        raise ConfigError(f"weights is {weights!r}; expected 'dense' or 'kept'.")
    chosen = named(probes)
    found = sites(model)
    attached = interface.attached(found[0].module)
    policy = bool(attached) and attached[-1].host is None
    wanted = None if layers is None else frozenset(layers)
    count = depth(model, found)
    if wanted is not None and (not wanted or not wanted <= set(range(count))):
        raise ConfigError(f"layers is {sorted(wanted)}, but the model has the layers 0 to {count - 1}.")
    for name, probe in chosen.items():
        if weights == "kept" and probe.needs_policy:
            raise ConfigError(f"the probe {name!r} measures what a policy drops; record it with weights='dense'.")
        if (weights == "kept" or probe.needs_policy) and not policy:
            what = f"the probe {name!r}" if probe.needs_policy else "weights='kept'"
            raise ConfigError(
                f"{what} asks what a policy keeps, and none is attached; use `with foveal.attach(model, policy):` around record(...)."
            )
    recording = Recording(chosen, weights, wanted)
    if attached:
        with attached[-1].probing(recording):
            yield recording
    else:
        with attach(model, Dense(), probes=[recording]) as handle:
            handle.host = interface.host_attention
            yield recording
    if recording.layers and not any(p.needs_gradients for p in chosen.values()):
        recording.arrays()
