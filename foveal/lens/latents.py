"""Latent tokens: hidden states fed back as inputs, what can be done to them, and how alike they are (arXiv 2602.22766).

The state fed back is the last entry of the model's own ``hidden_states``, which in most decoders is taken after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError

Hook = Callable[[int, int, Tensor], Tensor]
"""``(instance, step, z (D,)) → z'``: do(Z) at one step of one instance."""


def seeded(seed: int, instance: int, step: int) -> torch.Generator:
    """A generator of one (instance, step), the same in every run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + instance) * 1_009 + step)


@dataclass(frozen=True, eq=False)
class Share:
    """One fixed vector for all steps and instances."""

    vector: Tensor

    def __call__(self, instance: int, step: int, z: Tensor) -> Tensor:
        return self.vector.to(z)


@dataclass(frozen=True, eq=False)
class AddNoise:
    """``z + N(0, σ²)``."""

    sigma: float
    seed: int = 0

    def __call__(self, instance: int, step: int, z: Tensor) -> Tensor:
        return z + self.sigma * torch.randn(z.shape, generator=seeded(self.seed, instance, step)).to(z)


@dataclass(frozen=True, eq=False)
class MatchedNoise:
    """``N(mean, std²)`` per dimension: destroys what is said and stays where latents live; see :func:`moments`."""

    mean: Tensor
    std: Tensor
    seed: int = 0

    def __call__(self, instance: int, step: int, z: Tensor) -> Tensor:
        noise = torch.randn(z.shape, generator=seeded(self.seed, instance, step))
        return (self.mean + self.std * noise.to(self.mean)).to(z)


@dataclass(frozen=True)
class Zero:
    """The zero vector; off the manifold, so that harm proves little."""

    def __call__(self, instance: int, step: int, z: Tensor) -> Tensor:
        return torch.zeros_like(z)


def moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per dimension ``(D,)`` of recorded ``(M, K, D)`` latents."""
    flat = latents.flatten(0, 1)
    return flat.mean(0), flat.std(0, correction=0)


@dataclass(eq=False)
class LatentRun:
    """What a batch of instances did.

    Attributes:
        tokens: per instance the sampled ids, latent steps left out. latents: per instance ``(k, D)`` vectors as fed, after the hook.
        original: the same before the hook.
    """

    tokens: list[list[int]]
    latents: list[Tensor]
    original: list[Tensor]

    @property
    def emission(self) -> float:
        """Share of instances that entered latent mode; a do(Z) says nothing about the others."""
        return sum(len(z) > 0 for z in self.latents) / max(len(self.latents), 1)

    @property
    def fired(self) -> float:
        """Share of latent steps that the hook changed."""
        pairs = [(a, b) for x, y in zip(self.original, self.latents, strict=True) for a, b in zip(x, y, strict=True)]
        return sum(not torch.equal(a, b) for a, b in pairs) / max(len(pairs), 1)


@dataclass(frozen=True, eq=False)
class LatentLoop:
    """Greedy decoding with latent steps, one mode per sequence.

    When a sequence samples ``start_id``, exactly ``max_latent`` steps feed ``phi(h)`` instead of a token, fewer if ``end_id`` would be
    sampled; then ``end_id`` is put down, where there is one.

    Attributes:
        model: a decoder that takes ``inputs_embeds``. start_id, end_id: control tokens. max_latent: K; 0 decodes as usual.
        hook: do(Z). phi: of the last hidden state ``(D,)``; default identity. stop: ids that end a sequence.
    """

    model: nn.Module
    start_id: int
    end_id: int | None
    max_latent: int
    hook: Hook | None = None
    phi: Callable[[Tensor], Tensor] | None = None
    stop: Sequence[int] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.max_latent < 0:
            raise ConfigError(f"max_latent is {self.max_latent}; expected 0 or more steps.")

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> LatentRun:
        """Decode ``count`` tokens after ``ids`` ``(B, N)``, prompts of equal length; latent steps are not counted.

        Raises:
            ShapeError: ids that are not ``(B, N)``.
        """
        if ids.dim() != 2:
            raise ShapeError(f"ids has shape {tuple(ids.shape)}; expected (B, N), prompts of equal length.")
        model: Any = self.model
        embed = model.get_input_embeddings()
        batch = ids.shape[0]
        run = LatentRun([[] for _ in range(batch)], [], [])
        fed: list[list[Tensor]] = [[] for _ in range(batch)]
        raw: list[list[Tensor]] = [[] for _ in range(batch)]
        left, done = [0] * batch, [False] * batch
        inside = [False] * batch
        out = model(inputs_embeds=embed(ids), use_cache=True, output_hidden_states=True)
        while not all(done):
            hidden, best = out.hidden_states[-1][:, -1], out.logits[:, -1].argmax(-1).tolist()
            entering = []
            for b in range(batch):
                if inside[b] and left[b] and best[b] != self.end_id:
                    z = hidden[b] if self.phi is None else self.phi(hidden[b])
                    new = z if self.hook is None else self.hook(b, len(fed[b]), z)
                    raw[b].append(z)
                    fed[b].append(new)
                    left[b] -= 1
                    entering.append(new.to(hidden))
                    continue
                token = self.end_id if inside[b] and self.end_id is not None else best[b]
                inside[b] = False
                if not done[b]:
                    run.tokens[b].append(token)
                    done[b] = token in self.stop or len(run.tokens[b]) >= count
                if token == self.start_id and self.max_latent and not done[b]:
                    inside[b], left[b] = True, self.max_latent
                entering.append(embed.weight[token])
            if all(done):
                break
            out = model(
                inputs_embeds=torch.stack(entering)[:, None],
                past_key_values=out.past_key_values,
                use_cache=True,
                output_hidden_states=True,
            )
        width = embed.weight.shape[1]
        run.latents, run.original = (
            [torch.stack(z) if z else embed.weight.new_zeros(0, width) for z in some] for some in (fed, raw)
        )
        return run


# --- how alike ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosines of ``(M, K, D)`` latents.

    Attributes:
        inter: ``(K,)`` mean over pairs of different instances, at the same step. within, across: the same over pairs of one group and
            of different ones, or None. intra: ``(K, K)`` mean over instances of the cosine between two steps.
        rank: mean effective rank of an instance's latents, from 1 (all alike) to K (orthogonal, of one length).
    """

    inter: Tensor
    within: Tensor | None
    across: Tensor | None
    intra: Tensor
    rank: float


def similarity(latents: Tensor, groups: Sequence[int] | None = None, *, centered: bool = False) -> Similarity:
    """How much latents differ between instances and between steps.

    Args:
        latents: ``(M, K, D)``. groups: task of each instance. centered: take the mean over everything away first, because a few huge
            dimensions bring every raw cosine near 1.

    Raises:
        ShapeError: fewer than two instances, or another shape.
    """
    if latents.dim() != 3 or latents.shape[0] < 2:
        raise ShapeError(f"latents has shape {tuple(latents.shape)}; expected (M, K, D) with M of 2 or more.")
    z = latents.double()
    z = z - z.mean((0, 1)) if centered else z
    unit = torch.nn.functional.normalize(z, dim=-1)
    count = z.shape[0]
    pairs = torch.einsum("akd,bkd->kab", unit, unit)
    different = ~torch.eye(count, dtype=torch.bool)
    same = None if groups is None else torch.tensor(groups)[:, None] == torch.tensor(groups)[None]

    def mean(keep: Tensor) -> Tensor:
        return (pairs * keep).sum((1, 2)) / keep.sum()

    within, across = (None, None) if same is None else (mean(same & different), mean(~same))
    intra = torch.einsum("akd,ajd->kj", unit, unit) / count
    rank = sum(effective_rank(one) for one in z) / count
    return Similarity(mean(different), within, across, intra, rank)


def effective_rank(vectors: Tensor) -> float:
    """``exp`` of the entropy of the normalised singular values of ``(K, D)``."""
    values = torch.linalg.svdvals(vectors.double())
    p = values / values.sum().clamp(min=1e-300)
    return float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum()))
