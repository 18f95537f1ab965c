"""Training of the small vision-language model, on a tiny one: packing, cached features, resuming, adapters, scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveal.core.errors import ConfigError, DataError
from foveal.data.scenes import Question, render
from foveal.models.vlm import VLM, Reader, Words, tiny_vlm
from foveal.recipes.lora import LoRALinear, add_lora, fold_lora
from foveal.recipes.vlm import (
    PIXELS,
    VLMOptions,
    cached_features,
    packed,
    packed_loss,
    scene_examples,
    score_vlm,
    stamp_examples,
    train_vlm,
)


def tiny() -> tuple[VLM, Reader]:
    """A tiny model whose words are all that scenes and stamps say."""
    _, examples = scene_examples(60, 0)
    texts = [t for e in examples for q in e.asked for t in (q.text, q.answer)]
    words = Words([w for t in texts for w in t.split()] + ["what", "is", "this", "?", "A", "drum", "."])
    model, reader = tiny_vlm(words, side=24, dim=24, layers=2, heads=2)
    return model.eval(), reader


OPTIONS = VLMOptions(steps=6, batch=2, scenes=10, turns=3, lr=3e-3)
ASKED = [
    Question("is there a red cross ?", "yes", "presence"),
    Question("how many cross shapes are there ?", "two", "count"),
]


def test_packed_questions_are_trained_as_if_alone() -> None:
    model, reader = tiny()
    picture = render(scene_examples(1, 3)[0][0], PIXELS)
    features = model.features(reader.pixels([picture]))
    together = packed_loss(model, packed(reader, [ASKED], [2]), features)
    losses, tokens = 0.0, 0
    for q in ASKED:
        batch = packed(reader, [[q]], [2])
        inputs = reader.prepare([picture], q.text)
        ids = torch.tensor([[*reader.encode(q.answer), 2]])
        plain = model(torch.cat([inputs["input_ids"], ids], 1), pixel_values=inputs["pixel_values"]).logits
        wanted = torch.nn.functional.cross_entropy(plain[0, -ids.shape[1] - 1 : -1], ids[0])
        assert torch.allclose(packed_loss(model, batch, features), wanted, atol=1e-5), "plain causal attention"
        losses, tokens = losses + float(wanted.detach()) * ids.shape[1], tokens + ids.shape[1]
    assert float(together.detach()) == pytest.approx(losses / tokens, abs=1e-5)


def test_questions_do_not_see_each_other_and_rows_may_differ_in_length() -> None:
    model, reader = tiny()
    scenes, _ = scene_examples(2, 3)
    features = model.features(reader.pixels([render(s, PIXELS) for s in scenes]))
    batch = packed(reader, [ASKED, ASKED[:1]], [2])
    both = packed_loss(model, batch, features)
    parts = [
        packed_loss(model, packed(reader, [asked], [2]), features[i : i + 1])
        for i, asked in enumerate((ASKED, ASKED[:1]))
    ]
    assert both.item() == pytest.approx((4 * parts[0].item() + 2 * parts[1].item()) / 6, abs=1e-5)
    head, first = 1 + reader.tokens, 1 + reader.tokens + 6 + 2
    assert not bool(batch["mask"][0, 0, first:, head:first].any()) and bool(batch["mask"][0, 0, first:, :head].all())
    assert int(batch["positions"][0, first]) == head, "each question counts from the picture"


def test_training_learns_resumes_and_records(tmp_path: Path) -> None:
    model, reader = tiny()
    record = train_vlm(model, reader, OPTIONS, tmp_path / "a", every=2)
    assert record["pictures"] == 10 and record["last_loss"] < record["first_loss"]

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, of: int, loss: float) -> None:
        if stage == "training" and done == 4:
            raise Stop

    again, _ = tiny()
    with pytest.raises(Stop):
        train_vlm(again, reader, OPTIONS, tmp_path / "b", every=2, progress=stop)
    fresh, _ = tiny()
    seen: list[tuple[str, int]] = []
    assert (
        train_vlm(fresh, reader, OPTIONS, tmp_path / "b", every=2, progress=lambda s, d, n, x: seen.append((s, d)))
        == record
    )
    assert seen == [("training", 3), ("training", 4), ("training", 5), ("training", 6)], (
        "features and two steps were kept"
    )
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    with pytest.raises(ConfigError, match="was made with"):
        train_vlm(fresh, reader, VLMOptions(steps=7, batch=2, scenes=10, turns=3, lr=3e-3), tmp_path / "b")
    with pytest.raises(ConfigError, match="was made with"):
        train_vlm(fresh, reader, replace(OPTIONS, init="another start"), tmp_path / "b")


def test_features_are_those_of_the_pictures(tmp_path: Path) -> None:
    model, reader = tiny()
    pictures = [render(s, 24) for s in scene_examples(5, 1)[0]]
    got = cached_features(model, reader, pictures, tmp_path / "f", {"n": 5}, chunk=2)
    wanted = model.features(reader.pixels(pictures)).half()
    assert torch.allclose(got.float(), wanted.float(), atol=2e-3)
    assert torch.equal(cached_features(model, reader, [None] * 5, tmp_path / "f", {"n": 5}), got), "not made again"


def test_stamps(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image", reason="needs the package pillow")
    (tmp_path / "music").mkdir()
    pil.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(tmp_path / "music" / "drum.png")
    (tmp_path / "music" / "drum.txt").write_text("A drum .\nde.utf8=Eine Trommel.\n")
    pil.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(tmp_path / "music" / "silent.png")
    files, examples = stamp_examples(tmp_path, 7)
    assert (
        [f.name for f in files] == ["drum.png"]
        and examples[0].picture == 7
        and examples[0].asked[0].answer == "A drum ."
    )
    model, reader = tiny()
    options = VLMOptions(steps=1, batch=2, scenes=2, stamps=str(tmp_path))
    assert train_vlm(model, reader, options, tmp_path / "work")["pictures"] == 3
    with pytest.raises(DataError, match="holds no pictures"):
        stamp_examples(tmp_path / "work", 0)


def test_scores() -> None:
    model, reader = tiny()
    found = score_vlm(model, reader, count=3)
    assert 0 <= found["accuracy"]["all"] <= 1 and found["questions"] >= 6


def test_adapters_change_nothing_at_first_and_fold_exactly() -> None:
    model, reader = tiny()
    inputs: dict[str, Any] = reader.prepare([render(scene_examples(1, 0)[0][0], 24)], "is there a red cross ?")
    with torch.no_grad():
        plain = model(**inputs).logits
        assert add_lora(model.decoder, ["q_proj", "v_proj"], rank=3) == 4
        assert torch.equal(model(**inputs).logits, plain)
        for m in model.modules():
            if isinstance(m, LoRALinear):
                m.up.normal_(std=0.3)
        adapted = model(**inputs).logits
        assert not torch.allclose(adapted, plain)
        assert fold_lora(model) == 4 and not any(isinstance(m, LoRALinear) for m in model.modules())
        assert torch.allclose(model(**inputs).logits, adapted, atol=1e-5)
    with pytest.raises(ConfigError, match="is called 'query'"):
        add_lora(model, ["query"])
    with pytest.raises(ConfigError, match="rank is 0"):
        add_lora(model, ["q_proj"], rank=0)
    with pytest.raises(ConfigError, match="turns is 0"):
        VLMOptions(turns=0)
