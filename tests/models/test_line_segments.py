"""FE-LSD's backbone, the small head on it, and structural AP, by the identities of its spec sheet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.models.line_segments import FusionBackbone, LineDetector, LineMaps
from foveal.models.line_segments.backbone import FUSIONS
from foveal.models.line_segments.detector import Lines, decode, peaks
from foveal.models.line_segments.metrics import distances, mean_structural_ap, structural_ap
from foveal.models.line_segments.targets import WEIGHTS, line_losses, line_targets

SMALL = {"inplanes": 8, "features": 16, "depth": 2, "stacks": 2, "size": (32, 32), "num_heads": 4}


def detector(fusion: str = "full", **options) -> LineDetector:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LineDetector((1, 10), fusion=fusion, **SMALL | options).eval()


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 32, 32, generator=g), torch.randn(2, 10, 32, 32, generator=g)


def test_identity_6_the_published_backbone_has_its_weights_and_shapes():
    with torch.device("meta"):
        model = LineDetector()
        assert sum(p.numel() for p in model.backbone.parameters()) == 62_269_440
        out = model(torch.zeros(1, 3, 512, 512), torch.zeros(1, 10, 512, 512))
    assert out.line.shape == (1, 128, 128) and 1 + sum(m.shape[1] for m in out[1:]) == 13


def test_identity_4_without_fusion_events_do_not_reach_the_frames_half():
    model = detector("add").backbone
    frame, events = pair()
    events.requires_grad_()
    streams = torch.cat([stem(x) for stem, x in zip(model.stems, (frame, events), strict=True)], 1)
    half = model.body(streams).chunk(2, 1)[0]
    (grad,) = torch.autograd.grad(half.square().sum(), events, allow_unused=True)
    assert grad is None or bool((grad == 0).all())
    full = detector("full").backbone
    streams = torch.cat(full.early(*(stem(x) for stem, x in zip(full.stems, (frame, events), strict=True))), 1)
    (grad,) = torch.autograd.grad(full.body(streams).chunk(2, 1)[0].square().sum(), events)
    assert bool((grad != 0).any())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_streams_are_read_as_the_fusion_says(fusion):
    model = detector(fusion)
    frame, events = (x.requires_grad_() for x in pair())
    total = sum(m.square().sum() for m in model(frame, events))
    a, b = torch.autograd.grad(total, (frame, events), allow_unused=True)
    assert (a is not None) == (fusion != "events") and (b is not None) == (fusion != "frame")
    names = {type(m).__name__ for m in model.modules()}
    assert ("DecoderFusion" in names and "ShallowFusion" in names) == (fusion == "full")


@torch.no_grad()
def test_the_hourglass_goes_down_and_up_as_written():
    stack = detector("add").backbone.stacks[0]
    first = x = torch.randn(1, 32, 8, 8)
    fine = stack.merge[0](*x.chunk(2, 1))
    x = stack.down[0](nn.functional.max_pool2d(x, 2))
    middle = stack.merge[1](*x.chunk(2, 1))
    x = stack.down[2](stack.down[1](nn.functional.max_pool2d(x, 2)))
    y = stack.up[1](stack.merge[2](*x.chunk(2, 1)))
    y = y.repeat_interleave(2, 2).repeat_interleave(2, 3) + middle
    y = stack.up[0](y).repeat_interleave(2, 2).repeat_interleave(2, 3) + fine
    torch.testing.assert_close(stack(first), stack.out(y))


def test_a_stack_feeds_its_map_back_into_both_streams():
    model = detector("add").backbone
    seen = []
    for stack in model.stacks:
        stack.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    maps = model(*pair())
    torch.testing.assert_close(seen[1], seen[0] + torch.cat([model.back[0](maps[0])] * 2, 1))


SEGMENTS = [torch.tensor([[[1.2, 1.5], [6.5, 3.25]], [[2.5, 6.75], [6.5, 3.25]]]), torch.zeros(0, 2, 2)]


def test_targets_stand_in_their_cells():
    truth = line_targets(SEGMENTS, (8, 8))
    assert sorted(map(tuple, truth.junction[0].nonzero().tolist())) == [(1, 1), (3, 6), (6, 2)]
    assert sorted(map(tuple, truth.centre[0].nonzero().tolist())) == [(2, 3), (5, 4)]
    torch.testing.assert_close(truth.junction_offset[0, :, 1, 1], torch.tensor([-0.3, 0.0]))
    torch.testing.assert_close(truth.centre_offset[0, :, 2, 3], torch.tensor([0.35, -0.125]))
    torch.testing.assert_close(truth.ends[0, :, 2, 3], torch.tensor([-2.65, -0.875, 2.65, 0.875]))
    lines = truth.line[0]
    assert bool((lines[truth.junction[0] > 0] == 1).all()) and 8 <= int(lines.sum()) <= 16
    assert all(float(part[1].abs().max()) == 0 for part in truth)
    edge = line_targets([torch.tensor([[[0.0, 0.0], [8.0, 8.0]]])], (8, 8))
    assert float(edge.junction[0, 7, 7]) == 1 and float(edge.junction_offset[0, 0, 7, 7]) == 0.5


def said(segments: list[Tensor], size: tuple[int, int] = (8, 8), sure: float = 20.0) -> LineMaps:
    """Maps that say the truth."""
    truth = line_targets(segments, size)
    yes = {name: sure * (2 * getattr(truth, name) - 1) for name in ("line", "junction", "centre")}
    two = {name: torch.stack([-v, v], 1) for name, v in yes.items()}
    return truth._replace(line=yes["line"], junction=two["junction"], centre=two["centre"])


def test_identity_11_decoding_the_truth_gives_it_back():
    first, none = decode(said(SEGMENTS))
    kept = first.segments[first.scores > 0.5]
    assert len(kept) == 2 and len(none.segments) == 0
    assert float(distances(SEGMENTS[0], kept).amin(1).max()) < 1e-4


@given(st.integers(0, 99))
def test_identity_11_only_peaks_are_left_and_they_stay(seed):
    score = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(seed))
    once = peaks(score)
    assert torch.equal(peaks(once), once)
    for b, y, x in once.nonzero().tolist():
        around = score[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        assert float(score[b, y, x]) == float(around.max())
    assert int((once > 0).sum()) >= 2


def test_equal_segments_are_kept_once_with_the_best_score_and_empty_ones_dropped():
    maps = said([SEGMENTS[0][:1]])
    ends = maps.ends.clone()
    ends[0, :, 5, 5] = (
        torch.tensor([6.5, 3.25, 1.2, 1.5]) - 5.5
    )  # the same line seen from elsewhere, in the other order
    centre = maps.centre.clone()
    centre[0, 1, 5, 5], centre[0, 0, 5, 5] = 1.0, 0.0
    found = decode(maps._replace(ends=ends, centre=centre))[0]
    assert len(found.segments) == 1 and float(found.scores[0]) > 0.99  # cells without ends fall together and are gone
    assert float(distances(SEGMENTS[0][:1], found.segments)) < 1e-6


def test_losses_are_weighted_and_blind_to_the_order_of_ends():
    g = torch.Generator().manual_seed(0)
    maps = LineMaps(*(torch.randn(2, *s, 8, 8, generator=g) for s in ((), (2,), (2,), (2,), (2,), (4,))))
    truth = line_targets(SEGMENTS, (8, 8))
    found = line_losses(maps, truth)
    assert float(found["total"]) == pytest.approx(float(sum(WEIGHTS[n] * found[n] for n in WEIGHTS)))
    without = line_losses(maps, truth, WEIGHTS | {"line": 0.0})
    assert float(found["total"] - without["total"]) == pytest.approx(float(0.5 * found["line"]), abs=1e-4)
    other = line_losses(maps, line_targets([s.flip(1) for s in SEGMENTS], (8, 8)))
    assert all(float(found[n]) == pytest.approx(float(other[n])) for n in found)
    at = truth.junction.bool()
    expected = (maps.junction_offset - truth.junction_offset).abs().sum(1)[at].mean()
    assert float(found["junction_offset"]) == pytest.approx(float(expected))
    perfect = line_losses(said(SEGMENTS), truth)
    assert float(perfect["total"]) < 1e-6


def test_losses_of_empty_images_are_finite_and_offsets_count_nothing():
    g = torch.Generator().manual_seed(0)
    maps = LineMaps(
        *(torch.randn(1, *s, 8, 8, generator=g).requires_grad_() for s in ((), (2,), (2,), (2,), (2,), (4,)))
    )
    found = line_losses(maps, line_targets(SEGMENTS[1:], (8, 8)))
    assert bool(found["total"].isfinite()) and found["ends"].item() == found["centre_offset"].item() == 0
    grads = torch.autograd.grad(found["total"], maps, allow_unused=True)
    assert float(grads[5].abs().max()) == 0


TRUTH = [
    torch.tensor([[[10.0, 10.0], [50.0, 20.0]], [[60.0, 70.0], [90.0, 100.0]]]),
    torch.tensor([[[5.0, 5.0], [5.0, 60.0]]]),
]


def lines(segments: Tensor, scores: list[float]) -> Lines:
    return Lines(segments, torch.tensor(scores))


def test_identity_9_perfect_and_turned_detections_are_perfect():
    for found in (TRUTH, [t.flip(1) for t in TRUTH]):
        said = [lines(found[0], [0.9, 0.5]), lines(found[1], [0.7])]
        assert mean_structural_ap(said, TRUTH, 128) == 1


def test_identity_9_duplicates_are_false():
    said = [lines(torch.cat([TRUTH[0][:1]] * 2 + [TRUTH[0][1:]]), [0.9, 0.8, 0.7]), lines(TRUTH[1], [0.6])]
    assert structural_ap(said, TRUTH, 5) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)


def test_identity_9_a_pixel_off_at_both_ends_is_two_away():
    moved = TRUTH[0] + torch.tensor([1.0, 0.0])
    assert float(distances(moved[:1], TRUTH[0][:1])) == 2
    assert structural_ap([lines(moved, [1, 1])], TRUTH[:1], 5) == 1
    assert structural_ap([lines(moved, [1, 1])], TRUTH[:1], 2) == 0, "the threshold itself is too far"
    half = [t / 2 for t in TRUTH[:1]]
    assert mean_structural_ap([lines(half[0] + torch.tensor([1.0, 0.0]), [1, 1])], half, 64) == pytest.approx(2 / 3)


def test_identity_9_images_without_detections_count_in_recall_and_those_without_truth_in_precision():
    nothing = Lines(torch.zeros(0, 2, 2), torch.zeros(0))
    assert structural_ap([lines(TRUTH[0], [0.9, 0.8]), nothing], TRUTH, 5) == pytest.approx(2 / 3)
    empty = torch.zeros(0, 2, 2)
    said = [lines(TRUTH[1], [0.9]), lines(TRUTH[1], [0.8])]
    assert structural_ap(said, [empty, TRUTH[1]], 5) == pytest.approx(0.5)
    assert math.isnan(structural_ap([nothing], [empty], 5))
    with pytest.raises(ShapeError, match="1 images and truth 2"):
        structural_ap([nothing], TRUTH, 5)


def test_only_the_nearest_truth_is_tried():
    near = torch.tensor([[[10.0, 10.0], [50.0, 10.0]], [[10.0, 11.0], [50.0, 11.0]]])
    said = [lines(near[[0, 0]] + torch.tensor([0.0, 0.2]), [0.9, 0.8])]
    assert structural_ap(said, [near], 5) == pytest.approx(0.5)


def test_detections_are_in_pixels():
    model = detector()
    model.forward = lambda frame, events: said(SEGMENTS)  # type: ignore[method-assign]
    found = model.detect(*pair())[0]
    assert float(distances(4 * SEGMENTS[0], found.segments[:2]).amin(1).max()) < 1e-3


def test_gradients_reach_every_weight_of_the_last_stack():
    model = detector(stacks=1).train()
    line_losses(model(*pair()), line_targets(SEGMENTS, (8, 8)))["total"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: detector("fulll"), ConfigError, "Did you mean 'full'"),
        (lambda: FusionBackbone(size=(100, 512)), ConfigError, "64 divides"),
        (lambda: detector()(torch.zeros(1, 3, 32, 32), torch.zeros(1, 10, 32, 32)), ShapeError, r"\(1, 10\) channels"),
        (lambda: detector()(torch.zeros(1, 1, 32, 32), torch.zeros(1, 10, 32, 64)), ShapeError, "equal sides"),
        (lambda: line_targets([torch.full((1, 2, 2), 9.0)], (8, 8)), ShapeError, "inside 8 × 8"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
