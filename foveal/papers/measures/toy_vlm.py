"""The tiny vision-language model on rendered shapes that VAR, VHR and CARVE are measured on; trained once per seed, resumable."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ...core.cache import cache_dir
from ...data.scenes import BACKGROUND, COLOURS, SHAPES, Question, Scene, Thing, questions, render, scene
from ...models.vlm import VLM, Reader, Words, tiny_vlm
from ...recipes.fit import fit

SIDE, PATCH, STEPS, BATCH, RATE = 48, 8, 2500, 32, 1e-3
KINDS = ("colour", "presence")
DESCRIBE = "what is there ?"
WORDS = Words([*SHAPES, *COLOURS, *["is", "there", "a", "what", "colour", "the", "?", "yes", "no", ","]])


def folder() -> Path:
    """Where half-trained and trained toys are kept."""
    return cache_dir() / "measures"


def batch_of(reader: Reader, asked: Sequence[tuple[Scene, str, str]]) -> dict[str, Tensor]:
    """Pictures, questions and answers as one batch padded on the right; ``scored`` marks the answers and their end token."""
    prompts = [reader.prompt(question) for _, question, _ in asked]
    answers = [[*WORDS.encode(answer), WORDS.EOS] for *_, answer in asked]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids, scored = torch.full((len(asked), longest), WORDS.PAD), torch.zeros(len(asked), longest, dtype=torch.bool)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(p) + len(a)] = torch.tensor([*p, *a])
        scored[row, len(p) : len(p) + len(a)] = True
    return {"ids": ids, "scored": scored, "pixels": reader.pixels([render(s, SIDE) for s, *_ in asked])}


def loss_on(model: VLM, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the answers' tokens."""
    logits = model(batch["ids"], pixel_values=batch["pixels"], use_cache=False).logits[:, :-1]
    wanted = batch["scored"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[wanted], batch["ids"][:, 1:][wanted])


def drawn(g: Generator, kinds: Sequence[str] = KINDS, *, most: int = 6, clutter: int = 4) -> tuple[Scene, Question]:
    """A scene of 2 to ``most`` things and one question of one of the kinds."""
    while True:
        s = scene(
            g,
            2 + int(torch.randint(most - 1, (1,), generator=g)),
            clutter=int(torch.randint(clutter + 1, (1,), generator=g)),
        )
        fitting = [q for q in questions(s, g) if q.kind in kinds]
        if fitting:
            return s, fitting[0]


@functools.cache
def trained(seed: int, steps: int = STEPS) -> tuple[VLM, Reader]:
    """The toy after ``steps`` steps on questions (three in four) and captions."""
    model, reader = tiny_vlm(WORDS, side=SIDE, patch=PATCH, seed=seed)

    def loss_of(step: int, g: Generator) -> Tensor:
        asked = []
        for row in range(BATCH):
            s, q = drawn(g)
            asked.append((s, DESCRIBE, s.caption()) if row % 4 == 0 else (s, q.text, q.answer))
        return loss_on(model, batch_of(reader, asked))

    with torch.random.fork_rng(devices=[]):
        file = folder() / f"toy_vlm-{seed}-{steps}.safetensors"
        fit(model, loss_of, steps, lr=RATE, seed=seed, checkpoint=file, told={"toy": 1})
    return model, reader


def held_out(count: int, seed: int, kinds: Sequence[str] = KINDS, **options: Any) -> list[tuple[Scene, Question]]:
    """Scenes and questions that training did not see."""
    g = torch.Generator().manual_seed(1_000_003 + seed)
    return [drawn(g, kinds, **options) for _ in range(count)]


def requests(reader: Reader, asked: Sequence[tuple[Scene, str]]) -> dict[str, Tensor]:
    """Prompts of one length as a batch; questions of both kinds have six words."""
    ids = torch.tensor([reader.prompt(question) for _, question in asked])
    return {"input_ids": ids, "pixel_values": reader.pixels([render(s, SIDE) for s, _ in asked])}


@torch.no_grad()
def right(model: VLM, inputs: dict[str, Tensor], answers: Sequence[str]) -> Tensor:
    """``(B,)`` bool: whether the likeliest next word is the answer."""
    best = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
    return best == torch.tensor([WORDS.ids[a] for a in answers])


def background_tokens(s: Scene) -> Tensor:
    """``(36,)`` bool: patches that show nothing but background."""
    picture: NDArray[np.uint8] = render(s, SIDE)
    plain = torch.from_numpy((picture == np.array(BACKGROUND)).all(-1))
    n = SIDE // PATCH
    return plain.view(n, PATCH, n, PATCH).all(3).all(1).flatten()


def marked(inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Flags ``(B, 36)`` over image tokens as flags ``(B, N)`` over the prompt."""
    out = inputs["input_ids"] == WORDS.IMAGE
    return out.masked_scatter(out, tokens)


def some(member: Tensor, count: int, g: Generator) -> Tensor:
    """``count`` random members of each row ``(B, n)``; fewer where there are fewer."""
    score = torch.rand(member.shape, generator=g).masked_fill(~member, -1.0)
    out = torch.zeros_like(member).scatter(1, score.topk(count, dim=1).indices, True)
    return out & member


def replaced(s: Scene, things: Sequence[Thing]) -> Scene:
    """The scene with other things, in raster order."""
    return Scene(tuple(sorted(things, key=lambda t: (t.row, t.column))), s.word, s.clutter)
