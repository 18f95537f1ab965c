"""Which heads cause an answer: activation patching, path patching and attribution patching (arXiv 2310.08744, 2211.00593).

Metric: logit difference ``LD = logit[end, correct] − logit[end, foil]``. Effect ``E = (LD_patched − LD_clean) / (LD_corrupt − LD_clean)``,
the ratio of means over all prompts: 0 is no effect, 1 as bad as the whole corruption.

Path patching from a head to a receiver changes only their direct connection: every other head is frozen at its clean output at all
positions, MLPs and norms are recomputed. Frozen heads carry nothing from one position to another, so a path runs within one position: the
sender's at the receiver's. That makes it cheap: a row of the first run is one token, and the second run starts at the receiver's
position over the clean keys and values. Nothing is approximated (``tests/lens/test_patching.py`` holds it against two whole runs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..data.pairs import END, PromptPairs
from .effects import Head, HeadEffects, Receivers
from .hooks import Edit, Points, Record, Rows

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""

ROWS = 512
"""Rows of one batch."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model's clean and corrupted runs over the same pairs.

    Attributes:
        points: the model. pairs: on its device. clean, corrupt: their records.
        clean_difference, corrupt_difference: ``(B,)`` logit differences.
    """

    points: Points
    pairs: PromptPairs
    clean: Record
    corrupt: Record
    clean_difference: Tensor
    corrupt_difference: Tensor

    @property
    def heads(self) -> list[Head]:
        """All heads of the model."""
        return [(layer, head) for layer, count in enumerate(self.clean.heads) for head in range(count)]

    def difference(self, logits: Tensor, prompt: Tensor) -> Tensor:
        """``(R,)`` logit differences of ``(R, V)`` logits."""
        picked = [logits.gather(1, side[prompt][:, None])[:, 0] for side in (self.pairs.correct, self.pairs.foil)]
        return picked[0] - picked[1]


@torch.no_grad()
def compare(model: nn.Module, pairs: PromptPairs) -> Comparison:
    """Run both sides of the pairs.

    Raises:
        UnsupportedError: a family that the points do not reach. ConfigError: a model in training mode.
    """
    points = Points(model)
    pairs = pairs.to(next(model.parameters()).device)
    runs = [points.record(ids) for ids in (pairs.clean, pairs.corrupt)]
    each = torch.arange(len(pairs), device=pairs.clean.device)
    end = pairs.place(END)[:, 0]
    differences = [
        logits[each, end, pairs.correct] - logits[each, end, pairs.foil] for _, logits in runs
    ]  # fmt: skip
    return Comparison(points, pairs, runs[0][0], runs[1][0], differences[0], differences[1])


@torch.no_grad()
def patch_heads(
    comparison: Comparison, at: str = END, *, heads: Sequence[Head] | None = None, rows: int = ROWS, progress: Progress | None = None
) -> HeadEffects:  # fmt: skip
    """Activation patching: one head's output at a place takes its corrupted value, everything downstream follows.

    Args:
        comparison: from :func:`compare`. at: a place of the pairs, or "all". heads: those to patch, default all.
        rows: of one batch. progress: called after each.

    Raises:
        ConfigError: the pairs have no such place, or the model no such head.
    """
    c, where = comparison, comparison.pairs.place(at).to(comparison.pairs.clean.device)
    senders = _checked(c, heads)
    change = _empty(c)
    width = _span(c, where)
    for batch in _batches(c, senders, rows, progress):
        run = _suffix(c, batch.prompt, width)
        logits = c.points.run(c.clean, run, {"z": _sender(c, batch, run, where)}, first_layer=int(batch.layer.min()))
        assert logits is not None
        batch.write(change, c.difference(logits, batch.prompt) - c.clean_difference[batch.prompt])
    return _effects("activation", at, "", change, c)


@torch.no_grad()
def patch_paths(
    comparison: Comparison, receivers: Receivers | None = None, at: str = END, *, freeze_mlps: bool = False,
    heads: Sequence[Head] | None = None, rows: int = ROWS, progress: Progress | None = None,
) -> HeadEffects:  # fmt: skip
    """Path patching: only the direct path from one head to the receivers carries the corruption.

    Args:
        comparison: from :func:`compare`.
        receivers: where paths end; default the final residual, which is read at ``"end"``.
        at: the place where sender and receivers act.
        freeze_mlps: keep MLPs between sender and receiver at their clean output too.
        heads: senders, default all. Senders that are not below a receiver have an effect of exactly 0.
        rows: of one batch. progress: called after each.

    Raises:
        ConfigError: no such place or head, or the final residual anywhere but at the end.
    """
    receivers = receivers or Receivers()
    c, where = comparison, comparison.pairs.place(at).to(comparison.pairs.clean.device)
    if receivers.kind == "final" and at != END:
        raise ConfigError(
            f"the final residual is read at the end, and at is {at!r}; use at='end' or receivers among heads."
        )
    _checked(c, receivers.heads or None)
    last = max((layer for layer, _ in receivers.heads), default=len(c.clean.z))
    senders = [s for s in _checked(c, heads) if s[0] < last]
    change = _empty(c, 0.0)
    width = _span(c, where)
    for batch in _batches(c, senders, rows, progress):
        first, start = Rows(batch.prompt, where[batch.prompt]), int(batch.layer.min())
        edits: dict[str, Edit] = {"z": _sender(c, batch, first, where)}
        if freeze_mlps:
            edits["mlp"] = _clean_mlp(c, first)
        if receivers.kind == "final":
            logits = c.points.run(c.clean, first, edits, frozen=True, first_layer=start)
        else:
            seen: dict[tuple[str, int], Tensor] = {}
            edits |= {name: _keep(seen, name) for name in receivers.kind}
            c.points.run(c.clean, first, edits, frozen=True, first_layer=start, last_layer=last)
            run = _suffix(c, batch.prompt, width)
            received = {name: _receive(c, receivers, seen, name, first, run) for name in receivers.kind}
            logits = c.points.run(c.clean, run, received, first_layer=min(layer for layer, _ in receivers.heads))
        assert logits is not None
        batch.write(change, c.difference(logits, batch.prompt) - c.clean_difference[batch.prompt])
    return _effects("path", at, str(receivers), change, c)


def attribute_heads(comparison: Comparison, at: str = END) -> HeadEffects:
    """Attribution patching, the fast screen: ``(z_corrupt − z_clean) · ∂LD/∂z`` summed over the place, from one backward pass.

    The first-order estimate of :func:`patch_heads`; check what it finds with that.

    Raises:
        ConfigError: gradients are switched off by ``torch.inference_mode``, or no such place.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "attribute_heads needs gradients, and torch.inference_mode() is on; call it outside that block."
        )
    c, where = comparison, comparison.pairs.place(at).to(comparison.pairs.clean.device)
    leaves = [torch.zeros_like(z, requires_grad=True) for z in c.clean.z]
    every = torch.arange(len(c.pairs), device=where.device)
    with torch.enable_grad():
        _, logits = c.points.record(c.pairs.clean, {"z": lambda layer, z: z + leaves[layer]})
        at_end = logits[every, c.pairs.place(END)[:, 0]]
        slopes = torch.autograd.grad(c.difference(at_end, every).sum(), leaves)
    all_positions = torch.arange(c.pairs.clean.shape[1], device=where.device).expand(len(c.pairs), -1)
    inside = Rows(every, all_positions).at(where)
    change = _empty(c)
    for layer, slope in enumerate(slopes):
        moved = ((c.corrupt.z[layer] - c.clean.z[layer]) * slope).double().sum(-1)  # (B, H, N)
        change[layer, : moved.shape[1]] = (moved * inside[:, None]).sum(-1).T.cpu()
    return _effects("attribution", at, "", change, c)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of (sender, prompt)."""

    prompt: Tensor
    layer: Tensor
    head: Tensor

    def write(self, change: Tensor, value: Tensor) -> None:
        change[self.layer.cpu(), self.head.cpu(), self.prompt.cpu()] = value.double().cpu()


def _batches(c: Comparison, senders: Sequence[Head], rows: int, progress: Progress | None) -> Iterator[_Batch]:
    device, count = c.pairs.clean.device, len(c.pairs)
    table = torch.tensor(senders, dtype=torch.int64, device=device).reshape(-1, 2)
    total = len(senders) * count
    for start in range(0, total, max(rows, 1)):
        index = torch.arange(start, min(start + rows, total), device=device)
        sender = table[index // count]
        yield _Batch(index % count, sender[:, 0], sender[:, 1])
        if progress is not None:
            progress(min(start + rows, total), total)


def _sender(c: Comparison, batch: _Batch, run: Rows, where: Tensor) -> Edit:
    """Put the corrupted output of each row's head in place."""
    inside = run.at(where)

    def edit(layer: int, z: Tensor) -> Tensor:
        mine = batch.layer == layer
        if not bool(mine.any()):
            return z
        chosen = mine[:, None] & (torch.arange(z.shape[1], device=z.device) == batch.head[:, None])
        return torch.where(chosen[:, :, None, None] & inside[:, None, :, None], run.take(c.corrupt.z[layer]), z)

    return edit


def _clean_mlp(c: Comparison, run: Rows) -> Edit:
    return lambda layer, value: c.clean.mlp[layer][run.prompt[:, None], run.position]


def _keep(seen: dict[tuple[str, int], Tensor], name: str) -> Edit:
    def edit(layer: int, value: Tensor) -> Tensor:
        seen[name, layer] = value
        return value

    return edit


def _receive(
    c: Comparison, receivers: Receivers, seen: Mapping[tuple[str, int], Tensor], name: str, first: Rows, run: Rows
) -> Edit:
    """Give the receivers what they would have received."""

    def edit(layer: int, value: Tensor) -> Tensor:
        group = c.clean.heads[layer] // value.shape[1]
        chosen = [head // group for at, head in receivers.heads if at == layer]
        if not chosen or (name, layer) not in seen:  # below the first sender of the batch: what it receives is clean
            return value
        out = value.clone()
        for j in range(first.position.shape[1]):
            here = run.position == first.position[:, j : j + 1]  # (R, T)
            out = torch.where(here[:, None, :, None], seen[name, layer][:, :, j : j + 1], out)
        keep = torch.zeros(value.shape[1], dtype=torch.bool, device=value.device)
        keep[chosen] = True
        return torch.where(keep[None, :, None, None], out, value)

    return edit


def _span(c: Comparison, where: Tensor) -> int:
    """Tokens from the first patched position of any prompt to its end."""
    end = c.pairs.place(END)
    return int((end - where.clamp(max=end).min(-1, keepdim=True).values).max()) + 1


def _suffix(c: Comparison, prompt: Tensor, width: int) -> Rows:
    """The last ``width`` positions of each prompt; shorter prompts compute their first position more than once."""
    steps = torch.arange(1 - width, 1, device=prompt.device)
    return Rows(prompt, (c.pairs.place(END)[prompt] + steps).clamp(min=0))


def _checked(c: Comparison, heads: Sequence[Head] | None) -> list[Head]:
    known = set(c.heads)
    for head in heads or ():
        if tuple(head) not in known:
            counts = sorted(set(c.clean.heads))
            raise ConfigError(
                f"there is no head {head}; expected (layer, head) with layer < {len(c.clean.z)} and head < {counts}."
            )
    return c.heads if heads is None else [(int(a), int(b)) for a, b in heads]


def _empty(c: Comparison, fill: float = torch.nan) -> Tensor:
    out = torch.full((len(c.clean.z), max(c.clean.heads), len(c.pairs)), torch.nan, dtype=torch.float64)
    for layer, count in enumerate(c.clean.heads):
        out[layer, :count] = fill
    return out


def _effects(method: str, at: str, receiver: str, change: Tensor, c: Comparison) -> HeadEffects:
    return HeadEffects(
        method, at, receiver, change, c.clean_difference.double().cpu(), c.corrupt_difference.double().cpu()
    )
