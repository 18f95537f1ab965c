"""Train the small vision-language model: pictures are encoded once, then projector and adapters learn to answer about them.

All questions about a picture stand behind it in one sequence; each sees the picture and itself alone and counts its positions
from the picture, so training is exactly that of single questions at a fraction of the cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ..core.errors import ConfigError, DataError
from ..data.scenes import Question, hallucinated, questions, render, scene
from ..models.vlm import VLM, Reader
from .fit import fit

DESCRIBE, NAME_IT = "what is in the picture ?", "what is this ?"
PIXELS = 224
"""Side at which scenes are rendered, before the reader resizes them."""

Progress = Callable[[str, int, int, float], None]
"""Called with (stage, done, of, loss)."""


@dataclass(frozen=True)
class VLMOptions:
    """What is trained on what.

    Attributes:
        steps, batch: optimiser steps of so many pictures. lr: highest learning rate. seed: of scenes, order and weights.
        scenes: rendered scenes; a fifth has a printed word. most, clutter: shapes and meaningless lines in one, at most.
        turns: questions per picture and step, the description included.
        stamps: folder of Tux Paint's stamps (pictures ``X.png`` with captions ``X.txt``), or None.
        init: SHA-256 of the adapter that the model starts from, or None: a checkpoint of another start is refused.
    """

    steps: int = 600
    batch: int = 4
    lr: float = 1e-3
    seed: int = 0
    scenes: int = 1500
    most: int = 5
    clutter: int = 6
    turns: int = 5
    stamps: str | None = None
    init: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "scenes", "turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")


@dataclass(frozen=True)
class Example:
    """A picture's number among the features, and what can be asked about it."""

    picture: int
    asked: tuple[Question, ...]


def scene_examples(count: int, seed: int, *, most: int = 5, clutter: int = 6) -> tuple[list[Any], list[Example]]:
    """Scenes and the questions about them, the description first."""
    g = torch.Generator().manual_seed(seed)
    scenes, examples = [], []
    for i in range(count):
        word = i % 5 == 4
        lines = int(torch.randint(clutter + 1, (1,), generator=g)) if clutter else 0
        s = scene(g, 1 + int(torch.randint(most, (1,), generator=g)), clutter=lines, word=word)
        scenes.append(s)
        examples.append(Example(i, (Question(DESCRIBE, s.caption(), "caption"), *questions(s, g))))
    return scenes, examples


def stamp_examples(folder: Path, first: int) -> tuple[list[Path], list[Example]]:
    """Tux Paint's stamps: pictures, and the question what they show, answered by the English line of the caption file.

    Raises:
        DataError: the folder holds no such pairs.
    """
    pictures: list[Path] = []
    examples: list[Example] = []
    for png in sorted(folder.rglob("*.png")):
        text = png.with_suffix(".txt")
        if not text.is_file():
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = lines[0].strip() if lines else ""
        if caption:
            examples.append(Example(first + len(pictures), (Question(NAME_IT, caption, "stamp"),)))
            pictures.append(png)
    if not pictures:
        raise DataError(
            f"stamps: {folder.name} holds no pictures X.png with captions X.txt; expected the folder of Debian's "
            "tuxpaint-stamps-default, usr/share/tuxpaint/stamps."
        )
    return pictures, examples


@torch.no_grad()
def cached_features(
    model: VLM, reader: Reader, pictures: Sequence[Any], file: Path, told: dict[str, Any], progress: Progress | None = None, chunk: int = 16
) -> Tensor:  # fmt: skip
    """Features ``(n, tokens, width)`` in half precision, from the file where it was made of the same pictures; resumes in chunks.

    Args:
        pictures: arrays, Pillow images, or functions that make one. told: what the pictures are, as JSON values.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    parts: list[Tensor] = []
    for start in range(0, len(pictures), 128):
        own = file.with_name(f"{file.stem}-{key}-{start}.safetensors")
        if own.is_file():
            with safe_open(str(own), framework="pt") as kept:
                parts.append(kept.get_tensor("features"))
        else:
            found = []
            for at in range(start, min(start + 128, len(pictures)), chunk):
                some = [p() if callable(p) else p for p in pictures[at : min(at + chunk, start + 128)]]
                found.append(model.features(reader.pixels(some)).half())
                if progress is not None:
                    progress("pictures", min(at + chunk, len(pictures)), len(pictures), 0.0)
            own.parent.mkdir(parents=True, exist_ok=True)
            part = own.with_name(own.name + ".part")
            save_file({"features": torch.cat(found)}, part)
            part.replace(own)
            parts.append(torch.cat(found))
    return torch.cat(parts)


def packed(reader: Reader, asked: Sequence[Sequence[Question]], end: Sequence[int]) -> dict[str, Tensor]:
    """Pictures with their questions as one batch.

    Args:
        asked: the questions of each picture. end: tokens that close an answer.

    Returns:
        ``ids``, ``positions`` ``(B, N)``; ``scored (B, N)`` bool on answers and their end; ``mask (B, 1, N, N)`` bool: a token
        sees the picture and, causally, its own question.
    """
    head = [*reader.encode(reader.before), *[reader.image_token_id] * reader.tokens]
    rows = []
    for some in asked:
        ids, turn, position, scored = list(head), [0] * len(head), list(range(len(head))), [False] * len(head)
        for number, q in enumerate(some, 1):
            question = list(reader.encode(reader.after.replace("{question}", q.text)))
            answer = [*reader.encode(" " + q.answer), *end]
            ids += question + answer
            turn += [number] * (len(question) + len(answer))
            position += range(len(head), len(head) + len(question) + len(answer))
            scored += [False] * len(question) + [True] * len(answer)
        rows.append((ids, turn, position, scored))
    longest = max(len(ids) for ids, *_ in rows)

    def table(column: int, fill: int) -> Tensor:
        return torch.tensor([list(row[column]) + [fill] * (longest - len(row[0])) for row in rows])

    own = table(1, -1)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    sees = causal & ((own[:, None, :] == 0) | (own[:, None, :] == own[:, :, None]))
    return {"ids": table(0, end[-1]), "positions": table(2, 0), "scored": table(3, 0).bool(), "mask": sees[:, None]}


def packed_loss(model: VLM, batch: dict[str, Tensor], features: Tensor) -> Tensor:
    """Mean loss of the scored tokens; logits are made for these alone."""
    decoder: Any = model.decoder
    embeds = model._placed(batch["ids"], model.get_input_embeddings()(batch["ids"]), model.projector(features.float()))
    mask = torch.where(batch["mask"], 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)
    hidden = decoder.model(inputs_embeds=embeds, attention_mask=mask, position_ids=batch["positions"], use_cache=False)[
        0
    ]
    wanted = batch["scored"][:, 1:]
    logits = decoder.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits, batch["ids"][:, 1:][wanted])


def train_vlm(
    model: VLM, reader: Reader, options: VLMOptions, work: Path, *, every: int = 20, progress: Progress | None = None
) -> dict[str, Any]:  # fmt: skip
    """Train in place; features and checkpoints are kept in ``work``, and the same call goes on where it stopped.

    Args:
        model, reader: of :func:`foveal.models.small_vlm.small_vlm`, or a tiny one. work: folder. every: steps between checkpoints.

    Returns:
        The training record, JSON values.
    """
    scenes, examples = scene_examples(options.scenes, options.seed, most=options.most, clutter=options.clutter)
    pictures: list[Any] = [_drawer(s) for s in scenes]
    if options.stamps is not None:
        files, more = stamp_examples(Path(options.stamps), len(pictures))
        pictures += [_opener(f) for f in files]
        examples += more
    told = {"scenes": [options.scenes, options.seed, options.most, options.clutter], "stamps": options.stamps is not None, "n": len(pictures), "side": reader.side, "form": 1}  # fmt: skip
    features = cached_features(model, reader, pictures, work / "features", told, progress)
    end = [int(t) for t in reader.encode("\n")] if "\n" in reader.after else [_end_of(model)]

    def loss_of(step: int, g: Generator) -> Tensor:
        chosen = [examples[i] for i in torch.randint(len(examples), (options.batch,), generator=g).tolist()]
        asked = [_some(e.asked, options.turns, g) for e in chosen]
        return packed_loss(model, packed(reader, asked, end), features[[e.picture for e in chosen]])

    setting = asdict(options) | {"stamps": options.stamps is not None}
    report = None if progress is None else lambda step, steps, loss: progress("training", step, steps, loss)
    losses = fit(
        model, loss_of, options.steps, lr=options.lr, warmup=min(50, options.steps // 10 + 1), seed=options.seed, every=every,
        checkpoint=work / "checkpoint.safetensors", told={"vlm": setting}, progress=report,
    )  # fmt: skip
    tail = losses[-max(1, len(losses) // 10) :]
    return setting | {
        "pictures": len(pictures),
        "first_loss": round(losses[0], 4),
        "last_loss": round(sum(tail) / len(tail), 4),
    }


@torch.no_grad()
def answers(
    model: VLM, reader: Reader, pictures: Sequence[Any], asked: Sequence[str], *, max_new_tokens: int = 8
) -> list[str]:
    """Greedy answers, one request at a time."""
    whole: Any = model
    out = []
    for picture, question in zip(pictures, asked, strict=True):
        inputs = reader.prepare([picture], question)
        ids = whole.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        out.append(reader.decode(ids[0, inputs["input_ids"].shape[1] :]))
    return out


def score_vlm(
    model: VLM, reader: Reader, *, count: int = 60, seed: int = 10_000, progress: Progress | None = None
) -> dict[str, Any]:
    """Accuracy by kind of question and by number of shapes on scenes that training did not see, and hallucinated objects in descriptions."""
    scenes, examples = scene_examples(count, 7_000_003 + seed)
    by: dict[str, list[bool]] = {}
    said: list[tuple[str, Any]] = []
    for i, (s, e) in enumerate(zip(scenes, examples, strict=True)):
        picture = render(s, PIXELS)
        said.append((answers(model, reader, [picture], [DESCRIBE], max_new_tokens=48)[0], s))
        for q in e.asked[1:4]:
            right = answers(model, reader, [picture], [q.text])[0] == q.answer
            for key in (q.kind, f"{len(s.things)} shapes", "all"):
                by.setdefault(key, []).append(right)
        if progress is not None:
            progress("scoring", i + 1, count, 0.0)
    return {
        "accuracy": {k: round(sum(v) / len(v), 4) for k, v in sorted(by.items())},
        "questions": len(by["all"]),
    } | {k: round(v, 4) for k, v in hallucinated(said).items()}


def _some(asked: Sequence[Question], count: int, g: Generator) -> list[Question]:
    """The first one, which describes the picture, and random others."""
    rest = torch.randperm(len(asked) - 1, generator=g)[: count - 1].tolist()
    return [asked[0], *(asked[1 + i] for i in rest)]


def _drawer(s: Any) -> Callable[[], NDArray[np.uint8]]:
    return lambda: render(s, PIXELS)


def _opener(file: Path) -> Callable[[], NDArray[np.uint8]]:
    def opened() -> NDArray[np.uint8]:
        from PIL import Image

        with Image.open(file) as image:
            rgba = image.convert("RGBA")
            rgba.thumbnail((512, 512))
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))

    return opened


def _end_of(model: VLM) -> int:
    end: Any = model.generation_config.eos_token_id
    return int(end[0] if isinstance(end, list) else end)
