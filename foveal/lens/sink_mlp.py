"""Which MLP makes a sink, and what happens when it may not (arXiv 2512.22213): stages, directions, clamps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..core.errors import ConfigError, ShapeError
from .stream import decoder_blocks, gated_mlp, on_outputs

STAGES = ("x", "gate", "silu", "up", "e", "y")
EFFECTIVE = 0.98


def mlp_stages(mlp: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The intermediates of a gated MLP: ``gate = W_g x``, ``silu`` its activation, ``up = W_u x``, ``e = silu·up``, ``y = W_d e``."""
    gate_proj, up_proj, down_proj, act_fn = (getattr(mlp, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    gate, up = gate_proj(x), up_proj(x)
    silu = act_fn(gate)
    e = silu * up
    return {"x": x, "gate": gate, "silu": silu, "up": up, "e": e, "y": down_proj(e)}


@torch.no_grad()
def mlp_inputs(model: nn.Module, ids: Tensor, layer: int) -> tuple[nn.Module, Tensor]:
    """A block's gated MLP, and what enters it in one forward pass: ``(B, N, D)``.

    Raises:
        ConfigError: no such layer. UnsupportedError: no gated MLP there.
    """
    mlp = gated_mlp(_block(model, layer), layer)
    found: list[Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    try:
        getattr(model, "base_model", model)(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return mlp, found[0]


def _block(model: nn.Module, layer: int) -> nn.Module:
    blocks = decoder_blocks(model)
    if not 0 <= layer < len(blocks):
        raise ConfigError(f"layer is {layer}; expected one of 0 to {len(blocks) - 1}.")
    return blocks[layer]


@dataclass(frozen=True, eq=False)
class Formation:
    """How the MLP of a block sees some tokens.

    Attributes:
        cosines: per stage ``(T,)`` float32 cosine to the primary's intermediate. norms: ``(T,)`` norm of what it writes.
        primary_norm: norm of what it writes at the primary.
    """

    cosines: dict[str, Tensor]
    norms: Tensor
    primary_norm: float


@torch.no_grad()
def formation(model: nn.Module, ids: Tensor, layer: int, tokens: Sequence[int], primary: int = 0) -> Formation:
    """Compare the MLP's intermediates at ``tokens`` of one text ``(1, N)`` with those at the primary.

    The paper's claim: at a sink's birth layer the output ``y`` aligns with the primary's, the input ``x`` does not.

    Raises:
        ConfigError: a position or layer that is not there. UnsupportedError: no gated MLP.
    """
    outside = [t for t in (*tokens, primary) if not 0 <= t < ids.shape[1]]
    if outside:
        raise ConfigError(f"tokens asks for position {outside[0]}, but the text has {ids.shape[1]} tokens.")
    mlp, x = mlp_inputs(model, ids, layer)
    stages = {name: value[0].float() for name, value in mlp_stages(mlp, x).items()}
    index = torch.tensor(list(tokens))
    cosines = {name: cosine_similarity(stages[name][index], stages[name][primary][None], dim=-1) for name in STAGES}
    return Formation(cosines, stages["y"][index].norm(dim=-1), float(stages["y"][primary].norm()))


@dataclass(frozen=True, eq=False)
class Directions:
    """What the MLP makes of principal components of its inputs.

    Attributes:
        components: ``(P, D)`` unit vectors, by falling variance. variance: ``(P,)`` share of each.
        scales: ``(S,)``. norms, cosines: ``(P, S)`` of ``MLP(scale·component)``, the cosine to the primary's output.
    """

    components: Tensor
    variance: Tensor
    scales: Tensor
    norms: Tensor
    cosines: Tensor

    def effective(self, threshold: float = EFFECTIVE) -> list[tuple[int, int]]:
        """Components, counted from 0, and signs whose output at some scale of that sign lies along the primary."""
        out = []
        for sign in (1, -1):
            side = (self.scales * sign) > 0
            best = self.cosines[:, side].abs().amax(-1) if bool(side.any()) else torch.zeros(len(self.components))
            out += [(p, sign) for p in (best > threshold).nonzero().flatten().tolist()]
        return sorted(out)


@torch.no_grad()
def probe_directions(
    mlp: nn.Module, sinks: Tensor, others: Tensor, primary_output: Tensor, *, scales: Sequence[float] = tuple(range(-20, 20)),
    components: int = 32,
) -> Directions:  # fmt: skip
    """PCA of MLP inputs of sinks and as many other tokens with the same ids, each component pushed through the MLP.

    Args:
        mlp: of the birth layer. sinks, others: ``(M, D)`` inputs. primary_output: ``(D,)`` what the MLP writes at the primary.

    Raises:
        ShapeError: not as many others as sinks, or fewer than one pair.
    """
    if sinks.shape != others.shape or sinks.dim() != 2 or not len(sinks):
        raise ShapeError(
            f"sinks has shape {tuple(sinks.shape)} and others {tuple(others.shape)}; expected (M, D) of both, M ≥ 1: for every sink one "
            "token with its id that is none."
        )
    both = torch.cat([sinks, others]).float()
    centred = both - both.mean(0)
    _, spread, basis = torch.linalg.svd(centred, full_matrices=False)
    keep = min(components, int((spread > 1e-6 * spread[0].clamp(min=1e-30)).sum()))
    basis = basis[:keep]
    at = torch.tensor([float(s) for s in scales])
    weight = next(mlp.parameters())
    y = mlp((at[None, :, None] * basis[:, None]).to(weight.device, weight.dtype)).float().cpu()
    share = spread.square() / spread.square().sum().clamp(min=1e-30)
    cosines = cosine_similarity(y, primary_output.float().cpu()[None, None], dim=-1)
    return Directions(basis, share[:keep], at, y.norm(dim=-1), cosines)


@contextmanager
def clamp_mlp(
    model: nn.Module, layer: int, primary_output: Tensor, *, norm: float | Tensor | None = 100.0, factor: float | None = None,
    threshold: float = EFFECTIVE, protect: Sequence[int] = (0, 1, 2),
) -> Iterator[list[Tensor]]:  # fmt: skip
    """While open, what a block's MLP writes along the primary is rescaled: the bare clamp of the paper.

    Args:
        primary_output: ``(D,)`` what this MLP wrote at a primary sink; tokens whose output has a cosine above ``threshold`` to it are
            flagged, those at ``protect`` never. One prefill at a time; positions count from its row 0.
        norm: flagged outputs get this norm (a number, or ``(B, N)``). factor: instead of ``norm``, multiply them.

    Yields:
        A list that collects ``(B, N)`` bool per forward: the flagged tokens, to prove that the clamp did something.

    Raises:
        ConfigError: no such layer, or neither or both of ``norm`` and ``factor``. UnsupportedError: no gated MLP.
    """
    if factor is not None:
        norm = None
    elif norm is None:
        raise ConfigError("clamp_mlp got neither norm nor factor; pass one of them.")
    mlp = gated_mlp(_block(model, layer), layer)
    flagged: list[Tensor] = []

    def change(_: int, y: Tensor) -> Tensor | None:
        along = cosine_similarity(y.float(), primary_output.float().to(y.device)[None, None], dim=-1) > threshold
        along[:, [p for p in protect if p < y.shape[1]]] = False
        flagged.append(along.cpu())
        if not bool(along.any()):
            return None
        if factor is not None:
            scale = torch.full(y.shape[:2], factor, device=y.device)
        else:
            scale = torch.as_tensor(norm, device=y.device) / y.float().norm(dim=-1).clamp(min=1e-30)
        return torch.where(along[..., None], (y.float() * scale[..., None]).to(y.dtype), y)

    with on_outputs([mlp], change):
        yield flagged
