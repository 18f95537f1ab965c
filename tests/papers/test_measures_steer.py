"""The measures of VAR, VHR and CARVE at a size at which they take seconds: they run, write, and see what is planted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveal.core.cache import cache_dir
from foveal.data.scenes import Scene, Thing
from foveal.papers.measures import carve, small_vlm, toy_vlm, var, vhr

pytest.importorskip("scipy", reason="needs the package scipy")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    monkeypatch.setattr(toy_vlm, "BATCH", 4)


def test_exact_claims_hold(tmp_path: Path) -> None:
    for found in (
        var.measure_inverse(rows=30, out=tmp_path), vhr.measure_proposition(6000, out=tmp_path),
        carve.measure_decomposition(10, out=tmp_path), carve.measure_cost(out=tmp_path),
    ):  # fmt: skip
        assert found["verdict"] == "reproduced", found["measured"]
        assert (tmp_path / found["paper"] / f"{found['claim']}.json").is_file()


def test_trained_measures_run(tmp_path: Path) -> None:
    planted = var.measure_planted(2, count=6, out=tmp_path)["measured"]
    assert (
        set(planted["by_share"]) == {"0.5", "0.7", "0.9"} and planted["largest_phi"] <= planted["largest_possible_phi"]
    )
    idle = var.measure_idle(2, count=6, out=tmp_path)["measured"]
    assert set(idle["drop"]) == {"sinks", "random"}
    prior = vhr.measure_prior(2, 2, count=3, out=tmp_path)["measured"]
    assert set(prior["by_alpha"]) == {"0.5", "1", "1.5", "2", "3"}
    assert "auroc_unmatched" in vhr.measure_score(2, 2, count=3, out=tmp_path)["measured"]
    beside = carve.measure_beside_raw(2, count=4, out=tmp_path)["measured"]
    assert set(beside["accuracy"]) == {"base", *carve.FORMS, "oracle", "oracle black"}
    assert (cache_dir() / "measures" / "toy_vlm-0-2.safetensors").is_file()


def test_planted_prior_is_in_the_captions_and_not_in_the_pictures() -> None:
    g = torch.Generator().manual_seed(0)
    for i in range(60):
        s = vhr.tempting(g, i % 2 == 0)
        names = [t.name for t in s.things]
        assert names.count("red circle") == 1 and ("blue square" in names) == (i % 2 == 0)
        assert len({(t.row, t.column) for t in s.things}) == len(s.things) == 3 + (i % 2 == 0)
        assert vhr.biased_caption(s).endswith("a blue square")
    plain = Scene((Thing("cross", "green", 0, 0),))
    assert vhr.biased_caption(plain) == plain.caption()


def test_scores() -> None:
    assert vhr.auroc([2.0, 3.0], [1.0, 2.0]) == 0.875 and vhr.auroc([], [1.0]) is None
    assert carve.spearman([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 9.0, 10.0], 0, 50)["rho"] == 1.0


def test_planted_sinks_take_what_they_say() -> None:
    """A tiny model: with every share of the content on the sinks, knocking them out leaves text alone."""
    from foveal.steer import Knockout, apply
    from foveal.steer.planted import PlantedSinks

    model, reader = toy_vlm.tiny_vlm(toy_vlm.WORDS)
    model.eval()
    inputs = toy_vlm.requests(reader, [(s, q.text) for s, q in toy_vlm.held_out(3, 0)])
    image = inputs["input_ids"] == toy_vlm.WORDS.IMAGE
    sinks = torch.zeros_like(image)
    sinks[:, 5:8] = True
    with torch.no_grad():
        with apply(model, [PlantedSinks(sinks, 1.0, 0.0), Knockout(sinks, spare=image)]):
            first = model(**inputs).logits[:, -1]
        with apply(model, Knockout(image, spare=image)):
            second = model(**inputs).logits[:, -1]
    assert torch.allclose(first, second, atol=1e-5)


def test_background_tokens_show_background() -> None:
    s = Scene((Thing("square", "black", 0, 0, 1.0),))
    plain = toy_vlm.background_tokens(s)
    assert plain.shape == (36,) and plain.view(6, 6)[:2, :2].sum() == 0 and plain.sum() == 32
    chosen = toy_vlm.some(plain[None], 3, torch.Generator().manual_seed(0))
    assert chosen.sum() == 3 and bool(plain[chosen[0]].all())


def test_the_small_models_measures_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny untrained model in its place: before and after are counted on the same questions."""
    from foveal.models.vlm import Words, tiny_vlm
    from foveal.recipes.vlm import scene_examples

    _, examples = scene_examples(60, 0)
    texts = [t for e in examples for q in e.asked for t in (q.text, q.answer)]
    model, reader = tiny_vlm(Words([w for t in texts for w in t.split()]), side=24, dim=24, layers=6, heads=2)
    model.eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[Words.BOS, 5] = 40.0
    monkeypatch.setattr(small_vlm, "PIXELS", 48)
    monkeypatch.setattr(small_vlm, "model_and_reader", lambda: (model, reader))
    steered = small_vlm.measure_var(count=3, out=tmp_path)["measured"]
    assert (
        steered["sink_dims"][0] == 5 and set(steered["before"]) == set(steered["after"]) and steered["questions"] >= 2
    )
    assert set(small_vlm.measure_vhr(count=3, out=tmp_path)["measured"]["by_alpha"]) == {"1", "2", "3"}
    assert set(small_vlm.measure_carve(count=3, out=tmp_path)["measured"]["accuracy"]) == {
        "base",
        "contrast",
        "raw",
        "oracle",
    }
    assert small_vlm.verdict_of([False] * 9, [True] * 9)[0] == "reproduced"
    assert small_vlm.verdict_of([False, True], [True, True])[0] == "direction holds"
    assert small_vlm.verdict_of([True], [True])[0] == "not reproduced"
