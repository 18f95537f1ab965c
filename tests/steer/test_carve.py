"""CARVE's closed form, masks and crops on given maps; the maps themselves; and the whole of it on tiny models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.data import scenes
from foveal.hf import AttentionEvent
from foveal.hf.picture_tokens import painted, token_grid, visible_part
from foveal.kernels.call import AttentionCall
from foveal.models.vlm import Words, tiny_vlm
from foveal.steer import carve
from foveal.steer.carve import score_map
from foveal.steer.contrast import best_lambda, contrast, default_layers, fuse, map_entropy, saved, shares
from foveal.steer.maps import capture, last_row
from foveal.steer.picture import (
    bounding_box,
    colour_complexity,
    refined_picture,
    regions,
    resized,
    texture_complexity,
    top_pixels,
)
from tests.steer.models import FAMILIES, IMAGE, build, prompt
from tests.support import Host, context, tensors

pytest.importorskip("scipy", reason="needs the package scipy")


def positive(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g, dtype=torch.float64) + 0.01


# --- arithmetic ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.floats(1e-3, 10))
def test_closed_form_is_the_minimiser(seed: int, lam: float) -> None:
    q, g = positive(seed, 9), positive(seed + 1, 9)
    x = contrast(q, g, lam).requires_grad_()

    def objective(a: torch.Tensor) -> torch.Tensor:
        return ((a * g - q) ** 2 + lam * a**2 * g).sum()

    (slope,) = torch.autograd.grad(objective(x), x)
    assert float(slope.abs().max()) < 1e-7
    hessian = torch.autograd.functional.hessian(objective, x.detach())
    assert torch.allclose(hessian, torch.diag(2 * g * (g + lam)))


def test_limits_of_the_regulariser() -> None:
    g, f = positive(1, 12), positive(2, 12)
    assert torch.allclose(contrast(g, g, 0.0), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(contrast(g * f, g, 1e-12), f, rtol=1e-9)
    assert torch.allclose(1e9 * contrast(g * f, g, 1e9), g * f, rtol=1e-7)


@given(st.floats(0.005, 0.5), st.floats(0.01, 0.5))
def test_best_lambda_is_stationary_and_twice_the_printed_one_for_small_noise(mean: float, relative: float) -> None:
    deviation = relative * mean

    def risk(lam: float) -> float:
        return lam**2 / (mean + lam) ** 2 + mean**2 * deviation**2 / (mean + lam) ** 4

    lam = best_lambda(mean, deviation)
    assert lam * (mean + lam) ** 2 == pytest.approx(2 * mean * deviation**2)
    assert risk(lam) <= min(risk(0.9 * lam), risk(1.1 * lam))
    assert best_lambda(0.02, 0.004) == pytest.approx(1.40e-3, abs=5e-6)
    assert best_lambda(0.02, 0.0002) == pytest.approx(2 * 0.0002**2 / 0.02, rel=1e-2)


def test_fusion() -> None:
    maps = positive(3, 4, 3, 10)
    assert torch.allclose(fuse(maps, "full"), sum((t + 1) * maps[t].sum(0) for t in range(4)))
    assert torch.allclose(fuse(maps, "start"), maps[0].sum(0)) and torch.allclose(fuse(maps, "end"), maps[3].sum(0))
    for mode in ("start", "end", "full"):
        assert torch.allclose(fuse(maps[:1], mode), maps[0].sum(0)), "one step is all three"
        assert torch.allclose(fuse(maps[:, [2, 0, 1]], mode), fuse(maps, mode)), "the order of layers does not matter"
        assert torch.allclose(fuse(2 * maps + maps.flip(-1), mode), 2 * fuse(maps, mode) + fuse(maps, mode).flip(-1))


def test_scores_pair_the_steps() -> None:
    q, g = positive(1, 5, 2, 9), positive(2, 3, 2, 9)
    last = contrast(shares(q)[-1], shares(g)[-1], 1 / 9).sum(0)
    assert torch.allclose(score_map(q, g), last), "each run's own last step"
    three = contrast(q[:3], g, 0.2)
    assert torch.allclose(score_map(q, g, lam=0.2, mode="full"), fuse(three, "full")), (
        "steps by number, up to the shorter run"
    )
    assert torch.allclose(score_map(q, g, raw=True), shares(q)[-1].sum(0))


def test_entropy_and_complexity() -> None:
    assert float(map_entropy(torch.ones(3, 17))[0]) == pytest.approx(math.log(17), abs=1e-6)
    assert float(map_entropy(torch.eye(5))[2]) == 0
    flat = np.full((40, 60, 3), 90, np.uint8)
    assert texture_complexity(flat) == 0 and colour_complexity(flat) == 0
    red = flat.copy()
    red[..., 0] = 200
    assert colour_complexity(red) == 0
    wheel = np.zeros((1, 180 * 4, 3), np.uint8)
    for i in range(180):
        part, sector = (i % 30) / 30 + 1 / 60, i // 30
        up, down = round(255 * part), round(255 * (1 - part))
        wheel[0, 4 * i : 4 * i + 4] = [
            (255, up, 0),
            (down, 255, 0),
            (0, 255, up),
            (0, down, 255),
            (up, 0, 255),
            (255, 0, down),
        ][sector]
    assert colour_complexity(wheel) == pytest.approx(1.0, abs=1e-9)
    half = flat.copy()
    half[:, 30:] = 220
    assert 0.5 / 60 < texture_complexity(half) < 2.5 / 60, "one line of edge pixels"


def test_layers_and_costs() -> None:
    assert default_layers(28) == (20, 21, 22, 23, 24, 25)
    assert default_layers(4) == (3,) and default_layers(1) == (0,)
    assert saved(0.89)[0] == pytest.approx(0.073, abs=5e-4) and saved(0.89)[1] == pytest.approx(1.587, abs=5e-4)


# --- masks and crops -------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.floats(0.01, 1.0), st.integers(1, 4))
def test_threshold_keeps_that_many_pixels_and_regions_at_most_k(seed: int, p: float, k: int) -> None:
    from scipy.ndimage import label

    scores = positive(seed, 14, 11)
    kept = top_pixels(scores, p)
    assert int(kept.sum()) == math.ceil(p * 14 * 11 - 1e-9)
    assert float(scores[kept].min()) >= float(torch.where(kept, 0.0, scores).max())
    chosen = regions(kept, scores, k)
    labels, count = label(kept.numpy(), structure=np.ones((3, 3)))
    assert label(chosen.numpy(), structure=np.ones((3, 3)))[1] == min(k, count)
    sums = sorted((float(scores[torch.from_numpy(labels == i)].sum()) for i in range(1, count + 1)), reverse=True)
    assert float(scores[chosen].sum()) == pytest.approx(sum(sums[:k]))


def test_ties_and_the_released_codes_number_of_regions() -> None:
    flat = torch.ones(4, 5)
    assert top_pixels(flat, 0.3).flatten().tolist() == [True] * 6 + [False] * 14
    dots = torch.zeros(21, 21)
    dots[::3, ::3] = torch.arange(49.0).view(7, 7) + 1
    assert int(regions(dots > 0, dots, None).sum()) == 9, "a fifth of 49"
    assert int(regions(dots > 45, dots, None).sum()) == 3, "at least three"


def test_keeping_everything_is_the_identity() -> None:
    image = scenes.render(scenes.scene(torch.Generator().manual_seed(0), 3), 32)
    mask = top_pixels(positive(0, 32, 32), 1.0)
    out, box = refined_picture(image, mask)
    assert bool(mask.all()) and box == (0, 0, 32, 32) and np.array_equal(out, image)


@given(st.integers(0, 99), st.floats(0.1, 0.9))
def test_flipping_the_maps_flips_the_mask(seed: int, p: float) -> None:
    scores = positive(seed, 6, 8)

    def mask(s: torch.Tensor) -> torch.Tensor:
        picture = painted(s, (0, 0, 16, 12), 16, 12)
        return regions(top_pixels(picture, p), picture, 2)

    picture = painted(scores, (0, 0, 16, 12), 16, 12)
    assert torch.allclose(painted(scores.flip(-1), (0, 0, 16, 12), 16, 12), picture.flip(-1))
    if len(picture.unique()) == picture.numel():  # ties go to the first pixel, which a flip changes
        assert torch.equal(mask(scores.flip(-1)), mask(scores).flip(-1))


def test_boxes_crops_and_their_shape() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:9, 10:20] = True
    assert bounding_box(mask) == (10, 4, 20, 9), "right and bottom are exclusive"
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    out, box = refined_picture(image, mask)
    assert box == (10, 4, 20, 9) and out.shape == (15, 30, 3), "2:1 stays 2:1, as large as fits"
    assert np.array_equal(out, resized(image[4:9, 10:20], 30, 15))
    whole, _ = refined_picture(image, mask, canvas=True, fill=(1, 2, 3))
    assert whole.shape == image.shape and whole[0, 0].tolist() == [1, 2, 3] and np.array_equal(whole[2:17], out)
    filled, box = refined_picture(image, mask, crop=False, fill=(9, 9, 9))
    assert (
        box == (0, 0, 30, 20)
        and np.array_equal(filled[4:9, 10:20], image[4:9, 10:20])
        and bool((filled[:4] == 9).all())
    )
    assert bounding_box(torch.zeros(3, 4, dtype=torch.bool)) == (0, 0, 4, 3)


# --- where tokens sit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_token_grid(family: str) -> None:
    model, request = build(family), prompt(family)
    image = request["input_ids"][0] == IMAGE
    at, grid = token_grid(model, request, image)
    assert at.tolist() == image.nonzero()[:, 0].tolist()
    assert grid == ((4, 4) if family == "llava" else (2, 2))
    with pytest.raises(UnsupportedError, match="not the grid of one picture"):
        token_grid(model, request, torch.arange(len(image)) < 5)


def test_tiles_give_the_whole_picture_which_comes_last() -> None:
    model = build("smolvlm")
    at, grid = token_grid(model, {}, torch.ones(12, dtype=torch.bool))
    assert at.tolist() == [8, 9, 10, 11] and grid == (2, 2)


class Settings:
    def __init__(self, **values: Any) -> None:
        self.__dict__ |= values


def test_what_the_processor_shows() -> None:
    crop = Settings(
        do_resize=True, do_center_crop=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    assert visible_part(Settings(image_processor=crop), 672, 336) == (168.0, 0.0, 504.0, 336.0)
    assert visible_part(Settings(image_processor=crop), 300, 900) == pytest.approx((0.0, 300.0, 300.0, 600.0))
    assert visible_part(Settings(pads_to_square=True), 20, 50) == (-15.0, 0.0, 35.0, 50.0)
    assert visible_part(Settings(image_processor=Settings(do_resize=True)), 20, 50) == (0.0, 0.0, 20.0, 50.0)
    picture = painted(torch.ones(2, 2), (168.0, 0.0, 504.0, 336.0), 672, 336)
    assert int(torch.isfinite(picture).sum()) == 336 * 336
    assert int(top_pixels(picture, 0.5).sum()) == 336 * 336 // 2, "what the model does not see does not count"
    assert bool(torch.isfinite(painted(torch.ones(2, 2), (-15.0, 0.0, 35.0, 50.0), 20, 50)).all())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_last_row_capture_equals_output_attentions(family: str) -> None:
    """With GQA, at every step of a cached generation."""
    model, request = build(family), prompt(family)
    got = capture(model, request, [1, 3], max_new_tokens=3)
    model.set_attn_implementation({"text_config": "eager"})
    for m in model.modules():
        if hasattr(m, "rope_deltas"):
            m.rope_deltas = None
    with torch.no_grad():
        out = model.generate(
            **request, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    length = request["input_ids"].shape[1]
    assert got.ids.tolist() == out.sequences[0, length:].tolist()
    for t, step in enumerate(out.attentions):
        for i, layer in enumerate((1, 3)):
            wanted = step[layer][0, :, -1].mean(0)[:length]
            assert torch.allclose(got.maps[t, i], wanted.float(), atol=1e-5)
    first = capture(model, request, [1, 2], generate=False)
    assert first.layer_passes == 3 and torch.allclose(first.maps[0, 0], got.maps[0, 0], atol=1e-5)


def test_last_row_leaves_out_what_the_row_may_not_see() -> None:
    """Padding, a window, a softcap and a learned sink, against the softmax written out."""
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    for host in (Host(7, 7, pads=((3, 0), (0, 0))), Host(9, 9, window=4), Host(1, 8)):
        q, k, v = tensors(host)
        call = AttentionCall(q, k, v, None, host.base(), 0.7, softcap=2.0)
        logits = 2.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 0.7 / 2.0)
        weights = logits.exp() * torch.from_numpy(host.dense())[:, None]
        for sink in (None, sinks):
            total = weights.sum(-1) + (0 if sink is None else sink.exp()[None, :, None])
            wanted = (weights / total[..., None])[:, :, -1].mean(1)
            event = AttentionEvent(0, "", "self", call, sink, context(host), None, v)
            assert torch.allclose(last_row(event), wanted.float(), atol=1e-6)


# --- the whole -------------------------------------------------------------------------------------------------------

VOCABULARY = Words([*scenes.SHAPES, *scenes.COLOURS, *["is", "there", "a", "what", "?", "yes", "no"]])


def test_whole_runs() -> None:
    model, reader = tiny_vlm(VOCABULARY)
    model.eval()
    image = scenes.render(scenes.scene(torch.Generator().manual_seed(1), 4), 48)
    options: dict[str, Any] = {"max_new_tokens": 3, "general": "what is there ?", "layers": [1, 2]}
    found = carve(model, reader, image, "is there a red circle ?", **options)
    assert found.map.shape == found.mask.shape == (48, 48) and found.layer_passes == 12
    assert 0 < float(found.mask.float().mean()) <= 0.4 + 1 / 48**2
    again = carve(model, reader, image, "is there a red circle ?", **options | {"general": found.general})
    assert torch.equal(again.map, found.map) and again.layer_passes == 8, "the general map is not made again"
    early = carve(model, reader, image, "is there a red circle ?", **options, mode="start")
    assert early.layer_passes == 3 + 3 + 4, "both map passes stop after layer 2"
    same = carve(model, reader, image, "is there a red circle ?", **options, p=1.0)
    assert np.array_equal(same.image, image) and same.refined == same.base
    two = carve(model, reader, image, "is there a red circle ?", **options, answer_with="both")
    assert isinstance(two.refined, str)


def test_pillow_in_pillow_out_and_wide_pictures() -> None:
    pil = pytest.importorskip("PIL.Image", reason="needs the package pillow")
    model, reader = tiny_vlm(VOCABULARY)
    image = pil.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8))
    found = carve(model.eval(), reader, image, "what ?", general="is there ?", max_new_tokens=2, canvas=True)
    assert isinstance(found.image, pil.Image) and found.image.size == (60, 30)


def test_bad_input() -> None:
    model, reader = tiny_vlm(VOCABULARY)
    image = np.zeros((48, 48, 3), np.uint8)
    with pytest.raises(ShapeError, match="expected a Pillow image"):
        carve(model, reader, image.astype(float), "what ?")
    with pytest.raises(ConfigError, match=r"p is 1.5"):
        carve(model, reader, image, "what ?", general="what ?", p=1.5, max_new_tokens=1)
    with pytest.raises(ConfigError, match="answer_with is 'none'"):
        carve(model, reader, image, "what ?", answer_with="none")
    with pytest.raises(ConfigError, match=r"layers is \[9\]"):
        carve(model, reader, image, "what ?", general="what ?", layers=[9])
    with pytest.raises(ConfigError, match="mode is 'middle'"):
        carve(model, reader, image, "what ?", general="what ?", mode="middle", max_new_tokens=1)
    with pytest.raises(UnsupportedError, match="without apply_chat_template"):
        carve(model, object(), image, "what ?")
    with pytest.raises(ConfigError, match="K is 0"):
        carve(model, reader, image, "what ?", general="what ?", k=0, max_new_tokens=1)
    with pytest.raises(ShapeError, match="expected the same"):
        contrast(torch.ones(3), torch.ones(4), 0.1)
    with pytest.raises(ShapeError, match="holds 2 requests"):
        capture(model, {"input_ids": torch.ones(2, 3, dtype=torch.long)}, [0])
    with pytest.raises(ShapeError, match="none is an image token"):
        capture(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, [0])
