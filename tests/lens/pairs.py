"""Random prompt pairs for tiny models: the corruption changes one token, prompts end at different positions."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.data.pairs import PromptPairs

VOCAB = 61


def toy_pairs(batch: int = 3, length: int = 12, seed: int = 0) -> PromptPairs:
    """Places ``s1`` (1), ``s2`` (4 to 6, where the sides differ), ``both`` (s2 and end), ``end`` (last or last but one)."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.randint(10, VOCAB, (batch, length), generator=g)
    s2 = torch.randint(4, 7, (batch, 1), generator=g)
    end = torch.tensor([[length - 1 - i % 2] for i in range(batch)])
    corrupt = clean.scatter(1, s2, 10 + (clean.gather(1, s2) - 3) % (VOCAB - 10))
    correct, foil = torch.randint(10, VOCAB, (2, batch), generator=g)
    places: dict[str, Tensor] = {"s1": torch.ones_like(s2), "s2": s2, "both": torch.cat([s2, end], 1), "end": end}
    choices = torch.stack([correct, (correct + 1) % VOCAB, (correct + 2) % VOCAB], 1)
    return PromptPairs("toy", clean, corrupt, correct, foil, places, choices, {})
