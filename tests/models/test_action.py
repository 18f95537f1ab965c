"""BMN with and without CSA: the identities of CSA's spec sheet that concern the host, its sampling, labels and losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.csa import CSA
from foveal.models.action import BMN, Maps
from foveal.models.action.attention import NAMED, Wider
from foveal.models.action.sampling import sample_points, sampling_weights, valid_cells
from foveal.models.action.targets import balanced, by_duration, by_end, labels, losses, segment_iou

C_IN, T, WIDTHS, N = 8, 9, (8, 4, 6), 3


def network(attention=None, **options) -> BMN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BMN(C_IN, T, widths=WIDTHS, samples=N, attention=attention, **options).double()


def features(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, C_IN, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def opened(csa: CSA, temporal: bool) -> None:
    """Gates at 1, and a projection that halves both copies, or takes the channel-gated one alone."""
    eye = torch.eye(csa.c_out, dtype=torch.float64)
    shares = (0.5, 0.5) if temporal else (1.0, 0.0)
    with torch.no_grad():
        csa.proj.weight[..., 0] = torch.cat([share * eye for share in shares], 1)
        csa.proj.bias.zero_()
        for layer in (csa.channel_fc, csa.temporal_out) if temporal else ():
            layer.weight.zero_()
            layer.bias.fill_(60.0)


def test_identity_1_open_gates_give_the_plain_detector():
    plain, gated = network(), network("csa")
    opened(gated.attention, temporal=True)
    for a, b in zip(plain(features()), gated(features()), strict=True):
        torch.testing.assert_close(b, a, atol=1e-12, rtol=1e-12)


def test_identity_1_the_channel_gate_alone_is_a_gate_from_r():
    plain, gated = network(), network("csa")
    opened(gated.attention, temporal=False)
    r = features()
    torch.testing.assert_close(gated.encode(r), gated.attention.channel_gate(r) * plain.encode(r))


def test_variants_share_all_but_the_attention():
    plain = network().state_dict()
    for name in NAMED:
        state = network(name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in plain.items())
        assert set(state) - set(plain) and all(key.startswith("attention.") for key in set(state) - set(plain))


def test_the_control_has_as_many_weights_as_csa_and_no_more():
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(Wider(40, 64, 32)) == count(CSA(40, 64, 32)) == 28_960
    for sizes in ((12, 16, 20), (400, 256, 100)):
        assert 0 <= count(CSA(*sizes)) - count(Wider(*sizes)) <= 2 * sizes[1]


def test_both_gates_in_a_row():
    model, r = network("csa+se"), features()
    f = model.base(r)
    first = f * model.attention.first.gate.gate(f)
    torch.testing.assert_close(model.encode(r), model.attention.csa(r, first))


def test_the_proposal_features_equal_sampling_and_then_convolving():
    model, f = network(), torch.randn(2, 8, T, dtype=torch.float64)
    weights = sampling_weights(T, N).double()
    sampled = torch.zeros(2, 8, N, T, T, dtype=torch.float64)
    sampled[..., valid_cells(T)] = torch.einsum("bct,ntk->bcnk", f, weights)
    torch.testing.assert_close(model.match(f), model.sampled(sampled)[:, :, 0])


@pytest.mark.parametrize("mode", ["symmetric", "reference"])
def test_identity_7_sampling_weights_against_a_loop(mode):
    weights, cells = sampling_weights(T, N, mode), valid_cells(T).nonzero().tolist()
    for k, (i, j) in enumerate(cells):
        span = j + 2 - i
        low, high = i - 0.5 * span, j + 1 + 0.5 * span
        for n in range(N):
            expected = [0.0] * T
            for m in range(3):
                s = low + (high - low) * (3 * n + m) / (3 * N - 1)
                if mode == "reference":
                    part, whole = math.modf(s)
                    for at, share in ((int(whole), 1 - part), (math.ceil(s), part)):
                        if 0 <= at < T:
                            expected[at] += share / 3
                else:
                    for at, share in ((math.floor(s), math.floor(s) + 1 - s), (math.floor(s) + 1, s - math.floor(s))):
                        if 0 <= at < T:
                            expected[at] += share / 3
            torch.testing.assert_close(weights[n, :, k], torch.tensor(expected), atol=1e-5, rtol=0)


def test_identity_7_inside_the_video_sampling_keeps_constants_and_ramps():
    steps = 24
    weights, points = sampling_weights(steps, N).double(), sample_points(steps, N)
    inside = ((points >= 0) & (points <= steps - 1)).all(2)
    assert int(inside.sum()) > 100
    torch.testing.assert_close(weights.sum(1).mT[inside], torch.ones(int(inside.sum())).double(), atol=1e-5, rtol=0)
    ramp = torch.einsum("ntk,t->kn", weights, torch.arange(steps).double())
    torch.testing.assert_close(ramp[inside], points.mean(2)[inside], atol=1e-5, rtol=0)


def test_identity_7_below_the_diagonal_stands_the_bias():
    model = network()
    found = model.match(torch.randn(2, 8, T, dtype=torch.float64))[..., ~valid_cells(T)]
    torch.testing.assert_close(found, model.sampled.bias[:, None].expand_as(found))


def test_identity_8_labels_of_one_action():
    a, b = 2, 6
    found = labels([torch.tensor([[a / T, b / T]])], T)
    assert found.iou[0].argmax() == a * T + b - 1 and float(found.iou.max()) == pytest.approx(1)
    assert bool((found.iou[0][~valid_cells(T)] == 0).all())
    assert found.start[0].gt(0.5).nonzero().flatten().tolist() == [a - 1, a, a + 1]
    assert found.end[0].gt(0.5).nonzero().flatten().tolist() == [b - 1, b, b + 1]
    assert float(found.start[0, a]) == pytest.approx(1)
    cell = torch.tensor([[3 / T, 8 / T]])  # of [3, 7]: 3 of the 6 steps that either covers
    assert (
        float(found.iou[0, 3, 7])
        == pytest.approx(0.5)
        == pytest.approx(float(segment_iou(cell, torch.tensor([[a / T, b / T]]))))
    )


def test_labels_take_the_best_action_and_none():
    two, none = labels([torch.tensor([[0.0, 2 / T], [4 / T, 8 / T]]), torch.zeros(0, 2)], T).iou
    assert float(two[0, 1]) == float(two[4, 7]) == pytest.approx(1) and float(none.abs().max()) == 0
    with pytest.raises(ShapeError, match="start before end"):
        labels([torch.tensor([[0.5, 0.2]])], T)


def maps(batch: int, seed: int) -> Maps:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, T),) * 2 + ((batch, T, T),) * 2
    return Maps(*(torch.rand(s, generator=g, dtype=torch.float64) for s in shapes))


def test_losses_against_the_printed_ratios():
    said, truth = maps(2, 0), labels([torch.tensor([[1 / T, 4 / T]]), torch.tensor([[3 / T, 8 / T]])], T)
    found = losses(said, truth, torch.Generator().manual_seed(0))
    positive = truth.start > 0.5
    rho = positive.numel() / int(positive.sum())
    p = said.start
    weighted = 0.5 * rho * positive * (p + 1e-6).log() + 0.5 * rho / (rho - 1) * ~positive * (1 - p + 1e-6).log()
    assert float(found["start"]) == pytest.approx(-float(weighted.mean()))
    parts = found["start"] + found["end"] + 10 * found["regression"] + found["confidence"]
    assert float(found["total"]) == pytest.approx(float(parts))
    again = losses(said, truth, torch.Generator().manual_seed(0))
    assert float(again["total"]) == float(found["total"])


def test_the_regression_draws_as_many_middling_and_low_proposals_as_good_ones():
    truth = labels([torch.tensor([[2 / 40, 30 / 40]])], 40)
    high = int((truth.iou > 0.7).sum())
    error = torch.where(truth.iou > 0.7, 0.0, 1.0).double()
    said = Maps(*(x.double() for x in truth[:2]), truth.iou + error, truth.iou.double())
    drawn = [float(losses(said, truth, torch.Generator().manual_seed(s))["regression"]) for s in range(30)]
    assert high > 50 and sum(drawn) / 30 == pytest.approx(0.5 * 2 / 3, abs=0.02)


def test_losses_ignore_what_lies_below_the_diagonal():
    truth, said = labels([torch.tensor([[2 / T, 6 / T]])], T), maps(1, 1)
    other = said._replace(confidence=said.confidence * valid_cells(T), regression=said.regression * valid_cells(T))
    a, b = (losses(m, truth, torch.Generator().manual_seed(3))["total"] for m in (said, other))
    assert float(a) == pytest.approx(float(b))


def test_identity_11_losses_are_finite_without_a_positive_cell():
    for value in (0.0, 1.0):
        said = Maps(*(torch.full_like(x, value).requires_grad_() for x in maps(2, 0)))
        for segments in ([torch.zeros(0, 2)] * 2, [torch.tensor([[0.0, 1.0]])] * 2):
            total = losses(said, labels(segments, T))["total"]
            assert bool(torch.isfinite(total))
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(total, said))


@pytest.mark.parametrize("side", [False, True])
def test_identity_11_balance_is_finite_when_one_side_is_empty(side):
    p = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    loss = balanced(p, torch.tensor([side, side]))
    chosen = p if side else 1 - p
    assert loss.item() == pytest.approx(-0.5 * (chosen + 1e-6).log().mean().item())
    assert bool(torch.autograd.grad(loss, p)[0].isfinite().all())


def test_maps_by_duration_and_back():
    said = maps(2, 4).confidence * valid_cells(T)
    turned = by_duration(said)
    assert float(turned[1, 2, 3]) == float(said[1, 3, 5]) and float(turned[0, T - 1, 1]) == 0
    torch.testing.assert_close(by_end(turned), said)


def test_gradients_reach_every_weight():
    model = network("csa+se")
    losses(model(features()), labels([torch.tensor([[2 / T, 6 / T]])] * 2, T))["total"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_published_size_has_its_weights():
    plain = BMN(n_steps=4)
    with torch.device("meta"):
        layers = [
            nn.Conv1d(400, 256, 3, groups=4), *(nn.Conv1d(256, 256, 3, groups=4) for _ in range(3)), nn.Conv1d(256, 256, 3),
            *(nn.Conv1d(256, 1, 1) for _ in range(2)), nn.Conv3d(256, 512, (32, 1, 1)), nn.Conv2d(512, 128, 1),
            *(nn.Conv2d(128, 128, 3) for _ in range(2)), nn.Conv2d(128, 2, 1),
        ]  # fmt: skip
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for m in layers for p in m.parameters())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: BMN(10, T, widths=WIDTHS, samples=N), ConfigError, "c_in=10"),
        (lambda: BMN(C_IN, T, widths=WIDTHS, samples=0), ConfigError, "samples=0"),
        (lambda: network("cas"), ConfigError, "Did you mean 'csa'"),
        (lambda: network()(features()[..., 1:]), ShapeError, r"expected \(batch, 8, 9\)"),
        (lambda: sampling_weights(T, N, "clamp"), ConfigError, "'clamp'"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
