"""MODA's cost claim: the verdict follows from the ratios."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import moda, moda_deficit, moda_training


@pytest.mark.parametrize(
    ("attention", "verdict"), [(2.0, "reproduced"), (1.5, "direction holds"), (0.8, "not reproduced")]
)
def test_the_verdict_follows_from_how_the_ratio_falls(monkeypatch, tmp_path, attention, verdict):
    def clock(jobs, repeats):
        assert set(jobs) == {f"{part} {n}" for part in ("aligner", "attention") for n in moda.LENGTHS}
        return {name: [float(name.split()[1]) ** (1.0 if "aligner" in name else attention)] * repeats for name in jobs}

    monkeypatch.setattr(moda, "interleaved", clock)
    assert moda.measure_overhead(out=tmp_path)["verdict"] == verdict


def test_the_result_has_its_provenance(monkeypatch, tmp_path):
    monkeypatch.setattr(moda, "LENGTHS", (16, 32, 64))
    result = moda.measure_overhead(repeats=1, out=tmp_path)
    claim = next(c for c in load_card("moda").claims if c.id == "linear-overhead")
    assert claim.measured_by == "foveal.papers.measures.moda:measure_overhead"
    assert json.loads((tmp_path / "moda" / "linear-overhead.json").read_text()) == result


def test_questions_about_scenes_have_the_answers_that_the_pictures_show():
    image, question, answer = moda_training.scenes(200, torch.Generator().manual_seed(0))
    presence = question[:, 0] == moda_training.IS_THERE
    assert 60 < int(presence.sum()) < 140
    for i in range(60):
        seen = {}
        for quadrant in range(4):
            top, left = 12 * (quadrant // 2), 12 * (quadrant % 2)
            part = image[i, :, top : top + 12, left : left + 12]
            strong = part.abs().amin(0) > 0.5
            if int(strong.sum()) < 10:
                continue
            colour = int((part[:, strong].mean(1) - moda_training.COLOURS).square().sum(1).argmin())
            seen[int(strong.sum())] = colour  # the shapes have different areas
        assert len(seen) == 3
        areas = {0: 64, 1: max(a for a in seen if a != 64), 2: min(seen)}
        true = seen[areas[int(question[i, 1]) - moda_training.FIRST_SHAPE]]
        if presence[i]:
            named = int(question[i, 2]) - moda_training.FIRST_COLOUR
            assert int(answer[i]) == (moda_training.YES if named == true else moda_training.NO)
        else:
            assert int(answer[i]) == moda_training.FIRST_COLOUR + true and int(question[i, 2]) == moda_training.NOTHING


def test_both_variants_start_from_the_same_function():
    image, question, _ = moda_training.scenes(4, torch.Generator().manual_seed(0))
    vanilla, aligned = (moda_training.Reader(v, 3)(image, question) for v in moda_training.VARIANTS)
    torch.testing.assert_close(aligned, vanilla)


def test_the_training_writes_its_result(monkeypatch, tmp_path):
    for name, value in (("STEPS", 2), ("BATCH", 4), ("HELD_OUT", 16), ("SEEDS", 2)):
        monkeypatch.setattr(moda_training, name, value)
    result = moda_training.measure_alignment(out=tmp_path)
    rows = result["measured"]["rows"]
    mean = {v: sum(r["loss"] for r in found) for v, found in rows.items()}
    assert result["verdict"] == ("reproduced" if mean["aligned"] <= mean["vanilla"] else "not reproduced")
    assert json.loads((tmp_path / "moda" / "alignment-lowers-loss.json").read_text()) == result


def test_the_queries_and_keys_read_are_those_that_attend():
    model = moda_training.Reader("aligned and masked", 0)
    image, question, _ = moda_training.scenes(3, torch.Generator().manual_seed(0))
    inner = []
    handles = [a.out.register_forward_pre_hook(lambda m, x: inner.append(x[0])) for a in model.attentions]
    for a in model.attentions:
        a.mask = "inf"
    found = moda_deficit.queries_and_keys(model, image, question)
    for handle in handles:
        handle.remove()
    q, k, _ = found[0]
    x = torch.zeros(1)

    def note(module, args):
        nonlocal x
        x = args[0]

    handle = model.attentions[0].qkv.register_forward_pre_hook(note)
    model(image, question)
    handle.remove()
    v = model.attentions[0].qkv(x)[..., -moda_training.DIM :].unflatten(-1, (moda_training.HEADS, -1)).transpose(1, 2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(inner[0], wanted.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)


def test_disparity_is_reported_for_every_variant(monkeypatch, tmp_path):
    monkeypatch.setattr(moda_training, "STEPS", 2)
    monkeypatch.setattr(moda_deficit, "HELD_OUT", 16)
    result = moda_deficit.measure_disparity(seeds=1, out=tmp_path)
    assert json.loads((tmp_path / "moda" / "disparity-falls.json").read_text()) == result
    claim = next(c for c in load_card("moda").claims if c.id == "disparity-falls")
    assert claim.measured_by == "foveal.papers.measures.moda_deficit:measure_disparity"
    for rows in result["measured"]["rows"].values():
        assert 0 <= rows[0]["disparity"] <= 1 and 0 < rows[0]["last_row_image_mass"] < 1 and rows[0]["gamma"] > 0
