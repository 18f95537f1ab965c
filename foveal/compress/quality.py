"""What an encoder's sentence vectors are worth: finding the neighbouring sentence, and agreeing with the original about likeness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.bootstrap import bootstrap
from ..core.ranks import spearman as rank_correlation
from ..hf.encoder import LoadedEncoder, Pooling

Batch = Mapping[str, Tensor]


def batches(encoder: LoadedEncoder, sentences: Sequence[str], size: int, tokens: int) -> list[dict[str, Tensor]]:
    """Padded batches, in order."""
    out = []
    for at in range(0, len(sentences), size):
        made = encoder.tokenizer(
            list(sentences[at : at + size]), padding=True, truncation=True, max_length=tokens, return_tensors="pt"
        )
        out.append({name: made[name] for name in ("input_ids", "attention_mask")})
    return out


def vectors(model: nn.Module, batch: Batch, pooling: Pooling) -> Tensor:
    """``(B, D)`` sentence vectors of length 1."""
    return pooled(model(**batch).last_hidden_state, batch["attention_mask"], pooling)


def pooled(hidden: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """``(B, D)`` vectors of length 1 out of token outputs ``(B, N, D)`` and their mask ``(B, N)``."""
    if pooling == "cls":
        return F.normalize(hidden[:, 0], dim=-1)
    weight = real[..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)


def distance(made: Tensor, wanted: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """Distillation loss between token outputs ``(B, N, D)``: one minus the cosine, of real tokens and of the sentence vectors."""
    tokens = (1 - F.cosine_similarity(made, wanted, dim=-1))[real.bool()].mean()
    return tokens + (1 - (pooled(made, real, pooling) * pooled(wanted, real, pooling)).sum(-1)).mean()


@torch.no_grad()
def embed(encoder: LoadedEncoder, model: nn.Module, sentences: Sequence[str], tokens: int, size: int = 32) -> Tensor:
    """``(S, D)`` vectors of all sentences in eval mode."""
    model.eval()
    return torch.cat([vectors(model, b, encoder.pooling) for b in batches(encoder, sentences, size, tokens)])


def reciprocal_ranks(first: Tensor, second: Tensor) -> Tensor:
    """``(P,)`` one over the rank of ``second[i]`` among all of ``second`` by cosine to ``first[i]``; equals share the mean rank."""
    likeness = first @ second.T
    own = likeness.diagonal()[:, None]
    better = (likeness > own).sum(1)
    equal = (likeness == own).sum(1)
    return 1.0 / (better + (equal + 1) / 2)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two ``(N,)`` tensors; equal values get their mean rank, and a constant has 0."""
    rho = rank_correlation(a, b)
    return 0.0 if math.isnan(rho) else rho


def likenesses(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of all first with all second sentences, ``(P²,)``."""
    return (first @ second.T).flatten()


def judge(first: Tensor, second: Tensor, original: tuple[Tensor, Tensor], seed: int) -> dict[str, Any]:
    """Figures of one encoder beside the original's vectors of the same sentences."""
    ranks, base = reciprocal_ranks(first, second), reciprocal_ranks(*original)
    found = (ranks == 1).double()
    return {
        "accuracy": round(float(found.mean()), 5),
        "accuracy_interval": bootstrap(found.tolist(), seed),
        "mrr": round(float(ranks.mean()), 5),
        "mrr_interval": bootstrap(ranks.tolist(), seed),
        "mrr_change_interval": bootstrap((ranks - base).tolist(), seed),
        "mrr_kept": round(float(ranks.mean() / base.mean()), 5),
        "accuracy_kept": round(float(found.mean() / (base == 1).double().mean().clamp(min=1e-9)), 5),
        "spearman": round(spearman(likenesses(first, second), likenesses(*original)), 5),
        "cosine": round(float(torch.cat([(first * original[0]).sum(-1), (second * original[1]).sum(-1)]).mean()), 5),
    }
